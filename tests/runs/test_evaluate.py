"""A detector of any format measured on a folder: numbers, classes and a file that pycocotools reads to the same AP."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detrdistill import cli
from detrdistill.checkpoints.hugging_face import export_hugging_face
from detrdistill.errors import InputError
from detrdistill.models import build_detector
from detrdistill.recipes.parts import BackboneRecipe, Resize, Schedule
from detrdistill.recipes.recipe import Recipe
from detrdistill.runs.evaluate import evaluate_model
from detrdistill.training.evaluation import detect
from tests.checkpoints.test_formats import mmdet3_state, without_neck_bias
from tests.folders import CATEGORIES, read_split, write_folder, write_split
from tests.models.small import randomise, small_detector

NAMES = ["disc", "never seen", "cross", "bar", "bar stool"]  # of the model, in an order of its own


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "mine")


def hugging_face(folder: Path) -> Path:
    recipe = Recipe(
        backbone=BackboneRecipe(name="resnet18"), dim=32, heads=4, ffn=32, encoder_layers=1, decoder_layers=2, queries=30, levels=2,
        points=2, dropout=0.0, schedule=Schedule(steps=1),
    )  # fmt: skip
    detector = build_detector(recipe, len(NAMES)).eval()
    randomise(detector)
    return export_hugging_face(detector, folder, NAMES, Resize(short=64, long=96, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)))


def by_pycocotools(annotations: Path, results: Path) -> tuple[float, list[float]]:
    """AP, and AP a class, in percent."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations)
        evaluator = COCOeval(truth, truth.loadRes(str(results)), "bbox")
        evaluator.evaluate(), evaluator.accumulate(), evaluator.summarize()
    precision = evaluator.eval["precision"][:, :, :, 0, -1]
    return 100 * evaluator.stats[0], [100 * precision[:, :, k].mean() for k in range(precision.shape[2])]


def with_lucky_boxes(data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The results of a model with random weights, one of whose boxes an image is right."""
    objects = {one["image_id"]: one for one in read_split(data, "val")["annotations"]}

    def luckier(*args):
        found, held = detect(*args)
        for one in {one["image_id"]: one for one in found}.values():
            one |= {key: objects[one["image_id"]][key] for key in ("category_id", "bbox")}
        return found, held

    monkeypatch.setattr("detrdistill.runs.evaluate.detect", luckier)
    return hugging_face(folder)


def test_the_command(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    content = read_split(data, "val")
    for one in content["annotations"]:
        one |= {"area": one["bbox"][2] * one["bbox"][3]}
    write_split(data, "val", content)
    model = with_lucky_boxes(data, tmp_path / "hf", monkeypatch)
    words = ["evaluate", str(model), "--data", str(data), "--out", str(tmp_path / "out"), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["detrdistill", *words])
    cli.main()
    shown = capsys.readouterr().out
    ap, classes = by_pycocotools(data / "instances_val.json", tmp_path / "out" / "results.json")
    assert 0 < ap < 90 and f"\nAP     {ap:5.1f}\nAP50 " in shown and shown.endswith(f"\n{tmp_path / 'out' / 'results.json'}\n")
    counts = [sum(one["category_id"] == category["id"] for one in content["annotations"]) for category in CATEGORIES]
    for category, count, value in zip(CATEGORIES, counts, classes, strict=True):
        assert f"\n{category['name']:<5}  {count:>7}  {value:>5.1f}\n" in shown
    assert "(Hugging Face weights of a Deformable DETR)" in shown and "shorter side 64 px, longer at most 96 px" in shown
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {one["image_id"] for one in found} == {100, 101, 102, 103} and {one["category_id"] for one in found} <= {3, 17, 90}
    assert max(one["bbox"][0] for one in found) > 1, "in pixels"


def test_images_are_prepared_as_the_model_wants_them(data: Path, tmp_path: Path) -> None:
    model = hugging_face(tmp_path / "hf")
    found = evaluate_model(model, data, "train", device="cpu", batch=3)
    assert found.resize == Resize(short=64, long=96, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)) and len(found.data) == 4
    assert found.about.rows == (2, 0, 3)
    other = evaluate_model(model, data, "train", device="cpu", batch=3, settings={"resize.short": "32"})
    assert other.resize == found.resize.replace(short=32) and other.results != found.results


def test_what_a_file_does_not_say_is_asked_for(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "epoch_50.pth"
    torch.save(mmdet3_state("deformable", without_neck_bias("deformable")), path)
    with pytest.raises(InputError, match="give heads="):
        evaluate_model(path, data, device="cpu")
    with pytest.raises(InputError, match=r"does not say its classes; name its 3 outputs as 'outputs'"):
        evaluate_model(path, data, device="cpu", settings={"heads": "4"})
    small = {"heads": "4", "resize.short": "64"}
    found = evaluate_model(path, data, device="cpu", outputs=["cross", "bar", "disc"], settings=small)
    assert found.about.rows == (0, 2, 1) and len(found.metrics) == 12 and found.classes.keys() == {3, 17, 90}
    with pytest.raises(InputError, match=r"does not know 1 of the 3 classes of .*mine \(disc; it knows cross, bar, cup\); give data"):
        evaluate_model(path, data, device="cpu", outputs=["cross", "bar", "cup"], settings=small)
    for wrong, message in (
        ({"heads": "many"}, "'heads' = 'many': a whole number"),
        ({"resize.short": "x"}, "'short' = 'x'"),
        (
            {"categories": "2"},
            r"setting 'categories' is none that an evaluation takes; known are heads, points, queries, backbone\.dilation",
        ),
        ({"part": "2"}, "'part' = '2'"),
        ({"backbone.dilation": "x"}, "'backbone.dilation' = 'x'"),
        ({"queries": "0"}, "'queries' = '0'"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate_model(path, data, device="cpu", outputs=["cross", "bar", "disc"], settings=small | wrong)
    with pytest.raises(InputError, match="batch 0"):
        evaluate_model(path, data, device="cpu", batch=0)
    with pytest.raises(InputError, match="no annotations of the split 'test'"):
        evaluate_model(path, data, "test", device="cpu")


def test_which_part_and_dilation_can_be_stated(data: Path, tmp_path: Path) -> None:
    path, small = tmp_path / "w.pth", {"heads": "4", "resize.short": "64", "resize.mean": "0.5,0.5,0.5"}
    states = {part: small_detector("deformable", seed=seed).state_dict() for seed, part in enumerate(("student", "teacher"))}
    torch.save({f"{part}.{name}": value for part, state in states.items() for name, value in state.items()}, path)

    def measure(**settings):
        return evaluate_model(path, data, device="cpu", outputs=["cross", "bar", "disc"], settings=small | settings)

    with pytest.raises(InputError, match=r"--set part=student of evaluate, --set teacher\.start\.part=student of train"):
        measure()
    student = measure(part="student")
    assert student.resize.mean == (0.5, 0.5, 0.5) and student.about.left_out == ("teacher",)
    assert student.results != measure(part="teacher").results
    assert student.results != measure(part="student", **{"backbone.dilation": "1"}).results


def test_adamixer_counts_as_many_detections_as_its_code(data: Path, tmp_path: Path) -> None:
    """As many as it has queries, of the best pairs of query and class."""
    path = tmp_path / "w.pth"
    torch.save({"state_dict": small_detector("adamixer").state_dict(), "meta": {"CLASSES": ["bar", "cross", "disc"]}}, path)
    found = evaluate_model(path, data, device="cpu", settings={"resize.short": "64"})
    assert len(found.results) == 4 * small_detector("adamixer").top

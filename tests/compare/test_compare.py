"""`detrdistill compare`: the numbers are an evaluation's, costs are counted and kept once, what cannot be compared is refused."""

import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from detrdistill import cli
from detrdistill.compare import compare as comparing
from detrdistill.compare.compare import Comparison, compare_models, named_models, short_names
from detrdistill.compare.costs import first_images, gflops, milliseconds, peak_mib, sizes_of
from detrdistill.compare.write import most_different, write_comparison
from detrdistill.errors import InputError
from detrdistill.predict.models import open_model
from detrdistill.recipes.parts import Folder
from detrdistill.records import read_record
from detrdistill.runs.evaluate import evaluate_model
from detrdistill.runs.store import COST, Store
from detrdistill.training.evaluation import coco_evaluation
from tests.folders import read_split, write_folder, write_split
from tests.models.small import small_detector
from tests.small_runs import NAMES, small_run


def inside(x: float, y: float, width: float, height: float) -> bool:
    return min(x, y) >= 0 and x + width <= 56 and y + height <= 48


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four images two have one object each, which the student with its random weights sees best (of those that lie inside)."""
    root = write_folder(tmp_path_factory.mktemp("data") / "mine")
    guesses = evaluate_model(small_run(Store(tmp_path_factory.mktemp("before")), root), root, device="cpu").results
    best = {one["image_id"]: one for one in reversed(guesses) if inside(*one["bbox"])}
    content = read_split(root, "val")
    others = [one for one in content["annotations"] if one["image_id"] > 101]
    seen = [{"id": id, "image_id": id, "iscrowd": 0} | {key: best[id][key] for key in ("category_id", "bbox")} for id in (100, 101)]
    write_split(root, "val", content | {"annotations": seen + others})
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Path]:
    store = Store(tmp_path_factory.mktemp("results"))
    return {"student": small_run(store, data), "teacher": small_run(store, data, "adamixer", 1)}


@pytest.fixture(scope="module")
def found(runs: dict[str, Path], data: Path) -> Comparison:
    models = named_models([str(path) for path in runs.values()], list(runs), "cpu")
    return compare_models(models, Folder(path=data), threshold=0.01, progress=False)


def test_the_numbers_are_those_of_an_evaluation(found: Comparison, runs: dict[str, Path], data: Path) -> None:
    assert found.names == ["student", "teacher"]
    for side in found.sides:
        alone = evaluate_model(runs[side.name], data, device="cpu")
        assert side.metrics == pytest.approx(alone.metrics, abs=1e-3) and side.classes == pytest.approx(alone.classes, abs=1e-3)
        assert sum(len(one.names) for one in side.found) == len(alone.results)
    assert found.table.loc["student", "parameters (M)"] * 1e6 == pytest.approx(
        sum(p.numel() for p in small_detector("deformable").parameters())
    )
    assert pd.isna(found.table.loc["student", "AP gain"]) and found.table.loc["teacher", "AP gain"] == pytest.approx(
        found.sides[1].metrics["AP"] - found.sides[0].metrics["AP"]
    )
    assert (found.table["ms from"] <= found.table["ms"]).all() and (found.table["ms"] <= found.table["ms to"]).all()
    assert found.classes["objects"].sum() == 5 == found.repaired.loc["teacher"].sum() and list(found.classes.index) == NAMES
    assert found.sides[0].metrics["AP"] > 0 and found.repaired.loc["teacher", ["found by both", "broken"]].sum() == 2
    assert found.images["difference"].is_monotonic_decreasing and {0, 1} <= set(most_different(found))


def test_costs_are_kept_beside_a_run_once(
    found: Comparison, runs: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [run / COST for run in runs.values()]
    before = [path.read_bytes() for path in paths]
    record = read_record(runs["student"] / "record.json")
    kept, side = Store(runs["student"].parents[1]).cost(record), found.sides[0]
    assert (kept.parameters, kept.gflops) == (side.model.parameters, pytest.approx(side.gflops, rel=1e-5, abs=1e-6))
    assert kept.milliseconds["median"] == pytest.approx(side.times[0], abs=1e-3) and kept.threads == 1 and "grid_sample" in kept.counter
    assert sum(kept.images.values()) == 4 and set(kept.images) == {"64 x 85", "73 x 64"}
    models = named_models([str(path) for path in runs.values()], list(runs), "cpu")
    monkeypatch.setattr(comparing, "milliseconds", lambda models, _: [(1.0, 0.5, 2.0)] * len(models))
    compare_models(models, Folder(path=data), progress=False)
    assert [path.read_bytes() for path in paths] == before
    for path in paths:
        path.unlink()
    monkeypatch.setattr(comparing, "REFERENCE", runs["student"].parents[2])
    compare_models(models, Folder(path=data), progress=False)
    assert not any(path.exists() for path in paths), "committed runs stay as they are"
    copied = shutil.copytree(runs["student"], tmp_path / "elsewhere")
    monkeypatch.setattr(comparing, "REFERENCE", tmp_path / "none")
    compare_models(named_models([str(runs["student"] / "weights.safetensors"), str(copied)], (), "cpu"), Folder(path=data), progress=False)
    assert paths[0].exists() and sorted(path.name for path in tmp_path.rglob("*")) == ["elsewhere", "record.json", "weights.safetensors"]


def test_damaged_costs_are_said_before_anything_is_measured(
    runs: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "results" / "runs" / runs["student"].name
    shutil.copytree(runs["student"], run)
    (run / COST).write_text("{")
    models = named_models([str(run), str(runs["teacher"])], ["student", "teacher"], "cpu")
    measured = []
    for name in ("peak_mib", "milliseconds", "_detect"):
        monkeypatch.setattr(comparing, name, lambda *given: measured.append(given))
    with pytest.raises(InputError, match=r"cost\.json: not a JSON object; delete it to measure again"):
        compare_models(models, Folder(path=data), progress=False)
    assert not measured


def test_flops_are_those_of_the_products(data: Path, runs: dict[str, Path]) -> None:
    """Of a convolution and a linear layer, by hand; a size that was seen is not counted twice."""
    model = open_model(str(runs["student"]), "cpu")
    layer, calls = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.Flatten(2), torch.nn.ReLU()), []

    def outputs(batch):
        calls.append(batch.pixels.shape)
        with torch.no_grad():
            return layer(batch.pixels) @ torch.ones(batch.pixels.shape[-2:].numel(), 2)

    dataset = comparing.open_dataset(Folder(path=data), "val", comparing.data_cache(), None)
    batches = first_images(dataset, model)
    assert sizes_of(batches) == {"64 x 85": 2, "73 x 64": 2}
    model.outputs = outputs
    areas = [batch.pixels.shape[-2:].numel() for batch in batches]
    assert (
        gflops(model, batches) == pytest.approx(sum(2 * 27 * 5 * area + 2 * 5 * area * 2 for area in areas) / 4 / 1e9) and len(calls) == 2
    )


def test_time_and_memory_are_measured(data: Path, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(str(runs["student"]), "cpu")
    dataset = comparing.open_dataset(Folder(path=data), "val", comparing.data_cache(), None)
    batches, order = first_images(dataset, model, 1), []

    def slow(batch):
        order.append(torch.get_num_threads())
        torch.zeros(2**24 * (len(order) <= 2)).add_(1)  # 64 MiB, before anything is timed
        return torch.zeros(1)

    model.outputs = slow
    if (peak := peak_mib(model, batches)) is not None:  # Linux
        assert 62 <= peak - model.weight_bytes / 2**20 < 100
    before = torch.get_num_threads()
    (median, low, high), other = milliseconds([model, model], [batches, batches], rounds=3)
    assert 0 < low <= median <= high and other[0] > 0 and len(order) == 2 + 2 * 4 and set(order[2:]) == {1}
    assert torch.get_num_threads() == before


def test_what_is_written(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a word on data, it is the first run's."""
    out = tmp_path / "out"
    words = ["compare", *map(str, runs.values()), "--out", str(out), "--threshold", "0.01", "--device", "cpu", "--names", "student", "b|c"]
    monkeypatch.setattr(sys, "argv", ["detrdistill", *words])
    cli.main()
    told, names = (
        capsys.readouterr().out,
        ["comparison.csv", "classes.csv", "images.csv", "comparison.png", "differences.png", "confusion.png"],
    )
    assert all(str(out / name) in told for name in (*names, "comparison.md"))
    assert {path.name for path in out.iterdir()} == {*names, "comparison.md"}
    table = pd.read_csv(out / "comparison.csv", index_col=0)
    assert list(table.index) == ["student", "b|c"] and {"AP", "GFLOPs", "ms", "peak MiB", "hardware"} <= set(table.columns)
    page = (out / "comparison.md").read_text()
    assert "| b c |" in page and "not counted: grid_sample" in page and "![confusion](confusion.png)" in page
    assert len(pd.read_csv(out / "images.csv")) == 4 and list(pd.read_csv(out / "classes.csv")["class"]) == NAMES


def test_models_of_other_classes_are_refused(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    torch.save({"state_dict": small_detector("adamixer").state_dict(), "meta": {"CLASSES": ["cross", "disc", "cup"]}}, weights)
    models = named_models([str(runs["student"]), str(weights)], ["ours", "theirs"], "cpu")
    with pytest.raises(
        InputError, match=r"theirs does not know 1 of the 3 classes of .*instances_val\.json \(bar\), and ours does; compare"
    ):
        compare_models(models, Folder(path=data), progress=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{run}",), "a comparison needs two or more"),
        (("{run}", "{run}", "--names", "a"), "names a: 1 different for 2 models; give one each"),
        (("{run}", "absent"), "model 'absent': no such file or folder"),
        (("{run}", "{run}", "--threshold", "-1"), "threshold -1: a score from 0 to 1"),
        (("{run}", "{run}", "--data", "absent"), "data folder absent: does not exist"),
        (("{run}", "{run}", "--out", "file/x"), "file is a file"),
        (("{run}", "{run}", "--split", "test"), "no annotations of the split 'test'"),
        (("w.pth", "w.pth"), "none of the models is a run, whose data is known; say on which data they are compared: --data FOLDER"),
    ],
)
def test_refusals(
    words: tuple[str, ...], message: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """One line, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    torch.save({"state_dict": small_detector("adamixer").state_dict(), "meta": {"CLASSES": NAMES}}, "w.pth")
    given = [word.format(run=runs["student"]) for word in words]
    monkeypatch.setattr(sys, "argv", ["detrdistill", "compare", *given, "--device", "cpu"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"file", "w.pth"}


def test_short_names(runs: dict[str, Path], tmp_path: Path) -> None:
    student = read_record(runs["student"] / "record.json").recipe.title
    assert short_names([runs["student"], runs["student"] / "weights.safetensors", tmp_path / "a.onnx"]) == [
        f"{student} (1)",
        f"{student} (2)",
        "a",
    ]


def test_detectors_that_do_not_differ(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """On data without an object: no AP, no difference, and still a page."""
    root = write_folder(tmp_path / "mine", images=2)
    content = read_split(root, "val")
    write_split(root, "val", content | {"annotations": content["annotations"][:1]})
    models = named_models([str(runs["student"])] * 2, ["one", "other"], "cpu")
    found = compare_models(models, Folder(path=root), threshold=1.0, progress=False)
    assert most_different(found) == [] and found.confusion["one"].sum() == 1
    paths = write_comparison(found, tmp_path / "out")
    assert {path.name for path in paths} >= {"comparison.md", "comparison.png"} and not (tmp_path / "out" / "differences.png").exists()
    assert coco_evaluation(found.data.coco.dataset, [])[0]["AP"] == 0 and json.dumps(found.table.to_dict())

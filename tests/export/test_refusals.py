"""What an export is given, in every form, and what is refused in a line, with nothing written."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from detrdistill import commands
from detrdistill.checkpoints.hugging_face import export_hugging_face
from detrdistill.checkpoints.names import COCO_91
from detrdistill.errors import InputError
from detrdistill.export import write
from detrdistill.models import build_detector
from detrdistill.models.weights import save_weights
from detrdistill.recipes.identity import run_id
from detrdistill.recipes.parts import BackboneRecipe, Digits, Folder, Resize, Schedule
from detrdistill.recipes.recipe import Recipe
from detrdistill.records import Record
from detrdistill.runs.store import Store
from tests.folders import write_folder
from tests.models.small import small_detector

RECIPE = Recipe(
    backbone=BackboneRecipe(name="resnet18", weights="none"), form="box_refine", dim=32, heads=4, ffn=32, encoder_layers=1,
    decoder_layers=2, queries=5, levels=2, points=2, resize={"short": 64, "long": 96}, schedule=Schedule(steps=1),
    data=Digits(size=48, train=2, val=2),
)  # fmt: skip


def put(store: Store, recipe: Recipe, names: str = "a, b, c") -> Path:
    save_weights(store.weights(recipe), build_detector(recipe, len(names.split(","))), {"categories": names})
    store.write(Record(id=run_id(recipe), recipe=recipe, metrics={}, curve=[], cost={}, parents={}, provenance={}))
    return store.folder(recipe)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What would be written: detectors, metadata, images."""
    calls: list[tuple] = []
    monkeypatch.setattr(write, "write_folder", lambda *given: calls.append(given) or 0.0)
    return calls


def test_every_form_of_a_model(
    tmp_path: Path, written: list[tuple], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = put(Store(tmp_path / "results" / "mine"), RECIPE)
    monkeypatch.setenv("DETRDISTILL_RESULTS", str(tmp_path / "results"))
    detector = build_detector(RECIPE, 3)
    hub = export_hugging_face(detector, tmp_path / "hub", ["a", "b", "c"], Resize(short=64, long=96))
    torch.save({"model": detector.state_dict(), "args": {"nheads": 4, "dec_n_points": 2, "enc_n_points": 2}}, tmp_path / "mine.pth")
    of_run, others = (run, run / "weights.safetensors", run.name), (hub, tmp_path / "mine.pth")
    for model in (*of_run, *others):
        outputs = ("a", "b", "c") if model == tmp_path / "mine.pth" else ()
        commands.export(str(model), tmp_path / "out", format="onnx", outputs=outputs)
        given, _, about, images, post_processing = written.pop()
        assert isinstance(given, nn.Module) and not given.training and not post_processing
        assert about["detector"] == "deformable_detr" and about["run"] == (run.name if model in of_run else "")
        source = "the run's validation images" if model in of_run else "noise (no images: give --data)"
        assert f" on {source} (1 of " in capsys.readouterr().out
        assert [len(one) for one in images] == [1, 3] and images[0].pixels.shape[2] != images[1].pixels.shape[2]


def test_images_that_are_gone_are_noise(tmp_path: Path, written: list[tuple]) -> None:
    run = put(Store(tmp_path / "results"), RECIPE.replace(data=Folder(path=tmp_path / "gone")))
    assert "on noise (the run's images cannot be had: data folder " in write.export_onnx(run, tmp_path / "out")
    assert "on images of" in write.export_onnx(run, tmp_path / "out", data=write_folder(tmp_path / "mine", images=1))


def test_ids_of_classes() -> None:
    names = [name for name in COCO_91 if name]
    assert write.classes(["disc", "bar"], {"bar": 90, "cross": 3, "disc": 17}) == [{"id": 17, "name": "disc"}, {"id": 90, "name": "bar"}]
    assert [one["id"] for one in write.classes(names, {})] == [id for id, name in enumerate(COCO_91) if name]
    assert write.classes(["disc", "bar"], {"bar": 90}) == [{"id": 0, "name": "disc"}, {"id": 1, "name": "bar"}]


def test_outputs_without_a_class_are_left_out(tmp_path: Path, written: list[tuple]) -> None:
    save_weights(tmp_path / "weights.safetensors", small_detector("conditional"), {})
    write.export_onnx(tmp_path / "weights.safetensors", tmp_path / "out", outputs=("a", "", "c"), settings={"heads": "4"})
    detector, _, about, *_ = written.pop()
    assert about["classes"] == '[{"id": 0, "name": "a"}, {"id": 1, "name": "c"}]' and len(detector.class_embed.weight) == 2


def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_weights(tmp_path / "nameless.safetensors", small_detector("conditional"), {})
    Path("file").write_text("")
    Path("there").mkdir()
    Path("closed").mkdir(mode=0o500)
    before = sorted(tmp_path.rglob("*"))

    def refused(message: str, model: str, folder: str, **words) -> None:
        with pytest.raises(InputError, match=message) as error:
            commands.export(model, Path(folder), **words)
        assert "\n" not in str(error.value) and sorted(tmp_path.rglob("*")) == before

    refused(r"format 'tensorrt' is unknown; known: hugging-face, onnx", "nameless.safetensors", "out", format="tensorrt")
    for words in ({"post_processing": True}, {"data": Path("there")}, {"outputs": ("a",)}, {"set": ("heads=4",)}):
        refused(r"format hugging-face takes no post-processing, data, outputs or set", "nameless.safetensors", "out", **words)
    refused(r"output there: exists already; name a new folder", "nameless.safetensors", "there", format="onnx")
    refused(r"output out\.onnx: names a file; name the new folder", "nameless.safetensors", "out.onnx", format="onnx")
    refused(r"output folder file/out: .*file is a file", "nameless.safetensors", "file/out", format="onnx")
    refused(r"model 'absent\.pth': no such file or folder", "absent.pth", "new/out", format="onnx")
    refused(r"setting 'header' is none that an export takes", "nameless.safetensors", "out", format="onnx", set=("header=4",))
    refused(r"does not say its classes; name its 3 outputs", "nameless.safetensors", "out", format="onnx", set=("heads=4",))
    refused(r"data folder absent: does not exist", "nameless.safetensors", "out", format="onnx", data=Path("absent"),
            set=("heads=4",), outputs=("a", "b", "c"))  # fmt: skip
    monkeypatch.setattr(write.os, "access", lambda path, mode: path.name != "closed")
    refused(r"output folder closed/out: no permission", "nameless.safetensors", "closed/out", format="onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused(r"needs onnxscript, which is not installed; install the extra: pip install 'detrdistill\[onnx\]'",
            "nameless.safetensors", "out", format="onnx")  # fmt: skip

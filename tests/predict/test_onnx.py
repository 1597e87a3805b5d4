"""An .onnx is read like any other detector: its metadata, its images, its outputs with and without post-processing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detrdistill.compare.compare import compare_models, named_models
from detrdistill.errors import InputError
from detrdistill.predict.models import open_model, prepare
from detrdistill.recipes.parts import Folder
from detrdistill.runs.store import Store
from tests.folders import write_folder
from tests.small_runs import NAMES, small_run

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

# One query: a class is as likely as its colour's mean is high, and the box is the size of the image in hundreds of pixels.
GRAPH = """<ir_version: 8, opset_import: ["" : 18]>
graph (float[B,3,H,W] pixels, int64[B,2] sizes) => (float[B,1,3] logits, float[B,1,4] boxes)
<int64[2] sides = {2, 3}, int64[1] query = {1}, float[1] hundred = {100.0}> {
    means = ReduceMean <keepdims: int = 0> (pixels, sides)
    logits = Unsqueeze (means, query)
    small = Cast <to: int = 1> (sizes)
    parts = Div (small, hundred)
    both = Concat <axis: int = 1> (parts, parts)
    boxes = Unsqueeze (both, query)
}"""
# The same three pairs for each image.
CHOSEN = """<ir_version: 8, opset_import: ["" : 18]>
graph (float[1,3,H,W] pixels, int64[1,2] sizes, int64[1,2] original_sizes) => (float[1,3] scores, int64[1,3] labels, float[1,3,4] boxes)
<float[1,3] s = {0.9, 0.5, 0.2}, int64[1,3] l = {2, 0, 1}, float[1,1,4] ones = {1.0, 1.0, 1.0, 1.0}, int64[3] three = {1, 3, 4}> {
    scores = Identity (s)
    labels = Identity (l)
    boxes = Expand (ones, three)
}"""
ABOUT = {
    "classes": json.dumps([{"id": id, "name": name} for id, name in zip((3, 17, 90), NAMES, strict=True)]),
    "resize": json.dumps({"short": 40, "long": 50}),
    "mean": json.dumps([0.5, 0.5, 0.5]),
    "std": json.dumps([0.1, 0.2, 0.5]),
    "top": "2",
}


def write(path: Path, graph: str = GRAPH, **about: str) -> str:
    model = onnx.parser.parse_model(graph)
    onnx.helper.set_model_props(model, {name: text for name, text in (ABOUT | about).items() if text})
    onnx.save(model, path)
    return str(path)


def red(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (255, 0, 0))


def test_images_are_prepared_as_its_metadata_says(tmp_path: Path) -> None:
    model = open_model(write(tmp_path / "model.onnx", parameters="123"))
    assert (model.names, model.ids, model.top, model.parameters) == (tuple(NAMES), (3, 17, 90), 2, 123)
    batch = prepare([red(80, 80), red(40, 20)], [1, 2], model.transform)
    logits, boxes = model.outputs(batch)
    assert logits[0, 0].tolist() == pytest.approx([4, -2, -0.8]) and logits[1, 0, 0] == pytest.approx(5 * 25 * 50 / (40 * 50))
    assert boxes[:, 0, :2].tolist() == [pytest.approx([0.4, 0.4]), pytest.approx([0.25, 0.5])], "without padding"
    first, second = model.detect(batch, classes=[0, 2])
    assert first["labels"].tolist() == [0, 2] and second["boxes"][0].tolist() == pytest.approx(
        [0.125 * 40, 0.25 * 20, 0.375 * 40, 0.75 * 20]
    )
    assert open_model(str(tmp_path)).path == tmp_path / "model.onnx", "the folder of an export"


def test_a_fixed_size(tmp_path: Path) -> None:
    model = open_model(write(tmp_path / "model.onnx", resize=json.dumps({"height": 30, "width": 60})))
    assert prepare([red(80, 80)], [1], model.transform).pixels.shape == (1, 3, 30, 60)


def test_post_processing_inside(tmp_path: Path) -> None:
    model = open_model(write(tmp_path / "model.onnx", CHOSEN))
    batch = prepare([red(80, 80)], [1], model.transform)
    (found,) = model.detect(batch)
    assert found["labels"].tolist() == [2, 0, 1] and found["scores"].tolist() == pytest.approx([0.9, 0.5, 0.2])
    (some,) = model.detect(batch, classes=[0, 1])
    assert (
        some["labels"].tolist() == [0, 1]
        and some["boxes"].tolist() == [[1.0] * 4] * 2
        and some["scores"].tolist() == pytest.approx([0.5, 0.2])
    )


def test_it_is_compared_with_a_run(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "mine")
    run = small_run(Store(tmp_path / "results"), data)
    models = named_models([str(run), write(tmp_path / "b.onnx")], ["run", "file"], "cpu")
    found = compare_models(models, Folder(path=data), progress=False)
    assert found.table["runtime"].tolist() == ["torch", "onnxruntime"] and found.table["ms"].min() > 0
    assert np.isnan(found.table.loc["file", ["parameters (M)", "GFLOPs"]].astype(float)).all(), "its runtime does not count"
    assert len(found.sides[1].found[0].names) == 2 and torch.get_num_threads() >= 1


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        ("absent", {}, "m.onnx': no such file"),
        ("text", {}, "m.onnx: not a detector that detrdistill exported"),
        ("bare", {}, r"m.onnx: not a detector that detrdistill exported \(KeyError: 'classes'\)"),
        ("whole", {"outputs": ["a"]}, "an .onnx says its classes and its images' size itself"),
        ("whole", {"device": "cuda"}, "device 'cuda': an .onnx is run on the CPU here"),
        ("whole", {"device": "tpu"}, "device 'tpu' is unknown"),
    ],
)
def test_what_cannot_be_used_is_refused(make: str, options: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    if make == "text":
        path.write_text("no graph")
    elif make != "absent":
        write(path, **({"classes": ""} if make == "bare" else {}))
    with pytest.raises(InputError, match=message):
        open_model(str(path), **options)


def test_without_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    path = write(tmp_path / "m.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"onnxruntime is not installed; install the extra: pip install 'detrdistill\[onnx\]'"):
        open_model(path)

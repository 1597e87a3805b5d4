"""Detectors of transformers as ONNX: any number of images, of the one size that they take."""

import json
from pathlib import Path

import onnxruntime
import pytest

from detrdistill.export import write
from detrdistill.recipes.families import FAMILIES
from tests.any_detr.tiny import CLASSES, SIDE, tiny
from tests.models.small import untyped


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_detections(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """On a batch with padding too."""
    if family != "d_fine" and not request.config.getoption("long", default=False):
        pytest.skip("ten seconds: with --long")
    folder = tmp_path / family
    model = tiny(family)
    model.config.id2label = {row: f"class {row}" for row in range(CLASSES)}
    model.save_pretrained(folder)
    processor = {"size": {"height": SIDE, "width": SIDE}, "do_normalize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    with untyped():
        said = write.export_onnx(str(folder), tmp_path / "out", post_processing=True)
    assert f"(1 of {SIDE} x {SIDE} and 3 of {SIDE} x {SIDE} px)" in said  # 3 images, where 2 were traced
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    shape = session.get_inputs()[0].shape
    assert shape[0] == "batch" and shape[2:] == [SIDE, SIDE]
    assert json.loads(session.get_modelmeta().custom_metadata_map["resize"]) == {"height": SIDE, "width": SIDE}

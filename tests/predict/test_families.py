"""A detector of transformers that learned on square images: photographs of any shape are refused until they are stretched."""

from pathlib import Path

import pytest

from detrdistill.errors import InputError
from detrdistill.models.weights import save_weights
from detrdistill.predict.models import open_model
from detrdistill.predict.predict import predict
from detrdistill.recipes.identity import run_id
from detrdistill.recipes.parts import Digits, Resize
from detrdistill.records import Record
from detrdistill.runs.store import Store
from tests.any_detr.checks import adapted
from tests.any_detr.tiny import SIDE, tiny_recipe
from tests.folders import write_folder


def test_sides_are_asked_for_before_anything_is_written(tmp_path: Path) -> None:
    recipe = tiny_recipe("rt_detr_v2", resize=Resize(train="none", short=SIDE, long=SIDE), data=Digits(size=48))
    store = Store(tmp_path / "results")
    save_weights(store.weights(recipe), adapted("rt_detr_v2"), {"categories": "a, b, c"})
    store.write(Record(id=run_id(recipe), recipe=recipe, metrics={}, curve=[], cost={}, parents={}, provenance={}))
    run, images = str(store.folder(recipe)), str(write_folder(tmp_path / "mine", images=1) / "images")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        InputError, match=r"multiples of 32, .*: give --set resize\.stretch=true --set resize\.short=64 --set resize\.long=64$"
    ) as error:
        predict(open_model(run, "cpu"), images, tmp_path / "out", progress=False)
    assert "\n" not in str(error.value) and sorted(tmp_path.rglob("*")) == before
    remedy = dict(word.split("=") for word in str(error.value).split(" --set ")[1:])
    found = predict(open_model(run, "cpu", (), remedy), images, tmp_path / "out", threshold=0, progress=False)
    assert {(one["width"], one["height"]) for one in found.images} == {(56, 64)} and found.results

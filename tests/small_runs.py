"""Complete runs of tiny detectors with random weights, as a trained one leaves them."""

from hashlib import sha256
from pathlib import Path

from detrdistill.data.layout import data_cache, data_hash
from detrdistill.files import file_hash
from detrdistill.models.weights import classes_text, save_weights
from detrdistill.recipes.identity import run_id
from detrdistill.recipes.parts import Folder, Resize
from detrdistill.records import Record
from detrdistill.runs.store import Store
from tests.folders import CATEGORIES
from tests.models.small import small_detector, small_recipe

NAMES = [category["name"] for category in CATEGORIES]


def small_run(store: Store, data: Path, kind: str = "deformable", seed: int = 0, **changes) -> Path:
    """The folder of a run on `data`, whose classes are those of `folders.write_folder`."""
    spec = Folder(path=data)
    spec = spec.replace(sha256=data_hash(spec, data_cache()))
    recipe = small_recipe(kind, data=spec, seed=seed, resize=Resize(train="none", short=64, long=96), **changes)
    weights = store.weights(recipe)
    weights.parent.mkdir(parents=True)
    save_weights(weights, small_detector(kind, seed, **changes), {"run": run_id(recipe), "categories": classes_text(NAMES)})
    provenance = {"weights_sha256": file_hash(weights), "data_sha256": spec.sha256, "commit": sha256().hexdigest()[:40], "device": "cpu"}
    store.write(Record(id=run_id(recipe), recipe=recipe, metrics={}, curve=[], cost={"steps": 1}, parents={}, provenance=provenance))
    return weights.parent

"""What a complete run left behind, as it lies on disk. No torch here."""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import Field

from detrdistill.errors import InputError
from detrdistill.recipes.recipe import CropRecipe, Recipe
from detrdistill.recipes.schema import Strict

Numbers = dict[str, float | None]


class Record(Strict):
    """What a complete run left behind; written last, in one piece, and hashed against later edits."""

    id: str
    recipe: Recipe | CropRecipe
    metrics: Numbers = Field(description="the twelve COCO numbers in percent (null: no such object), or crop accuracy in percent")
    test: Numbers | None = Field(None, description="the same on the data's test split, where there is one")
    curve: list[Numbers] = Field(description="AP by optimizer step")
    cost: dict[str, float | int | None] = Field(
        description="seconds of training, steps, images a second, peak MiB, times resumed, images that passed the teacher"
    )
    parents: dict[str, dict[str, str | float | None]] = Field(description="runs whose weights this run started or learned from")
    provenance: dict[str, Any] = Field(description="data and weight hashes, commit, library versions, device")
    kept: dict[str, int | float | str | None] | None = Field(
        None, description="where the best weights are kept: their step and AP, on which split, and of how many evaluations"
    )
    continued: dict[str, int | str] | None = Field(None, description="the shorter run that this one continued, and after which step")


class InsideObjects(Strict):
    """How much of a detector's maps lies inside objects, image by image (`analysis.where_to_look`); hashed as a record, and beside it."""

    run: str
    weights_sha256: str
    data_sha256: str
    gamma: float = Field(description="of Eq. 8")
    images: list[int] = Field(description="numbers of the validation images, those with objects")
    percent: dict[str, list[float | None]] = Field(description="by map, an image each (null: a map without weight)")
    provenance: dict[str, Any] = Field(description="commit, library versions, machine")


class Cost(Strict):
    """What a run's detector costs when it is used (`compare.costs`); measured once, hashed as a record, and beside it."""

    run: str
    weights_sha256: str
    data_sha256: str
    parameters: int
    gflops: float = Field(description="10^9 operations an image, by `counter`")
    counter: str = Field(description="which, what it counts and what not")
    images: dict[str, int] = Field(description='how many images of which size were seen, "height x width"')
    milliseconds: dict[str, float] = Field(description="an image, one at once: median, low and high (quartiles)")
    peak_mib: float | None = Field(None, description="of weights and of one image; null: the system does not tell")
    runtime: str
    threads: int
    hardware: str
    provenance: dict[str, Any] = Field(description="commit, library versions, machine")


def read_record(path: Path) -> Record:
    """Read and check one record file.

    Raises:
        InputError: not JSON, unknown fields, or content that does not fit its hash.
    """
    return Record.read(_read_hashed(path, "record", "delete its folder to run again"), where=f"record {path}")


def read_inside(path: Path) -> InsideObjects:
    """Read and check one file of shares.

    Raises:
        InputError: as `read_record`.
    """
    return InsideObjects.read(_read_hashed(path, "shares", "delete it to measure again (notebook 11)"), where=f"shares {path}")


def read_cost(path: Path) -> Cost:
    """Read and check one file of costs.

    Raises:
        InputError: as `read_record`.
    """
    return Cost.read(_read_hashed(path, "costs", "delete it to measure again (detrdistill compare)"), where=f"costs {path}")


def _read_hashed(path: Path, what: str, remedy: str) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise InputError(f"{what} {path}: not a JSON object; {remedy}")
    stated, found = body.pop("sha256", "none"), _hash(body)
    if stated != found:
        raise InputError(
            f"{what} {path}: its content (hash {found[:8]}) does not fit the hash in it ({str(stated)[:8]}), so it was edited or damaged; "
            f"restore the file, or {remedy}"
        )
    return body


def record_text(record: Record | InsideObjects | Cost) -> str:
    """As it is read again: JSON with a hash of all the rest, without what is not stated."""
    body = {name: value for name, value in record.model_dump(mode="json").items() if value is not None}
    return json.dumps(body | {"sha256": _hash(body)}, indent=1) + "\n"


def short_commit(commit: str | None) -> str:
    """The commit of a record as people read it."""
    if not isinstance(commit, str):
        return "unknown"
    parts = [one.partition("+") for one in commit.split(", ")]  # several: the run was continued by other code
    return ", ".join(name[:8] + plus + changes for name, plus, changes in parts)


def _hash(body: dict[str, Any]) -> str:
    return sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def refuse_mixed(records: Sequence[Record]) -> None:
    """Raise InputError unless all records saw the same data and started or learned from the same weights of the same runs."""
    if not records:
        return
    first, weights = records[0], {record.id: record.provenance["weights_sha256"] for record in records}
    for record in records:
        ours, theirs = first.provenance["data_sha256"], record.provenance["data_sha256"]
        if ours != theirs:
            raise InputError(
                f"runs {first.id} and {record.id} were measured on different data ({ours[:8]} and {theirs[:8]}); "
                "a table compares runs on one data set: delete the folder of the outdated one and run it again"
            )
        for name, parent in record.parents.items():
            # A file by its hash, or which of torchvision's.
            source, held = f"{record.recipe.backbone.name} {record.recipe.backbone.weights}", parent.get("sha256", parent.get("weights"))
            if name == "backbone" and held and weights.setdefault(source, held) != held:
                raise InputError(
                    f"run {record.id} started from other backbone weights, {source} ({held}), than other runs of the table "
                    f"({weights[source]}); delete the folder of the outdated one and run it again"
                )
            # A parent that is not in the table is what the first record that names it says.
            if "run" in parent and (wanted := weights.setdefault(parent["run"], parent["weights_sha256"])) != parent["weights_sha256"]:
                raise InputError(
                    f"run {record.id} used another {name} (weights {parent['weights_sha256'][:8]}) than {parent['run']} as it is now or as "
                    f"other runs used it ({wanted[:8]}); delete the folder of the outdated one and run it again"
                )

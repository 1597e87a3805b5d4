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


def read_record(path: Path) -> Record:
    """Read and check one record file.

    Raises:
        InputError: not JSON, unknown fields, or content that does not fit its hash.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise InputError(f"record {path}: not a JSON object; delete its folder to run again")
    stated, found = body.pop("sha256", "none"), _hash(body)
    if stated != found:
        raise InputError(
            f"record {path}: its content (hash {found[:8]}) does not fit the hash in it ({str(stated)[:8]}), so it was edited or damaged; "
            "restore the file, or delete its folder to run again"
        )
    return Record.read(body, where=f"record {path}")


def record_text(record: Record) -> str:
    """As `read_record` reads it: JSON with a hash of all the rest."""
    body = record.model_dump(mode="json", exclude={"test"} if record.test is None else None)
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
            if held and weights.setdefault(source, held) != held:
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

"""What `detrdistill check` finds in a data folder: faults, numbers, and what to set."""

from itertools import islice
from typing import Any

from detrdistill.data.coco import CocoDataset, open_dataset, require_same_categories
from detrdistill.data.layout import data_cache, how_found
from detrdistill.data.layouts import SPLITS
from detrdistill.data.summary import advice, look_at_images, same_files, summarise, summary_lines, too_many_objects
from detrdistill.data.validation import NoObjectsError
from detrdistill.data.values import counted
from detrdistill.recipes.parts import Folder
from detrdistill.recipes.recipe import Recipe

SHOWN = 5


def check_folder(data: Folder, recipe: Recipe, progress: bool = True) -> dict[str, Any]:
    """All that `check` says, of plain values.

    Args:
        recipe: whose queries and image size the data is compared with.

    Raises:
        InputError: the data is refused.
    """
    how, has_test = how_found(data, data_cache())
    splits: dict[str, CocoDataset] = {}
    warnings: list[str] = []
    for split in SPLITS if has_test else SPLITS[:2]:
        try:
            splits[split] = open_dataset(data, split, data_cache(), None)
        except NoObjectsError as reason:
            if split != "test":
                raise
            warnings.append(f"{reason}; without them nothing is measured on the test images")
    train, *others = splits.values()
    for other in others:
        require_same_categories(train, other)
    looked = {split: look_at_images(dataset, progress) for split, dataset in splits.items()}
    warnings += [told for dataset in splits.values() if (told := too_many_objects(dataset, recipe.queries))]
    warnings += [told for other in others if (told := same_files(train, other, content=True))]
    for split, (_, flat) in looked.items():
        if flat:
            names = ", ".join(islice(flat, SHOWN)) + (" ..." if len(flat) > SHOWN else "")
            warnings.append(f"{splits[split].report.file}: {len(flat)} of {len(splits[split])} images show next to no contrast: {names}")
    numbers = {split: summarise(dataset) for split, dataset in splits.items()}
    return {
        "layout": how,
        "splits": {
            split: numbers[split]
            | {
                "file": str(dataset.report.file),
                "faults": [vars(fault) for fault in dataset.report.faults],
                "warnings": dataset.report.warnings,
                "report": dataset.report.text(),
            }
            for split, dataset in splits.items()
        },
        "warnings": warnings,
        "unreadable": [fault for faults, _ in looked.values() for fault in faults],
        "set": advice(numbers, recipe.queries, recipe.resize.short),
    }


def check_lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    lines = [found["layout"]] if found["layout"] else []
    for split, one in found["splits"].items():
        counts = ", ".join((counted(one["images"], "image"), counted(one["objects"], "object"), counted(len(one["classes"]), "class")))
        lines += [f"{split}: {counts}; {one['report']}", *summary_lines(one)]
    lines += [f"warning: {one}" for one in found["warnings"]]
    return [*lines, "to set for this data: " + " ".join(f"--set {one}" for one in found["set"])]

"""How folders are laid out by the tools that export them: one table, and what is found in a folder by it. No torch here."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from detrdistill.errors import InputError
from detrdistill.files import nearby
from detrdistill.recipes.parts import Folder

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
FRACTION = 0.2  # of the images that validates, where nobody says which


@dataclass(frozen=True)
class Layout:
    """A tool's way to lay out COCO files.

    Attributes:
        annotations: the file of a split; without "{split}" in it, one file for all images.
        images: the image folder of a split, the first that is there.
        splits: what the tool calls train, val and test.
    """

    name: str
    annotations: str
    images: tuple[str, ...]
    splits: tuple[str, str, str] = SPLITS

    def file(self, root: Path, split: str) -> Path:
        return root / self.annotations.format(split=self.own(split))

    def folder(self, root: Path, split: str) -> Path | None:
        folders = (root / one.format(split=self.own(split)) for one in self.images)
        return next((folder for folder in folders if folder.is_dir()), None)

    def own(self, split: str) -> str:
        return self.splits[SPLITS.index(split)]


LAYOUTS = (
    Layout("the kit", "instances_{split}.json", ("images",)),
    Layout("COCO", "annotations/instances_{split}2017.json", ("{split}2017",)),
    Layout("CVAT", "annotations/instances_{split}.json", ("images/{split}", "images")),
    Layout("CVAT", "annotations/instances_{split}.json", ("images/{split}", "images"), ("Train", "Validation", "Test")),
    Layout("CVAT", "annotations/instances_{split}.json", ("images/{split}", "images"), ("train", "validation", "test")),
    Layout("RT-DETR and mmdetection", "annotations/instances_{split}.json", ("{split}", "{split}2017")),
    Layout("finetune-detr", "annotations/custom_{split}.json", ("{split}2017", "{split}", "images")),
    Layout("Roboflow", "{split}/_annotations.coco.json", ("{split}",), ("train", "valid", "test")),
    Layout("Roboflow", "{split}/_annotations.coco.json", ("{split}",)),
    Layout("CVAT, one subset", "annotations/instances_default.json", ("images/default", "images")),
    Layout("Label Studio", "result.json", ("images", ".")),
    Layout("FiftyOne", "labels.json", ("data",)),
)
UNSAID = 2  # of LAYOUTS are read without a word
ONE_FILE = ", one file for all images"
EXPECTED = (
    "instances_train.json, instances_val.json and images/, COCO's annotations/instances_train2017.json, train2017/ and so on, or a layout "
    "of Roboflow, CVAT, Label Studio, mmdetection, YOLO or Pascal VOC (docs/your_data.md); or name the files: data.train, data.train_images"
)


@dataclass(frozen=True)
class Found:
    """Annotation file and image folder of each split that a folder has, and how that was told.

    Attributes:
        how: for people; empty for the kit layout and COCO's, which need no word.
    """

    splits: dict[str, tuple[Path, Path]]
    how: str = ""


def find(spec: Folder, cache: Path) -> Found:
    """What is in a data folder.

    Raises:
        InputError: it is missing, laid out in no known way, lacks train or val, or cannot be converted.
    """
    root = nearby(spec.path)
    if not root.is_dir():
        raise InputError(f"data folder {root}: {'not a folder' if root.exists() else 'does not exist'}; expected there: {EXPECTED}")
    stated = spec.train or spec.val or spec.test
    found = _stated(spec, root) if stated else _recognised(root) or _foreign(root, cache, spec) or Found({})
    if "train" in found.splits and "val" not in found.splits and (spec.val_fraction or found.how.endswith(ONE_FILE)):
        from detrdistill.data.convert import converted, read_coco  # here: takes a tenth of a second, and few folders need it

        division, words = _division(spec)
        splits = converted(root, cache, partial(read_coco, *found.splits["train"]), division)
        return Found(found.splits | splits, f"{found.how}; {words}".removeprefix("; "))
    for split in ("train", "val"):
        if split not in found.splits:
            divide = "; data.val_fraction=0.2 divides the training images" if split == "val" and "train" in found.splits else ""
            raise InputError(f"data folder {root}: no annotations of the split '{split}'; expected there: {EXPECTED}{divide}")
    return found


def _division(spec: Folder) -> tuple[tuple[float, int], str]:
    """How images are divided, and the words for it."""
    fraction = spec.val_fraction or FRACTION
    said = f"{fraction:g} of the images validate (data.val_fraction), drawn with seed {spec.split_seed} (data.split_seed)"
    return (fraction, spec.split_seed), said


def _stated(spec: Folder, root: Path) -> Found:
    """The files and folders that the recipe names."""
    splits = {}
    for split in SPLITS:
        if (stated := getattr(spec, split)) is None:
            continue
        file, named = root / stated, getattr(spec, f"{split}_images") or spec.train_images
        folder = root / named if named else root / "images" if (root / "images").is_dir() else file.parent
        for field, path, there in ((split, stated, file.is_file()), (f"{split}_images", folder, folder.is_dir())):
            if not there:
                raise InputError(f"data folder {root}: data.{field} = {path} is not there")
        splits[split] = (file, folder)
    if "train" not in splits:
        raise InputError(f"data folder {root}: data.{next(iter(splits))} is stated and data.train is not; state it too")
    return Found(splits, "as stated" + ONE_FILE * ("val" not in splits))


def _recognised(root: Path) -> Found | None:
    """By the first layout whose files are there, rather one that has a validation split as well."""
    halves, without = [], None
    for number, layout in enumerate(LAYOUTS):
        for_all = "{split}" not in layout.annotations
        files = {split: layout.file(root, split) for split in (SPLITS[:1] if for_all else SPLITS)}
        files = {split: file for split, file in files.items() if file.is_file()}
        folders = {split: layout.folder(root, split) for split in files}
        halves += [(files[split], root / layout.images[0].format(split=layout.own(split))) for split in files if folders[split] is None]
        if files and None not in folders.values():
            said = f"layout of {layout.name}" if number >= UNSAID else ""
            found = Found({split: (file, folders[split]) for split, file in files.items()}, said + ONE_FILE * for_all)
            if for_all or {"train", "val"} <= files.keys():
                return found
            without = without or found
    if without:
        return without
    if halves:
        file, folder = halves[0]
        raise InputError(f"data folder {root}: {file.name} is there but not the image folder {folder}; expected: {EXPECTED}")
    return None


def _foreign(root: Path, cache: Path, spec: Folder) -> Found | None:
    """Not COCO's, but read as such; None where the folder is of no such kind."""
    from detrdistill.data.convert import converted
    from detrdistill.data.foreign import voc, yolo

    for name, recognise in {"YOLO": yolo, "Pascal VOC": voc}.items():
        if (found := recognise(root)) is not None:
            splits, read = found
            division, words = (None, "") if "val" in splits else _division(spec)
            return Found(converted(root, cache, read, division), f"layout of {name}, converted to COCO's; {words}".removesuffix("; "))
    return None

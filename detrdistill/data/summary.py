"""What a data set is like, and what of it only its owner can judge: told before training, and by `detrdistill check`."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from tqdm.auto import tqdm

from detrdistill.data.coco import CocoDataset
from detrdistill.data.file_names import ImageFolder
from detrdistill.data.images import hardly_differs
from detrdistill.errors import InputError
from detrdistill.files import file_hash
from detrdistill.process import share_of_cores

MARGIN = 1.2  # queries for the most objects an image: a detector wants some to spare
STEP = 32  # pixels; image sizes are advised in multiples of it
SEEN = 16  # pixels a side that an object should have after resizing, the stride of a usual feature map


def objects(dataset: CocoDataset) -> list[list[dict[str, Any]]]:
    """The annotations of each image that are trained on: no crowds."""
    return [[one for one in dataset.coco.imgToAnns[image] if not one["iscrowd"]] for image in dataset.ids]


def too_many_objects(dataset: CocoDataset, queries: int) -> str | None:
    """A warning where images hold more objects than a detector has queries: the rest can neither be learned nor found."""
    counts = [len(one) for one in objects(dataset)]
    over = sum(count > queries for count in counts)
    if not over:
        return None
    counted = f"{over} of {len(counts)} images have more objects (up to {max(counts)}) than the detector has queries ({queries})"
    return f"{dataset.report.file}: {counted}; the rest is neither learned nor found: set queries={enough_queries(max(counts))}"


def enough_queries(most: int) -> int:
    return -(-int(most * MARGIN) // 10) * 10


def same_files(train: CocoDataset, other: CocoDataset, content: bool = False) -> str | None:
    """A warning where a split has images of the training split, and how many of these have other boxes there.

    Args:
        content: compare files of the same length by what they hold too; as good as none of two photographs have the same.
    """
    ours, theirs = _files(train), _files(other)
    pairs = {name: name for name in theirs if name in ours}
    if content:
        lengths = {Path(name).stat().st_size for name in theirs}
        held = {file_hash(name): name for name in ours if Path(name).stat().st_size in lengths}
        lengths = {Path(name).stat().st_size for name in held.values()}
        alike = [name for name in theirs if name not in pairs and Path(name).stat().st_size in lengths]
        pairs |= {name: held[digest] for name in alike if (digest := file_hash(name)) in held}
    if not pairs:
        return None
    clash = sum(_boxes(other, theirs[one]) != _boxes(train, ours[two]) for one, two in pairs.items())
    clashes = f", {clash} of them with other boxes" if clash else ""
    return (
        f"{other.report.file}: {len(pairs)} of {len(theirs)} files are files of the training split too{clashes}, such as "
        f"{Path(min(pairs)).name!r}: AP then does not tell how new images fare; keep the splits apart"
    )


def _boxes(dataset: CocoDataset, image: int) -> list[list[float]]:
    return sorted(one["bbox"] for one in dataset.coco.imgToAnns[image])


def _files(dataset: CocoDataset) -> dict[str, int]:
    folder = ImageFolder(Path(dataset.root))
    return {folder.same_file(entry["file_name"]): id for id, entry in dataset.coco.imgs.items()}


def judgements(train: CocoDataset, others: dict[str, CocoDataset], queries: int | None, content: bool = False) -> Iterator[str]:
    """What is wrong or doubtful about splits that belong together, for a detector of so many queries if they are known."""
    for dataset in (train, *others.values()):
        if dataset.report:
            yield str(dataset.report)
        if queries is not None and (told := too_many_objects(dataset, queries)):
            yield told
    for dataset in others.values():
        if told := same_files(train, dataset, content):
            yield told


def summarise(dataset: CocoDataset) -> dict[str, Any]:
    """Numbers of one split: images, objects, crowds, objects a class, sizes in pixels, and objects an image."""
    images = list(dataset.coco.imgs.values())
    listed = objects(dataset)
    flat = [one for image in listed for one in image]
    by_class = Counter(one["category_id"] for one in flat)
    sides = [(one["bbox"][2] * one["bbox"][3]) ** 0.5 for one in flat]
    return {
        "images": len(dataset),
        "objects": len(flat),
        "crowds": len(dataset.coco.anns) - len(flat),
        "classes": {category.name: by_class[category.id] for category in dataset.categories},
        "image_size": {side: _spread([one[side] for one in images]) for side in ("width", "height")},
        "object_side": _spread(sides),
        "objects_an_image": _spread([len(one) for one in listed]),
        "images_without_objects": sum(not one for one in listed),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"least": round(min(values), 1), "median": round(median(values), 1), "most": round(max(values), 1)}


def summary_lines(numbers: dict[str, Any]) -> list[str]:
    """The same for people, without what the line of a split says already."""

    def shown(spread: dict[str, float]) -> str:
        return f"{spread['least']:g} to {spread['most']:g}, median {spread['median']:g}"

    size, classes = numbers["image_size"], numbers["classes"]
    missing = [name for name, count in classes.items() if not count]
    lines = [
        f"  {numbers['crowds']} crowds; {numbers['images_without_objects']} images without objects",
        "  objects a class: " + ", ".join(f"{name} {count}" for name, count in sorted(classes.items(), key=lambda item: -item[1])),
        f"  images: width {shown(size['width'])}; height {shown(size['height'])} pixels",
        f"  objects: side (root of width times height) {shown(numbers['object_side'])} pixels",
        f"  objects an image: median {numbers['objects_an_image']['median']:g}, largest {numbers['objects_an_image']['most']:g}",
    ]
    return lines + ([f"  classes without an object: {', '.join(missing)}"] if missing else [])


def advice(splits: dict[str, dict[str, Any]], queries: int, short: int) -> list[str]:
    """What to set for this data: queries, and the image size (`resize.short`, `resize.long`)."""
    most = int(max(one["objects_an_image"]["most"] for one in splits.values()))
    size, side = splits["train"]["image_size"], splits["train"]["object_side"]
    own = min(size["width"]["median"], size["height"]["median"])
    ratio = max(size["width"]["median"], size["height"]["median"]) / own
    # So large that the median object keeps SEEN pixels, but no larger than the images are.
    wanted = min(own, max(short, own * SEEN / side["median"]))
    wanted = max(STEP, round(wanted / STEP) * STEP)
    few = queries if queries >= most else enough_queries(most)
    return [f"queries={few}", f"resize.short={wanted}", f"resize.long={max(wanted, round(wanted * ratio / STEP) * STEP)}"]


def look_at_images(dataset: CocoDataset, progress: bool = False) -> tuple[list[str], list[str]]:
    """What keeps which image from being decoded, and the names of images that are all but of one colour. All are decoded, in parallel."""

    def look(id: int) -> tuple[str, str]:
        try:
            return "", dataset.coco.imgs[id]["file_name"] if hardly_differs(dataset.load_image(id)) else ""
        except InputError as fault:
            return str(fault), ""

    with ThreadPoolExecutor(share_of_cores()) as pool:  # Pillow decodes without Python's lock
        bar = tqdm(pool.map(look, dataset.ids), total=len(dataset), desc="decoding", unit="image", disable=not progress, mininterval=1)
        found = list(bar)
    return [fault for fault, _ in found if fault], [flat for _, flat in found if flat]

"""`detrdistill export`: a run's detector as a Hugging Face folder, or any that the kit reads as model.onnx, verified, and predict.py."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torchvision.transforms.v2 import functional

from detrdistill import __version__
from detrdistill.checkpoints.formats import About
from detrdistill.checkpoints.hugging_face import export_hugging_face
from detrdistill.checkpoints.locate import ids_of_run, locate, record_of
from detrdistill.checkpoints.names import ids_of_outputs
from detrdistill.checkpoints.pretrained import load_pretrained
from detrdistill.data.coco import CocoDataset, open_dataset
from detrdistill.data.layout import data_cache
from detrdistill.data.transforms import build_transform
from detrdistill.errors import InputError
from detrdistill.export.graph import Exported, write_graph
from detrdistill.export.verify import Images, verify
from detrdistill.files import make_folder, umask, writing
from detrdistill.recipes.parts import DetectorWeights, Folder, Resize
from detrdistill.recipes.recipe import Recipe
from detrdistill.records import Record, read_record
from detrdistill.runs.evaluate import SETTINGS

NEEDED = ("onnx", "onnxscript", "onnxruntime")
MODEL, SCRIPT = "model.onnx", "predict.py"


def export_onnx(
    model: str | Path,
    folder: Path,
    *,
    post_processing: bool = False,
    data: Path | None = None,
    outputs: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
) -> str:
    """Write a detector in any format that the kit reads as `folder`, with model.onnx and predict.py. Returns what was verified, in a line.

    Outputs that stand for no class are left out.

    Args:
        model: what `locate` takes.
        post_processing: whether the graph chooses the best detections and gives boxes in pixels.
        data: folder of COCO json and images whose validation images the file is verified on, and whose categories' ids it carries;
            without, those of the run, and where it has none, noise.
        outputs: names of the classes of the file's outputs, where it does not say them.
        settings: of `runs.evaluate.SETTINGS`: what neither the file nor its tensors say.

    Raises:
        InputError: model, data, settings or folder are not usable, the extra is not installed, or torch and onnxruntime disagree.
    """
    require_extra()
    free(folder)
    path = locate(model).path
    detector, about = load(path, outputs, dict(settings or {}))
    record = record_of(path)
    resize = about.settings.get("resize", Resize())
    if getattr(detector, "sides", 1) > 1:  # one of transformers' that takes no other size: its graph has this one
        resize = resize.replace(stretch=True)
    dataset, source = dataset_of(data, record, resize)
    ids = ids_of_run(path) if data is None else {one.name: one.id for one in dataset.categories}
    described = {
        "detector": about.settings["detector"],
        "classes": json.dumps(classes(about.names, ids)),
        "mean": json.dumps(resize.mean),
        "std": json.dumps(resize.std),
        "resize": json.dumps(resize.sides),
        "top": str(detector.top),
        "parameters": str(sum(one.numel() for one in detector.parameters())),
        "run": record.id if record else "",
        "detrdistill": __version__,
    }
    images = verification_images(dataset, resize)
    worst = write_folder(detector, folder, described, images, post_processing)
    shapes = " and ".join(map(str, images))
    return f"{folder / MODEL}: the same detections in onnxruntime on {source} ({shapes} px); largest difference {worst:.1e}"


def export_run(run: Path, folder: Path) -> Path:
    """Write a run's detector as a folder that transformers opens.

    Raises:
        InputError: no complete run of a detector, or one that transformers does not have.
    """
    if not (run / "record.json").is_file():
        raise InputError(f"run {run}: no record.json, so it is not a complete run; give the folder of one")
    recipe = read_record(run / "record.json").recipe
    if not isinstance(recipe, Recipe):
        raise InputError(f"run {run}: of a backbone that was trained on crops; give the folder of a detector's run")
    detector, about = load_pretrained(run)
    return export_hugging_face(detector, folder, [name or f"class {i}" for i, name in enumerate(about.names)], recipe.resize)


def require_extra() -> None:
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise InputError(
            f"export to ONNX needs {', '.join(missing)}, which is not installed; install the extra: pip install 'detrdistill[onnx]'"
        )


def free(folder: Path) -> None:
    """Refuse what a new folder cannot be written to, before anything is computed."""
    if folder.suffix == ".onnx":
        raise InputError(f"output {folder}: names a file; name the new folder that {MODEL} and {SCRIPT} go into")
    if folder.exists():
        raise InputError(f"output {folder}: exists already; name a new folder, or remove this one")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise InputError(f"output folder {folder}: {above} is a file; move it away or choose another folder")
    if not os.access(above, os.W_OK):
        raise InputError(f"output folder {folder}: no permission to create it; choose a writable folder")


def load(path: Path, outputs: Sequence[str], settings: dict[str, str]) -> tuple[nn.Module, About]:
    """The detector, each of whose outputs is a class with a name."""
    if strange := sorted(settings.keys() - {*SETTINGS}):
        raise InputError(f"setting '{strange[0]}' is none that an export takes; known are {', '.join(SETTINGS)}")
    part = DetectorWeights(path=path).replace(part=settings.pop("part", "")).part or None
    detector, about = load_pretrained(path, outputs=outputs or None, part=part, **settings)
    named = [name for name in about.names if name]
    if not named:
        raise InputError(f"{about.title} does not say its classes; name its {len(about.names)} outputs as 'outputs'")
    if len(named) < len(about.names):
        detector, about = load_pretrained(path, categories=named, outputs=outputs or None, part=part, replace_head=True, **settings)
        about = About(about.path, about.origin, about.settings, tuple(named))
    return detector, about


def dataset_of(data: Path | None, record: Record | None, resize: Resize) -> tuple[CocoDataset | None, str]:
    """The validation images to verify on, or None, and what to call them."""
    transform = build_transform(resize, train=False)
    if data is not None:
        return open_dataset(Folder(path=data), "val", data_cache(), transform), f"images of {data}"
    if record is None:
        return None, "noise (no images: give --data)"
    try:
        return open_dataset(record.recipe.data, "val", data_cache(), transform), "the run's validation images"
    except InputError as error:
        return None, f"noise (the run's images cannot be had: {error})"


def classes(names: Sequence[str], ids: Mapping[str, int]) -> list[dict[str, int | str]]:
    """Each output's class: its id in the data, or COCO's where all are COCO's, or else its number."""
    return [{"id": id, "name": name} for id, name in zip(ids_of_outputs(names, ids), names, strict=True)]


def verification_images(dataset: CocoDataset | None, resize: Resize) -> list[Images]:
    """One image alone, and three together at half the size: neither is what was traced. Of a detector that stretches, all at its size."""
    if dataset is not None:
        samples = [dataset[i] for i in range(min(len(dataset), 4))]
        images = [(pixels, target["original_size"]) for pixels, target in samples]
    else:
        noise, short = torch.Generator().manual_seed(0), resize.short
        shapes = (
            [(short, resize.long)]
            if resize.stretch
            else [(short, min(resize.long, short * 5 // 4)), (short, short), (max(1, short // 2), short)]
        )
        images = [(torch.randn(3, *shape, generator=noise), shape) for shape in shapes]
    others = [images[i % len(images)] for i in (1, 2, 3)]
    if resize.stretch:
        narrow, size = others[0]
        return [Images.together(images[:1]), Images.together([*others[1:], (narrow[..., : narrow.shape[2] // 2], size)])]
    halves = [(functional.resize(pixels, [max(32, side // 2) for side in pixels.shape[1:]]), size) for pixels, size in others]
    return [Images.together(images[:1]), Images.together(halves)]


def write_folder(detector: nn.Module, folder: Path, about: Mapping[str, str], images: Sequence[Images], post_processing: bool) -> float:
    """Write any detector that keeps the contract of `models`, and verify it. Nothing lies in `folder` before all of it is right.

    Returns:
        the largest difference of `verify`.

    Raises:
        InputError: torch cannot write it as ONNX, onnxruntime's detections differ, or the folder cannot be written.
    """
    whole = Exported(detector.float().cpu().eval(), post_processing)
    with writing(folder):
        temporary = Path(tempfile.mkdtemp(dir=make_folder(folder.parent), prefix=f".{folder.name}.", suffix=".part"))
        try:
            rule = json.loads(about.get("resize", "{}"))
            write_graph(whole, temporary / MODEL, about, fixed=(rule["height"], rule["width"]) if "height" in rule else None)
            worst = verify(whole, temporary / MODEL, images)
            shutil.copyfile(Path(__file__).with_name(SCRIPT), temporary / SCRIPT)
            temporary.chmod(0o777 & ~umask())  # mkdtemp's are private
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return worst

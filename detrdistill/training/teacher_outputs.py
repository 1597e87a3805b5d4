"""The teacher's outputs for a batch: computed, or kept from a step that showed it the same images.

Under `resize.train` "none" or "flip" an image comes back pixel by pixel, epoch after epoch, in the runs of all seeds and methods. An
output is looked up by a hash of what the teacher sees: these pixels, and how the batch pads them.

Kept outputs are those that the teacher would compute, bit by bit, where kernels round alike wherever an image stands in its batch. That
was so for every detector of presets mini and bccd in batches of 8 and 16, in fp32 and bf16, on the CPU. In batches of 3, 5, 6 and 7
some outputs differed, by 2e-6 at most.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from lightning_fabric import Fabric
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import detrdistill
from detrdistill.data.coco import Batch, CocoDataset
from detrdistill.data.transforms import renormalised, shorter_side
from detrdistill.distill.distiller import Distiller
from detrdistill.errors import InputError
from detrdistill.files import atomic
from detrdistill.models.outputs import DetectorOutput, Queries
from detrdistill.process import available_memory
from detrdistill.recipes.parts import Resize
from detrdistill.recipes.recipe import Recipe

LOG = logging.getLogger(__name__)
VARIANTS = {"none": 1, "flip": 2}  # how many variants of an image `resize.train` leaves; the others leave too many
OF_MEMORY, OF_DISK = 1 / 4, 1 / 10  # what one run's outputs may take at most of the memory available to it and of the free disk
STACKED, LEVELS, VECTORS = ("logits", "boxes", "queries"), ("features", "padding", "neck"), ("content", "position", "reference")
LAST = ".channels_last"
Tensors = dict[str, Tensor]  # an output as `flatten` has it


class Teacher:
    """A detector that teaches: its outputs for a batch, without gradient.

    Args:
        detector: in evaluation mode, its parameters frozen.
        distiller: knows what else the losses need of the detector.
        kept: where outputs are kept. None: the detector computes them in every step.
        resizes: the batches' and the teacher's own, where its images are normalised otherwise.

    Attributes:
        images: how many images have passed the detector.
    """

    def __init__(
        self, detector: nn.Module, distiller: Distiller, kept: "KeptOutputs | None" = None, resizes: tuple[Resize, Resize] | None = None
    ) -> None:
        self.detector, self.distiller, self.kept, self.images, self.resizes = detector, distiller, kept, 0, resizes or (Resize(), Resize())

    def __call__(self, batch: Batch, pixels: Float[Tensor, "B 3 H W"], padding: Bool[Tensor, "B H W"]) -> list[DetectorOutput]:
        """The outputs that `distiller.forward` takes, on the device of `pixels` and `padding`, which are those of `batch`.

        A batch with an image that is not kept yet is computed as a whole: what a kernel rounds depends on the size of the batch.

        Raises:
            InputError: a kept output is damaged or another teacher's.
        """
        if self.kept is None:
            return self._compute(pixels, padding)
        seen = renormalised(batch.pixels, batch.padding, *self.resizes)
        names = [fingerprint(*image) for image in zip(seen, batch.padding, strict=True)]
        found = [self.kept.get(name) for name in names]
        if all(found):
            return [restore(join(found), pixels.device)]
        (output,) = self._compute(pixels, padding)
        tensors = flatten(output)
        for i, name in enumerate(names):
            if found[i] is None:
                self.kept.add(name, one_image(tensors, i))
        if not self.kept.has_room:
            self.kept = None
        return [output]

    def _compute(self, pixels: Tensor, padding: Tensor) -> list[DetectorOutput]:
        self.images += len(pixels)
        return self.distiller.teacher_outputs(self.detector, renormalised(pixels, padding, *self.resizes), padding)


class KeptOutputs:
    """One teacher's outputs for single images: in memory, and on disk for the runs to come, as far as each has room for all of them.

    A file holds the output for one image as a batch showed it, padding included, and a hash of itself and of `made_by`. Files appear
    whole, so that runs may fill the folder side by side. Outputs in memory are each process's own: of runs that start together, each may
    take a quarter of what is available then.

    Args:
        root: the folder of all teachers; each has a folder of its own in it, which may be deleted at any time: a run that uses it computes
            again. Nothing else removes it, since runs of other code, which have folders of their own, may be using them.
        made_by: all that decides the outputs' bits beside the image: the teacher, the code, the size of a batch, ...
        count: outputs that there will be at most.

    Raises:
        InputError: a file in the teacher's folder cannot be read or is another teacher's. Its numbers are checked when they are read.
    """

    def __init__(self, root: Path, made_by: dict[str, str], count: int) -> None:
        self.made_by, self.count = made_by, count
        self.folder = root / f"{made_by['teacher']}-{sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:8]}"
        self.in_memory: dict[str, Tensors] = {}
        self.uses_memory = self.uses_disk = False
        self._decided = False
        self._on_disk: set[str] = set()
        for path in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError), self._open(path.stem):
                self._on_disk.add(path.stem)

    @property
    def has_room(self) -> bool:
        return self.uses_memory or self.uses_disk

    def get(self, name: str) -> Tensors | None:
        """The output for the image `name`; None if there is none yet.

        Raises:
            InputError: its file is damaged or another teacher's.
        """
        if name in self.in_memory:
            return self.in_memory[name]
        try:
            tensors = self._read(name)  # another run may have written it since
        except FileNotFoundError:
            return None
        self._make_room(tensors)
        if self.uses_memory:
            self.in_memory[name] = tensors
        return tensors

    def add(self, name: str, tensors: Tensors) -> None:
        """Keep the output, unless it is not finite: the step will be refused, and must not be refused for ever."""
        if not (tensors["logits"].isfinite().all() and tensors["boxes"].isfinite().all()):
            return
        self._make_room(tensors)
        if self.uses_memory:
            self.in_memory[name] = tensors
        if self.uses_disk:
            try:
                self._write(name, tensors)
            except (InputError, OSError, SafetensorError) as refused:  # a full disk, or a folder that is deleted meanwhile
                self.uses_disk = False
                LOG.warning("teacher outputs are not kept on disk any more: %s", refused)

    def _make_room(self, tensors: Tensors) -> None:
        """Decide at the first output, whose size is that of all, where they are kept."""
        if self._decided:
            return
        self._decided = True
        size = sum(tensor.nbytes for tensor in tensors.values())
        existing = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        memory = available_memory()
        self.uses_memory = size * self.count <= OF_MEMORY * memory
        self.uses_disk = size * (self.count - len(self._on_disk)) <= OF_DISK * shutil.disk_usage(existing).free
        if not self.has_room:
            LOG.warning(
                "teacher outputs are not kept: up to %d of %.1f MiB are more than %sa tenth of the free disk at %s; "
                "the teacher computes them in every step",
                self.count, size / 2**20, "a quarter of the available memory and " if memory else "", existing,
            )  # fmt: skip

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _write(self, name: str, tensors: Tensors) -> None:
        about = self.made_by | {"image": name}
        with atomic(self._path(name)) as temporary:
            save_file(tensors, temporary, metadata=about | {"sha256": content_hash(tensors, about)})

    def _read(self, name: str) -> Tensors:
        with self._open(name) as file:
            about, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
        stated = about.pop("sha256", None)
        if about.get("image") != name or content_hash(tensors, about) != stated:
            raise InputError(f"teacher outputs {self._path(name)}: damaged (its content does not fit its hash); delete the file")
        return tensors

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        """The file for the image `name`, refused if it is another teacher's or cannot be read.

        Raises:
            FileNotFoundError: there is none, or it is deleted meanwhile.
            InputError: it is refused.
        """
        path = self._path(name)
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if any(about.get(key) != value for key, value in self.made_by.items()):
                    found, wanted = (f"{who.get('teacher')}, weights {str(who.get('weights_sha256'))[:8]}" for who in (about, self.made_by))
                    raise InputError(
                        f"teacher outputs {path}: of another teacher, or made otherwise ({found}; wanted: {wanted}); delete {path.parent}"
                    )
                yield file
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError) as error:
            raise InputError(f"teacher outputs {path}: damaged ({' '.join(str(error).split())[:100]}); delete the file") from None


def kept_outputs(
    fabric: Fabric, distiller: Distiller, dataset: CocoDataset, recipe: Recipe, teacher: str, weights_sha256: str, root: Path
) -> KeptOutputs | None:
    """Where the outputs of this run's teacher are kept, if they can be.

    None where augmentation leaves too many variants of an image; where a loss has the teacher decode random queries, or looks at its
    attention maps; and with several processes.

    Args:
        teacher: the name of the teacher's run.
        root: as in `KeptOutputs`.

    Raises:
        InputError: the folder has a file that is damaged or another teacher's.
    """
    if recipe.resize.train not in VARIANTS or distiller.attention or distiller.with_teacher_queries or fabric.world_size > 1:
        return None
    made_by = {
        "teacher": teacher,
        "weights_sha256": weights_sha256,
        "code_sha256": code_hash(),
        "precision": recipe.precision,
        "images": str(recipe.schedule.batch // recipe.schedule.accumulate),
        "device": torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "versions": ", ".join(f"{one} {version(one)}" for one in ["torch", "torchvision"] + ["transformers"] * bool(recipe.teacher.family)),
    }
    return KeptOutputs(root, made_by, VARIANTS[recipe.resize.train] * padded_images(dataset, recipe))


def padded_images(dataset: CocoDataset, recipe: Recipe) -> int:
    """The images, times the sizes to which batches may pad them: an output depends on its image's padding."""
    sides, all_alike = (recipe.resize.short, recipe.resize.long), recipe.resize.stretch
    sizes = [sides if all_alike else shorter_side(image["height"], image["width"], *sides) for image in dataset.coco.imgs.values()]
    return len(sizes) * len({height for height, _ in sizes}) * len({width for _, width in sizes})


def code_hash() -> str:
    """SHA-256 of the code that detectors are made of and called with: outputs of other code are other outputs."""
    package = Path(detrdistill.__file__).parent
    parts = ("boxes.py", "distill/distiller.py", "models/*.py", "any_detr/*.py", "recipes/families.py")
    files = [one for where in parts for one in sorted(package.glob(where))]
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def fingerprint(pixels: Float[Tensor, "3 H W"], padding: Bool[Tensor, "H W"]) -> str:
    """SHA-256 of what the teacher sees of one image of a batch."""
    digest = sha256(str(tuple(pixels.shape)).encode())
    for tensor in (pixels, padding):
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def content_hash(tensors: Tensors, about: dict[str, str]) -> str:
    digest = sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def flatten(output: DetectorOutput) -> Tensors:
    """All that losses may look at, by name; without first-stage predictions, and the neck only where it is not the very features.

    Maps that lie in memory with channels last are turned: losses shall find them in that order, which decides how their sums round.
    """
    tensors = {name: getattr(output, name) for name in STACKED}
    for name in LEVELS if output.neck is not output.features else LEVELS[:-1]:
        for level, x in enumerate(getattr(output, name)):
            turned = x.dim() == 4 and not x.is_contiguous()
            tensors[f"{name}.{level:02}{LAST if turned else ''}"] = x.permute(0, 2, 3, 1) if turned else x
    tensors |= {f"initial.{name}": x for name in VECTORS if (x := getattr(output.initial, name)) is not None}
    return tensors | {"l1": torch.tensor(list(output.l1.encode()), dtype=torch.uint8)}  # a file holds tensors alone


def one_image(tensors: Tensors, i: int) -> Tensors:
    """Image `i` of a batch, copied to the CPU."""

    def cut(name: str, x: Tensor) -> Tensor:
        if name == "l1" or (name.startswith("initial.") and len(x) == 1):  # queries that all images share
            return x
        return x[:, i, None] if name in STACKED else x[i, None]

    return {name: cut(name, x).to("cpu", copy=True, memory_format=torch.contiguous_format) for name, x in tensors.items()}


def join(images: Sequence[Tensors]) -> Tensors:
    """The images as one batch again. Queries that all of them share are there once, as the teacher itself has them."""
    joined = {}
    for name, first in images[0].items():
        parts = [image[name] for image in images]
        shared = name.startswith(("initial.", "l1")) and all(torch.equal(first, other) for other in parts)
        joined[name] = first if shared else torch.cat(parts, dim=1 if name in STACKED else 0)
    return joined


def restore(tensors: Tensors, device: torch.device) -> DetectorOutput:
    """The output that `flatten` has taken apart."""
    l1 = bytes(tensors["l1"].tolist()).decode()
    tensors = {name: x.to(device) for name, x in tensors.items()}
    maps: dict[str, list[Tensor]] = {name: [] for name in LEVELS}
    for key, x in sorted(tensors.items()):
        if (name := key.partition(".")[0]) in maps:
            maps[name].append(x.permute(0, 3, 1, 2) if key.endswith(LAST) else x)
    maps["neck"] = maps["neck"] or maps["features"]
    initial = Queries(**{name: tensors.get(f"initial.{name}") for name in VECTORS})
    return DetectorOutput(**{name: tensors[name] for name in STACKED}, **maps, initial=initial, l1=l1)

"""What the runs of Table 3 would cost on COCO, in days of a V100 and in memory: counted, not measured. `python -m benchmarks.gpu_days`.

The multiplications of one image's pass are counted (torch's own counter) and put in proportion to what the official Deformable DETR
took: 6.5 hours of a V100 an epoch for 173 G (its README; single-scale 3.2 for 78, DETR 4.0 for 86: 0.038 to 0.047 hours a G, which
gives the range here). A backward pass counts as two forward passes, a teacher as its forward pass, and a query group that a method adds
to the student as the decoder that it passes. Newer GPUs and bf16 are faster, by factors that we have not measured.

Memory is what a plain detector's forward pass keeps for its backward pass, of the images of one of 8 GPUs, under bf16 autocast by the
CPU's rules (by CUDA's it is the same for Deformable DETR, and a little less for the others). Weights, gradients, AdamW's state and what
a pass needs for moments only come on top. A batch is padded to its highest and its widest image: square at worst.

Tensors hold no numbers here (torch's FakeTensorMode), so that this takes seconds and no memory.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Table, make_parser, table_path
from detrdistill.models import build_detector
from detrdistill.recipes.presets import get_presets
from detrdistill.recipes.recipe import Recipe
from detrdistill.runs.provenance import commit

SIZE = (800, 1066)  # of an image of COCO's usual 480 x 640 pixels
LONGEST, SQUARE = (800, 1333), (1333, 1333)  # of a batch of landscape images, and of one with portraits among them
GPUS = 8
CLASSES, IMAGES = 80, 117_266  # COCO 2017 without images that have no object
HOURS = (6.5 / 173, 4.0 / 86)  # of a V100 an epoch, a G multiplications of an image's forward pass
SCALES = {  # detectors and settings; all there are if none is named
    "full": ((), ()),
    "quick": ((), ("teacher", "student", "detrdistill")),
    "small": (("conditional_detr",), ("student",)),
}
COLUMNS = (
    "detector",
    "setting",
    "epochs",
    "steps",
    "forward G",
    "teacher's forward G",
    "V100 days, low",
    "V100 days, high",
    "images a GPU",
    "GiB kept of 800 x 1333",
    "GiB kept of 1333 x 1333",
)
GROUPS = {"detrdistill": 1}  # query groups that a method adds to the student's own


def giga(detector: nn.Module) -> tuple[float, float]:
    """10^9 multiplications of one image's forward pass, and the decoder's part of them."""
    pixels, padding = torch.zeros(1, 3, *SIZE), torch.zeros(1, *SIZE, dtype=torch.bool)
    found = []
    with torch.no_grad():
        memory = detector.encode(pixels, padding)
        for work in (lambda: detector.encode(pixels, padding), lambda: detector.decode(memory, detector.queries(memory))):
            with FlopCounterMode(display=False) as counter:
                work()
            found.append(counter.get_total_flops() / 2e9)  # it counts an addition to each multiplication
    return sum(found), found[1]


def kept(recipe: Recipe, size: tuple[int, int]) -> float:
    """GiB that a GPU keeps of its images' forward pass."""
    images = recipe.schedule.batch // GPUS
    detector = build_detector(recipe, CLASSES).train()
    weights = {parameter.untyped_storage()._cdata for parameter in detector.parameters()}
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            held[tensor.untyped_storage()._cdata] = tensor
        return tensor

    pixels = torch.zeros(images, 3, *size).contiguous(memory_format=torch.channels_last)
    padding = torch.zeros(images, *size, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", dtype=torch.bfloat16):
        memory = detector.encode(pixels, padding)
        detector.decode(memory, detector.queries(memory))
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values()) / 2**30


def rows(detectors: Sequence[str], settings: Sequence[str]) -> Iterator[dict[str, object]]:
    """A row for each of the settings of each detector."""
    counted: dict[Recipe, tuple[float, float]] = {}
    for preset in get_presets("coco", detectors):
        for setting in settings or preset.settings:
            recipe = preset.recipe(setting)
            of = {}
            for role, one in {"student": recipe.replace(methods=(), teacher=None, teacher_floor=0.0), "teacher": recipe.teacher}.items():
                if one is not None and one not in counted:
                    with FakeTensorMode():
                        counted[one] = giga(build_detector(one, CLASSES).eval().requires_grad_(False))
                of[role] = counted[one] if one else (0.0, 0.0)
            step = of["student"][0] + of["student"][1] * GROUPS.get(setting, 0) + of["teacher"][0] / 3
            epochs = recipe.schedule.epochs
            days = [math.ceil(10 * epochs * hours * step / 24) / 10 for hours in HOURS]
            with FakeTensorMode():
                memory = [None if recipe.methods else round(kept(recipe, size), 1) for size in (LONGEST, SQUARE)]
            found = (
                recipe.detector,
                setting,
                epochs,
                recipe.schedule.total_steps(IMAGES),
                round(of["student"][0], 1),
                round(of["teacher"][0], 1) or None,
                *days,
                recipe.schedule.batch // GPUS,
                *memory,
            )
            yield dict(zip(COLUMNS, found, strict=True))


def main(words: Sequence[str] | None = None) -> None:
    arguments = make_parser(__doc__).parse_args(words)
    table = Table(table_path(arguments, "gpu_days.csv"), COLUMNS)
    table.start(f"commit {commit()}; torch {torch.__version__}; one image of {SIZE[0]} x {SIZE[1]} px; counted, not measured")
    for row in rows(*SCALES[arguments.scale]):
        table.add(row)


if __name__ == "__main__":
    main()

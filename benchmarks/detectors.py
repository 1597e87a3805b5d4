"""Our detectors against their ports in transformers, same weights, same input: `make benchmark` runs it after benchmarks.py.

Forward: evaluation mode, no gradient. Step: training mode, all stages' outputs, backward. Times in turn within one process; memory
is the peak of a process that does nothing but one step. AdaMixer has no port and stands alone.
"""

import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection

from benchmarks.measure import Table, make_parser, seconds, spread, table_path
from detrdistill.checkpoints.hugging_face import export_hugging_face
from detrdistill.models import build_detector
from detrdistill.recipes.recipe import Recipe
from detrdistill.runs.provenance import commit

CLASSES = 91
SMALL = {"dim": 64, "heads": 4, "ffn": 256, "encoder_layers": 1, "decoder_layers": 3, "queries": 20}
SIZES = {
    # backbone, image side, batch, and what the recipe states
    "R50, 6/6 layers, 300 queries, 512 px": ("resnet50", 512, 2, {"queries": 300}),
    "R50, 6/6 layers, 300 queries, 256 px": ("resnet50", 256, 2, {"queries": 300}),
    "R18, 1/3 layers, 20 queries, 96 px": ("resnet18", 96, 16, SMALL),
    "R18, 1/3 layers, 20 queries, 64 px": ("resnet18", 64, 2, SMALL),
}
LARGE, ROUGH, LITTLE, TINY = SIZES
SCALES = {"full": (5, (LARGE, LITTLE)), "quick": (1, (ROUGH, LITTLE)), "small": (1, (TINY,))}  # repeats and sizes
DETECTORS = ("deformable_detr", "conditional_detr", "adamixer")
COLUMNS = ("detector", "size", "pass", "seconds", "of transformers", "low", "high", "peak MiB", "transformers' peak MiB")
# A process whose memory is measured is forked from one that has only imported libraries.
FRESH = multiprocessing.get_context("forkserver")


def build(detector: str, size: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Our detector with random weights, and a batch that is padded in part."""
    backbone, side, batch, stated = SIZES[size]
    stated = {name: value for name, value in stated.items() if detector != "adamixer" or name != "encoder_layers"}
    # ImageNet's weights are not loaded, only their frozen BatchNorm wanted, as in transformers.
    recipe = Recipe.read({"detector": detector, "backbone": {"name": backbone}, "dropout": 0, "schedule": {"steps": 1}, **stated})
    pixels, padding = torch.randn(batch, 3, side, side), torch.zeros(batch, side, side, dtype=torch.bool)
    pixels[0, :, :, side // 2 :], padding[0, :, side // 2 :] = 0, True
    return build_detector(recipe, CLASSES), pixels, padding


def port(ours: nn.Module, classes: int = CLASSES) -> nn.Module:
    """The same detector in transformers, returning all stages in training as ours does."""
    with tempfile.TemporaryDirectory() as folder:
        export_hugging_face(ours, folder, [str(i) for i in range(classes)])
        return AutoModelForObjectDetection.from_pretrained(folder, auxiliary_loss=True)


def passes(model: nn.Module, pixels: Tensor, padding: Tensor, theirs: bool) -> dict[str, Callable[[], None]]:
    """A forward pass and a training step, which leaves no gradient behind, of one of the two."""

    def outputs() -> Tensor:
        if theirs:
            found = model(pixel_values=pixels, pixel_mask=(~padding).long())
            earlier = [value for stage in found.auxiliary_outputs or () for value in stage.values()]
            return sum(value.sum() for value in (found.logits, found.pred_boxes, *earlier))
        (found,) = model.decode(model.encode(pixels, padding))
        return found.logits.sum() + found.boxes.sum()

    def forward() -> None:
        model.eval()
        with torch.no_grad():
            outputs()

    def step() -> None:
        model.train()
        outputs().backward()
        model.zero_grad()

    return {"forward": forward, "step": step}


def prepare(detector: str, size: str, theirs: bool) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    model, pixels, padding = build(detector, size)
    if theirs:
        return passes(port(model), pixels, padding, theirs)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    return passes(model.to(memory_format=torch.channels_last), pixels, padding, theirs)


def compare(detector: str, size: str, repeats: int, memory: bool) -> Iterator[dict[str, object]]:
    ours = prepare(detector, size, theirs=False)
    theirs = prepare(detector, size, theirs=True) if detector != "adamixer" else None
    for name, action in ours.items():
        other = theirs[name] if theirs else None
        action(), other and other()
        pairs = [(seconds(action), seconds(other) if other else None) for _ in range(repeats)]
        row = {"detector": detector, "size": size, "pass": name, "seconds": statistics.median(own for own, _ in pairs)}
        if other:
            row |= spread([own / another for own, another in pairs], "of transformers")
        if name == "step" and memory:
            row["peak MiB"] = peak(detector, size, theirs=False)
            row["transformers' peak MiB"] = peak(detector, size, theirs=True) if other else None
        yield row


def peak(detector: str, size: str, theirs: bool) -> float:
    """By how much one training step exceeds what a fresh process holds before it, in MiB."""
    with ProcessPoolExecutor(1, FRESH) as pool:
        return pool.submit(growth, detector, size, theirs).result()


def growth(detector: str, size: str, theirs: bool) -> float:
    torch.set_num_threads(1)
    action = prepare(detector, size, theirs)["step"]
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def resident(kind: str) -> float:
    """Resident memory of this process in MiB, now (VmRSS) or at most (VmHWM); getrusage would tell the parent's peak. Linux only."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1024


def main(words: Sequence[str] | None = None) -> None:
    arguments = make_parser(__doc__).parse_args(words)
    repeats, sizes = SCALES[arguments.scale]
    torch.set_num_threads(1)
    ports = (f"transformers.models.{name}.modeling_{name}" for name in ("deformable_detr", "conditional_detr"))
    FRESH.set_forkserver_preload([*ports, "detrdistill.models.hugging_face"])
    table = Table(table_path(arguments, "detectors.csv"), COLUMNS)
    table.start(f"commit {commit()}; torch {torch.__version__}, one CPU thread, float32; medians of {repeats}")
    for size in sizes:
        for detector in DETECTORS:
            memory = arguments.scale != "small" or detector == DETECTORS[0]  # each peak needs a process
            for row in compare(detector, size, repeats, memory):
                table.add(row)


if __name__ == "__main__":
    main()

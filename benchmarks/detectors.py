"""Our detectors against their ports in transformers, same weights, same input: `make benchmark` runs it after benchmarks.py.

Forward: evaluation mode, no gradient. Step: training mode, all stages' outputs, backward. Times in turn within one process; memory
is the peak of a process that does nothing but one step. AdaMixer has no port and stands alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection

from detrdistill.experiments.recipes import Recipe
from detrdistill.experiments.store import commit
from detrdistill.files import write_text
from detrdistill.models import build_detector
from detrdistill.models.hugging_face import export_hugging_face

HERE = Path(__file__).parent
CLASSES = 91
SIZES = {
    # backbone, image side, batch, and what the recipe states
    "R50, 6/6 layers, 300 queries, 512 px": ("resnet50", 512, 2, {"queries": 300}),
    "R18, 1/3 layers, 20 queries, 96 px": (
        "resnet18",
        96,
        16,
        {"dim": 64, "heads": 4, "ffn": 256, "encoder_layers": 1, "decoder_layers": 3, "queries": 20},
    ),
}
DETECTORS = ("deformable_detr", "conditional_detr", "adamixer")


def build(detector: str, size: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Our detector with random weights, and a batch that is padded in part."""
    backbone, side, batch, stated = SIZES[size]
    stated = {name: value for name, value in stated.items() if detector != "adamixer" or name != "encoder_layers"}
    # ImageNet's weights are not loaded, only their frozen BatchNorm wanted, as in transformers.
    recipe = Recipe.read({"detector": detector, "backbone": {"name": backbone}, "dropout": 0, "schedule": {"steps": 1}, **stated})
    pixels, padding = torch.randn(batch, 3, side, side), torch.zeros(batch, side, side, dtype=torch.bool)
    pixels[0, :, :, side // 2 :], padding[0, :, side // 2 :] = 0, True
    return build_detector(recipe, CLASSES), pixels, padding


def port(ours: nn.Module) -> nn.Module:
    """The same detector in transformers, returning all stages in training as ours does."""
    with tempfile.TemporaryDirectory() as folder:
        export_hugging_face(ours, folder, [str(i) for i in range(CLASSES)])
        return AutoModelForObjectDetection.from_pretrained(folder, auxiliary_loss=True)


def passes(detector: str, size: str, theirs: bool) -> dict[str, Callable[[], None]]:
    """A forward pass and a training step of one of the two."""
    torch.manual_seed(0)
    model, pixels, padding = build(detector, size)
    if theirs:
        model = port(model)
    else:
        model.to(memory_format=torch.channels_last)
        pixels = pixels.contiguous(memory_format=torch.channels_last)

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
        model.zero_grad()
        outputs().backward()

    return {"forward": forward, "step": step}


def seconds(action: Callable[[], None]) -> float:
    start = perf_counter()
    action()
    return perf_counter() - start


def compare(detector: str, size: str, repeats: int) -> list[dict[str, object]]:
    ours = passes(detector, size, theirs=False)
    theirs = passes(detector, size, theirs=True) if detector != "adamixer" else None
    lines = []
    for name, action in ours.items():
        other = theirs[name] if theirs else None
        action(), other and other()
        pairs = [(seconds(action), seconds(other) if other else None) for _ in range(repeats)]
        line = {"detector": detector, "size": size, "pass": name, "seconds": statistics.median(own for own, _ in pairs)}
        if other:
            ratios = sorted(own / port for own, port in pairs)
            line |= {"of transformers": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}
        lines.append(line)
    peaks = [peak(detector, size, theirs=False), peak(detector, size, theirs=True) if theirs else None]
    lines[-1] |= {"peak MiB": peaks[0], "transformers' peak MiB": peaks[1]}
    return lines


def peak(detector: str, size: str, theirs: bool) -> float:
    """By how much one training step exceeds what a fresh process holds before it, in MiB."""
    command = [sys.executable, __file__, "--one", json.dumps([detector, size, theirs])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def resident(kind: str) -> float:
    """Resident memory of this process in MiB, now (VmRSS) or at most (VmHWM); getrusage would tell the parent's peak. Linux only."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", help="internal: one step in this process, prints the growth of its peak memory in MiB")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        action = passes(*json.loads(arguments.one))["step"]
        before = resident("VmRSS")
        action()
        print(resident("VmHWM") - before)
        return
    lines = [line for size in SIZES for detector in DETECTORS for line in compare(detector, size, arguments.repeats)]
    frame = pd.DataFrame(lines).round(3)
    print(frame.to_string(index=False))
    about = f"# commit {commit()}; torch {torch.__version__}, one CPU thread, float32; medians of {arguments.repeats}\n"
    write_text(HERE / "detectors.csv", about + frame.to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    main()

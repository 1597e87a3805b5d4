"""Exported detectors in onnxruntime against torch, an image at a time on one thread: `python -m benchmarks.export`.

Times in turn within one process. Weights are random, the image is noise without padding. MB are those of model.onnx.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnxruntime
import torch

from benchmarks.measure import Table, make_parser, seconds, spread, table_path
from detrdistill.export.graph import Exported, write_graph
from detrdistill.models import build_detector
from detrdistill.recipes.recipe import Recipe
from detrdistill.runs.provenance import commit

CLASSES = 80
SMALL = {"backbone": {"name": "resnet18"}, "dim": 32, "heads": 4, "ffn": 64, "decoder_layers": 1, "queries": 20}
DETECTORS = {
    "deformable_detr": {},
    "conditional_detr": {"ffn": 2048},
    "adamixer": {"ffn": 2048, "queries": 100, "dropout": 0.0},
}
SCALES = {"full": (320, 7), "quick": (320, 3), "small": (128, 1)}  # side in pixels, repeats
COLUMNS = ("detector", "side", "eager ms", "eager low", "eager high", "onnxruntime ms", "onnxruntime low", "onnxruntime high", "MB")


def measure(detector: str, small: bool, side: int, repeats: int) -> dict[str, object]:
    """A detector of its own sizes on a ResNet-50, or a tiny one."""
    own = SMALL | ({} if detector == "adamixer" else {"encoder_layers": 1}) if small else DETECTORS[detector]
    torch.manual_seed(0)
    recipe = Recipe.read({"detector": detector, "schedule": {"steps": 1}, **own})
    whole = Exported(build_detector(recipe, CLASSES).eval(), post_processing=True)
    size = torch.tensor([[side, side]])
    given = dict(zip(whole.inputs, (torch.randn(1, 3, side, side), size, size), strict=True))
    arrays = {name: tensor.numpy() for name, tensor in given.items()}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        write_graph(whole, path, {})
        megabytes = path.stat().st_size / 1e6
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def eager() -> None:
        with torch.inference_mode():
            whole(**given)

    def exported() -> None:
        session.run(None, arrays)

    eager(), exported()
    pairs = [(1000 * seconds(eager), 1000 * seconds(exported)) for _ in range(repeats)]
    row: dict[str, object] = {"detector": detector, "side": side, "MB": megabytes}
    for name, times in zip(("eager", "onnxruntime"), zip(*pairs, strict=True), strict=True):
        found = spread(times)
        row |= {f"{name} ms": found["value"], f"{name} low": found["low"], f"{name} high": found["high"]}
    return row


def main(words: Sequence[str] | None = None) -> None:
    arguments = make_parser(__doc__).parse_args(words)
    torch.set_num_threads(1)
    side, repeats = SCALES[arguments.scale]
    table = Table(table_path(arguments, "export.csv"), COLUMNS)
    versions = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    table.start(f"commit {commit()}; {versions}; one CPU thread, float32; post-processing inside; medians of {repeats}")
    for detector in DETECTORS:
        table.add(measure(detector, arguments.scale == "small", side, repeats))


if __name__ == "__main__":
    main()

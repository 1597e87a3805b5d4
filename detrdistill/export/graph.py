"""A detector as an ONNX graph. It asks of a detector nothing but the contract of `models`: `encode`, `queries`, `decode`, `top`."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from detrdistill.errors import InputError
from detrdistill.training.evaluation import best_pairs

OPSET = 18
TRACED = (2, 512, 768)  # images, height, width; only shapes pass the tracer, so that large ones cost nothing, and no level has one cell
DYNAMIC = {
    "pixels": {0: "batch", 2: "height", 3: "width"},
    "sizes": {0: "batch"},
    "original_sizes": {0: "batch"},
}


class Exported(nn.Module):
    """What the file computes: a detector's last stage, and its post-processing where it is wanted.

    A file takes the size of each image instead of a mask: padding is what lies below and on the right, nothing else.

    Args:
        detector: in evaluation mode.
        post_processing: whether the best detections are chosen, and boxes given in pixels.
    """

    def __init__(self, detector: nn.Module, post_processing: bool) -> None:
        super().__init__()
        self.detector, self.post_processing = detector, post_processing
        self.inputs = ("pixels", "sizes", "original_sizes")[: 2 + post_processing]
        self.outputs = ("scores", "labels", "boxes") if post_processing else ("logits", "boxes")

    def forward(self, pixels: Tensor, sizes: Tensor, original_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Detect.

        Args:
            pixels: normalised images [B 3 H W], each at the top left, 0 where padded.
            sizes: height and width of each image within `pixels` [B 2].
            original_sizes: height and width of each image in its file [B 2], with post-processing.

        Returns:
            `logits` [B Q C] and `boxes` [B Q 4] (cxcywh, relative to the image), or with post-processing `scores` [B K], `labels`
            [B K] and `boxes` [B K 4] (xyxy in pixels of the image's file), best first; K is the detector's `top`.
        """
        below = torch.arange(pixels.shape[2], device=pixels.device)[:, None] >= sizes[:, 0, None, None]
        right = torch.arange(pixels.shape[3], device=pixels.device) >= sizes[:, 1, None, None]
        memory = self.detector.encode(pixels, below | right)
        (output,) = self.detector.decode(memory, self.detector.queries(memory))
        logits, boxes = output.logits[-1], output.boxes[-1]
        return best_pairs(logits, boxes, original_sizes, self.detector.top) if self.post_processing else (logits, boxes)


def write_graph(whole: Exported, path: Path, about: Mapping[str, str], fixed: tuple[int, int] | None = None) -> None:
    """Write the graph with `about` as its metadata; batch, height and width are free, or the latter are `fixed`.

    Raises:
        InputError: torch cannot write this detector as ONNX.
    """
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript import optimizer

    images, height, width = TRACED if fixed is None else (TRACED[0], *fixed)
    free = {name: {axis: side for axis, side in axes.items() if axis == 0 or fixed is None} for name, axes in DYNAMIC.items()}
    # Two tensors: one that is given twice would be one input to the tracer.
    size, original = (torch.tensor([[height, width]] * images) for _ in range(2))
    example = (torch.zeros(images, 3, height, width), size, original)[: len(whole.inputs)]
    try:
        # By the kernel "math": the strides of the others' results, which the tracer believes, do not hold after the exporter takes
        # attention apart (AdaMixer's, whose mask is a bias; torch 2.15).
        tracing = getattr(whole.detector, "traceable", nullcontext)  # transformers' models need it
        with quiet(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), tracing():
            # Not optimised by the exporter: its rule that joins a minimum and a maximum names the bounds by their input, so that two
            # pairs on one value, as in Conditional DETR's `inverse_sigmoid` of each stage, lose one's bounds and the graph is invalid
            # (onnxscript 0.7.2). tests/export/test_graph.py tells when that is mended. Folding constants is the part that matters.
            program = torch.onnx.export(
                whole,
                example,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                input_names=whole.inputs,
                output_names=whole.outputs,
                dynamic_shapes={name: free[name] for name in whole.inputs},
            )
            model = program.model
            optimizer.inline(model)
            optimizer.fold_constants(model)
            optimizer.remove_unused_nodes(model)
    except torch.onnx.OnnxExporterError as error:
        reason = next((line for line in reversed(str(error).splitlines()) if "Error" in line), str(error))
        name = type(whole.detector).__name__
        raise InputError(f"export: torch {torch.__version__} cannot write a {name} as ONNX ({' '.join(reason.split())[:200]})") from error
    ClearMetadataAndDocStringPass()(model)  # where in whose folders each node's source stands
    for output in model.graph.outputs:  # a two-stage detector's number of detections is a formula of height and width
        output.shape = onnx_ir.Shape([*(("batch", "detections")[i] if type(n) is not int else n for i, n in enumerate(output.shape))])
    model.metadata_props.update(about)
    onnx_ir.save(model, path)


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of the libraries about each other, and no word of theirs about nodes that they leave as they are."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [one.level for one in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for one in loggers:
                one.setLevel(logging.ERROR)
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)

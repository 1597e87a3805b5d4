"""What checks of several detectors share."""

import torch
from torch import Tensor, nn

from detrdistill.models.outputs import DetectorOutput, Queries
from tests.parity.oracle import Oracle, formula_weight


class Channels(nn.Module):
    """Stands for a backbone where an oracle starts from feature maps."""

    def __init__(self, channels: list[int], strides: list[int] | None = None) -> None:
        super().__init__()
        self.channels, self.strides = channels, strides


def stages(logits: Tensor, boxes: Tensor, proposals: DetectorOutput | None = None) -> DetectorOutput:
    """Predictions [S B Q *] as a detector's output, without what the set criterion does not look at."""
    nothing = logits.new_zeros(*logits.shape[:3], 0)
    return DetectorOutput(logits, boxes, nothing, [], [], Queries(nothing[0], nothing[0], nothing[0], proposals))


def formula_images(oracle: Oracle, sizes: list[list[int]], padded: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """The images of a complete network's oracle, and their padding mask."""
    height, width = padded or [max(side) for side in zip(*sizes, strict=True)]
    pixels, padding = torch.zeros(len(sizes), 3, height, width, dtype=oracle.dtype), torch.ones(len(sizes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        pixels[i, :, :h, :w], padding[i, :h, :w] = formula_weight(oracle.meta["seed"], f"image{i}", [3, h, w], 1.7), False
    return pixels, padding


def expect_statistics(oracle: Oracle, whole: dict[str, Tensor]) -> None:
    """Mean and standard deviation of tensors of which an oracle stores slices only."""
    for name, value in whole.items():
        found = torch.stack((value.double().mean(), value.double().std()))
        torch.testing.assert_close(found, torch.tensor(oracle.meta["stats"][name]).double(), atol=1e-4, rtol=1e-4)


def every(value: Tensor, stored: Tensor) -> Tensor:
    """The slices of a map that an oracle stores: every so-many-th channel, row and column."""
    return value[tuple(slice(None, None, -(-ours // theirs)) for ours, theirs in zip(value.shape, stored.shape, strict=True))]

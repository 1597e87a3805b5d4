"""Whether an ONNX file gives the detections of the detector that it was made from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detrdistill.errors import InputError
from detrdistill.export.graph import Exported

TOLERANCE = 1e-4  # of scores, and of boxes as parts of the image
SCORE, CLASS = 0, 1  # columns of the best detections


@dataclass(frozen=True)
class Images:
    """A batch as an exported graph takes it.

    Attributes:
        pixels: normalised, 0 where padded.
        sizes: height and width of each image within `pixels`.
        original_sizes: of each in its file.
    """

    pixels: Float[Tensor, "B 3 H W"]
    sizes: Int[Tensor, "B 2"]
    original_sizes: Int[Tensor, "B 2"]

    @classmethod
    def together(cls, images: Sequence[tuple[Float[Tensor, "3 H W"], tuple[int, int]]]) -> Self:
        """Images, each with the size of its file, padded to one size."""
        sizes = torch.tensor([one.shape[1:] for one, _ in images])
        pixels = torch.zeros(len(images), 3, *sizes.amax(0).tolist())
        for place, (one, _) in zip(pixels, images, strict=True):
            place[:, : one.shape[1], : one.shape[2]] = one
        return cls(pixels, sizes, torch.tensor([size for _, size in images]))

    def __len__(self) -> int:
        return len(self.pixels)

    def __str__(self) -> str:
        return f"{len(self)} of {self.pixels.shape[2]} x {self.pixels.shape[3]}"


def verify(whole: Exported, path: Path, batches: Sequence[Images]) -> float:
    """The largest difference between torch's detections and onnxruntime's, of scores (0 to 1) and of boxes relative to the image.

    Detections of an image are compared as a set: each of torch's with the one of onnxruntime's that an assignment gives it. Where two
    scores are all but equal, rounding decides which comes first, and which of them is the last that is kept.

    Raises:
        InputError: onnxruntime refuses the file or fails on it, or the difference is above `TOLERANCE`.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what it fails with comes as an exception as well
    named = f"onnxruntime {onnxruntime.__version__}"
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class of their own
        raise InputError(f"export: {named} refuses the file ({brief(error)}); nothing is written") from error
    worst = 0.0
    for batch in batches:
        given = (batch.pixels, batch.sizes, batch.original_sizes)[: len(whole.inputs)]
        with torch.no_grad():
            ours = [tensor.numpy() for tensor in whole(*given)]
        try:
            theirs = session.run(None, {name: tensor.numpy() for name, tensor in zip(whole.inputs, given, strict=True)})
        except Exception as error:
            raise InputError(f"export: {named} fails on images, {batch} px ({brief(error)}); nothing is written") from error
        pairs = zip(*(rows(one, batch, whole.post_processing) for one in (ours, theirs)), strict=True)
        apart = [difference(*pair, best=whole.post_processing) for pair in pairs]
        worst = math.nan if math.isnan(sum(apart)) else max(worst, *apart)
    if not worst <= TOLERANCE:  # NaN too
        raise InputError(
            f"export: {named}'s detections differ from torch's by {worst:.1e}, more than {TOLERANCE:g} ({', '.join(map(str, batches))} "
            "px); nothing is written"
        )
    return worst


def rows(outputs: Sequence[np.ndarray], batch: Images, post_processing: bool) -> np.ndarray:
    """A graph's outputs as a row a detection [B N F]: score, class and box, or all probabilities and the box."""
    if not post_processing:
        logits, boxes = (one.astype(np.float64) for one in outputs)
        return np.concatenate((1 / (1 + np.exp(-logits)), boxes), axis=-1)
    scores, labels, boxes = outputs
    sizes = batch.original_sizes.numpy()[:, None, [1, 0, 1, 0]]
    return np.concatenate((scores[..., None], labels[..., None], boxes / sizes), axis=-1)


def difference(ours: np.ndarray, theirs: np.ndarray, best: bool) -> float:
    """The largest of two sets of rows, assigned one to one; of numbers above 1 (boxes far outside) relative to them.

    Args:
        best: whether rows are the best detections of more: of one class each, and one whose score is that of the last may be any other.
    """
    if ours.shape != theirs.shape:
        return math.inf
    apart = (np.abs(ours[:, None] - theirs) / np.maximum(1, np.abs(ours[:, None]))).max(-1)
    if not np.isfinite(apart).all():
        return math.nan
    if best:
        apart = np.where(ours[:, None, CLASS] == theirs[:, CLASS], apart, 1.0)
        scores, others = ours[:, None, SCORE], theirs[:, SCORE]
        last = min(scores.min(), others.min()) + TOLERANCE
        apart = np.where((scores <= last) & (others <= last), np.minimum(apart, np.abs(scores - others)), apart)
    return float(apart[linear_sum_assignment(apart)].max())


def brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

"""The loss that a model of transformers brings (varifocal, distribution focal, matchability aware, ...), divided as the step wants it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from detrdistill.errors import NonFiniteError
from detrdistill.matching import Pairs, Problem
from detrdistill.models.outputs import DetectorOutput, Targets
from detrdistill.recipes.families import Family

_OF_BOX_BEFORE = tuple(f"loss_{part}_{group}_0" for part in ("fgl", "ddf") for group in ("aux", "dn"))
Recorded = tuple[tuple, dict[str, Any]]


class OwnLoss:
    """In the place of `criterion.SetCriterion` for a detector that has a loss of its own, with its own matching and its own groups.

    The model's forward pass calls its loss; the call is written down, and made later, in full precision. transformers divides by the
    objects of the batch that it sees. A step may have several batches and devices, so that parts are multiplied by batch / step: of
    objects, or of images where a part is a mean over queries.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model, self.family = model, family

    @contextmanager
    def recorded(self) -> Iterator[list[Recorded]]:
        """The model's forward pass writes its loss's arguments into the list, instead of calling it."""
        calls: list[Recorded] = []

        def write_down(*args, **kwargs):
            calls.append((args, kwargs))
            return None, {}, None

        self.model.loss_function = write_down
        try:
            yield calls
        finally:
            del self.model._loss_function

    def problems(self, student: DetectorOutput, targets: Targets) -> dict[str, Problem]:
        """None: the model's loss matches for itself."""
        return {}

    def __call__(self, student: DetectorOutput, targets: Targets, pairs: Mapping[str, Pairs]) -> dict[str, Tensor]:
        """The weighted parts of the loss by transformers' names, divided by the step's objects or images.

        Raises:
            NonFiniteError: a prediction is NaN or infinite.
        """
        args, kwargs = tree_map(_full_precision, student.own)
        if not all(value.isfinite().all() for value in (student.logits, student.boxes, args[0], args[3])):
            raise NonFiniteError("own loss: a predicted logit or box is NaN or infinite")
        if self.family.box_before:
            kwargs = _aligned(kwargs)
        _, parts, _ = self.model.loss_function(*args, **kwargs)
        by_objects = max(float(sum(targets.counts)), 1.0) / targets.step_boxes
        by_images = len(targets.counts) / targets.step_images
        losses = {}
        for name, value in parts.items():
            if (weight := self._weight(name)) is not None:
                losses[name] = value * weight * (by_images if name.startswith(self.family.averaged) else by_objects)
        # Embeddings of denoising queries have no gradient without an object, for which DDP would wait in vain.
        idle = [p.sum() * 0 for name, p in self.model.named_parameters() if "denoising" in name and p.requires_grad]
        first = next(iter(losses))
        return losses | {first: losses[first] + sum(idle)}

    def _weight(self, name: str) -> float | None:
        """What a part counts in the sum; None for one that only tells."""
        if self.family.box_before and name in _OF_BOX_BEFORE:
            return None
        if self.family.loss_weights is None:
            return 1.0
        entries = (entry for part, entry in self.family.loss_weights.items() if name.startswith(part))
        entry = next(entries, None)
        return None if entry is None else float(getattr(self.model.config, entry)) if entry else 1.0


def _aligned(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The loss's arguments with as many distributions [B S ...] as there are predictions.

    D-FINE predicts a box before its first layer's distribution. transformers (5.23) puts that prediction first and zips: each layer's box
    goes with the next one's distribution, the matched queries of the layer before the last are never supervised, nor are the denoising
    ones of the last. The official code supervises all. With the first distribution twice they go together; what it gives for the box
    before is left out (`_OF_BOX_BEFORE`). The last layer's matched queries have no distribution loss, as in transformers.
    """
    repeated = {name: torch.cat((kwargs[name][:, :1], kwargs[name]), dim=1) for name in ("predicted_corners", "initial_reference_points")}
    return kwargs | repeated


def _full_precision(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value

"""The contract between detectors and losses. A loss may look at a `DetectorOutput` and at `Targets`, and at nothing else.

Letters for shapes, here and everywhere: B images, S decoder stages, Q queries, C classes, D channels, L feature levels,
H W grid (_ where levels differ), N targets. (The classes are not frozen because Fabric copies its inputs field by field.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass
class Queries:
    """What a decoder starts from. B is 1 where all images share the queries.

    Attributes:
        content: first content vectors.
        position: the family's query embedding (query position in the DETRs); None where the decoder derives it from the boxes.
        reference: the family's first geometry: logits of reference points or boxes in the DETRs, boxes in AdaMixer, always relative
            to the image without padding. None: the detector that decodes the group places it.
        proposals: first-stage predictions that two-stage queries were chosen from, as if one decoder stage with a query for
            every token; None for learned queries.
    """

    content: Float[Tensor, "B Q D"]
    position: Float[Tensor, "B Q D"] | None
    reference: Float[Tensor, "B Q P"] | None
    proposals: "DetectorOutput | None" = None

    def __len__(self) -> int:
        return self.content.shape[1]

    @classmethod
    def join(cls, groups: "Sequence[Queries]", batch: int) -> "Queries":
        """All groups side by side, for a decoder pass over `batch` images."""

        def join(parts):
            return torch.cat([part.expand(batch, -1, -1) for part in parts], dim=1)

        position = None if groups[0].position is None else join([group.position for group in groups])
        return cls(join([group.content for group in groups]), position, join([group.reference for group in groups]))


@dataclass
class DetectorOutput:
    """All a detector says about a batch, for one group of queries.

    Attributes:
        logits: class logits before the sigmoid.
        boxes: cxcywh, relative to the image without padding.
        queries: decoder outputs of each stage.
        features: what the decoder attends to, a map a level: encoder memory, or the neck where there is no encoder.
            Their channels E are D, but for an AdaMixer whose neck has another width.
        padding: True on padding, a mask a level.
        initial: the queries the decoder started from; a student takes its teacher's as a second group. None for proposals.
        l1: which form of the boxes the detector's L1 cost and loss compare.
        neck: what the encoder starts from, the backbone's maps projected to E channels, a map a level of the same sizes as
            `features`; the very `features` where there is no encoder. Methods made for convolutional detectors attach here.
        self_attention: how much a query (row) takes from each query of its group, averaged over heads; rows sum to 1. None unless
            `decode` was asked for `attention`, as the next.
        cross_attention: how much a query takes from each cell of `features`, all levels flattened row by row and concatenated (T
            cells), averaged over heads. Rows sum to 1, or to less where points are sampled: what falls outside of the maps or on
            padding is lost.
        own: what a detector that brings its own loss needs for it; nobody else looks at it.
    """

    logits: Float[Tensor, "S B Q C"]
    boxes: Float[Tensor, "S B Q 4"]
    queries: Float[Tensor, "S B Q D"]
    features: Sequence[Float[Tensor, "B E _ _"]]
    padding: Sequence[Bool[Tensor, "B _ _"]]
    initial: Queries | None = None
    l1: Literal["cxcywh", "xyxy"] = "cxcywh"
    neck: Sequence[Float[Tensor, "B E _ _"]] = ()
    self_attention: Float[Tensor, "S B Q Q"] | None = None
    cross_attention: Float[Tensor, "S B Q T"] | None = None
    own: Any = None

    def split(self, groups: Sequence[Queries], maps: "AttentionMaps | None" = None) -> "list[DetectorOutput]":
        """One output for each of the `groups` that `Queries.join` put side by side, with the attention that was recorded."""
        sizes = [group.content.shape[1] for group in groups]
        parts = zip(groups, *(stacked.split(sizes, dim=2) for stacked in (self.logits, self.boxes, self.queries)), strict=True)
        found = [replace(self, logits=z, boxes=boxes, queries=t, initial=group) for group, z, boxes, t in parts]
        if maps is None:
            return found
        among = (torch.stack(stages) for stages in zip(*maps.among, strict=True))
        across = torch.stack(maps.across).split(sizes, dim=2)
        return [replace(one, self_attention=a, cross_attention=b) for one, a, b in zip(found, among, across, strict=True)]

    def at(self, stages: Sequence[int]) -> "DetectorOutput":
        """The predictions of the given stages, in that order; a stage may come more than once."""
        if list(stages) == list(range(len(self.logits))):
            return self
        stacked = {name: getattr(self, name) for name in ("logits", "boxes", "queries", "self_attention", "cross_attention")}
        taken = {name: torch.stack([x[stage] for stage in stages]) for name, x in stacked.items() if x is not None}
        return replace(self, **taken)


@dataclass
class AttentionMaps:
    """Where queries look: what a decoder's layers write down, stage by stage, if they are asked to.

    It is computed beside the layers' fast kernels, which do not tell, and without dropout; outputs are the same with and without.

    Attributes:
        among: self-attention, a map a group: groups do not see each other and may differ in size.
        across: cross-attention of all groups' queries.
    """

    among: list[Sequence[Float[Tensor, "B _ _"]]] = field(default_factory=list)
    across: list[Float[Tensor, "B Q T"]] = field(default_factory=list)


@dataclass
class Targets:
    """Ground truth of a batch, padded to the image with most objects, and the normalisers of the optimizer step.

    A loss sums over images and divides by `step_boxes` or `step_images`, which count the whole optimizer step: all
    micro-batches and all devices. So micro-batches, and 2 devices instead of 1, leave the loss and its gradient unchanged, as far as
    images do not see each other: not with dropout, nor with trained BatchNorm (a backbone with weights "none"), nor, slightly, where
    GroupNorm counts padding that another batch would not have.

    Attributes:
        labels: class indices, 0 where padded.
        boxes: cxcywh, relative to the image without padding; 0 where padded.
        counts: objects of each image (numbers on the host).
        step_boxes: objects in the whole optimizer step as the detector counts them (`objects`), at least 1.
        step_images: images in the whole optimizer step.
    """

    labels: Int[Tensor, "B N"]
    boxes: Float[Tensor, "B N 4"]
    counts: list[int]
    step_boxes: float = field(default=0.0)
    step_images: float = field(default=0.0)

    @classmethod
    def pack(cls, labels: Sequence[Tensor], boxes: Sequence[Tensor]) -> "Targets":
        """Pad per-image labels [n] and boxes [n, 4] to one batch; the normalisers count this batch alone."""
        counts = [len(one) for one in labels]
        packed_labels = torch.zeros(len(counts), max(counts, default=0), dtype=torch.long)
        packed_boxes = torch.zeros(*packed_labels.shape, 4, dtype=boxes[0].dtype if len(boxes) else torch.float32)
        for i, n in enumerate(counts):
            packed_labels[i, :n], packed_boxes[i, :n] = labels[i], boxes[i]
        return cls(packed_labels, packed_boxes, counts, max(float(sum(counts)), 1.0), float(len(counts)))

    def objects(self, most: int | None = None) -> int:
        """Objects of the batch, of each image at most so many: a detector's `most_objects`."""
        return sum(count if most is None else min(count, most) for count in self.counts)

    def to(self, device: torch.device | str) -> "Targets":
        """The same on another device, copied without waiting."""

        def move(tensor):
            return tensor.to(device, non_blocking=True)

        return replace(self, labels=move(self.labels), boxes=move(self.boxes))

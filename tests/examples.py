"""Random predictions and targets that the tests of matching and losses share."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from detrdistill.models.outputs import DetectorOutput, Queries, Targets

GRIDS = ((4, 6), (2, 3))


def some_boxes(*shape: int, seed: int = 0) -> Tensor:
    """Boxes cxcywh that lie inside the image."""
    corners = torch.rand(*shape, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = corners.amin(-2) * 0.9, corners.amax(-2) * 0.9 + 0.1
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def some_targets(*counts: int, classes: int = 3, seed: int = 0) -> Targets:
    labels = [torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed + i)) for i, n in enumerate(counts)]
    return Targets.pack(labels, [some_boxes(n, seed=seed + 10 + i) for i, n in enumerate(counts)])


def some_output(
    stages: int = 2,
    images: int = 2,
    queries: int = 5,
    classes: int = 3,
    dim: int = 4,
    grids: Sequence[tuple[int, int]] = GRIDS,
    seed: int = 0,
) -> DetectorOutput:
    """Predictions in float64, with attention maps; the last column of every map of the last image is padding."""
    random = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    padding = [torch.zeros(images, *grid, dtype=torch.bool) for grid in grids]
    for mask in padding:
        mask[-1, :, -1] = True
    hidden = torch.cat([mask.flatten(1) for mask in padding], dim=1)
    return DetectorOutput(
        logits=normal(stages, images, queries, classes),
        boxes=some_boxes(stages, images, queries, seed=seed + 1),
        queries=normal(stages, images, queries, dim),
        features=[normal(images, dim, *grid) for grid in grids],
        padding=padding,
        initial=Queries(normal(1, queries, dim), normal(1, queries, dim), normal(1, queries, 2)),
        # New numbers are drawn after the old ones, which tests rely on.
        neck=[normal(images, dim, *grid) for grid in grids],
        self_attention=normal(stages, images, queries, queries).softmax(-1),
        cross_attention=normal(stages, images, queries, hidden.shape[1]).masked_fill(hidden[:, None], -torch.inf).softmax(-1),
    )


# What has stages, and what is a map a level.
STACKED = ("logits", "boxes", "queries", "self_attention", "cross_attention")
LEVELS = ("features", "neck")


def with_gradient(output: DetectorOutput) -> DetectorOutput:
    """The same numbers as leaves that ask for a gradient."""
    leaf = lambda tensor: tensor.detach().clone().requires_grad_()  # noqa: E731
    raised = {name: leaf(getattr(output, name)) for name in STACKED}
    return replace(output, **raised, **{name: [leaf(level) for level in getattr(output, name)] for name in LEVELS})


def leaves(output: DetectorOutput) -> list[Tensor]:
    return [*(getattr(output, name) for name in STACKED), *output.features, *output.neck]


def permuted(output: DetectorOutput, order: Tensor) -> DetectorOutput:
    """The same queries in another order."""
    found = {name: getattr(output, name)[:, :, order] for name in STACKED}
    return replace(output, **found | {"self_attention": found["self_attention"][..., order]})


def one_image(value: DetectorOutput | Targets, image: int) -> DetectorOutput | Targets:
    """One image of a batch; the normalisers of targets stay those of the whole."""
    if isinstance(value, Targets):
        count = value.counts[image]
        return replace(value, labels=value.labels[image, None, :count], boxes=value.boxes[image, None, :count], counts=[count])
    cut = {name: getattr(value, name)[:, image, None] for name in STACKED}
    maps = {name: [level[image, None] for level in getattr(value, name)] for name in (*LEVELS, "padding")}
    return replace(value, **cut, **maps)


def more_padding(output: DetectorOutput) -> DetectorOutput:
    """The same maps with rows and columns of padding at the bottom and on the right, filled with numbers that must not matter.

    (But for attention, which detectors give to no padding.)
    """
    pad = lambda maps, value: [torch.nn.functional.pad(x, (0, 3, 0, 2), value=value) for x in maps]  # noqa: E731
    wider = {name: pad(getattr(output, name), 7.0) for name in LEVELS}
    levels = output.cross_attention.split([mask[0].numel() for mask in output.padding], dim=-1)
    grids = [level.unflatten(-1, mask.shape[1:]) for level, mask in zip(levels, output.padding, strict=True)]
    attention = torch.cat([level.flatten(-2) for level in pad(grids, 0.0)], dim=-1)
    return replace(output, **wider, padding=pad(output.padding, True), cross_attention=attention)

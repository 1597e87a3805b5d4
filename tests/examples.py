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
    """Predictions in float64; the last column of every map of the last image is padding."""
    random = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    padding = [torch.zeros(images, *grid, dtype=torch.bool) for grid in grids]
    for mask in padding:
        mask[-1, :, -1] = True
    return DetectorOutput(
        logits=normal(stages, images, queries, classes),
        boxes=some_boxes(stages, images, queries, seed=seed + 1),
        queries=normal(stages, images, queries, dim),
        features=[normal(images, dim, *grid) for grid in grids],
        padding=padding,
        initial=Queries(normal(1, queries, dim), normal(1, queries, dim), normal(1, queries, 2)),
    )


def with_gradient(output: DetectorOutput) -> DetectorOutput:
    """The same numbers as leaves that ask for a gradient."""
    leaf = lambda tensor: tensor.detach().clone().requires_grad_()  # noqa: E731
    raised = {name: leaf(getattr(output, name)) for name in ("logits", "boxes", "queries")}
    return replace(output, **raised, features=[leaf(level) for level in output.features])


def leaves(output: DetectorOutput) -> list[Tensor]:
    return [output.logits, output.boxes, output.queries, *output.features]


def permuted(output: DetectorOutput, order: Tensor) -> DetectorOutput:
    """The same queries in another order."""
    return replace(output, **{name: getattr(output, name)[:, :, order] for name in ("logits", "boxes", "queries")})


def one_image(value: DetectorOutput | Targets, image: int) -> DetectorOutput | Targets:
    """One image of a batch; the normalisers of targets stay those of the whole."""
    if isinstance(value, Targets):
        count = value.counts[image]
        return replace(value, labels=value.labels[image, None, :count], boxes=value.boxes[image, None, :count], counts=[count])
    cut = {name: getattr(value, name)[:, image, None] for name in ("logits", "boxes", "queries")}
    return replace(value, **cut, features=[x[image, None] for x in value.features], padding=[x[image, None] for x in value.padding])


def more_padding(output: DetectorOutput) -> DetectorOutput:
    """The same maps with rows and columns of padding at the bottom and on the right, filled with numbers that must not matter."""
    pad = lambda maps, value: [torch.nn.functional.pad(x, (0, 3, 0, 2), value=value) for x in maps]  # noqa: E731
    return replace(output, features=pad(output.features, 7.0), padding=pad(output.padding, True))

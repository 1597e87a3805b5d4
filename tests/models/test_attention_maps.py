"""Attention maps against what the layers compute, point by point and head by head."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from detrdistill.distill.distiller import full_precision
from detrdistill.models import DetectorOutput, adamixer, attention, conditional_detr
from detrdistill.models.attention import sample_and_sum, sampling_map
from tests.examples import some_output
from tests.models.small import KINDS, QUERIES, STAGES, batch, small_detector
from tests.models.test_contract import some_queries

every_kind = pytest.mark.parametrize("kind", KINDS)
CLOSE = {"atol": 1e-5, "rtol": 0}
SHAPES = [(3, 4), (2, 2)]


def images() -> tuple[Tensor, Tensor]:
    return batch((64, 96), (96, 50))


def hidden(output: DetectorOutput) -> Tensor:
    """Padding of all levels, [B T]."""
    return torch.cat([mask.flatten(1) for mask in output.padding], dim=1)


def asked(kind: str, guests: tuple[int, ...] = (), **changes) -> tuple[nn.Module, list[DetectorOutput]]:
    """A small detector and what it says to its own queries and to groups of other sizes, with attention."""
    detector = small_detector(kind, **changes)
    memory = detector.encode(*images())
    groups = [some_queries(detector, memory, count, seed=count) for count in guests]
    return detector, detector.decode(memory, detector.queries(memory), *groups, attention=True)


def some_points(batch: int = 2, queries: int = 3, heads: int = 2, points: int = 4) -> tuple[Tensor, Tensor]:
    """Locations in and around the maps, and weights."""
    random = torch.Generator().manual_seed(0)
    locations = 1.6 * torch.rand(batch, queries, heads, len(SHAPES), points, 2, generator=random, dtype=torch.float64) - 0.3
    return locations, torch.rand(locations.shape[:-1], generator=random, dtype=torch.float64)


def literal(shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor, padding: Tensor) -> Tensor:
    """Each point's weight to the four cells around it, by their distance."""
    found = torch.zeros(*weights.shape[:2], padding.shape[1], dtype=torch.float64)
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
    for place in torch.cartesian_prod(*(torch.arange(n) for n in weights.shape)).tolist():
        image, query, _, level, _ = place
        height, width = shapes[level]
        x, y = (locations[tuple(place)].double() * torch.tensor([width, height]) - 0.5).tolist()
        for row, column in ((math.floor(y) + i, math.floor(x) + j) for i in (0, 1) for j in (0, 1)):
            token = starts[level] + row * width + column
            if 0 <= row < height and 0 <= column < width and not padding[image, token]:
                share = (1 - abs(y - row)) * (1 - abs(x - column))
                found[image, query, token] += weights[tuple(place)].item() * share
    return found


def test_sampling_map_equals_a_loop_over_points():
    locations, weights = some_points()
    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[1, [3, 7, 11, 13, 15]] = True
    found = sampling_map(SHAPES, locations, weights, padding)
    torch.testing.assert_close(found, literal(SHAPES, locations, weights, padding))
    assert (found[1, :, padding[1]] == 0).all() and (found.sum(-1) < weights.flatten(2).sum(-1)).all()


def test_sampling_map_is_what_sampling_multiplies_the_values_with():
    locations, weights = some_points(heads=1)
    value = torch.randn(2, 16, 5, dtype=torch.float64)
    found = sampling_map(SHAPES, locations, weights, torch.zeros(2, 16, dtype=torch.bool))
    torch.testing.assert_close(found @ value, sample_and_sum(value, SHAPES, locations, weights, heads=1))


def test_points_far_outside_are_lost():
    locations, weights = some_points()
    locations[..., 0] = torch.tensor([1e30, -1e30, math.inf, -math.inf])
    assert (sampling_map(SHAPES, locations, weights, torch.zeros(2, 16, dtype=torch.bool)) == 0).all()


def test_gradients_of_sampling_map():
    locations, weights = (x.requires_grad_() for x in some_points(1, 2, 1, 3))
    padding = torch.zeros(1, 16, dtype=torch.bool)
    padding[0, 5] = True
    assert gradcheck(lambda *points: sampling_map(SHAPES, *points, padding), (locations, weights))


@every_kind
def test_shapes_and_sums(kind: str):
    _, outputs = asked(kind, (7, 3))
    for output, queries in zip(outputs, (QUERIES, 7, 3), strict=True):
        cells = hidden(output)
        assert output.self_attention.shape == (STAGES, 2, queries, queries)
        assert output.cross_attention.shape == (STAGES, 2, queries, cells.shape[1])
        torch.testing.assert_close(output.self_attention.sum(-1), torch.ones(STAGES, 2, queries), **CLOSE)
        total = output.cross_attention.sum(-1)
        if kind == "conditional":
            torch.testing.assert_close(total, torch.ones_like(total), **CLOSE)
        else:
            assert (total <= 1 + 1e-5).all() and (total > 0.01).any()
        assert (output.self_attention >= 0).all() and (output.cross_attention >= 0).all()
        assert cells.any() and (output.cross_attention.movedim(2, 3)[:, cells] == 0).all()


@every_kind
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_nothing_else_changes(kind: str, mode: str):
    """Not even the random numbers of dropout."""
    detector = getattr(small_detector(kind, dropout=0.1), mode)()
    memory, outputs = detector.encode(*images()), []
    for asked in (False, True):
        torch.manual_seed(0)
        outputs.append(detector.decode(memory, detector.queries(memory), attention=asked)[0])
    without, output = outputs
    for name in ("logits", "boxes", "queries"):
        torch.testing.assert_close(getattr(without, name), getattr(output, name), atol=1e-6, rtol=0)
    assert without.self_attention is without.cross_attention is None
    # Dropout has no part in the maps.
    torch.testing.assert_close(output.self_attention.sum(-1), torch.ones(STAGES, 2, QUERIES), **CLOSE)


@every_kind
@pytest.mark.parametrize("guests", [(QUERIES,), (7, 3)])
def test_groups_have_the_maps_that_each_has_alone(kind: str, guests: tuple[int, ...]):
    detector = small_detector(kind)
    memory = detector.encode(*images())
    groups = [detector.queries(memory), *(some_queries(detector, memory, count, seed=count) for count in guests)]
    for group, together in zip(groups, detector.decode(memory, *groups, attention=True), strict=True):
        (alone,) = detector.decode(memory, group, attention=True)
        torch.testing.assert_close(together.self_attention, alone.self_attention, **CLOSE)
        torch.testing.assert_close(together.cross_attention, alone.cross_attention, **CLOSE)


@pytest.mark.parametrize("kind", ["deformable", "deformable-refine", "deformable-two-stage"])
def test_deformable_maps_equal_a_loop_over_points(kind: str, monkeypatch: pytest.MonkeyPatch):
    detector = small_detector(kind)
    memory, seen, kernel = detector.encode(*images()), [], attention.sample_and_sum

    def record(value: Tensor, shapes: list, locations: Tensor, weights: Tensor, heads: int) -> Tensor:
        seen.append((locations.detach(), weights.detach() / heads))
        return kernel(value, shapes, locations, weights, heads)

    monkeypatch.setattr(attention, "sample_and_sum", record)
    (output,) = detector.decode(memory, attention=True)
    assert len(seen) == STAGES
    for found, points in zip(output.cross_attention, seen, strict=True):
        torch.testing.assert_close(found.double(), literal(memory.shapes, *points, memory.padding), **CLOSE)


def test_adamixer_maps_equal_a_loop_over_points(monkeypatch: pytest.MonkeyPatch):
    detector = small_detector("adamixer")
    memory, seen, kernel = detector.encode(*images()), [], adamixer.sample_3d

    def record(maps: list[Tensor], strides: list[int], points: Tensor, groups: int) -> Tensor:
        seen.append(points.detach())
        return kernel(maps, strides, points, groups)

    monkeypatch.setattr(adamixer, "sample_3d", record)
    (output,) = detector.decode(memory, attention=True)
    shapes, strides = [tuple(level.shape[-2:]) for level in memory.maps], detector.backbone.strides
    for found, points in zip(output.cross_attention, seen, strict=True):
        levels = [-((points[..., 2] - math.log2(stride)) ** 2) / 2 for stride in strides]
        weights = torch.stack(levels, dim=2).softmax(2) / points.shape[2]  # B Q L P
        extents = [torch.tensor([w * stride, h * stride]) for (h, w), stride in zip(shapes, strides, strict=True)]
        places = torch.stack([points[..., :2] / extent for extent in extents], dim=2)
        wanted = literal(shapes, places[:, :, None], weights[:, :, None], hidden(output))
        torch.testing.assert_close(found.double(), wanted, **CLOSE)


def test_conditional_maps_are_the_scores_of_its_attention(monkeypatch: pytest.MonkeyPatch):
    detector = small_detector("conditional")
    memory, seen, kernel = detector.encode(*images()), [], conditional_detr.attend

    def record(query: Tensor, key: Tensor, value: Tensor, heads: int, visible: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        score = torch.einsum("bqhd,bthd->bhqt", *(x.unflatten(-1, (heads, -1)) for x in (query, key)))
        score = score / math.sqrt(query.shape[-1] // heads)
        seen.append((score if visible is None else score.masked_fill(~visible, -math.inf)).softmax(-1).mean(1))
        return kernel(query, key, value, heads, visible, dropout)

    monkeypatch.setattr(conditional_detr, "attend", record)
    (output,) = detector.decode(memory, attention=True)
    torch.testing.assert_close(output.self_attention, torch.stack(seen[::2]), **CLOSE)
    torch.testing.assert_close(output.cross_attention, torch.stack(seen[1::2]), **CLOSE)


@pytest.mark.parametrize("kind", ["deformable", "adamixer"])
def test_self_attention_is_what_the_layers_would_report(kind: str):
    detector, seen = small_detector(kind), []
    memory = detector.encode(*images())
    layers = [layer.self_attn for layer in detector.decoder] if kind == "deformable" else [stage.attention for stage in detector.stages]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, inputs, options: seen.append((inputs, options)), with_kwargs=True)
    (output,) = detector.decode(memory, attention=True)
    reports = [layer.forward(*inputs, **options | {"need_weights": True})[1] for layer, (inputs, options) in zip(layers, seen, strict=True)]
    torch.testing.assert_close(output.self_attention, torch.stack(reports), **CLOSE)


@every_kind
def test_gradient_flows(kind: str):
    detector, (output,) = asked(kind)
    names = {
        "conditional": ("ca_qcontent_proj", "ca_kcontent_proj", "sa_qpos_proj"),
        "adamixer": ("sampling_offset_generator", "attention.in_proj_weight"),
    }.get(kind, ("decoder.1.cross_attn.sampling_offsets", "decoder.1.cross_attn.attention_weights", "decoder.1.self_attn.in_proj_weight"))
    for field in (output.self_attention, output.cross_attention):
        field.square().sum().backward(retain_graph=True)
    for part in names:
        gradients = [p.grad for name, p in detector.named_parameters() if part in name and "bias" not in name]
        assert gradients and all(gradient.isfinite().all() and gradient.any() for gradient in gradients), part


@every_kind
def test_maps_are_in_full_precision_for_the_losses(kind: str):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, (rough,) = asked(kind)
    output = full_precision(rough)
    assert output.self_attention.dtype == output.cross_attention.dtype == torch.float32
    torch.testing.assert_close(output.self_attention.sum(-1), torch.ones(STAGES, 2, QUERIES), atol=0.02, rtol=0)


def test_stages_are_chosen_with_their_maps():
    output = some_output(stages=3)
    chosen = output.at([2, 0, 0])
    for name in ("logits", "boxes", "queries", "self_attention", "cross_attention"):
        torch.testing.assert_close(getattr(chosen, name), getattr(output, name)[[2, 0, 0]])
    assert DetectorOutput(output.logits, output.boxes, output.queries, [], []).at([1]).cross_attention is None

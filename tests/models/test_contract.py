"""What losses and evaluation may rely on, whichever the detector."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import detrdistill.distill
from detrdistill.distill.build import build_distiller
from detrdistill.models import (
    AdaMixer,
    ConditionalDETR,
    DeformableDETR,
    DetectorOutput,
    Queries,
    Targets,
    adamixer,
    attention,
    build_detector,
    conditional_detr,
)
from detrdistill.models.attention import level_padding
from detrdistill.recipes.methods import DETRDistill
from tests.models.small import CLASSES, DIM, KINDS, QUERIES, STAGES, batch, randomise, small_detector, small_recipe

CLOSE = {"atol": 2e-5, "rtol": 0}  # products of other sizes round otherwise
every_kind = pytest.mark.parametrize("kind", KINDS)


def assert_same(a: DetectorOutput, b: DetectorOutput, part=...) -> None:
    """`part` of the first is the second."""
    for name in ("logits", "boxes", "queries"):
        torch.testing.assert_close(getattr(a, name)[part], getattr(b, name), **CLOSE)


def some_queries(detector: nn.Module, memory: object, count: int, seed: int) -> Queries:
    """Queries of the detector's own form that it has never seen."""
    random = torch.Generator().manual_seed(seed)
    own = detector.queries(memory)
    draw = lambda like: None if like is None else torch.randn(1, count, like.shape[-1], generator=random).to(like.dtype)  # noqa: E731
    reference = draw(own.reference)
    # Two-stage queries are boxes; AdaMixer's must have a positive size.
    return Queries(draw(own.content), draw(own.position), reference.sigmoid() if isinstance(detector, AdaMixer) else reference)


@every_kind
def test_shapes(kind: str) -> None:
    detector = small_detector(kind)
    pixels, padding = batch((64, 96), (96, 50))
    memory = detector.encode(pixels, padding)
    own, guest = detector.queries(memory), some_queries(detector, memory, 7, seed=1)
    first, second = detector.decode(memory, own, guest)
    for output, queries in ((first, own), (second, guest)):
        assert output.logits.shape == (STAGES, 2, len(queries), CLASSES)
        assert output.boxes.shape == (STAGES, 2, len(queries), 4)
        assert output.queries.shape == (STAGES, 2, len(queries), DIM)
        assert output.initial is queries
        assert len(output.features) == len(output.padding) > 0
        for level, mask in zip(output.features, output.padding, strict=True):
            assert level.shape[:2] == (2, DIM) and mask.shape == (2, *level.shape[2:])
            assert mask[1].any() and not mask[1].all()
    assert len(own) == QUERIES and detector.top == (QUERIES if isinstance(detector, AdaMixer) else 100)
    assert (own.position is not None) == detector.query_position


@every_kind
def test_without_groups_the_own_queries_are_decoded(kind: str) -> None:
    detector = small_detector(kind)
    memory = detector.encode(*batch((64, 64)))
    (output,) = detector.decode(memory)
    assert_same(output, *detector.decode(memory, detector.queries(memory)))


@every_kind
def test_images_do_not_see_each_other(kind: str) -> None:
    detector = small_detector(kind)
    pixels, padding = batch((64, 96), (64, 96), (64, 96))
    (together,) = detector.decode(detector.encode(pixels, padding))
    for i in range(3):
        (alone,) = detector.decode(detector.encode(pixels[i : i + 1], padding[i : i + 1]))
        assert_same(together, alone, part=(slice(None), slice(i, i + 1)))


@every_kind
def test_padding_takes_no_part(kind: str) -> None:
    """More padding changes nothing from the feature maps on.

    Two parts of the official networks do see padding and are kept equal to them: convolutions, at the border of an image, and
    GroupNorm, whose statistics count it. The test starts behind the one and takes out the other. AdaMixer knows no mask but samples
    zeros outside of its maps, so here its maps are padded with zeros, the others' with noise.
    """
    detector = small_detector(kind)
    for module in list(detector.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    noise = 1.0
    if isinstance(detector, AdaMixer):
        noise = 0.0
        for conv in detector.neck.lateral_convs:
            nn.init.zeros_(conv.bias)
    pixels, padding = batch((64, 96))
    maps = detector.backbone(pixels)
    (tight,) = detector.decode(detector.encode_features(maps, padding))
    rows, columns = 2, 3  # cells of the coarsest map
    wide_maps = []
    for level in maps:
        scale = level.shape[-2] // maps[-1].shape[-2]
        wide = noise * torch.randn(1, level.shape[1], level.shape[2] + rows * scale, level.shape[3] + columns * scale)
        wide[:, :, : level.shape[2], : level.shape[3]] = level
        wide_maps.append(wide)
    wide_padding = torch.ones(1, 64 + rows * 32, 96 + columns * 32, dtype=torch.bool)
    wide_padding[:, :64, :96] = False
    (loose,) = detector.decode(detector.encode_features(wide_maps, wide_padding))
    assert_same(tight, loose)


@every_kind
@pytest.mark.parametrize("sizes", [(QUERIES,), (7,), (QUERIES, QUERIES), (3, 7, 9)])
def test_groups_do_not_see_each_other(kind: str, sizes: tuple[int, ...]) -> None:
    detector = small_detector(kind)
    memory = detector.encode(*batch((64, 96), (96, 50)))
    groups = [detector.queries(memory), *(some_queries(detector, memory, size, seed=i) for i, size in enumerate(sizes))]
    alone = [detector.decode(memory, group)[0] for group in groups]
    for order in (range(len(groups)), reversed(range(len(groups)))):
        order = list(order)
        for i, output in zip(order, detector.decode(memory, *(groups[i] for i in order)), strict=True):
            assert_same(output, alone[i])


@every_kind
def test_order_of_queries_does_not_matter(kind: str) -> None:
    detector = small_detector(kind).double()
    pixels, padding = batch((64, 96))
    memory = detector.encode(pixels.double(), padding)
    queries = some_queries(detector, memory, 6, seed=3)
    shuffle = torch.tensor([3, 0, 5, 1, 4, 2])
    parts = {name: value[:, shuffle] for name in ("content", "position", "reference") if (value := getattr(queries, name)) is not None}
    straight, shuffled = detector.decode(memory, queries, replace(queries, **parts))
    assert_same(straight, shuffled, part=(slice(None), slice(None), shuffle))


def teach(kind: str, both: dict | None = None, **teacher_changes) -> tuple[nn.Module, dict[str, Tensor]]:
    """One training step under DETRDistill, without the optimizer: the distiller with its gradients, and the losses.

    Args:
        both: what the recipes of teacher and student have in common beside `kind`.
    """
    both = both or {}
    teacher_recipe = small_recipe(kind, **both, **teacher_changes)
    recipe = small_recipe(kind, methods=(DETRDistill(),), teacher=teacher_recipe, **both)
    teacher, student = build_detector(teacher_recipe, CLASSES).eval(), build_detector(recipe, CLASSES)
    randomise(teacher, seed=1)
    randomise(student, seed=2)
    distiller = build_distiller(student, recipe).train()
    targets = Targets.pack(
        [torch.tensor([0, 2]), torch.tensor([1])], [torch.tensor([[0.3, 0.4, 0.2, 0.2], [0.6, 0.6, 0.5, 0.3]]), torch.full((1, 4), 0.5)]
    )
    pixels, padding = batch((64, 96), (96, 50))
    losses = distiller(pixels, padding, targets, distiller.teacher_outputs(teacher, pixels, padding))
    torch.stack([value.sum() for value in losses.values()]).sum().backward()
    return distiller, losses


@every_kind
@pytest.mark.parametrize(
    "difference",
    [{}, {"queries": 9}, {"dim": 64, "heads": 8, "ffn": 48}, {"backbone.width": 16, "seed": 5}],
    ids=["equal", "queries", "width", "backbone"],
)
def test_a_training_step_under_detrdistill(kind: str, difference: dict) -> None:
    distiller, losses = teach(kind, **difference)
    assert {name.split("/")[0] for name in losses} == {"detection", "logits", "features", "assignment"}
    assert all(value.isfinite().all() for value in losses.values())
    for name, parameter in distiller.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@every_kind
def test_teacher_of_another_depth_lends_its_queries(kind: str) -> None:
    changes = {"decoder_layers": 4, "queries": 9} | ({} if kind == "adamixer" else {"encoder_layers": 2})
    teacher, student = small_detector(kind, seed=1, **changes), small_detector(kind, seed=2)
    images = batch((64, 96), (96, 50))
    (seen,) = teacher.decode(teacher.encode(*images))
    guests = replace(seen.initial, proposals=None)
    memory = student.encode(*images)
    own, visiting = student.decode(memory, student.queries(memory), guests)
    assert visiting.logits.shape == (STAGES, 2, 9, CLASSES) and visiting.initial is guests
    assert_same(own, *student.decode(memory))


def test_no_family_is_named_in_distill() -> None:
    text = " ".join(path.read_text(encoding="utf-8") for path in Path(detrdistill.distill.__file__).parent.rglob("*.py"))
    assert not [name for name in ("deformable_detr", "conditional_detr", "adamixer", "AdaMixer", "isinstance(student") if name in text]


def test_conditional_reference_is_the_teachers_or_the_own_with_gradient() -> None:
    student = small_detector("conditional")
    memory = student.encode(*batch((64, 64)))
    own = student.queries(memory)
    reference = torch.tensor([[[-1.0, 2.0]]]).expand(1, QUERIES, 2)
    output, moved = student.decode(memory, own, replace(own, reference=reference))
    assert not torch.allclose(output.boxes, moved.boxes, atol=1e-2)
    for layer in (output.boxes[0].sum(), output.logits[-1].sum()):
        (gradient,) = torch.autograd.grad(layer, student.ref_point_head.layers[0].weight, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_conditional_temperature_is_that_of_tokens_and_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("sine_code", "sine_position"):
        whole = getattr(conditional_detr, name)
        monkeypatch.setattr(conditional_detr, name, lambda *words, whole=whole: (found.append(words[-1]), whole(*words))[1])
    detector = small_detector("conditional", temperature=20)
    detector.decode(detector.encode(*batch((64, 96), (96, 50))))
    assert found == [20, 20]
    values = torch.tensor([0.3, 2.0])
    expected = torch.stack([trace(values / 20**power) for power in (0, 0.5) for trace in (torch.sin, torch.cos)], dim=-1)
    torch.testing.assert_close(attention.sine_code(values, 4, 20.0), expected)


def test_adamixer_starts_from_the_whole_image_and_may_leave_it() -> None:
    detector = build_detector(small_recipe("adamixer"), CLASSES).eval()
    memory = detector.encode(*batch((64, 96), (96, 50)))
    assert memory.sizes[:, 0].tolist() == [[96, 64, 96, 64], [50, 96, 50, 96]]
    (output,) = detector.decode(memory)
    # Fresh heads do not move boxes.
    torch.testing.assert_close(output.boxes, torch.tensor([0.5, 0.5, 1.0, 1.0]).expand_as(output.boxes))
    nn.init.constant_(detector.stages[0].fc_reg.bias, 1.0)
    (moved,) = detector.decode(memory)
    assert (moved.boxes[..., :2] > 1).all()


@pytest.mark.parametrize("kind, family", [("conditional", ConditionalDETR), ("deformable", DeformableDETR), ("adamixer", AdaMixer)])
def test_build_is_a_function_of_the_seed(kind: str, family: type) -> None:
    first, again, other = (build_detector(small_recipe(kind, seed=seed), CLASSES) for seed in (0, 0, 1))
    assert isinstance(first, family)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    copied = copy.deepcopy(first)
    torch.manual_seed(0)
    copied.reset_parameters()
    assert {name for name, value in copied.named_parameters() if value.isnan().any()} == set()


# What makes positions and boxes of states.
GEOMETRY = ("sampling_offsets", "sampling_offset_generator", "ref_point_head", "reference_points", "bbox_embed", "reg_fcs", "fc_reg")


@every_kind
def test_geometry_stays_in_float32_under_autocast(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = small_detector(kind)
    layers = {name: part for name, part in detector.named_modules() if isinstance(part, nn.Linear)}
    geometry = [name for name in layers if set(GEOMETRY) & {*name.split(".")}]
    projections = [name for name in layers if name.endswith(("value_proj", "linear1", "fc_cls")) or name.startswith("class_embed")]
    kinds, sampled = {}, []
    for name in geometry + projections:
        layers[name].register_forward_hook(lambda _, inputs, result, name=name: kinds.update({name: (inputs[0].dtype, result.dtype)}))
    module, name = (adamixer, "sample_3d") if kind == "adamixer" else (attention, "sample_and_sum")
    kernel = getattr(module, name)

    def record(*arguments: object) -> Tensor:
        result = kernel(*arguments)
        sampled.extend([result.dtype, *(x.dtype for x in arguments if isinstance(x, Tensor))])
        return result

    monkeypatch.setattr(module, name, record)
    images = batch((64, 96), (96, 50))
    (exact,) = detector.decode(detector.encode(*images))
    assert set(kinds.values()) == {(torch.float32, torch.float32)}
    kinds.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        memory = detector.encode(*images)
        own = detector.queries(memory)
        # The exact pass's queries: the two-stage choice may tip.
        first, rough = detector.decode(memory, own, replace(exact.initial, proposals=None))
    assert kinds.keys() == {*geometry, *projections}
    assert {kinds[name] for name in geometry} == {(torch.float32, torch.float32)}
    assert {kinds[name][1] for name in projections} == {torch.bfloat16}
    assert set(sampled) == (set() if kind == "conditional" else {torch.float32})
    assert own.reference.dtype == first.boxes.dtype == rough.boxes.dtype == torch.float32
    if own.proposals is not None:
        assert own.proposals.boxes.dtype == torch.float32
    off = (rough.boxes - exact.boxes).abs()
    # Random weights multiply an AdaMixer's boxes to several times the image.
    assert off.mean() < 0.03 if kind == "adamixer" else off.max() < 0.01

    loss = first.boxes.sum()
    if own.proposals is not None:
        loss = loss + own.proposals.boxes.sum()
    loss.backward()
    for name in geometry:
        gradient = layers[name].weight.grad
        assert gradient.isfinite().all() and gradient.any(), name


@pytest.mark.parametrize("dtype, found", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_exact_raises_to_float32_and_leaves_float64_alone(dtype: torch.dtype, found: torch.dtype) -> None:
    layer = nn.Linear(3, 2, dtype=found)
    x = torch.randn(4, 3).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = attention.exact(layer, x)
    assert result.dtype == found and torch.equal(result, layer(x.to(found)))


@pytest.mark.parametrize(
    "kind, changes, still",
    [
        ("deformable", {"levels": 2}, "backbone.body.layer4."),
        ("deformable", {"levels": 1}, None),
        ("deformable-refine", {"levels": 2}, "backbone.body.layer4."),
        ("conditional", {"decoder_layers": 1}, "query_scale."),
    ],
)
def test_what_takes_no_part_asks_for_no_gradient(kind: str, changes: dict, still: str | None) -> None:
    """DDP would wait for it."""
    distiller, _ = teach(kind, changes)
    for name, parameter in distiller.named_parameters():
        unused = bool(still) and name.startswith(f"student.{still}")
        assert parameter.requires_grad != unused and (parameter.grad is None) == unused, name


def test_padding_on_a_level_is_that_of_the_nearest_pixel() -> None:
    """As torch's `interpolate` has it, which the official codes call, for every size of an image and stride of a level."""
    for pixels in (*range(1, 200), *range(481, 1334, 7)):
        for cells in {-(-pixels // stride) for stride in (4, 8, 16, 32, 64, 128)}:
            padding = torch.arange(pixels)[None, :, None] % 3 == 0
            expected = F.interpolate(padding[:, None].float(), size=(cells, 1))[:, 0].bool()
            assert torch.equal(level_padding(padding, (cells, 1)), expected), (pixels, cells)

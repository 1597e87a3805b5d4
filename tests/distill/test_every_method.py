"""What must hold for every method, with real detectors: each method alone, and all of them together."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from detrdistill.distill.build import build_distiller
from detrdistill.distill.distiller import Distiller
from detrdistill.models import build_detector
from detrdistill.models.outputs import Targets
from detrdistill.recipes.methods import D3ETR, FGD, KDDETR, METHODS, MGD, DETRDistill, FitNet, Method
from tests.examples import some_targets
from tests.models.small import CLASSES, KINDS, QUERIES, batch, randomise, small_detector, small_recipe

EVERY = {name: method() for name, method in METHODS.items()} | {
    "detrdistill-released": DETRDistill(variant="released"),
    "detrdistill-switched": DETRDistill(matching="positives", mask="query", maps="neck", mask_queries="initial", normaliser="pairs"),
    "detrdistill-boxes": DETRDistill(mask="boxes", pairing="student", stages="last_only"),
    "kd_detr-tprd": KDDETR(form="tprd", general_queries=3),
}
OTHER_SIZES = {"queries": {"queries": 9}, "width": {"dim": 64, "heads": 8, "ffn": 48}, "depth": {"decoder_layers": 4}}
PARTS = {
    "detrdistill": {"logits", "features", "assignment"}, "detrdistill-released": {"logits", "features", "assignment"},
    "detrdistill-switched": {"logits", "features", "assignment"}, "detrdistill-boxes": {"logits", "features", "assignment"},
    "kd_detr": {"kd_detr"}, "kd_detr-tprd": {"kd_detr"}, "d3etr": {"d3etr"},
} | {name: {name} for name in ("fitnet", "fgd", "mgd", "fkd", "fgfi", "pkd", "cwd")}  # fmt: skip
every_method = pytest.mark.parametrize("name", EVERY)
every_kind = pytest.mark.parametrize("kind", KINDS)


def fitting(name: str, kind: str) -> Method:
    """A two-stage detector makes no reference points of its own."""
    method = EVERY[name]
    return method.replace(references="teacher") if kind == "deformable-two-stage" and name == "detrdistill-released" else method


def lesson(kind: str, methods: Sequence[Method], **teacher_changes) -> tuple[Distiller, nn.Module]:
    """A student under the methods, and its teacher."""
    teacher = small_recipe(kind, seed=1, **teacher_changes)
    recipe = small_recipe(kind, methods=tuple(methods), teacher=teacher)
    student = small_detector(kind, seed=2)
    torch.manual_seed(0)
    distiller = build_distiller(student, recipe)
    randomise(distiller.losses, seed=3)  # blocks that officially start at zero
    return distiller, small_detector(kind, seed=1, **teacher_changes)


def targets(*counts: int) -> Targets:
    found = some_targets(*counts, classes=CLASSES)
    return replace(found, boxes=found.boxes.float())


def losses(distiller: Distiller, teacher: nn.Module, wanted: Targets, images: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
    images = images or batch((64, 96), (96, 50))
    torch.manual_seed(4)  # hidden cells, random queries
    return distiller(*images, wanted, distiller.teacher_outputs(teacher, *images))


def total(found: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.sum() for value in found.values()]).sum()


def close(found: Tensor, wanted: Tensor, part: str) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4, msg=lambda text: f"{part}: {text}")


@every_kind
@every_method
def test_one_step(name, kind):
    """Every method on every detector: its parts are there, and student and adapters get a gradient, the teacher none."""
    distiller, teacher = lesson(kind, [fitting(name, kind)])
    distiller.train()
    found = losses(distiller, teacher, targets(2, 1))
    assert {part.split("/")[0] for part in found} == {"detection"} | PARTS[name]
    assert all(value.isfinite().all() for value in found.values())
    before = {key: value.clone() for key, value in distiller.state_dict().items()}
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3, weight_decay=0)
    total(found).backward()
    for key, parameter in distiller.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    optimizer.step()
    moved = {key: bool((value != before[f"student.{key}"]).any()) for key, value in distiller.student.named_parameters()}
    # Softmax does not feel the bias of keys, and the first content of Conditional DETR's queries is 0.
    assert all(moved[key] for key in moved if not key.endswith("bias") and not key.startswith("decoder.0.sa_"))
    assert all(parameter.grad is None for parameter in teacher.parameters()) and not teacher.training


@pytest.mark.parametrize("kind", ["deformable-refine", "conditional", "adamixer"])
@every_method
@pytest.mark.parametrize(
    "changes", [{"queries": 9}, {"dim": 64, "heads": 8, "ffn": 48}, {"decoder_layers": 4}], ids=["queries", "width", "depth"]
)
def test_a_teacher_with_other_sizes(name, kind, changes):
    distiller, teacher = lesson(kind, [EVERY[name]], **changes)
    found = losses(distiller, teacher, targets(2, 1))
    assert all(value.isfinite().all() for value in found.values())
    total(found).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in distiller.parameters())


@every_method
@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (QUERIES + 4, QUERIES + 2)])
def test_no_objects_and_more_objects_than_queries(name, counts):
    distiller, teacher = lesson("deformable-refine", [EVERY[name]])
    found = losses(distiller, teacher, targets(*counts))
    assert all(value.isfinite().all() for value in found.values())
    total(found).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in distiller.parameters())


@every_method
def test_order_of_student_queries_does_not_matter(name):
    distiller, teacher = lesson("deformable-refine", [EVERY[name]])
    before = losses(distiller, teacher, targets(2, 1))
    with torch.no_grad():
        embedding = distiller.student.query_embed.weight
        embedding.copy_(embedding[torch.randperm(QUERIES)])
    for part, value in losses(distiller, teacher, targets(2, 1)).items():
        close(value, before[part], part)


@every_method
def test_padding_more_changes_nothing(name):
    """From the backbone's maps on; MGD hides nothing here, since what it hides is drawn for each cell of the map."""
    method = EVERY[name].replace(masked=0.0) if isinstance(EVERY[name], MGD) else EVERY[name]
    distiller, teacher = lesson("deformable-refine", [method])
    channels = distiller.student.backbone.channels
    random = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, c, *g, generator=random) for c, g in zip(channels, ((8, 8), (4, 4), (2, 2)), strict=True)]
    larger = [nn.functional.pad(level, (0, s, 0, s), value=3.0) for level, s in zip(maps, (8, 4, 2), strict=True)]
    for model in (distiller.student, teacher):
        for projection in model.input_proj:
            projection[1] = nn.Identity()  # GroupNorm counts padding, as in the official code

    def found(features: list[Tensor], size: int) -> dict[str, Tensor]:
        padding = torch.ones(2, size, size, dtype=torch.bool)
        padding[:, :64, :64] = False
        for model in (distiller.student, teacher):
            model.backbone.forward = lambda _: features
        return losses(distiller, teacher, targets(2, 1), (torch.zeros(2, 3, size, size), padding))

    padded = found(larger, 128)
    for part, value in found(maps, 64).items():
        close(padded[part], value, part)


# Their norms, statistics, or pairs span the batch they are given; what holds for them is tested with them.
OF_A_BATCH = {"fkd", "fgfi", "pkd", "kd_detr", "detrdistill-released"}
RANDOM = {"mgd", "kd_detr-tprd"}  # draws anew for each micro-batch


@pytest.mark.parametrize("name", sorted(EVERY.keys() - OF_A_BATCH - RANDOM))
def test_micro_batches_add_up(name):
    distiller, teacher = lesson("conditional", [EVERY[name]])  # without GroupNorm, which sees what a batch pads
    images, wanted = batch((64, 64), (64, 64)), targets(2, 1)
    together = losses(distiller, teacher, wanted, images)
    apart = []
    for i, count in enumerate(wanted.counts):
        one = replace(wanted, labels=wanted.labels[i, None, :count], boxes=wanted.boxes[i, None, :count], counts=[count])
        apart.append(losses(distiller, teacher, one, tuple(x[i, None] for x in images)))
    for part, value in together.items():
        close(apart[0][part] + apart[1][part], value, part)


def test_methods_combine_by_listing_them():
    listed = [DETRDistill(), FGD(), FitNet(maps="features"), KDDETR(), D3ETR()]
    distiller, teacher = lesson("deformable-refine", listed)
    found = losses(distiller, teacher, targets(2, 1))
    for method in listed:
        alone, _ = lesson("deformable-refine", [method])
        alone.load_state_dict(distiller.state_dict(), strict=False)
        for part, value in losses(alone, teacher, targets(2, 1)).items():
            if not part.startswith("kd_detr/general"):  # further losses draw further random numbers
                torch.testing.assert_close(found[part], value, atol=1e-4, rtol=1e-4)


def test_weights_scale_their_parts_and_0_leaves_them_out():
    cases = {
        FitNet: ("weight", "fitnet"), FGD: ("foreground", "fgd/foreground"), KDDETR: ("specific", "kd_detr/specific"),
        D3ETR: ("fixed", "d3etr/fixed"), DETRDistill: ("assignment", "assignment"),
    }  # fmt: skip
    for method, (field, prefix) in cases.items():
        plain = method()
        once = losses(*lesson("deformable-refine", [plain]), targets(2, 1))
        twice = losses(*lesson("deformable-refine", [plain.replace(**{field: 2 * getattr(plain, field)})]), targets(2, 1))
        none = losses(*lesson("deformable-refine", [plain.replace(**{field: 0})]), targets(2, 1))
        scaled = [part for part in once if part.startswith(prefix)]
        assert scaled and all(torch.allclose(twice[part], 2 * once[part], rtol=1e-4) for part in scaled)
        assert all(torch.allclose(twice[part], once[part], rtol=1e-4) for part in once if part not in scaled)
        assert not [part for part in none if part.startswith(prefix) and none[part].abs().sum() > 0]


@every_kind
def test_a_student_under_every_method_is_the_student(kind):
    """What is saved and exported knows nothing of teachers and losses."""
    distiller, _ = lesson(kind, [fitting(name, kind) for name in METHODS])
    assert distiller.student.state_dict().keys() == build_detector(small_recipe(kind), CLASSES).state_dict().keys()


@pytest.mark.parametrize("kind", ["deformable-two-stage", "conditional", "adamixer"])
@every_method
def test_under_autocast(name, kind):
    """Maps and queries may be lowered on the way; costs and losses are of full precision, and near those without."""
    distiller, teacher = lesson(kind, [fitting(name, kind)])
    wanted = losses(distiller, teacher, targets(2, 1))
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(distiller, teacher, targets(2, 1))
    assert found.keys() == wanted.keys() and {value.dtype for value in found.values()} == {torch.float32}
    total(found).backward()
    assert all(value.isfinite().all() for value in found.values())
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in distiller.parameters())

"""Detectors of transformers through the adapter: number by number what their own forward passes give, and each trap that lies between."""

import csv
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection

from detrdistill.any_detr.adapter import AnyDETR, against_all_others
from detrdistill.any_detr.build import initialise
from detrdistill.checkpoints.hugging_face import export_hugging_face
from detrdistill.errors import InputError
from detrdistill.models.outputs import Targets
from detrdistill.models.weights import fit, read_weights, save_weights
from detrdistill.recipes.families import FAMILIES
from detrdistill.recipes.parts import Resize
from tests.any_detr import checks
from tests.any_detr.checks import CHECKS, PADDED, WHOLE, adapted, freeze_norms, largest, rounded, some_targets
from tests.any_detr.tiny import CONFIGS, LAYERS, SIDE, tiny
from tests.models.small import batch

every_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def measured(family: str, check: str) -> float:
    return CHECKS[check][1](family)


@every_family
@pytest.mark.parametrize("check", CHECKS)
def test_equal_to_the_model_itself(family: str, check: str) -> None:
    assert measured(family, check) <= CHECKS[check][2]


ROUNDED = dict.fromkeys(CHECKS, 0.0) | {"own_loss": 1e-6}


def test_the_table_of_differences_is_what_is_found_now() -> None:
    """Rounding differs a little between machines; where nothing differs, nothing may, but for a loss, whose sum may round once."""
    with checks.TABLE.open(encoding="utf-8") as file:
        rows = {row.pop("family"): row for row in csv.DictReader(file)}
    assert list(rows) == list(FAMILIES) and {tuple(row) for row in rows.values()} == {tuple(CHECKS)}
    worse = {
        (family, check): (said, rounded(found))
        for family, row in rows.items()
        for check, said in row.items()
        if (found := measured(family, check)) > 10 * float(said) + ROUNDED[check] or (not ROUNDED[check] and (found == 0) != (said == "0"))
    }
    assert not worse, "said, found: write it again with python -m tests.any_detr.checks, then make prose"


def gradient(detector: AnyDETR, images: tuple[Tensor, Tensor], targets: Targets) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parts of the own loss, and the gradient of the sum of those that are sums over images."""
    (found,) = detector.decode(detector.encode(*images, targets))
    parts = detector.own_loss(found, targets, {})
    sums = {name: value for name, value in parts.items() if not name.startswith(detector.family.averaged or "none")}
    named = {name: p for name, p in detector.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(sum(sums.values()), list(named.values()), allow_unused=True)
    return sums, {name: value for name, value in zip(named, found, strict=True) if value is not None}


@every_family
def test_micro_batches_of_unequal_counts_add_up(family: str) -> None:
    """Without denoising, whose groups are as many as the fullest image of a batch admits.

    Laid out as the trainer does: torch 2.15 on a CPU gives BatchNorm a wrong gradient for one image whose maps become tokens, if not.
    """
    detector = deepcopy(adapted(family)).train().to(memory_format=torch.channels_last)
    freeze_norms(detector)
    detector.model.config.num_denoising = 0
    detector.model.config.use_dense_one_to_one = False  # DEIMv2's, which divides by the pairs of all stages together
    (pixels, padding), targets = batch(*WHOLE), some_targets(3, 1)
    images = pixels.contiguous(memory_format=torch.channels_last), padding
    sums, together = gradient(detector, images, targets)
    apart = []
    for i, count in enumerate(targets.counts):
        one = replace(targets, labels=targets.labels[i, None, :count], boxes=targets.boxes[i, None, :count], counts=[count])
        apart.append(gradient(detector, tuple(x[i, None] for x in images), one))
    for name, value in sums.items():
        torch.testing.assert_close(apart[0][0][name] + apart[1][0][name], value, rtol=1e-4, atol=1e-5)
    scale = max(value.abs().max() for value in together.values())
    for name, value in together.items():
        torch.testing.assert_close(apart[0][1][name] + apart[1][1][name], value, rtol=1e-3, atol=5e-5 * float(scale), msg=name)


@every_family
@pytest.mark.parametrize("counts", [(2, 1), (0, 0)])
def test_every_parameter_that_trains_has_a_gradient(family: str, counts: tuple[int, int]) -> None:
    """Also on a batch without objects, which has no denoising queries: DDP would wait for it in vain."""
    detector, targets = deepcopy(adapted(family)).train(), some_targets(*counts)
    (found,) = detector.decode(detector.encode(*batch(*WHOLE), targets))
    sum(detector.own_loss(found, targets, {}).values()).backward()
    trained = {name: p for name, p in detector.named_parameters() if p.requires_grad}
    assert trained and not [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]


@every_family
def test_all_stages_are_told_in_evaluation_and_the_model_is_left_as_it_was(family: str) -> None:
    """D-FINE's and DEIMv2's decoders tell of the last alone."""
    detector = adapted(family)
    before = detector.model.config.to_dict()
    memory = detector.encode(*batch(*WHOLE))
    (found,) = detector.decode(memory, detector.queries(memory))
    assert len(found.logits) == len(found.boxes) == len(found.queries) == LAYERS
    assert not any(module.training for module in detector.modules()) and detector.model.config.to_dict() == before
    assert found.own is None and "_loss_function" not in vars(detector.model)


def test_detr_trained_with_auxiliary_losses_is_still_decoded_as_its_own_forward_does() -> None:
    """It then feeds normalised states from layer to layer, and normalises the last one twice."""
    detector = AnyDETR(tiny("detr", auxiliary_loss=True), FAMILIES["detr"])
    images = batch(*WHOLE)
    with torch.no_grad():
        (found,) = detector.decode(detector.encode(*images))
        wanted, plain = detector.model(images[0]), adapted("detr").model(images[0])
    assert largest((found.logits[-1], checks.as_classes_alone(wanted.logits, "detr")), (found.boxes[-1], wanted.pred_boxes)) <= 1e-5
    assert largest((wanted.logits, plain.logits)) > 1e-3, "the switch makes another function"


@pytest.mark.parametrize("family", [name for name, facts in FAMILIES.items() if facts.padded])
def test_boxes_are_relative_to_the_image_without_padding(family: str) -> None:
    detector, (pixels, padding) = adapted(family), batch(*PADDED)
    with torch.no_grad():
        (found,) = detector.decode(detector.encode(pixels, padding))
        theirs = detector.model(pixels).pred_boxes
    of_padded = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([0.5, 0.75, 0.5, 0.75])
    for image, part in enumerate(of_padded):
        assert largest((found.boxes[-1][image] * part, theirs[image])) <= 1e-6


@pytest.mark.parametrize("family", [name for name in FAMILIES if adapted(name).sides > 1])
def test_sides_that_do_not_divide_are_one_line(family: str) -> None:
    """What is said to divide does, also where the sides differ."""
    detector = adapted(family)
    assert detector.sides == 32
    with pytest.raises(
        InputError, match=f"^{FAMILIES[family].title}: images of 64 x 80 pixels; both sides must be multiples of 32: "
    ) as no:
        detector.encode(*batch((64, 80)))
    assert "\n" not in str(no.value)
    with torch.no_grad():
        (found,) = detector.decode(detector.encode(*batch((64, 96))))
    assert found.boxes.isfinite().all()


def test_windows_of_published_backbones() -> None:
    """RF-DETR counts windows a side, LW-DETR those of an image: 640 pixels, its published size, are 10 x 64."""
    assert FAMILIES["rf_detr"].sides_of({}) == FAMILIES["rf_detr"].sides_of(AutoConfig.for_model("rf_detr").to_dict()) == 56
    assert FAMILIES["lw_detr"].sides_of({}) == FAMILIES["lw_detr"].sides_of(AutoConfig.for_model("lw_detr").to_dict()) == 64


@every_family
def test_signals_survive_the_first_weights(family: str) -> None:
    """From a configuration alone, the maps of two images differ by nothing in the RT family: transformers draws all weights at 0.01."""

    def difference() -> float:
        with torch.no_grad():
            first, second = (detector.decode(detector.encode(*batch(*WHOLE, seed=seed)))[0] for seed in (0, 1))
        return min(float((a - b).std()) for a, b in zip(first.features, second.features, strict=True))

    config = {key: value for key, value in CONFIGS[family].items() if key != "initializer_range"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForObjectDetection.from_config(AutoConfig.for_model(FAMILIES[family].model_type, **config)).eval()
        detector = AnyDETR(model, FAMILIES[family]).eval()
        before = difference()
        initialise(model, FAMILIES[family])
    assert 0.1 < difference() < 30
    assert before < 1e-9 or FAMILIES[family].queries != "logits"


@every_family
def test_weights_come_back_bit_by_bit(family: str, tmp_path: Path) -> None:
    """Tied heads too, which safetensors refuses to write twice."""
    detector, other = adapted(family), AnyDETR(tiny(family, seed=1), FAMILIES[family])
    save_weights(tmp_path / "weights.safetensors", detector, {})
    state, _ = read_weights(tmp_path / "weights.safetensors")
    fit(other, state, "weights", "")
    own = detector.state_dict()
    assert state.keys() == own.keys() and all(torch.equal(state[name], value) for name, value in own.items())
    assert all(torch.equal(value, own[name]) for name, value in other.state_dict().items())


@every_family
def test_what_is_exported_finds_the_same_in_transformers(family: str, tmp_path: Path) -> None:
    """Opened there with weights, names and image processor, on an image of 0 to 255."""
    detector, names = adapted(family), ["cat", "dog", "owl"]
    resize = Resize(short=SIDE, long=SIDE, stretch=True, mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 0.25))
    folder = export_hugging_face(deepcopy(detector), tmp_path / "folder", names, resize)
    theirs, processor = AutoModelForObjectDetection.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    image = torch.randint(256, (3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prepared = processor(images=image, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    pixels = (image / 255 - torch.tensor(resize.mean)[:, None, None]) / torch.tensor(resize.std)[:, None, None]
    assert largest((prepared, pixels[None])) <= 1e-5
    with torch.no_grad():
        wanted = theirs(prepared)
        (found,) = detector.decode(detector.encode(pixels[None], torch.zeros(1, SIDE, SIDE, dtype=torch.bool)))
    logits = checks.as_classes_alone(wanted.logits, family)
    assert largest((found.logits[-1], logits), (found.boxes[-1], wanted.pred_boxes)) <= 1e-4
    assert [theirs.config.id2label[i] for i in range(3)] == names


def test_logits_against_all_others_are_softmax_probabilities() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)) * 5
    torch.testing.assert_close(against_all_others(logits).sigmoid(), logits.softmax(-1))


@every_family
def test_attention_maps_are_refused(family: str) -> None:
    detector = adapted(family)
    with pytest.raises(InputError, match="attention maps cannot be read"):
        detector.decode(detector.encode(*batch(*WHOLE)), attention=True)

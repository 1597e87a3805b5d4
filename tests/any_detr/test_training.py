"""Models of transformers that start from a recipe alone: weights as the official codes start them, crop-trained backbones, whole losses."""

import math

import pytest
import torch

from detrdistill.any_detr.build import build_any, load_thin
from detrdistill.models.backbones import classifier
from detrdistill.models.outputs import Targets
from detrdistill.recipes.family_presets import SMALL
from detrdistill.recipes.presets import get_preset

NAMES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module", params=SMALL)
def detector(request):
    return build_any(get_preset("smoke", request.param).student, NAMES)


def test_weights_start_as_in_the_official_codes(detector):
    model = detector.model.model
    heads = [*model.decoder.class_embed, model.enc_score_head]
    assert all(torch.allclose(head.bias, torch.tensor(-math.log(99.0))) for head in heads), "1 % of the queries are an object of a class"
    parts = [*model.decoder.bbox_embed, model.enc_bbox_head]
    if detector.family.model_type == "d_fine":
        parts += [model.decoder.pre_bbox_head, *(one.reg_conf for one in model.decoder.lqe_layers)]
        gates = [layer.gateway.gate for layer in model.decoder.layers]
        assert not any(tensor.any() for gate in gates for tensor in (gate.weight, gate.bias)), "both halves count alike"
    for part in parts:
        *hidden, last = part.layers
        assert not last.weight.any() and not last.bias.any(), "a box starts as its reference, a score as it is"
        for layer in hidden:
            assert layer.weight.std().item() == pytest.approx(1 / math.sqrt(3 * layer.in_features), rel=0.15), "torch's own, not 0.01"
    assert model.denoising_class_embed.weight[:-1].std().item() == pytest.approx(1, rel=0.2)
    assert not model.denoising_class_embed.weight[-1].any(), "the padding"
    convolutions = [one for one in model.encoder.modules() if isinstance(one, torch.nn.Conv2d)]
    assert all(one.weight.std().item() > 0.3 * math.sqrt(2 / (one.out_channels * one.kernel_size[0] ** 2)) for one in convolutions)


def test_a_crop_trained_backbone_computes_the_same_in_transformers(detector):
    recipe = get_preset("smoke", detector.family.model_type).student
    torch.manual_seed(0)
    trained, images = classifier(recipe.backbone, len(NAMES)), torch.randn(2, 3, 64, 64)
    trained.train()(images)  # so that its norms have statistics
    trained.eval()
    load_thin(detector.model, trained.state_dict())
    with torch.no_grad():
        x, expected = trained.maxpool(trained.relu(trained.bn1(trained.conv1(images)))), []
        for stage in (trained.layer1, trained.layer2, trained.layer3, trained.layer4):
            x = stage(x)
            expected.append(x)
        found = detector.model.train().model.backbone(images, torch.ones(2, 64, 64, dtype=torch.bool))
    assert len(found) == recipe.levels == 3
    for one, other in zip(expected[1:], (maps for maps, _ in found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_own_loss_reaches_every_stage_alike(detector):
    """transformers pairs D-FINE's predictions with the wrong layers, and leaves some without supervision: `own_loss`."""
    torch.manual_seed(0)
    boxes = torch.rand(2, 3, 4) * 0.3 + 0.3
    targets = Targets(torch.randint(0, 10, (2, 3)), boxes, [3, 3], step_boxes=6.0, step_images=2.0)
    detector.train()
    memory = detector.encode(torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool), targets)
    (output,) = detector.decode(memory)
    losses = detector.own_loss(output, targets, {})
    heads = [head.weight for head in detector.model.model.decoder.class_embed]
    gradients = torch.autograd.grad(sum(losses.values()), heads)
    sizes = [gradient.abs().sum().item() for gradient in gradients]
    assert min(sizes) > 0.2 * max(sizes), "matched and denoising queries of each stage"
    stages = len(output.boxes)
    before = int(detector.family.box_before)
    for part in ("vfl", "bbox", "giou"):
        assert {f"loss_{part}_dn_{stage}" for stage in range(stages + before)} <= losses.keys()
        assert f"loss_{part}_aux_{stages - 1 + before}" in losses, "the encoder's proposals come last"
    if before:
        assert not {"loss_fgl_aux_0", "loss_ddf_aux_0", "loss_fgl_dn_0"} & losses.keys(), "the first box has no distribution"
        assert {f"loss_fgl_dn_{stage}" for stage in range(1, stages + 1)} <= losses.keys()

"""Checks of the adapter against the installed transformers, each a function of a family that gives the largest difference it finds.

`test_parity` holds them to a tolerance. `python -m tests.any_detr.checks` writes parity.csv, with which `make prose` fills
docs/any_detr.md.
"""

import csv
from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detrdistill.any_detr.adapter import AnyDETR, own_labels
from detrdistill.files import write_text
from detrdistill.models.outputs import Queries, Targets
from detrdistill.recipes.families import FAMILIES
from tests.any_detr.tiny import CLASSES, SIDE, tiny
from tests.models.small import batch

TABLE = Path(__file__).with_name("parity.csv")
WHOLE, PADDED = ((SIDE, SIDE), (SIDE, SIDE)), ((SIDE, SIDE), (SIDE - 16, SIDE // 2))


@cache
def adapted(family: str) -> AnyDETR:
    """One for all tests, in evaluation mode: whoever changes it copies it first."""
    return AnyDETR(tiny(family), FAMILIES[family]).eval()


def some_targets(*counts: int) -> Targets:
    """Objects well inside of their images."""
    random = torch.Generator().manual_seed(5)
    boxes = [
        torch.cat((0.3 + 0.4 * torch.rand(n, 2, generator=random), 0.1 + 0.3 * torch.rand(n, 2, generator=random)), -1) for n in counts
    ]
    return Targets.pack([torch.randint(CLASSES, (n,), generator=random) for n in counts], boxes)


@torch.no_grad()
def largest(*pairs: tuple[Tensor, Tensor]) -> float:
    """The largest difference of two tensors' entries, of all pairs; infinite where one is not finite."""
    found = [(a - b).abs().max() for a, b in pairs]
    return max(float(x) if x.isfinite() else float("inf") for x in found)


def cut(model: nn.Module, layers: int) -> nn.Module:
    """The same model with only so many decoder layers: its own forward pass tells what that stage predicts."""
    model = deepcopy(model)
    decoder = model.model.decoder
    decoder.layers = decoder.layers[:layers]
    for one in (decoder, model.model):
        if hasattr(one, "eval_idx"):
            one.eval_idx = layers - 1
    return model


def relative_to_image(boxes: Tensor, padding: Tensor, family: str) -> Tensor:
    """What a model's boxes are, relative to the image without its padding."""
    return boxes / valid_part(padding) if FAMILIES[family].padded else boxes


def valid_part(padding: Tensor) -> Tensor:
    height, width = (~padding).any(2).sum(1), (~padding).any(1).sum(1)
    return torch.stack((width, height, width, height), -1)[:, None] / torch.tensor(padding.shape[1:]).flip(0).repeat(2)


def as_classes_alone(logits: Tensor, family: str) -> Tensor:
    """DETR's softmax beside "no object", as logits of sigmoids."""
    return logits.softmax(-1)[..., :-1].logit() if FAMILIES[family].head == "softmax" else logits


def with_all_stages(model: nn.Module) -> nn.Module:
    """DAB-DETR cannot be cut after its first layer; asked to tell of all stages, it changes nothing else."""
    model = deepcopy(model)
    model.config.auxiliary_loss = True
    return model


def told(model: nn.Module, family: str, *images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Logits and boxes of each stage by the model's own forward passes, without the adapter."""
    pixels, padding = images
    mask = (~padding).long()
    if family == "dab_detr":
        last = with_all_stages(model)(pixels, pixel_mask=mask, labels=own_labels(some_targets(1, 1), None))
        return [*((one["logits"], one["pred_boxes"]) for one in last.auxiliary_outputs), (last.logits, last.pred_boxes)]
    found = [cut(model, stage + 1)(pixels, pixel_mask=mask) for stage in range(model.config.decoder_layers)]
    return [(one.logits, one.pred_boxes) for one in found]


@torch.no_grad()
def stages(family: str, sizes: tuple) -> float:
    """All stages of the own queries against the model's own forward pass, its decoder cut after each layer."""
    detector, images = adapted(family), batch(*sizes)
    (found,) = detector.decode(detector.encode(*images))
    logits, boxes = zip(*told(detector.model, family, *images), strict=True)
    wanted_boxes = relative_to_image(torch.stack(boxes), images[1], family)
    return largest((found.logits, as_classes_alone(torch.stack(logits), family)), (found.boxes, wanted_boxes))


def unpadded_stages(family: str) -> float:
    return stages(family, WHOLE)


def padded_stages(family: str) -> float:
    return stages(family, PADDED)


@torch.no_grad()
def last_stage(family: str) -> float:
    """The last stage of the own queries against the model's own forward pass, as it is."""
    detector, (pixels, padding) = adapted(family), batch(*WHOLE)
    (found,) = detector.decode(detector.encode(pixels, padding))
    wanted = detector.model(pixels, pixel_mask=(~padding).long())
    return largest((found.logits[-1], as_classes_alone(wanted.logits, family)), (found.boxes[-1], wanted.pred_boxes))


@torch.no_grad()
def fresh_copy(family: str) -> float:
    """A copy of the own queries, decoded as a group of their own, against the recorded pass."""
    detector = adapted(family)
    memory = detector.encode(*batch(*WHOLE))
    own = detector.queries(memory)
    first, second = detector.decode(memory, own, replace(own))
    return largest((first.logits, second.logits), (first.boxes, second.boxes), (first.queries, second.queries))


def other_queries(own: Queries, count: int) -> Queries:
    """Random queries of the same form."""
    random = torch.Generator().manual_seed(6)

    def like(part):
        return None if part is None else torch.rand(len(part), count, part.shape[2], generator=random)

    return Queries(like(own.content), like(own.position), like(own.reference))


@torch.no_grad()
def second_group(family: str) -> float:
    """What 7 further queries change of the own ones, in evaluation and in training."""
    worst = 0.0
    for train in (False, True):
        detector, images = deepcopy(adapted(family)).train(train), batch(*WHOLE)
        freeze_norms(detector)
        torch.manual_seed(0)
        memory = detector.encode(*images, some_targets(2, 1))
        own = detector.queries(memory)
        (alone,) = detector.decode(memory, own)
        first, second = detector.decode(memory, own, other_queries(own, 7))
        assert second.logits.shape[2] == 7 and first.own is not None and second.own is None
        worst = max(worst, largest((first.logits, alone.logits), (first.boxes, alone.boxes)))
    return worst


def freeze_norms(model: nn.Module) -> None:
    """Batch norms by their statistics, so that images do not see each other in training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def apart(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """D-FINE's loss in two calls: of the box before the first distribution alone, and of the layers, which then go with their own."""
    alone, (logits, labels, device, boxes, config, classes, coordinates) = copy(model.config), args
    alone.auxiliary_loss = False
    before, _, _ = model.loss_function(classes[:, 0], labels, device, coordinates[:, 0], alone)
    layers, _, _ = model.loss_function(logits, labels, device, boxes, config, classes[:, 1:], coordinates[:, 1:], **kwargs)
    return before + layers


def own_loss(family: str) -> float:
    """The own loss through the adapter against the model's own, in training, relative to it; on a padded batch too.

    transformers pairs D-FINE's layers with distributions of the next ones, which the kit does not follow.
    """
    worst = 0.0
    for sizes in (WHOLE, PADDED):
        detector, (pixels, padding) = deepcopy(adapted(family)).train(), batch(*sizes)
        if FAMILIES[family].box_before:  # denoising queries: test_training.py
            detector.model.config.num_denoising = 0
            detector.model.config.use_dense_one_to_one = False  # whose union counts the box before
        wanted_of, targets = deepcopy(detector.model), some_targets(3, 1)
        torch.manual_seed(7)
        (found,) = detector.decode(detector.encode(pixels, padding, targets))
        total = sum(detector.own_loss(found, targets, {}).values())
        labels = own_labels(targets, valid_part(padding) if FAMILIES[family].padded else None)
        # The two oldest have one stage in their loss unless asked, and DETR becomes another function when it is asked.
        models = [wanted_of]
        if family == "detr":
            models = [cut(wanted_of, stage + 1) for stage in range(len(found.logits))]
        elif family == "dab_detr":
            models = [with_all_stages(wanted_of)]
        torch.manual_seed(7)
        if FAMILIES[family].box_before:
            wanted = apart(detector.model, *found.own)
        else:
            wanted = sum(one(pixels, pixel_mask=(~padding).long(), labels=labels).loss for one in models)
        worst = max(worst, largest((total / wanted, torch.ones(()))))
    return worst


CHECKS: Mapping[str, tuple[str, Callable[[str], float], float]] = {
    one.__name__: (title, one, most)
    for title, one, most in (
        ("last stage", last_stage, 1e-5),
        ("all stages", unpadded_stages, 1e-5),
        ("all stages, padded", padded_stages, 1e-5),
        ("queries decoded anew", fresh_copy, 1e-5),
        ("a second group", second_group, 0.0),
        ("own loss", own_loss, 1e-5),
    )
}


def rounded(difference: float) -> str:
    return f"{difference:.0e}" if difference else "0"


def main() -> None:
    torch.set_num_threads(1)
    text = StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["family", *CHECKS])
    for family in FAMILIES:
        rows.writerow([family, *(rounded(check(family)) for _, check, _ in CHECKS.values())])
    write_text(TABLE, text.getvalue())


if __name__ == "__main__":
    main()

"""One mechanism for all families: run the model's own forward pass and write down how its decoder was called.

So nothing of transformers is restated but the heads, of one to four lines each. The detector's own queries are what its decoder was called
with; further groups of queries go through the same decoder, a call a group, with content, position and reference exchanged: groups cannot
see each other. What differs between families is the table of `recipes.families`.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detrdistill.any_detr.own_loss import OwnLoss
from detrdistill.any_detr.recording import Call, exportable, outputs_of, recorded
from detrdistill.boxes import inverse_sigmoid
from detrdistill.errors import InputError
from detrdistill.models.attention import level_padding
from detrdistill.models.outputs import DetectorOutput, Queries, Targets
from detrdistill.recipes.families import Family


@dataclass
class Memory:
    """Encoded images.

    Attributes:
        call: the decoder's pass with the detector's own queries, and in training those of its own training groups.
        neck: what the encoder starts from, a map a level.
        padding: True where a cell is padding, a mask a level.
        valid: width, height, width, height of each image relative to the padded one; None where nothing is padded or the family's boxes
            are relative to the image anyway.
        loss: what the model called its own loss with, in training.
        own: the own queries; the decoder's pass for them need not be repeated.
    """

    call: Call
    neck: list[Float[Tensor, "B E _ _"]]
    padding: list[Bool[Tensor, "B _ _"]]
    valid: Float[Tensor, "B 1 4"] | None
    loss: tuple[tuple, dict[str, Any]] | None
    own: Queries | None = None


class AnyDETR(nn.Module):
    """A detector of transformers with the contract of `models`, and with its own loss.

    Equal to the model's own forward pass number by number, all stages, padded or not; see tests/any_detr.

    Args:
        model: a ...ForObjectDetection.
        family: its facts.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        super().__init__()
        self.model, self.family = model, family
        self.dim = getattr(model.config, family.dim)
        self.levels = getattr(model.config, "num_feature_levels", 1)
        self.query_position = family.queries == "embeddings"
        self.top = model.config.num_queries
        self.most_objects = None
        self.own_loss = OwnLoss(model, family)
        # Without a gradient in any step, for which DDP would wait in vain.
        for name, parameter in model.named_parameters():
            if name.endswith("mask_token"):
                parameter.requires_grad_(False)
        # Anchors that are computed once for one size of images: the same numbers, for that size alone.
        if getattr(model.config, "anchor_image_size", None) is not None:
            model.config.anchor_image_size = None

    @property
    def decoder(self) -> nn.Module:
        return self.model.model.decoder

    def encode(self, pixels: Float[Tensor, "B 3 H W"], padding: Bool[Tensor, "B H W"], targets: Targets | None = None) -> Memory:
        """The model's own forward pass. `targets` make it add its own training groups and call its own loss.

        Raises:
            InputError: the sides of the images do not divide.
        """
        self._check_sides(pixels.shape[-2:])
        valid = self._valid(padding)
        labels = None if targets is None else own_labels(targets, valid)
        with self._whole_decoder(), recorded(self.decoder) as call, outputs_of(self._neck()) as neck, self.own_loss.recorded() as loss:
            self.model(pixels, pixel_mask=(~padding).long(), labels=labels)
        sizes = [tuple(size) for size in call.given.get("spatial_shapes_list") or [neck[0].shape[-2:]]]
        memory = Memory(call, neck, [level_padding(padding, size) for size in sizes], valid, loss[0] if loss else None)
        if loss and self.family.every_stage:
            memory.loss = self._of_every_stage(*loss[0], call)
        memory.own = self._own_queries(memory)
        return memory

    def queries(self, memory: Memory) -> Queries:
        """The detector's own queries."""
        return memory.own

    def decode(self, memory: Memory, *groups: Queries, attention: bool = False) -> list[DetectorOutput]:
        """One output a group; groups share the image and do not see each other. Without groups, the detector's own queries.

        Raises:
            InputError: `attention` is asked for, which these models do not tell alike.
        """
        if attention:
            raise InputError(f"{self.family.title}: attention maps cannot be read from transformers' models; take a method without them")
        return [self._output(memory, group) for group in groups or [memory.own]]

    def _output(self, memory: Memory, group: Queries) -> DetectorOutput:
        own = group is memory.own
        call = memory.call if own else self._decode(memory, group)
        states, logits, boxes = self._predictions(call)
        if own:
            places = self._own(states.shape[2])
            states, logits, boxes = (x[:, :, places] for x in (states, logits, boxes))
        if self.family.head == "softmax":
            logits = against_all_others(logits)[..., :-1]
        if memory.valid is not None:
            boxes = boxes / memory.valid
        features = self._features(memory)
        alike = len(memory.neck) == len(features) and all(a.shape == b.shape for a, b in zip(memory.neck, features, strict=True))
        return DetectorOutput(
            logits,
            boxes,
            states,
            features=features,
            padding=memory.padding,
            initial=group,
            neck=memory.neck if alike else features,
            own=memory.loss if own else None,
        )

    def _decode(self, memory: Memory, group: Queries) -> Call:
        """The decoder's pass with another group of queries, alone."""
        batch = len(memory.padding[0])
        given = memory.call.given | {"inputs_embeds": group.content.expand(batch, -1, -1)}
        if self.family.reference:
            reference = group.reference.expand(batch, -1, -1)
            given[self.family.reference] = self._on_padded(reference, memory.valid)
        if self.family.position:
            given[self.family.position] = group.position.expand(batch, -1, -1)
        if self.family.own == "last":
            given["encoder_attention_mask"] = None  # which query may see which: of the denoising groups
        with self._whole_decoder(), self._one_group(), recorded(self.decoder) as call:
            self.decoder(**given)
        return call

    def _predictions(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """States [S B Q D], logits [S B Q C] and boxes [S B Q 4], as the model has them."""
        # Some decoders normalise a state for the heads and feed it on as it was; the last they tell, which DETR may have normalised twice.
        states = torch.stack(call.states)
        if (norm := getattr(self.decoder, "layernorm", None)) is not None:
            states = torch.cat((norm(states[:-1]), call.found.last_hidden_state[None]))
        head, model = self.family.head, self.model
        if head == "recorded":
            # D-FINE tells first what its layers start from, and in training of layers after eval_idx, which evaluation leaves out.
            count = getattr(self.decoder, "eval_idx", len(states) - 1) + 1
            logits, boxes = (
                x.transpose(0, 1)[-len(states) :][:count]
                for x in (call.found.intermediate_logits, call.found.intermediate_reference_points)
            )
            return states[:count], logits, boxes
        if head == "boxes":
            center, size = call.given["reference_points"].split(2, dim=-1)
            delta = model.bbox_embed(states)
            return states, model.class_embed(states), torch.cat((delta[..., :2] * size + center, delta[..., 2:].exp() * size), dim=-1)
        if head == "logits":
            start = inverse_sigmoid(call.found.reference_points, eps=1e-3)
            return states, model.class_embed(states), (model.bbox_predictor(states) + start).sigmoid()
        return states, model.class_labels_classifier(states), model.bbox_predictor(states).sigmoid()

    def _of_every_stage(self, args: tuple, kwargs: dict[str, Any], call: Call) -> tuple[tuple, dict[str, Any]]:
        """The loss's arguments with the predictions of all stages, as the family was trained; transformers has the last alone by default.

        Its own switch (auxiliary_loss) would make DETR another function, which feeds normalised states from layer to layer.
        """
        _, logits, boxes = self._predictions(call)
        config = copy(self.model.config)
        config.auxiliary_loss = True
        return (*args[:4], config, logits, boxes), kwargs

    def _own(self, queries: int) -> slice:
        """Which of the decoder's queries are the detector's own."""
        count = self.model.config.num_queries
        return {"last": slice(queries - count, queries), "first": slice(0, count), "all": slice(0, queries)}[self.family.own]

    def _own_queries(self, memory: Memory) -> Queries:
        given = memory.call.given
        places = self._own(given["inputs_embeds"].shape[1])
        content, reference, position = (
            given[name][:, places] if name else None for name in ("inputs_embeds", self.family.reference, self.family.position)
        )
        if memory.valid is not None:
            reference = inverse_sigmoid(reference.sigmoid() / memory.valid)
        return Queries(content, position, reference)

    def _on_padded(self, reference: Float[Tensor, "B Q 4"], valid: Float[Tensor, "B 1 4"] | None) -> Float[Tensor, "B Q 4"]:
        return reference if valid is None else inverse_sigmoid(reference.sigmoid() * valid)

    def _features(self, memory: Memory) -> list[Float[Tensor, "B D _ _"]]:
        """What the decoder attends to, a map a level."""
        tokens = memory.call.given["encoder_hidden_states"]
        sizes = [tuple(mask.shape[1:]) for mask in memory.padding]
        parts = tokens.split([height * width for height, width in sizes], dim=1)
        return [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]

    def _valid(self, padding: Bool[Tensor, "B H W"]) -> Float[Tensor, "B 1 4"] | None:
        # While it is traced nothing has a number.
        if not self.family.padded or not (torch.compiler.is_exporting() or padding.any()):
            return None
        height, width = ((~side).float().mean(1) for side in (padding[:, :, 0], padding[:, 0, :]))
        return torch.stack((width, height, width, height), dim=-1)[:, None]

    def traceable(self) -> AbstractContextManager[None]:
        """While the detector is exported (`export.graph`)."""
        return exportable(self.model)

    def _neck(self) -> list[nn.Module]:
        if not self.family.neck:
            return []
        module = self.model.get_submodule(self.family.neck)
        return list(module) if isinstance(module, nn.ModuleList) else [module]

    @contextmanager
    def _whole_decoder(self) -> Iterator[None]:
        """D-FINE's decoder tells of all stages only while it believes to be in training; its own flag changes nothing else."""
        before = self.decoder.training
        if self.family.head == "recorded":
            self.decoder.training = True
        try:
            yield
        finally:
            self.decoder.training = before

    @contextmanager
    def _one_group(self) -> Iterator[None]:
        """Group DETR's layers divide the queries by the number of groups in training."""
        config = self.model.config
        before = getattr(config, "group_detr", None)
        if before is not None:
            config.group_detr = 1
        try:
            yield
        finally:
            if before is not None:
                config.group_detr = before

    def _check_sides(self, size: Sequence[int]) -> None:
        if any(side % self.sides for side in size):
            raise InputError(
                f"{self.family.title}: images of {size[0]} x {size[1]} pixels; both sides must be multiples of {self.sides}: set "
                "resize.stretch=true, and resize.short and resize.long to such numbers"
            )

    @property
    def sides(self) -> int:
        """What image sides must be multiples of."""
        return self.family.sides_of(self.model.config.to_dict())


def against_all_others(logits: Float[Tensor, "*any C"]) -> Float[Tensor, "*any C"]:
    """Logits whose sigmoid is the softmax of `logits`: each against the log of the sum of all others' exponentials."""
    classes = logits.shape[-1]
    others = torch.where(torch.eye(classes, dtype=torch.bool, device=logits.device), -torch.inf, logits[..., None, :])
    return logits - others.logsumexp(-1)


def own_labels(targets: Targets, valid: Float[Tensor, "B 1 4"] | None) -> list[dict[str, Tensor]]:
    """Targets as transformers' losses take them: an entry an image, boxes relative to what the family's boxes are relative to."""
    boxes = targets.boxes if valid is None else targets.boxes * valid
    images = zip(targets.labels, boxes, targets.counts, strict=True)
    return [{"class_labels": labels[:count], "boxes": some[:count]} for labels, some, count in images]

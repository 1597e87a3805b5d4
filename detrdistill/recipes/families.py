"""What differs between the DETRs of transformers, as facts: a line a family. `any_detr` reads them; no torch here.

Sources: transformers 5.23, whose modules and arguments are named; tests/any_detr holds each fact against it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """A family of detectors in transformers.

    Attributes:
        title: its name in the field.
        model_type: transformers' word for it.
        queries: the form of its queries, which says who can decode whose. "logits": content from the encoder, a box as logits.
            "boxes": learned content, a box as it is. "anchors": no content, a learned box as logits. "embeddings": no content, a learned
            embedding, no box.
        head: how predictions are made of decoder states. "recorded": the decoder tells them stage by stage. "boxes": offsets to one
            reference box for all stages. "logits": offsets to the logits of each stage's reference box. "softmax": boxes without a
            reference, and classes beside "no object".
        reference: the decoder's argument with the boxes that queries start from.
        position: the decoder's argument with their embeddings.
        own: which of the decoder's queries in training are the detector's own: the "last" (denoising groups come first), the "first"
            (Group DETR's other groups follow) or "all".
        neck: the modules whose outputs the encoder starts from, one a level or one for all; "" where there is no encoder.
        padded: whether boxes are relative to the padded image instead of the image.
        sides: what image sides must be multiples of, where the backbone's windows do not say (`sides_of`).
        windows: of a backbone that sees windows of patches: by default, pixels a patch and windows a side.
        dim: configuration's entry for the decoder's width.
        backbone: where its backbone is, which trains at a rate of its own.
        processor: transformers' class that prepares its images.
        classes: parts of names of tensors with a row a class.
        extra_rows: rows that the head has beyond the classes.
        loss_weights: by which entries of the configuration the parts of the own loss are multiplied; None where they come weighted.
        averaged: parts of the own loss that are means over queries instead of sums divided by objects.
        box_before: whether the decoder predicts a box before its first layer's distribution, as transformers' loss does not allow for.
        every_stage: whether the own loss must be asked for all stages, since the configuration's default is the last alone.
    """

    title: str
    model_type: str
    queries: Literal["logits", "boxes", "anchors", "embeddings"]
    head: Literal["recorded", "boxes", "logits", "softmax"]
    reference: str = "reference_points"
    position: str = ""
    own: Literal["last", "first", "all"] = "all"
    neck: str = ""
    padded: bool = False
    sides: int = 32
    windows: tuple[int, int] | None = None
    dim: str = "d_model"
    backbone: str = "model.backbone"
    processor: str = "RTDetrImageProcessor"
    classes: tuple[str, ...] = ("class_embed",)
    extra_rows: int = 0
    loss_weights: dict[str, str] | None = None
    averaged: tuple[str, ...] = ()
    box_before: bool = False
    every_stage: bool = False

    def sides_of(self, config: Mapping[str, Any]) -> int:
        """What image sides must be multiples of, for a model of this configuration (entries at their defaults may be left out)."""
        if self.windows is None:
            return self.sides
        backbone = config.get("backbone_config") or {}
        stated = backbone if isinstance(backbone, Mapping) else {}
        patch, windows = stated.get("patch_size", self.windows[0]), stated.get("num_windows")
        for name, value in (("patch_size", patch), ("num_windows", 1 if windows is None else windows)):
            if type(value) is not int or value < 1:
                raise ValueError(f"'config.backbone_config.{name}' is {value!r}, not a whole number above 0")
        if windows is None:
            windows = self.windows[1]
        elif self.model_type == "lw_detr":  # which counts the windows of an image
            windows = isqrt(windows)
        return patch * windows


_RT = {
    "queries": "logits",
    "head": "recorded",
    "own": "last",
    "neck": "model.encoder_input_proj",
    "padded": True,
    "classes": ("class_embed", "enc_score_head"),
}
_GROUPS = {
    "queries": "boxes",
    "head": "boxes",
    "own": "first",
    "backbone": "model.backbone.backbone",
    "processor": "RfDetrImageProcessor",
    "loss_weights": {"loss_ce": "class_loss_coefficient", "loss_bbox": "bbox_loss_coefficient", "loss_giou": "giou_loss_coefficient"},
}
_FIRST = {"neck": "model.input_projection", "sides": 1, "every_stage": True}
_BOXES = {"loss_bbox": "bbox_loss_coefficient", "loss_giou": "giou_loss_coefficient"}

FAMILIES: dict[str, Family] = {
    "rt_detr": Family("RT-DETR", "rt_detr", **_RT),
    "rt_detr_v2": Family("RT-DETR v2", "rt_detr_v2", **_RT),
    "d_fine": Family("D-FINE", "d_fine", averaged=("loss_ddf",), box_before=True, **_RT),
    "deimv2": Family(
        "DEIMv2",
        "deimv2",
        averaged=("loss_ddf",),
        box_before=True,
        **_RT | {"neck": "model.conv_encoder", "backbone": "model.conv_encoder.model"},
    ),
    "rf_detr": Family("RF-DETR", "rf_detr", windows=(14, 4), **_GROUPS),
    "lw_detr": Family("LW-DETR", "lw_detr", windows=(16, 4), **_GROUPS | {"processor": "DeformableDetrImageProcessor"}),
    "dab_detr": Family(
        "DAB-DETR",
        "dab-detr",
        "anchors",
        "logits",
        reference="query_position_embeddings",
        dim="hidden_size",
        processor="ConditionalDetrImageProcessor",
        loss_weights={"loss_ce": "", **_BOXES},
        **_FIRST,
    ),
    "detr": Family(
        "DETR",
        "detr",
        "embeddings",
        "softmax",
        reference="",
        position="object_queries_position_embeddings",
        processor="DetrImageProcessor",
        classes=("class_labels_classifier",),
        extra_rows=1,
        loss_weights={"loss_ce": "", **_BOXES},
        averaged=("loss_ce",),
        **_FIRST,
    ),
}

"""Names of parameters in the kit, in the official codes, in mmdetection and in transformers' files; and names of COCO's classes.

A table pairs beginnings of names, theirs and ours; "#" stands for a number. The first pair that fits counts, read either way.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from detrdistill.errors import InputError

Table = Sequence[tuple[str, str]]
OFFICIAL_CONDITIONAL: Table = (
    ("backbone.0.body.", "backbone.body."),
    ("transformer.encoder.layers.#.", "encoder.#."),
    ("transformer.decoder.layers.#.self_attn.out_proj.", "decoder.#.sa_out_proj."),
    ("transformer.decoder.layers.#.cross_attn.out_proj.", "decoder.#.ca_out_proj."),
    ("transformer.decoder.layers.#.", "decoder.#."),
    ("transformer.decoder.", ""),
)
OFFICIAL_DEFORMABLE: Table = (
    ("backbone.0.body.", "backbone.body."),
    ("transformer.encoder.layers.#.", "encoder.#."),
    ("transformer.decoder.layers.#.", "decoder.#."),
    # The decoder's own entries for the heads are the same tensors as the detector's.
    ("transformer.decoder.", ""),
    ("transformer.", ""),
)
OFFICIAL_ADAMIXER: Table = (
    ("backbone.", "backbone.body."),
    ("neck.lateral_convs.#.conv.", "neck.lateral_convs.#."),
    ("rpn_head.init_proposal_bboxes.weight", "init_boxes"),
    ("rpn_head.init_content_features.", "init_content."),
    ("roi_head.bbox_head.#.attention.attn.", "stages.#.attention."),
    ("roi_head.bbox_head.#.sampling_n_mixing.sampling_offset_generator.0.", "stages.#.sampling_offset_generator."),
    ("roi_head.bbox_head.#.sampling_n_mixing.adaptive_mixing.parameter_generator.0.", "stages.#.mixing.parameter_generator."),
    ("roi_head.bbox_head.#.sampling_n_mixing.adaptive_mixing.", "stages.#.mixing."),
    ("roi_head.bbox_head.#.sampling_n_mixing.norm.", "stages.#.mixing_norm."),
    ("roi_head.bbox_head.#.ffn.layers.0.0.", "stages.#.linear1."),
    ("roi_head.bbox_head.#.ffn.layers.1.", "stages.#.linear2."),
    ("roi_head.bbox_head.#.", "stages.#."),
)
_MMDET_DEFORMABLE: Table = (
    ("backbone.", "backbone.body."),
    ("neck.convs.#.conv.", "input_proj.#.0."),
    ("neck.convs.#.gn.", "input_proj.#.1."),
    ("bbox_head.cls_branches.", "class_embed."),
    *((f"bbox_head.reg_branches.#.{2 * i}.", f"bbox_embed.#.layers.{i}.") for i in range(3)),
)
# mmdetection 2, in which DETRDistill was released.
MMDET_DEFORMABLE: Table = (
    *_MMDET_DEFORMABLE,
    ("bbox_head.query_embedding.", "query_embed."),
    ("bbox_head.transformer.level_embeds", "level_embed"),
    *((f"bbox_head.transformer.{part}.layers.#.ffns.0.layers.0.0.", f"{part}.#.linear1.") for part in ("encoder", "decoder")),
    *((f"bbox_head.transformer.{part}.layers.#.ffns.0.layers.1.", f"{part}.#.linear2.") for part in ("encoder", "decoder")),
    ("bbox_head.transformer.encoder.layers.#.attentions.0.", "encoder.#.self_attn."),
    *((f"bbox_head.transformer.encoder.layers.#.norms.{i}.", f"encoder.#.norm{i + 1}.") for i in range(2)),
    ("bbox_head.transformer.decoder.layers.#.attentions.0.attn.", "decoder.#.self_attn."),
    ("bbox_head.transformer.decoder.layers.#.attentions.1.", "decoder.#.cross_attn."),
    # Ours are numbered as the official ones, which run in the order 2, 1, 3.
    *((f"bbox_head.transformer.decoder.layers.#.norms.{i}.", f"decoder.#.norm{ours}.") for i, ours in enumerate((2, 1, 3))),
    ("bbox_head.transformer.", ""),
)
# mmdetection 3 took encoder, decoder and queries out of the head.
_MMDET3: Table = (
    ("query_embedding.", "query_embed."),
    *((f"{part}.layers.#.ffn.layers.0.0.", f"{part}.#.linear1.") for part in ("encoder", "decoder")),
    *((f"{part}.layers.#.ffn.layers.1.", f"{part}.#.linear2.") for part in ("encoder", "decoder")),
    *((f"encoder.layers.#.norms.{i}.", f"encoder.#.norm{i + 1}.") for i in range(2)),
)
MMDET3_DEFORMABLE: Table = (
    *_MMDET_DEFORMABLE,
    *_MMDET3,
    *((f"decoder.layers.#.norms.{i}.", f"decoder.#.norm{ours}.") for i, ours in enumerate((2, 1, 3))),
    ("decoder.layers.#.self_attn.attn.", "decoder.#.self_attn."),
    ("encoder.layers.", "encoder."),
    ("decoder.layers.", "decoder."),
    ("reference_points_fc.", "reference_points."),
    *((f"memory_trans_{theirs}.", f"enc_output{ours}.") for theirs, ours in (("fc", ""), ("norm", "_norm"))),
    ("pos_trans_fc.", "pos_trans."),
)
MMDET3_CONDITIONAL: Table = (
    ("backbone.", "backbone.body."),
    ("neck.convs.0.conv.", "input_proj."),
    *_MMDET3,
    *((f"decoder.layers.#.norms.{i}.", f"decoder.#.norm{i + 1}.") for i in range(3)),
    ("encoder.layers.#.self_attn.attn.", "encoder.#.self_attn."),
    ("decoder.layers.#.self_attn.", "decoder.#.sa_"),
    ("decoder.layers.#.cross_attn.", "decoder.#.ca_"),
    ("decoder.post_norm.", "norm."),
    ("decoder.query_scale.", "query_scale."),
    ("decoder.ref_point_head.", "ref_point_head."),
    ("bbox_head.fc_cls.", "class_embed."),
    ("bbox_head.reg_ffn.layers.0.0.", "bbox_embed.layers.0."),
    ("bbox_head.reg_ffn.layers.1.", "bbox_embed.layers.1."),
    ("bbox_head.fc_reg.", "bbox_embed.layers.2."),
)
# Transformers' files keep the names of its older versions, whatever its modules are called today.
_RESNET = "model.backbone.conv_encoder.model."
_HUGGING_FACE: Table = (
    (f"{_RESNET}embedder.embedder.convolution.", "backbone.body.conv1."),
    (f"{_RESNET}embedder.embedder.normalization.", "backbone.body.bn1."),
    *(
        (f"{_RESNET}encoder.stages.{stage}.layers.#.{theirs}.", f"backbone.body.layer{stage + 1}.#.{ours}.")
        for stage in range(4)
        for theirs, ours in (
            *((f"layer.{i}.convolution", f"conv{i + 1}") for i in range(3)),
            *((f"layer.{i}.normalization", f"bn{i + 1}") for i in range(3)),
            ("shortcut.convolution", "downsample.0"),
            ("shortcut.normalization", "downsample.1"),
        )
    ),
    (_RESNET, "backbone.body."),  # a ResNet of timm, with torchvision's names
    ("model.query_position_embeddings.", "query_embed."),
    ("model.encoder.layers.#.self_attn_layer_norm.", "encoder.#.norm1."),
    ("model.encoder.layers.#.final_layer_norm.", "encoder.#.norm2."),
    ("model.decoder.layers.#.final_layer_norm.", "decoder.#.norm3."),
    *((f"model.{part}.layers.#.fc{i}.", f"{part}.#.linear{i}.") for part in ("encoder", "decoder") for i in (1, 2)),
)
HUGGING_FACE_CONDITIONAL: Table = (
    *_HUGGING_FACE,
    ("model.input_projection.", "input_proj."),
    ("model.decoder.layers.#.self_attn.out_proj.", "decoder.#.sa_out_proj."),
    ("model.decoder.layers.#.encoder_attn.out_proj.", "decoder.#.ca_out_proj."),
    ("model.decoder.layers.#.self_attn_layer_norm.", "decoder.#.norm1."),
    ("model.decoder.layers.#.encoder_attn_layer_norm.", "decoder.#.norm2."),
    ("model.encoder.layers.", "encoder."),
    ("model.decoder.layers.", "decoder."),
    ("model.decoder.layernorm.", "norm."),
    ("model.decoder.query_scale.", "query_scale."),
    ("model.decoder.ref_point_head.", "ref_point_head."),
    ("class_labels_classifier.", "class_embed."),
    ("bbox_predictor.", "bbox_embed."),
)
HUGGING_FACE_DEFORMABLE: Table = (
    *_HUGGING_FACE,
    ("model.decoder.layers.#.self_attn_layer_norm.", "decoder.#.norm2."),
    ("model.decoder.layers.#.encoder_attn_layer_norm.", "decoder.#.norm1."),
    ("model.decoder.layers.#.encoder_attn.", "decoder.#.cross_attn."),
    ("model.encoder.layers.", "encoder."),
    ("model.decoder.layers.", "decoder."),
    ("class_embed.", "class_embed."),
    ("bbox_embed.", "bbox_embed."),
    ("model.decoder.class_embed.", "class_embed."),
    ("model.decoder.bbox_embed.", "bbox_embed."),
    ("model.", ""),
)


def rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """`name` with the first of the pairs' left sides that it begins with replaced by the right side; as it is where none fits."""
    for old, new in pairs:
        if match := re.match(re.escape(old).replace(r"\#", r"(\d+)"), name):
            numbers = iter(match.groups())
            return re.sub("#", lambda _, numbers=numbers: next(numbers), new) + name[match.end() :]
    return name


def our_name(theirs: str, table: Table, one_head: bool = False) -> str:
    """The kit's name of their parameter.

    Args:
        one_head: all stages share one head (Deformable DETR's plain form), which their files repeat for every stage.
    """
    name = rename(theirs, table)
    return re.sub(r"^(class|bbox)_embed\.\d+\.", r"\1_embed.0.", name) if one_head else name


def our_state(theirs: Mapping[str, Tensor], table: Table, one_head: bool = False) -> dict[str, Tensor]:
    """Their tensors under the kit's names, as `our_name` gives them. Batch counters are left out: frozen BatchNorm has none.

    Raises:
        InputError: tensors that are one in the kit differ.
    """
    state: dict[str, Tensor] = {}
    for name, value in theirs.items():
        if name.endswith("num_batches_tracked"):
            continue
        ours = our_name(name, table, one_head)
        if ours in state and not torch.equal(state[ours], value):
            raise InputError(f"{name} differs from another tensor that it should be shared with, '{ours}'; the file is damaged")
        state[ours] = value
    return state


def outputs_by_name(names: Sequence[str | None], wanted: Sequence[str]) -> tuple[int | None, ...]:
    """The output for each class that is `wanted`, None where there is none: by its name, capitals and spaces aside where none is alike.

    Args:
        names: the class of each output, None for none.
    """
    exact = {name: row for row, name in enumerate(names) if name is not None}
    plain = {_plain(name): row for name, row in exact.items()}
    return tuple(exact.get(name, plain.get(_plain(name))) for name in wanted)


def _plain(name: str) -> str:
    return " ".join(name.lower().split())


def ids_of_outputs(names: Sequence[str | None], known: Mapping[str, int]) -> tuple[int | None, ...]:
    """Each output's category id: as `known` where that has all their names, or COCO's where all are COCO's, or else counted from 0.

    Args:
        names: the class of each output; None for none, which has no id.
    """
    named = [name for name in names if name is not None]
    coco = {name: id for id, name in enumerate(COCO_91) if name}
    ids = next((ids for ids in (known, coco) if ids.keys() >= {*named}), {name: number for number, name in enumerate(named)})
    return tuple(None if name is None else ids[name] for name in names)


# By COCO's ids from 0 on; those never given out are empty.
COCO_91 = tuple(
    name or None
    for name in (
        "|person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant||stop sign|parking meter|bench|bird|cat|"
        "dog|horse|sheep|cow|elephant|bear|zebra|giraffe||backpack|umbrella|||handbag|tie|suitcase|frisbee|skis|snowboard|sports ball|kite|"
        "baseball bat|baseball glove|skateboard|surfboard|tennis racket|bottle||wine glass|cup|fork|knife|spoon|bowl|banana|apple|sandwich|"
        "orange|broccoli|carrot|hot dog|pizza|donut|cake|chair|couch|potted plant|bed||dining table|||toilet||tv|laptop|mouse|remote|"
        "keyboard|cell phone|microwave|oven|toaster|sink|refrigerator||book|clock|vase|scissors|teddy bear|hair drier|toothbrush"
    ).split("|")
)

"""Official parameter names of the detectors in this kit's words."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Renames = Sequence[tuple[str, str]]

DEFORMABLE: Renames = (
    (r"^transformer\.", ""),
    (r"^backbone\.0\.body\.", "backbone.body."),
    # The decoder's own entries for the heads are the same tensors as the detector's.
    (r"^decoder\.(class|bbox)_embed\.", r"\1_embed."),
    (r"^(encoder|decoder)\.layers\.", r"\1."),
)
# All stages have one head (the plain form), which the official state_dict repeats for every stage.
DEFORMABLE_PLAIN: Renames = (*DEFORMABLE, (r"^(class|bbox)_embed\.\d+\.", r"\1_embed.0."))
CONDITIONAL: Renames = (
    (r"^transformer\.(encoder|decoder)\.layers\.", r"\1."),
    (r"^transformer\.decoder\.", ""),
    (r"^backbone\.0\.body\.", "backbone.body."),
    (r"^(decoder\.\d+)\.self_attn\.out_proj\.", r"\1.sa_out_proj."),
    (r"^(decoder\.\d+)\.cross_attn\.out_proj\.", r"\1.ca_out_proj."),
)
ADAMIXER: Renames = (
    (r"^backbone\.", "backbone.body."),
    (r"^(neck\.)?lateral_convs\.(\d+)\.conv\.", r"\1lateral_convs.\2."),
    (r"^rpn_head\.init_proposal_bboxes\.weight", "init_boxes"),
    (r"^rpn_head\.init_content_features\.", "init_content."),
    (r"^roi_head\.bbox_head\.", "stages."),
    (r"\.attention\.attn\.", ".attention."),
    (r"\.sampling_n_mixing\.sampling_offset_generator\.0\.", ".sampling_offset_generator."),
    (r"\.sampling_n_mixing\.adaptive_mixing\.", ".mixing."),
    (r"\bparameter_generator\.0\.", "parameter_generator."),
    (r"\.sampling_n_mixing\.norm\.", ".mixing_norm."),
    (r"\.ffn\.layers\.0\.0\.", ".linear1."),
    (r"\.ffn\.layers\.1\.", ".linear2."),
)


def our_name(official: str, renames: Renames) -> str:
    """The kit's name of an official parameter."""
    for pattern, words in renames:
        official = re.sub(pattern, words, official)
    return official


def our_state(official: Mapping[str, Tensor], renames: Renames) -> dict[str, Tensor]:
    """An official state_dict under the kit's names; tensors that fall together must be equal.

    Batch counters are left out: frozen BatchNorm has none.
    """
    state: dict[str, Tensor] = {}
    for name, value in official.items():
        if name.endswith("num_batches_tracked"):
            continue
        ours = our_name(name, renames)
        assert ours not in state or torch.equal(state[ours], value), f"{name}: differs from the tensor it should be shared with"
        state[ours] = value
    return state

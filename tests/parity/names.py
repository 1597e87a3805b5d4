"""Official parameter names of Deformable DETR in this kit's words."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor


def our_name(official: str, shared_heads: bool) -> str:
    """The kit's name of an official parameter.

    Args:
        shared_heads: all stages have one head (the plain form), which the official state_dict repeats for every stage.
    """
    name = official.removeprefix("transformer.").replace("backbone.0.body.", "backbone.body.")
    # The decoder's own entries for the heads are the same tensors as the detector's.
    name = re.sub(r"^decoder\.(class|bbox)_embed\.", r"\1_embed.", name)
    name = re.sub(r"^(encoder|decoder)\.layers\.", r"\1.", name)
    return re.sub(r"^(class|bbox)_embed\.\d+\.", r"\1_embed.0.", name) if shared_heads else name


def our_state(official: Mapping[str, Tensor], shared_heads: bool) -> dict[str, Tensor]:
    """An official state_dict under the kit's names; tensors that fall together must be equal."""
    state: dict[str, Tensor] = {}
    for name, value in official.items():
        ours = our_name(name, shared_heads)
        assert ours not in state or torch.equal(state[ours], value), f"{name}: differs from the tensor it should be shared with"
        state[ours] = value
    return state

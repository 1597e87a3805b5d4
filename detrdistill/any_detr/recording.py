"""What models of transformers do is written down by hooks, while they do it; and how they are made ready to be traced."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

UNCHECKED = "TRANSFORMERS_DISABLE_TORCH_CHECK"


@dataclass
class Call:
    """A pass of a decoder: what it was called with, what it gave, and the state after each of its layers."""

    given: dict[str, Any] = field(default_factory=dict)
    found: Any = None
    states: list[Tensor] = field(default_factory=list)


@contextmanager
def recorded(decoder: nn.Module) -> Iterator[Call]:
    """Write down a decoder's pass: arguments (all are given by name), result, and each layer's output."""
    call = Call()

    def before(module, args, given):
        call.given = given

    def after(module, args, given, found):
        call.found = found

    def layer(module, args, found):
        call.states.append(found[0] if isinstance(found, tuple) else found)

    with ExitStack() as hooks:
        hooks.enter_context(decoder.register_forward_pre_hook(before, with_kwargs=True))
        hooks.enter_context(decoder.register_forward_hook(after, with_kwargs=True))
        for one in decoder.layers:
            hooks.enter_context(one.register_forward_hook(layer))
        yield call


@contextmanager
def outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The modules' outputs in order of calls."""
    found: list[Tensor] = []

    def keep(module, args, output):
        found.extend(output if isinstance(output, list) else [output])

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(keep))
        yield found


@contextmanager
def exportable(model: nn.Module) -> Iterator[None]:
    """Let torch.export trace a model of transformers for any number of images.

    Its checks of sizes cannot be traced, and `len(tensor)` fixes a size at what the example has (transformers 5.23): in the model's file
    `len` is the first size, which stays free.
    """
    module, before = sys.modules[type(model).__module__], os.environ.get(UNCHECKED)
    os.environ[UNCHECKED] = "1"
    module.len = first_size
    try:
        yield
    finally:
        del module.len
        os.environ.pop(UNCHECKED)
        if before is not None:
            os.environ[UNCHECKED] = before


def first_size(value: Any) -> int:
    return value.shape[0] if isinstance(value, Tensor) else len(value)

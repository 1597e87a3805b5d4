"""A loss that mixes devices, or makes the host wait for the GPU, is noticed without a GPU."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from detrdistill import matching
from detrdistill.distill.build import build_distiller
from detrdistill.models import build_detector
from detrdistill.models.outputs import Targets
from detrdistill.recipes.identity import run_id
from detrdistill.recipes.presets import get_preset
from detrdistill.recipes.recipe import Recipe
from detrdistill.recipes.tables import TABLES, named_runs

ELSEWHERE = ("", "fgd", "detrdistill", "kd_detr")  # on features, on queries, and on queries of the teacher's


def recipes(detector: str, times: Callable[[int, int], int]) -> list[Recipe]:
    """A student of each method and a two-stage one, with --long of each switch too; of other detectors few: losses know no detector."""
    found = [one for one in named_runs(TABLES, [get_preset("smoke", detector)], [0]).values() if isinstance(one, Recipe)]
    switches = list({one.methods: one for one in found}.values())
    found = list({names_of(one): one for one in found}.values())
    if detector == "deformable_detr":
        found += [one for one in switches if one not in found][:: times(5, 1)]
        taught = next(one for one in found if one.methods)
        found.append(taught.replace(**{"form": "two_stage", "teacher.form": "two_stage"}))
    elif not times(0, 1):
        found = [one for one in found if names_of(one) in ELSEWHERE]
        assert len(found) == len(ELSEWHERE)
    if detector == "adamixer":
        return found
    # Two layers of an encoder do what six do.
    return [one.replace(encoder_layers=2, **({"teacher.encoder_layers": 2} if one.teacher else {})) for one in found]


def names_of(recipe: Recipe) -> str:
    return " ".join(method.name for method in recipe.methods)


class Waits(TorchDispatchMode):
    """Fake tensors refuse `item` and its like; this refuses what they let through: copies to the host, and indices that wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_") and found.device.type == "cpu" and args[-1 if name == "copy_" else 0].is_cuda:
            pytest.fail(f"{func}: to the host")
        if name in ("index", "index_put", "index_put_", "_unsafe_index") and args[0].is_cuda:
            for index in filter(lambda index: index is not None, args[1]):
                if not index.is_cuda or index.dtype == torch.bool:
                    pytest.fail(f"{func}: by {index.dtype} on {index.device}")
        return found


def on_gpu(module: nn.Module) -> nn.Module:
    """Moves parameters and buffers; anything else stays behind (`module.to` does not know fake tensors)."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            held |= {name: torch.empty(x.shape, dtype=x.dtype, device="cuda") for name, x in held.items() if x is not None}
    return module


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this build of torch does not know cuda")
@pytest.mark.parametrize("detector", ["deformable_detr", "conditional_detr", "adamixer"])
def test_losses_wait_for_the_gpu_once_and_mix_no_devices(monkeypatch, times, tries, detector):
    """Needs no GPU: these tensors say that they are on one and hold no numbers, so that torch refuses to read one, or to compute with
    one that is not there. Forward passes alone: a backward pass needs the device."""
    waits, threads, solve = [], set(), matching._solve

    def to_host(costs):
        waits.append({cost.device.type for cost in costs})
        return [np.zeros(cost.shape) for cost in costs]

    monkeypatch.setattr(matching, "_to_host", to_host)
    monkeypatch.setattr(matching, "_solve", lambda *words: threads.add(words[-1]) or solve(*words))
    monkeypatch.setattr(matching, "share_of_cores", lambda: 7)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    fake, teachers = FakeTensorMode(), {}
    for recipe in recipes(detector, times):
        waits.clear()
        with tries("losses on a GPU"), fake, Waits():
            distiller = on_gpu(build_distiller(build_detector(recipe, 10), recipe))
            if recipe.teacher and (name := run_id(recipe.teacher)) not in teachers:
                teachers[name] = on_gpu(build_detector(recipe.teacher, 10)).eval()
            teacher = teachers[run_id(recipe.teacher)] if recipe.teacher else None
            with torch.device("cuda"):
                pixels, padding = torch.empty(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool)
                targets = Targets(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, 4), [3, 1], 4.0, 2.0)
            outputs = distiller.teacher_outputs(teacher, pixels, padding) if teacher else []
            parts = distiller(pixels, padding, targets, outputs)
        assert {part.device.type for part in parts.values()} == {"cuda"} and waits == [{"cuda"}], recipe.title
    assert threads == {7}, "not torch's own number, which torchrun sets to 1"

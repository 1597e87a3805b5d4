"""Where a run computes: which device, how many processes, and who loads images."""

import os
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from detrdistill import matching
from detrdistill.boxes import area
from detrdistill.distill.build import build_distiller
from detrdistill.errors import InputError
from detrdistill.models import build_detector
from detrdistill.models.outputs import Targets
from detrdistill.recipes.identity import run_id
from detrdistill.recipes.presets import get_preset
from detrdistill.recipes.recipe import Recipe
from detrdistill.recipes.tables import TABLES, named_runs
from detrdistill.training import fabric as fabric_module
from detrdistill.training.fabric import loaders, make_fabric


def test_devices():
    for device in ("tpu", "cpu:1", "cuda:x", "auto:0"):
        with pytest.raises(InputError, match=rf"device '{device}' is unknown; use auto, cpu, cuda or cuda:1 \(the second GPU\)"):
            make_fabric(device, "fp32")
    with pytest.raises(InputError, match=r"device 'mps' is not supported: .*; use device 'cpu'"):
        make_fabric("mps", "fp32")
    assert make_fabric("cpu", "fp32").device == torch.device("cpu")


def test_one_of_several_gpus(monkeypatch):
    """Which GPU is asked for is what Fabric is asked for; nothing is launched, as there is none here."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(fabric_module, "Fabric", lambda **words: asked.append(words) or SimpleNamespace(launch=lambda: None))
    for device, devices in (("cuda:1", [1]), ("cuda:0", [0]), ("cuda", 1), ("cpu", 1)):
        make_fabric(device, "fp32")
        assert (asked[-1]["devices"], asked[-1]["accelerator"]) == (devices, "cpu" if device == "cpu" else "cuda")
    with pytest.raises(InputError, match="device 'cuda:2': this machine has 2 GPUs, counted from 0"):
        make_fabric("cuda:2", "fp32")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="device 'cuda:1': torchrun gives each process a GPU"):
        make_fabric("cuda:1", "fp32")


def test_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device 'cuda': torch finds no CUDA device"):
        make_fabric("cuda", "fp32")
    assert make_fabric("auto", "fp32").device == torch.device("cpu")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(InputError, match="3 processes on this machine, which has 2 GPUs; start at most 2, or use device 'cpu'"):
        make_fabric("auto", "fp32")


def test_one_process_in_a_slurm_job_of_many_tasks(monkeypatch):
    """How cores are reserved on many clusters: Fabric would refuse it."""
    for name, value in {"SLURM_NTASKS": "16", "SLURM_JOB_NAME": "job.sh", "SLURM_JOB_ID": "1", "SLURM_NODELIST": "n1"}.items():
        monkeypatch.setenv(name, value)
    assert make_fabric("cpu", "fp32").world_size == 1


def test_processes_wait_for_an_evaluation_as_long_as_it_takes(monkeypatch):
    """The first one evaluates; half an hour, as is usual, is too short for tens of thousands of images."""
    made = {}
    monkeypatch.setattr(fabric_module, "Fabric", lambda **options: made.update(options) or SimpleNamespace(launch=lambda: None))
    monkeypatch.setenv("WORLD_SIZE", "2")
    make_fabric("cpu", "fp32")
    assert made["strategy"]._timeout >= timedelta(hours=12)


@pytest.mark.parametrize(
    ("device", "cores", "processes", "wanted"), [("cpu", 16, 1, 0), ("cuda", 16, 1, 4), ("cuda", 16, 8, 1), ("cuda", 1, 1, 0)]
)
def test_who_loads_images_if_nothing_is_said(monkeypatch, device, cores, processes, wanted):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert loaders(SimpleNamespace(device=torch.device(device))) == wanted


def recipes(detector: str) -> list[Recipe]:
    """A student of each method and its switches, and a two-stage one; of other detectors one of each method: losses know no detector."""
    found = [one for one in named_runs(TABLES, [get_preset("smoke", detector)], [0]).values() if isinstance(one, Recipe)]
    if detector == "deformable_detr":
        found = list({one.methods: one for one in found}.values())
        taught = next(one for one in found if one.methods)
        found.append(taught.replace(**{"form": "two_stage", "teacher.form": "two_stage"}))
    else:
        found = list({tuple(method.name for method in one.methods): one for one in found}.values())
    if detector == "adamixer":
        return found
    # Two layers of an encoder do what six do.
    return [one.replace(encoder_layers=2, **({"teacher.encoder_layers": 2} if one.teacher else {})) for one in found]


class OnCuda(torch.Tensor):
    """Says that it is on a GPU, and computes here."""

    is_cuda = True


def test_what_a_gpu_computes_in_its_own_way_is_the_same(monkeypatch):
    given = torch.rand(4, 5, 2).requires_grad_()
    here = area(given)
    upstream = torch.randn(here.shape)
    wanted = [here.detach(), *torch.autograd.grad(here, given, upstream)]
    monkeypatch.setattr(torch.Tensor, "prod", lambda *words: pytest.fail("the CPU's way"))
    there = area(given.as_subclass(OnCuda)).as_subclass(torch.Tensor)
    for found, expected in zip([there.detach(), *torch.autograd.grad(there, given, upstream)], wanted, strict=True):
        torch.testing.assert_close(found, expected)


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
def test_losses_wait_for_the_gpu_once_and_mix_no_devices(monkeypatch, detector):
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
    for recipe in recipes(detector):
        waits.clear()
        with fake, Waits():
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

"""Where a run computes: which device, how many processes, and who loads images."""

import os
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from detrdistill.boxes import area
from detrdistill.errors import InputError
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

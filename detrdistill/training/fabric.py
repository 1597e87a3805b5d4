"""Lightning Fabric as the kit uses it: device, precision, processes."""

import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import Logger
from lightning_fabric.plugins import MixedPrecision, Precision
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.strategies import DDPStrategy

from detrdistill.errors import InputError
from detrdistill.process import share_of_cores

# How long processes wait for the first one's evaluation or crop training (the default is half an hour), and so for one that hangs.
PATIENCE = timedelta(hours=12)


class Autocast(MixedPrecision):
    """Mixed precision that leaves its inputs alone.

    Fabric's own rounds every number that a module is called with to bfloat16: pixels, but also boxes of the ground truth and the
    teacher's predictions, whose 8 bits are a few pixels of a large image. Autocast lowers what may be lowered by itself.
    """

    def convert_input(self, data: Any) -> Any:
        return data


def make_fabric(device: str, precision: str, loggers: Sequence[Logger] = ()) -> Fabric:
    """Fabric for this process, or for all processes of torchrun.

    Args:
        loggers: told what is logged while training.

    Raises:
        InputError: an unknown device, cuda where there is none, a GPU that is not there, or more processes than GPUs.
    """
    device, _, number = device.partition(":")
    if device == "mps":
        raise InputError("device 'mps' is not supported: nothing here was ever measured on it; use device 'cpu'")
    if device not in ("auto", "cpu", "cuda") or (number and (device != "cuda" or not number.isdecimal())):
        raise InputError(f"device '{device}{':' * bool(number)}{number}' is unknown; use auto, cpu, cuda or cuda:1 (the second GPU)")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda': torch finds no CUDA device here; use device 'cpu' or 'auto'")
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces each precision on standard error
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if number and (world > 1 or int(number) >= torch.cuda.device_count()):
        reason = "torchrun gives each process a GPU" if world > 1 else f"this machine has {torch.cuda.device_count()} GPUs, counted from 0"
        raise InputError(f"device 'cuda:{number}': {reason}; use device 'cuda'")
    if on_gpu and local > torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(f"{local} processes on this machine, which has {count} GPUs; start at most {count}, or use device 'cpu'")
    plugins: list[Any] = [Autocast("bf16-mixed", "cuda" if on_gpu else "cpu") if precision == "bf16" else Precision()]
    if world == 1:
        # Fabric would ask why a Slurm job of several tasks has but one process; such jobs are how people reserve cores.
        plugins.append(LightningEnvironment())
    fabric = Fabric(
        accelerator="cuda" if on_gpu else "cpu",
        devices=[int(number)] if number else local,
        num_nodes=world // local,
        strategy=DDPStrategy(timeout=PATIENCE) if world > 1 else "auto",
        plugins=plugins,
        loggers=list(loggers),
    )
    fabric.launch()
    return fabric


def loaders(fabric: Fabric) -> int:
    """How many processes load images if nothing is said: beside a GPU up to four; on the CPU none, since training takes its cores."""
    if fabric.device.type == "cpu":
        return 0
    return min(4, share_of_cores() - 1)

"""The optimizer's parameter groups and the schedule of its learning rate."""

import math

import torch
from torch import nn

from detrdistill.distill.distiller import Distiller
from detrdistill.recipes.parts import Schedule


def make_optimizer(distiller: Distiller, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW with the DETRs' groups: backbone, sampling offsets and reference points, the rest (adapters too)."""
    family = getattr(distiller.student, "family", None)  # of transformers, whose names are other
    backbone = family.backbone if family else "backbone"
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in distiller.named_parameters():
        if parameter.requires_grad:
            factor = 1.0
            if f".{backbone}." in f".{name}":
                factor = schedule.backbone_lr
            elif "sampling_offsets" in name or "reference_points" in name:
                factor = schedule.sampling_lr
            groups.setdefault(factor, []).append(parameter)
    settings = [{"params": parameters, "factor": factor, "lr": schedule.lr * factor} for factor, parameters in groups.items()]
    return torch.optim.AdamW(settings, weight_decay=schedule.weight_decay, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int, total: int) -> float:
    """Set the learning rate of every group for `step` (from 1) of `total`; returns that of groups with factor 1."""
    rate = schedule.lr * lr_factor(schedule, step, total)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    return rate


def lr_factor(schedule: Schedule, step: int, total: int) -> float:
    """Part of the learning rate at `step` (from 1): linear warm-up, then steps to a tenth, or a cosine to zero."""
    warm = min(1.0, step / (schedule.warmup + 1)) if schedule.warmup else 1.0
    progress = (step - 1) / total
    if schedule.decay == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * progress))
    return warm * 0.1 ** sum(progress >= drop for drop in schedule.drops)

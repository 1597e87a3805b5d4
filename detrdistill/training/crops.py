"""A thin backbone learns to classify crops of the training objects: a minute's stand-in for ImageNet."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from lightning_fabric import Fabric
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize
from tqdm.auto import tqdm

from detrdistill.data.coco import CocoDataset
from detrdistill.data.crops import object_crops
from detrdistill.errors import NonFiniteError
from detrdistill.models.backbones import classifier
from detrdistill.recipes.parts import MEAN, STD
from detrdistill.recipes.recipe import CropRecipe


def train_on_crops(
    fabric: Fabric, train: CocoDataset, val: CocoDataset, recipe: CropRecipe, *, progress: bool = True
) -> tuple[nn.Module, float]:
    """Train the recipe's classifier from scratch.

    Returns:
        the classifier and its accuracy on crops of `val`, in percent.

    Raises:
        InputError: a split has no objects, or an image cannot be decoded.
        NonFiniteError: the loss or the gradient is NaN or infinite.
    """
    plan = recipe.backbone.crops
    images, labels = object_crops(train, plan.size, plan.seed)
    unseen = object_crops(val, plan.size, plan.seed)  # now: if it has no objects, that is said before an hour of training
    # Around the training too, for backbones with dropout.
    with torch.random.fork_rng(devices=[fabric.device] if fabric.device.type == "cuda" else []):
        torch.manual_seed(plan.seed)
        model = classifier(recipe.backbone, len(train.categories))
        # Not set up by Fabric: of several processes, only one does this.
        model.to(fabric.device, memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), lr=plan.lr, weight_decay=plan.weight_decay, fused=True)
        order = np.random.default_rng(plan.seed)
        bar = tqdm(range(plan.steps), desc=recipe.title, unit="step", disable=not progress, mininterval=1)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = plan.lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / plan.steps))
            chosen = torch.from_numpy(order.choice(len(images), plan.batch, replace=len(images) < plan.batch))
            with fabric.autocast():
                scores = model(prepared(fabric, images[chosen]))
            loss = F.cross_entropy(scores.float(), fabric.to_device(labels[chosen]), label_smoothing=0.1)
            if not math.isfinite(loss.item()):
                raise NonFiniteError(f"crop training step {step + 1}: the loss is {loss.item()}; lower backbone.crops.lr ({plan.lr})")
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf)  # nothing is clipped
            if not math.isfinite(norm.item()):
                raise NonFiniteError(f"crop training step {step + 1}: the gradient is {norm.item()}; lower backbone.crops.lr ({plan.lr})")
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model, accuracy(fabric, model, *unseen)


@torch.no_grad()
def accuracy(fabric: Fabric, model: nn.Module, images: UInt8[Tensor, "N 3 H W"], labels: Int[Tensor, " N"]) -> float:
    """Part of the crops classified right, in percent."""
    model.eval()
    right = sum(
        (model(prepared(fabric, some)).argmax(1) == fabric.to_device(wanted)).sum().item()
        for some, wanted in zip(images.split(256), labels.split(256), strict=True)
    )
    return 100.0 * right / len(labels)


def prepared(fabric: Fabric, crops: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    images = normalize(fabric.to_device(crops).float() / 255, list(MEAN), list(STD))
    return images.contiguous(memory_format=torch.channels_last)

"""How hard each distillation loss pulls at the backbone, beside the detection loss: `make benchmark` writes pulls.csv.

The value of a loss does not say how much it moves the backbone. Its gradient there does, as the optimizer sees it: AdamW divides each
parameter's gradient by the root of its mean square.

Students of preset mini train on the digits as their rows do, with seed 0, once with the weights that a method came with and once with
those that it was tuned to. Every tenth step compares the two gradients, so divided: the ratio of their norms, and the cosine between
them. Medians over the steps, with their range.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.measure import Table, make_parser, spread, table_path
from detrdistill.data.coco import Batch
from detrdistill.distill.build import build_distiller
from detrdistill.distill.distiller import Distiller
from detrdistill.models import build_detector
from detrdistill.recipes.identity import parents
from detrdistill.recipes.presets import Preset, get_preset
from detrdistill.recipes.recipe import Recipe
from detrdistill.recipes.tables import components, follow_ups, main_results, prior_methods
from detrdistill.recipes.words import ADAMIXER
from detrdistill.runs.load import load_detector, open_split, start_backbone
from detrdistill.runs.provenance import commit
from detrdistill.runs.run import run
from detrdistill.runs.store import Store
from detrdistill.training.batches import Draws, micro_batches, mix
from detrdistill.training.optimizer import make_optimizer, set_lr

COLUMNS = ("row", "multiplier", "steps", "of the loss", "of the gradient", "low", "high", "cosine")
EVERY = 10  # steps
SCALES = {"full": ("mini", 150), "quick": ("mini", 30), "small": ("smoke", 2)}  # preset and steps


def rows(preset: Preset) -> dict[tuple[str, float], Recipe]:
    """Each method, and each of DETRDistill's losses alone, with its first weights and with its tuned ones."""
    found = {}
    untuned = replace(preset, tuned={})
    for weights in (untuned, preset):
        for make in (main_results, prior_methods, follow_ups, components):
            for row in make([weights], [0]).rows:
                (recipe,) = row.recipes.values()
                name = row.tuned_as or (recipe.methods[0].name if recipe.methods else "")
                if name and (row.tuned_as or make is not components):
                    found[name, 1.0 if weights is untuned else preset.tuned.get(name, 1.0)] = recipe
    return dict(sorted(found.items(), key=lambda one: one[0]))


def gradient(loss: Tensor, parameters: Sequence[nn.Parameter], optimizer: torch.optim.AdamW) -> Tensor:
    """Of all parameters in one vector, each divided as AdamW would divide it now; the graph stays."""
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    squares = [optimizer.state[parameter]["exp_avg_sq"] for parameter in parameters]
    eps = optimizer.defaults["eps"]
    return torch.cat([(one / (square.sqrt() + eps)).flatten() for one, square in zip(found, squares, strict=True)])


def pulls(recipe: Recipe, store: Store, last: int) -> Iterator[tuple[int, float, float, float]]:
    """Train to step `last`; of every tenth step its number, and the distillation's part of the loss, gradient ratio and cosine."""
    for parent in parents(recipe).values():
        run(parent, store, device="cpu", workers=0, progress=False, reference=True)
    data = open_split(recipe, "train")
    teacher = load_detector(recipe.teacher, store, data).requires_grad_(False).to(memory_format=torch.channels_last)
    student = build_detector(recipe, len(data.categories))
    start_backbone(student, recipe, store)
    torch.manual_seed(mix(recipe.seed, 1))
    distiller = build_distiller(student, recipe).to(memory_format=torch.channels_last).train()
    backbone = [parameter for parameter in student.backbone.parameters() if parameter.requires_grad]
    schedule, total = recipe.schedule, recipe.schedule.total_steps(len(data))
    optimizer = make_optimizer(distiller, schedule)
    draws = Draws(len(data), schedule.batch, recipe.seed, 0, total, 1, 0, 1)
    with closing(micro_batches(data, draws, workers=0)) as batches:
        for step, (batch,) in enumerate(batches, start=1):
            set_lr(optimizer, schedule, step, total)
            torch.manual_seed(mix(recipe.seed, step, 0))
            detection, distillation = losses(distiller, teacher, batch, schedule.batch)
            if step % EVERY == 0 or step == last:
                with_objects, with_teacher = (gradient(loss, backbone, optimizer) for loss in (detection, distillation))
                ratio = with_teacher.norm() / with_objects.norm()
                cosine = torch.cosine_similarity(with_teacher, with_objects, dim=0)
                yield step, (distillation / (detection + distillation)).item(), ratio.item(), cosine.item()
            if step == last:
                return
            optimizer.zero_grad()
            (detection + distillation).backward()
            nn.utils.clip_grad_norm_(distiller.parameters(), schedule.clip_norm or math.inf)
            optimizer.step()


def losses(distiller: Distiller, teacher: nn.Module, batch: Batch, images: int) -> tuple[Tensor, Tensor]:
    """Detection and distillation, as the trainer sums them."""
    boxes = max(1.0, float(batch.targets.objects(distiller.student.most_objects)))
    targets = replace(batch.targets, step_boxes=boxes, step_images=float(images))
    seen = batch.pixels.contiguous(memory_format=torch.channels_last), batch.padding
    parts = distiller(*seen, targets, distiller.teacher_outputs(teacher, *seen))
    detection = [value.sum() for name, value in parts.items() if name.startswith("detection/")]
    others = [value.sum() for name, value in parts.items() if not name.startswith("detection/")]
    return torch.stack(detection).sum(), torch.stack(others).sum()


def main(words: Sequence[str] | None = None) -> None:
    arguments = make_parser(__doc__).parse_args(words)
    torch.set_num_threads(1)
    name, last = SCALES[arguments.scale]
    preset = get_preset(name, ADAMIXER)
    table = Table(table_path(arguments, "pulls.csv"), COLUMNS)
    about = f"preset {preset.name}, seed 0, medians of every {EVERY}th of {last} steps with their range"
    table.start(f"commit {commit()}; torch {torch.__version__}, one CPU thread; {about}")
    with tempfile.TemporaryDirectory() as folder:
        for (name, multiplier), recipe in rows(preset).items():
            steps, parts, ratios, cosines = zip(*pulls(recipe, Store(folder), last), strict=True)
            found = {"of the loss": spread(parts)["value"], **spread(ratios, "of the gradient"), "cosine": spread(cosines)["value"]}
            table.add({"row": name, "multiplier": multiplier, "steps": steps[-1]} | found)


if __name__ == "__main__":
    main()

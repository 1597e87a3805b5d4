"""Presets: the same tables at different scales, from seconds to GPU-days. Each states what it costs and what to expect.

A preset is a teacher and a student; every row of every table is one of the two, or the student under a method.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from detrdistill.data.layout import pinned
from detrdistill.errors import InputError
from detrdistill.experiments.recipes import (
    Backbone,
    CropRecipe,
    CropTraining,
    DETRDistill,
    Digits,
    Folder,
    Recipe,
    Resize,
    Schedule,
    parents,
    run_id,
)

SETTINGS = ("teacher", "student", "detrdistill")


@dataclass(frozen=True)
class Preset:
    """Recipes of one scale.

    Attributes:
        method: DETRDistill with the weights of this preset.
        floor: AP that the teacher must exceed.
    """

    name: str
    teacher: Recipe
    student: Recipe
    method: DETRDistill
    floor: float

    def recipe(self, setting: str, seed: int = 0) -> Recipe:
        """The recipe of one row; the teacher is one and the same for all seeds.

        Raises:
            InputError: an unknown setting.
        """
        if setting == "teacher":
            return self.teacher
        if setting == "student":
            return self.student.replace(seed=seed)
        if setting == "detrdistill":
            return self.student.replace(seed=seed, methods=(self.method,), teacher=self.teacher, teacher_floor=self.floor)
        raise InputError(f"setting '{setting}' is unknown; known: {', '.join(SETTINGS)}")

    def pinned(self) -> Self:
        """The same with the hash of its data filled in: its runs then have the names that `runs.run` gives them.

        Raises:
            InputError: the data folder is missing or not laid out as expected.
        """
        return replace(self, teacher=pinned(self.teacher), student=pinned(self.student))

    def runs(self, seeds: Sequence[int]) -> dict[str, Recipe | CropRecipe]:
        """All runs of the tables by id, those that others depend on included."""
        waiting: list[Recipe | CropRecipe] = [self.recipe(setting, seed) for setting in SETTINGS for seed in seeds]
        found: dict[str, Recipe | CropRecipe] = {}
        while waiting:
            recipe = waiting.pop(0)
            found[run_id(recipe)] = recipe
            waiting += parents(recipe).values()
        return found


def thin(width: int, *blocks: int, steps: int) -> Backbone:
    crops = CropTraining(steps=steps, lr=1e-2, weight_decay=0.05)
    return Backbone(name="thin_resnet", width=width, blocks=blocks, weights="crops", crops=crops)


def quick() -> Preset:
    """The README's main job. Two cores, under 8 minutes with the stored teacher."""
    student = Recipe(
        form="box_refine",
        backbone=thin(16, 1, 1, 1, 1, steps=1500),
        dim=64,
        heads=4,
        ffn=256,
        encoder_layers=1,
        decoder_layers=3,
        queries=20,
        levels=3,
        points=4,
        dropout=0.0,
        data=Digits(size=96, train=4000, val=400),
        resize=Resize(train="jitter", short=96, long=96),
        schedule=Schedule(steps=600, batch=16, lr=1e-3, backbone_lr=1.0, warmup=30, decay="cosine", clip_norm=1.0, evaluations=6),
    )
    teacher = student.replace(backbone=thin(24, 1, 1, 2, 1, steps=2000), **{"schedule.steps": 4000})
    # The raw dot products of Eq. 7 make Eq. 9 some fifteen times as large as the detection loss at first: log.jsonl.
    return Preset("quick", teacher, student, DETRDistill(features=0.1), floor=45.0)


def smoke() -> Preset:
    """A few steps on a few images: seconds. For tests; its numbers mean nothing."""
    base = quick()
    tiny = {
        "backbone": Backbone(name="thin_resnet", width=8, weights="crops", crops=CropTraining(steps=4, batch=16)),
        "data": Digits(size=64, train=32, val=8),
        "resize": Resize(train="jitter", short=64, long=64),
        "schedule": Schedule(steps=6, batch=4, lr=1e-3, backbone_lr=1.0, decay="cosine", evaluations=2),
        "dim": 32,
        "decoder_layers": 2,
    }
    student = base.student.replace(**tiny)
    return Preset("smoke", student.replace(seed=1), student, base.method, floor=-1.0)


def coco() -> Preset:
    """The paper's Deformable DETR: R101 to R50, 50 epochs, COCO 2017 in data/coco. GPU-days; needs network or weight files once."""
    student = Recipe(
        backbone=Backbone(name="resnet50"),
        data=Folder(path=Path("data/coco")),
        resize=Resize(train="detr", short=800, long=1333),
        schedule=Schedule(epochs=50, batch=32, lr=2e-4, backbone_lr=0.1, sampling_lr=0.1, drops=(0.8,), evaluations=10),
        precision="bf16",
    )
    return Preset("coco", student.replace(backbone=Backbone(name="resnet101")), student, DETRDistill(), floor=43.0)


PRESETS: dict[str, Callable[[], Preset]] = {"smoke": smoke, "quick": quick, "coco": coco}


def get_preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        InputError: there is none.
    """
    if name not in PRESETS:
        raise InputError(f"preset '{name}' is unknown; known: {', '.join(PRESETS)}")
    return PRESETS[name]()

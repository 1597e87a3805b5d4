"""Presets: the same tables at different scales, from seconds to GPU-days. Each states what it costs and what to expect.

A preset is a teacher and a student; every row of every table is one of the two, or the student under a method.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from detrdistill.errors import InputError
from detrdistill.recipes.family_presets import FLOORS, SMALL, mini_family, smoke_family
from detrdistill.recipes.methods import METHODS, DETRDistill, Method
from detrdistill.recipes.parts import BackboneRecipe, CropTraining, Digits, Folder, Resize, Schedule, WeightsFile
from detrdistill.recipes.recipe import Recipe
from detrdistill.recipes.words import ADAMIXER, CONDITIONAL, DEFORMABLE, DETECTORS

DETECTORS_OF = {"quick": (DEFORMABLE,)}  # presets that have recipes for some detectors alone
IF_NAMED = {"smoke": SMALL, "mini": SMALL}  # and for these too, which are left out where none is named
# ImageNet weights that bccd's backbones start from; docs/real_photographs.md says where they come from.
RESNET = WeightsFile(name="resnet50_msra.pth", sha256="c5689fab4fd32526a2f6b1340fcd7af8b0d77679f3f5e85ef47fe9f5fc2e6cfe")
MOBILENET = WeightsFile(name="mobilenet_v2.pth", sha256="dfcc5335d1291d378552024779e55ea3e1d5c6d3d6a788a93ca66af63acd8349")
NOT_OF_FAMILIES = (
    "prior_methods", "encoder_decoder", "stage_mapping", "self_distillation", "components", "logits", "feature_masks", "light_backbones",
    "discrepancies", "follow_ups", "full_schedule", "where_to_look",
)  # fmt: skip
RIVALS = ("fgd", "mgd", "fitnet")  # of Table 3
# Found on other digits than the reported ones, by `make reproduce PRESET=mini TABLE=weights` (`tuning`), which a test compares with this.
TUNED: dict[str, dict[str, float]] = {
    DEFORMABLE: {
        "detrdistill": 3.0, "fgd": 100.0, "mgd": 30.0, "fitnet": 10.0, "kd_detr": 0.1, "pkd": 0.3, "cwd": 1e-4,
    },
    CONDITIONAL: {},
    ADAMIXER: {
        "detrdistill": 3.0, "fgd": 3e-4, "mgd": 10.0, "fitnet": 1e-3, "fkd": 3.0, "pkd": 3e-3, "cwd": 1e-3, "features": 3e-3,
        "positives, last stage": 3.0, "positives, stage by stage": 3.0, "positives and negatives, last stage": 0.3,
        "each divided by its own pairs": 0.3, "joint matching (released code)": 3.0, "all cells alike (FitNet)": 1e-3,
        "ground-truth boxes": 0.01, "query masks (Eq. 7)": 3e-3, "the released form": 0.03,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """Recipes of one scale.

    Attributes:
        method: DETRDistill with the weights of this preset, before tuning.
        floor: AP that the teacher must exceed.
        rivals: methods that the main results compare with.
        light: lighter backbones of students, as in Table 10.
        left_out: tables of several detectors that this one is not in, unless it is asked for alone.
        mappings: of decoder stages that Table 5 compares; empty: all.
        students_a_teacher: so many seeds of students learn from one teacher, the next ones from another; None: all from one.
        tuned: what the weights of a row are multiplied by, by the row's name; 1 for those that are not named. Found by `tuning`.
    """

    name: str
    teacher: Recipe
    student: Recipe
    method: DETRDistill
    floor: float
    rivals: tuple[str, ...] = ()
    light: tuple[BackboneRecipe, ...] = ()
    left_out: tuple[str, ...] = ()
    mappings: tuple[str, ...] = ()
    students_a_teacher: int | None = None
    tuned: Mapping[str, float] = field(default_factory=dict)

    @property
    def settings(self) -> tuple[str, ...]:
        """Rows of the main results."""
        return ("teacher", "student", *self.rivals, "detrdistill")

    def recipe(self, setting: str, seed: int = 0) -> Recipe:
        """The recipe of one row.

        Args:
            setting: "teacher", "student", or methods joined by "+", such as "fgd" or "detrdistill+fgd".
            seed: of the student; "teacher" is the one that this student learns from.

        Raises:
            InputError: an unknown setting.
        """
        if setting == "teacher":
            return self.teacher_of(seed)
        if setting == "student":
            return self.student.replace(seed=seed)
        names = setting.split("+")
        if unknown := [name for name in names if name not in METHODS]:
            raise InputError(f"setting '{unknown[0]}' is unknown; known: teacher, student, {', '.join(METHODS)}, and these joined by '+'")
        return self.taught(seed, *(self.tuned_method(name) for name in names))

    def teacher_of(self, seed: int) -> Recipe:
        """The teacher of the student with this seed: the first, or one of the same recipe with seeds (the backbone's too) of its own.

        So what a teacher contributes by chance is in the spread of the students, as far as seeds have different teachers.
        """
        number = seed // self.students_a_teacher if self.students_a_teacher else 0
        if not number:
            return self.teacher
        changes = {"seed": self.teacher.seed + number}
        if self.teacher.backbone.crops is not None:
            changes["backbone.crops.seed"] = self.teacher.backbone.crops.seed + number
        return self.teacher.replace(**changes)

    def taught(self, seed: int, *methods: Method) -> Recipe:
        """A student under methods with whatever weights they have."""
        return self.student.replace(seed=seed, methods=methods, teacher=self.teacher_of(seed), teacher_floor=self.floor)

    def tuned_method(self, name: str, changes: Mapping[str, object] | None = None, row: str | None = None) -> Method:
        """A method, with other switches if `changes`, and its weights as they were tuned for the method or for another `row`."""
        method = self.method if name == "detrdistill" else METHODS[name]()
        return method.replace(**(changes or {})).times(self.tuned.get(row or name, 1.0))


def thin(width: int, *blocks: int, steps: int) -> BackboneRecipe:
    crops = CropTraining(steps=steps, lr=1e-2, weight_decay=0.05)
    return BackboneRecipe(name="thin_resnet", width=width, blocks=blocks, weights="crops", crops=crops)


def of_family(name: str, teacher: Recipe, student: Recipe, floor: float) -> Preset:
    """A preset of a family of transformers, for the main results alone; nothing normalises its maps."""
    method = DETRDistill(features=0.0, normalised=True)
    several = 3 if name == "mini" else None
    return Preset(name, teacher, student, method, floor, ("fitnet",), left_out=NOT_OF_FAMILIES, students_a_teacher=several)


def mini(detector: str = DEFORMABLE) -> Preset:
    """All tables on the embedded data: two to five minutes a student on one core, Conditional DETR 14 to 25, a teacher 10 to 60.

    Detectors were tuned plain, the weight of the features with `quick`: docs/design.md, "How the presets were made".
    """
    wide, narrow = thin(24, 1, 1, 2, 1, steps=2000), thin(16, 1, 1, 1, 1, steps=1500)
    if one_of(detector, "mini") in SMALL:
        return of_family("mini", *mini_family(detector, wide, narrow), FLOORS[detector])
    own = {
        DEFORMABLE: {"form": "box_refine", "encoder_layers": 1, "levels": 3, "points": 4},
        # Attention over a whole map finds small things late: it needs twice the pixels, the width, the steps, and codes that tell
        # places apart. With 96 pixels, 64 channels, temperature 10000 and lr 1e-3 AP was 3 after 2,400 steps; with a schedule of
        # 1,200 it was 3 as well. A second encoder layer delays the take-off by luck: plain students then ended at 24, 26 and 42.
        CONDITIONAL: {
            "encoder_layers": 1, "decoder_layers": 4, "queries": 60, "dim": 128, "heads": 8, "temperature": 20.0, "backbone.dilation": True,
            "resize.short": 192, "resize.long": 192, "schedule.lr": 5e-4, "schedule.steps": 2000,
        },
        ADAMIXER: {"in_points": 16, "out_points": 32, "groups": 2, "schedule.lr": 5e-4},
    }  # fmt: skip
    floors = {DEFORMABLE: 45.0, CONDITIONAL: 30.0, ADAMIXER: 45.0}
    student = Recipe(
        detector=detector,
        backbone=narrow,
        dim=64,
        heads=4,
        ffn=256,
        decoder_layers=3,
        queries=20,
        dropout=0.0,
        data=Digits(size=96, train=4000, val=400),
        resize=Resize(train="jitter", short=96, long=96),
        schedule=Schedule(steps=600, batch=16, lr=1e-3, backbone_lr=1.0, warmup=30, decay="cosine", clip_norm=1.0, evaluations=6),
    ).replace(**own[detector])
    larger = wide.replace(dilation=student.backbone.dilation)
    teacher = student.replace(backbone=larger, **{"schedule.steps": 4000})
    if detector == CONDITIONAL:  # the weights of the backbone with seed 0, which other teachers started from, were not kept
        teacher = teacher.replace(**{"backbone.crops.seed": 2})
    light = (thin(12, 1, 1, 1, 1, steps=1500), thin(8, 1, 1, 1, 1, steps=1500))
    # The raw dot products of Eq. 7 make Eq. 9 some fifteen times as large as the detection loss at first: log.jsonl.
    # Conditional DETR's runs take four times as long as the others', so that it has fewer tables.
    fewer = {"left_out": ("self_distillation", "light_backbones", "follow_ups"), "mappings": ("grouped", "uniform", "last_only")}
    return Preset(
        "mini",
        teacher,
        student,
        DETRDistill(features=0.1),
        floors[detector],
        RIVALS,
        light,
        students_a_teacher=3,
        tuned=TUNED[detector],
        **(fewer if detector == CONDITIONAL else {}),
    )


def quick(detector: str = DEFORMABLE) -> Preset:
    """The README's main job: Deformable DETR of preset mini, without rivals. Three minutes on two cores, after set-up."""
    small = mini(one_of(detector, "quick"))
    return replace(small, name="quick", rivals=(), light=small.light[1:], students_a_teacher=None, tuned={})


def smoke(detector: str = DEFORMABLE) -> Preset:
    """A few steps on a few images: seconds. For tests; its numbers mean nothing."""
    if one_of(detector, "smoke") in SMALL:
        # With fewer channels oneDNN's strided convolutions write beyond their memory: `models.backbones.Shortcut`.
        narrow = BackboneRecipe(name="thin_resnet", width=16, weights="crops", crops=CropTraining(steps=4, batch=16))
        return of_family("smoke", *smoke_family(detector, narrow), floor=-1.0)
    own = {
        DEFORMABLE: {"form": "box_refine", "encoder_layers": 1, "levels": 3},
        CONDITIONAL: {"encoder_layers": 1, "backbone.dilation": True},
        ADAMIXER: {"in_points": 4, "out_points": 8, "groups": 2},
    }
    student = Recipe(
        detector=detector,
        backbone=BackboneRecipe(name="thin_resnet", width=8, weights="crops", crops=CropTraining(steps=4, batch=16)),
        dim=32,
        heads=4,
        ffn=256,
        decoder_layers=2,
        queries=20,
        dropout=0.0,
        data=Digits(size=64, train=32, val=8),
        resize=Resize(train="jitter", short=64, long=64),
        schedule=Schedule(steps=6, batch=4, lr=1e-3, backbone_lr=1.0, decay="cosine", evaluations=3),
    ).replace(**own[detector])
    light = (BackboneRecipe(name="thin_resnet", width=4, weights="crops", crops=CropTraining(steps=4, batch=16)),)
    return Preset("smoke", student.replace(seed=1), student, DETRDistill(features=0.1), floor=-1.0, rivals=RIVALS, light=light)


def bccd(detector: str = DEFORMABLE) -> Preset:
    """Real photographs: blood cells under a microscope, ResNet-50 to MobileNetV2, both on one schedule. See docs/real_photographs.md.

    Plain students alone were tried, on the images that are reported. Deformable DETR was best at 400 to 600 steps of 1,000 and overfits
    then; AdaMixer reaches an AP of 50 in 600 steps. Conditional DETR takes off after 400 and has 9 then: 600 steps are too few for it,
    and how many are enough is not known yet.
    Methods have the weights that the digits were tuned to. Where the backbones' files lie is found when a run starts.
    """
    own = {
        DEFORMABLE: {"form": "box_refine", "encoder_layers": 1, "levels": 3},
        CONDITIONAL: {"encoder_layers": 1, "temperature": 20.0, "backbone.dilation": True},
        ADAMIXER: {"in_points": 16, "out_points": 32, "groups": 2},
    }
    floors = {DEFORMABLE: 30.0, CONDITIONAL: 20.0, ADAMIXER: 30.0}
    student = Recipe(
        detector=one_of(detector, "bccd"),
        backbone=BackboneRecipe(name="mobilenet_v2", weights=MOBILENET),
        dim=128,
        ffn=512,
        decoder_layers=3,
        queries=60,
        dropout=0.0,
        data=Folder(path=Path("data/bccd")),
        resize=Resize(train="flip", short=180, long=240),
        schedule=Schedule(steps=600, batch=8, lr=4e-4, warmup=50, decay="cosine", clip_norm=1.0, evaluations=6),
        precision="bf16",
    ).replace(**own[detector])
    larger = BackboneRecipe(name="resnet50", weights=RESNET, stride_in_1x1=True, dilation=student.backbone.dilation)
    rivals = RIVALS if detector == DEFORMABLE else ("fitnet",)
    method = DETRDistill(features=0.1)
    return Preset("bccd", student.replace(backbone=larger), student, method, floors[detector], rivals, tuned=TUNED[detector])


def coco(detector: str = DEFORMABLE) -> Preset:
    """The paper's own: R101 to R50, COCO 2017 in data/coco. GPU-days; needs network or weight files once.

    Schedules and sizes are those of the detectors' official codes: 50 epochs, AdaMixer 12 with 100 queries.
    """
    schedule = {
        DEFORMABLE: {"epochs": 50, "batch": 32, "lr": 2e-4, "backbone_lr": 0.1, "sampling_lr": 0.1, "drops": (0.8,)},
        CONDITIONAL: {"epochs": 50, "batch": 16, "lr": 1e-4, "backbone_lr": 0.1, "drops": (0.8,)},
        ADAMIXER: {"epochs": 12, "batch": 16, "lr": 2.5e-5, "backbone_lr": 1.0, "drops": (8 / 12, 11 / 12)},
    }
    own = {
        DEFORMABLE: {},
        CONDITIONAL: {"ffn": 2048},
        ADAMIXER: {"ffn": 2048, "queries": 100, "dropout": 0.0, "resize.train": "flip", "schedule.warmup": 500, "schedule.clip_norm": 1.0},
    }
    student = Recipe(
        detector=one_of(detector, "coco"),
        backbone=BackboneRecipe(name="resnet50"),
        data=Folder(path=Path("data/coco")),
        resize=Resize(train="detr", short=800, long=1333),
        schedule=Schedule(**schedule[detector], evaluations=10),
        precision="bf16",
    ).replace(**own[detector])
    # Some two and a half AP below the teachers of Table 3.
    floors = {DEFORMABLE: 43.0, CONDITIONAL: 40.0, ADAMIXER: 41.0}
    teacher = student.replace(backbone=BackboneRecipe(name="resnet101"))
    light = (BackboneRecipe(name="resnet18"), BackboneRecipe(name="mobilenet_v2"))
    return Preset("coco", teacher, student, DETRDistill(), floors[detector], RIVALS, light)


def one_of(detector: str, preset: str) -> str:
    """`detector`, if the preset has recipes for it.

    Raises:
        InputError: it has none.
    """
    known = detectors_of(preset)
    if detector not in known:
        raise InputError(f"preset {preset} has no recipes for detector '{detector}'; it has them for: {', '.join(known)}")
    return detector


def detectors_of(preset: str) -> tuple[str, ...]:
    """All detectors that the preset has recipes for."""
    return (*DETECTORS_OF.get(preset, DETECTORS), *IF_NAMED.get(preset, ()))


PRESETS: dict[str, Callable[[str], Preset]] = {"smoke": smoke, "quick": quick, "mini": mini, "bccd": bccd, "coco": coco}


def get_preset(name: str, detector: str = DEFORMABLE) -> Preset:
    """The preset called `name`, for one detector.

    Raises:
        InputError: there is none.
    """
    if name not in PRESETS:
        raise InputError(f"preset '{name}' is unknown; known: {', '.join(PRESETS)}")
    return PRESETS[name](detector)


def get_presets(name: str, detectors: Sequence[str] = ()) -> list[Preset]:
    """The preset called `name`, for each of the detectors; if none are named, for those of the kit's own that it has recipes for.

    Raises:
        InputError: there is no such preset, or not for a detector that was named.
    """
    return [get_preset(name, detector) for detector in detectors or DETECTORS_OF.get(name, DETECTORS)]

"""A recipe is everything that decides a run's numbers; its hash is the run's name. No torch here: reports read recipes too.

Whatever does not change the numbers (device, worker processes, where results lie) is not in a recipe but an argument of
`runs.run`. Unknown keys are refused, text such as "1e-4" is accepted where a number is meant (papermill's YAML passes it so).
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from detrdistill.recipes.families import FAMILIES, Family
from detrdistill.recipes.methods import DETRDistill, Methods
from detrdistill.recipes.parts import BackboneRecipe, DetectorWeights, Digits, Folder, Resize, Schedule
from detrdistill.recipes.schema import Fraction, Strict

# Fields that not every detector has, and whose they are.
OWN = ("deformable_detr", "conditional_detr", "adamixer")
OWNERS = {
    "heads": OWN,
    "ffn": OWN,
    "dropout": OWN,
    "form": ("deformable_detr",),
    "levels": ("deformable_detr", *FAMILIES),
    "config": tuple(FAMILIES),
    "points": ("deformable_detr",),
    "encoder_layers": ("deformable_detr", "conditional_detr"),
    "temperature": ("conditional_detr",),
    "feature_dim": ("adamixer",),
    "in_points": ("adamixer",),
    "out_points": ("adamixer",),
    "groups": ("adamixer",),
}


class Recipe(Strict):
    """One training run. The sizes that are the defaults are Deformable DETR's own (ICLR 2021, R50, 4 levels).

    Conditional DETR's own differ in ffn 2048; AdaMixer's in ffn 2048, queries 100 and dropout 0. Each detector's own schedule stands
    in `presets.coco`; the schedule's defaults are Conditional DETR's. Of the sizes, the families of transformers (`families`) have dim,
    decoder_layers, queries and levels; the rest of them, their backbone too unless it is
    trained on crops, is in `config`.
    """

    detector: Literal[
        "deformable_detr", "conditional_detr", "adamixer",
        "rt_detr", "rt_detr_v2", "d_fine", "deimv2", "rf_detr", "lw_detr", "dab_detr", "detr",
    ] = "deformable_detr"  # fmt: skip
    form: Literal["plain", "box_refine", "two_stage"] = Field(
        "plain", description="Deformable DETR: plain, iterative box refinement, or two-stage"
    )
    backbone: BackboneRecipe = BackboneRecipe()
    dim: PositiveInt = 256
    heads: PositiveInt = 8
    ffn: PositiveInt = 1024
    encoder_layers: NonNegativeInt = 6
    decoder_layers: PositiveInt = 6
    queries: PositiveInt = 300
    levels: PositiveInt = 4
    points: PositiveInt = 4
    dropout: Fraction = 0.1
    temperature: PositiveFloat = Field(10000.0, description="Conditional DETR: of the sine codes of positions; DAB-DETR takes 20")
    feature_dim: PositiveInt | None = Field(None, description="AdaMixer: channels of the neck's maps; as 'dim' if not given")
    in_points: PositiveInt = Field(32, description="AdaMixer: points sampled for a query, a group")
    out_points: PositiveInt = Field(128, description="AdaMixer: points that they are mixed to")
    groups: PositiveInt = Field(4, description="AdaMixer: groups of channels with points of their own")
    config: dict[str, Any] = Field({}, description="families of transformers: entries of the configuration that are not its defaults")
    start: DetectorWeights | None = Field(
        None, description="weights of the whole detector that it starts from; with schedule.steps 0 the run is that detector as it is"
    )
    methods: Methods = ()
    teacher: "Recipe | None" = None
    teacher_floor: float = Field(0.0, le=100, description="AP that the teacher must exceed before it may teach")
    data: Annotated[Digits | Folder, Field(discriminator="name")] = Digits()
    resize: Resize = Resize()
    schedule: Schedule
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.family is None and (self.dim % self.heads or self.dim % 4):
            raise ValueError(f"'dim' {self.dim} must be a multiple of 'heads' {self.heads} and of 4")
        for name, owners in OWNERS.items():
            held, default = getattr(self, name), type(self).model_fields[name].default
            if self.detector not in owners and held != default:
                raise ValueError(f"{self.detector} has no '{name}' (that is of {', '.join(owners)}); leave it at {default}, not {held}")
        width = self.feature_width
        if self.detector == "adamixer" and (self.dim % 8 or width % self.groups):
            raise ValueError(f"AdaMixer's 'dim' {self.dim} must be a multiple of 8, its feature channels {width} of 'groups' {self.groups}")
        if self.detector in ("deformable_detr", "adamixer") and width % 32:
            raise ValueError(f"{width} feature channels cannot be normalised in 32 groups; choose a multiple of 32")
        if self.family and self.backbone.weights != "crops" and self.backbone != BackboneRecipe():
            raise ValueError(
                f"{self.family.title} has its backbone in 'config.backbone_config'; 'backbone' is for one with crop-trained weights alone"
            )
        if self.start is None and (self.backbone.weights == "start" or self.schedule.steps == 0):
            raise ValueError(
                "schedule.steps 0 trains nothing: name a detector that others trained as 'start' (--start MODEL), or give 1 or more"
            )
        if self.published and self.methods:
            raise ValueError("schedule.steps 0 is for a published detector as it is, which nobody teaches; give the student some steps")
        if bool(self.methods) != (self.teacher is not None):
            raise ValueError("a distillation method needs a 'teacher', and a teacher needs a method; give both or neither")
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names):
            raise ValueError(f"'methods' names one method twice: {', '.join(names)}")
        if self.teacher is not None:
            self._teacher_fits(self.teacher)
        for one in filter(None, (self, self.teacher)):  # which sees the student's images
            self._images_fit(one)
        return self

    def _images_fit(self, detector: "Recipe") -> None:
        """Refuse images whose sides a family cannot take, before anything is trained."""
        if detector.family is None or (multiple := detector.family.sides_of(detector.config)) == 1:
            return
        resize, of_one_size = self.resize, self.resize.stretch or (self.data.name == "digits" and self.resize.train != "detr")
        sides = (resize.short, resize.long) if resize.stretch else (min(resize.short, resize.long),)
        if not of_one_size or any(side % multiple for side in sides):
            raise ValueError(
                f"{detector.family.title} takes images whose sides are multiples of {multiple}: set resize.stretch=true, and resize.short "
                f"(now {resize.short}) and resize.long ({resize.long}) to such numbers"
            )

    def _teacher_fits(self, teacher: "Recipe") -> None:
        """Refuse what no loss could make sense of."""
        same = teacher.query_form == self.query_form
        for method in self.methods:
            if not same and (method.compares_maps or method.shares_queries):
                raise ValueError(
                    f"{method.name}: features and queries of detector {teacher.detector} mean something else to {self.detector}; take a "
                    "teacher whose queries have the same form, or compare predictions alone: "
                    "--set detrdistill.features=0 --set detrdistill.assignment=0"
                )
            if method.needs_own_layers and (family := self.family or teacher.family):
                raise ValueError(
                    f"{method.name}: {method.needs_own_layers} cannot be had from transformers' {family.title}; "
                    f"{'leave references at teacher' if method.name == 'detrdistill' else 'take another method'}"
                )
            if method.compares_maps and getattr(method, "maps", "") == "neck" and self.tells_neck != teacher.tells_neck:
                raise ValueError(
                    f"{method.name}: of {self.detector} and its teacher {teacher.detector} one has maps before the encoder that are as "
                    f"wide as those after it, one has not; take {method.name}.maps=features"
                )
            if method.compares_maps and self.levels != teacher.levels:
                raise ValueError(f"'levels' {self.levels} must be the teacher's {teacher.levels}: {method.name} compares level with level")
            if method.compares_maps and self.backbone.dilation != teacher.backbone.dilation:
                raise ValueError(f"'backbone.dilation' must be the teacher's: {method.name} compares the maps cell by cell")
            if method.shares_queries and (self.form == "two_stage") != (teacher.form == "two_stage"):
                raise ValueError(
                    f"queries of a two-stage detector start from boxes, those of other forms from points: {method.name} cannot hand them "
                    "on; take a teacher of the same 'form' (or set DETRDistill's 'assignment' to 0)"
                )
            if method.name == "detrdistill":
                self._detrdistill_fits(method, teacher)

    def _detrdistill_fits(self, method: DETRDistill, teacher: "Recipe") -> None:
        if method.features and method.multiplies_queries and teacher.feature_width != teacher.dim:
            raise ValueError(
                f"feature distillation multiplies the teacher's features ({teacher.feature_width} channels) with its queries "
                f"({teacher.dim}); it needs a teacher without 'feature_dim', mask='ones' or 'boxes', or 'features' 0"
            )
        if method.assignment and method.references == "student" and self.form == "two_stage":
            raise ValueError("a two-stage detector has no layer that makes reference points; set 'references' to 'teacher'")

    def __hash__(self) -> int:
        """Of all fields: `config` has no hash of its own."""
        return hash(self.model_dump_json())

    @property
    def family(self) -> Family | None:
        """The facts of a detector of transformers; None for the kit's own."""
        return FAMILIES.get(self.detector)

    @property
    def query_form(self) -> str:
        """What its queries start from: models of one form can decode each other's, and have maps of one kind."""
        return f"transformers, {self.family.queries}" if self.family else self.detector

    @property
    def tells_neck(self) -> bool:
        """Whether the maps before its encoder are as wide as those that its decoder attends to, in whose place they are compared."""
        if self.family is None or self.family.queries != "logits":
            return True
        return self.config.get("encoder_hidden_dim", 256) == self.dim

    @property
    def published(self) -> bool:
        """Whether it is a detector as others trained it, which is measured and not trained here."""
        return self.start is not None and self.schedule.steps == 0

    @property
    def feature_width(self) -> int:
        """Channels of the maps that the decoder attends to."""
        return self.feature_dim or self.dim

    @property
    def title(self) -> str:
        method = "+".join(method.name for method in self.methods) or ("published" if self.published else "plain")
        size = f"dim{self.dim}" if self.family and self.backbone.weights != "crops" else self.backbone.title
        return f"{self.detector}-{size}-{method}-seed{self.seed}"


class CropRecipe(Strict):
    """The run that teaches a thin backbone to classify crops; a student's recipe holds it as `backbone.crops`."""

    kind: Literal["crops"] = "crops"
    backbone: BackboneRecipe
    data: Annotated[Digits | Folder, Field(discriminator="name")]

    @property
    def title(self) -> str:
        return f"crops-{self.backbone.title}-seed{self.backbone.crops.seed}"

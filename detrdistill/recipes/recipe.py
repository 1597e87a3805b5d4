"""A recipe is everything that decides a run's numbers; its hash is the run's name. No torch here: reports read recipes too.

Whatever does not change the numbers (device, worker processes, where results lie) is not in a recipe but an argument of
`runs.run`. Unknown keys are refused, text such as "1e-4" is accepted where a number is meant (papermill's YAML passes it so).
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from detrdistill.recipes.methods import DETRDistill, Methods
from detrdistill.recipes.schema import Fraction, Strict


class CropTraining(Strict):
    """How a backbone learns to classify crops of the training objects before it detects: the stand-in for ImageNet."""

    steps: PositiveInt = 600
    batch: PositiveInt = 128
    lr: PositiveFloat = 4e-3
    weight_decay: NonNegativeFloat = 1e-2
    size: PositiveInt = Field(32, description="crops are resized to this many pixels a side")
    precision: Literal["fp32", "bf16"] = "bf16"
    seed: NonNegativeInt = 0


class WeightsFile(Strict):
    """A state_dict file, known by its content; it lies in data/weights, beside the current folder or above, when a run needs it."""

    name: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    def __str__(self) -> str:
        return f"{self.name} ({self.sha256[:8]})"


class BackboneRecipe(Strict):
    """Convolutional backbone. Its BatchNorm is frozen when it starts from learned weights, trained when it starts from none."""

    name: Literal["thin_resnet", "resnet18", "resnet50", "resnet101", "mobilenet_v2"] = "resnet50"
    width: PositiveInt = Field(16, description="channels of the first stage (thin_resnet only)")
    blocks: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = Field((1, 1, 1, 1), description="blocks a stage (thin_resnet only)")
    weights: Literal["none", "crops", "imagenet"] | WeightsFile | Path = Field(
        "imagenet", description="none; crops: `crops` below; imagenet: torchvision's; a state_dict file by name and hash, or by its path"
    )
    crops: CropTraining | None = None
    dilation: bool = Field(False, description="the last stage dilated instead of strided: DC5, stride 16")
    stride_in_1x1: bool = Field(False, description="stride in a block's first 1x1 convolution, as MSRA's weights want it (ResNet-50, -101)")

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        if self.stride_in_1x1 and (self.name not in ("resnet50", "resnet101") or self.weights == "imagenet"):
            raise ValueError(
                "'stride_in_1x1' is for ResNet-50 and -101 with MSRA's weights from a file; torchvision's have their stride in the "
                "3x3 convolution"
            )
        if self.name == "thin_resnet" and self.weights == "imagenet":
            raise ValueError("no ImageNet weights exist for thin_resnet; use weights='crops' or 'none'")
        defaults = {name: type(self).model_fields[name].default for name in ("width", "blocks")}
        held = {name: getattr(self, name) for name in defaults}
        if self.name != "thin_resnet" and held != defaults:
            given, needed = (", ".join(f"{name} {value}" for name, value in one.items()) for one in (held, defaults))
            raise ValueError(f"{self.name} has no width and no blocks to choose ({given}), thin_resnet has; set {needed}")
        if self.weights == "crops" and self.crops is None:
            raise ValueError("weights='crops' needs 'crops', the recipe of the crop training")
        return self

    @property
    def frozen_norm(self) -> bool:
        return self.weights != "none"

    @property
    def title(self) -> str:
        dilated = "-dc5" if self.dilation else ""
        if self.name != "thin_resnet":
            return self.name + dilated
        return f"thin{self.width}" + ("" if self.blocks == (1, 1, 1, 1) else "-" + "".join(map(str, self.blocks))) + dilated


class Digits(Strict):
    """The embedded data set: handwritten digits on photographs, a pure function of these numbers."""

    name: Literal["digits"] = "digits"
    size: Annotated[int, Field(ge=40, le=512)] = Field(
        96, description="side of the square images in pixels; digits 4 pixels high lose their ink"
    )
    train: PositiveInt = 4000
    val: PositiveInt = 400
    seed: NonNegativeInt = 0


class Folder(Strict):
    """A user's COCO-style folder: instances_train.json, instances_val.json and images/ (or train2017/ and val2017/, as COCO has it)."""

    name: Literal["folder"] = "folder"
    path: Path
    sha256: str | None = Field(
        None, description="hash of the two annotation files; filled in when a run starts, so that a moved folder is the same data"
    )


class Resize(Strict):
    """How images are resized and augmented."""

    train: Literal["none", "jitter", "detr", "flip"] = Field(
        "detr",
        description="none: resize only; flip: and mirror; detr: multi-scale and crops of the DETR papers; "
        "jitter: small zooms and shifts, colour, no mirror",
    )
    short: PositiveInt = Field(800, description="shorter side in pixels at evaluation (and the largest of training)")
    long: PositiveInt = Field(1333, description="longer side at most")


class Schedule(Strict):
    """Optimisation: AdamW, warm-up, then step or cosine decay."""

    steps: PositiveInt | None = Field(None, description="optimizer steps; give this or epochs")
    epochs: PositiveFloat | None = None
    batch: PositiveInt = Field(16, description="images an optimizer step, over all devices and micro-batches")
    accumulate: PositiveInt = Field(1, description="micro-batches an optimizer step")
    lr: PositiveFloat = 1e-4
    backbone_lr: NonNegativeFloat = Field(0.1, description="factor on lr for the backbone")
    sampling_lr: NonNegativeFloat = Field(1.0, description="factor on lr for sampling offsets and reference points")
    weight_decay: NonNegativeFloat = 1e-4
    clip_norm: NonNegativeFloat = Field(0.1, description="largest gradient norm; 0 for no clipping")
    warmup: NonNegativeInt = Field(0, description="steps of linear warm-up")
    decay: Literal["step", "cosine"] = "step"
    drops: tuple[Fraction, ...] = Field((0.8,), description="parts of the schedule after which lr falls to a tenth (decay='step')")
    evaluations: PositiveInt = Field(1, description="how often AP is measured on the way, the last step included; gives the curve")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either 'steps' or 'epochs', not both")
        if self.batch % self.accumulate:
            raise ValueError(f"'batch' {self.batch} is not a multiple of 'accumulate' {self.accumulate}")
        return self

    def total_steps(self, images: int) -> int:
        """Optimizer steps for a training set of `images` images."""
        return self.steps or max(1, round(self.epochs * images / self.batch))


# Fields that not every detector has, and whose they are.
OWNERS = {
    "form": ("deformable_detr",),
    "levels": ("deformable_detr",),
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
    in `presets.coco`; the schedule's defaults are Conditional DETR's.
    """

    detector: Literal["deformable_detr", "conditional_detr", "adamixer"] = "deformable_detr"
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
        if self.dim % self.heads or self.dim % 4:
            raise ValueError(f"'dim' {self.dim} must be a multiple of 'heads' {self.heads} and of 4")
        for name, owners in OWNERS.items():
            held, default = getattr(self, name), type(self).model_fields[name].default
            if self.detector not in owners and held != default:
                raise ValueError(f"{self.detector} has no '{name}' (that is of {', '.join(owners)}); leave it at {default}, not {held}")
        width = self.feature_width
        if self.detector == "adamixer" and (self.dim % 8 or width % self.groups):
            raise ValueError(f"AdaMixer's 'dim' {self.dim} must be a multiple of 8, its feature channels {width} of 'groups' {self.groups}")
        if self.detector != "conditional_detr" and width % 32:
            raise ValueError(f"{width} feature channels cannot be normalised in 32 groups; choose a multiple of 32")
        if bool(self.methods) != (self.teacher is not None):
            raise ValueError("a distillation method needs a 'teacher', and a teacher needs a method; give both or neither")
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names):
            raise ValueError(f"'methods' names one method twice: {', '.join(names)}")
        if self.teacher is not None:
            self._teacher_fits(self.teacher)
        return self

    def _teacher_fits(self, teacher: "Recipe") -> None:
        """Refuse what no loss could make sense of."""
        same = teacher.detector == self.detector
        for method in self.methods:
            if not same and (method.compares_maps or method.shares_queries):
                raise ValueError(
                    f"{method.name}: features and queries of detector {teacher.detector} mean something else to {self.detector}; take a "
                    "teacher of the same detector, or compare predictions alone (DETRDistill with 'features' and 'assignment' 0)"
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

    @property
    def feature_width(self) -> int:
        """Channels of the maps that the decoder attends to."""
        return self.feature_dim or self.dim

    @property
    def title(self) -> str:
        method = "+".join(method.name for method in self.methods) or "plain"
        return f"{self.detector}-{self.backbone.title}-{method}-seed{self.seed}"


class CropRecipe(Strict):
    """The run that teaches a thin backbone to classify crops; a student's recipe holds it as `backbone.crops`."""

    kind: Literal["crops"] = "crops"
    backbone: BackboneRecipe
    data: Annotated[Digits | Folder, Field(discriminator="name")]

    @property
    def title(self) -> str:
        return f"crops-{self.backbone.title}-seed{self.backbone.crops.seed}"

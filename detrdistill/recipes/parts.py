"""What a recipe is made of: backbone, data, how images are prepared, schedule. No torch here."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo, field_validator, model_validator

from detrdistill.recipes.schema import Fraction, Strict

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which the backbones' weights expect


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


class DetectorWeights(Strict):
    """A published or own detector's weights, in any format of `checkpoints`, known by their content."""

    path: Path = Field(description="file or folder")
    sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="hash of the files that are read; filled in when a run starts (`checkpoints.locate`)"
    )
    source: str = Field("", description="hub id and revision that it was downloaded from")
    part: Literal["", "student", "teacher", "model", "ema"] = Field("", description="which, of a file that holds several")
    outputs: tuple[str, ...] = Field((), description="the class of each output of the head, '' for none, where the file does not say")

    @field_validator("outputs", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def _frozen_by_default(weights: object) -> int:
    return -1 if weights in ("none", "crops") else 1


class BackboneRecipe(Strict):
    """Convolutional backbone. Its BatchNorm is frozen when it starts from learned weights, trained when it starts from none."""

    name: Literal["thin_resnet", "resnet18", "resnet50", "resnet101", "mobilenet_v2"] = "resnet50"
    width: PositiveInt = Field(16, description="channels of the first stage (thin_resnet only)")
    blocks: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = Field((1, 1, 1, 1), description="blocks a stage (thin_resnet only)")
    weights: Literal["none", "crops", "imagenet", "start"] | WeightsFile | Path = Field(
        "imagenet",
        description="none; crops: `crops` below; imagenet: torchvision's; start: those of the recipe's `start`, which hold instead of any; "
        "a state_dict file by name and hash, or by its path",
    )
    crops: CropTraining | None = None
    dilation: bool = Field(False, description="the last stage dilated instead of strided: DC5, stride 16")
    frozen_stages: Annotated[int, Field(ge=-1, le=4)] | None = Field(
        None,
        description="-1: all train; 0: all but the stem; 1: nor does the first stage, of stride 4; and so on to 4: none trains. If not "
        "given, 1 for weights from a file or torchvision's, else -1",
    )
    stride_in_1x1: bool = Field(False, description="stride in a block's first 1x1 convolution, as MSRA's weights want it (ResNet-50, -101)")

    @field_validator("frozen_stages")
    @classmethod
    def _unstated(cls, stages: int | None, info: ValidationInfo) -> int | None:
        """None where it is what it would be anyway: such recipes are one run."""
        return None if stages == _frozen_by_default(info.data.get("weights")) else stages

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
        if self.weights == "none" and self.stages_frozen >= 0:
            raise ValueError(
                f"frozen_stages {self.frozen_stages} would freeze random weights (weights='none'); set it to -1, or start from weights"
            )
        return self

    @property
    def stages_frozen(self) -> int:
        """`frozen_stages`, or what it is where it is not stated."""
        return _frozen_by_default(self.weights) if self.frozen_stages is None else self.frozen_stages

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
    """A user's folder, in any layout of `data.layouts`, or with annotation files and image folders that are named here.

    Names are relative to `path`.
    """

    name: Literal["folder"] = "folder"
    path: Path
    train: Path | None = Field(None, description="COCO annotation file of the training images, where no layout says it")
    val: Path | None = Field(None, description="of the validation images; without it a part of the training file's images is taken")
    test: Path | None = Field(None, description="of images that a finished detector is measured on as well")
    train_images: Path | None = Field(None, description="image folder; 'images' or the annotation file's own folder if not given")
    val_images: Path | None = Field(None, description="as the training images' if not given")
    test_images: Path | None = Field(None, description="as the training images' if not given")
    val_fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="part of the images that validates, where one file holds all; 0.2 if not given. Given, it divides a training file"
    )
    split_seed: NonNegativeInt = Field(0, description="which images these are")
    sha256: str | None = Field(
        None, description="hash of the two annotation files; filled in when a run starts, so that a moved folder is the same data"
    )

    @property
    def places(self) -> set[str]:
        """Fields that say where the data is found, and nothing beyond what `sha256` says."""
        return set(type(self).model_fields) - {"name", "sha256"}


class Resize(Strict):
    """How images are prepared: resized, augmented, normalised."""

    train: Literal["none", "jitter", "detr", "flip"] = Field(
        "detr",
        description="none: resize only; flip: and mirror; detr: multi-scale and crops of the DETR papers; "
        "jitter: small zooms and shifts, colour, no mirror",
    )
    short: PositiveInt = Field(800, description="shorter side in pixels at evaluation (and the largest of training)")
    long: PositiveInt = Field(1333, description="longer side at most")
    stretch: bool = Field(False, description="to `short` pixels high and `long` wide, whatever the image's shape")
    mean: tuple[float, float, float] = Field(MEAN, description="of red, green and blue from 0 to 1: subtracted, then divided by `std`")
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = STD

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return value.replace(",", " ").split() if isinstance(value, str) else value

    @property
    def sides(self) -> dict[str, int]:
        """How long sides become at evaluation, by what they are: height and width where images are stretched, else short and long."""
        return dict(zip(("height", "width") if self.stretch else ("short", "long"), (self.short, self.long), strict=True))


class Schedule(Strict):
    """Optimisation: AdamW, warm-up, then step or cosine decay."""

    steps: NonNegativeInt | None = Field(None, description="optimizer steps; give this or epochs; 0 measures a recipe's `start` as it is")
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
    keep: Literal["last", "best"] = Field(
        "last",
        description="weights that are saved and reported: of the last step, as in the paper, or of the evaluation with the highest AP. "
        "That one is chosen on the split that is reported, so that its AP is optimistic",
    )
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="decay of a moving average of the weights, which is evaluated and saved in their place; 0 for none"
    )

    @field_validator("drops", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return value.replace(",", " ").split() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either 'steps' or 'epochs', not both")
        if self.batch % self.accumulate:
            raise ValueError(f"'batch' {self.batch} is not a multiple of 'accumulate' {self.accumulate}")
        if self.keep == "best" and self.evaluations == 1:
            raise ValueError("keep='best' chooses among evaluations, and there is only one; set 'evaluations' to 2 or more")
        return self

    @property
    def open_ended(self) -> bool:
        """Whether no step's learning rate depends on how many steps there are, so that more can follow a complete run."""
        return self.decay == "step" and not self.drops

    def evaluation_steps(self, total: int) -> set[int]:
        """The steps of `total` after which AP is measured."""
        return {round(total * (i + 1) / self.evaluations) for i in range(self.evaluations)}

    def total_steps(self, images: int) -> int:
        """Optimizer steps for a training set of `images` images."""
        return max(1, round(self.epochs * images / self.batch)) if self.steps is None else self.steps

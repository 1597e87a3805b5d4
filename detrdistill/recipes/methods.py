"""Every distillation method and its switches, with the weights it was published with. No torch here: reports read recipes too.

A recipe lists methods; listed together, their losses add up. What a loss computes is told where it is computed, in `distill/`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from detrdistill.recipes.schema import Fraction, Strict

Maps = Literal["neck", "features"]
MAPS = "maps compared: neck (before the encoder), or features (what the decoder attends to)"
Stages = Literal["grouped", "first", "last", "uniform", "last_to_all", "last_only"]
STAGES = "which teacher stage teaches which student stage; distill/stages.py"
# Text such as "2, 4, 8" is what a command line has.
Sizes = Annotated[tuple[PositiveFloat, ...], BeforeValidator(lambda x: x.split(",") if isinstance(x, str) else x), Field(min_length=1)]


class Method(Strict):
    """What a recipe has to know of any method to see whether a teacher fits, and which of its switches are weights.

    Attributes:
        weights: the fields that multiply its losses; all of them times x make the whole x times as large.
    """

    weights: ClassVar[tuple[str, ...]] = ("weight",)

    def times(self, factor: float) -> Self:
        """The same method with its whole loss `factor` times as large (six digits, so that 0.1 x 3 is 0.3)."""
        return self.replace(**{name: float(f"{getattr(self, name) * factor:.6g}") for name in self.weights})

    @property
    def compares_maps(self) -> bool:
        """Whether feature maps are compared cell by cell."""
        return False

    @property
    def shares_queries(self) -> bool:
        """Whether the student decodes queries of the teacher's."""
        return False

    @property
    def needs_own_layers(self) -> str:
        """What it asks of a detector beyond outputs and queries, which the kit's own alone can give; "" for nothing."""
        return ""


class MapMethod(Method):
    """A method made for convolutional detectors: it compares feature maps, level by level."""

    maps: Maps = Field("neck", description=MAPS)

    @property
    def compares_maps(self) -> bool:
        return True


LAMBDAS = {"logits": 1.0, "features": 1.0, "assignment": 1.0}  # of the released code; the paper's are not known
RELEASED = LAMBDAS | {
    "matching": "joint", "normaliser": "pairs", "mask": "released", "maps": "neck", "adapter": False, "pairing": "student",
    "references": "student", "contrast": 0.2, "stages": "first",
}  # fmt: skip


class DETRDistill(Method):
    """DETRDistill (ICCV 2023). 0 switches a part off, as in the component ablation (Table 7).

    L = L_det + logits * Eq. 3-5 + features * Eq. 9 + assignment * Eq. 10. Neither the paper's lambdas nor its gamma were found in
    any source we could reach; the values here are this kit's own. `variant="released"` sets lambdas and switches to what the
    authors' code does, also where a preset has others; one that is stated beside it holds.
    """

    weights: ClassVar[tuple[str, ...]] = ("logits", "features", "assignment")

    name: Literal["detrdistill"] = "detrdistill"
    variant: Literal["paper", "released"] = Field(
        "paper", description="sets switches as paper or released code have them; released: lambdas too"
    )
    logits: NonNegativeFloat = Field(1.0, description="lambda_1 (not found in any source)")
    features: NonNegativeFloat = Field(1.0, description="lambda_2 (not found in any source)")
    assignment: NonNegativeFloat = Field(1.0, description="lambda_3 (not found in any source)")
    gamma: Fraction = Field(0.5, description="exponent of the quality score, Eq. 8 (not found in any source)")
    stages: Stages = Field("grouped", description=STAGES)
    matching: Literal["split", "positives", "joint"] = Field(
        "split", description="logits: Eq. 3 and 4; Eq. 3 alone; or, as released, all teacher queries at once by class and box"
    )
    normaliser: Literal["queries", "pairs"] = Field(
        "queries", description="logits: divide by the teacher's queries, or by the pairs (not found in the paper)"
    )
    contrast: NonNegativeFloat = Field(0.0, description="logits: weight of the released code's contrastive head (matching='joint' only)")
    mask: Literal["quality", "query", "boxes", "ones", "released"] = Field(
        "quality", description="features: Eq. 8 and 9; Eq. 7; ground truth; FitNet's; or the released form"
    )
    maps: Maps = Field("features", description=f"features: {MAPS}")
    mask_queries: Literal["stages", "last", "initial"] = Field(
        "stages", description="features: decoder outputs of every stage, of the last, or the queries that the decoder starts from"
    )
    normalised: bool = Field(
        False, description="features: maps of deviation 1 and masks of mean 1, for detectors whose maps nothing normalises"
    )
    adapter: bool = Field(True, description="features: a learned 1x1 convolution also where the widths agree")
    pairing: Literal["teacher", "student"] = Field(
        "teacher", description="assignment: the teacher's own (Eq. 10), or, as released, matched anew with the student's predictions"
    )
    references: Literal["teacher", "student"] = Field("teacher", description="assignment: whose reference points the queries start at")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_variant(cls, values: Any) -> Any:
        released = isinstance(values, dict) and values.get("variant") == "released"
        return RELEASED | values if released else values

    @classmethod
    def decided_by(cls, changes: Mapping[str, Any]) -> set[str]:
        if "variant" not in changes:
            return set()
        return set(RELEASED) if changes["variant"] == "released" else RELEASED.keys() - LAMBDAS.keys()

    @model_validator(mode="after")
    def _contrast_needs_pairs(self) -> "DETRDistill":
        if self.contrast and (self.matching != "joint" or not self.logits):
            raise ValueError(f"'contrast' {self.contrast} compares the pairs of matching='joint' with 'logits' above 0; set it to 0")
        return self

    @property
    def compares_maps(self) -> bool:
        return self.features > 0

    @property
    def shares_queries(self) -> bool:
        return self.assignment > 0

    @property
    def needs_own_layers(self) -> str:
        return "reference points that the student makes" if self.assignment and self.references == "student" else ""

    @property
    def multiplies_queries(self) -> bool:
        """Whether the mask is made of dot products of features and queries."""
        return self.mask in ("quality", "query", "released")


class FitNet(MapMethod):
    """Every cell counts the same. No weight was published for detectors; 10 is TPRD's."""

    name: Literal["fitnet"] = "fitnet"
    weight: NonNegativeFloat = 10.0


class FGD(MapMethod):
    """Focal and Global Distillation (CVPR 2022). Weights as in its one-stage configs and DETRDistill's own Deformable DETR baseline."""

    weights: ClassVar[tuple[str, ...]] = ("foreground", "background", "attention", "relation")

    name: Literal["fgd"] = "fgd"
    foreground: NonNegativeFloat = Field(1e-3, description="alpha")
    background: NonNegativeFloat = Field(5e-4, description="beta")
    attention: NonNegativeFloat = Field(5e-4, description="gamma; 1e-3 where FGD's class is used without a config")
    relation: NonNegativeFloat = Field(5e-6, description="lambda")
    temperature: PositiveFloat = 0.5


class MGD(MapMethod):
    """Masked Generative Distillation (ECCV 2022). Weights as in its one-stage configs."""

    name: Literal["mgd"] = "mgd"
    weight: NonNegativeFloat = Field(2e-5, description="alpha")
    masked: Fraction = Field(0.65, description="lambda, the part of the cells that is hidden")


class FKD(MapMethod):
    """Feature-based Knowledge Distillation (Zhang & Ma, ICLR 2021; FBKD in mmrazor, whose weights these are)."""

    weights: ClassVar[tuple[str, ...]] = ("feature", "channel", "spatial", "relation")

    name: Literal["fkd"] = "fkd"
    feature: NonNegativeFloat = 7e-5
    channel: NonNegativeFloat = 4e-3
    spatial: NonNegativeFloat = 4e-3
    relation: NonNegativeFloat = Field(7e-5, description="of the non-local blocks")
    temperature: PositiveFloat = 0.5


class FGFI(MapMethod):
    """Fine-grained Feature Imitation (CVPR 2019). Its anchors do not exist in a DETR; theirs are laid on every level."""

    name: Literal["fgfi"] = "fgfi"
    weight: NonNegativeFloat = 0.01
    threshold: Fraction = Field(0.5, description="an anchor counts above this part of the best IoU that any anchor has with the object")
    scales: Sizes = Field((2.0, 4.0, 8.0), description="sides of the anchors in cells")
    ratios: Sizes = Field((0.5, 1.0, 2.0), description="height over width")


class PKD(MapMethod):
    """Pearson correlation (NeurIPS 2022). 10 is its weight for one-stage detectors, 6 for two-stage ones (mmrazor)."""

    name: Literal["pkd"] = "pkd"
    weight: NonNegativeFloat = 10.0


class CWD(MapMethod):
    """Channel-wise distillation (ICCV 2021), with mmrazor's weight for detectors."""

    name: Literal["cwd"] = "cwd"
    weight: NonNegativeFloat = 10.0
    temperature: PositiveFloat = 1.0


class KDDETR(Method):
    """KD-DETR (CVPR 2024): both models decode the same queries, the teacher's own (specific) and random ones (general)."""

    weights: ClassVar[tuple[str, ...]] = ("specific", "general")

    name: Literal["kd_detr"] = "kd_detr"
    form: Literal["released", "tprd"] = Field(
        "released", description="the authors' normalisers, or those of TPRD's port to Deformable DETR"
    )
    specific: NonNegativeFloat = 1.0
    general: NonNegativeFloat = 1.0
    general_queries: PositiveInt | None = Field(None, description="random queries drawn each step; as many as the teacher has if not given")
    temperature: PositiveFloat = 10.0
    stages: Stages = Field("last_to_all", description=STAGES + "; form='tprd' sets grouped")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_form(cls, values: Any) -> Any:
        return {"stages": "grouped"} | values if isinstance(values, dict) and values.get("form") == "tprd" else values

    @classmethod
    def decided_by(cls, changes: Mapping[str, Any]) -> set[str]:
        return {"stages"} if "form" in changes else set()

    @property
    def shares_queries(self) -> bool:
        return True


class D3ETR(Method):
    """D3ETR (IJCAI 2024), MixMatcher: predictions and attention of matched queries, and of the teacher's queries index by index.

    Its own code is not public; weights are those of TPRD's port.
    """

    weights: ClassVar[tuple[str, ...]] = ("adaptive", "fixed")

    name: Literal["d3etr"] = "d3etr"
    adaptive: NonNegativeFloat = Field(1.0, description="queries matched by class and box")
    fixed: NonNegativeFloat = Field(1.0, description="the teacher's queries as an auxiliary group")
    self_attention: NonNegativeFloat = 1e4
    cross_attention: NonNegativeFloat = 1e3
    stages: Stages = Field("grouped", description=STAGES)

    @property
    def needs_own_layers(self) -> str:
        return "attention maps"

    @property
    def compares_maps(self) -> bool:
        return self.cross_attention > 0

    @property
    def shares_queries(self) -> bool:
        return self.fixed > 0


METHODS = {method.model_fields["name"].default: method for method in (DETRDistill, FitNet, FGD, MGD, FKD, FGFI, PKD, CWD, KDDETR, D3ETR)}
AnyMethod = Annotated[
    DETRDistill | FitNet | FGD | MGD | FKD | FGFI | PKD | CWD | KDDETR | D3ETR, Field(discriminator="name")
]  # as METHODS: a type has to be spelled out


def _names_to_methods(value: Any) -> Any:
    """Accept "none", "fgd", "detrdistill+fgd", or a list of names as short forms."""
    if isinstance(value, str):
        value = [] if value == "none" else value.split("+")
    if isinstance(value, list | tuple):
        return [{"name": item} if isinstance(item, str) else item for item in value]
    return value


Methods = Annotated[tuple[AnyMethod, ...], BeforeValidator(_names_to_methods)]

"""The losses that a recipe's methods stand for."""

from collections.abc import Callable

from torch import nn

from detrdistill.distill.assignment import AssignmentDistillation
from detrdistill.distill.baselines.cwd import CWDLoss
from detrdistill.distill.baselines.d3etr import AdaptiveMatching, FixedMatching
from detrdistill.distill.baselines.fgd import FGDLoss
from detrdistill.distill.baselines.fgfi import FGFILoss
from detrdistill.distill.baselines.fitnet import FitNetLoss
from detrdistill.distill.baselines.fkd import FKDLoss
from detrdistill.distill.baselines.kd_detr import GeneralSampling, SpecificSampling
from detrdistill.distill.baselines.mgd import MGDLoss
from detrdistill.distill.baselines.pkd import PKDLoss
from detrdistill.distill.contrast import ContrastiveHead
from detrdistill.distill.distiller import Distiller, Term
from detrdistill.distill.features import FeatureDistillation
from detrdistill.distill.levels import LevelByLevel
from detrdistill.distill.logits import LogitsDistillation
from detrdistill.recipes import methods
from detrdistill.recipes.recipe import Recipe


def build_distiller(student: nn.Module, recipe: Recipe) -> Distiller:
    """The student under the recipe's methods."""
    return Distiller(student, [term for method in recipe.methods for term in terms(method, recipe, student)])


def terms(method: methods.Method, recipe: Recipe, student: nn.Module) -> list[Term]:
    """What one method adds to the detection loss; a part whose weight is 0 is left out."""
    queries = recipe.dim, recipe.teacher.dim  # widths of student and teacher
    maps = recipe.feature_width, recipe.teacher.feature_width
    match method:
        case methods.DETRDistill():
            added = detrdistill(method, queries, maps, student.query_position)
        case methods.FitNet(weight=weight):
            added = [Term("fitnet", weight, on_levels(method, student, lambda: FitNetLoss(*maps), average=True))]
        case methods.MGD(weight=weight, masked=masked):
            added = [Term("mgd", weight, on_levels(method, student, lambda: MGDLoss(*maps, masked)))]
        case methods.PKD(weight=weight):
            added = [Term("pkd", weight, on_levels(method, student, lambda: PKDLoss(*maps)))]
        case methods.CWD(weight=weight, temperature=temperature):
            added = [Term("cwd", weight, on_levels(method, student, lambda: CWDLoss(*maps, temperature)))]
        case methods.FGD():
            weights = method.foreground, method.background, method.attention, method.relation
            added = [Term("fgd", 1.0, on_levels(method, student, lambda: FGDLoss(*maps, *weights, method.temperature)))]
        case methods.FKD():
            weights = method.feature, method.channel, method.spatial, method.relation
            added = [Term("fkd", 1.0, on_levels(method, student, lambda: FKDLoss(*maps, *weights, method.temperature)))]
        case methods.FGFI():
            loss = FGFILoss(*maps, student.levels, method.maps, method.threshold, method.scales, method.ratios)
            added = [Term("fgfi", method.weight, loss)]
        case methods.KDDETR():
            same = *queries, student.query_position, method.form, method.temperature
            added = [
                Term("kd_detr/specific", method.specific, SpecificSampling(*same), method.stages),
                Term("kd_detr/general", method.general, GeneralSampling(*same, method.general_queries), method.stages),
            ]
        case methods.D3ETR():
            attention = method.self_attention, method.cross_attention
            added = [
                Term("d3etr/adaptive", method.adaptive, AdaptiveMatching(*attention), method.stages),
                Term("d3etr/fixed", method.fixed, FixedMatching(*queries, student.query_position, *attention), method.stages),
            ]
    return [term for term in added if term.weight > 0]


def on_levels(method: methods.MapMethod, student: nn.Module, make: Callable[[], nn.Module], average: bool = False) -> LevelByLevel:
    return LevelByLevel([make() for _ in range(student.levels)], method.maps, average)


def detrdistill(method: methods.DETRDistill, queries: tuple[int, int], maps: tuple[int, int], position: bool) -> list[Term]:
    """Logits (Eq. 3 to 5), features (Eq. 6 to 9) and assignment (Eq. 10)."""
    head = ContrastiveHead(*queries) if method.contrast else None
    logits = LogitsDistillation(method.matching, method.normaliser, head, method.contrast)
    features = FeatureDistillation(*maps, method.gamma, method.mask, method.maps, method.mask_queries, method.adapter, method.normalised)
    assignment = AssignmentDistillation(*queries, position, method.pairing, method.references)
    return [
        Term("logits", method.logits, logits, method.stages),
        Term("features", method.features, features),
        Term("assignment", method.assignment, assignment, method.stages),
    ]

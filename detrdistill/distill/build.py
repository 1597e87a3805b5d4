"""The losses that a recipe's methods stand for."""

from collections.abc import Callable

from torch import nn

from detrdistill.distill.assignment import AssignmentDistillation
from detrdistill.distill.baselines.cwd import CWD
from detrdistill.distill.baselines.d3etr import AdaptiveMatching, FixedMatching
from detrdistill.distill.baselines.fgd import FGD
from detrdistill.distill.baselines.fgfi import FGFI
from detrdistill.distill.baselines.fitnet import FitNet
from detrdistill.distill.baselines.fkd import FKD
from detrdistill.distill.baselines.kd_detr import GeneralSampling, SpecificSampling
from detrdistill.distill.baselines.mgd import MGD
from detrdistill.distill.baselines.pkd import PKD
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
            found = detrdistill(method, queries, maps, student.query_position)
        case methods.FitNet(weight=weight):
            found = [Term("fitnet", weight, on_levels(method, student, lambda: FitNet(*maps), average=True))]
        case methods.MGD(weight=weight, masked=masked):
            found = [Term("mgd", weight, on_levels(method, student, lambda: MGD(*maps, masked)))]
        case methods.PKD(weight=weight):
            found = [Term("pkd", weight, on_levels(method, student, lambda: PKD(*maps)))]
        case methods.CWD(weight=weight, temperature=temperature):
            found = [Term("cwd", weight, on_levels(method, student, lambda: CWD(*maps, temperature)))]
        case methods.FGD():
            weights = method.foreground, method.background, method.attention, method.relation
            found = [Term("fgd", 1.0, on_levels(method, student, lambda: FGD(*maps, *weights, method.temperature)))]
        case methods.FKD():
            weights = method.feature, method.channel, method.spatial, method.relation
            found = [Term("fkd", 1.0, on_levels(method, student, lambda: FKD(*maps, *weights, method.temperature)))]
        case methods.FGFI():
            loss = FGFI(*maps, student.levels, method.maps, method.threshold, method.scales, method.ratios)
            found = [Term("fgfi", method.weight, loss)]
        case methods.KDDETR():
            same = *queries, student.query_position, method.form, method.temperature
            found = [
                Term("kd_detr/specific", method.specific, SpecificSampling(*same), method.stages),
                Term("kd_detr/general", method.general, GeneralSampling(*same, method.general_queries), method.stages),
            ]
        case methods.D3ETR():
            attention = method.self_attention, method.cross_attention
            found = [
                Term("d3etr/adaptive", method.adaptive, AdaptiveMatching(*attention), method.stages),
                Term("d3etr/fixed", method.fixed, FixedMatching(*queries, student.query_position, *attention), method.stages),
            ]
    return [term for term in found if term.weight > 0]


def on_levels(method: methods.MapMethod, student: nn.Module, make: Callable[[], nn.Module], average: bool = False) -> LevelByLevel:
    return LevelByLevel([make() for _ in range(student.levels)], method.maps, average)


def detrdistill(method: methods.DETRDistill, queries: tuple[int, int], maps: tuple[int, int], position: bool) -> list[Term]:
    """Logits (Eq. 3 to 5), features (Eq. 6 to 9) and assignment (Eq. 10)."""
    head = ContrastiveHead(*queries) if method.contrast else None
    logits = LogitsDistillation(method.matching, method.normaliser, head, method.contrast)
    features = FeatureDistillation(*maps, method.gamma, method.mask, method.maps, method.mask_queries, method.adapter)
    assignment = AssignmentDistillation(*queries, position, method.pairing, method.references)
    return [
        Term("logits", method.logits, logits, method.stages),
        Term("features", method.features, features),
        Term("assignment", method.assignment, assignment, method.stages),
    ]

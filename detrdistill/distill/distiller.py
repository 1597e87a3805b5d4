"""One training step's losses, for a student alone or under a teacher: decode once, match once, sum up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detrdistill.criterion import SetCriterion, target_cost
from detrdistill.distill.assignment import AssignmentDistillation
from detrdistill.distill.features import FeatureDistillation
from detrdistill.distill.logits import LogitsDistillation
from detrdistill.experiments.recipes import Recipe
from detrdistill.matching import Problem, match
from detrdistill.models.outputs import DetectorOutput, Targets


@dataclass(frozen=True)
class Term:
    """A distillation loss under its name in the log, and its weight (lambda)."""

    name: str
    weight: float
    loss: nn.Module


class Distiller(nn.Module):
    """A student with its detection loss and any number of distillation losses.

    Args:
        student: a detector with the contract of `models`.
        terms: distillation losses. Each has `problems(student, teacher, targets)`, what must be matched, and is called with
            `(student, teacher, targets, pairs)`, the pairs of all problems by name; "student" and "teacher" are the assignments of
            either model to the ground truth. A loss with `guests(teacher) -> Queries` sees the output of that group as its
            `student`; all groups pass the decoder together.

    The teacher is not part of this module: it gets into no optimizer, no checkpoint and no gradient.
    """

    def __init__(self, student: nn.Module, terms: Sequence[Term] = ()) -> None:
        super().__init__()
        self.student = student
        self.criterion = SetCriterion()
        self.terms = tuple(terms)
        self.losses = nn.ModuleDict({term.name: term.loss for term in terms})

    def forward(
        self,
        pixels: Float[Tensor, "B 3 H W"],
        padding: Bool[Tensor, "B H W"],
        targets: Targets,
        teacher: DetectorOutput | None = None,
    ) -> dict[str, Tensor]:
        """Weighted loss parts by name, a scalar or one value a stage; their sum is the loss.

        Raises:
            NonFiniteError: a prediction is NaN or infinite, found when it is matched.
        """
        memory = self.student.encode(pixels, padding)
        hosts = [term for term in self.terms if hasattr(term.loss, "guests")]
        own, *visiting = self.student.decode(memory, self.student.queries(memory), *(term.loss.guests(teacher) for term in hosts))
        seen = {term.name: full_precision(output) for term, output in zip(hosts, visiting, strict=True)}
        own = full_precision(own)

        # Costs and losses are small and need more than bfloat16: everything from here on is in full precision.
        with torch.autocast(pixels.device.type, enabled=False):
            problems = self.criterion.problems(own, targets)
            if self.terms:
                teacher = full_precision(teacher)
                problems["teacher"] = Problem(target_cost(teacher, targets), targets.counts)
                for term in self.terms:
                    problems |= term.loss.problems(seen.get(term.name, own), teacher, targets)
            pairs = match(problems)
            parts = prefixed("detection", self.criterion(own, targets, pairs))
            for term in self.terms:
                values = term.loss(seen.get(term.name, own), teacher, targets, pairs)
                parts |= prefixed(term.name, {name: term.weight * value for name, value in values.items()})
        return parts


def full_precision(output: DetectorOutput) -> DetectorOutput:
    """Predictions, queries and features in at least float32 (autocast leaves some in bfloat16)."""
    raised = {}
    for field in fields(output):
        value = getattr(output, field.name)
        if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
            raised[field.name] = value.float()
        elif field.name == "features":
            raised[field.name] = [level.float() if level.dtype == torch.bfloat16 else level for level in value]
    if output.initial is not None and output.initial.proposals is not None:
        raised["initial"] = replace(output.initial, proposals=full_precision(output.initial.proposals))
    return replace(output, **raised)


def prefixed(name: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name if part == name else f"{name}/{part}": value for part, value in values.items()}


def build_distiller(student: nn.Module, recipe: Recipe) -> Distiller:
    """The student under the recipe's methods."""
    terms: list[Term] = []
    for method in recipe.methods:
        widths = recipe.dim, recipe.teacher.dim
        features = recipe.feature_width, recipe.teacher.feature_width
        parts = (
            ("logits", method.logits, lambda: LogitsDistillation()),
            ("features", method.features, lambda: FeatureDistillation(*features, method.gamma)),  # noqa: B023
            ("assignment", method.assignment, lambda: AssignmentDistillation(*widths, student.query_position)),  # noqa: B023
        )
        terms += [Term(name, weight, make()) for name, weight, make in parts if weight > 0]
    return Distiller(student, terms)

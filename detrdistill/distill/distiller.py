"""One training step's losses, for a student alone or under a teacher: decode once, match once, sum up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detrdistill.criterion import SetCriterion
from detrdistill.distill.loss import DistillationLoss
from detrdistill.distill.stages import pair_stages
from detrdistill.matching import Pairs, Problem, match
from detrdistill.models.attention import constants
from detrdistill.models.outputs import DetectorOutput, Targets


@dataclass(frozen=True)
class Term:
    """A distillation loss under its name in the log.

    Attributes:
        weight: lambda.
        stages: how decoder stages are paired (`stages.pair_stages`): the loss sees student and teacher with as many stages as there
            are pairs. None for a loss that sees both as they are.
    """

    name: str
    weight: float
    loss: DistillationLoss
    stages: str | None = None


class Distiller(nn.Module):
    """A student with its detection loss and any number of distillation losses.

    Args:
        student: a detector with the contract of `models`.
        terms: distillation losses, each under a name of its own.

    Attributes:
        with_student_queries, with_teacher_queries: the terms that add a group of queries to those of the student, or of the teacher.
        attention: whether any loss looks at attention maps.

    The teacher is not part of this module: it gets into no optimizer, no checkpoint and no gradient.
    """

    def __init__(self, student: nn.Module, terms: Sequence[Term] = ()) -> None:
        super().__init__()
        self.student = student
        self.criterion = student.own_loss or SetCriterion()
        self.terms = tuple(terms)
        self.losses = nn.ModuleDict({term.name: term.loss for term in terms})
        self.with_student_queries = tuple(term for term in terms if term.loss.student_queries is not None)
        self.with_teacher_queries = tuple(term for term in terms if term.loss.teacher_queries is not None)
        self.attention = any(term.loss.attention for term in terms)

    @torch.no_grad()
    def teacher_outputs(self, teacher: nn.Module, pixels: Float[Tensor, "B 3 H W"], padding: Bool[Tensor, "B H W"]) -> list[DetectorOutput]:
        """The teacher's outputs, without gradient: of its own queries, then of the `teacher_queries` of each term that has them.

        (Not in inference mode, whose tensors cannot be saved for the student's backward pass.)
        """
        memory = teacher.encode(pixels, padding)
        own_queries = teacher.queries(memory)
        groups = [term.loss.teacher_queries(own_queries) for term in self.with_teacher_queries]
        return teacher.decode(memory, own_queries, *groups, **self._with_attention())

    def forward(
        self,
        pixels: Float[Tensor, "B 3 H W"],
        padding: Bool[Tensor, "B H W"],
        targets: Targets,
        teacher_outputs: Sequence[DetectorOutput] = (),
    ) -> dict[str, Tensor]:
        """Weighted loss parts by name, a scalar or one value a stage; their sum is the loss.

        Args:
            teacher_outputs: of `Distiller.teacher_outputs`; not needed without terms.

        Raises:
            NonFiniteError: a prediction is NaN or infinite, found when it is matched.
        """
        teachers = self._by_term(teacher_outputs, self.with_teacher_queries)
        # A loss of the student's own may add groups of queries that start from the targets.
        seen = (pixels, padding) if self.student.own_loss is None else (pixels, padding, targets)
        memory = self.student.encode(*seen)
        groups = [term.loss.student_queries(teachers[term.name]) for term in self.with_student_queries]
        decoded = self.student.decode(memory, self.student.queries(memory), *groups, **self._with_attention())

        # Costs and losses are small and need more than bfloat16: everything from here on is in full precision.
        with torch.autocast(pixels.device.type, enabled=False):
            decoded = [full_precision(output) for output in decoded]
            students = self._by_term(decoded, self.with_student_queries)
            teachers = self._by_term([full_precision(output) for output in teacher_outputs], self.with_teacher_queries)
            problems = self.criterion.problems(decoded[0], targets)
            aligned = {term.name: align(students[term.name], teachers[term.name], term.stages) for term in self.terms}
            for term in self.terms:
                student, teacher, _ = aligned[term.name]
                problems |= scoped(term.name, term.loss.problems(student, teacher, targets))
            pairs = match(problems)
            parts = prefixed("detection", self.criterion(decoded[0], targets, pairs))
            for term in self.terms:
                student, teacher, weights = aligned[term.name]
                values = term.loss(student, teacher, targets, unscoped(term.name, pairs))
                if weights is not None:
                    values = {name: value * weights for name, value in values.items()}
                parts |= prefixed(term.name, {name: term.weight * value for name, value in values.items()})
        return parts

    def _by_term(self, outputs: Sequence[DetectorOutput], with_queries: Sequence[Term]) -> dict[str, DetectorOutput]:
        """The output that each term sees: that of its own group of queries, or else the first, of the model's."""
        if not self.terms:
            return {}
        of_groups = {term.name: output for term, output in zip(with_queries, outputs[1:], strict=True)}
        return {term.name: of_groups.get(term.name, outputs[0]) for term in self.terms}

    def _with_attention(self) -> dict[str, bool]:
        return {"attention": True} if self.attention else {}


def align(student: DetectorOutput, teacher: DetectorOutput, strategy: str | None) -> tuple[DetectorOutput, DetectorOutput, Tensor | None]:
    """Both with one stage for each pair of stages, and the pairs' weights (None: all 1). Without a strategy, both as they are."""
    if strategy is None:
        return student, teacher, None
    pairs = pair_stages(len(student.logits), len(teacher.logits), strategy)
    weights = None if all(weight == 1 for weight in pairs.weight) else constants(pairs.weight, student.boxes)
    return student.at(pairs.student), teacher.at(pairs.teacher), weights


def scoped(name: str, problems: Mapping[str, Problem]) -> dict[str, Problem]:
    """The problems under names that no other loss has."""

    def scope(problem):
        return problem and f"{name}: {problem}"

    return {
        scope(key): replace(problem, matched_in=scope(problem.matched_in), unmatched_in=scope(problem.unmatched_in))
        for key, problem in problems.items()
    }


def unscoped(name: str, pairs: Mapping[str, Pairs]) -> dict[str, Pairs]:
    """The pairs of one loss, under the names that it gave its problems."""
    prefix = f"{name}: "
    return {key.removeprefix(prefix): value for key, value in pairs.items() if key.startswith(prefix)}


def full_precision(output: DetectorOutput) -> DetectorOutput:
    """Predictions, queries and maps in at least float32 (autocast leaves some in bfloat16)."""
    converted = {}
    for field in fields(output):
        value = getattr(output, field.name)
        if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
            converted[field.name] = value.float()
        elif field.name in ("features", "neck"):
            converted[field.name] = [level.float() if level.dtype == torch.bfloat16 else level for level in value]
    if initial := output.initial:
        vectors = {name: getattr(initial, name) for name in ("content", "position", "reference")}
        vectors = {name: value.float() for name, value in vectors.items() if value is not None and value.dtype == torch.bfloat16}
        proposals = initial.proposals and full_precision(initial.proposals)
        converted["initial"] = replace(initial, **vectors, proposals=proposals)
    return replace(output, **converted)


def prefixed(name: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name if part == name else f"{name}/{part}": value for part, value in values.items()}

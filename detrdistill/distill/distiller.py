"""One training step's losses, for a student alone or under a teacher: decode once, match once, sum up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detrdistill.criterion import SetCriterion
from detrdistill.distill.stages import pair_stages
from detrdistill.matching import Problem, match
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
    loss: nn.Module
    stages: str | None = None


class Distiller(nn.Module):
    """A student with its detection loss and any number of distillation losses.

    Args:
        student: a detector with the contract of `models`.
        terms: distillation losses. Each has `problems(student, teacher, targets)`, what must be matched, by names of its own, and
            is called with `(student, teacher, targets, pairs)`; it returns named scalars, or one value a pair of stages. Optional:

            - `guests(teacher) -> Queries`: a group that the student decodes besides its own; the loss sees it as `student`.
            - `probe(own) -> Queries`: a group made from the teacher's own queries that the teacher decodes besides; the loss sees it
              as `teacher`.
            - `attention = True`: outputs come with their attention maps.

            All groups of a model pass its decoder together.

    The teacher is not part of this module: it gets into no optimizer, no checkpoint and no gradient.
    """

    def __init__(self, student: nn.Module, terms: Sequence[Term] = ()) -> None:
        super().__init__()
        self.student = student
        self.criterion = SetCriterion()
        self.terms = tuple(terms)
        self.losses = nn.ModuleDict({term.name: term.loss for term in terms})
        self.attention = any(getattr(term.loss, "attention", False) for term in terms)

    @torch.no_grad()
    def ask(self, teacher: nn.Module, pixels: Float[Tensor, "B 3 H W"], padding: Bool[Tensor, "B H W"]) -> list[DetectorOutput]:
        """What the teacher says, without gradient: to its own queries, and to the probes of the terms that have one, in their order.

        (Not in inference mode, whose tensors cannot be saved for the student's backward pass.)
        """
        memory = teacher.encode(pixels, padding)
        own = teacher.queries(memory)
        probes = [term.loss.probe(own) for term in self.terms if hasattr(term.loss, "probe")]
        return teacher.decode(memory, own, *probes, **self._with_attention())

    def forward(
        self,
        pixels: Float[Tensor, "B 3 H W"],
        padding: Bool[Tensor, "B H W"],
        targets: Targets,
        answers: Sequence[DetectorOutput] = (),
    ) -> dict[str, Tensor]:
        """Weighted loss parts by name, a scalar or one value a stage; their sum is the loss.

        Args:
            answers: the teacher's, from `ask`; not needed without terms.

        Raises:
            NonFiniteError: a prediction is NaN or infinite, found when it is matched.
        """
        teachers = self._by_term("probe", answers)
        memory = self.student.encode(pixels, padding)
        guests = [term.loss.guests(teachers[term.name]) for term in self.terms if hasattr(term.loss, "guests")]
        decoded = self.student.decode(memory, self.student.queries(memory), *guests, **self._with_attention())

        # Costs and losses are small and need more than bfloat16: everything from here on is in full precision.
        with torch.autocast(pixels.device.type, enabled=False):
            own, *guests = [full_precision(output) for output in decoded]
            students = self._by_term("guests", [own, *guests])
            teachers = self._by_term("probe", [full_precision(output) for output in answers])
            problems = self.criterion.problems(own, targets)
            views = {}
            for term in self.terms:
                views[term.name] = students[term.name], teachers[term.name], None
                if term.stages:
                    views[term.name] = align(students[term.name], teachers[term.name], term.stages)
                problems |= scoped(term.name, term.loss.problems(*views[term.name][:2], targets))
            pairs = match(problems)
            parts = prefixed("detection", self.criterion(own, targets, pairs))
            for term in self.terms:
                student, teacher, shares = views[term.name]
                mine = {name.removeprefix(f"{term.name}: "): value for name, value in pairs.items() if name.startswith(f"{term.name}: ")}
                values = term.loss(student, teacher, targets, mine)
                if shares is not None:
                    values = {name: value * shares for name, value in values.items()}
                parts |= prefixed(term.name, {name: term.weight * value for name, value in values.items()})
        return parts

    def _by_term(self, hook: str, outputs: Sequence[DetectorOutput]) -> dict[str, DetectorOutput]:
        """For each term the output of its own group, if it has the `hook`, or the first one."""
        first, *own = outputs or [None]
        own = iter(own)
        return {term.name: next(own) if hasattr(term.loss, hook) else first for term in self.terms}

    def _with_attention(self) -> dict[str, bool]:
        return {"attention": True} if self.attention else {}


def align(student: DetectorOutput, teacher: DetectorOutput, strategy: str) -> tuple[DetectorOutput, DetectorOutput, Tensor | None]:
    """Both with one stage for each pair of stages, and the pairs' weights (None: all 1)."""
    pairs = pair_stages(len(student.logits), len(teacher.logits), strategy)
    shares = None if all(weight == 1 for weight in pairs.weight) else constants(pairs.weight, student.boxes)
    return student.at(pairs.student), teacher.at(pairs.teacher), shares


def scoped(name: str, problems: Mapping[str, Problem]) -> dict[str, Problem]:
    """The problems under names that no other loss has."""

    def inner(other):
        return other and f"{name}: {other}"

    return {inner(key): replace(one, among=inner(one.among), besides=inner(one.besides)) for key, one in problems.items()}


def full_precision(output: DetectorOutput) -> DetectorOutput:
    """Predictions, queries and maps in at least float32 (autocast leaves some in bfloat16)."""
    raised = {}
    for field in fields(output):
        value = getattr(output, field.name)
        if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
            raised[field.name] = value.float()
        elif field.name in ("features", "neck"):
            raised[field.name] = [level.float() if level.dtype == torch.bfloat16 else level for level in value]
    if first := output.initial:
        vectors = {name: getattr(first, name) for name in ("content", "position", "reference")}
        vectors = {name: value.float() for name, value in vectors.items() if value is not None and value.dtype == torch.bfloat16}
        proposals = first.proposals and full_precision(first.proposals)
        raised["initial"] = replace(first, **vectors, proposals=proposals)
    return replace(output, **raised)


def prefixed(name: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name if part == name else f"{name}/{part}": value for part, value in values.items()}

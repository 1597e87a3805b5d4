"""Query-prior assignment distillation (Eq. 10): the teacher's queries as a second group, with the teacher's assignment."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from detrdistill.criterion import set_losses, target_cost
from detrdistill.distill.loss import DistillationLoss
from detrdistill.matching import Pairs, Problem
from detrdistill.models.outputs import DetectorOutput, Queries, Targets


class QueryAdapter(nn.Module):
    """The teacher's queries as a group that the student decodes, in the student's width.

    Args:
        position: whether the queries carry an embedding of their own beside content and reference.

    Where the widths differ, learned linear maps adapt content and position; references are geometry and stay.
    """

    def __init__(self, student_dim: int, teacher_dim: int, position: bool = True) -> None:
        super().__init__()
        adapt = student_dim != teacher_dim
        self.content = nn.Linear(teacher_dim, student_dim) if adapt else nn.Identity()
        self.position = nn.Linear(teacher_dim, student_dim) if adapt and position else nn.Identity()

    def forward(self, queries: Queries) -> Queries:
        position = None if queries.position is None else self.position(queries.position)
        return replace(queries, content=self.content(queries.content), position=position, proposals=None)


class AssignmentDistillation(DistillationLoss):
    """The student decodes the teacher's queries as well, and each must find the object that the teacher's query i found.

    Args:
        student_dim, teacher_dim, position: as in `QueryAdapter`.
        pairing: `teacher`: sigma^T, the teacher's own assignment, stage by stage (Eq. 10). `student`: the group is matched anew with
            the student's predictions; the released code computes the teacher's assignment, but never hands it to this loss.
        references: where the queries start: at the `teacher`'s reference points, or at those that the `student` makes of the
            teacher's embedding, as in the released code.

    The group shares the student's memory, does not interact with the student's own queries, and exists in training only. Weights
    as in the detection loss (2, 5, 2), divided by the number of objects. The released code passes the encoder a second time for
    this group, with the same result but for dropout.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        position: bool = True,
        pairing: Literal["teacher", "student"] = "teacher",
        references: Literal["teacher", "student"] = "teacher",
    ) -> None:
        super().__init__()
        self.adapter = QueryAdapter(student_dim, teacher_dim, position)
        self.pairing, self.references = pairing, references

    def student_queries(self, teacher: DetectorOutput) -> Queries:
        """The teacher's queries in the student's width."""
        queries = self.adapter(teacher.initial)
        return queries if self.references == "teacher" else replace(queries, reference=None)

    def problems(self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> dict[str, Problem]:
        matched = teacher if self.pairing == "teacher" else student
        return {"objects": Problem(target_cost(matched, targets), targets.counts)}

    def forward(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, pairs: Mapping[str, Pairs]
    ) -> dict[str, Float[Tensor, " S"]]:
        return set_losses(student, targets, pairs["objects"])

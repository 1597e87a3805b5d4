"""Query-prior assignment distillation (Eq. 10): the teacher's queries as a second group, with the teacher's assignment."""

from collections.abc import Mapping
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor, nn

from detrdistill.criterion import set_losses
from detrdistill.matching import Pairs, Problem
from detrdistill.models.outputs import DetectorOutput, Queries, Targets


class AssignmentDistillation(nn.Module):
    """The student decodes the teacher's queries as well, and each must find the object that the teacher's query i found.

    Args:
        student_dim, teacher_dim: widths of the queries; where they differ, a learned linear map adapts the teacher's.
        position: whether the queries carry an embedding of their own beside content and reference.

    No matching takes place: sigma^T, stage by stage, is given. The group starts at the teacher's reference points, shares the
    student's memory, does not interact with the student's own queries, and exists in training only. Weights as in the detection
    loss (2, 5, 2), divided by the number of objects. The released code computes the teacher's assignment and then matches anew
    with the student's predictions, in a second pass through encoder and decoder.
    """

    def __init__(self, student_dim: int, teacher_dim: int, position: bool = True) -> None:
        super().__init__()
        adapt = student_dim != teacher_dim
        self.content = nn.Linear(teacher_dim, student_dim) if adapt else nn.Identity()
        self.position = nn.Linear(teacher_dim, student_dim) if adapt and position else nn.Identity()

    def guests(self, teacher: DetectorOutput) -> Queries:
        """The group of queries that the student shall decode beside its own; its output is this loss's `student`."""
        initial = teacher.initial
        position = None if initial.position is None else self.position(initial.position)
        return replace(initial, content=self.content(initial.content), position=position, proposals=None)

    def problems(self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> dict[str, Problem]:
        return {}

    def forward(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, pairs: Mapping[str, Pairs]
    ) -> dict[str, Float[Tensor, " S"]]:
        return set_losses(student, targets, pairs["teacher"])

"""What a distillation loss is: the members that the distiller calls."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from jaxtyping import Float
from torch import Tensor, nn

from detrdistill.matching import Pairs, Problem
from detrdistill.models.outputs import DetectorOutput, Queries, Targets


class DistillationLoss(nn.Module, ABC):
    """A loss between a student's output and its teacher's.

    A loss that needs more queries than the models' own defines `student_queries`, `teacher_queries` or both as methods. All groups of a
    model pass its decoder together: first its own queries, then one group for each loss that defines the method, in the order of terms.

    Attributes:
        student_queries: makes a group of queries from the teacher's output; the student decodes it, and the loss sees the result as
            `student`. None: the loss sees what the student makes of its own queries.
        teacher_queries: makes a group of queries from the teacher's own queries; the teacher decodes it, and the loss sees the result
            as `teacher`. None: the loss sees what the teacher makes of its own queries.
        attention: whether outputs must come with their attention maps.
    """

    student_queries: Callable[[DetectorOutput], Queries] | None = None
    teacher_queries: Callable[[Queries], Queries] | None = None
    attention: bool = False

    def problems(self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> dict[str, Problem]:
        """What must be matched before the loss is called, by names that are this loss's own. Nothing, if not overridden."""
        return {}

    @abstractmethod
    def forward(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, pairs: Mapping[str, Pairs]
    ) -> dict[str, Float[Tensor, "*stages"]]:
        """Named parts of the loss: scalars, or one value a stage.

        Args:
            student, teacher: as many stages each as there are pairs of stages, where the term pairs them (`distiller.Term`).
            pairs: the solutions of `problems`, by the same names.
        """

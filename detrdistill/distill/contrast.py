"""The contrastive head of DETRDistill's released code; the ICCV text does not mention it."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from detrdistill.matching import Pairs
from detrdistill.models.outputs import DetectorOutput, Targets

WIDTH, TEMPERATURE = 512, 0.07


class ContrastiveHead(nn.Module):
    """InfoNCE between decoder outputs of matched queries: of all pairs of a stage, a query must recognise its own partner.

    Both sides pass a linear layer and a two-layer perceptron with BatchNorm, 512 wide, and are normalised; scores are divided by
    0.07. Rows are teacher queries, columns student queries. One head serves all stages. Being a comparison among all pairs of a
    batch, and with BatchNorm, its value depends on how many images that batch has.
    """

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.student, self.teacher = (
            nn.Sequential(
                nn.Linear(dim, WIDTH), nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)
            )
            for dim in (student_dim, teacher_dim)
        )  # fmt: skip

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, pairs: Pairs) -> Float[Tensor, " S"]:
        stages, images = student.queries.shape[:2]
        # All stages have as many pairs: as many an image as the smaller number of queries.
        student_queries = student.queries[pairs.stage, pairs.image, pairs.query].unflatten(0, (stages, -1))
        teacher_queries = teacher.queries[pairs.stage, pairs.image, pairs.target].unflatten(0, (stages, -1))
        if student_queries.shape[1] < 2:
            return student.queries.sum((1, 2, 3)) * 0  # nothing to compare, and BatchNorm knows no single row
        partners = torch.arange(student_queries.shape[1], device=student_queries.device)
        losses = []
        for of_student, of_teacher in zip(student_queries, teacher_queries, strict=True):
            scores = F.normalize(self.teacher(of_teacher), dim=1) @ F.normalize(self.student(of_student), dim=1).T
            losses.append(F.cross_entropy(scores / TEMPERATURE, partners))
        return torch.stack(losses) * (images / targets.step_images)

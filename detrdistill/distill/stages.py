"""Which teacher stage teaches which student stage, also where decoders differ in depth (Fig. 5)."""

from dataclasses import dataclass
from itertools import pairwise

from detrdistill.errors import InputError


@dataclass(frozen=True)
class StagePairs:
    """Stages (from 0) that are compared, pair by pair.

    Attributes:
        weight: of each pair; the pairs of one student stage add up to 1.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    weight: tuple[float, ...]


def pair_stages(student: int, teacher: int, strategy: str) -> StagePairs:
    """Pair the stages of a student decoder with those of its teacher's.

    Args:
        student, teacher: numbers of stages.
        strategy: `grouped` splits the teacher's stages evenly among the student's, as Fig. 5 draws (6 to 3: 1 and 2 teach 1, 3 and 4
            teach 2, 5 and 6 teach 3); a student that is deeper shares a teacher stage among neighbours. `first`, `last`: the first
            or last stages of both, one to one (the released code zips the first). `uniform`: the teacher's stages at even distances,
            its last included. `last_to_all`: the teacher's last stage teaches every stage. `last_only`: it teaches the last alone.

    With equal depths the first four are the same: stage k teaches stage k. Whether the paper sums or averages over a group was not
    found; here each student stage counts once, so a group is averaged.

    Raises:
        InputError: an unknown strategy.
    """
    if strategy == "grouped":
        bounds = [stage * teacher // student for stage in range(student + 1)]
        groups = [range(low, max(high, low + 1)) for low, high in pairwise(bounds)]
    elif strategy == "uniform":
        # Halves are rounded up, so that 3 stages of 4 are 2, 3 and 4.
        groups = [(max(0, (2 * (stage + 1) * teacher + student) // (2 * student) - 1),) for stage in range(student)]
    elif strategy == "first":
        groups = [(stage,) if stage < teacher else () for stage in range(student)]
    elif strategy == "last":
        groups = [(stage + teacher - student,) if stage + teacher >= student else () for stage in range(student)]
    elif strategy == "last_to_all":
        groups = [(teacher - 1,)] * student
    elif strategy == "last_only":
        groups = [()] * (student - 1) + [(teacher - 1,)]
    else:
        raise InputError(f"stages '{strategy}' is unknown; known: grouped, first, last, uniform, last_to_all, last_only")
    pairs = [(stage, teacher_stage, 1 / len(group)) for stage, group in enumerate(groups) for teacher_stage in group]
    return StagePairs(*zip(*pairs, strict=True))

"""Which weights a run evaluates, reports and saves: the last or the best, of the student or of its moving average."""

from typing import Any

from torch import Tensor, nn

from detrdistill.recipes.parts import Schedule
from detrdistill.training.averaging import Average


class Kept:
    """The weights that a schedule keeps. They are in every checkpoint, so that a kill loses none.

    Attributes:
        model: what is evaluated: the student, or the average of its steps.
    """

    def __init__(self, student: nn.Module, schedule: Schedule) -> None:
        self.student, self.only_best = student, schedule.keep == "best"
        self.average = Average(student, schedule.ema) if schedule.ema else None
        self.model = student if self.average is None else self.average.module
        self._best: dict[str, Tensor] | None = None  # on the CPU

    def stepped(self) -> None:
        """To be called after every optimizer step."""
        if self.average is not None:
            self.average.update_parameters(self.student)

    def evaluated(self, step: int, metrics: dict[str, float | None], state: dict[str, Any]) -> None:
        """Put into `state` what the run reports as of now; of equally good evaluations the first is kept."""
        if self.only_best:
            if "kept" in state and (metrics["AP"] or 0.0) <= (state["kept"]["AP"] or 0.0):
                return
            state["kept"] = {"step": step, "AP": metrics["AP"]}
            self._best = {name: value.detach().to("cpu", copy=True) for name, value in self.model.state_dict().items()}
        state["metrics"] = metrics

    def give_to_student(self) -> None:
        """At the end: the student gets the weights that are saved."""
        if self._best is not None:
            self.student.load_state_dict(self._best)
        elif self.average is not None:
            self.student.load_state_dict(self.average.module.state_dict())

    @property
    def nbytes(self) -> int:
        """Bytes that it adds to a checkpoint."""
        copies = self.only_best + (self.average is not None)
        return copies * sum(value.nbytes for value in self.student.state_dict().values())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it: nothing where the last weights are kept as they are."""
        average = {} if self.average is None else {"average": self.average.state_dict()}
        return average | ({} if self._best is None else {"best": self._best})

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Raises KeyError or RuntimeError where `saved` is that of another run."""
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        if self.only_best and "kept" in saved["state"]:
            self._best = {name: saved["best"][name] for name in self.student.state_dict()}

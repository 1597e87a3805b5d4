"""What every notebook starts with: its parameters checked, its preset and store opened, and provenance for its figures."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pandas as pd
from matplotlib.figure import Figure
from pydantic import Field, NonNegativeInt, field_validator

from detrdistill.experiments.presets import PRESETS, Preset, get_preset
from detrdistill.experiments.store import Record, Store, open_store, provenance
from detrdistill.experiments.strict import Strict
from detrdistill.experiments.tables import TITLES, short_commit
from detrdistill.figures.style import save

if TYPE_CHECKING:
    from torch import nn

    from detrdistill.data.coco import CocoDataset


class Parameters(Strict):
    """The parameters that notebooks share. YAML's text numbers are accepted, and one seed where a list is meant."""

    preset: str
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    changes: dict[str, Any] = Field(default_factory=dict)
    device: Literal["auto", "cpu", "cuda"]
    progress: bool

    @field_validator("preset")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in PRESETS:
            raise ValueError(f"unknown preset; known: {', '.join(PRESETS)}")
        return value

    @field_validator("seeds", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        if isinstance(value, str):
            value = value.replace(",", " ").split()
        return value if isinstance(value, list | tuple) else [value]


@dataclass(frozen=True)
class Session:
    """A notebook's checked parameters, with its preset and store."""

    preset: Preset
    store: Store
    seeds: tuple[int, ...]
    device: str
    progress: bool

    def run(self, setting: str, seed: int = 0) -> Record:
        """Train a row of the preset, or return what is stored."""
        from detrdistill.experiments.runs import run  # torch, which tables and figures do without

        return run(self.preset.recipe(setting, seed), self.store, device=self.device, progress=self.progress)

    def detector(self, record: Record, dataset: "CocoDataset") -> "nn.Module":
        """The detector that a run trained, ready to use."""
        from detrdistill.experiments.runs import load_detector

        return load_detector(record.recipe, self.store, dataset)

    def summary(self, **records: Record) -> pd.DataFrame:
        """A line a setting: the twelve numbers' best known, and what they cost."""
        lines = [
            {"setting": TITLES.get(setting, setting)}
            | {name: record.metrics[name] for name in ("AP", "AP50", "AP75")}
            | {"steps": record.cost["steps"], "minutes": record.cost["seconds"] / 60}
            for setting, record in records.items()
        ]
        return pd.DataFrame(lines).set_index("setting").round(1)

    def show(self, figure: Figure, name: str) -> Figure:
        """Save a figure as PNG and PDF in the preset's `figures/`, and return it for the notebook to show."""
        save(figure, self.store.root / "figures" / name)
        return figure

    def provenance(self, record: Record) -> str:
        """The line under a figure: which run, by which code, on which data."""
        about = record.provenance
        return f"run {record.id}; commit {short_commit(about['commit'])}; data {about['data_sha256'][:8]}; {about['device']}"


def validate(**parameters: object) -> Session:
    """Check a notebook's parameters.

    `changes` are fields of the students' recipe by dotted name, or of the method as "method.gamma"; the teacher stays as it is.

    Raises:
        InputError: an unknown preset or field, a wrong type, a value out of range; names the parameter and what is allowed.
    """
    read = Parameters.read(parameters, where="parameters")
    preset = get_preset(read.preset)
    of_method = {name.removeprefix("method."): value for name, value in read.changes.items() if name.startswith("method.")}
    of_student = {name: value for name, value in read.changes.items() if not name.startswith("method.")}
    preset = replace(preset, student=preset.student.replace(**of_student), method=preset.method.replace(**of_method))
    return Session(preset, open_store(read.preset), read.seeds, read.device, read.progress)


def versions() -> pd.DataFrame:
    """Code and library versions of this session."""
    about = provenance()
    rows = {"detrdistill": short_commit(about["commit"]), "python": about["python"]} | about["versions"]
    return pd.DataFrame({"version": rows})

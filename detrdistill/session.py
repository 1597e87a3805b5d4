"""What every notebook starts with: its parameters checked, its preset and store opened, and provenance for its figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from detrdistill.data.layout import data_cache, layout
from detrdistill.errors import InputError
from detrdistill.parameters import make_presets, only_seed, read_parameters, require_images
from detrdistill.recipes.parts import Folder
from detrdistill.recipes.presets import Preset
from detrdistill.recipes.recipe import Recipe
from detrdistill.recipes.words import NAMES
from detrdistill.records import Record, short_commit
from detrdistill.runs.provenance import provenance
from detrdistill.runs.store import Store, open_store

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import nn

    from detrdistill.compare.compare import Comparison
    from detrdistill.data.coco import CocoDataset
    from detrdistill.session_table import SessionTable, SessionWeights


@dataclass(frozen=True)
class Session:
    """A notebook's checked parameters, with its preset and store.

    Attributes:
        presets: by detector, where a notebook looks at several; `preset` is the first.
        setting, image, images, rows, interactive, threshold: as in `Parameters`.
    """

    preset: Preset
    store: Store
    seeds: tuple[int, ...]
    device: str
    progress: bool
    presets: Mapping[str, Preset]
    setting: str = "teacher"
    image: int | Path = 0
    images: tuple[int, ...] = ()
    rows: tuple[str, ...] = ()
    interactive: bool = False
    threshold: float = 0.5

    @property
    def seed(self) -> int:
        """The one seed of a notebook that shows one run. Raises InputError where several are given."""
        return only_seed(self.seeds)

    def each(self) -> dict[str, Self]:
        """A session a detector, by the detector's name in words."""
        return {NAMES[name]: replace(self, preset=preset) for name, preset in self.presets.items()}

    def on_data(self, folder: Path) -> Self:
        """The same recipes on another data folder.

        A floor stated for the preset's data means nothing there: a teacher must find something, and that is all.
        """
        data = Folder(path=folder)
        preset = replace(
            self.preset,
            teacher=self.preset.teacher.replace(data=data),
            student=self.preset.student.replace(data=data),
            floor=min(self.preset.floor, 0.0),
        )
        return replace(self, preset=preset, presets={preset.student.detector: preset})

    def on_folder(self) -> Self:
        """The same on a folder in any case: the embedded digits are taken as the COCO folder that they are on disk."""
        data = self.preset.student.data
        return self if isinstance(data, Folder) else self.on_data(layout(data, "train", data_cache())[0].parent)

    def run(self, setting: str, seed: int = 0) -> Record:
        """Train a row of the preset, or return what is stored; the committed reference's teacher will do."""
        return self.train(self.preset.recipe(setting, seed), setting == "teacher")

    def train(self, recipe: Recipe, reference: bool = False) -> Record:
        """Train any recipe, or return what is stored.

        Args:
            reference: whether the committed reference will do.
        """
        from detrdistill.runs.run import run

        return run(recipe, self.store, device=self.device, progress=self.progress, reference=reference)

    def table(self, name: str) -> "SessionTable":
        """One of `recipes.tables.TABLES`, for the detectors and seeds asked for.

        Raises:
            InputError: there is no table of this name.
        """
        from detrdistill.session_table import SessionTable

        return SessionTable(name, list(self.presets.values()), self.seeds, self.store, self.train)

    def weights(self) -> "SessionWeights":
        """The trials that tune the weights of `rows`.

        Raises:
            InputError: no detector has a row of such a name, or the preset's data is a folder.
        """
        from detrdistill.session_table import SessionWeights

        return SessionWeights(list(self.presets.values()), self.rows, self.store, self.train)

    def with_weights(self, records: Sequence[Record]) -> list[Record]:
        """Those of the runs whose weights are stored: of some results the repository holds records and logs alone."""
        return [record for record in records if self.store.weights(record.recipe).exists()]

    def val(self, record: Record | None = None) -> "CocoDataset":
        """The validation images, prepared for a run's detector; without, for the preset's student."""
        from detrdistill.runs.load import open_split

        student = self.preset.student
        return open_split(student.replace(resize=record.recipe.resize) if record else student, "val")

    def detector(self, record: Record, dataset: "CocoDataset") -> "nn.Module":
        """The detector that a run trained, ready to use."""
        from detrdistill.runs.load import load_detector

        return load_detector(record.recipe, self.store, dataset)

    def summary(self, **records: Record | Sequence[Record]) -> "pd.DataFrame":
        """A line a setting: the twelve numbers' best known, and what they cost.

        Of several runs the means, how many they are, and half the width of the 95 % interval of AP.
        """
        import pandas as pd

        from detrdistill.recipes.words import TITLES
        from detrdistill.statistics import mean_and_half

        lines = {}
        for setting, given in records.items():
            runs = _distinct([given] if isinstance(given, Record) else given)
            numbers = {name: [run.metrics[name] for run in runs] for name in ("AP", "AP50", "AP75")}
            numbers |= {"test AP": [run.test["AP"] for run in runs if run.test]}
            numbers |= {"steps": [run.cost["steps"] for run in runs], "minutes": [run.cost["seconds"] / 60 for run in runs]}
            found = {name: mean_and_half(pd.Series(values, dtype=float)) for name, values in numbers.items()}
            counted = {"seeds": len(runs), "± (95 %)": found["AP"][1]}
            lines[TITLES.get(setting, setting)] = counted | {name: mean for name, (mean, _) in found.items()}
        table = pd.DataFrame.from_dict(lines, orient="index").rename_axis("setting").round(1)
        if (table["seeds"] == 1).all():
            table = table.drop(columns=["seeds", "± (95 %)"])
        return table.astype({"steps": int}).dropna(axis="columns", how="all")

    def curves(self, records: Mapping[str, Sequence[Record]]) -> "Figure":
        """AP while training by setting, of a list of runs each; the line below names one run, DETRDistill's or the last setting's."""
        from detrdistill.figures.convergence import convergence

        first = {setting: runs[0] for setting, runs in records.items() if runs}
        note = self.provenance(_named(first)) if first else ""
        return convergence({setting: [record.curve for record in _distinct(runs)] for setting, runs in records.items()}, note)

    def detections(self, records: Mapping[str, Record], images: Sequence[int]) -> "Figure":
        """What runs' detectors find on validation images, by setting, beside the ground truth; a run without stored weights is left out.

        The line below names one run, DETRDistill's or the last.
        """
        from detrdistill.analysis import detections
        from detrdistill.figures.detections import compare

        val = self.val()
        drawn = {setting: record for setting, record in records.items() if self.with_weights([record])}
        columns = {"ground truth": detections.ground_truth(val, images)}
        columns |= {setting: detections.detect(self.detector(record, val), self.val(record), images) for setting, record in drawn.items()}
        return compare(detections.pictures(val, images), columns, self.provenance(_named(drawn)) if drawn else "")

    def compare(self, records: Mapping[str, Record]) -> "Comparison":
        """Runs side by side on the validation images, by setting; the first is what others are compared with.

        A run without stored weights is left out. What the others cost is kept beside their records.

        Raises:
            InputError: fewer than two are left.
        """
        from detrdistill.compare.compare import compare_models
        from detrdistill.predict.models import open_model

        there = {setting: record for setting, record in records.items() if self.with_weights([record])}
        if len(there) < 2:
            without = ", ".join(record.id for setting, record in records.items() if setting not in there)
            found = f"the weights of {without} are not in {self.store.root}" if without else f"{len(records)} was given"
            raise InputError(f"a comparison needs two runs with weights, and {found}; train them, in a results folder of your own")
        models = {setting: open_model(str(self.store.folder(record.recipe)), self.device) for setting, record in there.items()}
        return compare_models(models, self.preset.student.data, threshold=self.threshold, progress=self.progress)

    def save(self, figure: "Figure", name: str) -> "Figure":
        """Save a figure as PNG and PDF in the preset's `figures/`, and return it for the notebook to show."""
        from detrdistill.checkpoints.presets import report_folder
        from detrdistill.figures.style import save

        save(figure, report_folder(self.store.root, [self.preset]) / "figures" / name)
        return figure

    def provenance(self, record: Record) -> str:
        """The line under a figure: which run, by which code, on which data."""
        about = record.provenance
        return f"run {record.id}; commit {short_commit(about['commit'])}; data {about['data_sha256'][:8]}; {about['device']}"


def open_session(**parameters: object) -> Session:
    """Check a notebook's parameters, and open its preset and store.

    `changes` are fields of the students' recipe by dotted name, of the method as "method.gamma", or of the teacher as
    "teacher.schedule.steps"; else the teacher stays as it is, but for `parameters.SHARED`, as on the command line.

    Raises:
        InputError: an unknown parameter, preset, detector, setting or field, a wrong type, a value out of range, a file or folder that
            is not there; names the parameter and what is allowed.
    """
    read = read_parameters(parameters)
    presets = make_presets(read)
    session = Session(
        next(iter(presets.values())),
        _store(read.results) if read.results else open_store(read.preset),
        read.seeds,
        read.device,
        read.progress,
        presets,
        read.setting,
        read.image,
        read.images,
        read.rows,
        read.interactive,
        read.threshold,
    )
    if read.data:
        session = session.on_data(Path(read.data).expanduser())
    require_images(read, session.preset)
    return session


def _named(records: Mapping[str, Record]) -> Record:
    """The run that a figure of several names."""
    return records.get("detrdistill") or list(records.values())[-1]


def _distinct(records: Sequence[Record]) -> list[Record]:
    """Each run once: students of several seeds may have one teacher."""
    return list({record.id: record for record in records}.values())


def _store(folder: str) -> Store:
    """The store of a stated folder; "results/own" is the folder `own` where all results lie, wherever the notebook runs."""
    path = Path(folder).expanduser()
    return open_store(str(Path(*path.parts[1:]))) if path.parts[0] == "results" and len(path.parts) > 1 else Store(path)


def versions() -> "pd.DataFrame":
    """Code and library versions of this session."""
    import pandas as pd

    about = provenance()
    rows = {"detrdistill": short_commit(about["commit"]), "python": about["python"]} | about["versions"]
    return pd.DataFrame({"version": rows})

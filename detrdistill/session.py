"""What every notebook starts with: its parameters checked, its preset and store opened, and provenance for its figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from detrdistill.data.layout import data_cache, layout
from detrdistill.errors import InputError
from detrdistill.parameters import SHARED, Parameters, _injected_in_vain
from detrdistill.recipes.identity import run_id
from detrdistill.recipes.methods import METHODS
from detrdistill.recipes.presets import Preset, get_preset
from detrdistill.recipes.recipe import Digits, Folder
from detrdistill.recipes.words import DETECTORS
from detrdistill.records import Record, short_commit
from detrdistill.runs.provenance import provenance
from detrdistill.runs.store import Store, open_store

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import nn

    from detrdistill.data.coco import CocoDataset
    from detrdistill.recipes.rows import Table
    from detrdistill.report.comparisons import Comparisons


@dataclass(frozen=True)
class Session:
    """A notebook's checked parameters, with its preset and store.

    Attributes:
        presets: by detector, where a notebook looks at several; `preset` is the first.
        setting, image, images, rows, interactive: as in `Parameters`.
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

    def each(self) -> dict[str, Self]:
        """A session a detector, by the detector's name in words."""
        return {DETECTORS[name]: replace(self, preset=preset) for name, preset in self.presets.items()}

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
        """Train a row of the preset, or return what is stored."""
        from detrdistill.runs.run import run

        return run(self.preset.recipe(setting, seed), self.store, device=self.device, progress=self.progress)

    def table(self, name: str) -> "Table":
        """The runs of one of `recipes.tables.TABLES`, for the detectors and seeds asked for."""
        from detrdistill.recipes.tables import make_table

        return make_table(name, list(self.presets.values()), self.seeds)

    def comparisons(self) -> "Comparisons":
        """Differences between rows, from the stored runs of all tables of these detectors and seeds."""
        from detrdistill.recipes.tables import TABLES
        from detrdistill.report.comparisons import Comparisons

        return Comparisons(map(self.table, TABLES), self.store)

    def run_table(self, table: "Table") -> None:
        """Train every run of a table that is not stored yet."""
        from detrdistill.runs.run import run

        for recipe in {run_id(recipe): recipe for recipe in table.recipes()}.values():
            run(recipe, self.store, device=self.device, progress=self.progress)

    def tune(self) -> "pd.DataFrame":
        """Run the trials that `rows` still miss, of each detector that has such a row; all that was tried, as `tuning.tuning_frame` has it.

        Raises:
            InputError: no detector has a row of this name, or the preset's data is a folder.
        """
        from detrdistill.report.weights import tuning_frame
        from detrdistill.runs.run import run
        from detrdistill.runs.tuning import find_row, rows_to_tune, tune

        presets = list(self.presets.values())
        for name in self.rows:
            find_row(presets, name)
        for row in rows_to_tune(presets):
            if row.name in self.rows:
                tune(row, self.store, lambda recipe: run(recipe, self.store, device=self.device, progress=self.progress))
        return tuning_frame(presets, self.store)

    def curves(self, table: "Table") -> dict[str, list[list[dict[str, float | None]]]]:
        """AP while training of the table's rows at the end of the schedule, by setting or title; of its first detector."""
        from detrdistill.recipes.words import TITLES

        rows = [row for row in table.rows if row.at == 1 and row.detector == table.rows[0].detector]
        # A teacher is known by its name: its curve is a level to reach.
        names = [row.setting if row.setting in TITLES else row.title.partition(", whole")[0] for row in rows]
        return {name: [self.store.record(one).curve for one in row.recipes.values()] for name, row in zip(names, rows, strict=True)}

    def with_weights(self, records: Sequence[Record]) -> list[Record]:
        """Those of the runs whose weights are stored: of some results the repository holds records and logs alone."""
        return [record for record in records if self.store.weights(record.recipe).exists()]

    def detector(self, record: Record, dataset: "CocoDataset") -> "nn.Module":
        """The detector that a run trained, ready to use."""
        from detrdistill.runs.load import load_detector

        return load_detector(record.recipe, self.store, dataset)

    def summary(self, **records: Record) -> "pd.DataFrame":
        """A line a setting: the twelve numbers' best known, and what they cost."""
        import pandas as pd

        from detrdistill.recipes.words import TITLES

        lines = [
            {"setting": TITLES.get(setting, setting)}
            | {name: record.metrics[name] for name in ("AP", "AP50", "AP75")}
            | {"steps": record.cost["steps"], "minutes": record.cost["seconds"] / 60}
            for setting, record in records.items()
        ]
        return pd.DataFrame(lines).set_index("setting").round(1)

    def show(self, figure: "Figure", name: str) -> "Figure":
        """Save a figure as PNG and PDF in the preset's `figures/`, and return it for the notebook to show."""
        from detrdistill.figures.style import save

        save(figure, self.store.root / "figures" / name)
        return figure

    def provenance(self, record: Record) -> str:
        """The line under a figure: which run, by which code, on which data."""
        about = record.provenance
        return f"run {record.id}; commit {short_commit(about['commit'])}; data {about['data_sha256'][:8]}; {about['device']}"


def validate(**parameters: object) -> Session:
    """Check a notebook's parameters.

    `changes` are fields of the students' recipe by dotted name, of the method as "method.gamma", or of the teacher as
    "teacher.schedule.steps"; else the teacher stays as it is, but for `SHARED`, as on the command line.

    Raises:
        InputError: an unknown parameter, preset, detector, setting or field, a wrong type, a value out of range, a file or folder that
            is not there; names the parameter and what is allowed.
    """
    if unknown := _injected_in_vain(parameters):
        raise InputError(f"parameters: unknown {', '.join(unknown)}, injected by papermill; known here: {', '.join(parameters)}")
    read = Parameters.read(parameters, where="parameters")
    names = _detectors(read)
    try:
        presets = {name: _changed(get_preset(read.preset, name), read.changes) for name in names}
    except InputError as error:
        raise InputError(f"parameters: 'changes': {error}") from None
    session = Session(
        presets[names[0]],
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
    )
    try:
        session.preset.recipe(read.setting)
    except InputError as error:
        raise InputError(f"parameters: 'setting' = {read.setting!r}: {error}") from None
    if read.data:
        session = session.on_data(Path(read.data).expanduser())
    data = session.preset.student.data
    for name, value in (("image", read.image), *(("images", one) for one in read.images)):
        if isinstance(data, Digits) and isinstance(value, int) and value >= data.val:
            raise InputError(
                f"parameters: '{name}' = {value}: the validation images of preset {read.preset} are numbered 0 to {data.val - 1}"
            )
    return session


def _detectors(read: Parameters) -> list[str]:
    """The detectors a notebook asks for; without any, all that the preset has recipes for."""
    name, wanted = ("detector", (read.detector,)) if read.detectors is None else ("detectors", read.detectors)
    known, refused = [], {}
    for detector in wanted or DETECTORS:
        try:
            get_preset(read.preset, detector)
            known.append(detector)
        except InputError as error:
            refused[detector] = error
    for detector, error in refused.items():
        if wanted:
            raise InputError(f"parameters: '{name}' = {detector!r}: {error}") from None
    return known


def _changed(preset: Preset, changes: Mapping[str, Any]) -> Preset:
    """The preset with a user's changes to student, method and teacher."""

    def own(part):
        return {name.removeprefix(part): value for name, value in changes.items() if name.startswith(part)}

    of_student = {name: value for name, value in changes.items() if not name.startswith(("method.", "teacher."))}
    shared = {name: value for name, value in of_student.items() if name.split(".")[0] in SHARED}
    if own("method."):  # a weight that is stated holds: DETRDistill's are multiplied first, and those of its parts not at all
        tuned = {name: factor for name, factor in preset.tuned.items() if name in METHODS and name != "detrdistill"}
        preset = replace(preset, method=preset.tuned_method("detrdistill"), tuned=tuned)
    return replace(
        preset,
        student=preset.student.replace(**of_student),
        teacher=preset.teacher.replace(**(shared | own("teacher."))),
        method=preset.method.replace(**own("method.")),
    )


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

"""Tables, figures and the page of a preset from whatever runs are stored; in seconds, without training.

Without torch too, but where a published detector's file is read for its sizes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from detrdistill.checkpoints.presets import choose_presets, report_folder
from detrdistill.errors import InputError
from detrdistill.figures import style
from detrdistill.figures.bars import bars
from detrdistill.figures.comparison import comparison
from detrdistill.figures.convergence import convergence
from detrdistill.figures.forest import forest
from detrdistill.figures.loss_parts import loss_parts
from detrdistill.figures.residuals import residuals
from detrdistill.figures.weights import weight_trials
from detrdistill.published import in_words, published
from detrdistill.recipes.parts import Digits
from detrdistill.recipes.presets import IF_NAMED, Preset, get_preset
from detrdistill.recipes.recipe import Recipe
from detrdistill.recipes.rows import Row, Table
from detrdistill.recipes.tables import BESIDE, QUESTIONS, TABLES, WEIGHTS, all_compared, make_table, possible_tables, usual_tables
from detrdistill.recipes.words import NAMES
from detrdistill.report.board import Verdict, harms_of, headline, verdicts
from detrdistill.report.claims import NOTE, claim_cells, weigh, write_claims
from detrdistill.report.comparisons import Comparisons
from detrdistill.report.formats import write_table
from detrdistill.report.page import Section, write_page
from detrdistill.report.register import planned_seeds
from detrdistill.report.tables import NOTES, cells, collect, conditions, provenance_line, summarise
from detrdistill.report.weights import NOTE as NOTE_OF_WEIGHTS
from detrdistill.report.weights import tuning_cells, tuning_frame, write_tuning
from detrdistill.runs.plan import records
from detrdistill.runs.reference import run_log
from detrdistill.runs.store import Store, open_store

MAIN_FIGURES = ("figure1", "convergence", "loss_parts")  # of the main results, beside their own
CLAIM_FIGURES = ("forest", "residuals")
NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


@dataclass(frozen=True)
class Place:
    """Where a report goes, and which figures: all, or those named; "convergence" is that of every detector."""

    root: Path
    formats: tuple[str, ...]
    figures: tuple[str, ...] = ()

    @property
    def tables(self) -> Path:
        return self.root / "tables"

    def save(self, figures: Mapping[str, Figure]) -> list[Path]:
        """Write each figure in all formats, one figure after the other."""
        wanted = {name: figure for name, figure in figures.items() if not self.figures or {name, _family(name)} & set(self.figures)}
        return [path for name, figure in wanted.items() for path in style.save(figure, self.root / "figures" / name, self.formats)]

    def inside(self, paths: Iterable[Path]) -> list[str]:
        """The paths as links of the page."""
        return [path.relative_to(self.root).as_posix() for path in paths]

    def pictures(self, paths: Iterable[Path]) -> list[str]:
        """Those that the page shows."""
        return self.inside(path for path in paths if path.suffix == ".png")


def write_report(
    preset_name: str,
    seeds: Sequence[int],
    store_root: Path | str | None = None,
    tables: Sequence[str] = (),
    detectors: Sequence[str] = (),
    source: Store | None = None,
    formats: Sequence[str] = style.USUAL,
    figures: Sequence[str] = (),
    out: Path | None = None,
    *,
    teacher: str = "",
    start: str = "",
) -> list[Path]:
    """Write tables to `tables/`, figures to `figures/` and a page with everything, `index.html`; what is missing is "not run".

    Figures are drawn in the look of `figures.style.drawn_as`.

    Args:
        store_root: the preset's results folder; by default that of `store.open_store`. With a published detector, tables, figures and
            page go to a folder of their own in it (`report_folder`).
        tables: those to write; by default the preset's usual ones. Tables that are there already are written again.
        detectors: those to compare; by default as `presets_of`.
        source: where the records lie; by default in the folder that is written to.
        formats: of the figures; the page shows the PNG files.
        figures: names of those to write; by default all.
        out: another folder, for tables and figures without a page: of those tables alone that are named, if any are.
        teacher, start: as in `choose_presets`.

    Returns:
        The files written, the same bytes for the same records.

    Raises:
        InputError: an unknown preset, table or figure, no seeds, a figure that has nothing to show, or records that were edited or do not
            belong together.
    """
    store = open_store(preset_name) if store_root is None else Store(store_root)
    presets = presets_of(preset_name, detectors, source or store, teacher, start)
    style.check_formats(formats)
    source, place = source or store, Place(out or report_folder(store.root, presets), tuple(formats), tuple(figures))
    names = tables if out and tables else tables_of(presets, tables, store, source)
    made = [make_table(name, presets, seeds) for name in names]
    check_figures(figures, made)
    frames = [collect(table, source) for table in made]
    # Of all tables, whichever are shown: every run of a detector tells how large its noise is.
    everything = all_compared(presets, seeds)
    comparisons = Comparisons(everything, source)
    planned = planned_seeds(everything)
    weighed = weigh(everything, comparisons, planned)  # whose parts are tested together, whichever are shown
    if not weighed.empty:
        shown = {table.name for table in made}
        shown |= set(BESIDE) if "main_results" in shown else set()  # its teachers are theirs
        weighed = weighed[weighed["table"].isin(shown)].reset_index(drop=True)
    summaries = [summarise(table, frame, comparisons, planned) for table, frame in zip(made, frames, strict=True)]
    harms = {row: words for table, summary in zip(made, summaries, strict=True) for row, words in harms_of(table.name, summary).items()}
    claims = verdicts(weighed, harms)
    paths, sections = [], []
    for table, frame, summary in zip(made, frames, summaries, strict=True):
        own_claims = verdicts(weighed[weighed["table"] == table.name], harms) if claims else []
        written, section = write_one(table, frame, summary, own_claims, place, source)
        paths += written
        sections.append(section)
    own = "" if source.root == store.root else "Nothing of it was run here: these are the committed results of results/reference. "
    # Of all tables, which may differ in code and seeds; of weights alone there is none.
    about = f"Preset {preset_name}. {own}" + (provenance_line(pd.concat(frames)) if frames else "")
    about = about.strip()
    written, of_claims = write_all_claims(weighed, comparisons, about, place)
    paths += written
    sections = of_claims + sections
    written, of_weights = write_weights(presets, place, source)
    paths += written
    sections += of_weights
    drawn = {name for path in paths if path.parent.name == "figures" for name in (path.stem, _family(path.stem))}
    if absent := [name for name in figures if name not in drawn]:
        raise InputError(f"figure '{absent[0]}' has nothing to show: no run that it needs is stored; the others are written")
    if out:
        return paths
    sections += beside(sections, place.root, verdicts(weighed[weighed["table"].isin(BESIDE)], harms) if claims else [])
    lead = [f"Preset {preset_name}, on {everything[0].measured_on}. {own}".strip()]
    lead += [f"{claims[0].text}: {claims[0].sentence}."] if claims else []
    return [*paths, write_page(place.root, headline(claims), lead, sections, claims, [about, NOTES])]


def stored_seeds(
    preset_name: str,
    tables: Sequence[str] = (),
    detectors: Sequence[str] = (),
    store: Store | None = None,
    *,
    teacher: str = "",
    start: str = "",
) -> tuple[int, ...]:
    """The seeds of which these tables have a student's record; 0 if there are none."""
    store = store or open_store(preset_name)
    presets = presets_of(preset_name, detectors, store, teacher, start)
    teachers, names = [preset.teacher for preset in presets], tables_of(presets, tables, store)

    def has_student(seed: int) -> bool:
        recipes = [recipe for name in names for recipe in make_table(name, presets, [seed]).recipes()]
        return any(store.record(one) for one in recipes if one.seed == seed and one not in teachers)

    seeds = {one.recipe.seed for one in records([store.root]) if isinstance(one.recipe, Recipe)}
    return tuple(seed for seed in sorted(seeds) if has_student(seed)) or (0,)


def presets_of(name: str, detectors: Sequence[str], store: Store, teacher: str = "", start: str = "") -> list[Preset]:
    """The presets of the detectors that are named, or of all that the preset has; of its families of transformers those with a run."""
    presets = choose_presets(name, detectors, teacher, start)
    if detectors or teacher or start:
        return presets
    families = [get_preset(name, detector) for detector in IF_NAMED.get(name, ())]
    return presets + [one for one in families if any(store.root.glob(f"runs/{one.student.detector}-*/record.json"))]


def tables_of(presets: Sequence[Preset], tables: Sequence[str], *stores: Store) -> list[str]:
    """Those named, or else the preset's usual ones, and those that are there already; in the paper's order. (Not `WEIGHTS`.)"""
    folders = [report_folder(store.root, presets) / "tables" for store in stores]
    there = {name for name in possible_tables(presets) if any((folder / f"{name}.csv").exists() for folder in folders)}
    names = (there | set(tables or usual_tables(presets))) - {WEIGHTS}
    return sorted(names, key=[*TABLES, *names].index)


def check_figures(names: Sequence[str], tables: Sequence[Table]) -> None:
    """Raise InputError where the report of these tables has no figure of a name."""
    known = [*CLAIM_FIGURES, *(table.name for table in tables), WEIGHTS]
    known += MAIN_FIGURES if any(table.name == "main_results" for table in tables) else ()
    known += [f"{name}_{detector}" for name in MAIN_FIGURES[1:] if name in known for detector in NAMES]
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"figure '{unknown[0]}' is unknown; known: {', '.join(known)}")


def _family(name: str) -> str:
    """The figure of the main results that this one is of one detector; else the name itself."""
    return next((one for one in MAIN_FIGURES if name.startswith(f"{one}_")), name)


def write_weights(presets: Sequence[Preset], place: Place, source: Store) -> tuple[list[Path], list[Section]]:
    """What was tried to tune the weights, if anything was: a table, a picture, and their part of the page."""
    digits = [preset for preset in presets if isinstance(preset.student.data, Digits)]
    frame = tuning_frame(digits, source)
    if frame.empty or not frame["trials"].any():
        return [], []
    files = write_tuning(frame, NOTE_OF_WEIGHTS, place.tables)
    drawn = place.save({WEIGHTS: weight_trials(frame, NOTE_OF_WEIGHTS)})
    notebooks = [f"notebooks/{path.name}" for path in sorted(NOTEBOOKS.glob(f"[0-9]*_{WEIGHTS}.ipynb"))]
    section = Section(
        WEIGHTS, "Weights that were tried", QUESTIONS[WEIGHTS], table=tuning_cells(frame), note=NOTE_OF_WEIGHTS,
        figures=place.pictures(drawn), notebooks=notebooks, files=place.inside(files),
    )  # fmt: skip
    return [*files, *drawn], [section]


def beside(sections: Sequence[Section], root: Path, claims: Sequence[Verdict]) -> list[Section]:
    """A section for the notebooks that make no table, with their claims and figures, as far as they are there."""
    linked = {Path(path).name for section in sections for path in section.notebooks}
    notebooks = [path for path in sorted(root.glob("notebooks/[0-9]*.ipynb")) if path.name not in linked and ".failed" not in path.name]
    figures = [
        path for path in sorted(root.glob("figures/*.png")) if not path.stem.startswith((*TABLES, WEIGHTS, *MAIN_FIGURES, *CLAIM_FIGURES))
    ]
    inside = [[path.relative_to(root).as_posix() for path in found] for found in (figures, notebooks)]
    question = "What does a detector do with its queries, and what changes when it was distilled?"
    if not claims and not any(inside):
        return []
    return [Section(*BESIDE, "Inside the detectors", question, claims, figures=inside[0], notebooks=inside[1])]


def write_all_claims(weighed: pd.DataFrame, comparisons: Comparisons, about: str, place: Place) -> tuple[list[Path], list[Section]]:
    """The claims with their figures, and all differences as a part of the page; nothing where there are none."""
    files = write_claims(weighed, f"{about} {NOTE}", place.tables)
    if not files:
        return [], []
    drawn = {"forest": forest(weighed, about)}
    if any(len(comparisons.fit(detector).residuals) for detector in comparisons.detectors):
        drawn["residuals"] = residuals({name: comparisons.fit(name).residuals for name in comparisons.detectors}, about)
    figures = place.save(drawn)
    section = Section(
        "differences", "All differences", "How large is each difference, and how sure is it?", table=claim_cells(weighed), note=NOTE,
        figures=place.pictures(figures), files=place.inside(files),
    )  # fmt: skip
    return [*files, *figures], [section]


def write_one(
    table: Table, frame: pd.DataFrame, summary: pd.DataFrame, claims: Sequence[Verdict], place: Place, source: Store
) -> tuple[list[Path], Section]:
    """One table with its figures, and its part of the page."""
    note = provenance_line(frame)
    files = write_table(table, frame, summary, place.tables)
    figures = {table.name: comparison(frame, summary, note)}
    if table.name == "main_results":
        figures |= main_figures(table, frame, summary, source)
    drawn = place.save(figures)
    section = Section(
        name=table.name,
        title=f"{table.title} ({in_words(table.published)})" if table.published else table.title,
        question=QUESTIONS[table.name],
        verdicts=claims,
        harms=list(harms_of(table.name, summary).values()),
        table=cells(summary).drop(columns="Measured on"),
        note=f"Measured on {table.measured_on}. {conditions(table, frame)}".strip(),
        provenance=note,
        figures=place.pictures(drawn),
        notebooks=[f"notebooks/{path.name}" for path in sorted(NOTEBOOKS.glob(f"[0-9]*_{table.name}.ipynb"))],
        files=place.inside(files),
    )
    return [*files, *drawn], section


def main_figures(table: Table, frame: pd.DataFrame, summary: pd.DataFrame, store: Store) -> dict[str, Figure]:
    """AP while training, the paper's Figure 1 beside ours, and the parts of a distilled student's loss."""
    found = {"figure1": bars(published("figure1"), summary, provenance_line(frame))}
    detectors = list(dict.fromkeys(row.detector for row in table.rows))
    for detector in detectors:
        rows = {row.name: row for row in table.rows if row.detector == detector}
        suffix = "" if len(detectors) == 1 else f"_{next(iter(rows['student'].recipes.values())).detector}"
        note = provenance_line(frame[frame["detector"] == detector])
        log, title = _first_log(rows["detrdistill"], store)
        found[f"convergence{suffix}"] = convergence({setting: _curves(row, store) for setting, row in rows.items()}, note)
        if log:
            found[f"loss_parts{suffix}"] = loss_parts(log, title, provenance_line(frame[frame["run"] == title]))
    return found


def _curves(row: Row, store: Store) -> list[list[dict[str, float | None]]]:
    records = [store.record(recipe) for recipe in row.recipes.values()]
    return [record.curve for record in records if record]


def _first_log(row: Row, store: Store) -> tuple[list[dict[str, float]], str]:
    """Log and name of the row's first complete run."""
    for recipe in row.recipes.values():
        if record := store.record(recipe):
            return run_log(store, record), record.id
    return [], ""

"""Tables: pure functions of stored records. Which runs make which table stands in `paper_tables.py`. No torch here.

A table is made in three steps: `collect` reads a line a run, `summarise` turns these into a line a row (means, intervals, gains,
status), `cells` into text. A run without a record is "not run" in every form, never blank and never zero.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler
from scipy.special import stdtrit

from detrdistill.errors import InputError
from detrdistill.experiments.presets import Preset
from detrdistill.experiments.published import in_words, published, published_value
from detrdistill.experiments.recipes import Digits, Folder, Recipe, run_id
from detrdistill.experiments.statistics import ONE_SEED, Difference, seeds_to_decide, verdict, verdict_words
from detrdistill.experiments.store import Record, Store, read_record, short_commit
from detrdistill.files import write_text

if TYPE_CHECKING:
    from detrdistill.experiments.comparisons import Comparisons

DETECTORS = {"deformable_detr": "Deformable DETR", "conditional_detr": "Conditional DETR", "adamixer": "AdaMixer"}
TITLES = {
    "teacher": "Teacher", "student": "Student", "detrdistill": "DETRDistill", "fitnet": "FitNet", "fgd": "FGD", "mgd": "MGD", "fkd": "FKD",
    "fgfi": "FGFI", "pkd": "PKD", "cwd": "CWD", "kd_detr": "KD-DETR", "d3etr": "D3ETR",
}  # fmt: skip
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
NOT_RUN, NO_OBJECTS = "not run", "n/a"
REPRODUCED_WITHIN, MARGIN = 0.5, 2.0  # AP; the margin is the smallest gain that matters


@dataclass(frozen=True)
class Row:
    """One line of a table: the same setting under several seeds.

    Attributes:
        detector: its name in words.
        setting: the row's name, unique for a detector.
        title: what the table calls it.
        baseline: the setting whose AP of the same seed the gain is over; "" for a row that is no method.
        published: the row's name in the published table; "" where the paper has no such row, or has it for another detector.
        column: the column there; its gain is called the same with "gain" for "AP".
        at: the part of the schedule after which AP is read off the curve; 1 is the end, and has all numbers.
        tuned_as: the name that a weight of the row's own was tuned under, in `Preset.tuned`; "" for a row that has none.
    """

    detector: str
    setting: str
    recipes: Mapping[int, Recipe]
    title: str
    baseline: str = ""
    published: str = ""
    column: str = "AP"
    at: float = 1.0
    tuned_as: str = ""


@dataclass(frozen=True)
class Table:
    """Runs to compare.

    Attributes:
        name: of the files, and of the notebook.
        published: the paper's table that these rows stand beside, such as "table3"; "" where there is none.
        title: what is compared, in words.
        measured_on: data and image size, in words.
    """

    name: str
    preset: str
    published: str
    title: str
    measured_on: str
    rows: tuple[Row, ...]

    def recipes(self) -> list[Recipe]:
        """All runs of the table."""
        return [recipe for row in self.rows for recipe in row.recipes.values()]


def measured_on(preset: Preset) -> str:
    """Data and image size of a preset, and whether that is COCO."""
    data = preset.student.data
    if isinstance(data, Digits):
        name = f"embedded digits, {data.size} px"
    else:
        name = f"folder {data.path.name}, shorter side {preset.student.resize.short} px"
    return name if preset.name == "coco" else f"{name}; not a COCO result"


def collect(table: Table, store: Store) -> pd.DataFrame:
    """A line a run: table, preset, detector, setting, seed, run, the twelve numbers, status ("measured" or "not run"), provenance.

    Raises:
        InputError: a record was edited, or the records do not belong together (other data, or another teacher than the table's).
    """
    lines, records = [], []
    for row in table.rows:
        for seed, recipe in row.recipes.items():
            record = find(store, recipe)
            line = {"table": table.name, "preset": table.preset, "detector": row.detector, "setting": row.setting, "seed": seed}
            line |= {"run": record.id if record else run_id(recipe)}
            line |= {name: _nan(value) for name, value in metrics_at(record, row.at).items()}
            line |= {"status": "measured" if record else NOT_RUN}
            about = record.provenance if record else {}
            records += [record] if record else []
            line |= {"measured_on": table.measured_on, "data_sha256": about.get("data_sha256"), "commit": about.get("commit")}
            line |= {"computed_by": _computed_by(about)}
            lines.append(line)
    refuse_mixed(records)
    return pd.DataFrame(lines)


def metrics_at(record: Record | None, at: float) -> dict[str, float | None]:
    """The twelve numbers, or the AP of the last evaluation up to a part of the schedule."""
    if record is None or at == 1:
        return record.metrics if record else dict.fromkeys(METRICS)
    until = [point["AP"] for point in record.curve if point["step"] <= round(at * record.cost["steps"])]
    return dict.fromkeys(METRICS) | {"AP": until[-1] if until else None}


def _computed_by(about: Mapping[str, Any]) -> str:
    return f"torch {about.get('versions', {}).get('torch', 'unknown')} on {about.get('device', 'unknown')}"


def find(store: Store, recipe: Recipe) -> Record | None:
    """The record of a recipe; a data folder's content, which names such a run, is taken from the record and not from the folder.

    Raises:
        InputError: a record was edited or lies in another run's folder, or there are runs on several versions of the data.
    """
    wanted = any_content(recipe)
    paths = sorted((store.root / "runs").glob(f"{recipe.title}-{'[0-9a-f]' * 8}/record.json"))
    if not isinstance(recipe.data, Folder):
        paths = [path for path in paths if path.parent.name == run_id(recipe)]
    found = []
    for path in paths:
        record = read_record(path)
        if not path.parent.name == record.id == run_id(record.recipe):
            raise InputError(f"record {path} is that of run {record.id}; a record belongs in the folder of its own run")
        if run_id(any_content(record.recipe)) == run_id(wanted):
            found.append(record)
    if len(found) > 1:
        ids = ", ".join(record.id for record in found)
        raise InputError(f"runs {ids} differ only in the content of their data; keep one of them in {store.root}")
    return found[0] if found else None


def any_content(recipe: Recipe) -> Recipe:
    """The recipe with its data folder's place and hash blotted out, so that runs on whatever content compare equal."""
    if not isinstance(recipe.data, Folder):
        return recipe
    return recipe.replace(data=recipe.data.replace(sha256="any"), teacher=recipe.teacher and any_content(recipe.teacher))


def refuse_mixed(records: Sequence[Record]) -> None:
    """Raise InputError unless all records saw the same data and started or learned from the same weights of the same runs."""
    if not records:
        return
    first, weights = records[0], {record.id: record.provenance["weights_sha256"] for record in records}
    for record in records:
        ours, theirs = first.provenance["data_sha256"], record.provenance["data_sha256"]
        if ours != theirs:
            raise InputError(
                f"runs {first.id} and {record.id} were measured on different data ({ours[:8]} and {theirs[:8]}); "
                "a table compares runs on one data set: delete the folder of the outdated one and run it again"
            )
        for name, parent in record.parents.items():
            # A file by its hash, or which of torchvision's.
            source, held = f"{record.recipe.backbone.name} {record.recipe.backbone.weights}", parent.get("sha256", parent.get("weights"))
            if held and weights.setdefault(source, held) != held:
                raise InputError(
                    f"run {record.id} started from other backbone weights, {source} ({held}), than other runs of the table "
                    f"({weights[source]}); delete the folder of the outdated one and run it again"
                )
            # A parent that is not in the table is what the first record that names it says.
            if "run" in parent and (wanted := weights.setdefault(parent["run"], parent["weights_sha256"])) != parent["weights_sha256"]:
                raise InputError(
                    f"run {record.id} used another {name} (weights {parent['weights_sha256'][:8]}) than {parent['run']} as it is now or as "
                    f"other runs used it ({wanted[:8]}); delete the folder of the outdated one and run it again"
                )


def summarise(table: Table, frame: pd.DataFrame, comparisons: "Comparisons") -> pd.DataFrame:
    """A line a row: mean over seeds, half of its 95 % t-interval, gain over the student with that of the fit, published values, status.

    Args:
        frame: what `collect` gave for this table.
        comparisons: of all tables of the preset, since every run of a detector tells how large noise is.

    Raises:
        InputError: the frame holds lines of another table or preset.
    """
    ours, held = f"{table.name} of preset {table.preset}", set(frame["table"] + " of preset " + frame["preset"])
    if held != {ours}:
        raise InputError(f"table {ours} must not be mixed with {', '.join(sorted(held - {ours}))}")
    paper = published(table.published) if table.published else None
    lines = []
    for row in table.rows:
        of_detector = frame[frame["detector"] == row.detector].set_index("seed")
        runs = of_detector[of_detector["setting"] == row.setting]
        ap, ap_half = mean_and_half(runs["AP"])
        baseline = next((one for one in table.rows if (one.detector, one.setting) == (row.detector, row.baseline)), None)
        gain = comparisons.difference(row, baseline) if baseline else Difference()
        line = {"detector": row.detector, "setting": row.setting, "title": row.title, "baseline": row.baseline}
        line |= {"published": row.published, "at": row.at}
        line |= {"AP": ap, "AP_half": ap_half, "gain": gain.mean, "gain_half": gain.half()}
        line |= {size: mean_and_half(runs[size])[0] for size in ("APs", "APm", "APl")}
        for name in ("AP", "gain"):
            stated = row.published and published_value(paper, row.published, row.column.replace("AP", name))
            line[f"published_{name}"] = stated if row.published else math.nan
        line |= {"measured_on": table.measured_on, "seeds": int(runs["AP"].notna().sum()), "seeds_wanted": len(row.recipes)}
        lines.append(line | {"status": status(line, gain, coco=table.preset == "coco")})
    return pd.DataFrame(lines)


def mean_and_half(values: pd.Series) -> tuple[float, float]:
    """Mean of what is there, and half the width of its 95 % t-interval (NaN for fewer than two values)."""
    values = values.dropna().to_numpy(float)
    if len(values) < 2:
        return (float(values[0]) if len(values) else math.nan), math.nan
    return float(values.mean()), float(stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / math.sqrt(len(values)))


def status(line: Mapping[str, float | str], gain: Difference, *, coco: bool) -> str:
    """What may be said of a row: on COCO itself "reproduced" within 0.5 AP, otherwise the verdict on its gain over the student.

    "measured" where there is nothing to compare, as for teacher and student off COCO.
    """
    if not line["seeds"]:
        return NOT_RUN
    if coco and abs(line["AP"] - line["published_AP"]) <= REPRODUCED_WITHIN + 1e-9:
        return "reproduced"
    if not line["baseline"]:
        return ONE_SEED if line["setting"] != "teacher" and line["seeds"] == 1 else "measured"
    return verdict_words(verdict(gain, MARGIN), seeds_to_decide(gain, MARGIN)) or (ONE_SEED if line["seeds"] == 1 else "measured")


def cells(summary: pd.DataFrame) -> pd.DataFrame:
    """The table as text, in the order of the paper's columns, ours and theirs apart."""
    lines = []
    for line in summary.to_dict("records"):
        distilled, unknown = bool(line["baseline"]), "not found" if line["published"] else "-"
        empty = NOT_RUN if not line["seeds"] else NO_OBJECTS if line["at"] == 1 else "-"
        lines.append(
            {
                "Detector": line["detector"],
                "Setting": line["title"],
                "AP": _number(line["AP"], empty, half=line["AP_half"]),
                "Gain": _gain(line) if distilled else "-",
                "APs": _number(line["APs"], empty),
                "APm": _number(line["APm"], empty),
                "APl": _number(line["APl"], empty),
                "Published AP": _number(line["published_AP"], unknown),
                "Published gain": _number(line["published_gain"], unknown, "+.1f") if distilled else "-",
                "Measured on": line["measured_on"],
                "Seeds": f"{line['seeds']} of {line['seeds_wanted']}",
                "Status": line["status"],
            }
        )
    return pd.DataFrame(lines)


def styled(summary: pd.DataFrame, frame: pd.DataFrame) -> Styler:
    """The table for a notebook, with its provenance as caption."""
    text = cells(summary).drop(columns="Measured on")
    caption = {"selector": "caption", "props": "text-align: left; caption-side: bottom"}
    left = [{"selector": "th, td", "props": "text-align: left"}, caption]
    return text.style.hide(axis="index").set_caption(f"{provenance_line(frame)} {NOTES}").set_table_styles(left)


def _number(value: float, empty: str, form: str = ".1f", half: float = math.nan) -> str:
    if math.isnan(value):
        return empty
    return format(value, form) + ("" if math.isnan(half) else f" ± {half:.1f}")


def _gain(line: Mapping[str, float]) -> str:
    text = _number(line["gain"], "student not run" if line["seeds"] else NOT_RUN, "+.1f", line["gain_half"])
    return f"{text} (one seed)" if math.isnan(line["gain_half"]) and not math.isnan(line["gain"]) else text


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def provenance_line(frame: pd.DataFrame) -> str:
    """What was measured, where and by which code, in one line; library and device only where the runs differ in them."""
    ran = frame[frame["status"] != NOT_RUN]
    parts = [f"Measured on {frame['measured_on'].iloc[0]}"]
    if ran.empty:
        return f"{parts[0]}: {NOT_RUN} yet."
    commits = sorted({short_commit(commit) for commit in ran["commit"]})
    parts.append(f"data {ran['data_sha256'].iloc[0][:8]}")
    parts.append(f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}")
    machines = sorted(set(ran["computed_by"]))
    parts += [f"computed by {', '.join(machines)}"] if len(machines) > 1 else []
    seeds = ran.loc[ran["setting"] != "teacher", "seed"].nunique()
    parts += [f"{seeds} seed{'s' * (seeds != 1)}"] if seeds else []
    return "; ".join(parts) + "."


NOTES = (
    "± of AP is half of the row's own 95 % t-interval over seeds. Gains are over the plain student; their ± is half of the 95 % interval "
    "that all runs of the detector give, fitted seed by seed, and the status says what it means (docs/results.md). It is a row's own, not "
    "adjusted for other rows as a claim's is: of twenty gains without any effect one is taken for one by chance. "
    "n/a: the data has no objects of that size."
)


def write_table(table: Table, frame: pd.DataFrame, summary: pd.DataFrame, folder: Path) -> list[Path]:
    """Write `<name>.csv` (a line a run), `<name>.md` and `<name>.tex` (a line a row); the same bytes for the same records."""
    text = cells(summary)
    beside = f", beside the paper's {in_words(table.published)}" if table.published else ""
    title = f"{table.title}, preset {table.preset}{beside}"
    provenance = f"{provenance_line(frame)} {NOTES}"
    forms = {"csv": to_csv(frame), "md": to_markdown(text, title, provenance), "tex": to_latex(text, title, provenance)}
    paths = []
    for suffix, content in forms.items():
        paths.append(folder / f"{table.name}.{suffix}")
        write_text(paths[-1], content)
    return paths


def to_csv(frame: pd.DataFrame) -> str:
    """Words instead of blanks; pandas reads numbers back with `na_values=["not run", "n/a", "not stored"]`.

    Each line carries its data and commit; the run's record has the rest of its provenance.
    """
    filled = frame.drop(columns="computed_by").astype(object)
    ran = frame["status"] != NOT_RUN
    whole = frame["AP50"].notna() | ~ran  # what is read off a curve has AP alone
    for column in (*METRICS, "data_sha256", "commit"):
        empty = np.where(whole, NO_OBJECTS, "not stored") if column in METRICS else "unknown"
        filled[column] = np.where(frame[column].notna(), filled[column], np.where(ran, empty, NOT_RUN))
    return filled.to_csv(index=False, lineterminator="\n")


def to_markdown(text: pd.DataFrame, title: str, provenance: str) -> str:
    line = lambda values: "| " + " | ".join(values) + " |\n"  # noqa: E731
    rows = "".join(line(values) for values in text.itertuples(index=False))
    return f"**{title}**\n\n{line(text.columns)}{line(['---'] * len(text.columns))}{rows}\n{provenance}\n"


def to_latex(text: pd.DataFrame, title: str, provenance: str) -> str:
    """A booktabs table with a caption, scaled to the line's width."""
    line = lambda values: "    " + " & ".join(map(_escape, values)) + r" \\" + "\n"  # noqa: E731
    body, before = "", None
    for values in text.itertuples(index=False):
        body += "    \\midrule\n" if before not in (None, values[0]) else ""
        body += line(values)
        before = values[0]
    return (
        "% needs \\usepackage{booktabs,graphicx}\n\\begin{table}\n  \\centering\n"
        f"  \\caption{{{_escape(f'{title}. {provenance}')}}}\n  \\resizebox{{\\linewidth}}{{!}}{{%\n"
        f"  \\begin{{tabular}}{{{'l' * len(text.columns)}}}\n    \\toprule\n{line(text.columns)}    \\midrule\n{body}    \\bottomrule\n"
        "  \\end{tabular}}\n\\end{table}\n"
    )


LATEX = {"±": r"$\pm$", "APs": r"AP$_S$", "APm": r"AP$_M$", "APl": r"AP$_L$"}


def _escape(text: str) -> str:
    for character in "%&_#":
        text = text.replace(character, f"\\{character}")
    for plain, latex in LATEX.items():
        text = text.replace(plain, latex)
    return text

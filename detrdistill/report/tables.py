"""Tables: pure functions of stored records. Which runs make which table stands in `recipes/tables.py`. No torch here.

A table is made in three steps: `collect` reads a line a run, `summarise` turns these into a line a row (means, intervals, gains,
status), `cells` into text. A run without a record is "not run" in every form, never blank and never zero.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
from pandas.io.formats.style import Styler

from detrdistill.errors import InputError
from detrdistill.published import published, published_value
from detrdistill.recipes.claims import MARGIN, REPRODUCED_WITHIN
from detrdistill.recipes.identity import run_id
from detrdistill.recipes.recipe import Recipe
from detrdistill.recipes.rows import Row, Table
from detrdistill.recipes.words import MEASURED, METRICS, NO_OBJECTS, NOT_RUN, STORED
from detrdistill.records import Cost, Record, refuse_mixed, short_commit
from detrdistill.runs.store import Store
from detrdistill.statistics import ONE_SEED, Difference, mean_and_half, seeds_to_decide, verdict, verdict_words

# In these tables parameters, GFLOPs and milliseconds stand beside AP, as soon as a run's costs were measured (`compare.costs`).
WITH_COSTS = ("main_results", "light_backbones")
UNTUNED = "AP_untuned"
COSTS = {"parameters": "Parameters (M)", "gflops": "GFLOPs", "milliseconds": "ms"}
COST_FORMS = {"parameters": ".2f", "gflops": ".3g", "milliseconds": ".1f"}

if TYPE_CHECKING:
    from detrdistill.report.comparisons import Comparisons


def collect(table: Table, store: Store) -> pd.DataFrame:
    """A line a run: table, preset, detector, setting, seed, run, the twelve numbers, status ("measured" or "not run"), provenance.

    Where a row was tuned, `UNTUNED` is the AP with the weights before. Where costs of runs of `WITH_COSTS` were measured, they are columns.

    Raises:
        InputError: a record was edited, or the records do not belong together (other data, or another teacher than the table's).
    """
    lines, records = [], []
    for row in table.rows:
        for seed, recipe in row.recipes.items():
            record = store.record(recipe)
            line = {"table": table.name, "preset": table.preset, "detector": row.detector, "setting": row.name, "seed": seed}
            line |= {"run": record.id if record else run_id(recipe)}
            line |= {name: _nan(value) for name, value in metrics_at(record, row.at).items()}
            if row.untuned:
                before = store.record(row.untuned[seed])
                line |= {UNTUNED: _nan(metrics_at(before, row.at)["AP"])}
                records += [before] if before else []
            line |= {"status": _status(record, store)}
            about = record.provenance if record else {}
            records += [record] if record else []
            line |= {"measured_on": table.measured_on, "data_sha256": about.get("data_sha256"), "commit": about.get("commit")}
            line |= {"computed_by": _computed_by(about)}
            lines.append(line | _costs(store.cost(record) if record and table.name in WITH_COSTS else None))
    refuse_mixed(records)
    frame = pd.DataFrame(lines)
    return frame if frame["cost_measured_on"].notna().any() else frame.drop(columns=[*COSTS, "cost_measured_on"])


def _costs(cost: Cost | None) -> dict[str, Any]:
    if cost is None:
        return dict.fromkeys(COSTS, math.nan) | {"cost_measured_on": None}
    numbers = (cost.parameters / 1e6, cost.gflops, cost.milliseconds["median"])
    threads = f"{cost.threads} thread{'s' * (cost.threads > 1)}"
    return dict(zip(COSTS, numbers, strict=True)) | {"cost_measured_on": f"{cost.hardware}, {threads}, {cost.runtime}"}


def _status(record: Record | None, store: Store) -> str:
    if record is None:
        return NOT_RUN
    if store.is_stored(record):
        return STORED
    return MEASURED if record.kept is None else f"{MEASURED}, best of {record.kept['of']}"


def metrics_at(record: Record | None, at: float) -> dict[str, float | None]:
    """The twelve numbers, or the AP of the last evaluation up to a part of the schedule."""
    if record is None or at == 1:
        return record.metrics if record else dict.fromkeys(METRICS)
    until = [point["AP"] for point in record.curve if point["step"] <= round(at * record.cost["steps"])]
    return dict.fromkeys(METRICS) | {"AP": until[-1] if until else None}


def _computed_by(about: Mapping[str, Any]) -> str:
    return f"torch {about.get('versions', {}).get('torch', 'unknown')} on {about.get('device', 'unknown')}"


def summarise(
    table: Table, frame: pd.DataFrame, comparisons: "Comparisons", planned: Mapping[tuple[str, ...], int] | None = None
) -> pd.DataFrame:
    """A line a row: mean over seeds, half of its 95 % t-interval, gain over the student with that of the fit, published values, status.

    Args:
        frame: what `collect` gave for this table.
        comparisons: of all tables of the preset, since every run of a detector tells how large noise is.
        planned: of `register.planned_seeds`; where some are planned for a table, no more are wanted, nor more teachers than these need.

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
        runs = of_detector[of_detector["setting"] == row.name]
        ap, ap_half = mean_and_half(runs["AP"])
        baseline = next((one for one in table.rows if (one.detector, one.name) == (row.detector, row.baseline)), None)
        gain = comparisons.difference(row, baseline) if baseline else Difference()
        line = {"detector": row.detector, "setting": row.name, "family": row.family, "title": row.title, "baseline": row.baseline}
        line |= {"published": row.published, "at": row.at}
        line |= {"AP": ap, "AP_half": ap_half, "gain": gain.mean, "gain_half": gain.half()}
        line |= {size: mean_and_half(runs[size])[0] for size in ("APs", "APm", "APl")}
        for name in ("AP", "gain"):
            stated = row.published and published_value(paper, row.published, row.column.replace("AP", name))
            line[f"published_{name}"] = stated if row.published else math.nan
        line |= {name: mean_and_half(runs[name])[0] for name in (UNTUNED, *COSTS) if name in frame}
        line |= {"stored": bool(len(runs)) and (runs["status"] == STORED).all()}
        seeds = int(runs["AP"].notna().sum())
        line |= {"measured_on": table.measured_on, "seeds": seeds, "seeds_wanted": max(seeds, _wanted(row, table, planned or {}))}
        lines.append(line | {"status": status(line, gain, coco=table.preset == "coco" and not row.of_published)})
    return pd.DataFrame(lines)


def _wanted(row: Row, table: Table, planned: Mapping[tuple[str, ...], int]) -> int:
    """How many runs a row should have."""
    place = table.preset, table.name, row.detector
    most = next((seeds for key, seeds in planned.items() if key[:3] == place and seeds), None)
    if row.family != "teacher":
        return len([*row.recipes][:most])
    students = [recipe for other in table.rows if other.detector == row.detector for recipe in [*other.recipes.values()][:most]]
    teachers = {run_id(student.teacher) for student in students if student.teacher}
    return sum(run_id(recipe) in teachers for recipe in row.recipes.values())


def status(line: Mapping[str, float | str], gain: Difference, *, coco: bool) -> str:
    """What may be said of a row: on COCO itself "reproduced" within 0.5 AP, otherwise the verdict on its gain over the student.

    "measured" where there is nothing to compare, as for teacher and student off COCO; "stored" where it was taken from the reference.
    """
    if not line["seeds"]:
        return NOT_RUN
    if coco and abs(line["AP"] - line["published_AP"]) <= REPRODUCED_WITHIN + 1e-9:
        return "reproduced"
    if not line["baseline"]:
        if line["stored"]:
            return STORED
        return ONE_SEED if line["setting"] != "teacher" and line["seeds"] == 1 else MEASURED
    return verdict_words(verdict(gain, MARGIN), seeds_to_decide(gain, MARGIN)) or (ONE_SEED if line["seeds"] == 1 else MEASURED)


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
                **({"AP before tuning": _number(line[UNTUNED], NOT_RUN) if distilled else "-"} if UNTUNED in summary else {}),
                "APs": _number(line["APs"], empty),
                "APm": _number(line["APm"], empty),
                "APl": _number(line["APl"], empty),
                "Published AP": _number(line["published_AP"], unknown),
                "Published gain": _number(line["published_gain"], unknown, "+.1f") if distilled else "-",
                "Measured on": line["measured_on"],
                **{title: _number(line[name], "-", COST_FORMS[name]) for name, title in COSTS.items() if name in summary},
                "Seeds": f"{line['seeds']} of {line['seeds_wanted']}",
                "Status": line["status"],
            }
        )
    return pd.DataFrame(lines)


def styled(table: Table, summary: pd.DataFrame, frame: pd.DataFrame) -> Styler:
    """The table for a notebook, with its provenance as caption."""
    text = cells(summary).drop(columns="Measured on")
    caption = {"selector": "caption", "props": "text-align: left; caption-side: bottom"}
    left = [{"selector": "th, td", "props": "text-align: left"}, caption]
    return text.style.hide(axis="index").set_caption(note_below(table, frame)).set_table_styles(left)


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
    commits = sorted({one for commit in ran["commit"] for one in short_commit(commit).split(", ")})  # a continued run names several
    parts.append(f"data {ran['data_sha256'].iloc[0][:8]}")
    parts.append(f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}")
    machines = sorted(set(ran["computed_by"]))
    parts += [f"computed by {', '.join(machines)}"] if len(machines) > 1 else []
    seeds = ran.loc[ran["setting"] != "teacher", "seed"].nunique()
    parts += [f"{seeds} seed{'s' * (seeds != 1)}"] if seeds else []
    if ran["status"].str.contains("best of").any():
        parts.append("runs of their best evaluation, which was chosen on the same images, so that their numbers are optimistic")
    text = "; ".join(parts) + "."
    if "cost_measured_on" not in ran or not (places := sorted(set(ran["cost_measured_on"].dropna()))):
        return text
    return f"{text} Parameters, GFLOPs (a multiply-add is two) and milliseconds an image: measured on {'; '.join(places)}."


NOTES = (
    "± of AP is half of the row's own 95 % t-interval over seeds. Gains are over the plain student; their ± is half of the 95 % interval "
    "that all runs of the detector give, fitted seed by seed, and the status says what it means (docs/results.md). It is a row's own, not "
    "adjusted for other rows as a claim's is: of twenty gains without any effect one is taken for one by chance. "
    "n/a: the data has no objects of that size."
)
BEFORE = "AP before tuning: with the weights of multiplier 1, published or ours, over the seeds that were run so."


def little_to_teach(frame: pd.DataFrame) -> str:
    """Names teachers that are not ahead of the plain student by `MARGIN`; empty where all are, or where one of the two was not run."""
    means = frame.groupby(["detector", "setting"], sort=False)["AP"].mean().dropna().unstack().reindex(columns=["teacher", "student"])
    close = means[means["teacher"] - means["student"] < MARGIN]
    named = [f"{detector}'s ({ap['teacher']:.1f} against {ap['student']:.1f})" for detector, ap in close.iterrows()]
    return f"Teachers with little to teach, less than {MARGIN:g} AP ahead of the plain student: {', '.join(named)}." if named else ""


def conditions(table: Table, frame: pd.DataFrame) -> str:
    """What a reader must know before comparing rows: other schedules, weights or losses, and teachers with little to teach."""
    students: dict[str, Recipe] = {}  # the first of each detector
    for row in table.rows:
        if row.family != "teacher":
            students.setdefault(row.detector, next(iter(row.recipes.values())))
    made: dict[str, list[str]] = {}
    for detector, one in students.items():
        length = f"{one.schedule.steps:,} steps" if one.schedule.steps else f"{one.schedule.epochs:g} epochs"
        made.setdefault(f"{length} at {one.resize.short} px", []).append(detector)
    said = ["Students differ: " + "; ".join(f"{', '.join(names)} {how}" for how, names in made.items()) + "."] * (len(made) > 1)
    distilled = [row for row in table.rows if row.baseline]
    tuned = {row.detector for row in distilled if row.untuned and row.untuned != row.recipes}
    untuned = [detector for detector in students if detector not in tuned] if distilled else []
    said += [f"Weights of losses are as published, or ours, and not tuned: {', '.join(untuned)}."] * bool(untuned)
    bare = {row.detector for row in distilled if row.family == "detrdistill" for one in row.recipes.values() if not one.methods[0].features}
    said += [f"DETRDistill is without its feature loss: {', '.join(one for one in students if one in bare)}."] * bool(bare)
    return " ".join(filter(None, [*said, little_to_teach(frame)]))


def note_below(table: Table, frame: pd.DataFrame) -> str:
    """What stands below a table: its provenance, what its columns mean, and `conditions`."""
    return " ".join(filter(None, [provenance_line(frame), NOTES, BEFORE if UNTUNED in frame else "", conditions(table, frame)]))

"""Claims about DETRDistill, each a difference between two rows of a table: paired by seed, with its interval and what it says.

Most are the paper's; each names its source. A pure function of stored records, as the tables are. No torch here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from detrdistill.experiments.paper_tables import STRATEGIES
from detrdistill.experiments.published import published, published_value
from detrdistill.experiments.store import Record, Store
from detrdistill.experiments.tables import NOT_RUN, Row, Table, find, mean_and_half, metrics_at, to_markdown
from detrdistill.files import write_text

SECOND_HAND, OURS = "second hand", "ours"  # what others say of the paper, whose own words were not found; and questions of this kit
HALFWAY, CHANGES = "AP halfway", "changes between stages, an image"  # measures beside AP


@dataclass(frozen=True)
class Claim:
    """One statement.

    Attributes:
        source: where the paper shows it; `SECOND_HAND` or `OURS` otherwise.
        ahead, than: names of rows; the claim is that the first has more of the measure.
        measure: AP; AP at the last evaluation of the first half of the schedule; or how many queries an image change their object
            from stage to stage (Figure 7).
    """

    text: str
    source: str
    ahead: str
    than: str
    measure: str = "AP"


# Where a distilled row stands against a plain one, what that says, and where the paper says it.
HELPS = {
    "main_results": ("DETRDistill helps the student", "Table 3"),
    "encoder_decoder": ("DETRDistill helps students of fewer layers", "Table 4"),
    "self_distillation": ("DETRDistill helps where teacher and student have one backbone", SECOND_HAND),
    "light_backbones": ("DETRDistill helps students with lighter backbones", "Table 10"),
    "full_schedule": ("DETRDistill helps students that train as long as the teacher", "Table 3"),
}
RIVALS = "DETRDistill is ahead of methods made for convolutional detectors"
NOT_COMPARED = "DETRDistill is ahead of methods that its paper does not compare with"
PAPER_FORM = "The paper's form is ahead of the released code's"
PASSES = Claim("A distilled student passes its teacher", "Table 3", "detrdistill", "teacher")
ALONE, TOGETHER = "Each loss helps alone", "All losses together help most"
ALL, STAGEWISE, QUALITY = "logits + features + assignment", "positives and negatives, stage by stage", "query masks by quality (Eq. 9)"
CLAIMS = {
    "main_results": [
        *(Claim(RIVALS, "Table 3", "detrdistill", rival) for rival in ("fgd", "mgd", "fitnet")),
        Claim("DETRDistill is ahead halfway", OURS, "detrdistill", "student", HALFWAY),
        Claim("DETRDistill's assignments are steadier", SECOND_HAND, "student", "detrdistill", CHANGES),
    ],
    "prior_methods": [Claim(RIVALS, "Tables 1 and 3", "detrdistill at whole", f"{rival} at whole") for rival in ("fkd", "fgfi")],
    "stage_mapping": [Claim("Groups of stages teach best", OURS, "grouped", name) for name in STRATEGIES if name != "grouped"],
    "components": [
        *(Claim(ALONE, "Table 7", part, "student") for part in ("logits", "features", "assignment")),
        *(Claim(TOGETHER, "Table 7", ALL, part) for part in ("logits", "features", "assignment", "logits + features")),
        *(Claim(TOGETHER, OURS, ALL, part) for part in ("logits + assignment", "features + assignment")),
    ],
    "logits": [
        Claim("Negatives help", SECOND_HAND, STAGEWISE, "positives, stage by stage"),
        Claim("Teaching every stage helps", SECOND_HAND, STAGEWISE, "positives and negatives, last stage"),
    ],
    "feature_masks": [
        Claim("Query masks help by their quality scores", SECOND_HAND, QUALITY, "query masks (Eq. 7)"),
        *(Claim("Query masks are better than others", OURS, QUALITY, name) for name in ("all cells alike (FitNet)", "ground-truth boxes")),
    ],
    "follow_ups": [Claim(NOT_COMPARED, OURS, "detrdistill", other) for other in ("kd_detr", "d3etr", "pkd", "cwd")],
}
NOTE = (
    "A claim is a difference that should be positive; ± is half of its 95 % t-interval over seeds, paired by seed. All students of a "
    "detector learn from one teacher, whose own noise is in no interval, and against which nothing is paired. Of twenty intervals one "
    "misses by chance. Off COCO a difference says only whether an effect shows at that scale. Source: where the paper shows it; second "
    "hand, as others report of it; or ours, a question of this kit."
)


def claims_of(table: Table, detector: str) -> list[Claim]:
    """What the table's rows of one detector can decide."""
    rows = {row.setting: row for row in table.rows if row.detector == detector}
    found = []
    whole = ""
    if table.name == "encoder_decoder":
        plain = [name for name in rows if name.startswith("student")]  # whole, half a decoder, half an encoder, half of both
        whole = plain[0]
        if len(plain) == 4:
            found.append(Claim("The decoder's depth matters more than the encoder's", "Table 4", plain[2], plain[1]))
    if table.name in HELPS:
        distilled = [row for row in rows.values() if row.setting.startswith("detrdistill") and row.baseline != whole]
        found = [Claim(*HELPS[table.name], row.setting, row.baseline) for row in distilled] + found
    if table.name == "discrepancies":
        found += [Claim(PAPER_FORM, OURS, "detrdistill", name) for name in rows if name not in ("teacher", "student", "detrdistill")]
    if {"teacher", "detrdistill"} <= rows.keys() and table.name in ("main_results", "full_schedule"):
        schedules = {recipe.schedule for name in ("teacher", "detrdistill") for recipe in rows[name].recipes.values()}
        found += [PASSES] if len(schedules) == 1 else []  # a student that was stopped early cannot be asked for it
    return found + [claim for claim in CLAIMS.get(table.name, ()) if claim.ahead in rows and claim.than in rows]


def weigh(tables: Sequence[Table], store: Store) -> pd.DataFrame:
    """A line a claim and detector: the measured difference, half of its 95 % t-interval over seeds, the published difference, status.

    Status: "shows" or "opposite" where the interval excludes 0, else "within noise"; "one seed" where there is no interval; "not
    stored" where the runs are there, but without the measure. That records belong together, `tables.collect` checks.

    Raises:
        InputError: a record was edited or lies in another run's folder.
    """
    lines = []
    for table in tables:
        for detector in dict.fromkeys(row.detector for row in table.rows):
            rows = {row.setting: row for row in table.rows if row.detector == detector}
            for claim in claims_of(table, detector):
                ahead, than = rows[claim.ahead], rows[claim.than]
                difference, ran = measured_difference(ahead, than, claim.measure, store)
                mean, half = mean_and_half(difference)
                line = {"claim": claim.text, "source": claim.source, "preset": table.preset, "table": table.name, "detector": detector}
                line |= {"measured_on": table.measured_on, "measure": claim.measure, "ahead": ahead.title, "than": than.title}
                line |= {"difference": mean, "half": half}
                line |= {"published": published_difference(table, ahead, than) if claim.measure == "AP" else math.nan}
                seeds = int(difference.notna().sum())
                lines.append(line | {"seeds": seeds, "seeds_wanted": len(ahead.recipes), "status": verdict(mean, half, seeds, ran)})
    frame = pd.DataFrame(lines)
    if frame.empty:
        return frame
    return frame.sort_values("claim", key=lambda texts: texts.map(list(dict.fromkeys(texts)).index), kind="stable", ignore_index=True)


def measured_difference(ahead: Row, than: Row, measure: str, store: Store) -> tuple[pd.Series, bool]:
    """Ahead minus than, by seed, NaN where it was not measured; and whether both runs of any seed are stored.

    The teacher, which is one for all seeds, is compared with each.
    """
    ours, theirs = ({seed: find(store, recipe) for seed, recipe in row.recipes.items()} for row in (ahead, than))
    if than.setting == "teacher":
        theirs = dict.fromkeys(ours, next(iter(theirs.values())))
    values = {seed: _measure(ours[seed], measure, ahead.at) - _measure(theirs.get(seed), measure, than.at) for seed in ours}
    return pd.Series(values, dtype=float), any(ours[seed] and theirs.get(seed) for seed in ours)


def _measure(record: Record | None, measure: str, at: float) -> float:
    if measure == CHANGES:
        value = record.curve[-1].get("changes_between_stages") if record and record.curve else None
    else:
        value = metrics_at(record, 0.5 if measure == HALFWAY else at)["AP"]
    return math.nan if value is None else value


def published_difference(table: Table, ahead: Row, than: Row) -> float:
    """What the paper's values differ by; NaN where one of them is not known."""
    if not (table.published and ahead.published and than.published):
        return math.nan
    paper = published(table.published)
    return published_value(paper, ahead.published, ahead.column) - published_value(paper, than.published, than.column)


def verdict(difference: float, half: float, seeds: int, ran: bool) -> str:
    if not seeds:
        return "not stored" if ran else NOT_RUN
    if math.isnan(half):
        return "one seed"
    if abs(difference) <= half:
        return "within noise"
    return "shows" if difference > 0 else "opposite"


def claim_cells(weighed: pd.DataFrame) -> pd.DataFrame:
    """The claims as text, of `weigh`."""
    lines = []
    for line in weighed.to_dict("records"):
        interval = "" if math.isnan(line["half"]) else f" ± {line['half']:.1f}"
        lines.append(
            {
                "Claim": line["claim"],
                "Source": line["source"],
                "Detector": line["detector"],
                "Measure": line["measure"],
                "Compared": f"{line['ahead']} over {line['than']}",
                "Difference": _signed(line["difference"], line["status"]) + interval,
                "Published": _signed(line["published"], "-"),
                "Seeds": f"{line['seeds']} of {line['seeds_wanted']}",
                "Status": line["status"],
            }
        )
    return pd.DataFrame(lines)


def _signed(value: float, empty: str) -> str:
    return empty if math.isnan(value) else f"{round(value, 1) + 0.0:+.1f}"  # + 0.0: never -0.0


def write_claims(weighed: pd.DataFrame, provenance: str, folder: Path) -> list[Path]:
    """Write `claims.csv` and `claims.md`; the same bytes for the same records. Nothing where `weighed` is empty.

    Args:
        provenance: what the tables were measured on, in a line or more.
    """
    if weighed.empty:
        return []
    # Sums and square roots may differ in their last digits from one version of a library to the next.
    numbers = weighed.round({"difference": 6, "half": 6, "published": 6}).astype(object)
    for column in ("difference", "half", "published"):
        empty = "unknown" if column == "published" else weighed["status"]
        numbers[column] = numbers[column].where(weighed[column].notna(), empty)
    title = f"Claims, preset {weighed['preset'].iloc[0]}"
    forms = {"csv": numbers.to_csv(index=False, lineterminator="\n"), "md": to_markdown(claim_cells(weighed), title, provenance)}
    for suffix, content in forms.items():
        write_text(folder / f"claims.{suffix}", content)
    return [folder / f"claims.{suffix}" for suffix in forms]

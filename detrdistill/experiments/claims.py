"""What the paper claims, each claim as a difference between two rows of a table: paired by seed, with its interval and a verdict.

A pure function of stored records, as the tables are. No torch here.
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

COLUMNS = (
    "claim", "table", "detector", "measure", "ahead", "than", "difference", "half", "published", "seeds", "seeds_wanted", "status",
)  # fmt: skip
HALFWAY, CHANGES = "AP halfway", "changes between stages"  # measures beside AP; the latter counts queries an image, fewer are better


@dataclass(frozen=True)
class Claim:
    """One statement of the paper.

    Attributes:
        ahead, than: names of rows; the claim is that the first has more of the measure.
        measure: AP; AP after half of the schedule; or how many queries an image change their object from stage to stage (Figure 7).
    """

    text: str
    ahead: str
    than: str
    measure: str = "AP"


# Where a distilled row stands against a plain one, and what that says.
HELPS = {
    "main_results": "DETRDistill helps the student",
    "encoder_decoder": "It helps students of fewer layers",
    "self_distillation": "It helps where teacher and student have one backbone",
    "light_backbones": "It helps students with lighter backbones",
    "full_schedule": "It helps students that train as long as the teacher",
}
RIVALS = "It is ahead of methods made for convolutional detectors"
STAGEWISE, QUALITY, TOGETHER = "positives and negatives, stage by stage", "query masks by quality (Eq. 9)", "logits + features + assignment"
CLAIMS = {
    "main_results": [
        *(Claim(RIVALS, "detrdistill", rival) for rival in ("fgd", "mgd", "fitnet")),
        Claim("It learns faster", "detrdistill", "student", HALFWAY),
        Claim("Its assignments are steadier", "student", "detrdistill", CHANGES),
    ],
    "prior_methods": [Claim(RIVALS, "detrdistill at whole", f"{rival} at whole") for rival in ("fkd", "fgfi")],
    "full_schedule": [Claim("A distilled student passes its teacher", "detrdistill", "teacher")],
    "stage_mapping": [Claim("Groups of stages teach best", "grouped", name) for name in STRATEGIES if name != "grouped"],
    "components": [
        *(Claim("Each loss helps alone", part, "student") for part in ("logits", "features", "assignment")),
        *(Claim("All losses together help most", TOGETHER, part) for part in ("logits", "features", "assignment", "logits + features")),
    ],
    "logits": [
        Claim("Negatives help", STAGEWISE, "positives, stage by stage"),
        Claim("Teaching every stage helps", STAGEWISE, "positives and negatives, last stage"),
    ],
    "feature_masks": [
        Claim("Query masks help by their quality scores", QUALITY, "query masks (Eq. 7)"),
        *(Claim("Query masks are better than others", QUALITY, name) for name in ("all cells alike (FitNet)", "ground-truth boxes")),
    ],
}


def claims_of(table: Table, detector: str) -> list[Claim]:
    """The paper's claims that the table's rows of one detector can decide."""
    rows = {row.setting: row for row in table.rows if row.detector == detector}
    found = []
    if table.name in HELPS:
        found += [Claim(HELPS[table.name], row.setting, row.baseline) for row in rows.values() if row.setting.startswith("detrdistill")]
    if table.name == "encoder_decoder":
        plain = [name for name in rows if name.startswith("student")]  # whole, half a decoder, half an encoder, half of both
        if len(plain) == 4:
            found.append(Claim("The decoder's depth matters more than the encoder's", plain[2], plain[1]))
    return found + [claim for claim in CLAIMS.get(table.name, ()) if claim.ahead in rows and claim.than in rows]


def weigh(tables: Sequence[Table], store: Store) -> pd.DataFrame:
    """A line a claim and detector: the measured difference, half of its 95 % t-interval over seeds, the published difference, status.

    Status: "holds" or "opposite" where the interval excludes 0, else "within noise"; "one seed" where there is no interval.

    Raises:
        InputError: a record was edited or lies in another run's folder.
    """
    lines = []
    for table in tables:
        for detector in dict.fromkeys(row.detector for row in table.rows):
            rows = {row.setting: row for row in table.rows if row.detector == detector}
            for claim in claims_of(table, detector):
                ahead, than = rows[claim.ahead], rows[claim.than]
                difference = measured(ahead, claim.measure, store) - measured(than, claim.measure, store)
                mean, half = mean_and_half(difference)
                line = {"claim": claim.text, "table": table.name, "detector": detector, "measure": claim.measure}
                line |= {"ahead": ahead.title, "than": than.title, "difference": mean, "half": half}
                line |= {"published": published_difference(table, ahead, than) if claim.measure == "AP" else math.nan}
                seeds = int(difference.notna().sum())
                lines.append(line | {"seeds": seeds, "seeds_wanted": len(ahead.recipes), "status": verdict(mean, half, seeds)})
    frame = pd.DataFrame(lines, columns=COLUMNS)
    return frame.sort_values("claim", key=lambda texts: texts.map(list(dict.fromkeys(texts)).index), kind="stable", ignore_index=True)


def measured(row: Row, measure: str, store: Store) -> pd.Series | float:
    """The measure by seed, NaN where it was not measured; the teacher, one for all seeds, is a number."""
    values = {seed: _measure(find(store, recipe), measure) for seed, recipe in row.recipes.items()}
    return next(iter(values.values())) if row.setting == "teacher" else pd.Series(values, dtype=float)


def _measure(record: Record | None, measure: str) -> float:
    if measure == CHANGES:
        value = record.curve[-1].get("changes_between_stages") if record and record.curve else None
    else:
        value = metrics_at(record, 0.5 if measure == HALFWAY else 1.0)["AP"]
    return math.nan if value is None else value


def published_difference(table: Table, ahead: Row, than: Row) -> float:
    """What the paper's values differ by; NaN where one of them is not known."""
    if not (table.published and ahead.published and than.published):
        return math.nan
    paper = published(table.published)
    return published_value(paper, ahead.published, ahead.column) - published_value(paper, than.published, than.column)


def verdict(difference: float, half: float, seeds: int) -> str:
    if not seeds:
        return NOT_RUN
    if math.isnan(half):
        return "one seed"
    if abs(difference) <= half:
        return "within noise"
    return "holds" if difference > 0 else "opposite"


def claim_cells(weighed: pd.DataFrame) -> pd.DataFrame:
    """The claims as text, of `weigh`."""
    signed = lambda value, empty: empty if math.isnan(value) else f"{round(value, 1) + 0.0:+.1f}"  # noqa: E731  (never -0.0)
    lines = []
    for line in weighed.to_dict("records"):
        interval = "" if math.isnan(line["half"]) else f" ± {line['half']:.1f}"
        lines.append(
            {
                "Claim": line["claim"],
                "Detector": line["detector"],
                "Measure": line["measure"],
                "Compared": f"{line['ahead']} over {line['than']}",
                "Difference": signed(line["difference"], NOT_RUN) + interval,
                "Published": signed(line["published"], "-"),
                "Seeds": f"{line['seeds']} of {line['seeds_wanted']}",
                "Status": line["status"],
            }
        )
    return pd.DataFrame(lines)


NOTE = (
    "A claim is a difference that should be positive, paired by seed; ± is half of its 95 % t-interval. Measured off COCO, it says "
    "whether an effect shows at this scale."
)


def write_claims(weighed: pd.DataFrame, preset: str, folder: Path) -> list[Path]:
    """Write `claims.csv` and `claims.md`; the same bytes for the same records."""
    numbers = weighed.astype(object).where(weighed.notna(), "unknown").to_csv(index=False, lineterminator="\n")
    forms = {"csv": numbers, "md": to_markdown(claim_cells(weighed), f"The paper's claims, preset {preset}", NOTE)}
    for suffix, content in forms.items():
        write_text(folder / f"claims.{suffix}", content)
    return [folder / f"claims.{suffix}" for suffix in forms]

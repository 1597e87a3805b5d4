"""Claims about DETRDistill, each a difference between two rows of a table, with its intervals and what they say.

Most are the paper's; each names its source. A pure function of stored records, as the tables are. No torch here.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from detrdistill.files import write_text
from detrdistill.published import published, published_value
from detrdistill.recipes.claims import AP, INSIDE, MARGINS, claims_of
from detrdistill.recipes.rows import Row, Table
from detrdistill.recipes.words import NOT_RUN
from detrdistill.report.comparisons import Comparisons
from detrdistill.report.formats import to_markdown
from detrdistill.statistics import (
    AGAINST,
    EQUIVALENCE,
    HOLDS,
    NO_EFFECT,
    NO_GAIN,
    SMALL,
    VERDICTS,
    Difference,
    holm,
    seeds_to_decide,
    seeds_words,
    verdict,
    verdict_words,
)

NOTE = (
    "A claim is a difference that should be positive. ± is half of its own 95 % interval; the interval in brackets is adjusted for the "
    "other comparisons of the claim with the same detector (Holm), and decides. The runs of a detector are fitted together, seed by seed. "
    "A difference of 2 AP is the smallest that matters: the margin. What no interval holds: that other validation images would give other "
    "numbers; and the teacher, where one run teaches all students of a detector. Where a row is compared with such a teacher, its spread "
    "is taken to be that of the other rows. Off COCO a difference says only whether an effect shows at that scale. Source: where the paper "
    "shows it; second hand, as others report of it; or ours, a question of this kit. Claims of Figure 4 compare maps of the teachers, in "
    "points of the weight that lies inside objects; the margin is 5. They are repeated over images and not over seeds: the mean of each "
    "teacher stands beside their number, and where teachers point opposite ways neither side is taken. Whether a claim was listed "
    "before its runs: results/claims_register.csv. How to read it all: docs/results.md."
)


def weigh(tables: Sequence[Table], comparisons: Comparisons, planned: Mapping[tuple[str, ...], int] | None = None) -> pd.DataFrame:
    """A line a comparison and detector: the measured difference, half-widths of its intervals, the published difference, the verdict.

    Args:
        comparisons: of all tables of the preset.
        planned: seeds that were planned, of `register.planned_seeds`; without, those of the tables.
    """
    lines, differences = [], []
    for table in tables:
        for detector in dict.fromkeys(row.detector for row in table.rows):
            rows = {row.name: row for row in table.rows if row.detector == detector}
            for claim in claims_of(table, detector):
                ahead, than = rows[claim.ahead], rows[claim.than]
                differences.append(comparisons.difference(ahead, than, claim.measure))
                line = {"claim": claim.text, "source": claim.source, "preset": table.preset, "table": table.name, "detector": detector}
                line |= {"measured_on": table.measured_on, "measure": claim.measure, "ahead": ahead.title, "than": than.title}
                line |= {"ahead_variant": ahead.variant, "than_variant": than.variant}
                line |= {"published": published_difference(table, ahead, than) if claim.measure == AP else math.nan}
                key = (table.preset, table.name, detector, claim.ahead, claim.than, claim.measure)
                line |= {"seeds": differences[-1].seeds, "seeds_planned": (planned or {}).get(key) or len(ahead.recipes)}
                lines.append(line | {"images": differences[-1].images, "by_teacher": differences[-1].by_run})
    frame = pd.DataFrame(lines)
    if frame.empty:
        return frame
    for places in frame.groupby(["claim", "detector"], sort=False).indices.values():
        for place, one in zip(places, holm([differences[i] for i in places]), strict=True):
            differences[place] = one
    decided = [_decided(one, MARGINS[measure]) for one, measure in zip(differences, frame["measure"], strict=True)]
    frame = pd.concat([frame, pd.DataFrame(decided)], axis=1)
    frame["part"] = pd.concat([_part_names(parts) for _, parts in frame.groupby("claim", sort=False)])
    return frame.sort_values("claim", key=lambda texts: texts.map(list(dict.fromkeys(texts)).index), kind="stable", ignore_index=True)


def _decided(difference: Difference, margin: float | None) -> dict[str, Any]:
    seeds = seeds_to_decide(difference, margin)
    found = {"difference": difference.mean, "half": difference.half(), "adjusted_half": difference.adjusted_half}
    found |= {
        "equivalence_half": difference.half(EQUIVALENCE),
        "family": difference.family,
        "margin": math.nan if margin is None else margin,
    }
    word = verdict(difference, margin) or NOT_RUN
    return found | {"verdict": word, "status": verdict_words(word, seeds), "seeds_to_decide": seeds}


def published_difference(table: Table, ahead: Row, than: Row) -> float:
    """What the paper's values differ by; NaN where one of them is not known."""
    if not (table.published and ahead.published and than.published):
        return math.nan
    paper = published(table.published)
    return published_value(paper, ahead.published, ahead.column) - published_value(paper, than.published, than.column)


def claim_cells(weighed: pd.DataFrame) -> pd.DataFrame:
    """The comparisons as text, of `weigh`."""
    lines = []
    for line in weighed.to_dict("records"):
        raw = "" if math.isnan(line["half"]) else f" ± {line['half']:.1f}"
        lines.append(
            {
                "Claim": line["claim"],
                "Source": line["source"],
                "Detector": line["detector"],
                "Measure": line["measure"],
                "Compared": f"{line['ahead']} over {line['than']}",
                "Difference": _signed(line["difference"], NOT_RUN) + raw,
                "Adjusted": _adjusted(line) or "-",
                "Published": _signed(line["published"], "-"),
                "Seeds": _replicates(line),
                "Status": line["status"],
            }
        )
    return pd.DataFrame(lines)


def board(weighed: pd.DataFrame) -> pd.DataFrame:
    """A line a claim: how many of its parts hold, are against it and were not run, and its verdict as a sentence."""
    lines = []
    for text, parts in weighed.groupby("claim", sort=False):
        holds, against = (int(parts["verdict"].isin([word, word + SMALL]).sum()) for word in (HOLDS, AGAINST))
        missing = int((parts["verdict"] == NOT_RUN).sum())
        counted = f"{holds} of {len(parts)} hold" + f", {against} against" * bool(against) + f", {missing} {NOT_RUN}" * bool(missing)
        lines.append({"Claim": text, "Source": ", ".join(parts["source"].unique()), "Parts": counted, "Verdict": sentence(parts)})
    return pd.DataFrame(lines)


def sentence(parts: pd.DataFrame) -> str:
    """The verdict on one claim, such as "holds on AdaMixer (+6.1 [+4.0, +8.2]); undecided on Conditional DETR (+12.7 [..], about 9 seeds)".

    Of a claim of several comparisons a detector, each is named. Numbers are differences with the intervals that the word was taken from:
    the adjusted one, or for what is held against the margin the one of 90 %.

    Args:
        parts: the claim's lines of `weigh`.
    """
    several = parts.duplicated(["claim", "detector"]).any()
    words = parts["verdict"]
    said = []
    for word in sorted(words.unique(), key=[*VERDICTS, *words].index):
        places = []
        for detector, lines in parts[words == word].groupby("detector", sort=False):
            found = [f"{line['part']} {_numbers(line)}".strip() if several else _numbers(line) for line in lines.to_dict("records")]
            places.append(f"{detector}: {', '.join(found)}" if several else f"{detector} {found[0]}".strip())
        said.append(f"{word} on {'; on '.join(places) if several else _listed(places)}")
    return "; ".join(said)


def _part_names(parts: pd.DataFrame) -> pd.Series:
    """What tells the comparisons of a claim apart: "over FGD" where all have one row ahead, "thin12" where both rows end so, or both."""
    tails = {name: parts[f"{name}_variant"] for name in ("ahead", "than")}
    same = tails["ahead"] == tails["than"]
    heads = {name: parts[name].where(~same, _without(parts[name], tails[name])) for name in tails}
    one_ahead, one_than = (heads[name].nunique() == 1 for name in ("ahead", "than"))
    if len(parts) > 1 and one_ahead and one_than and same.all() and (tails["ahead"] != "").all():
        return tails["ahead"]
    if len(parts) > 1 and one_ahead and not one_than:
        return "over " + heads["than"]
    if len(parts) > 1 and one_than and not one_ahead:
        return heads["ahead"]
    return heads["ahead"] + " over " + heads["than"]


def _without(titles: pd.Series, variants: pd.Series) -> pd.Series:
    """Titles of rows without what tells them from others of their family."""
    pairs = zip(titles, variants, strict=True)
    return pd.Series([title.removesuffix(f", {variant}") if variant else title for title, variant in pairs], titles.index)


def _numbers(line: Mapping[str, Any]) -> str:
    """ "(+12.7 [-5.1, +30.5], about 9 seeds)"; nothing where nothing was measured."""
    if math.isnan(line["difference"]):
        return ""
    against_margin = line["verdict"] in (NO_EFFECT, NO_GAIN)
    interval = _interval(line, "equivalence_half") + ", 90 %" if against_margin else _adjusted(line)
    unit = "points" if line.get("measure") == INSIDE else ""
    found = [" ".join(filter(None, [_signed(line["difference"], ""), unit, interval]))]
    if len(apart := line.get("by_teacher") or ()) > 1:
        found.append(f"by teacher {' and '.join(_signed(one, '') for one in apart)}")
    if line["seeds_to_decide"]:
        found.append(seeds_words(line["seeds_to_decide"]))
    return f"({', '.join(found)})"


def _replicates(line: Mapping[str, Any]) -> str:
    """ "3 of 6" seeds; of what is taken over images "2 of 2 teachers (+1.9, -3.1), 400 images"."""
    counted = f"{line['seeds']} of {line['seeds_planned']}"
    if line["measure"] != INSIDE:
        return counted
    apart = f" ({', '.join(_signed(one, '') for one in line['by_teacher'])})" if len(line["by_teacher"]) > 1 else ""
    return f"{counted} teachers{apart}" + (f", {line['images']} images" if line["images"] else "")


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _adjusted(line: Mapping[str, Any]) -> str:
    return _interval(line, "adjusted_half")


def _interval(line: Mapping[str, Any], name: str) -> str:
    mean, half = line["difference"], line[name]
    return "" if math.isnan(half) else f"[{_signed(mean - half, '')}, {_signed(mean + half, '')}]"


def _signed(value: float, empty: str) -> str:
    return empty if math.isnan(value) else f"{round(value, 1) + 0.0:+.1f}"  # + 0.0: never -0.0


def write_claims(weighed: pd.DataFrame, provenance: str, folder: Path) -> list[Path]:
    """Write `claims.csv` (a line a comparison) and `claims.md`; the same bytes for the same records. Nothing where `weighed` is empty.

    Args:
        provenance: what the tables were measured on, in a line or more.
    """
    if weighed.empty:
        return []
    # Sums and square roots may differ in their last digits from one version of a library to the next.
    numbers = ["difference", "half", "adjusted_half", "equivalence_half", "published", "margin"]
    written = weighed.drop(columns=["verdict", "ahead_variant", "than_variant"]).round(dict.fromkeys(numbers, 6)).astype(object)
    for column in numbers:
        empty = {"published": "unknown", "margin": "none"}.get(column, weighed["status"].where(weighed["status"] == NOT_RUN, "no interval"))
        written[column] = written[column].where(weighed[column].notna(), empty)
    written["images"] = written["images"].where(weighed["images"] > 0, "none")
    written["by_teacher"] = [" ".join(f"{one:.6f}" for one in means) or "none" for means in weighed["by_teacher"]]
    preset = weighed["preset"].iloc[0]
    text = to_markdown(board(weighed), f"Claims, preset {preset}", "Each comparison:").rstrip()
    text += "\n\n" + to_markdown(claim_cells(weighed), f"Comparisons, preset {preset}", provenance)
    forms = {"csv": written.to_csv(index=False, lineterminator="\n"), "md": text}
    for suffix, content in forms.items():
        write_text(folder / f"claims.{suffix}", content)
    return [folder / f"claims.{suffix}" for suffix in forms]

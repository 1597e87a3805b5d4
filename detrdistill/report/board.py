"""The claims of a preset as its page tells them: a line a claim, and one sentence over all. No torch here."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from detrdistill.recipes.claims import AP, INSIDE
from detrdistill.recipes.words import NOT_RUN
from detrdistill.report.claims import sentence
from detrdistill.statistics import AGAINST, HOLDS, NO_EFFECT, NO_GAIN, ONE_SEED, SMALL, UNDECIDED, VERDICTS

# What is said of one comparison and of several, in the order of the headline.
OUTCOMES = {
    HOLDS: ("1 holds", "{} hold"),
    HOLDS + SMALL: ("1 holds by less than the margin", "{} hold by less than the margin"),
    AGAINST: ("1 comes out against", "{} come out against"),
    AGAINST + SMALL: ("1 comes out against by less than the margin", "{} come out against by less than the margin"),
    NO_EFFECT: ("1 shows no effect above the margin", "{} show no effect above the margin"),
    NO_GAIN: ("1 shows no gain above the margin", "{} show no gain above the margin"),
    UNDECIDED: ("1 is undecided", "{} are undecided"),
    ONE_SEED: ("1 has one seed", "{} have one seed"),
    NOT_RUN: ("1 was not run", "{} were not run"),
}


@dataclass(frozen=True)
class Verdict:
    """One claim.

    Attributes:
        counts: how many of its parts have which verdict word.
        where: the same, for each detector, as `_place` calls it.
        sentence: of `claims.sentence`.
        tables: names of those that decide it.
        harms: what harms the student itself, among the rows that DETRDistill is said to be ahead of: of `harms`.
    """

    text: str
    source: str
    counts: Mapping[str, int]
    where: Mapping[str, Mapping[str, int]]
    sentence: str
    tables: Sequence[str] = ()
    harms: Sequence[str] = ()


def verdicts(weighed: pd.DataFrame, harms: Mapping[tuple[str, str, str], str]) -> list[Verdict]:
    """A claim each, of `claims.weigh`, or of those lines of it that belong to one table.

    Args:
        harms: of `harms_of`, of all tables.
    """
    found = []
    for text, parts in weighed.groupby("claim", sort=False) if len(weighed) else ():
        where = {_place(lines): _counts(lines["verdict"]) for _, lines in parts.groupby("detector", sort=False)}
        ahead = parts[parts["verdict"].isin([HOLDS, HOLDS + SMALL]) & (parts["measure"] == AP)]
        led = [row for row in ahead[["table", "detector", "than"]].itertuples(index=False, name=None) if row in harms]
        sources, tables = (list(parts[name].unique()) for name in ("source", "table"))
        counts = _counts(parts["verdict"])
        found.append(Verdict(str(text), ", ".join(sources), counts, where, sentence(parts), tables, [harms[row] for row in led]))
    return found


def _place(lines: pd.DataFrame) -> str:
    """The detector; of Figure 4's claims, whose intervals are over images, also how few teachers they are of."""
    detector, measure, seeds = (lines[name].iloc[0] for name in ("detector", "measure", "seeds"))
    return f"{detector} ({seeds} teacher{'' if seeds == 1 else 's'})" if measure == INSIDE and seeds else str(detector)


def _counts(words: pd.Series) -> dict[str, int]:
    return {word: count for word in (*VERDICTS, NOT_RUN) if (count := int((words == word).sum()))}


def harms_of(table: str, summary: pd.DataFrame) -> dict[tuple[str, str, str], str]:
    """The rows of a table that are below the plain student, by table, detector and title; in words "FGD on AdaMixer (-12.6 ± 2.8 AP)"."""
    below = summary[summary["status"].isin([AGAINST, AGAINST + SMALL])].to_dict("records")
    said = "{title} on {detector} ({gain:+.1f} ± {gain_half:.1f} AP)"
    return {(table, line["detector"], line["title"]): said.format(**line) for line in below}


def headline(claims: Sequence[Verdict]) -> str:
    """What was found, in a sentence of counts: "4 of 19 comparisons hold, 6 are undecided and 9 were not run"."""
    counted = sum((Counter(claim.counts) for claim in claims), Counter())
    asked = counted.total()
    if counted[NOT_RUN] == asked:
        return f"None of {asked} comparisons was run yet" if asked else "No claim is asked of these tables"
    held = counted[HOLDS]
    beyond = " by more than the margin" if not held and counted[HOLDS + SMALL] else ""  # where others hold by less
    said = [f"{held or 'None'} of {asked} comparisons hold{'s' * (held < 2)}{beyond}"]
    for word, (one, several) in OUTCOMES.items():
        if word != HOLDS and (count := counted[word]):
            said.append(one if count == 1 else several.format(count))
    *most, last = said
    return f"{', '.join(most)} and {last}" if most else last

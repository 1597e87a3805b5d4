"""The claims of a preset as its page tells them: a line a claim, and one sentence over all. No torch here."""

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import pandas as pd

from detrdistill.recipes.claims import AP, INSIDE
from detrdistill.recipes.words import NOT_RUN
from detrdistill.report.claims import sentence
from detrdistill.statistics import AGAINST, HOLDS, NO_EFFECT, NO_GAIN, ONE_SEED, SMALL, UNDECIDED, VERDICTS

IN_PART, BOTH, WHERE_RUN = " in part", f"{HOLDS} and {AGAINST}", " where it was run"
# What is said of one claim and of several, in the order of the headline.
OUTCOMES = {
    HOLDS: ("1 holds", "{} hold"),
    HOLDS + SMALL: ("1 holds by less than the margin", "{} hold by less than the margin"),
    HOLDS + IN_PART: ("1 holds in part", "{} hold in part"),
    BOTH: ("1 holds in part and came out against in part", "{} hold in part and came out against in part"),
    AGAINST: ("1 came out against", "{} came out against"),
    AGAINST + IN_PART: ("1 came out against in part", "{} came out against in part"),
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


def outcome(counts: Mapping[str, int]) -> str:
    """One word for a claim of several parts, with "where it was run" if some of them were not, and the word does not say "in part".

    "holds" or "against" where all others say so, "in part" where some do. Else the weakest word: who reads that a claim has no effect
    must be able to rely on all of its parts. "(small)" is no difference, but where all parts that hold are so.
    """
    word = _of_those_run(counts.keys() - {NOT_RUN})
    whole = NOT_RUN not in counts or word in (NOT_RUN, BOTH) or word.endswith(IN_PART)
    return word if whole else word + WHERE_RUN


def _of_those_run(found: Set[str]) -> str:
    if found == {HOLDS + SMALL}:
        return HOLDS + SMALL
    words = {word.removesuffix(SMALL) for word in found}
    if {HOLDS, AGAINST} <= words:
        return BOTH
    for word in (HOLDS, AGAINST):
        if word in words:
            return word if len(words) == 1 else word + IN_PART
    return next((word for word in (UNDECIDED, ONE_SEED, NO_GAIN, NO_EFFECT) if word in words), NOT_RUN)


def headline(claims: Sequence[Verdict]) -> str:
    """What was found, in a sentence of counts: "4 of 19 claims about DETRDistill hold, 6 hold in part and 9 were not run"."""
    counted = Counter(outcome(claim.counts) for claim in claims)
    if counted[NOT_RUN] == len(claims):
        return f"None of {len(claims)} claims about DETRDistill was run yet" if claims else "No claim is asked of these tables"
    held = counted[HOLDS]
    said = [f"{held or 'None'} of {len(claims)} claims about DETRDistill hold{'s' * (held < 2)}"]
    for word, (one, several) in OUTCOMES.items():
        for place, places in (("", ""), (WHERE_RUN, " where they were run")):
            if (count := counted[word + place]) and word + place != HOLDS:
                said.append(one + place if count == 1 else several.format(count) + places)
    *most, last = said
    return f"{', '.join(most)} and {last}" if most else last

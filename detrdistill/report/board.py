"""The claims of a preset as its page tells them: a line a claim, and one sentence over all. No torch here."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from detrdistill.recipes.claims import AP
from detrdistill.recipes.words import NOT_RUN
from detrdistill.report.claims import sentence
from detrdistill.statistics import AGAINST, HOLDS, NO_EFFECT, NO_GAIN, ONE_SEED, SMALL, UNDECIDED, VERDICTS

IN_PART, BOTH = " in part", f"{HOLDS} and {AGAINST}"
# What is said of one claim and of several, in the order of the headline.
OUTCOMES = {
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
        where: the same, for each detector.
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
        where = {str(detector): _counts(lines["verdict"]) for detector, lines in parts.groupby("detector", sort=False)}
        ahead = parts[parts["verdict"].isin([HOLDS, HOLDS + SMALL]) & (parts["measure"] == AP)]
        led = [row for row in ahead[["table", "detector", "than"]].itertuples(index=False, name=None) if row in harms]
        sources, tables = (list(parts[name].unique()) for name in ("source", "table"))
        counts = _counts(parts["verdict"])
        found.append(Verdict(str(text), ", ".join(sources), counts, where, sentence(parts), tables, [harms[row] for row in led]))
    return found


def _counts(words: pd.Series) -> dict[str, int]:
    return {word: count for word in (*VERDICTS, NOT_RUN) if (count := int((words == word).sum()))}


def harms_of(table: str, summary: pd.DataFrame) -> dict[tuple[str, str, str], str]:
    """The rows of a table that are below the plain student, by table, detector and title; in words "FGD on AdaMixer (-12.6 ± 2.8 AP)"."""
    below = summary[summary["status"].isin([AGAINST, AGAINST + SMALL])].to_dict("records")
    said = "{title} on {detector} ({gain:+.1f} ± {gain_half:.1f} AP)"
    return {(table, line["detector"], line["title"]): said.format(**line) for line in below}


def outcome(counts: Mapping[str, int]) -> str:
    """One word for a claim of several parts. Parts that were not run are left out, and "(small)" is no difference.

    "holds" or "against" where all others say so, "in part" where some do. Else the weakest word: who reads that a claim has no effect
    must be able to rely on all of its parts.
    """
    words = {word.removesuffix(SMALL) for word in counts} - {NOT_RUN}
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
    said += [one if counted[word] == 1 else several.format(counted[word]) for word, (one, several) in OUTCOMES.items() if counted[word]]
    *most, last = said
    return f"{', '.join(most)} and {last}" if most else last

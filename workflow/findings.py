"""What the README says was found: verdicts of claims.csv as sentences, a bullet a question. `workflow/prose.py` puts them there."""

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from detrdistill.errors import InputError
from detrdistill.recipes.claims import AHEAD_OF_RIVALS, HELPS, HELPS_ALONE, NOT_COMPARED, PASSES
from detrdistill.recipes.presets import detectors_of, get_presets
from detrdistill.recipes.words import NAMES, NOT_RUN
from detrdistill.statistics import AGAINST, HOLDS, NO_EFFECT, NO_GAIN, SMALL, UNDECIDED, VERDICTS, seeds_words

REFERENCE = Path(__file__).resolve().parents[1] / "results" / "reference"
Line = Mapping[str, str]

# What the README asks: a question, the preset, and the claims that answer it.
QUESTIONS = (
    ("Does DETRDistill help the student?", "mini", [HELPS["main_results"][0]]),
    ("Is it ahead of methods made for convolutional detectors?", "mini", [AHEAD_OF_RIVALS]),
    ("Is it ahead of methods that its paper does not compare with?", "mini", [NOT_COMPARED]),
    ("Does each of its losses help alone?", "mini", [HELPS_ALONE]),
    ("Does the gain last if the student trains as long as its teacher?", "mini", [HELPS["full_schedule"][0], PASSES.text]),
    ("And on real photographs (preset `bccd`)?", "bccd", [HELPS["main_results"][0], AHEAD_OF_RIVALS, PASSES.text]),
)
IN_A_SENTENCE = {
    "Student": "the plain student", "Teacher": "its teacher", "Logits": "its logits loss", "Features": "its feature loss",
    "Assignment": "its assignment loss",
}  # fmt: skip
WORDS = (*VERDICTS, NOT_RUN)
SIDES = {HOLDS: "above", HOLDS + SMALL: "above", AGAINST: "below", AGAINST + SMALL: "below"}


def read(path: Path) -> list[dict[str, str]]:
    """The lines of a csv file; a first line that starts with # is no part of it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(lines[lines[0].startswith("#") :]))


def rows(preset: str, table: str) -> list[dict[str, str]]:
    """Rows of a table as its md file has them."""
    lines = [
        line for line in (REFERENCE / preset / "tables" / f"{table}.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")
    ]
    heading, _, *cells = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    return [dict(zip(heading, line, strict=True)) for line in cells]


def listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def as_table(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    made = [heading, ["---"] * len(heading), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in made)


def found() -> str:
    """The README's findings: a bullet a question."""
    bullets = []
    for question, preset, claims in QUESTIONS:
        lines = [line for line in read(REFERENCE / preset / "tables" / "claims.csv") if line["claim"] in claims]
        if lost := set(claims) - {line["claim"] for line in lines}:
            raise InputError(f"claims.csv of preset {preset} has no claim '{lost.pop()}'; write it again with make report")
        bullets.append(f"- **{question}** " + " ".join(answers(lines, claims)))
    return "\n".join([*bullets, f"- **Are weights tuned?** {weights()}"])


def weights() -> str:
    """Which detectors' rows were compared at weights that were tuned alike."""
    presets = get_presets("mini", detectors_of("mini"))
    tuned = {state: [NAMES[one.student.detector] for one in presets if bool(one.tuned) == state] for state in (True, False)}
    bare = [NAMES[one.student.detector] for one in presets if not one.method.features]
    said = []
    if tuned[True]:
        said.append(f"On {listed(tuned[True])}, those of every row alike, on digits that no table reports.")
    if tuned[False]:
        said.append(f"Not yet on {listed(tuned[False])}: rivals have published weights or a public port's, DETRDistill has ours.")
    if bare:
        said.append(f"On {listed(bare)} DETRDistill is without its feature loss.")
    return " ".join(said)


def answers(lines: Sequence[Line], claims: Sequence[str]) -> list[str]:
    """Sentences on comparisons: how many hold, one for each detector, and a last one for what was not run."""
    said, missing = [counted([word_of(line) for line in lines])] if len(lines) > 1 else [], []
    for detector in dict.fromkeys(line["detector"] for line in lines):
        parts = []
        for claim in claims:
            own = [line for line in lines if line["claim"] == claim and line["detector"] == detector]
            groups = {word: [line for line in own if word_of(line) == word] for word in WORDS}
            if not_run := groups.pop(NOT_RUN):
                missing.append(detector if not_run == own else f"{detector} ({listed(line['part'] for line in not_run)})")
            parts += [answer(group, word, whole=len(own) == 1) for word, group in groups.items() if group]
        said += [f"On {detector}, {'; '.join(parts)}."] if parts else []
    return said + ([f"Not run on {listed(dict.fromkeys(missing))}."] if missing else [])


def counted(words: Sequence[str]) -> str:
    """ "7 of 11 comparisons hold, 1 undecided, 3 not run."

    Raises:
        InputError: a word that is no verdict.
    """
    if unknown := set(words) - set(WORDS):
        raise InputError(f"verdict '{unknown.pop()}' of claims.csv is unknown; known: {', '.join(WORDS)}")
    hold = sum(word in (HOLDS, HOLDS + SMALL) for word in words)
    others = [f"{words.count(word)} {word}" for word in WORDS if word in words and word not in (HOLDS, HOLDS + SMALL)]
    return ", ".join([f"{hold} of {len(words)} comparisons hold", *others]) + "."


def word_of(line: Line) -> str:
    """The verdict without the seeds that would decide."""
    return re.sub(r" \((about|over) \d+ seeds\)", "", line["status"])


def answer(group: Sequence[Line], word: str, whole: bool) -> str:
    """Of comparisons with one detector and one verdict: "DETRDistill is 6.1 AP above the plain student (*holds*, [+1.1, +11.1])".

    Args:
        whole: whether these are all that is asked of the detector; then intervals are shown, and otherwise differences alone.
    """
    side = SIDES.get(word)
    if len(group) == 1 and side:
        (line,) = group
        distance = abs(float(line["difference"]))
        return f"{name(line['ahead'])} is {distance:.1f} AP {side} {name(line['than'])} (*{word}*, {interval(line)})"
    ahead, than = (list(dict.fromkeys(name(line[end]) for line in group)) for end in ("ahead", "than"))
    one_ahead = len(ahead) == 1
    varied = [f"{name(line['than' if one_ahead else 'ahead'])} ({numbers(line, whole or word == UNDECIDED)})" for line in group]
    ahead, than = (ahead, varied) if one_ahead else (varied, than)
    verb = "is" if one_ahead else "are"
    if side:
        return f"{listed(ahead)} {verb} {side} {listed(than)}: *{word}*"
    if word == UNDECIDED:
        return f"*{word}* whether {listed(ahead)} {verb} above {listed(than)}"
    return f"*{word}* of {listed(ahead)} over {listed(than)}"


def name(title: str) -> str:
    title = title.removesuffix(", whole schedule")
    return IN_A_SENTENCE.get(title, title)


def numbers(line: Line, whole: bool) -> str:
    """ "+0.7 [-2.0, +3.3], about 8 seeds"; without the interval unless `whole`."""
    seeds = int(line["seeds_to_decide"])
    found = " ".join(filter(None, [f"{float(line['difference']):+.1f}", interval(line) if whole else ""]))
    return f"{found}, {seeds_words(seeds)}" if seeds else found


def interval(line: Line) -> str:
    """The one that the word was taken from; nothing where there is none."""
    against_margin = word_of(line) in (NO_EFFECT, NO_GAIN)
    try:
        mean, half = float(line["difference"]), float(line["equivalence_half" if against_margin else "adjusted_half"])
    except ValueError:  # "no interval"
        return ""
    return f"[{mean - half:+.1f}, {mean + half:+.1f}]" + ", 90 %" * against_margin

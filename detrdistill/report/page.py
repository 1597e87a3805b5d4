"""All tables and figures of a preset on one HTML page that needs nothing else: no server, no script, no other site. No torch here.

What it looks like stands in `page.html`, `method.html` and `page.css`; what the template is given is made here.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from detrdistill.files import write_text
from detrdistill.recipes.claims import INSIDE, MARGIN, MARGINS, REPRODUCED_WITHIN
from detrdistill.recipes.words import MEASURED, NAMES, NOT_RUN, STORED
from detrdistill.report.board import Verdict
from detrdistill.statistics import AGAINST, HOLDS, NO_EFFECT, NO_GAIN, ONE_SEED, SMALL, UNDECIDED

SMALLEST = f"the margin of {MARGIN:g} AP (Figure 4's claims: {MARGINS[INSIDE]:g} points, by images of one or two teachers)"
# Words that may be said of a difference or a row: a sign for those who do not see colours, the class of its look, and what they mean.
# The signs are no arrows: "holds" may be a lead over a method that harms.
STATUSES = {
    "reproduced": ("=", "good", f"on COCO itself: AP within {REPRODUCED_WITHIN:g} of the published value"),
    HOLDS: ("✓", "good", "positive: the adjusted interval excludes 0. Of a row, by its own interval: above the plain student"),
    HOLDS + SMALL: ("(✓)", "good", f"positive, but smaller than {SMALLEST}"),
    AGAINST: ("✗", "bad", "negative: the adjusted interval excludes 0. Of a row, by its own interval: below the plain student, a harm"),
    AGAINST + SMALL: ("(✗)", "bad", f"negative, but smaller than {SMALLEST}"),
    NO_EFFECT: ("≈", "idle", f"whatever the difference is, it is smaller than {SMALLEST}: the 90 % interval lies within the margin"),
    NO_GAIN: ("≤", "idle", f"it may be harm, but no gain of {SMALLEST}: the 90 % interval ends below the margin"),
    UNDECIDED: ("?", "fair", "none of these can be said yet; so many seeds of both rows would decide it, if means and spreads stayed"),
    ONE_SEED: ("!", "fair", "measured once, so nothing is known about noise"),
    MEASURED: ("●", "idle", "measured here; nothing to compare with"),
    STORED: ("◌", "idle", "taken from the committed reference, not trained here: what others learn or start from"),
    NOT_RUN: ("○", "none", "no complete run is stored, or not with this measure; never a zero"),
}
STATUS = "Status"
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?( ± \d+(\.\d+)?)?( \(one seed\))?|\d+ of \d+|\[[+-][\d.]+, [+-][\d.]+\]")


@dataclass(frozen=True)
class Section:
    """One table and what belongs to it; every part but name and title may be missing.

    Attributes:
        name: the anchor, unique on the page.
        question: what the table answers.
        verdicts: of the claims that it decides.
        harms: rows below the plain student, in words.
        table: text, of `tables.cells`; folded away.
        note: how to read the numbers.
        provenance: where they come from; at the foot of the page.
        figures: PNG files with a PDF of the same name beside; these and all other paths are relative to the page's folder.
        notebooks: executed notebooks.
        files: the table as CSV, Markdown and LaTeX.
    """

    name: str
    title: str
    question: str = ""
    verdicts: Sequence[Verdict] = ()
    harms: Sequence[str] = ()
    table: pd.DataFrame | None = None
    note: str = ""
    provenance: str = ""
    figures: Sequence[str | Path] = ()
    notebooks: Sequence[str | Path] = ()
    files: Sequence[str | Path] = ()


def write_page(
    folder: Path, title: str, lead: Sequence[str], sections: Sequence[Section], verdicts: Sequence[Verdict] = (), notes: Sequence[str] = ()
) -> Path:
    """Write `index.html` to the folder: what was found, the board of claims, every section, provenance; the same bytes for the same files.

    Links and pictures are made only for files that exist, the rest is said to be not run.

    Args:
        lead: paragraphs below the title.
        notes: paragraphs of the foot.

    Raises:
        InputError: the folder cannot be written to.
    """
    here = FileSystemLoader(Path(__file__).parent)
    whitespace = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    jinja = Environment(loader=here, autoescape=True, undefined=StrictUndefined, **whitespace)
    jinja.filters |= {"word": _word, "statuses": count_statuses, "rows": _rows}
    jinja.tests |= {"numeric": _is_numeric, "missing": _is_missing}
    jinja.globals |= {"link": partial(_link, folder), "STATUSES": STATUSES, "STATUS": STATUS, "NOT_RUN": NOT_RUN}
    page = jinja.get_template("page.html").render(title=title, lead=lead, verdicts=verdicts, sections=sections, notes=notes)
    path = folder / "index.html"
    write_text(path, page)
    return path


def count_statuses(table: pd.DataFrame | None) -> dict[str, int]:
    """How many rows have which status, in the order of `STATUSES`."""
    if table is None or STATUS not in table:
        return {}
    counts = table[STATUS].map(_word).value_counts(sort=False).to_dict()
    return {status: counts[status] for status in [*STATUSES, *(other for other in counts if other not in STATUSES)] if status in counts}


def _word(status: str) -> str:
    """Without what stands in brackets after a known word: "undecided (about 9 seeds)" is undecided, "holds (small)" a word of its own."""
    return next((word for word in sorted(STATUSES, key=len, reverse=True) if status == word or status.startswith(f"{word} (")), status)


def _rows(table: pd.DataFrame) -> list[list[tuple[str, ...]]]:
    """The cells of each row, in groups whose first cell, such as the detector, is the same and is written once."""
    return [list(rows) for _, rows in groupby(table.astype(str).itertuples(index=False, name=None), key=itemgetter(0))]


def _is_numeric(values: Iterable[str]) -> bool:
    """Numbers, or words in their stead; a column in which nothing was run yet counts as well."""
    return all(NUMBER.fullmatch(value) or not re.search(r"\d", value) for value in values) and any(
        NUMBER.fullmatch(value) or _is_missing(value) for value in values
    )


def _is_missing(value: str) -> bool:
    return value in ("-", "n/a", "not found") or value.endswith(NOT_RUN)


def _link(folder: Path, path: str | Path, suffix: str = "") -> dict[str, str | bool]:
    """A file's name, its name in words, its relative address as a browser wants it, and whether it is there.

    Args:
        suffix: of the file of the same name that is meant instead.
    """
    path = Path(path).with_suffix(suffix) if suffix else Path(path)
    return {"name": path.name, "words": _words(path.stem), "address": quote(path.as_posix()), "exists": (folder / path).is_file()}


def _words(stem: str) -> str:
    """Of "figure4_rt_detr_v2_quality" for example "Figure 4 RT-DETR v2 quality"."""
    named = re.sub(rf"(?<=_)({'|'.join(sorted(NAMES, key=len, reverse=True))})(?=_|$)", lambda key: NAMES[key[0]], stem)
    words = re.sub(r"^([a-z]+)(?=[0-9])", r"\1 ", named.replace("_", " "))
    return words[:1].upper() + words[1:]

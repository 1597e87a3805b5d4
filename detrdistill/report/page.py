"""All tables and figures of a preset on one HTML page that needs nothing else: no server, no script, no other site. No torch here."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from detrdistill.files import write_text
from detrdistill.recipes.claims import MARGIN, REPRODUCED_WITHIN
from detrdistill.recipes.words import MEASURED, NOT_RUN, STORED
from detrdistill.statistics import AGAINST, HOLDS, NO_EFFECT, NO_GAIN, ONE_SEED, SMALL, UNDECIDED

# Words that may be said of a difference or a row, a sign for those who do not see colours, and what they mean.
STATUSES = {
    "reproduced": ("✓", f"on COCO itself: AP within {REPRODUCED_WITHIN:g} of the published value"),
    HOLDS: ("▲", "positive: the adjusted interval excludes 0. Of a row, by its own interval: above the plain student"),
    HOLDS + SMALL: ("△", f"positive, but smaller than the margin of {MARGIN:g} AP"),
    AGAINST: ("▼", "negative: the adjusted interval excludes 0. Of a row, by its own interval: below the plain student"),
    AGAINST + SMALL: ("▽", f"negative, but smaller than the margin of {MARGIN:g} AP"),
    NO_EFFECT: ("≈", f"whatever the difference is, it is smaller than {MARGIN:g} AP: the 90 % interval lies within the margin"),
    NO_GAIN: ("≤", f"it may be harm, but no gain of {MARGIN:g} AP: the 90 % interval ends below the margin"),
    UNDECIDED: ("?", "none of these can be said yet; so many seeds of both rows would decide it, if means and spreads stayed as they are"),
    ONE_SEED: ("1", "measured once, so nothing is known about noise"),
    MEASURED: ("●", "measured here; nothing to compare with"),
    STORED: ("◌", "taken from the committed reference, not trained here: what others learn or start from"),
    NOT_RUN: ("○", "no complete run is stored, or not with this measure; never a zero"),
}
STATUS = "Status"
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?( ± \d+(\.\d+)?)?( \(one seed\))?|\d+ of \d+")


STYLE = Path(__file__).with_name("page.css")

LOOKS = {
    "reproduced": "good", HOLDS: "good", HOLDS + SMALL: "good", AGAINST: "bad", AGAINST + SMALL: "bad", UNDECIDED: "fair",
    ONE_SEED: "fair", NOT_RUN: "none",
}  # fmt: skip


@dataclass(frozen=True)
class Section:
    """One table and what belongs to it; every part but name and title may be missing.

    Attributes:
        name: the anchor, unique on the page.
        table: text, of `tables.cells`.
        note: the provenance line.
        figures: PNG files with a PDF of the same name beside; these and all other paths are relative to the page's folder.
        notebooks: executed notebooks.
        files: the table as CSV, Markdown and LaTeX.
    """

    name: str
    title: str
    table: pd.DataFrame | None = None
    note: str = ""
    figures: Sequence[str | Path] = ()
    notebooks: Sequence[str | Path] = ()
    files: Sequence[str | Path] = ()


def write_page(folder: Path, title: str, about: str, sections: Sequence[Section]) -> Path:
    """Write `index.html` to the folder: contents with counted statuses, then every section; the same bytes for the same files.

    Links and pictures are made only for files that exist, the rest is said to be not run.

    Args:
        about: paragraphs of plain text, with empty lines between.

    Raises:
        InputError: the folder cannot be written to.
    """
    paragraphs = [f"<p>{escape(text.strip())}</p>" for text in about.split("\n\n") if text.strip()]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>",
        "</head>",
        "<body>",
        f"<header><h1>{escape(title)}</h1>{''.join(paragraphs)}</header>",
        *_contents(sections),
        "<main>",
        *(line for section in sections for line in _section(Path(folder), section)),
        "</main>",
        "</body>",
        "</html>",
    ]
    path = Path(folder) / "index.html"
    write_text(path, "\n".join(parts) + "\n")
    return path


def count_statuses(table: pd.DataFrame | None) -> dict[str, int]:
    """How many rows have which status, in the order of `STATUSES`."""
    if table is None or STATUS not in table:
        return {}
    counts = table[STATUS].map(_word).value_counts(sort=False).to_dict()
    return {status: counts[status] for status in [*STATUSES, *(other for other in counts if other not in STATUSES)] if status in counts}


def _contents(sections: Sequence[Section]) -> list[str]:
    lines, seen = ['<nav aria-label="Contents">', "<h2>Contents</h2>", "<ol>"], set()
    for section in sections:
        counts = count_statuses(section.table)
        seen |= set(counts)
        chips = "".join(_chip(status, f"{count} {status}") for status, count in counts.items())
        lines.append(f'<li><a href="#{_anchor(section)}">{escape(section.title)}</a> <span class="chips">{chips}</span></li>')
    meanings = [f"<dt>{_chip(status)}</dt><dd>{escape(meaning)}</dd>" for status, (_, meaning) in STATUSES.items() if status in seen]
    return [*lines, "</ol>", *(["<dl>", *meanings, "</dl>"] if meanings else []), "</nav>"]


def _section(folder: Path, section: Section) -> list[str]:
    lines = [f'<section id="{_anchor(section)}">', f"<h2>{escape(section.title)}</h2>"]
    if section.table is not None:
        lines += _table(section.table, section.title)
    if section.note:
        lines.append(f'<p class="note">{escape(section.note)}</p>')
    for name, paths in (("Executed notebook", section.notebooks), ("Table as a file", section.files)):
        if paths:
            lines.append(f'<p class="files">{name}: {", ".join(_link(folder, path) for path in paths)}</p>')
    for path in map(Path, section.figures):
        lines += _figure(folder, path, section.title)
    return [*lines, "</section>"]


def _table(table: pd.DataFrame, title: str) -> list[str]:
    right = {column for column in table if column != STATUS and _is_numeric(table[column])}
    # What is the same for many rows is written once: the detector, and what all rows were measured on.
    spans = {
        column: _spans(table[column]) for i, column in enumerate(table) if column not in (STATUS, *right) and _merged(table[column], i)
    }

    def kind(column):
        return ' class="number"' if column in right else ""

    # Wide tables scroll by themselves, also with the keyboard.
    lines = [f'<div class="table" tabindex="0" role="region" aria-label="{escape(title)}">', "<table>", "<thead><tr>"]
    lines += [f'<th scope="col"{kind(column)}>{escape(str(column))}</th>' for column in table]
    lines += ["</tr></thead>", "<tbody>"]
    before = None
    for i, values in enumerate(table.itertuples(index=False, name=None)):
        group = ' class="group"' if before not in (None, values[0]) else ""
        before = values[0]
        lines.append(f"<tr{group}>")
        for column, value in zip(table, values, strict=True):
            if column not in spans:
                lines.append(f"<td{kind(column)}>{_cell(column, str(value))}</td>")
            elif rows := spans[column][i]:
                lines.append(f'<td class="shared" rowspan="{rows}">{_cell(column, str(value))}</td>')
        lines.append("</tr>")
    return [*lines, "</tbody>", "</table>", "</div>"]


def _merged(values: pd.Series, place: int) -> bool:
    return place == 0 or (len(values) > 1 and values.nunique() == 1)


def _spans(values: Iterable[str]) -> list[int]:
    """At the first of equal neighbours how many they are, 0 at the others."""
    spans: list[int] = []
    for _, equal in groupby(values):
        count = len(list(equal))
        spans += [count] + [0] * (count - 1)
    return spans


def _is_numeric(values: Iterable[str]) -> bool:
    """Numbers, or words in their stead; a column in which nothing was run yet counts as well."""
    return all(NUMBER.fullmatch(value) or not re.search(r"\d", value) for value in values) and any(
        NUMBER.fullmatch(value) or _is_empty(value) for value in values
    )


def _is_empty(value: str) -> bool:
    return value in ("-", "n/a", "not found") or value.endswith(NOT_RUN)


def _cell(column: str, value: str) -> str:
    if column == STATUS:
        return _chip(value)
    return f'<span class="empty">{escape(value)}</span>' if _is_empty(value) else escape(value)


def _word(status: str) -> str:
    """Without the seeds that would decide it: "undecided (about 9 seeds)" is undecided."""
    return UNDECIDED if status.startswith(f"{UNDECIDED} (") else status


def _chip(status: str, text: str = "") -> str:
    """Sign, words and colour say the same."""
    word = _word(status)
    sign = f'<span aria-hidden="true">{STATUSES[word][0]}</span> ' if word in STATUSES else ""
    return f'<span class="{" ".join(["chip", *filter(None, [LOOKS.get(word)])])}">{sign}{escape(text or status)}</span>'


def _figure(folder: Path, path: Path, title: str) -> list[str]:
    name = re.sub(r"(?<=[a-z])(?=[0-9])", " ", path.stem.replace("_", " ")).capitalize()  # "figure1" becomes "Figure 1"
    if not (folder / path).is_file():
        return [f'<p class="files">{escape(name)} (figure): <span class="empty">{NOT_RUN}</span></p>']
    pdf = path.with_suffix(".pdf")
    more = f': <a href="{_address(pdf)}">PDF</a>' if (folder / pdf).is_file() else ""
    alt = escape(f"{name}, a figure of: {title}")
    return [f'<figure><img src="{_address(path)}" alt="{alt}" loading="lazy"><figcaption>{escape(name)}{more}</figcaption></figure>']


def _link(folder: Path, path: str | Path) -> str:
    if not (folder / path).is_file():
        return f'{escape(Path(path).name)} (<span class="empty">{NOT_RUN}</span>)'
    return f'<a href="{_address(path)}">{escape(Path(path).name)}</a>'


def _address(path: str | Path) -> str:
    """A relative path as a browser wants it."""
    return escape(quote(Path(path).as_posix()))


def _anchor(section: Section) -> str:
    return escape(re.sub(r"\s+", "-", section.name))

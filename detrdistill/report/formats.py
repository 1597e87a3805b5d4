"""Tables as files: CSV, Markdown, LaTeX. No torch here."""

import re
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pandas as pd

from detrdistill.files import write_text
from detrdistill.published import in_words
from detrdistill.recipes.rows import Table
from detrdistill.recipes.words import METRICS, NO_OBJECTS, NOT_RUN
from detrdistill.report.tables import COSTS, UNTUNED, cells, note_below


def write_table(table: Table, frame: pd.DataFrame, summary: pd.DataFrame, folder: Path) -> list[Path]:
    """Write `<name>.csv` (a line a run), `<name>.md` and `<name>.tex` (a line a row); the same bytes for the same records."""
    text = cells(summary)
    beside = f", beside the paper's {in_words(table.published)}" if table.published else ""
    title = f"{table.title}, preset {table.preset}{beside}"
    provenance = note_below(table, frame)
    forms = {"csv": to_csv(frame), "md": to_markdown(text, title, provenance), "tex": to_latex(text, title, provenance)}
    paths = []
    for suffix, content in forms.items():
        paths.append(folder / f"{table.name}.{suffix}")
        write_text(paths[-1], content)
    return paths


def to_csv(frame: pd.DataFrame) -> str:
    """Words instead of blanks; pandas reads numbers back with `na_values=["not run", "n/a", "not stored"]`.

    Each line carries its data and commit; the run's record has the rest of its provenance.
    """
    filled = frame.drop(columns="computed_by").astype(object)
    ran = frame["status"] != NOT_RUN
    whole = frame["AP50"].notna() | ~ran  # what is read off a curve has AP alone
    for column in (*METRICS, "data_sha256", "commit"):
        empty = np.where(whole, NO_OBJECTS, "not stored") if column in METRICS else "unknown"
        filled[column] = np.where(frame[column].notna(), filled[column], np.where(ran, empty, NOT_RUN))
    if UNTUNED in filled:
        filled[UNTUNED] = filled[UNTUNED].where(frame[UNTUNED].notna(), NOT_RUN)
    if "cost_measured_on" in filled:
        costs = [*COSTS, "cost_measured_on"]
        filled[costs] = filled[costs].where(filled[costs].notna(), "not measured")
    return filled.to_csv(index=False, lineterminator="\n")


def to_markdown(text: pd.DataFrame, title: str, provenance: str) -> str:
    def line(values):
        return "| " + " | ".join(values) + " |\n"

    rows = "".join(line(values) for values in text.itertuples(index=False))
    return f"**{title}**\n\n{line(text.columns)}{line(['---'] * len(text.columns))}{rows}\n{provenance}\n"


def to_latex(text: pd.DataFrame, title: str, provenance: str) -> str:
    """A booktabs table over both columns of a page, shrunk only if it is wider; detectors head their rows.

    Where it was measured stands in the caption alone.
    """
    detectors, shown = text["Detector"], text.drop(columns=["Detector", "Measured on"])
    cells = shown.map(latex_text)
    first = detectors.ne(detectors.shift())
    heads = detectors.map(lambda name: rf"\multicolumn{{{len(shown.columns)}}}{{@{{}}l}}{{\textbf{{{latex_text(name)}}}}} \\" + "\n")
    heads[1:] = "\\midrule\n" + heads[1:]
    cells["Setting"] = heads.where(first, "") + cells["Setting"]
    tabular = cells.to_latex(
        index=False,
        escape=False,
        header=[HEADERS.get(name, name) for name in shown.columns],
        column_format=f"@{{}}l{'r' * (len(shown.columns) - 3)}ll@{{}}",
    )
    return (
        "% needs \\usepackage{booktabs,graphicx}\n\\begin{table*}\n\\centering\\footnotesize\\setlength{\\tabcolsep}{4pt}\n"
        f"\\caption{{{latex_text(f'{title}. {provenance}')}}}\n"
        "\\smallskip\n\\resizebox{\\ifdim\\width>\\linewidth \\linewidth\\else\\width\\fi}{!}{%\n"
        f"{tabular.strip()}}}\n\\end{{table*}}\n"
    )


HEADERS = {
    "AP before tuning": "AP untuned",
    "APs": r"AP$_S$",
    "APm": r"AP$_M$",
    "APl": r"AP$_L$",
    "Published AP": "Publ. AP",
    "Published gain": "Publ. gain",
}
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {character: f"${character}$" for character in "<>|"}
    | {character: f"{{{character}}}" for character in "[*"}  # which after the end of a row are its options
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", '"': "''", "\N{MINUS SIGN}": "$-$"}
    | {"±": r"$\pm$", "\N{MULTIPLICATION SIGN}": r"$\times$", "→": r"$\to$", "≤": r"$\le$", "≥": r"$\ge$", "…": r"\dots{}"}
    | {letter: rf"$\{name}$" for letter, name in zip("Δαβγδλμσ", "Delta alpha beta gamma delta lambda mu sigma".split(), strict=True)}
)


ACCENTS = "\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327"  # that TeX's own fonts can set over or under a letter


def latex_text(text: str) -> str:
    """Any text for pdflatex, in one line; letters that its fonts lack, such as Chinese ones, by their number: [U+4E2D]."""
    found = "".join(one if _has_latex(one) else f"[U+{ord(one):04X}]" for one in normalize("NFC", " ".join(text.split())))
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", found.translate(LATEX))


def _has_latex(one: str) -> bool:
    base, *marks = normalize("NFD", one)
    accented = ord(one) < 0x17F and base.isascii() and len(marks) == 1 and marks[0] in ACCENTS
    return (one.isascii() and one.isprintable()) or ord(one) in LATEX or one in "ßæœøłÆŒØŁ§¶£" or accented

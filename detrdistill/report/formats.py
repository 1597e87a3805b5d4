"""Tables as files: CSV, Markdown, LaTeX. No torch here."""

from pathlib import Path

import numpy as np
import pandas as pd

from detrdistill.files import write_text
from detrdistill.published import in_words
from detrdistill.recipes.rows import Table
from detrdistill.recipes.words import METRICS, NO_OBJECTS, NOT_RUN
from detrdistill.report.tables import NOTES, cells, provenance_line


def write_table(table: Table, frame: pd.DataFrame, summary: pd.DataFrame, folder: Path) -> list[Path]:
    """Write `<name>.csv` (a line a run), `<name>.md` and `<name>.tex` (a line a row); the same bytes for the same records."""
    text = cells(summary)
    beside = f", beside the paper's {in_words(table.published)}" if table.published else ""
    title = f"{table.title}, preset {table.preset}{beside}"
    provenance = f"{provenance_line(frame)} {NOTES}"
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
    return filled.to_csv(index=False, lineterminator="\n")


def to_markdown(text: pd.DataFrame, title: str, provenance: str) -> str:
    def line(values):
        return "| " + " | ".join(values) + " |\n"

    rows = "".join(line(values) for values in text.itertuples(index=False))
    return f"**{title}**\n\n{line(text.columns)}{line(['---'] * len(text.columns))}{rows}\n{provenance}\n"


def to_latex(text: pd.DataFrame, title: str, provenance: str) -> str:
    """A booktabs table with a caption, scaled to the line's width."""

    def line(values):
        return "    " + " & ".join(map(_escape, values)) + r" \\" + "\n"

    body, before = "", None
    for values in text.itertuples(index=False):
        body += "    \\midrule\n" if before not in (None, values[0]) else ""
        body += line(values)
        before = values[0]
    return (
        "% needs \\usepackage{booktabs,graphicx}\n\\begin{table}\n  \\centering\n"
        f"  \\caption{{{_escape(f'{title}. {provenance}')}}}\n  \\resizebox{{\\linewidth}}{{!}}{{%\n"
        f"  \\begin{{tabular}}{{{'l' * len(text.columns)}}}\n    \\toprule\n{line(text.columns)}    \\midrule\n{body}    \\bottomrule\n"
        "  \\end{tabular}}\n\\end{table}\n"
    )


LATEX = {"±": r"$\pm$", "APs": r"AP$_S$", "APm": r"AP$_M$", "APl": r"AP$_L$"}


def _escape(text: str) -> str:
    for character in "%&_#":
        text = text.replace(character, f"\\{character}")
    for plain, latex in LATEX.items():
        text = text.replace(plain, latex)
    return text

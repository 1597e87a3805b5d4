"""Tables for a paper: they compile, whatever their titles hold, and say what the Markdown says."""

import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from detrdistill.report.formats import latex_text, to_latex

HOSTILE = [
    r"50% & more_than #1 for $5 {a} ~b ^c \d",
    "\\",
    r"\end{tabular}",
    "a\n\nb",
    "± × − → Δ λ ≤ ≥ … <b> | \"x\" 'y'",  # noqa: RUF001 (minus and times as they are written)
    "Größe, façade, naïve, Łódź, señor, Ångström, čeština",
    "中文 and \N{GRINNING FACE}",
    "-1.5 to -0.3, x-1",
    "[x] * y",
]
REFERENCE = Path(__file__).parents[2] / "results" / "reference"
COLUMNS = ["AP", "Gain", "APs", "APm", "APl", "Published AP", "Published gain", "Measured on", "Seeds", "Status"]


def hostile() -> pd.DataFrame:
    lines = [{"Detector": HOSTILE[i // 3], "Setting": text} | dict.fromkeys(COLUMNS, text) for i, text in enumerate(HOSTILE)]
    return pd.DataFrame(lines)


def test_every_special_character_is_escaped() -> None:
    assert latex_text(HOSTILE[0]) == (r"50\% \& more\_than \#1 for \$5 \{a\} \textasciitilde{}b \textasciicircum{}c \textbackslash{}d")
    assert latex_text(r"\end{tabular}") == r"\textbackslash{}end\{tabular\}"
    assert latex_text("a\n\n b") == "a b", "an empty line would end the cell"
    assert latex_text("21.4 ± 3.0") == r"21.4 $\pm$ 3.0" and latex_text("-2.9 ± 2.4") == r"$-$2.9 $\pm$ 2.4"
    assert latex_text("KD-DETR, 2-1") == "KD-DETR, 2-1" and latex_text("-") == "-"
    assert latex_text("中 Größe") == "{[}U+4E2D] Größe" == latex_text("中 Gro\N{COMBINING DIAERESIS}ße")


def structure(latex: str) -> tuple[list[str], list[int], int]:
    """Environments in the order in which they close, cells a row, and columns as declared."""
    body = re.sub(r"(?m)^%.*$", "", latex)
    stack, closed = [], []
    for which, name in re.findall(r"\\(begin|end)\{(\w+\*?)\}", body):
        if which == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
            closed.append(name)
    assert not stack and body.count("{") - body.count(r"\{") == body.count("}") - body.count(r"\}")
    rows = [row for row in re.split(r"\\\\\n", body.split(r"\toprule")[1].split(r"\bottomrule")[0])[:-1] if "multicolumn" not in row]
    return closed, [len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows], len(re.search(r"@\{\}([lr]+)@\{\}", body)[1])


def test_the_form_is_whole_and_holds_every_row_once() -> None:
    frame = hostile()
    latex = to_latex(frame, HOSTILE[0], HOSTILE[4])
    closed, cells, declared = structure(latex)
    assert closed == ["tabular", "table*"] and set(cells) == {declared} and len(cells) == 1 + len(frame)
    assert latex.count("multicolumn") == frame["Detector"].nunique() == latex.count(r"\midrule")
    assert not set("±×−→Δλ≤≥…中") & set(latex)  # noqa: RUF001
    assert re.findall(r"\\textbf\{(.*)\}\} ", latex) == [latex_text(name) for name in frame["Detector"].unique()]


@pytest.mark.parametrize("path", sorted(REFERENCE.glob("*/tables/*.tex")), ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_committed_tables_are_whole(path: Path) -> None:
    latex = path.read_text(encoding="utf-8")
    closed, cells, declared = structure(latex) if "table*" in latex else ([], [], 0)
    assert closed == ["tabular", "table*"] and set(cells) == {declared} and latex.isascii()


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex (Debian: texlive-latex-recommended, texlive-fonts-recommended)")
@pytest.mark.parametrize("options", ["twocolumn", "onecolumn"])
def test_tables_compile_in_a_paper(options: str, tmp_path: Path) -> None:
    latin = " ".join(chr(code) for code in [*range(0xA1, 0x17F)])
    (tmp_path / "hostile.tex").write_text(to_latex(hostile(), " ".join(HOSTILE), latin), encoding="utf-8")
    inputs = ["hostile.tex", *(path.as_posix() for path in sorted(REFERENCE.glob("mini/tables/*.tex")))]
    lines = [rf"\documentclass[{options}]{{article}}", r"\usepackage{booktabs,graphicx}", r"\begin{document}", "A page."]
    lines += [rf"\input{{{name}}}\clearpage" for name in inputs]
    (tmp_path / "page.tex").write_text("\n".join([*lines, r"\end{document}"]), encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    log = (tmp_path / "page.log").read_text(errors="replace")
    assert "Overfull" not in log, "no table is wider than the page"
    assert "Missing character" not in log

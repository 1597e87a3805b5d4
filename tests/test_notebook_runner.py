"""Executing notebooks: success is every cell run, whatever papermill's exit code says; a result is never half written."""

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from detrdistill.errors import InputError
from detrdistill.notebooks import execute, last_line, literal, unfinished

LIMIT = 100
FAILURES = {
    "raise ValueError('boxes are gone')": r"papermill ended with code 1: .*boxes are gone",
    "import os; os.kill(os.getpid(), 9)": r"papermill ended with code 138: |was never run|Kernel died",
    "import sys; sys.exit(0)": r"cell 4 raised an error",
}


def notebook(path: Path, *cells: str) -> Path:
    parameters = new_code_cell("preset: str = 'smoke'  # scale\nlr: float = 1e-3", metadata={"tags": ["parameters"]})
    content = new_notebook(cells=[new_markdown_cell("# Title"), parameters, *map(new_code_cell, cells)])
    content.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(content, path)
    return path


def outputs(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells if cell.cell_type == "code" for output in cell.outputs)


def test_success_then_failures(tmp_path):
    """One output path: written once and whole by a run that succeeds, kept by all that fail."""
    result = tmp_path / "results" / "notebooks" / "a.ipynb"
    source = notebook(tmp_path / "a.ipynb", "print(preset, type(lr).__name__, lr)", "", "open('seen', 'w').write('here')")
    before = source.read_bytes()
    execute(source, result, {"preset": "quick", "lr": "1e-4"}, LIMIT)
    assert outputs(result) == "quick float 0.0001\n" and source.read_bytes() == before
    assert [path.name for path in result.parent.iterdir()] == ["a.ipynb"]
    assert (tmp_path / "seen").exists(), "notebooks run in their own folder"

    kept = result.read_bytes()
    for cell, message in FAILURES.items():
        notebook(source, "print('first')", cell, "print('later')")
        with pytest.raises(InputError, match=message) as error:
            execute(source, result, {}, LIMIT)
        assert f"notebook {source} failed: " in str(error.value) and "\n" not in str(error.value), cell
        assert result.read_bytes() == kept
        assert sorted(path.name for path in result.parent.iterdir()) == ["a.failed.ipynb", "a.ipynb"]
        assert "later" not in outputs(result.with_suffix(".failed.ipynb"))

    with pytest.raises(InputError, match=rf"notebook {source} failed: .*took longer than 0\.5 seconds"):
        execute(source, result, {}, 0.5)
    assert result.read_bytes() == kept


def test_unknown_parameters_are_refused_before_anything_runs(tmp_path):
    source = notebook(tmp_path / "a.ipynb", "open('ran', 'w')")
    with pytest.raises(InputError, match=r"a\.ipynb: unknown parameters learning_rate, sede; it has preset, lr"):
        execute(source, tmp_path / "out.ipynb", {"sede": "1", "learning_rate": "3", "lr": "1"})
    assert [path.name for path in tmp_path.iterdir()] == ["a.ipynb"]


def test_sources_that_are_no_notebooks(tmp_path):
    with pytest.raises(InputError, match=r"absent\.ipynb: no such file"):
        execute(tmp_path / "absent.ipynb", tmp_path / "out.ipynb", {})
    (tmp_path / "text.ipynb").write_text("not a notebook")
    with pytest.raises(InputError, match=r"text\.ipynb: not a notebook"):
        execute(tmp_path / "text.ipynb", tmp_path / "out.ipynb", {})


def test_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "results").write_text("mine")
    with pytest.raises(InputError, match="results is a file"):
        execute(notebook(tmp_path / "a.ipynb"), tmp_path / "results" / "a.ipynb", {})
    assert (tmp_path / "results").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("3", 3), ("(0, 1)", (0, 1)), ("[1]", [1]), ("True", True), ("quick", "quick"), ("'3'", "3"), ("a/b c", "a/b c")],
)
def test_literals(text, value):
    assert literal(text) == value and type(literal(text)) is type(value)


def test_cells_tell_what_happened(tmp_path):
    """papermill ends well, and calls the notebook complete, when a cell ends the kernel by `sys.exit(0)`."""
    cells = [new_markdown_cell("# Title"), new_code_cell("1", execution_count=1), new_code_cell(""), new_code_cell("2")]
    path = tmp_path / "a.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    assert unfinished(path) == "cell 4 was never run"
    cells[1].outputs = [new_output("error", ename="SystemExit", evalue="0", traceback=[])]
    nbformat.write(new_notebook(cells=cells), path)
    assert unfinished(path) == "cell 2 raised an error"
    nbformat.write(new_notebook(cells=[cells[0], *(new_code_cell("1", execution_count=n) for n in (1, 2)), cells[2]]), path)
    assert unfinished(path) is None


def test_last_line():
    assert last_line("a\n  b \n\n") == "  b " and last_line(" \n") == "no message"

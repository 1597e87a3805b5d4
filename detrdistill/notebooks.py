"""Executing notebooks in the batch: parameters are checked first, and success is read off the executed cells."""

import ast
import glob
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import yaml

from detrdistill.errors import InputError
from detrdistill.files import make_folder, write_text
from detrdistill.process import TERMINATED, on_sigterm


def execute(source: Path, output: Path, parameters: dict[str, str], timeout: float | None = None) -> None:
    """Run `source` with papermill in a process of its own, and move it to `output` when every cell has run.

    A notebook that failed is kept beside it as `<name>.failed.ipynb`. SIGTERM ends papermill, and this process with exit code 143.

    Raises:
        InputError: unknown parameters, before anything runs; or the notebook did not run to its end.
    """
    if not source.exists():
        raise InputError(f"notebook {source}: no such file")
    try:
        known = papermill.inspect_notebook(str(source))
    except (ValueError, nbformat.ValidationError):
        raise InputError(f"notebook {source}: not a notebook; restore the file") from None
    if unknown := sorted(parameters.keys() - known.keys()):
        raise InputError(f"notebook {source}: unknown parameters {', '.join(unknown)}; it has {', '.join(known)}")
    running = make_folder(output.parent) / f".{output.stem}.{os.getpid()}.ipynb"
    failed = output.with_suffix(".failed.ipynb")
    failed.unlink(missing_ok=True)
    for leftover in output.parent.glob(f".{glob.escape(output.stem)}.*.ipynb"):  # left by calls that were killed
        number = leftover.suffixes[-2][1:]
        if leftover.name == f".{output.stem}.{number}.ipynb" and number.isdecimal() and not _alive(int(number)):
            leftover.unlink(missing_ok=True)
    given = yaml.safe_dump({name: literal(value) for name, value in parameters.items()})
    command = [sys.executable, "-m", "papermill", str(source), str(running), "-y", given, "--cwd", str(source.parent), "--no-progress-bar"]
    try:
        try:
            with on_sigterm(lambda: sys.exit(TERMINATED)):
                done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
            ended = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"ended with code {done.returncode}"
            fault = f"papermill {ended}: {last_line(done.stderr)}" if done.returncode else unfinished(running)
            if "DeadKernelError" in done.stderr:
                fault += ": something killed it, most often the system for want of memory; free some, or take a smaller preset"
        except subprocess.TimeoutExpired:
            fault = f"it took longer than {timeout} seconds"
        if fault is None:
            notebook = nbformat.read(running, as_version=4)
            notebook.metadata.pop("papermill", None)  # holds absolute paths, and a status that is not to be trusted
            write_text(output, nbformat.writes(notebook) + "\n")
            return
        if running.exists():
            running.replace(failed)
            fault += f"; see {failed}"
        raise InputError(f"notebook {source} failed: {fault}")
    finally:
        running.unlink(missing_ok=True)


def unfinished(path: Path) -> str | None:
    """What is wrong with an executed notebook, by its cells: papermill's own metadata calls killed notebooks complete."""
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells, start=1):
        if cell.cell_type == "code" and cell.source.strip():
            if any(output.output_type == "error" for output in cell.outputs):
                return f"cell {number} raised an error"
            if cell.execution_count is None:
                return f"cell {number} was never run"
    return None


def literal(text: str) -> object:
    """The Python value that `text` writes, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True

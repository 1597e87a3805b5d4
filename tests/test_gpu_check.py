"""The GPU check works here in tiny sizes, and nothing that a check does keeps the others from being made."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_numbers import WAITED, waits
from benchmarks.gpu_report import COLUMNS, Check, Report
from benchmarks.measure import ROOT, Table
from tests.warm import CHILDREN, python_m


@pytest.mark.timeout(900)  # a minute on a core of its own
def test_it_works(tmp_path: Path) -> None:
    done = python_m("benchmarks.gpu_check", "--small", "--out", tmp_path, cwd=ROOT, timeout=880)
    table = Table(tmp_path / "gpu.csv", COLUMNS)
    rows = table.rows()
    assert done.returncode == 0, f"{[row for row in rows if row['passed'] == 'no']} {done.stderr[-2000:]}"
    assert list(dict.fromkeys(row["check"] for row in rows)) == [check.name for check in gpu_check.all_checks()]
    assert {row["note"] for row in rows} == {"", "needs CUDA"} and {row["passed"] for row in rows} == {"", "yes"}
    assert {"ms", "x", "relative", "images a second"} <= {row["unit"] for row in rows}
    assert table.path.read_text(encoding="utf-8").startswith("# commit ") and len(rows) > 50


def test_it_is_called_by_its_path(tmp_path: Path) -> None:
    """From any folder, without installing the kit."""
    command = [sys.executable, ROOT / "benchmarks" / "gpu_check.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert "--small" in done.stdout and "--oracles" in done.stdout


def measure(report: Report) -> None:
    report.add("measured", 1.0, at_most=2.0)


def hang(report: Report) -> None:
    """With a process that would outlive it."""
    child = subprocess.Popen(["sleep", "300"])
    report.add("its child", child.pid)
    time.sleep(300)


def fail(report: Report) -> None:
    with report.trying("a part"):
        raise ValueError("of\nno use")
    report.add("too much", 3.0, at_most=2.0)
    raise KeyError("lost")


def die(report: Report) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_each_check_is_made_whatever_happens_to_the_others(tmp_path: Path) -> None:
    table = Table(tmp_path / "gpu.csv", COLUMNS)
    table.start("test")
    checks = [Check("first", 60, measure), Check("hangs", 5, hang), Check("fails", 60, fail), Check("dies", 60, die)]
    gpu_check.carry_out_all([*checks, Check("last", 60, measure)], Report(table, "", "cpu", True, tmp_path), CHILDREN)
    found = [(row["check"], row["what"], row["passed"], row["note"]) for row in table.rows()]
    assert found == [
        ("first", "measured", "yes", ""),
        ("hangs", "its child", "", ""),
        ("hangs", "the check itself", "no", "stopped after 5 s, its time box"),
        ("fails", "a part", "no", "ValueError: of no use"),
        ("fails", "too much", "no", ""),
        ("fails", "the check itself", "no", "KeyError: 'lost'"),
        ("dies", "the check itself", "no", "its process ended with exit code -9"),
        ("last", "measured", "yes", ""),
    ]
    child = int(table.rows()[1]["value"])
    assert not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text(), "it ends with its check"


def test_no_check_starts_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "MOST_SECONDS", 4)
    table = Table(tmp_path / "gpu.csv", COLUMNS)
    table.start("test")
    gpu_check.carry_out_all([Check("first", 60, measure)], Report(table, "", "cpu", True, tmp_path), CHILDREN)
    assert [(row["passed"], row["note"]) for row in table.rows()] == [("no", "no time was left of 4 s")]


def test_waits_are_counted_where_they_happen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch's warnings, which are put in the place of a GPU here."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    table = Table(tmp_path / "gpu.csv", COLUMNS)
    table.start("test")
    report = Report(table, "", "cuda", False, tmp_path)
    for times, exactly in ((1, 1), (2, 1)):
        with waits(report, "waits", exactly):
            for _ in range(times):
                warnings.warn(f"{WAITED} (Triggered internally)", stacklevel=1)
                warnings.warn("something else", stacklevel=1)
    (one, many), here = table.rows(), Path(__file__).read_text(encoding="utf-8").splitlines()
    assert (one["value"], one["passed"], many["value"], many["passed"]) == ("1", "yes", "2", "no")
    assert one["note"] == many["note"] and "{WAITED}" in here[int(one["note"].removeprefix(f"{Path(__file__).name}:")) - 1]
    assert modes == ["warn", "default"] * 2


def test_what_is_missing_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().err == "error: torch finds no CUDA device here; --small shows on the CPU that the checks work\n"
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None if name in ("PIL", "tqdm") else True)
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().err == "error: packages are missing; install them: python -m pip install pillow tqdm\n"

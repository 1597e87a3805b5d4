"""Fault tests. `make test` runs each fault a few times. `make faults` (`pytest tests/faults --long`) runs the long loops.

Then it prints a table of what was tried, and writes it into docs/trust.md.

A fault counts as survived if nothing was lost, executed or believed that should not be; a test says how often it tried.
"""

import os
import random
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from time import monotonic

import hypothesis
import pytest
from hypothesis import HealthCheck

from detrdistill.files import write_text
from detrdistill.records import short_commit
from detrdistill.runs.provenance import commit
from tests.faults.table import PAGE, table_text, with_table

STARTED = monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the long loops of the fault tests, and their table")
    parser.addoption("--seed", type=int, default=0, help="another seed breaks other things, and kills at other moments (default 0)")


@pytest.fixture
def times(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """How often to repeat: `times(few, many)`, many with --long."""
    # The option is unknown to pytest when it starts above this folder, as in a plain `pytest`.
    long = request.config.getoption("long", default=False)
    return lambda few, many: many if long else few


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("seed", default=0)


@pytest.fixture
def chance(request: pytest.FixtureRequest, seed: int) -> random.Random:
    """Moments and places to break something at: others in each test and for each --seed."""
    return random.Random(f"{request.node.nodeid} {seed}")


@pytest.fixture
def examples(times: Callable[[int, int], int], seed: int) -> Callable[[int, int], Callable]:
    """How many of Hypothesis' inputs to try: `@examples(few, many)` above `@given`. The same ones for the same --seed."""

    def number(few: int, many: int) -> Callable:
        few_or_many = hypothesis.settings(max_examples=times(few, many), deadline=None, database=None, suppress_health_check=[*HealthCheck])
        return lambda test: few_or_many(hypothesis.seed(seed)(test))

    return number


@pytest.fixture
def tries(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Iterator["Tries"]:
    """Counts what a test tries: `with tries("kill -9 of the trainer"): ...`, once for every fault."""
    counted = Tries()
    yield counted
    for fault, (tried, survived) in counted.counts.items():
        record_property("fault", (fault, tried, survived))


class Tries:
    """A fault is tried when its `with` block begins and survived when it ends without an exception, failed checks included."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}

    def __call__(self, fault: str) -> "Tries":
        self._fault = fault
        return self

    def __enter__(self) -> None:
        self.counts.setdefault(self._fault, [0, 0])[0] += 1
        self._open = self._fault

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.counts[self._open][1] += kind is None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    if not terminalreporter.config.getoption("long", default=False):
        return
    table: dict[str, list[int]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "teardown":
                for name, counts in report.user_properties:
                    if name == "fault":
                        row = table.setdefault(counts[0], [0, 0])
                        row[0] += counts[1]
                        row[1] += counts[2]
    minutes, seconds = divmod(round(monotonic() - STARTED), 60)
    skipped = len(terminalreporter.stats.get("skipped", []))
    note = f"{minutes} min {seconds} s on {os.cpu_count()} cores; {skipped} test{'s' * (skipped != 1)} skipped"
    seed = terminalreporter.config.getoption("seed", default=0)
    text = table_text(f"{date.today()}, commit {short_commit(commit())}, seed {seed}", table, note)
    terminalreporter.section("faults")
    terminalreporter.write_line(text)
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and is_whole(terminalreporter.config):
        write_text(PAGE, with_table(PAGE.read_text(encoding="utf-8"), text))
        terminalreporter.write_line(f"\nwritten into {PAGE}")


def is_whole(config: pytest.Config) -> bool:
    """Whether `make faults` asked: for all of this folder and of the exports. A part must not stand in the place of the whole."""
    asked = {Path(config.invocation_params.dir, name).resolve() for name in config.args}
    part = [name for name in ("keyword", "markexpr", "maxfail", "lf", "deselect") if getattr(config.option, name, None)]
    here = Path(__file__).parent
    return asked == {here, here.with_name("export")} and not part

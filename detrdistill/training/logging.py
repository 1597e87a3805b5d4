"""One JSON object a line: what every step lost, part by part. No times in it, so that equal runs write equal bytes."""

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from detrdistill.files import write_text, writing


class Log:
    """Appends to a JSON-lines file; lines after `resume_at`, left by a run that was killed, are dropped first.

    Without a path nothing is written: of several processes, one logs.
    """

    def __init__(self, path: Path | None, resume_at: int = 0) -> None:
        self._file, self._path = None, path
        if path is not None:
            write_log(path, [entry for entry in read_log(path) if entry["step"] <= resume_at])
            self._file = path.open("a", encoding="utf-8")

    def write(self, **entry: Any) -> None:
        if self._file:
            with writing(self._path):
                self._file.write(_line(entry))
                self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file:
            with writing(self._path):  # a full disk is told of again: what could not be written is tried once more
                self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a log; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            entries.append(json.loads(line))
    return entries


def write_log(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Write a log anew, as `Log` writes it."""
    write_text(path, "".join(_line(entry) for entry in entries))


def is_logged(step: int, total: int, open_ended: bool) -> bool:
    """Whether a step gets a line: all of 2,000, or that many of more, evenly spread.

    Where more steps may follow (`Schedule.open_ended`) the total decides nothing: after 2,000 steps it is every second one, after 4,000
    every fourth, and so on.
    """
    every = 1 << max(0, ((step - 1) // 1000).bit_length() - 1) if open_ended else max(1, total // 2000)
    return step % every == 0


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"

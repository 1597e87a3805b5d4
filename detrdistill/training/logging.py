"""One JSON object a line: what every step lost, part by part. No times in it, so that equal runs write equal bytes.

The same numbers may go to a logger of Lightning Fabric as well, for those who want to watch: it decides nothing.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from detrdistill.errors import InputError
from detrdistill.files import make_folder, write_text, writing

if TYPE_CHECKING:
    from lightning_fabric.loggers import Logger

LOGGERS = ("tensorboard",)


def check_logger(name: str) -> None:
    """Raise InputError where a logger is unknown or not installed; "" is none."""
    if name and name not in LOGGERS:
        raise InputError(f"logger '{name}' is unknown; known: {', '.join(LOGGERS)}")
    if name and find_spec(name) is None:
        raise InputError(f"logger '{name}' is not installed; install the extra: pip install 'detrdistill[{name}]'")


def make_loggers(name: str, folder: Path) -> list["Logger"]:
    """Lightning Fabric's logger of this name, which writes into `<folder>/<name>`; none where nothing is named."""
    check_logger(name)
    if not name:
        return []
    from lightning_fabric.loggers import TensorBoardLogger

    make_folder(folder / name)
    return [TensorBoardLogger(folder, name="", version=name)]


class Log:
    """Appends to a JSON-lines file; lines after `resume_at`, left by a run that was killed, are dropped first.

    Without a path nothing is written: of several processes, one logs.

    Args:
        loggers: which are told the same.
    """

    def __init__(self, path: Path | None, resume_at: int = 0, loggers: Sequence["Logger"] = ()) -> None:
        self._file, self._path, self._loggers = None, path, loggers if path else ()
        if path is not None:
            write_log(path, [entry for entry in read_log(path) if entry["step"] <= resume_at])
            self._file = path.open("a", encoding="utf-8")

    def write(self, **entry: Any) -> None:
        if self._file:
            with writing(self._path):
                self._file.write(_line(entry))
                self._file.flush()
        self._tell(entry)

    def evaluated(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Tell the loggers what was measured; the file has losses alone, the record the curve."""
        self._tell({"step": step} | {name: value for name, value in metrics.items() if value is not None})

    def _tell(self, entry: Mapping[str, Any]) -> None:
        for logger in self._loggers:
            logger.log_metrics({name: value for name, value in entry.items() if name != "step"}, entry["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file:
            with writing(self._path):  # a full disk is told of again: what could not be written is tried once more
                self._file.close()
        for logger in self._loggers:
            logger.finalize("failed" if error else "success")


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

"""What all benchmarks share: how far they go, and a table that is printed and written row by row.

Every benchmark has three scales. The full one is what is committed. `--quick` of all of them takes a quarter of an hour. `--small` takes
seconds and its numbers mean nothing: the tests run it, so that no benchmark stops working unseen.
"""

import argparse
import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from time import perf_counter, process_time

import torch

from detrdistill.files import write_text

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def make_parser(about: str, *, quick: bool = True) -> argparse.ArgumentParser:
    """The arguments of all benchmarks: `scale` is "full", "quick" (where there is such a scale) or "small"."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    scale = parser.add_mutually_exclusive_group()
    if quick:
        scale.add_argument("--quick", dest="scale", action="store_const", const="quick", help="a rough measurement, in a few minutes")
    scale.add_argument("--small", dest="scale", action="store_const", const="small", help="tiny sizes, only to see that it works")
    parser.add_argument("--out", type=Path, help="folder of the table; by default benchmarks/, or benchmarks/quick or /small beside it")
    parser.set_defaults(scale="full")
    return parser


def table_path(arguments: argparse.Namespace, name: str) -> Path:
    """Where the table `name` of this scale lies: rough numbers do not replace those that are committed."""
    return (arguments.out or (HERE if arguments.scale == "full" else HERE / arguments.scale)) / name


@dataclass(frozen=True)
class Table:
    """A csv file that is whole after every row: a benchmark that is stopped leaves what it has measured."""

    path: Path
    columns: Sequence[str]

    def start(self, about: str) -> None:
        """Write the heading and the day, in place of an older table."""
        about = f"{about}; {date.today()}"
        print(about, flush=True)
        write_text(self.path, f"# {about}\n{line(self.columns)}")

    def add(self, row: Mapping[str, object]) -> None:
        """Print a row and append it."""
        row = {name: shortened(value) if isinstance(value, float) else value for name, value in row.items()}
        print(", ".join(f"{name}: {value}" for name, value in row.items() if value not in (None, "")), flush=True)
        write_text(self.path, self.path.read_text(encoding="utf-8") + line([row.get(name) for name in self.columns]))

    def rows(self) -> list[dict[str, str]]:
        return list(csv.DictReader(self.path.read_text(encoding="utf-8").splitlines()[1:]))


def shortened(value: float) -> float:
    """Three digits of what is below one, otherwise three behind the point."""
    return round(value, 3) if abs(value) >= 1 else float(f"{value:.3g}")


def line(values: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def seconds(action: Callable[[], object]) -> float:
    start = perf_counter()
    action()
    return perf_counter() - start


def spread(values: Sequence[float], name: str = "value") -> dict[str, float]:
    """Median, least and largest."""
    return {name: statistics.median(values), "low": min(values), "high": max(values)}


class Clock:
    """Seconds by part. On a GPU it waits until all work is done, before and after; on a CPU it counts what this process used.

    Args:
        wall: on a CPU too, count the time that passes.
    """

    def __init__(self, device: str, wall: bool = False) -> None:
        self.device, self.spent = torch.device(device), {}
        self.read = process_time if self.device.type == "cpu" and not wall else perf_counter

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.read()

    def wrap(self, part: str, call: Callable) -> Callable:
        """The same call, its time added to a part."""

        def timed(*arguments: object, **named: object) -> object:
            start = self.now()
            result = call(*arguments, **named)
            self.spent[part] = self.spent.get(part, 0.0) + self.now() - start
            return result

        return timed

    def seconds(self, action: Callable[[], object]) -> float:
        start = self.now()
        action()
        return self.now() - start

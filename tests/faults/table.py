"""The table of faults: what was tried, survived and lost. `make faults` prints it and writes it into docs/trust.md."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "trust.md"
MARKED = re.compile(r"(?<=<!-- faults -->\n).*?(?=<!-- end -->)", re.DOTALL)


def table_text(about: str, counts: Mapping[str, Sequence[int]], note: str) -> str:
    """The sums in a line, then a line a fault.

    Args:
        about: date and commit.
        counts: how often each fault was tried and survived.
        note: how long it took, and where.
    """
    tried, survived = (sum(row[i] for row in counts.values()) for i in (0, 1))
    lines = [f"| {fault} | {tried} | {survived} | {tried - survived} |" for fault, (tried, survived) in sorted(counts.items())]
    heading = ["| fault | tried | survived | lost |", "|---|---|---|---|"]
    return "\n".join([f"{about}: {tried} tried, {survived} survived, {tried - survived} lost ({note})", "", *heading, *lines])


def with_table(page: str, text: str) -> str:
    """The page with this table between its marks.

    Raises:
        ValueError: it has no marks.
    """
    page, found = MARKED.subn(lambda _: f"\n{text}\n\n", page)
    if found != 1:
        raise ValueError(f"{PAGE.name} needs the marks '<!-- faults -->' and '<!-- end -->' once")
    return page

"""The GPU-days that the page on COCO states for published teachers are those of the benchmark."""

import csv
from pathlib import Path

ROOT = Path(__file__).parents[1]
TITLES = {"deformable_detr": "Deformable DETR", "conditional_detr": "Conditional DETR", "adamixer": "AdaMixer"}


def test_days_are_those_of_the_benchmark() -> None:
    with (ROOT / "benchmarks" / "gpu_days.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    days = {(row["detector"], row["setting"]): f"{row['V100 days, low']} to {row['V100 days, high']}" for row in rows}
    text = (ROOT / "docs" / "coco.md").read_text(encoding="utf-8")
    for detector, title in TITLES.items():
        (stated,) = (line for line in text.partition("### GPU-days")[2].splitlines() if line.startswith(f"| {title} "))
        cells = [cell.strip().removesuffix(" (published)") for cell in stated.split("|")[2:6]]
        assert cells == [days[detector, setting] for setting in ("teacher", "student", "fgd", "detrdistill")]
        assert days[detector, "fgd"] == days[detector, "mgd"] == days[detector, "fitnet"]

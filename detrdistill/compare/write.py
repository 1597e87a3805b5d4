"""A comparison as files: tables, a page in Markdown, pictures."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from detrdistill.analysis.detections import ground_truth, pictures
from detrdistill.compare.compare import Comparison
from detrdistill.figures import detections, style
from detrdistill.figures.confusion import confusion
from detrdistill.figures.tradeoff import tradeoff
from detrdistill.files import make_folder, write_text

SHOWN = 6  # images where detectors differ most
MOST_CLASSES = 40  # of a confusion matrix that is drawn


def write_comparison(found: Comparison, out: Path) -> list[Path]:
    """Write `comparison.csv`, `classes.csv`, `images.csv`, `comparison.md` and pictures into `out`; returns their paths.

    Raises:
        InputError: `out` cannot be written to.
    """
    make_folder(out)
    figures: dict[str, Figure] = {"comparison": tradeoff(found.table, f"{found.data.report.file.name}: {len(found.data)} images")}
    if most := most_different(found):
        figures["differences"] = side_by_side(found, most)
    if len(found.data.categories) <= MOST_CLASSES:
        figures["confusion"] = confusion(found.confusion, [category.name for category in found.data.categories], _how(found))
    paths = []
    for name, table in (("comparison", found.table), ("classes", found.classes), ("images", found.images)):
        paths.append(out / f"{name}.csv")
        write_text(paths[-1], table.to_csv(lineterminator="\n", float_format="%.6g"))
    for name, figure in figures.items():
        paths += style.save(figure, out / name, ("png",))
    paths.append(out / "comparison.md")
    write_text(paths[-1], page(found, list(figures)))
    return paths


def page(found: Comparison, figures: Sequence[str]) -> str:
    """What was found, in Markdown, with the figures that lie beside it."""
    links = {name: f"\n![{name}]({name}.png)\n" if name in figures else "" for name in ("comparison", "differences", "confusion")}
    parts = [f"# {' and '.join(found.names)}\n", markdown(found.table), links["comparison"], "## By class\n", markdown(found.classes)]
    parts += [links["confusion"], f"## Objects beside those of {found.names[0]}\n", markdown(found.repaired)]
    parts += ["## Where they differ most\n", links["differences"], f"{found.notes}\n"]
    return "\n".join(part for part in parts if part)


def markdown(table: pd.DataFrame) -> str:
    """A table with its index as first column; what is not known is a dash."""
    cells = [[str(table.index.name), *map(str, table.columns)], ["---"] * (1 + len(table.columns))]
    cells += [[str(name), *(_cell(value) for value in line)] for name, line in zip(table.index, table.to_numpy(dtype=object), strict=True)]
    return "".join(f"| {' | '.join(one.replace('|', ' ') for one in line)} |\n" for line in cells)


def most_different(found: Comparison, count: int = SHOWN) -> list[int]:
    """Numbers of the images where F1 differs most; none where it is the same on all."""
    frame = found.images[found.images["difference"] > 0]
    return frame.index[:count].tolist()


def side_by_side(found: Comparison, images: Sequence[int], names: Sequence[str] = ()) -> Figure:
    """Some images, a row each: the objects, then what every detector finds, or those that are named."""
    room = style.width() / style.scale() / (len(names or found.names) + 1) - 0.1
    columns = {"ground truth": ground_truth(found.data, images)}
    for side in found.sides:
        if not names or side.name in names:
            columns[style.cut(side.name, room, 9)] = [side.found[index] for index in images]
    return detections.compare(pictures(found.data, images), columns, _how(found), least_score=max(found.threshold, 1e-9))


def _how(found: Comparison) -> str:
    return f"Score of at least {found.threshold:g}, IoU of at least 0.5; {found.data.report.file.name}."


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "-"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1 else f"{value:.1f}" if isinstance(value, float) else str(value)

"""Fills the marked blocks of README.md, docs/ and the reading of preset mini from committed files: `make prose`. Draws docs/growth.png.

A block is what stands between `<!-- NAME ARGUMENTS -->` and `<!-- end -->`. Nobody writes a number there by hand; a test compares.
The faults in docs/trust.md are not from here: `make faults` writes them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from detrdistill.errors import InputError
from detrdistill.files import atomic, write_text
from detrdistill.recipes.presets import get_preset
from detrdistill.recipes.recipe import Recipe
from detrdistill.recipes.words import ADAMIXER, DEFORMABLE, DETECTORS, NAMES, NOT_RUN, TITLES
from detrdistill.runs.store import Store
from workflow.any_detr import families, families_measured, methods_of_families, parity
from workflow.findings import REFERENCE, as_table, found, read, rows
from workflow.growth import curves, growth, same_picture
from workflow.ratios import BENCHMARKS, cost, ratios

ROOT = Path(__file__).resolve().parents[1]
OF_QUERIES = {"logits": "queries", "assignment": "queries", "kd_detr": "queries", "d3etr": "queries, attention", "detrdistill": "both"}
D3ETR_SEEDS = 0, 1, 2
D3ETR_PARTS: Mapping[str, Mapping[str, float]] = {
    "whole": {},
    "no attention": {"self_attention": 0.0, "cross_attention": 0.0},
    "matched queries alone": {"fixed": 0.0},
    "teacher's queries alone": {"adaptive": 0.0},
}
FIRST, THREE = (0,), (0, 1, 2)
THIRD = {"logits": 1.0, "features": 0.1, "assignment": 1.0}  # of the tuned weights
ON_PHOTOGRAPHS: Sequence[tuple[str, int, str, Mapping[str, float], Sequence[int]]] = (  # detector, steps, setting, switches, seeds
    (DEFORMABLE, 600, "student", {}, THREE),
    (DEFORMABLE, 600, "detrdistill", {}, THREE),
    (DEFORMABLE, 600, "detrdistill", {"features": 0.0}, FIRST),
    (DEFORMABLE, 600, "detrdistill", THIRD, FIRST),
    (DEFORMABLE, 1000, "student", {}, FIRST),
    (DEFORMABLE, 1000, "detrdistill", {}, FIRST),
    (DEFORMABLE, 1000, "detrdistill", THIRD, FIRST),
    (ADAMIXER, 600, "student", {}, THREE),
    (ADAMIXER, 600, "detrdistill", {}, THREE),
    (ADAMIXER, 600, "detrdistill", {"features": 0.0}, FIRST),
)
CURVES = ROOT / "docs" / "growth.png"
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), REFERENCE / "mini" / "README.md"]
BLOCK = re.compile(r"<!-- (\w+)((?: [\w-]+)*) -->\n(.*?)<!-- end -->", re.DOTALL)


def measured(method: str) -> str:
    """A method's rows in the first table of preset mini that has any."""
    for table in ("main_results", "prior_methods", "follow_ups"):
        own = [row for row in rows("mini", table) if row["Setting"] in (TITLES[method], f"{TITLES[method]}, whole schedule")]
        if own:
            break
    columns = ("Detector", "AP", "Gain", "Status", "Seeds", "Published gain")
    link = f"../../results/reference/mini/tables/{table}.md"
    text = "Preset `mini`: digits of 96 pixels, not COCO. The gain is over the plain student; "
    text += f"[how to read it](../results.md), [whole table]({link}).\n\n"
    heading = [*columns[:-1], "Gain in the paper (COCO)"]
    return text + as_table(heading, [[row[column] for column in columns] for row in own])


def parts_of_d3etr() -> str:
    """What each part of D3ETR gives AdaMixer's student, from records of preset mini that no table holds."""
    preset = get_preset("mini", ADAMIXER)
    table = []
    for part, changes in D3ETR_PARTS.items():
        switches = " ".join(f"`--set d3etr.{name}={value:g}`" for name, value in changes.items()) or "-"
        found = reached("mini", [preset.taught(seed, preset.tuned_method("d3etr", changes)) for seed in D3ETR_SEEDS])
        table.append([part, switches, *found])
    return as_table(["Part", "Switches", f"AP, seeds {', '.join(map(str, D3ETR_SEEDS))}", "Mean"], table)


def apart_on_photographs() -> str:
    """What other weights and more steps give students on photographs, from records of preset bccd, most in no table."""
    table = []
    for detector, steps, setting, changes, seeds in ON_PHOTOGRAPHS:
        recipes = [get_preset("bccd", detector).recipe(setting, seed).replace(**{"schedule.steps": steps}) for seed in seeds]
        recipes = [one.replace(methods=tuple(method.replace(**changes) for method in one.methods)) for one in recipes]
        switches = " ".join(f"`--set {setting}.{name}={value:g}`" for name, value in changes.items()) or "-"
        cells = [f"{steps:,}", TITLES[setting], switches, ", ".join(map(str, seeds)), *reached("bccd", recipes)]
        table.append([DETECTORS[detector], *cells])
    return as_table(["Detector", "Steps", "Setting", "Switches", "Seeds", "AP", "Mean"], table)


def reached(preset: str, recipes: Sequence[Recipe]) -> list[str]:
    """AP of runs that are in no table, and their mean.

    Raises:
        InputError: one is not among the committed results.
    """
    store = Store(REFERENCE / preset)
    found = [store.record(recipe) for recipe in recipes]
    if lost := [recipe.title for recipe, record in zip(recipes, found, strict=True) if record is None]:
        raise InputError(f"run {lost[0]}: not in {store.root}; bring it with detrdistill.runs.reference")
    values = [record.metrics["AP"] for record in found if record]
    return [", ".join(f"{ap:.1f}" for ap in values), f"{sum(values) / len(values):.1f}"]


def results(preset: str, table: str) -> str:
    """All rows of a table in few columns."""
    columns = ("Detector", "Setting", "AP", "Gain", "Status", "Seeds")
    return as_table(columns, [[row[column] for column in columns] for row in rows(preset, table)])


def gpu_days() -> str:
    """Days and memory of preset coco."""
    lines = read(BENCHMARKS / "gpu_days.csv")
    table = []
    for detector, title in DETECTORS.items():
        own = {line["setting"]: line for line in lines if line["detector"] == detector}
        low, high = ({row: float(line[f"V100 days, {end}"]) for row, line in own.items()} for end in ("low", "high"))
        days = [from_to(low[row], high[row]) for row in ("teacher", "student", "detrdistill")]
        teacher = own["teacher"]
        kept = from_to(float(teacher["GiB kept of 800 x 1333"]), float(teacher["GiB kept of 1333 x 1333"]))
        epochs = f"{title}, {float(teacher['epochs']):.0f} epochs"
        table.append([epochs, *days, from_to(sum(low.values()), sum(high.values())), teacher["images a GPU"], f"{kept} GiB"])
    heading = [
        "Days of one V100",
        "Teacher, R101",
        "Student, R50",
        "DETRDistill",
        "All six rows of Table 3",
        "Images a GPU",
        "Teacher keeps",
    ]
    return as_table(heading, table)


def from_to(low: float, high: float) -> str:
    first, last = (int(value + 0.5) for value in (low, high))
    return f"{first}" if first == last else f"{first} to {last}"


def times(ratio: str) -> str:
    return f"{float(ratio):.2f} x"


def teacher_outputs() -> str:
    """What kept outputs of the teacher save."""
    lines = {(line["detector"], line["method"], line["step"]): line for line in read(BENCHMARKS / "teacher_outputs.csv")}
    words = {"computed": "computed in every step", "disk": "kept, from disk", "memory": "kept, from memory"}
    table = []
    for step, said in words.items():
        cells = [
            ", ".join(times(lines[detector, row, step]["of student and decoding"]) for row in ("detrdistill", "fgd"))
            for detector in DETECTORS
        ]
        table.append([said, *cells, "-" if step == "computed" else "1.15"])
    return as_table(["Teacher's outputs", *(f"{title}: DETRDistill, FGD" for title in DETECTORS.values()), "Aim"], table)


def pulls() -> str:
    """How hard each loss pulls at AdaMixer's backbone, the weakest first, and what its student reached in the tuning."""
    trials = [line for line in read(REFERENCE / "mini" / "tables" / "weights.csv") if line["detector"] == NAMES[ADAMIXER]]
    reached = {(line["row"], float(line["multiplier"])): line["AP_100"] for line in trials if line["run"] != NOT_RUN}
    table = [["none (plain student)", *"-----", f"{float(trials[0]['AP_plain']):.1f}"]]
    for line in sorted(read(BENCHMARKS / "pulls.csv"), key=lambda line: float(line["of the gradient"])):
        row, multiplier = line["row"], float(line["multiplier"])
        if (row, multiplier) not in reached:
            raise InputError(f"pulls.csv: row '{row}' x {multiplier:g} is no trial of weights.csv; measure again with benchmarks.pulls")
        ratio, low, high = (two_digits(float(line[name])) for name in ("of the gradient", "low", "high"))
        cells = [f"{two_digits(100 * float(line['of the loss']))} %", f"{ratio} ({low} to {high})", f"{float(line['cosine']):.2f}"]
        title, ap = TITLES.get(row, row.capitalize()), f"{float(reached[row, multiplier]):.1f}"
        table.append([title, f"{multiplier:g}", OF_QUERIES.get(row, "maps"), *cells, ap])
    pull = "Pull at the backbone (detection loss: 1)"
    return as_table(["Loss", "Multiplier", "Compares", "Part of the loss", pull, "Cosine of the two", "AP in the tuning"], table)


def two_digits(value: float) -> str:
    """Two significant digits, and all before the point."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def exported() -> str:
    """Time and size of exported detectors."""
    if not (path := BENCHMARKS / "export.csv").is_file():
        return "Not measured yet: `python -m benchmarks.export`."
    table = []
    for line in read(path):
        times = [[f"{float(line[f'{one} {part}']):.0f}" for part in ("ms", "low", "high")] for one in ("eager", "onnxruntime")]
        cells = [f"{middle} ms ({low} to {high})" for middle, low, high in times]
        table.append([DETECTORS[line["detector"]], *cells, f"{float(line['MB']):.0f} MB"])
    return as_table(["Detector", "torch", "onnxruntime", "File"], table)


def commits() -> str:
    """Where, and by which commit, each table of benchmarks/ was measured."""
    table = []
    for path in sorted(BENCHMARKS.glob("*.csv")):
        about = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        table.append([f"[`{path.name}`](../benchmarks/{path.name})", re.sub(r"\b([0-9a-f]{8})[0-9a-f]{32}\b", r"\1", about)])
    return as_table(["Table", "Measured by"], table)


BLOCKS: Mapping[str, Callable[..., str]] = {
    one.__name__: one for one in (
        found, cost, measured, parts_of_d3etr, apart_on_photographs, results, gpu_days, ratios, teacher_outputs, exported, growth, commits,
        pulls, families, families_measured, methods_of_families, parity,
    )
}  # fmt: skip


def filled(text: str) -> str:
    """A page with its blocks as the csv files have them now; other marks (those of `make faults`) stay."""

    def fill(block: re.Match[str]) -> str:
        word, arguments = block[1], block[2].split()
        return f"<!-- {word}{block[2]} -->\n\n{BLOCKS[word](*arguments)}\n\n<!-- end -->" if word in BLOCKS else block[0]

    return BLOCK.sub(fill, text)


def main() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if filled(text) != text:
            write_text(page, filled(text))
            print(page.relative_to(ROOT))
    drawn = curves()
    if not same_picture(CURVES.read_bytes(), drawn):
        with atomic(CURVES) as temporary:
            temporary.write_bytes(drawn)
        print(CURVES.relative_to(ROOT))


if __name__ == "__main__":
    main()

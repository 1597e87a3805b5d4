"""Times and memory beside what the kit aims at, from benchmarks/*.csv: blocks of docs/speed.md and one of README.md."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from detrdistill.errors import InputError
from detrdistill.recipes.words import DETECTORS, TITLES
from workflow.findings import Line, as_table, listed, read

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
Row = tuple[str, str, str, str]  # what, what was measured, the aim, whether it is met
NO_AIM = ("-", "-")


def ratios(part: str) -> str:
    """A table of one part: "others", "floors", "matching" or "start"."""
    return as_table(["What", "Measured", "Aim", "Met"], PARTS[part]())


def cost() -> str:
    """What `make reproduce` takes, and its two runs."""
    results = measured()
    whole = line_of(results, "make reproduce")
    plain, distilled = (float(line_of(results, f"quick {row}: training")["value"]) for row in ("student", "detrdistill"))
    return (
        f"`make reproduce` took {float(whole['value']) / 60:.1f} minutes on {whole['what'].split(', ')[-1]} ([measured](docs/speed.md)): "
        f"{plain:.0f} s to train the plain student, beside it {distilled:.0f} s for the distilled one, the rest for set-up, figures and "
        "notebooks. The first time, downloads come on top."
    )


def others() -> Iterator[Row]:
    """The kit against what does the same elsewhere, and against itself as it was."""
    steps = {(line["detector"], line["size"].split(",")[0]): line for line in read(BENCHMARKS / "detectors.csv") if line["pass"] == "step"}
    for detector in ("deformable_detr", "conditional_detr"):
        for size, words in (("R50", "R50, 300 queries, 512 px"), ("R18", "R18, 20 queries, 96 px")):
            line = steps[detector, size]
            what = f"training step / transformers', {DETECTORS[detector]} ({words})"
            yield what, with_spread(line, "of transformers"), *at_most(0.9, float(line["of transformers"]))
            ours, theirs = (float(line[column]) for column in ("peak MiB", "transformers' peak MiB"))
            yield "its peak memory / transformers'", f"{ours / theirs:.2f} x ({ours:.0f} and {theirs:.0f} MiB)", *at_most(1, ours / theirs)
    results = measured()
    line = line_of(results, "pycocotools / our COCO evaluation")
    yield line["what"], with_spread(line, "value"), *at_least(10, float(line["value"]))
    line = line_of(results, "pycocotools / faster-coco-eval's own part of it")
    yield line["what"], with_spread(line, "value"), *NO_AIM
    line = line_of(results, "largest difference of the twelve numbers")
    apart = float(line["value"])
    yield "their largest difference in the twelve numbers, in percent", f"{apart:.1g}", "≤ 1e-9", said(apart <= 1e-9)
    for line in read(BENCHMARKS / "loader.csv"):
        what = f"torchvision's loader (detection reference, backend `{line['backend']}`) / ours, an image of 800 px, augmented as in DETR"
        yield what, with_spread(line), *at_least(1.5, float(line["ratio"]))
    for line in read(BENCHMARKS / "since.csv"):
        what = f"training step of preset `mini` / the same at the end of the first round (commit de1601d), {DETECTORS[line['detector']]}"
        yield f"{what}, {TITLES[line['setting']]}", with_spread(line), *at_most(0.8, float(line["ratio"]))


def floors() -> Iterator[Row]:
    """DETRDistill's step against what it cannot do without."""
    distilled = {(line["detector"], line["method"], line["against"]): line for line in read(BENCHMARKS / "distillation.csv")}
    alone, with_groups = "student step + teacher forward", "student step with as many groups + teacher forward"
    for name, against, limit in (("fair floor", with_groups, 1.05), ("plain floor", alone, 1.15)):
        for detector, title in DETECTORS.items():
            line = distilled[detector, "detrdistill", against]
            own = [f"{part} {100 * float(line[part]) / float(line['step']):.1f} %" for part in ("matching", "losses")]
            more = f"; of the step {listed(own)}" if against == with_groups else ""
            yield f"step / {name}, {title} (R101 to R50, 512 px)", with_spread(line) + more, *at_most(limit, float(line["ratio"]))
    line = line_of(measured(), f"distillation step / ({alone})")
    yield "step / plain floor, Deformable DETR of preset `quick`", with_spread(line, "value"), *at_most(1.15, float(line["value"]))
    released = distilled["deformable_detr", "detrdistill_released", "released design: two passes, matching one by one"]
    what = "step of variant `released` / the same losses in the way of the authors' code (two passes, matching one by one), Deformable DETR"
    yield what, with_spread(released), *NO_AIM


def matching() -> Iterator[Row]:
    """Matching of all stages and images at once."""
    line = line_of(measured(), "matching / textbook matcher")
    yield f"queries with objects: {line['what']}", with_spread(line, "value"), *at_most(0.33, float(line["value"]))
    for line in read(BENCHMARKS / "distillation.csv"):
        if "300 x 300" in line["method"] and line["against"].startswith("one by one"):
            way = "the authors' costs" if "expanded" in line["against"] else "our costs"
            threads = line["method"].split(": ")[-1]
            what = f"300 x 300 queries, {line['detector']} / one by one with {way}, threads: {threads}"
            yield what, f"{with_spread(line)}; ours {float(line['matching']):.2f} s", *at_most(0.33, float(line["ratio"]))


def start() -> Iterator[Row]:
    """What a user waits for, and the memory that it takes."""
    results = measured()
    for what, words, limit in (
        ("import detrdistill", "`import detrdistill`", 2),
        ("detrdistill --help", "`detrdistill --help`", 0.5),
        ("first cell of a notebook", "a notebook's first cell, without the kernel's own start", 2),
    ):
        line = line_of(results, what)
        yield words, with_spread(line, "value", "s"), *at_most(limit, float(line["value"]), "s")
    line = line_of(results, "make reproduce")
    minutes = float(line["value"]) / 60
    yield line["what"].replace("make reproduce", "`make reproduce`"), f"{minutes:.1f} min (once)", *at_most(6, minutes, "min")
    yield "report from records", with_spread(line_of(results, "report of preset quick"), "value", "s"), *NO_AIM
    memory = max(float(line["value"]) for what, line in results.items() if what.startswith("quick") and what.endswith("peak memory"))
    yield "peak memory of preset `quick`", f"{memory:.2f} GiB", *at_most(4, memory, "GiB")


PARTS = {"others": others, "floors": floors, "matching": matching, "start": start}


def measured() -> dict[str, Line]:
    return {line["what"]: line for line in read(BENCHMARKS / "results.csv")}


def line_of(results: Mapping[str, Line], what: str) -> Line:
    """The line whose name begins so.

    Raises:
        InputError: there is none, or several: the benchmark was stopped, or is another version's.
    """
    lines = [line for name, line in results.items() if name.startswith(what)]
    if len(lines) != 1:
        raise InputError(
            f"benchmarks/results.csv has {len(lines)} lines '{what}...', not one; write it anew: python -m benchmarks.benchmarks"
        )
    return lines[0]


def at_most(limit: float, value: float, unit: str = "x") -> tuple[str, str]:
    return f"≤ {limit:g} {unit}", said(value <= limit)


def at_least(limit: float, value: float) -> tuple[str, str]:
    return f"≥ {limit:g} x", said(value >= limit)


def said(met: bool) -> str:
    return "yes" if met else "**no**"


def with_spread(line: Line, column: str = "ratio", unit: str = "x") -> str:
    """A median, and the least and the largest of what was measured."""
    return f"{float(line[column]):.2f} {unit} ({float(line['low']):.2f} to {float(line['high']):.2f})"

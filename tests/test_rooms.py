"""The house stays one that a stranger finds their way in: imports run one way, and no room or file grows out of hand."""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "detrdistill"
# What stands in a line may import what stands in the same line (one room) or above it.
ORDER = (
    "errors files process",
    "recipes",
    "statistics published records",
    "boxes matching",
    "models",
    "criterion",
    "distill",
    "any_detr",
    "data",
    "checkpoints",
    "training",
    "runs",
    "export",
    "figures",
    "analysis",
    "report",
    "predict",
    "compare",
    "parameters session session_table notebooks",
    "commands",
    "cli",
    "__main__ __init__",
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms.split()}
CORE = ("models", "distill", "matching.py", "criterion.py", "training/trainer.py")  # what a newcomer reads to understand the paper
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file names in any import of the package, also within functions and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            assert not getattr(node, "level", 0), f"{path.name}: a relative import hides where it leads; name the module"
            package, *inside = name.split(".")
            if package == "detrdistill":
                found |= {inside[0]} if inside else {one.name for one in getattr(node, "names", ())} & RANK.keys()
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_one_way(path: Path) -> None:
    own = room(path)
    upward = [other for other in sorted(imported_rooms(path)) if RANK[other] > RANK[own]]
    assert not upward, f"{path.relative_to(PACKAGE)} imports {', '.join(upward)}, which stand above {own}: see ORDER"


def test_figures_see_words_files_and_pure_functions_alone() -> None:
    """So that a figure can be drawn from arrays, wherever these come from."""
    allowed = {"figures", "errors", "files", "recipes", "statistics", "published", "distill"}
    for path in PACKAGE.glob("figures/*.py"):
        assert imported_rooms(path) <= allowed, path.name
    assert "torch" not in (PACKAGE / "distill" / "stages.py").read_text(encoding="utf-8"), "the one file of distill that figures see"


def test_a_room_has_no_circle_of_files() -> None:
    """Within a room too: files can be read in an order in which each only needs those before."""
    needs = {
        path.relative_to(PACKAGE).as_posix(): {
            node.module.replace(".", "/").removeprefix("detrdistill/") + end
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.ImportFrom) and node.module.startswith("detrdistill.")
            for end in (".py", "/__init__.py")
        }
        for path in FILES
    }
    while ready := {name for name, others in needs.items() if not others & needs.keys() - {name}}:
        needs = {name: others for name, others in needs.items() if name not in ready}
    assert not needs, f"these import each other in a circle: {', '.join(needs)}"


def test_sizes() -> None:
    """The core is to be read in an afternoon, and no room is the house."""
    total, rooms = sum(map(lines, FILES)), Counter()
    for path in FILES:
        rooms[room(path)] += lines(path)
        assert lines(path) <= 320, f"{path.relative_to(PACKAGE)}: {lines(path)} lines; find its seam and split it (at most 320)"
    largest, size = rooms.most_common(1)[0]
    assert size <= total / 4, f"{largest} holds {size} of {total} lines; more than a quarter"
    core = [path for path in FILES if path.relative_to(PACKAGE).as_posix().startswith(CORE)]
    assert sum(map(lines, core)) <= 4000, "models, distill, matching, criterion and trainer together: at most 4,000 lines"
    assert total <= 21_000, f"the package has {total} lines; at most 21,000"


def test_every_room_is_in_the_order() -> None:
    assert {room(path) for path in FILES} == RANK.keys()


def test_no_lambda_is_given_a_name() -> None:
    for path in FILES:
        assert "E731" not in path.read_text(encoding="utf-8"), f"{path.relative_to(PACKAGE)}: a named lambda; write a function"


def test_no_name_is_undefined() -> None:
    """Ruff's rule for it is off, since it takes the letters of jaxtyping's shapes ("B Q 4") for names: those are left out here."""
    words = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "json", "--no-cache"]
    folders = ("detrdistill", "tests", "benchmarks")
    listed = subprocess.run([*words, *folders], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    undefined = []
    for one in json.loads(listed.stdout):
        name = one["message"].split("`")[1]
        line = Path(one["filename"]).read_text(encoding="utf-8").splitlines()[one["location"]["row"] - 1]
        if not re.search(rf'"[^"]*\b{re.escape(name)}\b[^"]*"', line):
            undefined.append(f"{one['filename']}:{one['location']['row']}: {name}")
    assert not undefined

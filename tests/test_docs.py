"""README and docs say what code and committed tables say, and stay short."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from detrdistill.errors import InputError
from detrdistill.recipes.families import FAMILIES
from detrdistill.recipes.methods import METHODS
from detrdistill.recipes.presets import Preset, detectors_of, get_presets
from detrdistill.recipes.words import NOT_RUN
from tests.faults.conftest import is_whole
from tests.faults.table import PAGE as TRUST
from tests.faults.table import table_text, with_table
from tests.test_rooms import ORDER
from workflow import findings, growth, prose

ROOT = Path(__file__).parents[1]
DOCS = sorted(ROOT.glob("docs/**/*.md"))
MINI = ROOT / "results" / "reference" / "mini"


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_pages_that_newcomers_read_are_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 150
    assert len(re.sub(r"\]\([^)]*\)", "", (MINI / "README.md").read_text(encoding="utf-8")).split()) <= 800


@pytest.mark.parametrize("page", prose.PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_marked_blocks_are_what_the_tables_give_now(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert prose.filled(text) == text, "run make prose"
    assert {block[0] for block in prose.BLOCK.findall(text)} <= prose.BLOCKS.keys() | {"faults"}
    assert text.count("<!-- end -->") == len(prose.BLOCK.findall(text)) == text.count("<!--") / 2


def test_the_curves_are_what_their_table_gives_now() -> None:
    committed, drawn = prose.CURVES.read_bytes(), prose.curves()
    assert growth.same_picture(committed, drawn), "run make prose"
    assert len(committed) < 120_000


def test_growth_that_nobody_explains_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(growth.WHY, ("queries", "matching"))
    with pytest.raises(InputError, match=r"matching of \w+ grows with queries to the power of \d\.\d; say why"):
        growth.growth()


def test_runs_that_no_table_holds_and_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prose, "D3ETR_SEEDS", (0, 9))
    with pytest.raises(InputError, match=r"run adamixer-\S+-d3etr-seed9: not in .*mini; bring it"):
        prose.parts_of_d3etr()


def test_every_block_is_used() -> None:
    used = {block[0] for page in prose.PAGES for block in prose.BLOCK.findall(page.read_text(encoding="utf-8"))}
    assert used == prose.BLOCKS.keys() | {"faults"}


def line(
    word: str, difference: str = "+1.0", ahead: str = "DETRDistill", than: str = "FGD", seeds: int = 0, **changes: str
) -> dict[str, str]:
    """A comparison as claims.csv has it."""
    status = f"{word} (about {seeds} seeds)" if seeds else word
    found = {"claim": "C", "detector": "AdaMixer", "ahead": ahead, "than": than, "part": f"over {than}", "status": status}
    return found | {"difference": difference, "adjusted_half": "2.0", "equivalence_half": "1.5", "seeds_to_decide": str(seeds)} | changes


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([line("holds", "6.1", than="Student")], "On AdaMixer, DETRDistill is 6.1 AP above the plain student (*holds*, [+4.1, +8.1])."),
        ([line("against", "-3.4", than="Teacher")], "On AdaMixer, DETRDistill is 3.4 AP below its teacher (*against*, [-5.4, -1.4])."),
        ([line("against (small)", "-1.1")], "On AdaMixer, DETRDistill is 1.1 AP below FGD (*against (small)*, [-3.1, +0.9])."),
        (
            [line("undecided", "0.7", seeds=8)],
            "On AdaMixer, *undecided* whether DETRDistill is above FGD (+0.7 [-1.3, +2.7], about 8 seeds).",
        ),
        (
            [line("holds", "6.0"), line("holds", "2.5", than="FGFI, whole schedule"), line("undecided", "0.7", than="MGD", seeds=8)],
            "2 of 3 comparisons hold, 1 undecided. On AdaMixer, DETRDistill is above FGD (+6.0) and FGFI (+2.5): *holds*; "
            "*undecided* whether DETRDistill is above MGD (+0.7 [-1.3, +2.7], about 8 seeds).",
        ),
        (
            [line("undecided", "3.0", "Logits", "Student", 8), line("against", "-3.2", "Features", "Student")],
            "0 of 2 comparisons hold, 1 against, 1 undecided. "
            "On AdaMixer, its feature loss is 3.2 AP below the plain student (*against*, [-5.2, -1.2]); "
            "*undecided* whether its logits loss is above the plain student (+3.0 [+1.0, +5.0], about 8 seeds).",
        ),
        (
            [line("no gain above the margin", "-1.7")],
            "On AdaMixer, *no gain above the margin* of DETRDistill over FGD (-1.7 [-3.2, -0.2], 90 %).",
        ),
        ([line("one seed", "1.0", adjusted_half="no interval")], "On AdaMixer, *one seed* of DETRDistill over FGD (+1.0)."),
        ([line(NOT_RUN)], "Not run on AdaMixer."),
        (
            [line("holds", "6.0"), line(NOT_RUN, than="MGD"), line(NOT_RUN, detector="Conditional DETR")],
            "1 of 3 comparisons hold, 2 not run. On AdaMixer, DETRDistill is 6.0 AP above FGD (*holds*, [+4.0, +8.0]). "
            "Not run on AdaMixer (over MGD) and Conditional DETR.",
        ),
    ],
)  # fmt: skip
def test_findings_are_sentences(lines: list[dict[str, str]], said: str) -> None:
    """A harm is called one, and what is undecided says how many seeds would decide it."""
    assert " ".join(findings.answers(lines, ["C"])) == said


def test_a_word_that_is_no_verdict_is_refused() -> None:
    with pytest.raises(InputError, match=r"verdict 'perhaps' of claims\.csv is unknown; known: holds, "):
        findings.answers([line("holds"), line("perhaps")], ["C"])


def test_findings_say_whose_weights_were_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    def presets(*tuned: str) -> list[Preset]:
        of_all = get_presets("mini", detectors_of("mini"))
        return [replace(one, tuned={"fgd": 3e-4} if one.student.detector in tuned else {}) for one in of_all]

    monkeypatch.setattr(findings, "get_presets", lambda *_: presets("adamixer"))
    assert re.fullmatch(
        "On AdaMixer, those of every row .* Not yet on Deformable DETR, Conditional DETR, RT-DETR v2 and D-FINE: .* published .* "
        "On RT-DETR v2 and D-FINE DETRDistill is without its feature loss.",
        findings.weights(),
    )
    monkeypatch.setattr(findings, "get_presets", lambda *_: presets(*detectors_of("mini")))
    assert "Not yet" not in findings.weights()


def test_a_finding_without_its_claim_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "QUESTIONS", [("Does it fly?", "mini", ["It flies"])])
    with pytest.raises(InputError, match=r"claims\.csv of preset mini has no claim 'It flies'"):
        findings.found()


def misplaced(text: str) -> list[str]:
    """Decimals of a text that do not stand in the row that their link names: [4.6](tables/main_results.md "AdaMixer: FGD")."""
    linked = re.compile(r'\[(\d+\.\d+)\]\(tables/(\w+)\.md "([^:"]+): ([^"]+)"\)')
    wrong = re.findall(r"\d+\.\d+", re.sub(r"\]\([^)]*\)", "", linked.sub("", text)))
    for number, table, detector, row in linked.findall(text):
        lines = (MINI / "tables" / f"{table}.md").read_text(encoding="utf-8").splitlines()
        head, *rows = [[cell.strip() for cell in one.strip("|").split("|")] for one in lines if one.startswith("|")]
        ours = [name in ("AP", "AP before tuning", "Gain", "Multiplier", "Plain student") or name.startswith("x ") for name in head]
        cells = [cell for one in rows if one[:2] == [detector, row] for cell, own in zip(one, ours, strict=True) if own]
        if number not in [cell.split(" ")[0].lstrip("+") for cell in cells]:
            wrong.append(f"{number} ({table}, {detector}: {row})")
    return wrong


def test_numbers_of_the_reading_of_mini_stand_in_its_tables() -> None:
    text = (MINI / "README.md").read_text(encoding="utf-8")
    assert misplaced(text) == []
    known, number, table, row = re.search(r'\[([\d.]+)\]\(tables/(\w+)\.md "AdaMixer: ([^"]+)"\)', text).group(0, 1, 2, 3)
    moved = [known.replace(number, "99.9"), known.replace(row, "Teacher"), known.replace(table, "discrepancies"), number]
    assert misplaced(known) == [] and all(misplaced(one) for one in moved), "of another row, in another table, or without a place"


def test_the_example_of_adding_a_method_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", text_of("docs/adding_a_method.md"), re.DOTALL)
    found: dict = {}
    exec(example, found)
    assert {"detection/class", "probabilities/class"} <= found["parts"].keys()
    assert found["parts"]["probabilities/class"].sum().isfinite() and found["parts"]["probabilities/class"].requires_grad


def test_the_example_of_adding_a_detector_runs() -> None:
    """A family that the kit does not have, in under 40 lines: as its own forward pass, and under all three losses."""
    (example,) = re.findall(r"```python\n(.*?)```", text_of("docs/adding_a_detector.md"), re.DOTALL)
    assert len(example.splitlines()) < 40
    found: dict = {}
    exec(example, found)
    assert found["TABLES"] not in FAMILIES.values() and found["difference"] <= 1e-5
    assert {part.split("/")[0] for part in found["parts"]} == {"detection", "logits", "features", "assignment"}
    student, teacher = (dict(found[name].named_parameters()) for name in ("student", "teacher"))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.values() if p.requires_grad)
    assert all(p.grad is None for p in teacher.values())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_page_with_formula_source_and_switches(name: str) -> None:
    page, fields = text_of(f"docs/methods/{name}.md"), METHODS[name].model_fields
    assert "$$" in page and f"({name}.md)" in text_of("docs/methods/README.md")
    assert re.search(r"https://github\.com/[\w./-]+/blob/[0-9a-f]{40}/\S+#L\d+-L\d+", page), "link the lines of the public code"
    (switches,) = re.findall(r"^## Switches\n(.*?)(?=^## )", page, re.MULTILINE | re.DOTALL)
    for field, about in fields.items():
        if field in ("name", "variant"):
            continue
        (row,) = [row for row in switches.splitlines() if row.startswith("|") and f"`{field}`" in row.split("|")[1]]
        for value in about.default if isinstance(about.default, tuple) else [about.default]:
            assert default_in(value, row), f"{field} is {value} by default: {row}"


def default_in(value: object, row: str) -> bool:
    if value is None:
        return "as many as" in row
    if isinstance(value, bool):
        return row.rstrip(" |").endswith(str(value).lower())
    if isinstance(value, str):
        return f"`{value}`" in row
    return value in [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", row)]


def test_the_committed_faults_are_what_make_faults_writes() -> None:
    page = TRUST.read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- faults -->\n\n(.*?)\n\n<!-- end -->", page, re.DOTALL)
    rows = re.findall(r"^\| (.+) \| (\d+) \| (\d+) \| \d+ \|$", block, re.MULTILINE)
    about, note = re.match(r"(\d{4}-\d\d-\d\d, commit \w+, seed \d+): .* \((.*)\)\n", block).groups()
    text = table_text(about, {fault: (int(tried), int(survived)) for fault, tried, survived in rows}, note)
    assert text == block and with_table(page, text) == page


def test_lost_faults_are_counted_and_replace_the_old_table() -> None:
    text = table_text("today, commit abc", {"kill": (3, 2), "NaN": (1, 1)}, "1 s")
    assert text.startswith("today, commit abc: 4 tried, 3 survived, 1 lost (1 s)") and text.endswith("| kill | 3 | 2 | 1 |")
    page = with_table("a\n<!-- faults -->\nold\n<!-- end -->\nb\n<!-- end -->\n", text)
    assert page == f"a\n<!-- faults -->\n\n{text}\n\n<!-- end -->\nb\n<!-- end -->\n"
    with pytest.raises(ValueError, match="needs the marks"):
        with_table("nothing", text)


@pytest.mark.parametrize(
    ("args", "options", "whole"),
    [
        (["tests/faults", "tests/export"], {}, True),
        (["tests/faults"], {}, False),
        (["tests/faults/test_data.py"], {}, False),
        (["tests/faults", "tests/data"], {}, False),
        (["tests/faults", "tests/export"], {"keyword": "kill"}, False),
        (["tests/faults", "tests/export"], {"maxfail": 1}, False),
    ],
)
def test_a_part_of_the_faults_does_not_stand_for_the_whole(args: list[str], options: dict, whole: bool) -> None:
    config = SimpleNamespace(args=args, invocation_params=SimpleNamespace(dir=ROOT), option=SimpleNamespace(**options))
    assert is_whole(config) is whole


def test_rooms_of_the_design_are_those_of_the_house() -> None:
    rows = re.findall(r"^\| (\[?`.+?) \| .+ \|$", text_of("docs/design.md"), re.MULTILINE)
    rooms = [" ".join(re.findall(r"`(\w+)`", row)) for row in rows]
    start = rooms.index(ORDER[0])
    assert tuple(rooms[start : start + len(ORDER) - 1]) == ORDER[:-1], "without __main__ and __init__"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        links = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text(encoding="utf-8"))
        found = {(page.parent / link).resolve() for link in links if "://" not in link}
        waiting += [path for path in found if path in DOCS and path not in reached]
    assert not [page.relative_to(ROOT).as_posix() for page in DOCS if page not in reached]


def test_half_is_rounded_up_and_one_number_is_said_once() -> None:
    assert [prose.from_to(low, high) for low, high in ((14.5, 22.1), (1.7, 2.1))] == ["15 to 22", "2"]

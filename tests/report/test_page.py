"""The page of a preset: what was found first, whole HTML, everything escaped, links to what exists and to nothing else, equal bytes."""

import re
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from detrdistill.errors import InputError
from detrdistill.recipes.presets import get_presets
from detrdistill.recipes.tables import QUESTIONS, TABLES, WEIGHTS, all_compared, make_table
from detrdistill.recipes.words import NOT_RUN
from detrdistill.report.board import Verdict, harms_of, headline, verdicts
from detrdistill.report.claims import weigh
from detrdistill.report.comparisons import Comparisons
from detrdistill.report.page import STATUSES, Section, count_statuses, write_page
from detrdistill.report.write import write_report
from detrdistill.runs.store import Store
from detrdistill.statistics import AGAINST, HOLDS, NO_EFFECT, NO_GAIN, ONE_SEED, SMALL, UNDECIDED, VERDICTS
from tests.report.test_claims import put

NASTY = "<script>alert('x')</script> & \"quoted\" <b>"
VOID = {"meta", "img", "br", "hr", "link", "input", "mspace"}
CSS = Path(__file__).parents[2] / "detrdistill" / "report" / "page.css"


class Reader(HTMLParser):
    """Checks that tags are balanced, and keeps tags, words, and the words within each tag that is told by name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.inside: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.inside.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style" and data.strip():
            self.words.append(" ".join(data.split()))
        for tag in set(self.open):
            self.inside[tag][-1] += data

    def all(self, tag: str, attribute: str) -> list[str | None]:
        return [attributes[attribute] for name, attributes in self.seen if name == tag and attribute in attributes]

    def text(self, tag: str) -> list[str]:
        """Of tags that do not hold another of their name; a multiplication sign as x."""
        return [" ".join(text.replace("\N{MULTIPLICATION SIGN}", "x").split()) for text in self.inside.get(tag, [])]


def table(*statuses: str, **columns: list[str]) -> pd.DataFrame:
    start = {"Detector": ["AdaMixer"] * len(statuses), "Setting": [f"row {i}" for i in range(len(statuses))]}
    return pd.DataFrame(start | columns | {"Status": list(statuses)})


def section(**changes: object) -> Section:
    about = {
        "name": "main_results",
        "title": "Main results (Table 3)",
        "question": "Does it help?",
        "verdicts": [claim()],
        "harms": ["FGD on AdaMixer (-12.6 ± 4.7 AP)"],
        "table": table("holds", "not run", AP=["28.9 ± 4.1", "not run"]),
        "note": "Measured on embedded digits.",
        "provenance": "Measured on embedded digits; commit 42a99c10.",
        "figures": ["figures/main_results.png", "figures/masks.png"],
        "notebooks": ["notebooks/01_main_results.ipynb", "notebooks/02.ipynb"],
        "files": ["tables/main_results.csv", "tables/main_results.md"],
    }
    return Section(**(about | changes))


def claim(**changes: object) -> Verdict:
    about = {"text": "It helps", "source": "Table 3", "counts": {HOLDS: 2, UNDECIDED: 1}, "sentence": "holds on A (+4.6 [+2.1, +7.0])"}
    about |= {"where": {"A": {HOLDS: 2}, "B": {UNDECIDED: 1}}, "tables": ["main_results"], "harms": ["FGD on A (-2.9 ± 2.4 AP)"]}
    return Verdict(**(about | changes))


def read(folder: Path, *sections: Section, lead: str = "What this is.", claims: tuple[Verdict, ...] = (claim(),)) -> tuple[Reader, str]:
    text = write_page(folder, "1 of 2 claims holds", [lead], sections, claims, ["How to read ±."]).read_text(encoding="utf-8")
    return Reader(text), text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("figures/main_results.png", "figures/main_results.pdf", "notebooks/01_main_results.ipynb", "tables/main_results.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report without figures, which take longer than all else."""
    for name, empty in {"Place.save": [], "comparison": None, "main_figures": {}, "forest": None, "residuals": None}.items():
        monkeypatch.setattr(f"detrdistill.report.write.{name}", partial(_nothing, empty))


def _nothing(empty: object, *_: object) -> object:
    return empty


def test_it_starts_with_what_was_found_and_ends_with_where_it_comes_from(folder: Path) -> None:
    (folder / "figures" / "masks.png").touch()
    _, text = read(folder, section())
    order = [
        "<h1>1 of 2 claims holds</h1>", "What this is.", '<section id="board">', "It helps", "What the words say",
        "The method in four lines",
        '<section id="main_results">', "Does it help?", "<strong>It helps:</strong> holds on A (+4.6 [+2.1, +7.0]).",
        "Below the plain student: FGD on AdaMixer (-12.6 ± 4.7 AP).", "<img", "<summary>Numbers: 2 rows", "28.9 ± 4.1",
        "More pictures: Masks",
        "01_main_results.ipynb", "<h2>Provenance</h2>", "How to read ±.", "commit 42a99c10",
    ]  # fmt: skip
    places = [text.index(words, text.index("<h1>")) for words in order]
    assert places == sorted(places) and text.count("commit 42a99c10") == 1


def test_the_board_has_a_line_a_claim(folder: Path) -> None:
    one = claim(text="It is fast", counts={ONE_SEED: 1}, where={"A": {ONE_SEED: 1}}, harms=())
    page, _ = read(folder, section(), claims=(claim(), one))
    several, single = (text for text in page.text("summary") if text.startswith("It "))
    assert several == ("It helps Table 3 ✓ holds x2 ? undecided x1 A: ✓ holds x2 B: ? undecided ✗ leads over what harms the student: 1")
    assert single == "It is fast Table 3 ! one seed A"
    assert "Holds on A (+4.6 [+2.1, +7.0])." in page.words
    assert "To lead over what harms the student is no gain of its own. Below the plain student: FGD on A (-2.9 ± 2.4 AP)." in page.words


def test_links_lead_only_to_what_exists(folder: Path) -> None:
    page, _ = read(folder, section())
    targets = page.all("a", "href")
    files = [target for target in targets if not target.startswith("#")]
    assert files == [
        "figures/main_results.png", "figures/main_results.pdf", "notebooks/01_main_results.ipynb", "tables/main_results.csv"
    ]  # fmt: skip
    assert page.all("img", "src") == ["figures/main_results.png"]
    assert all((folder / path).is_file() for path in files)
    anchors = {identity for _, attributes in page.seen if (identity := attributes.get("id"))}
    assert {target.removeprefix("#") for target in targets if target.startswith("#")} == anchors == {"board", "main_results", "provenance"}
    words = " ".join(page.words)
    assert "02.ipynb ( not run )" in words and "main_results.md ( not run )" in words and "Masks (figure): not run" in words


def test_a_figure_without_pdf_has_no_link_to_it(folder: Path) -> None:
    (folder / "figures" / "main_results.pdf").unlink()
    page, _ = read(folder, section())
    assert not [target for target in page.all("a", "href") if target.endswith(".pdf")]


def test_pictures_say_what_they_show(folder: Path) -> None:
    page, _ = read(folder, section())
    assert page.all("img", "alt") == ["Main results, a figure of: Main results (Table 3)"]


def test_everything_is_escaped(folder: Path) -> None:
    odd = "figures/a&b <i>%20'\".png"
    (folder / odd).write_bytes(b"")
    cells = table(NASTY, **{NASTY: [NASTY]}).assign(Setting=NASTY)
    words = dict.fromkeys(("name", "title", "question", "note", "provenance"), NASTY)
    said = claim(text=NASTY, source=NASTY, sentence=NASTY, where={NASTY: {HOLDS: 1}}, tables=[NASTY], harms=[NASTY])
    changes = words | {"table": cells, "figures": [odd], "files": [f"tables/{NASTY}"], "verdicts": [said], "harms": [NASTY]}
    page, text = read(folder, section(**changes), lead=NASTY, claims=(said,))
    assert not {"script", "b", "i"} & {tag for tag, _ in page.seen}
    assert sum(NASTY in words for words in page.words) >= 15 and "&amp;lt;" not in text
    assert page.all("img", "src") == ["figures/a%26b%20%3Ci%3E%2520%27%22.png"]
    anchor = f"#{page.all('section', 'id')[1]}"
    assert page.all("a", "href").count(anchor) == 2 and " " not in anchor


def test_files_are_named_in_words(folder: Path) -> None:
    """Detectors by their names, also where one name is a part of another."""
    figures = ["main_results", "figure1", "figure4_rt_detr_v2_quality", "loss_parts_rt_detr_v2", "convergence_deformable_detr"]
    _, text = read(folder, section(figures=[f"figures/{name}.png" for name in figures]))
    words = "Figure 1, Figure 4 RT-DETR v2 quality, Loss parts RT-DETR v2, Convergence Deformable DETR"
    assert f"More pictures: {words}</summary>" in text


def test_statuses_are_counted_in_words(folder: Path) -> None:
    many = table("not run", "undecided (about 9 seeds)", "not run", "reproduced", "undecided (over 99 seeds)", "odd (so)", "holds (small)")
    assert count_statuses(many) == {"reproduced": 1, "holds (small)": 1, "undecided": 2, "not run": 2, "odd (so)": 1}
    assert count_statuses(table("no gain above the margin (so)", "holds (small) (so)")) == {"holds (small)": 1, NO_GAIN: 1}
    assert count_statuses(None) == count_statuses(pd.DataFrame({"AP": ["1.0"]})) == {}
    page, _ = read(folder, section(table=many))
    counted = "= reproduced x1 (✓) holds (small) x1 ? undecided x2 ○ not run x2 odd (so) x1"
    assert f"Numbers: 7 rows {counted}" in page.text("summary")
    assert "? undecided (about 9 seeds)" in page.text("td"), "in its row"


def test_every_status_has_its_own_sign_and_is_explained(folder: Path) -> None:
    assert set(STATUSES) == {*VERDICTS, "reproduced", "measured", "stored", "not run"}
    assert len({sign for sign, _, _ in STATUSES.values()}) == len(STATUSES)
    page, _ = read(folder, section(table=table(*STATUSES)))
    for status, (sign, _, meaning) in STATUSES.items():
        assert f"{sign} {status}" in page.text("td") and f"{sign} {status}" in page.text("dt") and meaning in page.text("dd")


def test_a_harm_does_not_look_like_a_success(folder: Path) -> None:
    _, text = read(folder, section(table=table(AGAINST, AGAINST + SMALL, "holds")))
    looks = {word: look for word, (_, look, _) in STATUSES.items()}
    assert {looks[word] for word in (AGAINST, AGAINST + SMALL)} == {"bad"} and {looks[word] for word in (HOLDS, HOLDS + SMALL)} == {"good"}
    assert not any(sign in text for sign in "▲△↑⬆"), "an arrow up beside a lead over what harms would praise the harm"
    harm = text[text.index('<p class="harm">') :]
    assert harm.startswith('<p class="harm"><span class="chip bad"><span aria-hidden="true">✗</span> against</span>')


def test_rows_that_harm_are_named_where_something_leads_over_them(tmp_path: Path, undrawn: None) -> None:
    """FGD ends below the plain student: a lead over it is told apart from one over MGD."""
    store, presets = Store(tmp_path), get_presets("mini", ["adamixer"])
    for seed in (0, 1, 2):
        for setting, ap in {"student": 25.0, "fgd": 13.0, "mgd": 25.5, "detrdistill": 32.0}.items():
            put(store, presets[0].recipe(setting, seed), ap + seed + (seed * len(setting) % 3) / 5)
    write_report("mini", [0, 1, 2], tmp_path, ["main_results"], ["adamixer"], formats=["png"])
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    page = Reader(text)
    (line,) = (line for line in page.text("summary") if line.startswith("DETRDistill is ahead of methods made"))
    assert "✓ holds x2" in line and line.endswith("✗ leads over what harms the student: 1")
    assert text.count("FGD on AdaMixer (-12.") == 2 and "MGD on AdaMixer" not in text
    assert 'chip good"><span aria-hidden="true">✓</span> holds' not in text[text.index("<td>FGD</td>") : text.index("<td>MGD</td>")]


def test_what_is_folded_away_is_whole_and_is_printed(folder: Path) -> None:
    cells = table(*["measured"] * 40, AP=[f"{i}.5" for i in range(40)])
    page, text = read(folder, section(table=cells))
    assert not {"open"} & {name for tag, attributes in page.seen if tag == "details" for name in attributes}
    folded = text[text.index("<summary>Numbers: 40 rows") : text.index("</table>")]
    assert all(f"row {i}<" in folded and f"{i}.5<" in folded for i in range(40))
    printed = CSS.read_text().partition("@media print")[2]
    assert "details::details-content { content-visibility: visible;" in printed


def test_numbers_stand_right_and_words_left(folder: Path) -> None:
    cells = table(
        "measured", "not run", AP=["60.0", "not run"], Gain=["-", "+4.6 ± 4.3"], APl=["n/a", "n/a"], Seeds=["1 of 1", "0 of 3"],
        Adjusted=["[-1.5, +3.0]", "-"], Backbone=["ResNet-18", "-"],
    )  # fmt: skip
    page, _ = read(folder, section(table=cells))
    heads = [attributes.get("class") for tag, attributes in page.seen if tag == "th"]
    assert heads == [None, None, "number", "number", "number", "number", "number", None, None]
    classes = [attributes.get("class") for tag, attributes in page.seen if tag == "td"]
    assert classes == ["shared", *heads[1:], *heads[1:]]
    assert page.all("span", "class").count("empty") >= 4


def test_equal_neighbours_are_written_once(folder: Path) -> None:
    cells = table("measured", "measured", "measured", Where=["digits"] * 3).assign(Detector=["A", "A", "B"])
    page, _ = read(folder, section(table=cells), claims=())
    assert page.all("td", "rowspan") == ["2", "1"]
    assert [word for word in page.words if word in ("A", "B", "digits")] == ["A", "digits", "digits", "B", "digits"]
    assert sum(int(attributes.get("rowspan") or 1) for tag, attributes in page.seen if tag == "td") == cells.size


def test_the_page_stands_alone_and_repeats_itself(folder: Path) -> None:
    page, text = read(folder, section())
    again = (folder / "index.html").read_bytes()
    assert read(folder, section())[1].encode() == text.encode() == again
    assert text.startswith("<!DOCTYPE html>\n<html lang=") and text.endswith("</html>\n")
    assert str(folder) not in text and "://" not in text and "@import" not in text and "url(" not in text
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.seen}
    assert not [name for _, attributes in page.seen for name in attributes if name.startswith("on")]
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert not list(folder.glob(".*.part"))


def test_equations_are_mathml(folder: Path) -> None:
    page, _ = read(folder, section())
    losses = ["detection", "logits", "features", "assignment", "match"]
    assert len(page.text("math")) == 4 and all(text[0] == "\N{SCRIPT CAPITAL L}" for text in page.text("math"))
    assert set(losses) == set(page.text("mtext")) and "mfrac" in page.inside


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_words_can_be_read_on_their_ground(scheme: str) -> None:
    """WCAG AA: a contrast of at least 4.5 for all colours of text."""
    light, dark, printed = (
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", CSS.read_text(), re.S)
    )
    colours = {"light": light, "dark": dark, "print": printed}[scheme]
    assert colours.keys() == light.keys()
    for ground in ("paper", "raised"):
        for name in ("text", "faint", "link", "good", "fair", "bad", "idle"):
            high, low = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{name} on {ground}"


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_what_is_wide_scrolls_by_itself(folder: Path) -> None:
    """So that the page does not: tables, pictures and equations lie in boxes that also the keyboard can scroll."""
    _, text = read(folder, section())
    for tag in ("table", "img", "math"):
        starts = [match.start() for match in re.finditer(f"<{tag}[ >]", text)]
        assert starts and all(
            re.search(r'<div class="scroll" tabindex="0" role="region" aria-label="[^"]+">\s*$', text[:start]) for start in starts
        )
    assert ".scroll { overflow-x: auto; }" in CSS.read_text()


def test_the_headline_counts_comparisons() -> None:
    every = {HOLDS: 3, HOLDS + SMALL: 2, AGAINST: 1, AGAINST + SMALL: 2, NO_EFFECT: 1, NO_GAIN: 2, UNDECIDED: 1, ONE_SEED: 2, NOT_RUN: 1}
    said = (
        "3 of 15 comparisons hold, 2 hold by less than the margin, 1 comes out against, 2 come out against by less than the margin, "
        "1 shows no effect above the margin, 2 show no gain above the margin, 1 is undecided, 2 have one seed and 1 was not run"
    )
    assert headline([claim(counts=every)]) == said
    assert headline([claim(counts={word: count}) for word, count in every.items()]) == said, "of several claims their sum"
    assert every.keys() == {*VERDICTS, NOT_RUN}, "no verdict is left out"
    assert headline([claim(counts={HOLDS: 1, NOT_RUN: 1})]) == "1 of 2 comparisons holds and 1 was not run"
    assert headline([claim(counts={AGAINST: 2})]) == "None of 2 comparisons holds and 2 come out against"
    assert (
        headline([claim(counts={HOLDS + SMALL: 2})])
        == "None of 2 comparisons holds by more than the margin and 2 hold by less than the margin"
    )
    assert headline([claim(counts={HOLDS: 2})]) == "2 of 2 comparisons hold"
    assert headline([claim(counts={NOT_RUN: 1})] * 2) == "None of 2 comparisons was run yet"
    assert headline([]) == "No claim is asked of these tables"


def test_every_table_has_its_question_and_its_own_claims(tmp_path: Path, undrawn: None) -> None:
    assert QUESTIONS.keys() == {*TABLES, WEIGHTS} and all(text.endswith("?") for text in QUESTIONS.values())
    made = [make_table(name, get_presets("mini"), [0]) for name in TABLES]
    write_report("mini", [0], tmp_path, formats=["png"])
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    compared = all_compared(get_presets("mini"), [0])
    weighed = weigh(compared, Comparisons(compared, Store(tmp_path)))
    assert f"<h1>None of {len(weighed)} comparisons was run yet</h1>" in text and "not a COCO result" in text[: text.index("<nav")]
    parts = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', text, re.S))
    for table_made in made:
        part, own = Reader(parts[table_made.name]), verdicts(weighed[weighed["table"] == table_made.name], {})
        assert QUESTIONS[table_made.name] in part.words and own
        assert [word.removesuffix(":") for word in part.text("strong")] == [one.text for one in own]
        assert len(table_made.rows) == sum(int(tag == "tr") for tag, _ in part.seen) - 1


def test_only_rows_below_the_student_are_harms() -> None:
    summary = pd.DataFrame(
        [("FGD", AGAINST, -12.6, 4.7), ("MGD", AGAINST + SMALL, -1.0, 0.5), ("FitNet", NO_GAIN, -1.0, 2.0), ("PKD", HOLDS, 3.0, 1.0)],
        columns=["title", "status", "gain", "gain_half"],
    ).assign(detector="AdaMixer")
    assert list(harms_of("t", summary).values()) == ["FGD on AdaMixer (-12.6 ± 4.7 AP)", "MGD on AdaMixer (-1.0 ± 0.5 AP)"]


def test_a_page_of_nothing(tmp_path: Path) -> None:
    text = write_page(tmp_path / "new", "Nothing", [], []).read_text(encoding="utf-8")
    assert Reader(text).words == ["Nothing", "Nothing", "Provenance", "Provenance"]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    with pytest.raises(InputError, match="is a file"):
        write_page(tmp_path / "results", "title", [], [])


def test_it_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from detrdistill.report.page import write_page; "
        f"write_page(Path({str(tmp_path)!r}), 'title', [], []); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

"""The page of a preset: whole HTML, everything escaped, links to what exists and to nothing else, equal bytes."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from detrdistill.errors import InputError
from detrdistill.report.page import LOOKS, STATUSES, Section, count_statuses, write_page
from detrdistill.statistics import AGAINST, SMALL, VERDICTS

NASTY = "<script>alert('x')</script> & \"quoted\" <b>"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Reader(HTMLParser):
    """Checks that tags are balanced, and keeps links, anchors, pictures, words, and the cells of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style" and data.strip():
            self.words.append(data.strip())

    def all(self, tag: str, attribute: str) -> list[str | None]:
        return [attributes[attribute] for name, attributes in self.seen if name == tag and attribute in attributes]


def table(*statuses: str, **columns: list[str]) -> pd.DataFrame:
    start = {"Detector": ["AdaMixer"] * len(statuses), "Setting": [f"row {i}" for i in range(len(statuses))]}
    return pd.DataFrame(start | columns | {"Status": list(statuses)})


def section(**changes: object) -> Section:
    about = {
        "name": "main_results",
        "title": "Main results (Table 3)",
        "table": table("holds", "not run", AP=["28.9 ± 4.1", "not run"]),
        "note": "Measured on embedded digits; commit 42a99c10.",
        "figures": ["figures/main_results.png", "figures/masks.png"],
        "notebooks": ["notebooks/01_main_results.ipynb", "notebooks/02.ipynb"],
        "files": ["tables/main_results.csv", "tables/main_results.md"],
    }
    return Section(**(about | changes))


def read(folder: Path, *sections: Section, about: str = "What this is.") -> tuple[Reader, str]:
    text = write_page(folder, "detrdistill: quick", about, sections).read_text(encoding="utf-8")
    return Reader(text), text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("figures/main_results.png", "figures/main_results.pdf", "notebooks/01_main_results.ipynb", "tables/main_results.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_links_lead_only_to_what_exists(folder: Path) -> None:
    page, _ = read(folder, section())
    targets = page.all("a", "href")
    files = [target for target in targets if not target.startswith("#")]
    assert files == ["notebooks/01_main_results.ipynb", "tables/main_results.csv", "figures/main_results.pdf"]
    assert page.all("img", "src") == ["figures/main_results.png"]
    assert all((folder / path).is_file() for path in files)
    assert [target for target in targets if target.startswith("#")] == ["#main_results"] and "main_results" in page.all("section", "id")
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
    page, text = read(
        folder, section(name=NASTY, title=NASTY, table=cells, note=NASTY, figures=[odd], files=[f"tables/{NASTY}"]), about=NASTY
    )
    assert not {"script", "b", "i"} & {tag for tag, _ in page.seen}
    assert page.words.count(NASTY) >= 8
    assert page.all("img", "src") == ["figures/a%26b%20%3Ci%3E%2520%27%22.png"]
    assert page.all("a", "href")[0] == f"#{page.all('section', 'id')[0]}" and " " not in page.all("section", "id")[0]
    assert text.count("<script") == 0


def test_statuses_are_counted_in_words(folder: Path) -> None:
    many = table("not run", "undecided (about 9 seeds)", "not run", "reproduced", "undecided (over 99 seeds)", "odd", "holds (small)")
    assert count_statuses(many) == {"reproduced": 1, "holds (small)": 1, "undecided": 2, "not run": 2, "odd": 1}
    assert count_statuses(None) == count_statuses(pd.DataFrame({"AP": ["1.0"]})) == {}
    page, _ = read(folder, section(table=many, notebooks=[]), section(name="other", table=None, notebooks=[]))
    assert [word for word in page.words if word[0].isdigit()] == ["1 reproduced", "1 holds (small)", "2 undecided", "2 not run", "1 odd"]
    assert STATUSES["undecided"][1] in page.words and STATUSES["against"][1] not in page.words
    assert "undecided (about 9 seeds)" in page.words, "in its row"


def test_every_status_of_the_tables_is_explained() -> None:
    assert set(STATUSES) == {*VERDICTS, "reproduced", "measured", "stored", "not run"}
    assert len({sign for sign, _ in STATUSES.values()}) == len(STATUSES)


def test_a_harm_does_not_look_like_a_success(folder: Path) -> None:
    _, text = read(folder, section(table=table(AGAINST, AGAINST + SMALL, "holds")))
    for word in (AGAINST, AGAINST + SMALL):
        assert LOOKS[word] == "bad" and f'<td><span class="chip bad"><span aria-hidden="true">{STATUSES[word][0]}</span> {word}<' in text
    assert '<td><span class="chip good"><span aria-hidden="true">▲</span> holds<' in text


def test_numbers_stand_right_and_words_left(folder: Path) -> None:
    cells = table(
        "measured", "not run", AP=["60.0", "not run"], Gain=["-", "+4.6 ± 4.3"], APl=["n/a", "n/a"], Seeds=["1 of 1", "0 of 3"],
        Backbone=["ResNet-18", "-"], Measured=["digits, 96 px", "digits, 96 px"],
    )  # fmt: skip
    page, _ = read(folder, section(table=cells))
    heads = [attributes.get("class") for tag, attributes in page.seen if tag == "th"]
    assert heads == [None, None, "number", "number", "number", "number", None, None, None]
    classes = [attributes.get("class") for tag, attributes in page.seen if tag == "td"]
    shared = lambda *places: ["shared" if i in places else kind for i, kind in enumerate(heads)]  # noqa: E731
    assert classes == shared(0, 7) + [kind for i, kind in enumerate(heads) if i not in (0, 7)]
    assert page.all("span", "class").count("empty") >= 4


def test_equal_neighbours_are_written_once(folder: Path) -> None:
    cells = table("measured", "measured", "measured", Where=["digits"] * 3).assign(Detector=["A", "A", "B"])
    page, _ = read(folder, section(table=cells, figures=[], notebooks=[], files=[]))
    assert page.all("td", "rowspan") == ["2", "3", "1"]
    assert [word for word in page.words if word in ("A", "B", "digits")] == ["A", "digits", "B"]
    assert page.all("tr", "class") == ["group"]
    assert sum(int(attributes.get("rowspan") or 1) for tag, attributes in page.seen if tag == "td") == cells.size


def test_the_page_stands_alone_and_repeats_itself(folder: Path) -> None:
    page, text = read(folder, section())
    again = (folder / "index.html").read_bytes()
    assert read(folder, section())[1].encode() == text.encode() == again
    assert text.startswith("<!DOCTYPE html>\n<html lang=") and text.endswith("</html>\n")
    assert str(folder) not in text and "://" not in text and "@import" not in text and "url(" not in text
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.seen}
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert not list(folder.glob(".*.part"))


def test_a_page_of_nothing(tmp_path: Path) -> None:
    page, _ = read(tmp_path / "new", about="")
    assert page.words == ["detrdistill: quick", "detrdistill: quick", "Contents"]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    with pytest.raises(InputError, match="is a file"):
        write_page(tmp_path / "results", "title", "", [])


def test_it_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from detrdistill.report.page import write_page; "
        f"write_page(Path({str(tmp_path)!r}), 'title', '', []); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

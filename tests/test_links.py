"""Links of the pages lead somewhere: files, folders and headings of this repository."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("results/**/README.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED = re.compile(r"\bdocs/[\w/]+\.md|\bresults/[\w/]+/README\.md")


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted(ROOT.glob("results/reference/*/index.html")), ids=lambda page: page.parent.name)
def test_pages_of_what_we_measured_lack_nothing(page: Path) -> None:
    named = re.findall(r'(?:src|href)="([^"#:]+)"', page.read_text(encoding="utf-8"))
    assert named and not [name for name in named if not (page.parent / unquote(name)).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            dead.append(link)
    assert not dead, f"{page.relative_to(ROOT)} links to what is not there: {', '.join(dead)}"


@pytest.mark.parametrize("folder", ["detrdistill", "notebooks", "benchmarks", "workflow", "tests"])
def test_pages_that_code_and_notebooks_name_are_there(folder: str) -> None:
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".ipynb") and ".ipynb_checkpoints" not in path.parts]
    named = {(path, name) for path in files for name in NAMED.findall(path.read_text(encoding="utf-8"))}
    assert named and not [f"{path.relative_to(ROOT)}: {name}" for path, name in named if not (ROOT / name).is_file()]

"""Every notebook runs top to bottom in the smoke preset, and is committed without outputs and without paths of a machine."""

import ast
import html
import re
import shutil
from pathlib import Path

import nbformat
import papermill
import pytest

from detrdistill.errors import InputError
from detrdistill.notebooks import execute as cold
from detrdistill.notebooks import literal
from detrdistill.recipes.presets import get_preset, get_presets
from detrdistill.recipes.tables import TABLES, make_table
from detrdistill.report.comparisons import Comparisons
from detrdistill.report.tables import collect, summarise
from detrdistill.runs.run import run
from detrdistill.runs.store import Store
from tests.warm import execute, python_m

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


def table_of(path: Path) -> str | None:
    """The table that a notebook is named after."""
    name = path.stem.partition("_")[2]
    return name if name in TABLES else None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_shows_what_it_measured(path: Path, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETRDISTILL_RESULTS", str(results))
    executed = results / path.name
    given = {"preset": "smoke", "seeds": "[0]", "progress": "False"}
    known = papermill.inspect_notebook(str(path))
    given |= {"results": str(results / "own")} if "results" in known else {}
    given |= {"images": "[2]"} if "images" in known else {}  # each is a figure of many panels
    if path.stem == "00_quickstart":
        cold(path, executed, given, timeout=280)
    else:
        execute(path, executed, {name: literal(value) for name, value in given.items()}, timeout=280)
    cells = [cell for cell in nbformat.read(executed, as_version=4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    shown = "".join(output.get("text", "") + output.get("data", {}).get("text/html", "") for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    assert not any(output.output_type == "stream" and output.name == "stderr" for output in outputs), "a notebook should not complain"

    store = Store(results / "smoke")
    if name := table_of(path):
        table = make_table(name, get_presets("smoke"), [0])
        records = [store.record(recipe) for recipe in table.recipes()]
        assert all(records), "the notebook left no records"
        assert sorted((results / "smoke" / "figures").glob(f"{name}.*")), "the figure beside the table"
        comparisons = Comparisons([make_table(one, get_presets("smoke"), [0]) for one in TABLES], store)
        summary = summarise(table, collect(table, store), comparisons)
        assert (summary["seeds"] == 1).all()
        for line in summary.to_dict("records"):
            row = rf">{re.escape(html.escape(line['title'], quote=False))}</td>\s*<td[^>]*>{line['AP']:.1f}</td>"
            assert re.search(row, shown), f"the AP of row {line['title']} beside its title"
            assert f">{line['published_AP']:.1f}<" in shown or line["published_AP"] != line["published_AP"]


@pytest.mark.parametrize("name", ["01_main_results", "12_stability"])
def test_a_run_without_weights_is_left_out_of_what_needs_them(
    name: str, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most students of the committed results are records and logs alone: a batch that has no more to train must not stop at them."""
    from detrdistill.session import open_session

    monkeypatch.setenv("DETRDISTILL_RESULTS", str(tmp_path))
    if (results / "smoke").exists():  # what other notebooks trained
        shutil.copytree(results / "smoke" / "runs", tmp_path / "smoke" / "runs")
    store, recipe = Store(tmp_path / "smoke"), get_preset("smoke").recipe("student")
    record = run(recipe, store, device="cpu", progress=False)
    session = open_session(preset="smoke", seeds=[0], device="cpu", progress=False)
    assert session.with_weights([record]) == [record]
    store.weights(recipe).unlink()
    assert session.with_weights([record]) == []
    missing = rf"two runs with weights, and the weights of {record.id} are not in {store.root}; train them, in a results folder"
    with pytest.raises(InputError, match=missing):
        session.compare({"student": record})
    path = ROOT / "notebooks" / f"{name}.ipynb"
    one = {"detectors": "deformable_detr"} if "detectors" in papermill.inspect_notebook(str(path)) else {}
    execute(path, tmp_path / path.name, {"preset": "smoke", "seeds": [0], "progress": False} | one, timeout=280)
    assert not store.weights(recipe).exists(), "trained again"
    if name == "12_stability":
        tables = "".join(
            o.get("data", {}).get("text/html", "") for c in nbformat.read(tmp_path / path.name, 4).cells for o in c.get("outputs", ())
        )
        counted = tables.partition("percent of objects a step")[2]
        seeds = dict(re.findall(r"<th>(\w+)</th>\s*<td>(\d)</td>", counted))
        assert seeds == {"Teacher": "1", "Student": "0", "DETRDistill": "1"}, "a line of its own, with nothing counted"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_clean(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    text = path.read_text(encoding="utf-8")
    assert all(cell.execution_count is None and not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    assert str(ROOT) not in text and "/home/" not in text and "/root/" not in text
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(len(cell.source.splitlines()) <= 10 for cell in code), "a long cell belongs into the library"
    assert len(notebook.cells) - len(code) >= len(code) - 3, "as much text as code"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_cells_may_be_run_again(path: Path) -> None:
    """Only the cell of the parameters gives them values."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    names = [
        {node.id for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)} for cell in cells
    ]
    for parameter in papermill.inspect_notebook(str(path)):
        assert sum(parameter in bound for bound in names) == 1, parameter


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_help_explains_every_parameter(path: Path) -> None:
    parameters = papermill.inspect_notebook(str(path))
    assert set(parameters) >= {"preset", "seeds", "changes", "device", "progress"}
    for parameter in parameters.values():
        assert parameter["inferred_type_name"] not in (None, "None") and parameter["help"], f"{parameter['name']} has no type or no comment"
    shown = python_m("papermill", "--help-notebook", path)
    assert shown.returncode == 0 and "seeds of the students" in shown.stdout


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"preset": "quik"}, "preset"),
        ({"seeds": "[-1]"}, "seeds"),
        ({"seeds": "one"}, "seeds"),
        ({"device": "tpu"}, "device"),
        ({"progress": "perhaps"}, "progress"),
    ],
)
def test_refuses_bad_parameters(given: dict[str, str], named: str) -> None:
    from detrdistill.errors import InputError
    from detrdistill.session import open_session

    with pytest.raises(InputError, match=f"parameters: '{named}"):
        open_session(**({"preset": "smoke", "seeds": [0], "device": "cpu", "progress": False} | given))


def test_text_numbers_are_accepted() -> None:
    from detrdistill.session import open_session

    assert open_session(preset="smoke", seeds="0 1", device="cpu", progress="true").seeds == (0, 1)
    assert open_session(preset="smoke", seeds=2, device="cpu", progress=False).seeds == (2,)


def test_fields_of_the_recipe_can_be_changed() -> None:
    """Also with a number as text, as YAML passes 1e-4; what is changed makes other runs, and the teacher stays."""
    from detrdistill.session import open_session

    changes = {"schedule.lr": "1e-4", "schedule.steps": 3, "method.gamma": 0.2}
    preset = open_session(preset="smoke", seeds=[0], changes=changes, device="cpu", progress=False).preset
    recipe, plain = preset.recipe("detrdistill"), get_preset("smoke")
    assert (recipe.schedule.lr, recipe.schedule.steps, recipe.methods[0].gamma) == (1e-4, 3, 0.2)
    assert recipe.teacher == plain.teacher and preset.recipe("student") != plain.student


@pytest.mark.parametrize("changes", [{"schedule.lrr": 1}, {"lr": 1}, {"schedule.steps": -1}, {"method.gama": 1}, {"schedule.lr": "fast"}])
def test_refuses_bad_changes(changes: dict) -> None:
    from detrdistill.errors import InputError
    from detrdistill.session import open_session

    with pytest.raises(InputError, match=next(iter(changes)).rpartition(".")[2]):
        open_session(preset="smoke", seeds=[0], changes=changes, device="cpu", progress=False)


def code_of(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_starts_with_the_session_alone(path: Path) -> None:
    cells = code_of(path)
    assert cells[0] == "from detrdistill.session import open_session, versions\n\nversions()"
    assert sum("open_session(" in cell for cell in cells) == 1 and not any(cell.startswith("%") for cell in cells)


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if table_of(path)], ids=lambda path: path.stem)
def test_a_table_notebook_needs_one_object(path: Path) -> None:
    """Its picture comes before its numbers, its verdicts last."""
    cells = code_of(path)
    steps = [f'table = session.table("{table_of(path)}")\ntable.run()', "table.plot()", "table.show()", "table.verdicts()"]
    places = [cells.index(step) for step in steps]
    assert places == sorted(places) and cells[-1] == steps[-1]
    assert not any("detrdistill.report" in cell for cell in cells)
    figures = [line for cell in cells for line in cell.splitlines() if "import" in line and "detrdistill.figures" in line]
    assert all("stage_pairs" in line for line in figures), "a table draws itself; notebook 04 shows an idea too"


def test_a_summary_of_several_seeds_has_means_and_an_interval(results: Path) -> None:
    """A run that several students share is counted once."""
    from detrdistill.session import open_session

    recipe, store = get_preset("smoke").recipe("student"), Store(results / "smoke")
    record = run(recipe, store, device="cpu", progress=False)
    numbers = {"AP": 20.0, "AP50": 40.0, "AP75": 10.0}
    runs = [record.replace(id=f"r{k}", metrics=numbers | {"AP": ap}, test={"AP": ap / 2}) for k, ap in enumerate((20.0, 22.0, 24.0))]
    session = open_session(preset="smoke", seeds=[0], device="cpu", progress=False)
    table = session.summary(student=runs, teacher=[runs[0]] * 3)
    assert table.loc["Student", ["seeds", "AP", "test AP", "± (95 %)"]].tolist() == [3, 22.0, 11.0, 5.0]
    assert table.loc["Teacher", "seeds"] == 1 and table.loc["Teacher", "AP"] == 20.0
    alone = session.summary(student=runs[0])
    assert list(alone.columns) == ["AP", "AP50", "AP75", "test AP", "steps", "minutes"]

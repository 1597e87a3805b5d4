"""Results that were edited are refused, and tables say what they were made from or are not made."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from detrdistill.errors import InputError
from detrdistill.recipes.presets import get_preset
from detrdistill.recipes.tables import make_table
from detrdistill.records import Record, read_record, refuse_mixed
from detrdistill.report.comparisons import Comparisons
from detrdistill.report.tables import collect, summarise
from detrdistill.report.write import write_report
from detrdistill.runs.store import Store
from tests.report.test_tables import SMOKE, fill, put

RESULTS = Path(__file__).parents[2] / "results"
QUICK = get_preset("quick")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Records of the main results of `quick`, three seeds."""
    store = Store(tmp_path / "quick")
    fill(store)
    return store


def report(store: Store) -> dict[str, bytes]:
    """The pages and tables of a report, by name; one figure is enough here."""
    paths = write_report("quick", [0, 1, 2], store.root, formats=["png"], figures=["main_results"])
    return {path.name: path.read_bytes() for path in paths if path.suffix in (".csv", ".md", ".tex", ".html")}


def leaves(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, held in items:
        if isinstance(held, dict | list) and held:
            yield from leaves(held, (*place, key))
        else:
            yield (*place, key)


def edited(body: dict[str, Any], place: tuple[str | int, ...]) -> dict[str, Any]:
    """One value made better, as a hand would."""
    body = copy.deepcopy(body)
    node = body
    for key in place[:-1]:
        node = node[key]
    held = node[place[-1]]
    node[place[-1]] = not held if isinstance(held, bool) else held + 1 if isinstance(held, int | float) else f"{held} edited"
    return body


def test_a_record_with_any_value_edited_is_refused(store: Store, times, tries) -> None:
    """Wherever it is read; and a report leaves what was there."""
    before = report(store)
    path = store.folder(QUICK.recipe("detrdistill")) / "record.json"
    whole = path.read_text()
    body = json.loads(whole)
    places = list(leaves(body))
    assert {("metrics", "AP"), ("sha256",), ("curve", 0, "AP"), ("provenance", "commit")} < set(places)
    step = len(places) // times(12, len(places))
    for place in [("metrics", "AP"), *places[::step]]:
        path.write_text(json.dumps(edited(body, place), indent=1) + "\n")
        with tries("one value of a record edited"):
            for reader in (lambda: read_record(path), lambda: store.record(QUICK.recipe("detrdistill")), lambda: report(store)):
                with pytest.raises(InputError) as error:
                    reader()
                message = str(error.value)
                assert message.startswith(f"record {path}: its content (hash ") and "\n" not in message
                assert message.endswith("so it was edited or damaged; restore the file, or delete its folder to run again")
    path.write_text(whole)
    assert report(store) == before


DAMAGE = {
    "hash removed": lambda body: body.pop("sha256") and body,
    "hash of another record": lambda body: body | {"sha256": "0" * 64},
    "value removed": lambda body: body["metrics"].pop("AP75") and body,
    "value added": lambda body: body | {"note": "checked by hand"},
    "list": lambda body: [body],
    "nothing": lambda body: None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_refused(store: Store, tries, damage: str) -> None:
    path = store.folder(QUICK.student) / "record.json"
    path.write_text(json.dumps(DAMAGE[damage](json.loads(path.read_text()))))
    with tries("record damaged"), pytest.raises(InputError, match=r"^record .*record\.json: .*; .*delete its folder to run again$"):
        report(store)


def test_a_record_cut_short_is_refused(store: Store, times, tries) -> None:
    path = store.folder(QUICK.student) / "record.json"
    whole = path.read_bytes()
    count = times(5, 60)
    for number in range(count):
        path.write_bytes(whole[: len(whole) * number // count])
        with tries("record cut short"), pytest.raises(InputError, match="not a JSON object; delete its folder to run again"):
            report(store)


def test_a_record_in_the_folder_of_another_run_is_refused(store: Store, tries) -> None:
    path = store.folder(QUICK.recipe("student", 1)) / "record.json"
    path.write_text((store.folder(QUICK.student) / "record.json").read_text())
    with tries("record of another run"), pytest.raises(InputError, match=r"record .* is that of run .*; a record belongs in the folder of"):
        report(store)


def test_every_committed_record_fits_its_hash_and_its_folder() -> None:
    paths = [path for path in RESULTS.rglob("record.json") if "runs" in path.parts]
    assert len(paths) > 20
    assert all(read_record(path).id == path.parent.name for path in paths)


def test_presets_and_tables_do_not_mix(store: Store, tries) -> None:
    quick, other = make_table("main_results", [QUICK], [0]), make_table("main_results", SMOKE, [0])
    frame = collect(quick, store)
    for table, lines in ((other, frame), (quick, pd.concat([frame, collect(other, store)]))):
        with tries("presets mixed"), pytest.raises(InputError, match=r"main_results of preset .* must not be mixed with main_results of"):
            summarise(table, lines, Comparisons([table], store))


def test_runs_of_another_preset_in_the_folder_are_not_taken(store: Store, tries) -> None:
    before = report(store)
    fill(store, SMOKE[0], teacher=90.0, student=(90.0, 90.0, 90.0), distilled=(99.0, 99.0, 99.0))
    with tries("presets mixed"):
        assert report(store) == before


def test_data_do_not_mix(store: Store, tries) -> None:
    put(store, QUICK.student, 16.0, data="e" * 64)
    with tries("data mixed"), pytest.raises(InputError) as error:
        report(store)
    message = str(error.value)
    assert "were measured on different data (dddddddd and eeeeeeee)" in message and message.endswith(
        "delete the folder of the outdated one and run it again"
    )


@pytest.mark.parametrize("table", ["main_results", "components"])
def test_a_teacher_trained_again_is_noticed(store: Store, tries, table: str) -> None:
    """Also in a table that has no line for the teacher, by what its other runs learned from."""
    put(store, QUICK.recipe("detrdistill", 1), 17.0, teacher="v" * 64)
    with tries("students of two teachers"), pytest.raises(InputError) as error:
        collect(make_table(table, [QUICK], [0, 1, 2]), store)
    message = str(error.value)
    assert "used another teacher (weights vvvvvvvv) than" in message and "(wwwwwwww); delete the folder of the outdated one" in message


def test_backbones_from_two_contents_of_one_file_do_not_mix(store: Store, tries) -> None:
    records = []
    for seed, content in enumerate("aab"):
        recipe = QUICK.recipe("student", seed)
        recipe = recipe.replace(backbone=recipe.backbone.replace(weights=Path("mine.pt"), crops=None))
        parents = {"backbone": {"file": "mine.pt", "sha256": content * 64}}
        records.append(store.record(QUICK.recipe("student", seed)).model_copy(update={"recipe": recipe, "parents": parents}))
    refuse_mixed(records[:2])
    with (
        tries("backbones mixed"),
        pytest.raises(InputError, match=r"other backbone weights, thin_resnet mine\.pt \(b+\), than .* \(a+\)"),
    ):
        refuse_mixed(records)


def of(store: Store, record: Record, **about: Any) -> None:
    store.write(record.model_copy(update={"provenance": record.provenance | about}))


def test_other_code_libraries_and_devices_are_told_under_the_table(store: Store, tries) -> None:
    """In the table's every form, on the page, and not where all is one."""
    one, other = (store.record(QUICK.recipe("detrdistill", seed)) for seed in (0, 1))
    same = {"versions": {"torch": "2.15.0"}, "device": "cpu"}
    for path in store.root.rglob("record.json"):
        of(store, read_record(path), **same)
    assert not any(b"computed by" in content for content in report(store).values())
    with tries("code versions mixed"):
        of(store, other, **same | {"commit": "fedcba9876543210+changes"})
        for name, content in report(store).items():
            if name == "claims.csv":
                continue  # differences of runs, whose commits stand in the table's own csv
            told = b"fedcba9876543210+changes" if name.endswith(".csv") else b"commits 01234567, fedcba98+changes"
            assert told in content, name
    for name, about in {
        "torch 2.14.0 on cpu, torch 2.15.0 on cpu": {"versions": {"torch": "2.14.0"}, "device": "cpu"},
        "torch 2.15.0 on NVIDIA H200, torch 2.15.0 on cpu": same | {"device": "NVIDIA H200"},
    }.items():
        with tries("library or device mixed"):
            of(store, one, **about)
            told = [content for file, content in report(store).items() if not file.endswith(".csv")]
            assert len(told) == 4 and all(f"computed by {name};".encode() in content for content in told)


def test_a_table_edited_by_hand_is_written_again(tmp_path: Path, tries) -> None:
    """Tables are pure functions of records: what was committed comes back to the byte."""
    reference, table = RESULTS / "reference" / "quick", tmp_path / "tables" / "main_results.md"
    shutil.copytree(reference / "runs", tmp_path / "runs")
    committed = (reference / "tables" / table.name).read_text()
    with tries("table edited"):
        table.parent.mkdir()
        table.write_text(committed.replace("28.9", "46.6"))
        write_report("quick", [0, 1, 2], tmp_path, formats=["png"], figures=["main_results"])
        assert table.read_text() == committed

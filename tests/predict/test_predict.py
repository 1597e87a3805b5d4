"""`detrdistill predict`: what it writes, that it sees what an evaluation sees, and what it refuses."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrdistill import cli
from detrdistill.checkpoints.locate import ids_of_run
from detrdistill.checkpoints.names import COCO_91, ids_of_outputs, outputs_by_name
from detrdistill.data.coco import open_dataset
from detrdistill.data.layout import data_cache
from detrdistill.errors import InputError
from detrdistill.predict.images import draw, find_images, read_upright
from detrdistill.predict.models import open_model
from detrdistill.predict.predict import HEADER, predict
from detrdistill.recipes.parts import Digits
from detrdistill.records import read_record, record_text
from detrdistill.runs.evaluate import evaluate_model
from detrdistill.runs.store import Store
from tests.folders import write_folder
from tests.small_runs import NAMES, small_run

THRESHOLD = 0.02  # about half of what random weights score


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "mine")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return small_run(Store(tmp_path_factory.mktemp("results")), data)


@pytest.mark.parametrize("kind", ["conditional", "deformable-two-stage", "adamixer"])
def test_it_sees_what_an_evaluation_sees(kind: str, data: Path, tmp_path: Path) -> None:
    folder = small_run(Store(tmp_path), data, kind)
    found = predict(open_model(str(folder), "cpu"), str(data / "images"), tmp_path / "out", threshold=0, batch=1, progress=False)
    file_of = {one["id"]: one["file_name"] for one in json.loads((tmp_path / "out" / "images.json").read_text())["images"]}
    ours = [(file_of[one["image_id"]], one["category_id"], *one["bbox"], one["score"]) for one in found.results]
    assert all(one["file_name"] == file_of[one["image_id"]] for one in found.results)
    ours = [one for one in ours if len(one[0]) == len("100.png")]
    theirs = evaluate_model(folder, data, device="cpu").results
    assert [one[:2] for one in ours] == [(f"{one['image_id']}.png", one["category_id"]) for one in theirs] and len(theirs) >= 4 * 5
    numbers = np.array([[*one["bbox"], one["score"]] for one in theirs])
    np.testing.assert_allclose(np.array([one[2:] for one in ours]), numbers, atol=1e-4)


def test_what_is_written(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "images" / "found"
    shutil.copytree(data / "images", images / "deeper")
    (images / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    Image.new("RGB", (70, 50), "white").save(images / "plain.bmp")
    words = ["predict", str(run), str(images), "--out", str(out), "--threshold", str(THRESHOLD), "--batch", "3", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["detrdistill", *words])
    cli.main()
    told = capsys.readouterr()
    results, listed = (json.loads((out / f"{name}.json").read_text()) for name in ("results", "images"))
    assert told.out == f"9 images, {len(results)} detections; 1 passed over\n{out}\n"
    assert told.err.count("\n") == 1 and told.err.startswith(f"passed over: {images / 'broken.jpg'} cannot be decoded")
    assert listed["categories"] == [{"id": id, "name": name} for id, name in zip((3, 17, 90), NAMES, strict=True)]
    assert {"id": 9, "file_name": "plain.bmp", "width": 70, "height": 50} in listed["images"] and len(listed["images"]) == 9
    assert 0 < len(results) < 9 * 15 and min(one["score"] for one in results) >= THRESHOLD
    lines = list(csv.reader((out / "detections.csv").read_text().splitlines()))
    names = dict(zip((3, 17, 90), NAMES, strict=True))
    assert tuple(lines[0]) == HEADER and len(lines) == 1 + len(results)
    for line, one in zip(lines[1:], results, strict=True):
        assert line[:2] == [one["file_name"], names[one["category_id"]]]
        assert [float(x) for x in line[2:]] == pytest.approx([one["score"], *one["bbox"]], abs=0.051)
    drawn = {path.relative_to(out / "images").as_posix() for path in (out / "images").rglob("*.*")}
    assert drawn == {f"deeper/{number}.png" for number in (0, 1, 2, 3, 100, 101, 102, 103)} | {"plain.bmp.png"}
    cli.main()
    assert capsys.readouterr().out == told.out, "what it wrote into the folder is not taken for images of it"


def test_images_are_seen_upright(tmp_path: Path) -> None:
    """As viewers show them, whatever the format."""
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :40] = 255
    for name in ("turned.jpg", "turned.png"):
        exif = Image.Exif()
        exif[0x0112] = 6  # the right side is the top
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
        image = read_upright(tmp_path / name)
        assert image.size == (40, 80) and image.getpixel((20, 10)) == (255, 255, 255) and image.getpixel((20, 70)) == (0, 0, 0)


def test_boxes_and_labels_are_drawn() -> None:
    picture = draw(
        Image.new("RGB", (600, 500), "black"), [(100, 200, 300, 400), (-50, -50, 700, 20)], ["cross 0.90", "é"], ["#ff0000", "#00ff00"]
    )
    seen = np.asarray(picture)
    assert (seen[300, 100] == (255, 0, 0)).all() and (seen[400, 200] == (255, 0, 0)).all() and not seen[300, 200].any()
    assert (seen[185:200, 100:160] == (255, 0, 0)).all(-1).mean() > 0.5, "the label lies above its box"
    assert draw(Image.new("RGB", (96, 64)), [], [], []).size == (480, 320)


def test_which_images_are_meant(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "mine") / "images"
    (root / ".hidden.png").write_bytes(b"")
    assert find_images(str(root / "10?.png"), tmp_path / "out") == (root, [root / f"{number}.png" for number in (100, 101, 102, 103)])
    assert find_images(str(root / "2.png"), tmp_path / "out") == (root, [root / "2.png"])
    assert (
        len(find_images(str(tmp_path / "mine"), tmp_path / "out")[1]) == 8
        and find_images(f"{tmp_path}/*/images/*0.png", root / "x")[0] == tmp_path
    )


def test_ids_are_those_of_the_run_s_data(run: Path, tmp_path: Path) -> None:
    """Of the digits too, whose ids count from 1; without data COCO's, or counted from 0."""
    for path in (run, run / "weights.safetensors"):
        assert open_model(str(path), "cpu").ids == (3, 17, 90)
    digits = Digits(train=1, val=1)
    record = read_record(run / "record.json")
    (tmp_path / "record.json").write_text(record_text(record.model_copy(update={"recipe": record.recipe.replace(data=digits)})))
    known = ids_of_run(tmp_path)
    assert known == {one.name: one.id for one in open_dataset(digits, "val", data_cache(), None).categories}
    assert ids_of_outputs(["7", None, "0"], known) == (8, None, 1)
    assert ids_of_run(tmp_path / "other.pth") == {} and ids_of_outputs(["b", None, "a"], {}) == (0, None, 1)
    assert [id for id in ids_of_outputs(COCO_91, {}) if id is not None] == [id for id, name in enumerate(COCO_91) if name]


def test_outputs_are_found_by_name() -> None:
    """Capitals count where classes differ by them alone."""
    assert outputs_by_name(["Traffic light", None, "cat", "Cat"], ["CAT", "cat", "Cat", "traffic  Light", "dog"]) == (3, 2, 3, 0, None)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ("images", ("--threshold", "1.5"), "threshold 1.5: a score from 0 to 1"),
        ("images", ("--threshold", "nan"), "threshold nan: a score from 0 to 1"),
        ("images", ("--batch", "0"), "batch 0: a number of images"),
        ("images", ("--out", "instances_val.json/x"), "instances_val.json is a file; move it away"),
        ("absent", (), "images absent: no such file or folder"),
        ("images/*.tif", (), "images images/*.tif: no image there"),
        ("instances_val.json", (), "images instances_val.json: none can be read: instances_val.json cannot be decoded"),
        ("images", ("--device", "tpu"), "device 'tpu' is unknown"),
        ("images", ("--set", "lr=1"), "setting 'lr' is none that a detector takes; known are heads"),
    ],
)
def test_refusals(
    images: str, options: tuple[str, ...], message: str, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """One line, and nothing is written."""
    shutil.copytree(data, tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["detrdistill", "predict", str(run), images, *options])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_without_names_is_refused(data: Path, tmp_path: Path) -> None:
    import torch

    from tests.models.small import small_detector

    torch.save({"state_dict": small_detector("adamixer").state_dict()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="does not say its classes; name its 3 outputs as 'outputs'"):
        open_model(str(tmp_path / "w.pth"), "cpu")
    assert open_model(str(tmp_path / "w.pth"), "cpu", NAMES, {"resize.short": "64"}).names == tuple(NAMES)

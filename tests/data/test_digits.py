"""The embedded data set: reproducible, disjoint, verified, and never half there."""

import json
import logging
import multiprocessing
import os
import signal
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrdistill.data import digits
from detrdistill.data.digits import PHOTOS, SPLITS, VAL_DIGITS, damage, write_digits
from detrdistill.errors import InputError
from detrdistill.recipes.parts import Digits

SPEC = Digits(size=64, train=24, val=12, seed=3)
GOLDEN = (1, ["f210f01f38b2", "011b8b1823b9", "db8c9af59dfe", "da0f4b0b65fd", "f01465d6dbd4"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_digits(SPEC, tmp_path_factory.mktemp("digits"))


def content(folder, split):
    return json.loads((folder / f"instances_{split}.json").read_text())


def pixels(folder, image):
    return np.asarray(Image.open(folder / "images" / image["file_name"]))


def test_same_seed_same_bytes_other_seed_other_data(folder, tmp_path):
    again = write_digits(SPEC, tmp_path)
    assert again.name == folder.name
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert files == {path.relative_to(again) for path in again.rglob("*") if path.is_file()}
    assert len(files) == SPEC.train + SPEC.val + 4
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in files)
    other = write_digits(SPEC.replace(seed=4), tmp_path)
    assert other != again
    assert not {i["sha256"] for i in content(other, "train")["images"]} & {i["sha256"] for i in content(folder, "train")["images"]}


def test_pixels_are_these_on_every_machine(tmp_path):
    """Golden: a change of the drawing must raise REVISION, or old caches and new ones would share a name."""
    folder = write_digits(Digits(size=40, train=3, val=2, seed=0), tmp_path)
    hashes = [image["sha256"][:12] for split in SPLITS for image in content(folder, split)["images"]]
    assert (digits.REVISION, hashes) == GOLDEN


def test_small_set_begins_the_large_one(folder, tmp_path):
    small = write_digits(SPEC.replace(train=5, val=2), tmp_path)
    for split, n in (("train", 5), ("val", 2)):
        assert content(small, split)["images"] == content(folder, split)["images"][:n]


def test_splits_share_neither_digits_nor_photographs(folder):
    train, val = (content(folder, split) for split in SPLITS)
    assert max(a["sample"] for a in train["annotations"]) < 1797 - VAL_DIGITS <= min(a["sample"] for a in val["annotations"])
    assert not set(PHOTOS["train"]) & set(PHOTOS["val"])
    assert {i["photo"] for i in train["images"]} <= set(PHOTOS["train"])
    assert {i["photo"] for i in val["images"]} <= set(PHOTOS["val"])


def test_annotations_describe_the_pixels(folder):
    for split in SPLITS:
        data = content(folder, split)
        assert [c["name"] for c in data["categories"]] == list("0123456789")
        for image in data["images"]:
            assert sha256(pixels(folder, image).tobytes()).hexdigest() == image["sha256"]
            boxes = [a["bbox"] for a in data["annotations"] if a["image_id"] == image["id"]]
            assert 1 <= len(boxes) <= digits.MOST_OBJECTS
            assert all(x >= 0 and y >= 0 and x + w <= SPEC.size and y + h <= SPEC.size for x, y, w, h in boxes)
            assert all(digits._overlap(a, b) <= digits.MOST_OVERLAP for k, a in enumerate(boxes) for b in boxes[:k])
        assert all(a["area"] == a["bbox"][2] * a["bbox"][3] and a["iscrowd"] == 0 for a in data["annotations"])


def test_boxes_are_tight_around_ink():
    rng = np.random.default_rng(0)
    for _ in range(50):
        alpha = digits._ink(rng.integers(0, 256, (8, 8), dtype=np.uint8), 24, 20) >= 64
        assert alpha[0].any() and alpha[-1].any() and alpha[:, 0].any() and alpha[:, -1].any()


def test_digit_differs_from_its_ground_in_luminance():
    rng = np.random.default_rng(0)
    for level in (0, 100, 128, 255):
        colour = digits._colour(rng, np.full((5, 4, 3), level))
        assert abs(colour @ [77, 150, 29] // 256 - level) >= digits.CONTRAST - 1


@pytest.mark.parametrize("harm", ["pixel", "annotation", "missing", "sums", "empty folder", "a file"])
def test_damaged_cache_is_noted_and_rewritten(tmp_path, caplog, harm):
    spec = SPEC.replace(train=3, val=2)
    folder = write_digits(spec, tmp_path)
    before = (folder / "SHA256SUMS").read_bytes()
    image = folder / "images" / "train" / "000001.png"
    if harm == "pixel":
        image.write_bytes(image.read_bytes()[:-20] + b"x" * 20)
    elif harm == "annotation":
        text = (folder / "instances_val.json").read_text()
        (folder / "instances_val.json").write_text(text.replace('"category_id":', '"category_id":1', 1))
    elif harm == "missing":
        image.unlink()
    elif harm == "sums":
        (folder / "SHA256SUMS").write_text("nothing of the kind\n")
    else:
        folder.rename(tmp_path / "away")
        folder.mkdir() if harm == "empty folder" else folder.write_text("")
    with caplog.at_level(logging.WARNING):
        assert write_digits(spec, tmp_path) == folder
    assert len(caplog.messages) == 1 and "is damaged" in caplog.text and folder.name in caplog.text
    assert damage(folder, spec) == "" and (folder / "SHA256SUMS").read_bytes() == before


def test_intact_cache_is_used_from_a_read_only_folder(tmp_path):
    folder = write_digits(SPEC.replace(train=2, val=2), tmp_path)
    stamp = folder.stat().st_mtime_ns
    tmp_path.chmod(0o555)
    try:
        assert write_digits(SPEC.replace(train=2, val=2), tmp_path).stat().st_mtime_ns == stamp
    finally:
        tmp_path.chmod(0o755)


def test_killed_writer_leaves_nothing_half(tmp_path):
    spec = SPEC.replace(train=3000)
    writer = multiprocessing.get_context("spawn").Process(target=write_digits, args=(spec, tmp_path))
    writer.start()
    while not list(tmp_path.glob(".digits-*.part/new/images/train/000010.png")):
        assert writer.is_alive()
        writer.join(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert not list(tmp_path.glob("digits-*"))
    [leftover] = tmp_path.glob(".digits-*.part")
    # The next writer of this recipe clears it away; a smaller stand-in for the 3000 images, under the same name.
    small = spec.replace(train=3, val=2)
    mine = leftover.with_name(f".{write_digits(small, tmp_path / 'other').name}.abc.part")
    leftover.rename(mine)
    assert damage(write_digits(small, tmp_path), small) == ""
    assert not mine.exists() and not list(tmp_path.glob(".digits-*.part"))


def test_two_processes_at_once_end_well(tmp_path):
    spec = SPEC.replace(train=40, val=2)
    writers = [multiprocessing.get_context("spawn").Process(target=write_digits, args=(spec, tmp_path)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert damage(next(tmp_path.glob("digits-*")), spec) == "" and not list(tmp_path.glob(".*.part"))


def test_missing_photograph_and_blocked_folder_are_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file; move it away"):
        write_digits(SPEC, tmp_path / "file")
    monkeypatch.setitem(PHOTOS["val"], "no_such.png", ("00", ""))
    with pytest.raises(InputError, match=r"no_such\.png is missing or another one; install scikit-image"):
        write_digits(SPEC, tmp_path / "new")
    assert not list(Path(tmp_path / "new").glob("*digits*/"))

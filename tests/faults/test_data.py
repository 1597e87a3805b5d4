"""Every fault of annotations, images and paths is reported or refused by id when a folder is opened, never met in a later epoch."""

import errno
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import EpsImagePlugin, Image
from torch import Tensor

from detrdistill import commands
from detrdistill.criterion import SetCriterion
from detrdistill.data.coco import CocoDataset, collate
from detrdistill.data.crops import object_crops
from detrdistill.data.images import read_image
from detrdistill.data.summary import look_at_images
from detrdistill.data.transforms import build_transform
from detrdistill.errors import InputError
from detrdistill.matching import match
from detrdistill.models.outputs import DetectorOutput, Targets
from detrdistill.recipes.parts import Resize
from detrdistill.report.page import Section, write_page
from detrdistill.training.evaluation import evaluate
from tests.folders import read_split, write_folder, write_split
from tests.models.small import KINDS, small_detector

EVALUATION = build_transform(Resize(train="none", short=32, long=64), train=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Image 1 is 64 x 48 and has the annotations 10 and 11."""
    return write_folder(tmp_path / "mine")


def opened(root: Path) -> CocoDataset:
    return CocoDataset(root / "instances_train.json", root / "images", EVALUATION)


def change(root: Path, section: str, number: int, **changes: Any) -> None:
    content = read_split(root, "train")
    next(entry for entry in content[section] if entry["id"] == number).update(changes)
    write_split(root, "train", content)


def set_loss(output: DetectorOutput, targets: Targets) -> dict[str, Tensor]:
    criterion = SetCriterion()
    return criterion(output, targets, match(criterion.problems(output, targets)))


def png(path: Path, width: int, height: int) -> None:
    """A file whose header promises black and white pixels, and whose pixels cannot be decoded: whoever tries is found out."""
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))  # noqa: E731
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"no pixels") + chunk(b"IEND", b""))


REPORTED = {
    "box of no area": ({"bbox": [5, 5, 0, 10]}, "bbox [5, 5, 0, 10] has no width or no height", "drop"),
    "box of negative size": ({"bbox": [5, 5, 9, -10]}, "bbox [5, 5, 9, -10] has no width or no height", "drop"),
    "box with NaN": ({"bbox": [5, float("nan"), 9, 10]}, "bbox is [5, nan, 9, 10], not four finite numbers", "drop"),
    "box partly outside": ({"bbox": [60, 5, 9, 10]}, "bbox [60, 5, 9, 10] reaches out of the image of 64 x 48", "clip"),
    "box outside": ({"bbox": [64, 5, 9, 10]}, "bbox [64, 5, 9, 10] lies outside the image of 64 x 48", "drop"),
    "unknown category": ({"category_id": 4}, "category_id 4 is not among the categories", "drop"),
    "no such image": ({"image_id": 77}, "image_id 77 is not among the images", "drop"),
    "neither crowd nor not": ({"iscrowd": 2}, "iscrowd is 2, not 0 or 1", "drop"),
    "area NaN": ({"area": float("nan")}, "area is nan; width times height is used", "repair"),
}


@pytest.mark.parametrize("fault", REPORTED)
def test_annotation_faults_are_reported(fault: str, root: Path, tries, capsys: pytest.CaptureFixture) -> None:
    changes, text, policy = REPORTED[fault]
    change(root, "annotations", 10, **changes)
    with tries(fault):
        commands.check(root)
        told = capsys.readouterr().out
        image = "image 77" if "image_id" in changes else "image 1 (1.png)"
        assert f"{image}, annotation 10: {text}" in told and f"({policy})" in told
        labels = opened(root)[1][1]["labels"]
        assert len(labels) == (1 if policy == "drop" else 2)


def test_ids_used_twice(root: Path, tries, capsys: pytest.CaptureFixture) -> None:
    change(root, "annotations", 11, id=10)
    with tries("annotation id used twice"):
        commands.check(root)
        assert "image 1 (1.png), annotation 10: id 10 is used twice; 32 is used" in capsys.readouterr().out
        assert len(opened(root)[1][1]["labels"]) == 2
    change(root, "images", 2, id=1)
    with tries("image id used twice"), pytest.raises(InputError, match=r"instances_train\.json: image 1: this image id is used twice"):
        commands.check(root)


def test_images_without_boxes_and_crowds(root: Path, tries, capsys: pytest.CaptureFixture) -> None:
    content = read_split(root, "train")
    content["annotations"] = [one | {"iscrowd": int(one["image_id"] != 1)} for one in content["annotations"] if one["image_id"] != 0]
    write_split(root, "train", content)
    with tries("image without boxes, crowds only"):
        commands.check(root)
        assert "4 images, 6 annotations, 0 faults" in capsys.readouterr().out
        data = opened(root)
        batch = collate([data[i] for i in (0, 2, 3)])
        assert batch.targets.counts == [0] * 3
        detector = small_detector("conditional")
        (output,) = detector.train().decode(memory := detector.encode(batch.pixels, batch.padding), detector.queries(memory))
        losses = set_loss(output, batch.targets)
        assert all(value.isfinite().all() for value in losses.values())
    content["annotations"] = [one | {"iscrowd": 1} for one in content["annotations"]]
    write_split(root, "train", content)
    with (
        tries("crowds and nothing else"),
        pytest.raises(InputError, match=r"train\.json: 0 objects, 6 crowds: all 6 annotations"),
    ):
        commands.check(root)


def outside(root: Path) -> None:
    Image.new("RGB", (64, 48)).save(root / "outside.png")
    (root / "images" / "link.png").symlink_to(root / "outside.png")
    (root / "images" / "up").symlink_to(root)
    (root / "images" / "loop.png").symlink_to("loop.png")
    (root / "images" / "chapter").mkdir()


# What image 1 is changed to, what harms its file, what is said, and what is to be done.
REFUSED = {
    "missing file": ({"file_name": "no.png"}, r"file_name 'no\.png' is missing in .*images; correct the file or the folder"),
    "path ../": ({"file_name": "../outside.png"}, r"'\.\./outside\.png' leads out of .*images; images must lie inside"),
    "path a/../../b": ({"file_name": "chapter/../../outside.png"}, "leads out of .*images; images must lie inside"),
    "absolute path": ({"file_name": "/etc/hostname"}, "'/etc/hostname' leads out of .*images; images must lie inside"),
    "link out": ({"file_name": "link.png"}, "'link.png' leads out of .*images; images must lie inside"),
    "linked folder": ({"file_name": "up/outside.png"}, "'up/outside.png' leads out of .*images; images must lie inside"),
    "link to itself": ({"file_name": "loop.png"}, "'loop.png' (in .* cannot be read|is missing|leads out).*correct the file"),
    "folder as image": ({"file_name": "chapter"}, "'chapter' in .* is not a file; correct the file or the folder"),
    "NUL in a name": ({"file_name": "1.png\0"}, "has letters that cannot be printed; correct the file"),
    "escape code in a name": ({"file_name": "\x1b[2J\n1.png"}, "has letters that cannot be printed; correct the file"),
    "wrong size": ({"width": 65}, r"1\.png has 64 x 48 pixels, the annotations say 65 x 48; correct width and height and its boxes"),
    "sides swapped": ({"width": 48, "height": 64}, "has 64 x 48 pixels, the annotations say 48 x 64; correct width and height"),
    "size of no pixels": ({"width": 0}, "width 0, height 48; whole numbers of pixels above 0 are needed"),
    "thinner than a hair": ({"width": 5000, "height": 1}, "the longer side may be 100 times the shorter, so cut the image into parts"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_image_faults_are_refused(fault: str, root: Path, tries) -> None:
    outside(root)
    changes, text = REFUSED[fault]
    change(root, "images", 1, **changes)
    with tries(fault), pytest.raises(InputError, match=rf"^{root}/instances_train\.json: image 1: .*{text}") as refusal:
        commands.check(root)
    assert str(refusal.value).isprintable()


def test_a_file_that_cannot_be_read_is_not_called_damaged(root: Path, monkeypatch: pytest.MonkeyPatch, tries) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", full)
    with tries("too many open files"), pytest.raises(InputError, match=r"1\.png cannot be read \(Too many open files\); make it readable"):
        read_image(root / "images" / "1.png", 64, 48)


HARMS = {
    "file of text": (lambda path: path.write_text("no image"), "cannot be decoded .*; replace the file by a whole BMP, GIF, JPEG"),
    "empty file": (lambda path: path.write_bytes(b""), "cannot be decoded .*; replace the file"),
    "cut in its header": (lambda path: path.write_bytes(path.read_bytes()[:20]), "cannot be decoded .*; replace the file"),
    "bomb of 10 gigapixels": (lambda path: png(path, 100_000, 100_000), "cannot be decoded .*decompression bomb.*; replace the file"),
    "bomb under a small size": (lambda path: png(path, 13_000, 13_000), "has 13000 x 13000 pixels, the annotations say 64 x 48; correct"),
}


@pytest.mark.parametrize("fault", HARMS)
def test_image_files_are_refused(fault: str, root: Path, tries) -> None:
    harm, text = HARMS[fault]
    harm(root / "images" / "1.png")
    with tries(fault), pytest.raises(InputError, match=rf"instances_train\.json: image 1: .*1\.png {text}") as refusal:
        commands.check(root)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_images_cut_in_their_pixels(kind: str, root: Path, tries, times) -> None:
    """Headers are whole, so only decoding finds out; `look_at_images` does, before training."""
    path = root / "images" / f"cut.{kind}"
    Image.open(root / "images" / "1.png").save(path)
    change(root, "images", 1, file_name=path.name)
    whole, count = path.read_bytes(), times(4, 60)
    for k in range(count):
        path.write_bytes(whole[: len(whole) * (count + k) // (3 * count)])
        with tries("image cut in its pixels"):
            data = opened(root)
            [fault] = look_at_images(data)[0]
            assert fault.startswith(f"image 1: {path} cannot be decoded") and "\n" not in fault
            with pytest.raises(InputError, match=r"^image 1: .*; replace the file"):
                data[1]


def test_a_vanished_image_is_named(root: Path, tries) -> None:
    data = opened(root)
    (root / "images" / "1.png").unlink()
    with tries("image gone while training"), pytest.raises(InputError, match=r"image 1: .*1\.png is missing; put the file back"):
        data[1]


def test_an_image_runs_no_program(root: Path, tmp_path: Path, tries, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    path, ran = root / "images" / "1.png", tmp_path / "ghostscript ran"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EndComments\n")
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{ran}'\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # what it found out before
    with tries("PostScript as image"), pytest.raises(InputError, match=r"image 1: .*1\.png cannot be decoded"):
        opened(root).load_image(1)
    assert not ran.exists()
    with pytest.raises(OSError), Image.open(path) as image:
        image.load()
    assert ran.exists(), "Pillow runs it where it is let"


MARKUP = ["<script>alert('x')</script>", "</td><img src=x onerror=alert(1)>", "a & b", '"quoted" {0} %s', "\u202enamed backwards", "犬"]


def test_markup_in_category_names(root: Path, tmp_path: Path, tries, capsys: pytest.CaptureFixture) -> None:
    for name in MARKUP:
        for split in ("train", "val"):
            content = read_split(root, split)
            content["categories"][0]["name"] = name
            write_split(root, split, content)
        with tries("markup in a category name"):
            commands.check(root)
            assert "3 classes" in capsys.readouterr().out
            names = [category.name for category in opened(root).categories]
            page = write_page(tmp_path, name, [name], [Section(name, name, table=pd.DataFrame({"Class": names, name: names}), note=name)])
            text = page.read_text(encoding="utf-8")
            assert names[0] == name and "<script" not in text and "<img" not in text and "</td><" not in text.replace("</td></tr>", "")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2Jgone", "a\0", "\ud800", " ", 7, None])
def test_unprintable_category_names(name: object, root: Path, tries) -> None:
    content = read_split(root, "train")
    content["categories"][1]["name"] = name
    write_split(root, "train", content)
    with tries("unprintable category name"), pytest.raises(InputError, match=r"train\.json: category 17 has the name .*; every") as refusal:
        commands.check(root)
    assert str(refusal.value).isprintable()


def test_categories_that_differ_are_quoted(root: Path, tries) -> None:
    content = read_split(root, "val")
    content["categories"][1]["name"] = "<b>"
    write_split(root, "val", content)
    with tries("categories of the splits differ"), pytest.raises(InputError, match=r"val\.json: categories differ .*17 '<b>', 17 'disc'"):
        commands.check(root)


@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_objects_in_an_image(kind: str, root: Path, tries) -> None:
    content = read_split(root, "train")
    box = lambda k: [k % 60, k // 60 % 40, 3 + k % 2, 3 + k % 3]  # noqa: E731
    many = [{"id": k, "image_id": 1, "category_id": (3, 17, 90)[k % 3], "bbox": box(k)} for k in range(1, 10_001)]
    write_split(root, "train", content | {"annotations": many})
    with tries("10,000 objects in an image"):
        data = opened(root)
        batch = collate([data[i] for i in range(4)])
        assert batch.targets.counts == [0, 10_000, 0, 0] and len(object_crops(data, 8, seed=0)[0]) == 10_000
        detector = small_detector(kind).train()
        memory = detector.encode(batch.pixels, batch.padding)
        (output,) = detector.decode(memory, detector.queries(memory))
        losses = set_loss(output, batch.targets)
        sum(value.sum() for value in losses.values()).backward()
        assert all(p.grad.isfinite().all() for p in detector.parameters() if p.grad is not None)
        assert evaluate(detector, data, batch=4)[0]["AR100"] is not None


LARGE = """
import resource, sys
from pathlib import Path
from detrdistill.data.coco import CocoDataset
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = CocoDataset(Path(sys.argv[1]) / "instances_train.json", Path(sys.argv[1]) / "images", None)
print(len(data.coco.anns), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
@pytest.mark.timeout(600)
def test_large_json(root: Path, tries, times) -> None:
    """100 MB of json take at most 1.25 GB above what the process has before; 0.5 GB if half of them are outlines of objects, unused."""
    megabytes = times(5, 100)
    outline = {"segmentation": [[k * 1.25 for k in range(30)]]}
    for fault, extra, factor in (("json", {}, 12.5), ("json with outlines", outline, 5.0))[: times(1, 2)]:
        one = {"image_id": 1, "category_id": 3, "bbox": [1.5, 2.5, 30.25, 20.75], "area": 627.6875, "iscrowd": 0} | extra
        count = int(megabytes * 1e6 / (len(json.dumps(one | {"id": 100_000})) + 2))
        write_split(root, "train", read_split(root, "train") | {"annotations": [{"id": k} | one for k in range(1, count + 1)]})
        size = (root / "instances_train.json").stat().st_size
        assert 0.95 * megabytes < size / 1e6 < 1.05 * megabytes
        with tries(f"{megabytes} MB of {fault}"):
            # Without settings of malloc that keep what is freed.
            environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
            words = (sys.executable, "-c", LARGE, str(root))
            done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=True)
            found, kilobytes = map(int, done.stdout.split())
            assert found == count and 1024 * kilobytes < factor * size, f"{kilobytes / 1e6:.2f} GB"

"""Every fault of annotations has a policy and a readable line. (Faults made up by the thousand: tests/faults.)"""

import errno
import json
import math
import os
from copy import deepcopy
from pathlib import Path

import pytest
from PIL import Image

from detrdistill.data.validation import load_annotations, validate
from detrdistill.errors import InputError

GOOD = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 2, "file_name": "b.png", "width": 40, "height": 30},
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    "annotations": [
        {"id": 10, "image_id": 1, "category_id": 7, "bbox": [1, 2, 10, 12], "area": 100, "iscrowd": 0},
        {"id": 11, "image_id": 1, "category_id": 3, "bbox": [5, 5, 8, 8], "area": 64, "iscrowd": 1},
    ],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root") / "images"
    folder.mkdir()
    for name in "ab":
        Image.new("RGB", (40, 30)).save(folder / f"{name}.png")
    (folder / "inner.png").symlink_to("a.png")
    (folder / "sub").mkdir()
    return folder


def check(images, content):
    return validate(content, images.parent / "instances_train.json", images)


def with_annotation(**changes):
    content = deepcopy(GOOD)
    content["annotations"].append({"id": 12, "image_id": 2, "category_id": 7, "bbox": [1, 2, 10, 12], "area": 120, "iscrowd": 0} | changes)
    return content


def test_good_file_passes_unchanged(images):
    cleaned, report = check(images, GOOD)
    assert cleaned["annotations"] == GOOD["annotations"] and cleaned["images"] == GOOD["images"]
    assert report.faults == [] and "2 images, 2 annotations, 0 faults" in str(report)


def test_images_without_boxes_are_kept(images):
    cleaned, report = check(images, GOOD | {"annotations": GOOD["annotations"][:1]})
    assert len(cleaned["images"]) == 2 and len(cleaned["annotations"]) == 1 and not report


@pytest.mark.parametrize(
    "changes, kind, text",
    [
        ({"bbox": [1, 2, math.nan, 3]}, "box", "[1, 2, nan, 3], not four finite numbers"),
        ({"bbox": ["1", "2", "9.5", "3"]}, "box", "not four finite numbers (write them without quotes)"),
        ({"bbox": [1, math.inf, 2, 3]}, "box", "inf"),
        ({"bbox": [1, 2, "3", 3]}, "box", "'3'"),
        ({"bbox": [True, 2, 3, 3]}, "box", "True"),
        ({"bbox": [1, 2, 3]}, "box", "[1, 2, 3]"),
        ({"bbox": {"x": 1}}, "box", "{'x': 1}"),
        ({"bbox": None}, "box", "None"),
        ({"bbox": [1, 2, 10**400, 3]}, "box", "..."),
        ({"bbox": [1, 2, 0, 3]}, "empty box", "[1, 2, 0, 3] has no width or no height"),
        ({"bbox": [1, 2, 3, -3]}, "empty box", "-3"),
        ({"bbox": [40, 2, 3, 3]}, "box outside", "outside the image of 40 x 30"),
        ({"bbox": [-9, -9, 9, 9]}, "box outside", "-9"),
        ({"category_id": 99}, "unknown category", "category_id 99"),
        ({"category_id": "7"}, "unknown category", "'7'"),
        ({"category_id": [7]}, "unknown category", "[7]"),
        ({"image_id": 5}, "unknown image", "image_id 5"),
        ({"image_id": True}, "unknown image", "True"),
        ({"image_id": {}}, "unknown image", "{}"),
        ({"iscrowd": 2}, "iscrowd", "2, not 0 or 1"),
        ({"iscrowd": "0"}, "iscrowd", "'0'"),
    ],
)
def test_unusable_annotation_is_dropped_and_listed(images, changes, kind, text):
    cleaned, report = check(images, with_annotation(**changes))
    assert [a["id"] for a in cleaned["annotations"]] == [10, 11]
    [fault] = report.faults
    assert (fault.kind, fault.policy, fault.annotation_id) == (kind, "drop", 12)
    assert fault.image_id == (2 if "image_id" not in changes else 5 if changes["image_id"] == 5 else None)
    assert text in fault.detail and f"1 x {kind} (drop)" in str(report) and "annotation 12" in str(report)


def test_entry_that_is_no_object_is_dropped(images):
    for entry in (None, 3, [1], "x"):
        _, report = check(images, GOOD | {"annotations": [*GOOD["annotations"], entry]})
        assert report.faults[0].policy == "drop" and "annotations[2]" in str(report)


def test_box_partly_outside_is_clipped(images):
    cleaned, report = check(images, with_annotation(bbox=[-5, 20, 10.5, 20]))
    assert cleaned["annotations"][-1]["bbox"] == [0, 20, 5.5, 10]
    assert [(f.kind, f.policy) for f in report.faults] == [("box partly outside", "clip")]
    cleaned, report = check(images, with_annotation(bbox=[30, 20, 10.005, 10]))
    assert cleaned["annotations"][-1]["bbox"] == [30, 20, 10, 10] and report.faults == []


REPAIRED = [(0, "id 0 is no number above 0"), (10, "id 10 is used twice"), (None, "None"), ("x", "'x'"), (-4, "-4")]


@pytest.mark.parametrize("number, text", REPAIRED)
def test_annotation_ids_are_repaired(images, number, text):
    cleaned, report = check(images, with_annotation(id=number))
    assert [a["id"] for a in cleaned["annotations"]] == [10, 11, 12]
    assert [f.policy for f in report.faults] == ["repair"] and text in str(report)


def test_annotation_listed_twice_is_dropped(images):
    cleaned, report = check(images, GOOD | {"annotations": GOOD["annotations"] * 2})
    assert len(cleaned["annotations"]) == 2 and {f.kind for f in report.faults} == {"duplicate annotation"}


@pytest.mark.parametrize("area", [math.nan, -1, "12", True, None])
def test_area_is_repaired(images, area):
    cleaned, report = check(images, with_annotation(area=area))
    assert cleaned["annotations"][-1]["area"] == 120 and report.faults[0].policy == "repair"


def test_area_and_iscrowd_may_be_left_out(images):
    content = GOOD | {"annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 5, 4]}]}
    cleaned, report = check(images, content)
    assert cleaned["annotations"][0]["area"] == 20 and cleaned["annotations"][0]["iscrowd"] == 0 and report.faults == []


def images_with(**changes):
    return GOOD | {"images": [GOOD["images"][0], GOOD["images"][1] | changes]}


REFUSED = [
    ([], "top level is a list"),
    (GOOD | {"images": {}}, r"section 'images' is \{\}, not a list"),
    ({"images": [], "annotations": []}, "section 'categories' is missing"),
    (GOOD | {"categories": []}, "'categories' is empty"),
    (GOOD | {"images": [], "annotations": []}, "section 'images' is empty; give at least one image"),
    (GOOD | {"categories": [{"id": 1}]}, "category 1 has the name None"),
    (GOOD | {"categories": [{"id": "1", "name": "a"}]}, r"categories\[0\] .* no whole number as 'id'"),
    (GOOD | {"categories": [3]}, r"categories\[0\] = 3"),
    (GOOD | {"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "category id 1 is used twice"),
    (GOOD | {"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}, "name 'a' is used twice, by category 2"),
    (images_with(id=1), "image 1: this image id is used twice"),
    (images_with(id=True), r"images\[1\] .* no whole number as 'id'"),
    (GOOD | {"images": [None]}, r"images\[0\] = None"),
    (images_with(width=0), "image 2: width 0, height 30; whole numbers"),
    (images_with(height=math.nan), "image 2: width 40, height nan"),
    (images_with(height="30"), "height '30'"),
    (images_with(width=True), "width True"),
    (images_with(width=10**400), "image 2: width 1000"),
    (images_with(file_name=None), "image 2: file_name is None, not text"),
    (images_with(file_name=""), "image 2: file_name is ''"),
    (images_with(file_name="\ud800.png"), "letters that cannot be printed"),
    (images_with(file_name="x" * 5000), "cannot be read"),
    (GOOD | {"annotations": [{"id": 1, "image_id": 1, "category_id": 9, "bbox": [1, 1, 2, 2]}]}, "none of 1 annotations can be used"),
    (
        GOOD | {"annotations": [{"id": n, "image_id": 1, "category_id": 7, "bbox": [0.1, 0.2, 0.5, 0.6]} for n in (1, 2)]},
        "as if relative to the image",
    ),
]


@pytest.mark.parametrize("content, message", REFUSED)
def test_doubtful_file_is_refused_in_one_line(images, content, message):
    with pytest.raises(InputError, match=message) as refusal:
        check(images, content)
    assert "instances_train.json" in str(refusal.value) and "\n" not in str(refusal.value) and len(str(refusal.value)) < 600


def test_links_and_detours_within_the_folder_are_allowed(images):
    with pytest.raises(InputError, match="leads out of"):
        check(images, images_with(file_name=str(images / "a.png")))
    assert check(images, images_with(file_name="inner.png"))[1].faults == []
    assert check(images, images_with(file_name="sub/../a.png"))[1].faults == []


def test_many_refused_images_are_counted(images):
    content = GOOD | {"images": [{"id": k, "file_name": f"no{k}.png", "width": 4, "height": 4} for k in range(1, 40)]}
    with pytest.raises(InputError, match=r"image 1: .*and 38 more: images 2, 3, 4.*11\)"):
        check(images, content)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 200_000, b'{"images": [' + b"1" * 5000 + b"]}"])
def test_broken_json_is_refused(images, tmp_path, text):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(InputError, match=r"x\.json: not valid JSON") as refusal:
        load_annotations(tmp_path / "x.json", images)
    assert "\n" not in str(refusal.value)
    with pytest.raises(InputError, match=r"y\.json: cannot be read"):
        load_annotations(tmp_path / "y.json", images)


def test_byte_order_mark_is_no_fault(images, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(GOOD), encoding="utf-8-sig")
    assert load_annotations(tmp_path / "x.json", images)[1].faults == []


def test_no_permission_is_named(images, tmp_path, monkeypatch):
    """Refused here rather than by the file system, which lets root read everything."""

    def refuse(self, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    (tmp_path / "x.json").write_text("{}")
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(InputError, match="cannot be read"):
        load_annotations(tmp_path / "x.json", images)

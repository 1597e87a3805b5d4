"""Folders as tools export them: each is recognised, said aloud, and gives the same objects; what is no pair of COCO files is converted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from detrdistill import commands
from detrdistill.data.coco import CocoDataset, open_dataset, require_same_categories
from detrdistill.data.layout import data_hash, how_found, layout
from detrdistill.errors import InputError
from detrdistill.files import file_hash
from detrdistill.recipes.identity import run_id, same_run
from detrdistill.recipes.parts import Folder
from detrdistill.recipes.presets import smoke
from detrdistill.runs.run import run
from detrdistill.runs.store import Store
from tests.folders import CATEGORIES, read_split, write_folder, write_split


def move(root: Path, splits: dict[str, str], images: str) -> Path:
    """The annotation files to where a tool has them, and each split's images beside their like."""
    for split, file in splits.items():
        content = read_split(root, split)
        (root / images.format(split)).mkdir(parents=True, exist_ok=True)
        for entry in content["images"]:
            source, target = root / "images" / entry["file_name"], root / images.format(split) / entry["file_name"]
            if source != target:
                source.rename(target)
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / f"instances_{split}.json").rename(root / file)
    if not any((root / "images").iterdir()):
        (root / "images").rmdir()
    return root


def both(pattern: str) -> dict[str, str]:
    return {split: pattern.format(split) for split in ("train", "val")}


def roboflow(root: Path) -> Path:
    for split in ("train", "val"):
        content = read_split(root, split)
        children = [one | {"supercategory": "things"} for one in content["categories"]]
        write_split(root, split, content | {"categories": [{"id": 0, "name": "things", "supercategory": "none"}, *children]})
    move(root, {"train": "train/_annotations.coco.json"}, "{}")
    move(root, {"val": "valid/_annotations.coco.json"}, "valid")
    shutil.copytree(root / "valid", root / "test")
    return root


def merged(root: Path, file: str) -> Path:
    """All images in one file."""
    train, val = read_split(root, "train"), read_split(root, "val")
    content = train | {name: train[name] + val[name] for name in ("images", "annotations")}
    for entry in content["images"] if file == "result.json" else ():
        entry["file_name"] = f"images\\{entry['file_name']}"
    for split in ("train", "val"):
        (root / f"instances_{split}.json").unlink()
    (root / file).parent.mkdir(exist_ok=True)
    (root / file).write_text(json.dumps(content))
    return root


def cvat(root: Path, train: str, val: str) -> Path:
    """CVAT's own names of subsets, and their images in folders of the same names."""
    for split, own in (("train", train), ("val", val)):
        move(root, {split: f"annotations/instances_{own}.json"}, f"images/{own}")
    return root


def yolo(root: Path, pose: bool = False) -> Path:
    names = [one["name"] for one in CATEGORIES]
    places = "path: /home/someone/data\ntrain: ../train/images\nval: ../valid/images\ntest: ../test/images\n"
    (root / "data.yaml").write_text(f"{places}names: {names}\n" + "kpt_shape: [2, 2]\n" * pose)
    for split, own in (("train", "train"), ("val", "valid")):
        content = read_split(root, split)
        move(root, {split: f"{own}/gone.json"}, f"{own}/images")
        (root / own / "gone.json").unlink()
        (root / own / "labels").mkdir()
        for entry in content["images"]:
            w, h, lines = entry["width"], entry["height"], []
            for one in content["annotations"]:
                if one["image_id"] == entry["id"]:
                    x, y, bw, bh = one["bbox"]
                    kind = [3, 17, 90].index(one["category_id"])
                    box = (x + bw / 2) / w, (y + bh / 2) / h, bw / w, bh / h
                    outline = x / w, y / h, (x + bw) / w, y / h, (x + bw) / w, (y + bh) / h, x / w, (y + bh) / h
                    points = (0.05, 0.05, 0.95, 0.95) if pose else ()
                    lines.append(" ".join(map(str, (kind, *(outline if one["category_id"] == 17 and not pose else box), *points))))
            (root / own / "labels" / entry["file_name"]).with_suffix(".txt").write_text("\n".join(lines))
    return root


def voc(root: Path, lists: bool = True) -> Path:
    (root / "Annotations").mkdir()
    (root / "images").rename(root / "JPEGImages")
    (root / "ImageSets" / "Main").mkdir(parents=True)
    names = {one["id"]: one["name"] for one in CATEGORIES}
    for split in ("train", "val"):
        content = read_split(root, split)
        (root / f"instances_{split}.json").unlink()
        for entry in content["images"]:
            objects = "".join(
                f"<object><name>{names[one['category_id']]}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}</xmax>"
                f"<ymax>{y + h}.0</ymax></bndbox></object>"
                for one in content["annotations"]
                if one["image_id"] == entry["id"]
                for x, y, w, h in [one["bbox"]]
            )
            size = f"<size><width>{entry['width']}</width><height>{entry['height']}</height><depth>3</depth></size>"
            text = f"<annotation><filename>{entry['file_name']}</filename>{size}{objects}</annotation>"
            (root / "Annotations" / entry["file_name"]).with_suffix(".xml").write_text(text)
        if lists:
            stems = [entry["file_name"].partition(".")[0] for entry in content["images"]]
            (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems))
    return root


def devkit(root: Path) -> Path:
    whole = voc(root).rename(root.with_name("whole"))
    (root / "VOCdevkit").mkdir(parents=True)
    whole.rename(root / "VOCdevkit" / "VOC2012")
    return root


LAYOUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "kit": (lambda root: root, ""),
    "coco": (lambda root: move(root, both("annotations/instances_{}2017.json"), "{}2017"), ""),
    "cvat": (lambda root: move(root, both("annotations/instances_{}.json"), "images"), "layout of CVAT"),
    "cvat-Validation": (lambda root: cvat(root, "Train", "Validation"), "layout of CVAT"),
    "cvat-validation": (lambda root: cvat(root, "train", "validation"), "layout of CVAT"),
    "rtdetr": (lambda root: move(root, both("annotations/instances_{}.json"), "{}"), "layout of RT-DETR and mmdetection"),
    "finetune": (lambda root: move(root, both("annotations/custom_{}.json"), "{}2017"), "layout of finetune-detr"),
    "roboflow": (roboflow, "layout of Roboflow"),
    "yolo": (yolo, "layout of YOLO, converted to COCO's"),
    "yolo-pose": (lambda root: yolo(root, pose=True), "layout of YOLO, converted to COCO's"),
    "voc": (voc, "layout of Pascal VOC, converted to COCO's"),
    "voc-devkit": (devkit, "layout of Pascal VOC, converted to COCO's"),
}
DIVIDED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "cvat-default": (
        lambda root: merged(root, "annotations/instances_default.json"),
        "CVAT, one subset, one file for all images",
    ),
    "label-studio": (lambda root: merged(root, "result.json"), "layout of Label Studio, one file for all images"),
    "voc-unlisted": (lambda root: voc(root, lists=False), "layout of Pascal VOC, converted to COCO's"),
}


def boxes(data: CocoDataset) -> dict[str, list[tuple]]:
    """What is drawn where, by the name of the file."""
    names = {category.id: category.name for category in data.categories}
    return {
        Path(data.coco.imgs[image]["file_name"]).name: sorted(
            (names[one["category_id"]], *(round(value, 2) for value in one["bbox"])) for one in data.coco.imgToAnns[image]
        )
        for image in data.ids
    }


@pytest.fixture
def original(tmp_path: Path) -> Callable[[str], dict]:
    root = write_folder(tmp_path / "original")
    return lambda split: boxes(CocoDataset(root / f"instances_{split}.json", root / "images", None))


def opened(root: Path, split: str, **fields: object) -> CocoDataset:
    return open_dataset(Folder(path=root, **fields), split, root.parent / "cache", None)


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_the_same_data(name: str, tmp_path: Path, original: Callable[[str], dict], capsys: pytest.CaptureFixture) -> None:
    build, said = LAYOUTS[name]
    root = build(write_folder(tmp_path / "mine"))
    train, val = opened(root, "train"), opened(root, "val")
    require_same_categories(train, val)
    assert boxes(train) == original("train") and boxes(val) == original("val")
    assert len(train.categories) == 3 and train.load_image(train.ids[0]).size in ((56, 64), (64, 48))
    how, has_test = how_found(Folder(path=root), tmp_path / "cache")
    assert said in how and bool(how) == bool(said) and has_test == (name == "roboflow")
    commands.check(root)
    shown = capsys.readouterr().out
    assert (shown.splitlines()[0] == how_found(Folder(path=root), tmp_path / "cache")[0]) == bool(said)
    assert "\ntrain: 4 images, 7 objects, 3 classes; " in f"\n{shown}" and "\nval: 4 images, 8 objects, 3 classes; " in shown


@pytest.mark.parametrize("name", DIVIDED)
def test_one_file_is_divided_by_a_stated_seed(name: str, tmp_path: Path, original: Callable[[str], dict]) -> None:
    build, said = DIVIDED[name]
    root = build(write_folder(tmp_path / "mine"))
    spec = Folder(path=root)
    splits = [boxes(opened(root, split)) for split in ("train", "val")]
    assert [len(one) for one in splits] == [6, 2] and splits[0] | splits[1] == original("train") | original("val")
    how = how_found(spec, tmp_path / "cache")[0]
    assert said in how and how.endswith("; 0.2 of the images validate (data.val_fraction), drawn with seed 0 (data.split_seed)")
    moved = root.rename(tmp_path / "moved")
    assert data_hash(Folder(path=moved), tmp_path / "other cache") == (before := data_hash(Folder(path=moved), tmp_path / "cache"))
    assert len(boxes(opened(moved, "val", val_fraction=0.5))) == 4
    drawn = {data_hash(Folder(path=moved, split_seed=seed), tmp_path / "cache") for seed in range(4)}
    assert before in drawn and len(drawn) > 1


def test_what_shows_one_picture_is_not_divided(tmp_path: Path) -> None:
    """Copies of a file, and what Roboflow makes of one photograph."""
    root = merged(write_folder(tmp_path / "mine"), "annotations/instances_default.json")
    file = root / "annotations" / "instances_default.json"
    content = json.loads(file.read_text())
    content["images"] = [entry | {"width": 64, "height": 48} for entry in content["images"]]
    for number, entry in enumerate(content["images"]):
        source = Image.new("RGB", (64, 48), (number // 4, 0, 0))
        entry["file_name"] = f"{number}.png" if number < 4 else f"photo_jpg.rf.{number}.png"
        source.save(root / "images" / entry["file_name"])
        source.putpixel((0, 0), (number, 9, 9)) if number >= 4 else None
        source.save(root / "images" / entry["file_name"])
    file.write_text(json.dumps(content))
    for seed in range(5):
        found = [sorted(boxes(opened(root, split, split_seed=seed))) for split in ("train", "val")]
        assert sorted(map(len, found)) == [4, 4] and ["0.png", "1.png", "2.png", "3.png"] in found, found


def test_a_training_file_is_divided_where_that_is_asked_for(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "mine")
    (root / "instances_val.json").unlink()
    with pytest.raises(InputError, match=r"no annotations of the split 'val'; .*; data\.val_fraction=0\.2 divides the training images$"):
        opened(root, "val")
    assert len(opened(root, "val", val_fraction=0.25)) == 1 and len(opened(root, "train", val_fraction=0.25)) == 3


def test_files_and_folders_can_be_named(tmp_path: Path, original: Callable[[str], dict]) -> None:
    root = write_folder(tmp_path / "mine")
    (root / "instances_train.json").rename(root / "a.json")
    (root / "instances_val.json").rename(root / "b.json")
    (root / "images").rename(root / "pictures")
    fields = {"train": "a.json", "val": "b.json", "train_images": "pictures"}
    assert boxes(opened(root, "train", **fields)) == original("train") and boxes(opened(root, "val", **fields)) == original("val")
    for wrong, message in (
        ({"train": "c.json"}, r"data\.train = c\.json is not there"),
        ({"val_images": "no"}, r"data\.val_images = .*no is not there"),
        ({"train": None}, "data.val is stated and data.train is not"),
    ):
        with pytest.raises(InputError, match=message):
            opened(root, "train", **fields | wrong)
    commands.check(root, set=("data.train=a.json", "data.val=b.json", "data.train_images=pictures"))
    with pytest.raises(InputError, match="unknown parameter 'tran'"):
        commands.check(root, set=("data.tran=a.json",))


def test_where_the_files_lie_does_not_name_a_run(tmp_path: Path) -> None:
    recipes = [
        smoke().student.replace(data=Folder(path=tmp_path, sha256="a" * 64, **fields)) for fields in ({}, {"train": "a", "val": "b"})
    ]
    assert run_id(recipes[0]) == run_id(recipes[1]) and same_run(*recipes)
    unknown = [smoke().student.replace(data=Folder(path=tmp_path, **fields)) for fields in ({}, {"train": "a", "val": "b"})]
    assert run_id(unknown[0]) != run_id(unknown[1])


def test_the_hash_of_a_pair_of_files_is_that_of_their_bytes(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "mine")
    (tmp_path / "joined").write_bytes((root / "instances_train.json").read_bytes() + (root / "instances_val.json").read_bytes())
    assert data_hash(Folder(path=root), tmp_path) == file_hash(tmp_path / "joined")
    shutil.copy(root / "instances_val.json", root / "instances_test.json")
    assert data_hash(Folder(path=root), tmp_path) == file_hash(tmp_path / "joined"), "a test file changes nothing trained"


def test_a_conversion_is_made_anew_when_a_file_changes(tmp_path: Path) -> None:
    root = yolo(write_folder(tmp_path / "mine"))
    first = layout(Folder(path=root), "train", tmp_path / "cache")[0]
    written = first.stat().st_mtime_ns
    assert layout(Folder(path=root), "train", tmp_path / "cache")[0].stat().st_mtime_ns == written
    (root / "train" / "labels" / "1.txt").write_text("0 0.5 0.5 0.25 0.25\n1 0.5 0.5 x 0.25\n7 0.5 0.5 0.1 0.1\ndog 0.5 0.5 0.1 0.1\n")
    report = opened(root, "train").report
    assert layout(Folder(path=root), "train", tmp_path / "cache")[0] != first
    (image,) = (number for number, entry in opened(root, "train").coco.imgs.items() if entry["file_name"] == "train/images/1.png")
    where = f"image {image} (train/images/1.png), annotation"
    told = [str(fault) for fault in report.faults]
    assert [fault.split(": ", 1)[0].rstrip("0123456789 ") for fault in told] == [where] * 3, (
        "the number is the conversion's, the name theirs"
    )
    assert "bbox is ['0.5', '0.5', 'x', '0.25']" in told[0] and "category_id 'class 7' is not among the categories" in told[1]
    assert "category_id 'class dog' is not among" in told[2] and report.annotations == 9


def listed(root: Path, line: str) -> None:
    """The training images in a list."""
    Image.new("RGB", (8, 8)).save(root.parent / "out.png")
    (root / "list.txt").write_text(f"train/images/1.png\n{line}\n")
    (root / "data.yaml").write_text("names: [a, b, c]\ntrain: list.txt\nval: valid/images\n")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda root: (root / "data.yaml").write_text("names: [a\n"), r"data\.yaml: not valid YAML"),
        (lambda root: (root / "data.yaml").write_text("names: 3\ntrain: x\n"), r"data\.yaml: names is 3; give a list"),
        (lambda root: (root / "data.yaml").write_text("names: [a]\ntrain: /etc\nval: x\n"), r"train is '/etc', which is not there within"),
        (lambda root: (root / "train" / "images" / "1.png").write_text("no image"), r"1\.png cannot be decoded"),
        (lambda root: (root / "train" / "labels" / "1.txt").write_bytes(b"\xff\xfe\x00"), r"1\.txt: cannot be read"),
        (lambda root: listed(root, "../out.png"), r"'.*out\.png' leads out of .*mine"),
        (lambda root: listed(root, "train/images/77.png"), r"77\.png is missing"),
        (lambda root: shutil.rmtree(root / "train" / "labels"), r"instances_train\.json: no objects, so AP cannot be measured"),
    ],
)
def test_bad_yolo_files_are_one_line(harm: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    root = yolo(write_folder(tmp_path / "mine"))
    harm(root)
    with pytest.raises(InputError, match=message) as refusal:
        opened(root, "train")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", r"1\.xml: not valid XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation/>', r"1\.xml: declares entities"),
        ("<annotation><filename>../../up.png</filename><size/></annotation>", ""),
    ],
)
def test_bad_voc_files_are_one_line(text: str, message: str, tmp_path: Path) -> None:
    root = voc(write_folder(tmp_path / "mine"))
    (root / "Annotations" / "1.xml").write_text(text)
    if not message:  # the image of the file's own name is taken, and its size read from it
        assert "1.png" in boxes(opened(root, "train"))
        return
    with pytest.raises(InputError, match=message):
        opened(root, "train")
    (root / "Annotations" / "1.xml").unlink()
    with pytest.raises(InputError, match=r"train\.txt: '1' has no file in .*Annotations"):
        opened(root, "train")


def test_voc_s_own_pixels_count_from_one_and_difficult_objects_are_crowds(tmp_path: Path) -> None:
    root = voc(write_folder(tmp_path / "mine"))
    text = (root / "Annotations" / "1.xml").read_text()
    text = text.replace("<annotation>", "<annotation><source><database>The VOC2007 Database</database></source>")
    (root / "Annotations" / "1.xml").write_text(text.replace("<bndbox>", "<difficult>1</difficult><bndbox>", 1))
    data = opened(root, "train")
    first, second = (one for entry in data.coco.imgs.values() if entry["file_name"] == "1.png" for one in data.coco.imgToAnns[entry["id"]])
    assert (first["bbox"], first["iscrowd"]) == ([3, 5, 21, 25], 1) and second["iscrowd"] == 0


@pytest.mark.parametrize("split", ["val", "test"])
def test_classes_that_differ_are_refused_before_anything_is_trained(split: str, tmp_path: Path) -> None:
    root, store = roboflow(write_folder(tmp_path / "mine")), Store(tmp_path / "results")
    file = root / {"val": "valid"}.get(split, split) / "_annotations.coco.json"
    content = json.loads(file.read_text())
    content["categories"][-1]["name"] = "ring"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"categories differ from those of .* \(90 'bar', 90 'ring'\)"):
        run(smoke().recipe("detrdistill").replace(data=Folder(path=root)), store, device="cpu", progress=False)
    assert not list(store.root.glob("runs/*"))


def test_a_test_split_is_measured_and_stands_in_the_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, store = roboflow(write_folder(tmp_path / "mine")), Store(tmp_path / "results")
    changes = {"backbone.weights": "none", "schedule.steps": 1, "schedule.batch": 2, "data": Folder(path=root)}
    with pytest.warns(UserWarning, match="random weights"):
        record = run(smoke().student.replace(**changes), store, device="cpu", progress=False)
    assert record.test is not None and record.test.keys() == record.metrics.keys()
    assert store.record(record.recipe) == record
    assert "layout of Roboflow" in caplog.text and "4 of 4 files are files of the training" not in caplog.text
    content = json.loads((root / "test" / "_annotations.coco.json").read_text())
    (root / "test" / "_annotations.coco.json").write_text(json.dumps(content | {"annotations": []}))
    with pytest.warns(UserWarning, match="random weights"):
        again = run(smoke().student.replace(**changes | {"seed": 1}), store, device="cpu", progress=False)
    assert again.test is None and "test" not in json.loads((store.folder(again.recipe) / "record.json").read_text())
    assert "no objects, so AP cannot be measured" in caplog.text

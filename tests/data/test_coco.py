"""Data sets, batches and crops: ids with gaps, crowds, odd images, and samples that depend on (index, seed) alone."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CocoDetection

from detrdistill.data.coco import Category, CocoDataset, collate, data_hash, open_dataset, require_same_categories
from detrdistill.data.crops import object_crops
from detrdistill.data.transforms import build_transform
from detrdistill.errors import InputError
from detrdistill.recipes.parts import MEAN, STD, Digits, Folder, Resize
from detrdistill.training.batches import loading

EVALUATION = build_transform(Resize(train="none", short=32, long=64), train=False)
JITTER = build_transform(Resize(train="jitter", short=32, long=64), train=True)
CATEGORIES = [{"id": 90, "name": "brush"}, {"id": 4, "name": "plane"}, {"id": 17, "name": "cat"}]


def annotation(number, image_id, category_id, bbox, crowd=0):
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox, "iscrowd": crowd}


ANNOTATIONS = [
    annotation(1, 5, 90, [0, 0, 16, 16]),
    annotation(2, 5, 4, [16, 8, 32, 16], crowd=1),
    annotation(3, 5, 17, [16, 8, 32, 16]),
    annotation(4, 2, 4, [4, 4, 8, 8]),
]


@pytest.fixture
def folder(tmp_path):
    """Image 2 is 32 x 32, image 5 64 x 32 (width x height), image 9 is 32 x 64 and without boxes."""
    (tmp_path / "images").mkdir()
    sizes = {2: (32, 32), 5: (64, 32), 9: (32, 64)}
    for number, (w, h) in sizes.items():
        noise = np.random.default_rng(number).integers(0, 256, (h, w, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{number}.png")
    images = [{"id": n, "file_name": f"{n}.png", "width": w, "height": h} for n, (w, h) in sizes.items()]
    for split in ("train", "val"):
        write(tmp_path, split, {"images": images, "annotations": ANNOTATIONS, "categories": CATEGORIES})
    return tmp_path


def write(folder, split, content):
    (folder / f"instances_{split}.json").write_text(json.dumps(content))


def read(folder, split):
    return json.loads((folder / f"instances_{split}.json").read_text())


def opened(folder, transform=EVALUATION, split="train"):
    return open_dataset(Folder(path=folder), split, folder / "cache", transform)


def test_class_indices_are_contiguous_over_gaps_in_ids(folder):
    data = opened(folder)
    assert isinstance(data, CocoDetection) and len(data) == 3 and data.ids == [2, 5, 9]
    assert data.categories == [Category(0, 4, "plane"), Category(1, 17, "cat"), Category(2, 90, "brush")]
    assert data[1][1]["labels"].tolist() == [2, 1]


def test_crowds_are_no_targets_but_stay_for_evaluation(folder):
    data = opened(folder)
    assert len(data[1][1]["labels"]) == 2
    assert [a["iscrowd"] for a in data.coco.loadAnns(data.coco.getAnnIds(5))] == [0, 1, 0]


def test_item_is_normalised_and_boxes_relative(folder):
    image, target = opened(folder)[1]
    assert type(image) is torch.Tensor and type(target["boxes"]) is torch.Tensor
    assert image.shape == (3, 32, 64) and image.dtype == torch.float32
    assert (target["image_id"], target["original_size"]) == (5, (32, 64))
    torch.testing.assert_close(target["boxes"], torch.tensor([[0.125, 0.25, 0.25, 0.5], [0.5, 0.5, 0.5, 0.5]]))
    raw = torch.from_numpy(np.array(Image.open(folder / "images" / "5.png"))).permute(2, 0, 1) / 255
    torch.testing.assert_close(image, (raw - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])


def test_image_without_boxes(folder):
    for transform in (EVALUATION, JITTER, build_transform(Resize(train="detr", short=32, long=64), train=True)):
        target = opened(folder, transform).sample(2, 1)[1]
        assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)


def test_sample_depends_on_index_and_seed_alone(folder):
    data = opened(folder, JITTER)
    torch.manual_seed(1)
    first, state = data.sample(1, 7), torch.get_rng_state()
    torch.manual_seed(2)
    again = data.sample(1, 7)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1]["boxes"], again[1]["boxes"])
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left as it was"
    assert not torch.equal(first[0], data.sample(1, 8)[0])
    assert torch.equal(data[0][0], data[0][0]), "plain indexing is never random"


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_do_not_change_batches(folder, workers):
    data = opened(folder, JITTER)
    found = loaded(data, [[(i, seed) for i in range(3)] for seed in range(5)], workers)
    assert len(found) == 5
    for seed, batch in enumerate(found):
        assert torch.equal(batch.pixels, collate([data.sample(i, seed) for i in range(3)]).pixels)


@pytest.mark.parametrize("train", ["none", "flip", "detr", "jitter"])
def test_a_batch_is_its_samples_side_by_side(folder, train):
    """Bit by bit, though a batch's images are normalised in their places and a sample's before it has one."""
    data = opened(folder, build_transform(Resize(train=train, short=32, long=64), train=True))
    pairs = [(i, seed) for seed in range(5) for i in range(3)]
    batch, one_by_one = data.batch(pairs), collate([data.sample(*pair) for pair in pairs])
    for name in ("pixels", "padding"):
        assert torch.equal(getattr(batch, name), getattr(one_by_one, name)), name
    assert torch.equal(batch.targets.boxes, one_by_one.targets.boxes) and torch.equal(batch.targets.labels, one_by_one.targets.labels)
    assert (batch.image_ids, batch.original_sizes) == (one_by_one.image_ids, one_by_one.original_sizes)
    assert torch.equal(data.batch(range(3)).pixels, collate([data[i] for i in range(3)]).pixels)


def loaded(data, keys, workers):
    with loading(data, keys, workers) as batches:
        return list(batches)


def test_batch_is_padded_and_masked(folder):
    data = opened(folder)
    batch = collate([data[i] for i in range(3)])
    assert len(batch) == 3 and batch.pixels.shape == (3, 3, 64, 64) and batch.padding.shape == (3, 64, 64)
    assert batch.image_ids == [2, 5, 9] and batch.original_sizes == [(32, 32), (32, 64), (64, 32)]
    for i, (h, w) in enumerate(batch.original_sizes):
        assert torch.equal(batch.pixels[i, :, :h, :w], data[i][0]) and not batch.padding[i, :h, :w].any()
        assert batch.padding[i].sum() == 64 * 64 - h * w and (batch.pixels[i][:, batch.padding[i]] == 0).all()
    assert batch.targets.counts == [1, 2, 0] and batch.targets.labels[1].tolist() == [2, 1]
    torch.testing.assert_close(batch.targets.boxes[0, 0], torch.tensor([0.25, 0.25, 0.25, 0.25]))
    assert batch.to("cpu").original_sizes == batch.original_sizes


def test_coco_s_own_layout(folder):
    (folder / "annotations").mkdir()
    for split in ("train", "val"):
        (folder / f"instances_{split}.json").rename(folder / "annotations" / f"instances_{split}2017.json")
    (folder / "images").rename(folder / "train2017")
    with pytest.raises(InputError, match=r"instances_val2017\.json is there but not the image folder .*val2017"):
        opened(folder)
    shutil.copytree(folder / "train2017", folder / "val2017")
    assert len(opened(folder)) == len(opened(folder, split="val")) == 3


def test_missing_folder_or_annotations_name_the_layout(folder):
    with pytest.raises(InputError, match=r"nowhere: does not exist; expected there: instances_train\.json"):
        opened(folder / "nowhere")
    with pytest.raises(InputError, match=r"instances_train\.json: not a folder"):
        opened(folder / "instances_train.json")
    (folder / "instances_val.json").unlink()
    with pytest.raises(InputError, match="no annotations of the split 'val'"):
        opened(folder, split="val")


def test_hash_covers_both_files_and_must_match_the_recipe(folder, tmp_path):
    spec = Folder(path=folder)
    found = data_hash(spec, tmp_path)
    assert data_hash(spec.replace(sha256=found), tmp_path) == found
    write(folder, "val", read(folder, "val") | {"info": {}})
    assert data_hash(spec, tmp_path) != found
    with pytest.raises(InputError, match="its annotations hash to"):
        open_dataset(spec.replace(sha256=found), "train", tmp_path, EVALUATION)


def test_splits_must_agree_on_categories(folder):
    require_same_categories(opened(folder), opened(folder, split="val"))
    content = read(folder, "val")
    content["categories"][0]["name"] = "broom"
    write(folder, "val", content)
    with pytest.raises(InputError, match=r"instances_val\.json: categories differ .*90 'broom', 90 'brush'"):
        require_same_categories(opened(folder), opened(folder, split="val"))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "YCbCr"])
def test_every_mode_becomes_rgb(folder, mode):
    grey = Image.fromarray(np.full((32, 32), 200, dtype=np.uint8))
    special = {"I;16": lambda: Image.fromarray(np.full((32, 32), 200 * 257, dtype=np.uint16)), "P": grey.convert("RGB").quantize}
    picture = special.get(mode, lambda: grey.convert("RGB").convert(mode))()
    path = folder / "images" / ("2.jpg" if mode in ("CMYK", "YCbCr") else "2.png")
    picture.save(path)
    content = read(folder, "train")
    content["images"][0]["file_name"] = path.name
    write(folder, "train", content)
    pixels = np.asarray(opened(folder).load_image(2)).astype(int)
    assert pixels.shape == (32, 32, 3)
    assert mode == "1" or abs(pixels - 200).max() <= 4


@pytest.mark.parametrize("stored, listed, turned", [((64, 32), (32, 64), True), ((64, 32), (64, 32), False), ((32, 32), (32, 32), False)])
def test_exif_rotation_only_where_the_annotations_mean_it(folder, stored, listed, turned):
    pixels = np.zeros((stored[1], stored[0], 3), dtype=np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise for viewing
    Image.fromarray(pixels).save(folder / "images" / "2.png", exif=exif)
    content = read(folder, "train")
    content["images"][0] |= {"width": listed[0], "height": listed[1]}
    write(folder, "train", content)
    seen = np.asarray(opened(folder).load_image(2))
    assert seen.shape[:2] == listed[::-1]
    corner = seen[:8, -8:] if turned else seen[:8, :8]
    assert (corner == 255).all()


def test_a_file_of_another_size_put_in_later_is_named(folder):
    data = opened(folder)
    Image.new("RGB", (30, 32)).save(folder / "images" / "2.png")
    with pytest.raises(InputError, match=r"image 2: .*2\.png has 30 x 32 pixels, the annotations say 32 x 32"):
        data[0]


def test_digits_are_coco_data_like_any_other(tmp_path):
    spec = Digits(size=40, train=4, val=2)
    train, val = (open_dataset(spec, split, tmp_path, EVALUATION) for split in ("train", "val"))
    require_same_categories(train, val)
    assert (len(train), len(val), len(train.categories)) == (4, 2, 10) and train.report.faults == []
    assert data_hash(spec, tmp_path) != data_hash(spec.replace(seed=1), tmp_path)


def test_crops_show_their_object(folder):
    """Each object is one flat colour, so the middle of its crop must be that colour."""
    pixels = np.zeros((32, 64, 3), dtype=np.uint8)
    pixels[0:16, 0:16] = (250, 0, 0)
    pixels[8:24, 16:48] = (0, 250, 0)
    Image.fromarray(pixels).save(folder / "images" / "5.png")
    data = opened(folder)
    crops, labels = object_crops(data, 24, seed=1)
    assert crops.shape == (3, 3, 24, 24) and crops.dtype == torch.uint8
    assert labels.tolist() == [0, 2, 1], "in order of images, no crowds"
    assert crops[1, 0, 12, 12] > 240 and crops[2, 1, 12, 12] > 240
    again, other = object_crops(data, 24, seed=1)[0], object_crops(data, 24, seed=2)[0]
    assert torch.equal(crops, again) and not torch.equal(crops, other)
    assert len(object_crops(data, 24, seed=1, most=2)[1]) == 2


def test_refused_annotations_stop_before_any_image_is_read(folder):
    content = read(folder, "train")
    content["images"][0]["file_name"] = "../x.png"
    write(folder, "train", content)
    with pytest.raises(InputError, match=r"instances_train\.json: image 2"):
        CocoDataset(folder / "instances_train.json", folder / "images", EVALUATION)

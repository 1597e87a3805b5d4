"""Boxes must stay on their objects whatever is done to the image."""

import pytest
import torch
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2

from detrdistill.data.coco import collate
from detrdistill.data.transforms import RandomCropOfAnySize, build_transform, renormalised, shorter_side
from detrdistill.recipes.parts import MEAN, STD, Resize


def scene(height=120, width=160):
    """A bright rectangle on black with its box, and a second box at the edge."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, 40:80, 50:110] = 255
    boxes = tv_tensors.BoundingBoxes([[50.0, 40.0, 110.0, 80.0], [0.0, 0.0, 6.0, 5.0]], format="XYXY", canvas_size=(height, width))
    return tv_tensors.Image(image), {"boxes": boxes, "labels": torch.tensor([3, 1])}


def draw(low, high):
    return int(torch.randint(low, high + 1, ()))


def plainly(resize, train, image, target):
    """What `build_transform` does, by torchvision's stock transforms one after the other."""
    scale = resize.short / 800

    def to(side, long=resize.long):
        return v2.Resize(shorter_side(*image.shape[-2:], round(side * scale), long))(image, target)

    stretch = v2.Resize((resize.short, resize.long))
    name = resize.train if train else "none"
    if name != "detr":
        image, target = stretch(image, target) if resize.stretch else to(800)
    if name in ("flip", "detr"):
        image, target = v2.RandomHorizontalFlip()(image, target)
    if name == "detr":
        if int(torch.multinomial(torch.tensor([0.5, 0.5]), 1)):
            image, target = to((400, 500, 600)[draw(0, 2)], None)
            least, most, (height, width) = round(384 * scale), round(600 * scale), image.shape[-2:]
            h, w = (draw(min(least, side), min(most, side)) for side in (height, width))
            place = draw(0, height - h), draw(0, width - w), h, w
            image, target = v2.functional.crop(image, *place), target | {"boxes": v2.functional.crop(target["boxes"], *place)}
            image, target = v2.ClampBoundingBoxes()(image, target)
        image, target = stretch(image, target) if resize.stretch else to(480 + 32 * draw(0, 10))
    if name == "jitter":
        fill = {tv_tensors.Image: [round(255 * mean) for mean in resize.mean], "others": 0}
        affine = v2.RandomAffine(0, (0.05, 0.05), (0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR, fill=fill)
        image, target = v2.ColorJitter(0.3, 0.3, 0.3)(*affine(image, target))
    image, target = v2.SanitizeBoundingBoxes()(*v2.ClampBoundingBoxes()(image, target))
    return v2.Normalize(resize.mean, resize.std)(v2.ToDtype(torch.float32, scale=True)(image)), target


@pytest.mark.parametrize("stretch", [False, True])
@pytest.mark.parametrize("name", ["none", "flip", "detr", "jitter"])
def test_every_bit_is_that_of_stock_transforms(name, stretch):
    """Whatever the layout of the image in memory; and the random numbers that follow are the same."""
    random, resize = torch.Generator().manual_seed(0), Resize(train=name, short=111, long=170, stretch=stretch)
    for seed in range(40):
        height, width = torch.randint(60, 240, (2,), generator=random).tolist()
        image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=random).permute(2, 0, 1)
        corners = torch.rand(seed % 6, 2, 2, generator=random).sort(1).values * torch.tensor([width, height])
        boxes = tv_tensors.BoundingBoxes(corners.flatten(1), format="XYXY", canvas_size=(height, width))
        target = {"boxes": boxes, "labels": torch.arange(len(boxes))}
        for train in (True, False):
            given = tv_tensors.Image(image if seed % 2 else image.contiguous())
            torch.manual_seed(seed)
            pixels, wanted = plainly(resize, train, given, target)
            state = torch.get_rng_state()
            torch.manual_seed(seed)
            seen, ours = build_transform(resize, train)(given, target)
            assert torch.equal(seen, pixels) and seen.dtype == torch.float32
            assert torch.equal(ours["boxes"], wanted["boxes"]) and torch.equal(ours["labels"], wanted["labels"])
            assert ours["boxes"].canvas_size == pixels.shape[-2:] and ours.keys() == {"boxes", "labels"}
            assert torch.equal(state, torch.get_rng_state())


def bright(image):
    """The box around all pixels that are more than half bright, XYXY."""
    shown = image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    ys, xs = torch.where(shown.amin(0) > 0.45)
    return torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], dtype=torch.float32)


@pytest.mark.parametrize("name", ["none", "flip", "detr", "jitter"])
def test_boxes_stay_on_objects(name):
    transform = build_transform(Resize(train=name, short=96, long=160), train=True)
    seen = 0
    for seed in range(40):
        torch.manual_seed(seed)
        image, target = transform(*scene())
        boxes, labels = target["boxes"], target["labels"].tolist()
        height, width = image.shape[-2:]
        assert len(boxes) == len(labels) and boxes.canvas_size == (height, width)
        assert (boxes >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
        if 3 in labels:
            seen += 1
            box = boxes[labels.index(3)].as_subclass(torch.Tensor)
            if name == "jitter":  # the fill is grey and may be as bright as a darkened rectangle
                x0, y0, x1, y1 = (box + torch.tensor([2, 2, -2, -2])).round().long().tolist()
                assert image[:, y0:y1, x0:x1].min() > image[0, y0 - 6, (x0 + x1) // 2]
            else:
                torch.testing.assert_close(bright(image), box, atol=1.5, rtol=0)
    assert seen > 20


def test_flip_mirrors_and_jitter_never_does():
    image, target = scene()
    image[:, 40:80, 50:60] = tv_tensors.Image(torch.full((3, 40, 10), 90, dtype=torch.uint8))  # the left end is darker
    sides = {"flip": set(), "jitter": set()}
    for name, found in sides.items():
        transform = build_transform(Resize(train=name, short=120, long=160), train=True)
        for seed in range(20):
            torch.manual_seed(seed)
            out, where = transform(image, target)
            x0, y0, x1, y1 = where["boxes"][0].round().long().tolist()
            row = out[0, (y0 + y1) // 2]
            found.add(bool(row[x0 + 4] < row[x1 - 5]))
    assert sides == {"flip": {True, False}, "jitter": {True}}


def test_evaluation_is_not_random_and_only_resizes():
    for name in ("none", "flip", "detr", "jitter"):
        transform = build_transform(Resize(train=name, short=60, long=999), train=False)
        image, target = transform(*scene())
        assert image.shape == (3, 60, 80) and torch.equal(image, transform(*scene())[0])
        boxes = box_convert(target["boxes"].as_subclass(torch.Tensor), "xyxy", "cxcywh")
        torch.testing.assert_close(boxes[0], torch.tensor([40.0, 30.0, 30.0, 20.0]))


@pytest.mark.parametrize(
    "size, limits, expected",
    [
        ((480, 640), (800, 1333), (800, 1066)),
        ((427, 640), (800, 1333), (800, 1199)),
        ((640, 427), (800, 1333), (1199, 800)),
        ((375, 1242), (800, 1333), (402, 1331)),  # round(1333 * 375 / 1242) = 402, int(402 * 1242 / 375) = 1331
        ((800, 900), (800, 1333), (800, 900)),
        ((1, 5000), (800, 1333), (1, 5000)),
    ],
)
def test_shorter_side_follows_detr(size, limits, expected):
    assert shorter_side(*size, *limits) == expected


def test_detr_scales_follow_the_preset():
    shorts = set()
    transform = build_transform(Resize(train="detr", short=400, long=10_000), train=True)
    for seed in range(60):
        torch.manual_seed(seed)
        shorts.add(min(transform(*scene(60, 80))[0].shape[-2:]))
    assert shorts <= set(range(240, 401, 16)) and len(shorts) > 6


def test_crop_of_a_small_image_is_the_image():
    image, target = scene(120, 160)
    assert RandomCropOfAnySize(400, 600)(image, target)[0].shape == (3, 120, 160)
    assert RandomCropOfAnySize(0, 0)(image, target)[0].shape == (3, 1, 1)


def test_other_statistics_are_converted_from_one_to_the_other_and_padding_stays():
    """A batch prepared for a student, turned into what its teacher wants, is the batch prepared for the teacher."""
    ours, its = Resize(train="none", short=60, long=99), Resize(train="none", short=60, long=99, mean=(0.5, 0.4, 0.3), std=(0.5, 1, 0.2))
    where = {"image_id": 1, "original_size": (120, 160)}

    def prepared(resize):
        samples = [build_transform(resize, train=False)(*scene(height=height)) for height in (120, 100)]
        return collate([(image.as_subclass(torch.Tensor), target | where) for image, target in samples])

    student, teacher = prepared(ours), prepared(its)
    assert student.padding.any() and not torch.allclose(student.pixels, teacher.pixels)
    turned = renormalised(student.pixels, student.padding, ours, its)
    torch.testing.assert_close(turned, teacher.pixels, atol=1e-5, rtol=1e-5)
    assert (turned * student.padding[:, None] == 0).all()
    assert renormalised(student.pixels, student.padding, ours, ours.replace(short=7)) is student.pixels

"""How a published detector wants its images: read from its image processor's file, and refused where the kit cannot."""

import json
from pathlib import Path

import pytest

from detrdistill.checkpoints.preparation import resize_of
from detrdistill.errors import InputError
from detrdistill.recipes.parts import MEAN, STD, Resize

OWN = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.5]}


def folder(path: Path, **config: object) -> Path:
    (path / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "config, wanted",
    [
        ({}, Resize()),
        (OWN, Resize(mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.5))),
        (OWN | {"do_normalize": False}, Resize(mean=(0, 0, 0), std=(1, 1, 1))),
        ({"do_rescale": False, "image_mean": [0, 51, 102], "image_std": 255}, Resize(mean=(0, 0.2, 0.4), std=(1, 1, 1))),
        ({"size": {"shortest_edge": 480, "longest_edge": 640}}, Resize(short=480, long=640)),
        ({"size": {"max_height": 640, "max_width": 640}}, Resize(short=640, long=640)),
        ({"size": 600, "max_size": 1000}, Resize(short=600, long=1000)),
        ({"size": {"shortest_edge": 600}, "max_size": 1000}, Resize(short=600, long=1000)),
        ({"size": 600}, Resize(short=600, long=1333)),
        ({"size": {"height": 480, "width": 640}}, Resize(short=480, long=640, stretch=True)),
    ],
)
def test_what_the_processor_says(config: dict, wanted: Resize, tmp_path: Path) -> None:
    assert resize_of(folder(tmp_path, **config)) == wanted


def test_without_a_file_images_are_prepared_as_in_the_papers(tmp_path: Path) -> None:
    assert resize_of(tmp_path) == Resize() and Resize().mean == MEAN and Resize().std == STD


@pytest.mark.parametrize(
    "config, message",
    [
        ({"size": {"height": 640}}, "'size' is .*the kit resizes to a shorter side within a longer, or to one height and width"),
        ({"size": {"height": 640, "width": 640}, "do_resize": False}, "'do_resize' is false"),
        ({"size": {"height": 640, "width": 640}, "resample": 3}, "'resample' is 3"),
        ({"size": {"height": 640, "width": "wide"}}, "'long' = 'wide'"),
        ({"size": {"max_height": 640, "max_width": 800}}, "'size' is "),
        ({"size": {"shortest_edge": 0, "longest_edge": 640}}, "'short' = 0"),
        ({"size": "big"}, "'size' is big"),
        ({"size": True}, "'size' is True"),
        ({"size": {"shortest_edge": 600}}, "'size' is "),
        ({"do_resize": False}, "'do_resize' is false"),
        ({"resample": 3}, "'resample' is 3"),
        ({"image_mean": [0.5, 0.5]}, r"'image_mean' is \[0\.5, 0\.5\]"),
        ({"image_mean": ["a", 0, 0]}, "'image_mean' is "),
        ({"image_std": [0, 1, 1]}, "'std.0' = 0"),
        ({"rescale_factor": "x"}, "'rescale_factor' x"),
        ({"rescale_factor": 0}, "'rescale_factor' 0"),
    ],
)
def test_what_the_kit_cannot_do_is_refused(config: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        resize_of(folder(tmp_path, **config))
    assert "preprocessor_config.json" in str(error.value) and "\n" not in str(error.value)

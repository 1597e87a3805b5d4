"""What the figures of the notebooks that look inside show: the right numbers on the right artists, equal bytes for equal data."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from detrdistill.figures import style
from detrdistill.figures.attention import active_regions
from detrdistill.figures.detections import Objects, compare
from detrdistill.figures.gallery import gallery
from detrdistill.figures.quality import Mask, masks, quality
from detrdistill.figures.stability import instability, instability_in_training

BOXES = np.array([[2.0, 2, 20, 22], [30, 10, 60, 40]])


def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)


def truth() -> Objects:
    return Objects(BOXES, ["7", "3"])


def runs(*means: float, images: int = 4) -> list[np.ndarray]:
    """A run a mean: counts of two steps, of which the second is twice the first."""
    spread = np.array([-1, 1] * (images // 2)) / 2
    return [np.stack([mean + spread, 2 * (mean + spread)], axis=1) for mean in means]


SCORES = {"teacher": runs(1), "student": runs(3), "detrdistill": []}
ONE = {gamma: np.linspace(0.9, 0.1, 7) ** (1 + gamma) for gamma in (0.0, 0.5, 1.0)}
MAPS = {"a": [np.eye(4), np.ones((2, 2))], "b": [np.zeros((3, 3))] * 2}
INSIDE = {"a": [0.25, 1], "b": [np.nan] * 2}
POINTS = [
    {"step": 10, "AP": 1.0, "changes_between_stages": 4.0},
    {"step": 20, "AP": 2.0, "changes_between_stages": 2.0, "changes_since_last": 3.0},
]
CURVES = {"teacher": [POINTS], "student": [POINTS, POINTS], "detrdistill": [[{"step": 20, "AP": 2.0}]]}
FIGURES = {
    "masks": lambda: masks(image(), [Mask(np.eye(6), "a\nb", BOXES[:1], BOXES[1:]), Mask(-np.ones((3, 4)), "c")], "note", whole=BOXES),
    "quality": lambda: quality(np.linspace(0, 1, 41), ONE, 0.5, "note", images=3),
    "active_regions": lambda: active_regions([image()] * 2, [truth()] * 2, MAPS, INSIDE, "note"),
    "instability": lambda: instability(SCORES, SCORES, "note"),
    "instability in training": lambda: instability_in_training(CURVES, "note"),
    "gallery": lambda: gallery([image()] * 5, [truth()] * 5, "note"),
}


def texts(figure: Figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(matplotlib.text.Text)}


@pytest.mark.parametrize("name", FIGURES)
def test_equal_data_gives_equal_bytes(name: str, tmp_path: Path) -> None:
    first = [path.read_bytes() for path in style.save(FIGURES[name](), tmp_path / "a")]
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red"}):  # a user's own settings do not matter
        second = [path.read_bytes() for path in style.save(FIGURES[name](), tmp_path / "b")]
    assert first == second
    assert b"/Subtype /Type3" not in first[1]


@pytest.mark.parametrize("make", [FIGURES["gallery"], lambda: compare([image()], {"ground truth": [truth()]}, "note")])
def test_what_is_laid_out_by_hand_stays_so(make, tmp_path: Path) -> None:
    """Saved as PNG and PDF and then shown in a notebook: three savings of one figure."""
    figure = make()
    places = [axes.get_position(original=True).bounds for axes in figure.axes]
    style.save(figure, tmp_path / "a")
    figure._repr_png_()
    figure.canvas.draw()
    assert [axes.get_position(original=True).bounds for axes in figure.axes] == places


def test_masks_show_objects_solid_and_guesses_dashed() -> None:
    figure = FIGURES["masks"]()
    whole, first, second = figure.axes[:3]
    assert [patch.get_xy() for patch in whole.patches] == [(2, 2), (30, 10)]
    assert [(patch.get_xy(), patch.get_linestyle() == "-") for patch in first.patches] == [((2, 2), True), ((30, 10), False)]
    assert not second.patches and (np.asarray(second.images[1].get_array()) == 0).all(), "a negative mask is cut at 0"
    assert {"image", "a\nb", "c"} <= texts(figure)
    assert any(text.startswith("Solid: annotated objects. Dashed: the query's own box.") for text in texts(figure))


def test_masks_of_nothing_and_of_too_many(tmp_path: Path) -> None:
    for count in (0, 40):
        style.save(masks(image(), [Mask(np.eye(2), str(i)) for i in range(count)]), tmp_path / "a")
    assert "24" not in texts(masks(image(), [Mask(np.eye(2), str(i)) for i in range(40)]))


def test_quality_counts_and_orders() -> None:
    left, right = FIGURES["quality"]().axes
    assert sum(bar.get_height() for bar in left.patches) == 41 and left.get_title("left") == "41 queries of 3 images"
    lines = {line.get_label(): line.get_ydata() for line in right.lines}
    assert list(lines) == ["0: the box alone", "0.5", "1: the class alone"]
    with style.paper():
        right.figure.draw_without_rendering()
    assert not right.get_legend().get_window_extent().overlaps(right.get_window_extent()), "beside the lines and not over them"
    assert (np.diff(lines["0.5"]) <= 0).all() and lines["0.5"][0] == ONE[0.5].max()


def test_quality_keeps_queries_in_one_order() -> None:
    """A query has the same place on every line."""
    _, right = quality(np.zeros(3), {0.5: np.array([0.1, 0.9, 0.5]), 1.0: np.array([0.7, 0.2, 0.3])}, 0.5).axes
    kept, other = right.lines
    assert kept.get_ydata().tolist() == [0.9, 0.5, 0.1] and other.get_ydata().tolist() == [0.2, 0.3, 0.7]


def test_active_regions_tell_the_share_inside() -> None:
    figure = FIGURES["active_regions"]()
    first, a, b, _, below, _ = figure.axes[:6]
    assert [axes.get_title() for axes in (first, a, b)] == ["ground truth", "a", "b"]
    assert (a.get_xlabel(), below.get_xlabel(), b.get_xlabel()) == ("25 % inside", "100 % inside", "no weight")
    assert len(first.patches) == len(a.patches) == 2


def test_instability_bars_are_means() -> None:
    left, right = FIGURES["instability"]().axes
    assert [bar.get_height() for bar in left.patches] == [1, 2, 3, 6]
    assert left.get_ylim()[0] == 0 and {"no weights", "1.00", "6.00", "stage 2 to 3"} <= texts(left.figure)
    assert right.get_ylabel() == "objects an image"
    assert any(text.startswith("Whiskers: 95 % interval over the images") for text in texts(left.figure))


def test_instability_of_seeds_has_a_dot_a_seed() -> None:
    scores = {"student": runs(1, 3), "detrdistill": runs(2, 2)}
    figure = instability(scores, scores, "note")
    dots = figure.axes[0].lines
    assert [dot.get_ydata().tolist() for dot in dots] == [[1, 2, 3, 6], [2, 4, 2, 4]]
    assert [bar.get_height() for bar in figure.axes[0].patches] == [2, 4, 2, 4]
    assert any(text.startswith("Dots: seeds.") and "Whiskers" not in text for text in texts(figure))
    assert any(text.startswith("Dots: seeds. Whiskers: ") for text in texts(instability(scores | {"teacher": runs(1)}, scores, "note")))


def test_instability_without_weights_or_steps_says_so(tmp_path: Path) -> None:
    nothing = instability({"student": []}, {"student": []})
    one_stage = instability({"student": [np.zeros((3, 0))]}, {"student": [np.zeros((3, 0))]})
    steady = instability({"student": [np.zeros((3, 2))]}, {"student": [np.zeros((3, 2))]})
    assert "no weights" in texts(nothing) and "one decoder stage: nothing can change" in texts(one_stage) and "0.00" in texts(steady)
    for figure in (nothing, one_stage, steady):
        style.save(figure, tmp_path / "a")


def test_instability_in_training_is_what_the_curves_tell() -> None:
    between, since = FIGURES["instability in training"]().axes
    level, *seeds, mean = between.lines
    assert set(level.get_ydata()) == {2} and [len(seeds), mean.get_ydata().tolist()] == [2, [4, 2]]
    assert [line.get_xdata().tolist() for line in since.lines] == [[20]] * 3  # the teacher's evaluations are further apart
    assert "Not recorded: DETRDistill.\nnote" in texts(between.figure)
    assert "not recorded" in texts(instability_in_training({"student": [[{"step": 20, "AP": 2.0}]]}))


def test_a_class_may_be_called_like_a_formula(tmp_path: Path) -> None:
    figure = gallery([image()], [Objects(BOXES, ["$x^$", r"\frac"])])
    assert {"$x^$", r"\frac"} <= texts(figure)
    style.save(figure, tmp_path / "a")


def test_gallery_draws_each_images_objects() -> None:
    figure = FIGURES["gallery"]()
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == 5 and {"7", "3", "note"} <= texts(figure)
    assert [patch.get_xy() for patch in shown[0].patches if not patch.get_fill()] == [(2, 2), (30, 10)]

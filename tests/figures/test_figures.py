"""What the figures show: the right numbers on the right artists, and equal bytes for equal data."""

import math
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from PIL import Image

from detrdistill.distill.stages import pair_stages
from detrdistill.figures import style
from detrdistill.figures.bars import bars
from detrdistill.figures.convergence import TOGETHER, convergence
from detrdistill.figures.detections import Objects, compare, hits
from detrdistill.figures.loss_parts import loss_parts
from detrdistill.figures.masks import query_masks
from detrdistill.figures.png import shrunk
from detrdistill.figures.stage_pairs import stage_pairs
from detrdistill.figures.style import save
from detrdistill.published import published


def curve(*values: float) -> list[dict[str, float]]:
    return [{"step": 100 * (i + 1), "AP": value} for i, value in enumerate(values)]


def summary() -> pd.DataFrame:
    line = {"detector": "Deformable DETR", "AP_half": math.nan, "measured_on": "embedded digits, 96 px; not a COCO result"}
    return pd.DataFrame(
        [
            line | {"setting": "teacher", "AP": 57.0, "seeds": 1},
            line | {"setting": "student", "AP": 16.0, "AP_half": 1.5, "seeds": 3},
            line | {"setting": "detrdistill", "AP": math.nan, "seeds": 0},
        ]
    )


def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)


def truth() -> Objects:
    return Objects(np.array([[2.0, 2, 20, 22], [30, 10, 60, 40]]), ["7", "3"])


def found() -> Objects:
    boxes = np.array([[31.0, 10, 60, 40], [2, 2, 20, 22], [2, 2, 20, 22], [0, 0, 9, 9]])
    return Objects(boxes, ["3", "7", "7", "7"], np.array([0.9, 0.6, 0.8, 0.1]))


def log() -> list[dict[str, float]]:
    parts = ("detection/class", "detection/l1", "logits/negative/giou", "features")
    return [{"step": i, "lr": 1e-3, "loss": 4.0 / i, "gradient norm": 9.0} | dict.fromkeys(parts, 1.0 / i) for i in range(1, 60)]


FIGURES = {
    "convergence": lambda: convergence(
        {"teacher": [curve(20, 40, 57)], "student": [curve(5, 15), curve(7, 17)], "detrdistill": []}, "note"
    ),
    "bars": lambda: bars(published("figure1"), summary(), "note"),
    "loss_parts": lambda: loss_parts(log(), "run", "note"),
    "detections": lambda: compare([image()], {"ground truth": [truth()], "student": [found()]}, "note"),
    "masks": lambda: query_masks(image(), [np.eye(6), -np.ones((3, 4))], ["a", "b"], "note"),
}


def texts(figure: Figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(matplotlib.text.Text)}


@pytest.mark.parametrize("name", FIGURES)
def test_equal_data_gives_equal_bytes(name: str, tmp_path: Path) -> None:
    first = [path.read_bytes() for path in style.save(FIGURES[name](), tmp_path / "a")]
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "pdf.fonttype": 3}):  # a user's own settings do not matter
        second = [path.read_bytes() for path in style.save(FIGURES[name](), tmp_path / "b")]
    assert first == second
    assert first[0].startswith(b"\x89PNG") and first[1].startswith(b"%PDF")
    assert b"CreationDate" not in first[1] and b"/Subtype /Type3" not in first[1]


@pytest.mark.parametrize("name", ["convergence", "bars", "loss_parts"])
def test_a_chart_has_a_palette_and_looks_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small,) = style.save(FIGURES[name](), tmp_path / "small", ("png",))
    monkeypatch.setattr(style, "shrunk", lambda png: png)
    (whole,) = style.save(FIGURES[name](), tmp_path / "whole", ("png",))
    one, other = (Image.open(path) for path in (small, whole))
    assert one.mode == "P" and one.info["dpi"] == other.info["dpi"] and small.stat().st_size < 0.6 * whole.stat().st_size
    away = np.abs(np.asarray(one.convert("RGB"), dtype=int) - np.asarray(other.convert("RGB"), dtype=int)).max(-1)
    assert (away > 8).mean() < 0.005 and away.max() < 64


@pytest.mark.parametrize("opaque", [True, False])
def test_a_photograph_and_what_is_transparent_stay_as_they_are(opaque: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (100, 100, 4), dtype=np.uint8) if opaque else np.zeros((9, 9, 4), dtype=np.uint8)
    if opaque:
        pixels[..., 3] = 255
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    assert shrunk(buffer.getvalue()) == buffer.getvalue()


def test_a_notebook_shows_what_a_cell_returns() -> None:
    assert FIGURES["convergence"]()._repr_png_().startswith(b"\x89PNG")


def test_drawing_leaves_the_users_settings_alone() -> None:
    before = dict(matplotlib.rcParams)
    FIGURES["convergence"]()
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("others", [(), ("fgd", "mgd")])
def test_a_published_teacher_is_called_so(others: tuple[str, ...]) -> None:
    curves = {"teacher": [[{"step": 0, "AP": 40.0}]], "student": [curve(5, 15)]} | {
        name: [curve(4, 10)] for name in ("detrdistill", *others)
    }
    figure = convergence(curves)
    keys = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    said = [text.replace("\n", " ") for text in (*texts(figure), *keys)]
    assert any(text.startswith("Teacher 40.0 (published)") for text in said) and not any("0 steps" in text for text in said)


def test_convergence_ends_at_the_mean_over_seeds() -> None:
    figure = FIGURES["convergence"]()
    axes = figure.axes[0]
    (mean,) = [line for line in axes.lines if line.get_marker() == "o"]
    assert mean.get_xdata().tolist() == [100, 200] and mean.get_ydata().tolist() == [6, 16]
    assert mean.get_color() == style.COLOURS["student"]
    level = [line for line in axes.lines if line.get_color() == style.COLOURS["teacher"]]
    assert len(level) == 1 and set(level[0].get_ydata()) == {57}
    assert {"Student 16.0 ± 12.7", "Teacher 57.0\nafter 300 steps", "not run: DETRDistill\nnote"} <= texts(figure)


def test_a_teacher_of_the_same_schedule_is_a_curve() -> None:
    axes = convergence({"teacher": [curve(20, 57)], "student": [curve(5, 15)]}).axes[0]
    assert sorted(line.get_ydata()[-1] for line in axes.lines if line.get_marker() == "o") == [15, 57]


def test_convergence_of_a_teacher_alone_is_a_curve() -> None:
    (line,) = convergence({"teacher": [curve(20, 57)], "student": []}).axes[0].lines
    assert line.get_ydata().tolist() == [20, 57]


def test_bars_keep_published_and_measured_apart() -> None:
    figure = FIGURES["bars"]()
    left, right = figure.axes
    assert sorted(bar.get_height() for bar in left.patches) == [40.7, 42.3, 42.4, 42.9, 43.6, 44.1, 44.7, 45.5, 46.6]
    assert {bar.get_height() for bar in right.patches} == {16.0, 57.0}
    assert left.get_ylim()[0] == right.get_ylim()[0] == 0
    assert "COCO" in left.get_title("left") and "not a COCO result" in right.get_title("left")
    assert "not run" in texts(figure)


def test_loss_parts_have_a_panel_a_loss() -> None:
    figure = FIGURES["loss_parts"]()
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title("left") for axes in shown] == [
        "Detection loss", "Logits distillation (Eq. 3 to 5)", "Feature distillation (Eq. 9)",
    ]  # fmt: skip
    faint, _ = shown[2].lines
    assert faint.get_ydata().tolist() == [entry["features"] for entry in log()]
    assert any(text.startswith("negative GIoU 0.0") for text in texts(figure))


def test_what_a_library_logs_layer_by_layer_is_added_up() -> None:
    names = ("vfl", "bbox", "giou_dn_0", "vfl_aux_2", "vfl_dn_1", "ddf_enc_dn_0")
    entries = [{"step": step, "loss": 9.0} | {f"detection/loss_{name}": float(step) for name in names} for step in (1, 2)]
    (axes,) = (axes for axes in loss_parts(entries).axes if axes.get_visible())
    smooth = {text.get_text(): line for text, line in zip(axes.texts, axes.lines[1::2], strict=True)}
    assert sorted(label.split()[0] for label in smooth) == ["GIoU", "L1", "class", "ddf"]
    faint = {line.get_color(): line.get_ydata().tolist() for line in axes.lines[::2]}
    assert faint[style.BLUE] == [3.0, 6.0] and faint[style.RED] == faint[style.GREEN] == [1.0, 2.0]


def test_bars_say_how_many_seeds_the_least_and_the_most_rows_have() -> None:
    more = pd.concat([summary(), summary().assign(detector="D-FINE", seeds=7)])
    assert "3 to 7 seeds" in bars(published("figure1"), more).axes[1].get_title("left")


def test_empty_figures_say_not_run(tmp_path: Path) -> None:
    empty = summary().assign(AP=math.nan, AP_half=math.nan, seeds=0)
    for figure in (loss_parts([]), convergence({"student": []}), bars(published("figure1"), empty)):
        assert "not run" in texts(figure)
        style.save(figure, tmp_path / "empty")


def test_bars_of_detectors_that_the_paper_does_not_have() -> None:
    other = summary().assign(detector="D-FINE")
    assert "D-FINE" in texts(bars(published("figure1"), other)), "beside the paper's, which stand first"


def test_detections_are_counted_as_in_coco() -> None:
    assert hits(found().above(0.3), truth()).tolist() == [True, True, False]  # the second "7" finds nothing new
    assert hits(Objects(truth().boxes, ["3", "7"], np.ones(2)), truth()).tolist() == [False, False]
    assert hits(found().above(0.95), truth()).tolist() == []


def test_detections_show_pixels_boxes_and_labels() -> None:
    figure = FIGURES["detections"]()
    left, right = figure.axes
    pixels = left.images[0].get_array()
    assert pixels.shape == (48 * 7, 64 * 7, 3) and (pixels[::7, ::7] == image()).all()
    frames = [patch for patch in right.patches if not patch.get_fill()]
    assert [patch.get_xy() for patch in frames] == [(31, 10), (2, 2), (2, 2)]
    assert [patch.get_linestyle() == "-" for patch in frames] == [True, True, False]
    assert {"3 0.90", "7 0.80", "7 0.60", "3", "7"} <= texts(figure) and "7 0.10" not in texts(figure)


def test_crowded_pictures_leave_the_commonest_class_unlabelled() -> None:
    many = Objects(np.tile([[2.0, 2, 20, 22]], (13, 1)), ["7"] * 12 + ["3"])
    figure = compare([image()], {"ground truth": [many], "student": [found()]})
    assert {"3", "3 0.90"} <= texts(figure) and not {"7", "7 0.80"} & texts(figure)
    assert any("Without a label: 7." in text for text in texts(figure))
    assert sum(not patch.get_fill() for patch in figure.axes[0].patches) == 13, "all boxes are drawn"
    assert not any("Without a label" in text for text in texts(compare([image()], {"student": [found()]})))
    (label,) = (patch for patch in figure.axes[0].patches if patch.get_fill())
    x, y, wide, tall = *label.get_xy(), label.get_width(), label.get_height()
    assert max(0, min(20, x + wide) - max(2, x)) * max(0, min(22, y + tall) - max(2, y)) < 0.3 * 18 * 20, "off the boxes without a label"


def test_labels_stay_in_the_image_and_off_their_objects() -> None:
    figure = compare([image()] * 2, {"ground truth": [truth(), Objects(np.zeros((0, 4)), [])], "teacher": [found(), found()]})
    for axes, objects in ((figure.axes[0], truth()), (figure.axes[1], found().above(0.3))):
        labels = [patch for patch in axes.patches if patch.get_fill()]
        assert len(labels) == len(objects.boxes)
        for label, (x0, y0, x1, y1) in zip(labels, objects.boxes, strict=True):
            x, y, wide, tall = *label.get_xy(), label.get_width(), label.get_height()
            assert x >= -1e-9 and y >= -1e-9 and x + wide <= 64 + 1e-9 and y + tall <= 48 + 1e-9
            shared = max(0, min(x1, x + wide) - max(x0, x)) * max(0, min(y1, y + tall) - max(y0, y))
            assert shared < 0.3 * (x1 - x0) * (y1 - y0)


def test_masks_are_cut_at_zero_and_scaled_to_their_maximum() -> None:
    figure = FIGURES["masks"]()
    eye, negative = (axes.images[1].get_array() for axes in figure.axes[1:3])
    assert eye.max() == 1 and eye.min() == 0 and eye.shape[0] >= 400
    assert (np.asarray(negative) == 0).all()


def test_spread_keeps_order_and_distance() -> None:
    assert style.spread([1, 5, 3], [1, 1, 1]) == pytest.approx([1, 5, 3])
    assert style.spread([2, 2, 9], [1, 1, 1]) == pytest.approx([1.5, 2.5, 9])
    assert style.spread([2, 2, 9], [1, 3, 1]) == pytest.approx([1, 3, 9]), "half of one and half of three"
    placed = style.spread([3, 1, 1.1, 1.2, 3.3], [0.5] * 5)
    assert np.argsort(placed).tolist() == [1, 2, 3, 0, 4] and np.diff(sorted(placed)).min() >= 0.5 - 1e-9
    assert style.spread([], []) == []


def test_palette_is_seaborns_colour_blind_one() -> None:
    from seaborn import color_palette

    ours = [style.BLUE, style.AMBER, style.GREEN, style.RED, style.PINK, style.BROWN, style.ROSE, style.GREY, style.YELLOW, style.SKY]
    assert ours == list(color_palette("colorblind").as_hex())


def test_stage_pairs_draw_an_arrow_a_pair(tmp_path: Path) -> None:
    pairs = {name: pair_stages(3, 6, name) for name in ("grouped", "last_only", "last_to_all", "uniform")}
    figure = stage_pairs(pairs, 3, 6)
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    arrows = [[patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)] for axes in panels]
    assert [axes.get_title(loc="left") for axes in panels] == list(pairs) and [len(found) for found in arrows] == [6, 1, 3, 3]
    assert arrows[0][0].get_linewidth() < arrows[1][0].get_linewidth(), "a pair that shares its student stage counts less"
    first, second = (save(stage_pairs(pairs, 3, 6), tmp_path / name) for name in ("one", "two"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_every_setting_has_a_colour_of_its_own() -> None:
    names = ["Teacher", "student", "detrdistill", *(f"variant {i}" for i in range(TOGETHER))]
    colours = style.colours(names)
    assert sorted(colours) == sorted(names) and len(set(colours.values())) == len(names)
    assert colours["student"] == style.COLOURS["student"] and colours["Teacher"] == style.COLOURS["teacher"]


def many(*others: str) -> Figure:
    curves = {"teacher": [curve(20, 40, 57)], "student": [curve(5, 15), curve(7, 17)], "detrdistill": [curve(9, 20)]}
    return convergence(curves | {name: [curve(4, 10 + i)] for i, name in enumerate(others)} | {"pkd": []}, "note")


def test_curves_of_few_rows_share_a_panel_and_of_many_have_one_each() -> None:
    assert len(many("fgd").axes) == 1
    figure = many("fgd", "A row of a long title, stage by stage and more")
    panels = [axes for axes in figure.axes if axes.get_visible()]
    titles = [axes.get_title(loc="left").replace("\n", " ") for axes in panels]
    assert titles == ["DETRDistill 20.0", "FGD 10.0", "A row of a long title, stage by stage and more 11.0"]
    for axes, end in zip(panels, (20, 10, 11), strict=True):
        thick = [line for line in axes.lines if line.get_linewidth() > 1]
        assert [(line.get_ydata()[-1], line.get_color() == style.GREY) for line in thick] == [(16, True), (end, False)]
        assert axes.get_ylim() == panels[0].get_ylim() and axes.get_xlim() == panels[0].get_xlim()
    said = {text.get_text() for text in figure.legends[0].get_texts()}
    assert said == {"Student 16.0 ± 12.7", "Teacher 57.0 after 300 steps, above the panels"} and "not run: PKD\nnote" in texts(figure)


def test_a_teacher_near_the_others_is_a_level_of_every_panel() -> None:
    curves = {"teacher": [curve(20, 22, 23)], "student": [curve(5, 15)]} | {f"row {i}": [curve(9, 20)] for i in range(3)}
    for axes in convergence(curves).axes:
        assert [line.get_linestyle() for line in axes.lines if set(line.get_ydata()) == {23}] == ["--"]

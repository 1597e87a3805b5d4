"""What notebooks see of detectors: maps, masks, quality and assignments against slow or closed forms; and what notebooks refuse."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detrdistill.analysis import detections, query_masks, stability, where_to_look
from detrdistill.criterion import SetCriterion
from detrdistill.data.coco import CocoDataset, collate
from detrdistill.errors import InputError
from detrdistill.figures.detections import Objects
from detrdistill.matching import match
from detrdistill.models import build_detector
from detrdistill.recipes.parts import Folder
from detrdistill.recipes.presets import get_preset
from detrdistill.recipes.words import DETECTORS
from detrdistill.runs.load import load_detector, open_split
from detrdistill.runs.store import Store
from detrdistill.session import Session, open_session
from tests.folders import write_folder

GOOD = {"preset": "smoke", "seeds": [0], "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def val() -> CocoDataset:
    return open_split(get_preset("smoke").student, "val")


@pytest.fixture(scope="module")
def teacher(finished: Path, val: CocoDataset) -> nn.Module:
    return load_detector(get_preset("smoke").teacher, Store(finished), val)


@pytest.fixture(scope="module", params=DETECTORS)
def untrained(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return build_detector(get_preset("smoke", request.param).student, 10).eval()


def test_coverage_is_the_covered_part_of_cells() -> None:
    boxes = np.array([[0, 0, 0.5, 1.0], [0.25, 0, 0.625, 0.5]])
    assert where_to_look.coverage(boxes, (2, 4)) == pytest.approx(np.array([[1, 1, 0.5, 0], [1, 1, 0, 0]]))
    assert (where_to_look.coverage(boxes[:0], (3, 3)) == 0).all()


def test_coarse_levels_keep_their_weight() -> None:
    fine, coarse = torch.zeros(4, 4), torch.tensor([[3.0, 0], [0, 0]])
    fine[3, 3] = 1
    expected = np.zeros((4, 4))
    expected[:2, :2], expected[3, 3] = 3 / 16, 1 / 4
    assert where_to_look.spread([fine.flatten(), coarse], [(4, 4), (2, 2)]) == pytest.approx(expected)
    odd = where_to_look.spread([torch.zeros(5, 7), torch.rand(3, 4)], [(5, 7), (3, 4)])
    assert odd.sum() == pytest.approx(1)
    assert (where_to_look.spread([torch.zeros(2, 2)], [(2, 2)]) == 0).all()


def test_share_inside_boxes() -> None:
    image, truth = np.zeros((40, 80, 3), np.uint8), Objects(np.array([[0.0, 0, 40, 40]]), ["a"])
    assert where_to_look.share_inside(np.array([[1.0, 3.0]]), truth, image) == pytest.approx(0.25)
    assert np.isnan(where_to_look.share_inside(np.zeros((2, 2)), truth, image))


def test_queries_are_chosen_as_defined() -> None:
    masks = np.zeros((3, 2, 2))
    masks[0, 0, 0], masks[1, 0], masks[2] = 4, 2, -1  # on object 0; on both; nowhere
    parts = [np.array([[1.0, 0], [0, 0]]), np.array([[0, 1.0], [0, 0]])]
    response = query_masks.mask_response(masks, parts)
    assert response == pytest.approx(np.array([[4, 0], [2, 2], [0, 0]]))
    seen = query_masks.QueryView(
        masks, np.array([0.9, 0.2, 0.5]), ["a"] * 3, np.zeros((3, 4)), masks[0], masks[0],
        np.array([0.1, 0.4, 0.6]), np.zeros((3, 2)), np.array([1, -1, 0]), response,
    )  # fmt: skip
    assert seen.between() == (1, [0, 1])
    assert (seen.best(2), seen.worst(1), seen.finders()) == ([0, 2], [1], [0, 2])
    without = replace(seen, overlaps=np.zeros((3, 0)), found=np.full(3, -1), response=np.zeros((3, 0)))
    assert without.between() is None and without.finders(0.3) == [2, 1]


def test_instability_against_counting() -> None:
    random = np.random.default_rng(0)
    assigned = np.full((4, 6, 5), -1)
    for stage, image in np.ndindex(4, 6):
        queries = random.permutation(5)[: image % 4]  # also images without objects
        assigned[stage, image, queries] = np.arange(len(queries))
    found = stability.instability(assigned)
    for image, step in np.ndindex(6, 3):
        before, after = assigned[step, image].tolist(), assigned[step + 1, image].tolist()
        assert found["queries"][image, step] == sum(a != b for a, b in zip(before, after, strict=True))
        assert found["objects"][image, step] == sum(before.index(n) != after.index(n) for n in range(image % 4))
    assert stability.instability(assigned[:1])["queries"].shape == (6, 0)
    assert (stability.instability(np.full((2, 3, 4), -1))["objects"] == 0).all()


def test_assignments_are_those_of_the_detection_loss(teacher: nn.Module, val: CocoDataset) -> None:
    found = stability.assignments(teacher, val, range(5))
    batch = collate([val[i] for i in range(5)])
    with torch.no_grad():
        output = teacher.decode(teacher.encode(batch.pixels, batch.padding))[0]
    pairs = match(SetCriterion().problems(output, batch.targets))["student"]
    assert (found[pairs.stage, pairs.image, pairs.query] == pairs.target.numpy()).all()
    assert (found >= 0).sum() == len(pairs)


def test_one_look_holds_what_eq_8_and_9_say(teacher: nn.Module, val: CocoDataset) -> None:
    scene = query_masks.look(teacher, val, 2)
    seen = scene.queries(0.25)
    assert seen.quality == pytest.approx(seen.scores**0.25 * seen.overlaps.max(1) ** 0.75, abs=1e-6)
    assert (seen.unweighted == scene.weights(None).sum(0)).all() and seen.weights.shape == seen.masks.shape[1:]
    last = np.einsum("q,qhw->hw", seen.quality, seen.masks**2) / len(seen.quality)
    assert scene.weights(0.25)[-1] == pytest.approx(last, rel=1e-4)
    assert sorted(seen.found[seen.found >= 0]) == list(range(len(scene.truth.boxes)))
    many = query_masks.quality_of(teacher, val, [2, 3], [0.25, 1.0])
    assert many[0, : len(seen.quality)] == pytest.approx(seen.quality, abs=1e-5) and many.shape == (2, 2 * len(seen.quality))


def test_an_image_file_is_seen_as_the_data_sets_own(teacher: nn.Module, val: CocoDataset) -> None:
    entry = val.coco.imgs[val.ids[1]]
    own, file = query_masks.look(teacher, val, 1), query_masks.look(teacher, val, Path(val.root) / entry["file_name"])
    assert torch.equal(own.output.logits, file.output.logits) and (own.image == file.image).all()
    seen = file.queries(0.5)
    assert len(file.truth.boxes) == 0 and seen.between() is None and seen.quality == pytest.approx(seen.scores)
    assert [panel.title.count("inside") for panel in query_masks.gamma_panels(file, [0.5])] == [0, 0]


def test_panels_of_figure_4(teacher: nn.Module, val: CocoDataset) -> None:
    scene = query_masks.look(teacher, val, 2)
    titles = [panel.title for panel in query_masks.query_panels(scene, 0.5, found=2, low=3)]
    assert ["finds" in title for title in titles] == [True, True, False, False, False, False]
    assert "two objects" in titles[2] and all("low quality" in title for title in titles[3:])
    by_gamma = query_masks.gamma_panels(scene, [0.0, 0.5])
    assert [panel.title.split("\n")[0] for panel in by_gamma] == ["all queries alike", "gamma 0", "gamma 0.5"]
    assert [panel.title.split("\n")[0] for panel in query_masks.stage_panels(scene, 0.5)] == ["stage 1", "stage 2"]


def test_an_image_that_is_not_there_is_refused(teacher: nn.Module, val: CocoDataset, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    for image, named in ((8, "images 0 to 7"), (tmp_path / "a.png", "cannot be decoded"), (tmp_path / "b.png", "is missing")):
        with pytest.raises(InputError, match=named):
            query_masks.look(teacher, val, image)


def test_regions_sum_to_one(untrained: nn.Module, val: CocoDataset) -> None:
    maps = where_to_look.where_to_look(untrained, val, 2, gamma=0.5)
    assert set(maps) == {*where_to_look.REGIONS, "alike"} and len({one.shape for one in maps.values()}) == 1
    assert all(one.min() >= 0 and one.sum() == pytest.approx(1, abs=1e-5) for one in maps.values())
    measured = where_to_look.shares(untrained, val, [2, 3], gamma=0.5)
    assert list(measured) == [*where_to_look.REGIONS, "alike", "area"] and list(measured.index) == [2, 3]
    assert ((measured >= 0) & (measured <= 1)).all(axis=None)
    titled, inside = where_to_look.regions(untrained, val, [2], gamma=0.5)
    assert list(titled) == list(inside) == list(where_to_look.REGIONS.values())
    assert all(parameter.grad is None for parameter in untrained.parameters())


def test_the_gradient_is_that_of_the_detection_loss(untrained: nn.Module, val: CocoDataset) -> None:
    """Against a finite difference along a random direction, in float64."""
    model = untrained.double()
    batch = collate([val[2]])
    targets = replace(batch.targets, boxes=batch.targets.boxes.double())
    with torch.no_grad():
        memory = model.encode(batch.pixels.double(), batch.padding)
    output, gradients = where_to_look.gradients(model, memory, targets)
    name = "tokens" if hasattr(memory, "tokens") else "maps"
    levels = getattr(memory, name)
    random = torch.Generator().manual_seed(0)
    directions = [torch.randn(level.shape, generator=random, dtype=torch.float64) for level in ([levels] if name == "tokens" else levels)]

    def loss(step: float) -> Tensor:
        moved = [x + step * d for x, d in zip([levels] if name == "tokens" else levels, directions, strict=True)]
        with torch.no_grad():
            (found,) = model.decode(replace(memory, **{name: moved[0] if name == "tokens" else moved}))
        criterion = SetCriterion()
        return sum(value.sum() for value in criterion(found, targets, match(criterion.problems(found, targets))).values())

    flat = torch.cat([g.flatten(2) for g in gradients], dim=2)
    along = directions[0].transpose(1, 2) if name == "tokens" else torch.cat([d.flatten(2) for d in directions], dim=2)
    expected = (loss(1e-6) - loss(-1e-6)) / 2e-6
    assert (flat * along).sum().item() == pytest.approx(expected.item(), rel=1e-3)
    untrained.float()
    assert [g.shape[2] for g in gradients] == [mask[0].numel() for mask in output.padding]


def test_stability_table_counts_objects(val: CocoDataset) -> None:
    scores = {"student": [{"queries": np.array([[2, 0], [1, 1]]), "objects": np.array([[1, 0], [1, 0]])}]}
    line, empty = stability.instability_table(scores | {"teacher": []}, val, [0, 1]).to_dict("records")
    assert empty["seeds"] == 0 and np.isnan([empty["queries an image"], empty["percent of objects a step"]]).all()
    objects = sum(len(one.boxes) for one in detections.ground_truth(val, [0, 1]))
    assert (line["queries an image"], line["objects an image"]) == (2, 1)
    assert line["percent of objects a step"] == pytest.approx(100 * 2 / (2 * objects), abs=0.01)


def test_no_transformers_folder_is_no_detections(tmp_path: Path) -> None:
    assert detections.detect_with_transformers(tmp_path, []) is None


def test_sliders_need_ipywidgets(teacher: nn.Module, val: CocoDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(InputError, match="needs ipywidgets"):
        query_masks.explore(teacher, val, 0, gamma=0.5)


def test_sliders_show_what_they_are_set_to(teacher: nn.Module, val: CocoDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython.display
    import ipywidgets

    seen, called = [], {}
    monkeypatch.setattr(ipywidgets, "interact", lambda show, **sliders: called.update(show=show, sliders=sliders))
    monkeypatch.setattr(IPython.display, "display", seen.append)
    query_masks.explore(teacher, val, 1, gamma=0.5)
    assert called["sliders"]["number"].max == 7 and called["sliders"]["stage"].max == 2 and called["sliders"]["rank"].max == 20
    called["show"](3, 2, 1, 0.25)
    query = query_masks.look(teacher, val, 3).queries(0.25, 0).best(2)[-1]
    own, weight = (axes.get_title() for axes in seen[0].axes[1:3])
    assert own.startswith(f"stage 1, query {query}:") and weight.startswith("Eq. 9, stage 1") and weight.endswith("% inside")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"detector": "yolo"}, "'detector' = 'yolo': preset smoke has no recipes for .*; it has them for: deformable_detr"),
        ({"detectors": ["adamixer"], "preset": "quick"}, "'detectors' = 'adamixer': preset quick"),
        ({"setting": "sudent"}, "'setting' = 'sudent'.*known: teacher, student"),
        ({"image": "nowhere.jpg"}, "'image.*nowhere.jpg'.*no such file"),
        ({"image": 8}, "'image' = 8: .* 0 to 7"),
        ({"image": "-1"}, "'image"),
        ({"image": True}, "'image"),
        ({"images": [0, 9]}, "'images' = 9: .* 0 to 7"),
        ({"images": "first"}, "'images"),
        ({"interactive": "perhaps"}, "'interactive'"),
        ({"data": "nowhere"}, "'data' = 'nowhere': no such folder"),
        ({"datas": "x"}, "unknown parameter 'datas'"),
    ],
)
def test_bad_parameters_are_named(given: dict, named: str) -> None:
    with pytest.raises(InputError, match=f"parameters: .*{named}"):
        open_session(**(GOOD | given))


def test_good_parameters_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.touch()
    session = open_session(**GOOD, image="3", images="0 1", interactive="false", setting="fgd+mgd")
    assert (session.image, session.images, session.interactive, session.setting) == (3, (0, 1), False, "fgd+mgd")
    assert open_session(**GOOD, image=str(file)).image == file
    assert list(open_session(**GOOD, detectors=[]).each()) == ["Deformable DETR", "Conditional DETR", "AdaMixer"]
    (one,) = open_session(**GOOD, detectors="adamixer").each().values()
    assert one.preset.student.detector == "adamixer"
    assert open_session(**GOOD, detector="conditional_detr").preset.student.detector == "conditional_detr"


def test_the_teacher_sees_the_students_images() -> None:
    changes = {"resize.short": 48, "schedule.lr": 1e-4, "teacher.schedule.steps": 9}
    preset, plain = open_session(**GOOD, changes=changes).preset, get_preset("smoke")
    assert preset.student.resize.short == preset.teacher.resize.short == 48
    assert (preset.teacher.schedule.lr, preset.teacher.schedule.steps) == (plain.teacher.schedule.lr, 9)
    assert (preset.student.schedule.lr, preset.student.schedule.steps) == (1e-4, plain.student.schedule.steps)


def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **given: str) -> Session:
    monkeypatch.setenv("DETRDISTILL_RESULTS", str(tmp_path / "kept"))
    return open_session(**(GOOD | {"preset": "quick"}), **given)


def test_own_data_have_their_own_store_and_no_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "mine")
    session = own(tmp_path, monkeypatch, data=str(folder), results="results/own/cats")
    recipe = session.preset.recipe("detrdistill")
    assert recipe.data == recipe.teacher.data == Folder(path=folder) and recipe.teacher_floor == 0
    assert session.store.root == tmp_path / "kept" / "own" / "cats" and session.on_folder() is session
    assert own(tmp_path, monkeypatch, results=str(tmp_path / "there")).store.root == tmp_path / "there"
    assert own(tmp_path, monkeypatch).store.root == tmp_path / "kept" / "quick"


def test_without_own_data_the_digits_are_a_folder() -> None:
    session = open_session(**GOOD).on_folder()
    data = session.preset.student.data
    assert isinstance(data, Folder) and (data.path / "instances_val.json").is_file()
    assert session.preset.teacher.data == data and session.preset.floor < 0, "smoke's teacher may know nothing"
    assert len(open_split(session.preset.student, "val")) == 8


def test_parameters_are_refused_before_torch_is_imported() -> None:
    program = (
        "import sys\nfrom detrdistill.session import open_session\n"
        "try: open_session(preset='smoke', seeds=[0], device='cpu', progress=False, image='nowhere.jpg')\n"
        "except ValueError as error: print(error, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert "'nowhere.jpg'" in done.stdout and done.stdout.endswith("False\n")

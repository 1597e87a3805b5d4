"""Weights from anywhere: every format gives the detector back, and whatever does not fit is refused with a remedy."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from detrdistill import commands
from detrdistill.checkpoints.names import COCO_91, OFFICIAL_ADAMIXER, rename
from detrdistill.checkpoints.pretrained import load_detector_weights, load_pretrained
from detrdistill.errors import InputError
from detrdistill.models import build_detector
from detrdistill.models.weights import classes_of, classes_text, save_weights
from detrdistill.recipes.identity import run_id
from detrdistill.recipes.parts import BackboneRecipe, Schedule
from detrdistill.recipes.recipe import Recipe as FullRecipe
from detrdistill.records import Record
from detrdistill.runs.store import Store
from tests.models.small import CLASSES, KINDS, batch, randomise, small_detector

every_kind = pytest.mark.parametrize("kind", KINDS)
COCO = [name for name in COCO_91 if name]
# What the tensors of the small detectors do not show.
UNSEEN = {"heads": 4, "queries": 5}
ARGS = {
    "conditional": {"nheads": 4, "dropout": 0.0, "dilation": False},
    "deformable": {"nheads": 4, "enc_n_points": 2, "dec_n_points": 2, "with_box_refine": False, "two_stage": False},
    "deformable-refine": {"nheads": 4, "enc_n_points": 2, "dec_n_points": 2, "with_box_refine": True, "two_stage": False},
    "deformable-two-stage": {
        "nheads": 4, "enc_n_points": 2, "dec_n_points": 2, "with_box_refine": True, "two_stage": True, "num_queries": 5,
    },
}  # fmt: skip


def official_state(kind: str, detector: nn.Module) -> dict[str, Tensor]:
    """A detector's tensors as the official code would save them, repeated tensors included."""
    state = {name: value for name, value in detector.state_dict().items() if not name.endswith("num_batches_tracked")}
    if kind == "adamixer":
        return {rename(name, [(ours, theirs) for theirs, ours in OFFICIAL_ADAMIXER]): value for name, value in state.items()}
    inside = (
        r"(level_embed|reference_points|enc_output|pos_trans)" if kind.startswith("deformable") else r"(norm|query_scale|ref_point_head)\."
    )
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        name = re.sub(r"^backbone\.", "backbone.0.", name)
        name = re.sub(rf"^{inside}", lambda m: f"transformer.{'' if kind.startswith('deformable') else 'decoder.'}{m[0]}", name)
        name = re.sub(r"^(encoder|decoder)\.", r"transformer.\1.layers.", name)
        name = name.replace(".sa_out_proj.", ".self_attn.out_proj.").replace(".ca_out_proj.", ".cross_attn.out_proj.")
        found[name] = value
        if kind == "deformable" and re.match(r"(class|bbox)_embed", name):
            found[name.replace(".0.", ".1.", 1)] = value
        elif kind in ("deformable-refine", "deformable-two-stage") and name.startswith("bbox_embed"):
            found[f"transformer.decoder.{name}"] = value
        elif kind == "deformable-two-stage" and name.startswith("class_embed"):
            found[f"transformer.decoder.{name}"] = value
    return found


def mmdet_state(detector: nn.Module) -> dict[str, Tensor]:
    """A plain Deformable DETR's tensors under mmdetection's names, by the table of the oracles; its neck without bias."""
    table = Path(__file__).parents[1] / "parity" / "oracles" / "state_dict_keys.json"
    pairs = json.loads(table.read_text(encoding="utf-8"))["models"]["mmdet_deformable_name_map"]["pairs"]
    found: dict[str, Tensor] = {}
    for name, value in official_state("deformable", detector).items():
        at_zero = re.sub(r"(layers|embed)\.\d+\.(?!0\.weight|0\.bias)", r"\1.0.", name, count=1)
        if name.startswith("backbone."):
            found[name.replace("backbone.0.body.", "backbone.")] = value
        elif name.startswith("input_proj."):
            level, part, rest = re.match(r"input_proj\.(\d+)\.(\d)\.(.*)", name).groups()
            if (part, rest) != ("0", "bias"):
                found[f"neck.convs.{level}.{'conv' if part == '0' else 'gn'}.{rest}"] = value
        else:
            number = re.search(r"(?:layers|embed)\.(\d+)\.", name)
            theirs = pairs[at_zero]
            found["bbox_head." + (re.sub(r"\.0\.", f".{number[1]}.", theirs, count=1) if number else theirs)] = value
    return found


def same(a: nn.Module, b: nn.Module) -> None:
    """Both detect the same."""
    images = batch((64, 96), (96, 50))
    with torch.no_grad():
        (one,), (other,) = (detector.decode(detector.encode(*images)) for detector in (a, b))
    # BatchNorm frozen and in evaluation mode differ in the order of operations.
    torch.testing.assert_close(one.logits, other.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.boxes, other.boxes, atol=1e-4, rtol=1e-4)


@every_kind
def test_the_kits_own(kind: str, tmp_path: Path) -> None:
    detector = small_detector(kind)
    path = tmp_path / "weights.safetensors"
    save_weights(path, detector, {"categories": "a, b, c"})
    given = UNSEEN if "two-stage" in kind else {"heads": 4}
    again, about = load_pretrained(path, **given)
    assert about.names == ("a", "b", "c") and about.origin == "kit" and about.rows == (0, 1, 2)
    back = again.state_dict()
    assert back.keys() == detector.state_dict().keys()
    assert all(torch.equal(value, back[name]) for name, value in detector.state_dict().items())
    same(detector, again)
    other = small_detector(kind, seed=7)
    load_detector_weights(other, path)
    same(detector, other)


@pytest.mark.parametrize("names", [["a", "b", "c"], ["cup, mug", "plate", "Ü"], ["[a]", "b", "c"], ['["a"]'], [""]])
def test_names_of_classes_in_a_header(names: list[str]) -> None:
    text = classes_text(names)
    assert classes_of({"categories": text}) == names and classes_of({}) is None
    assert classes_of({"categories": "[a], b"}) == ["[a]", "b"] and classes_of({"categories": "[1, 2]"}) == ["[1", "2]"]
    assert (text == ", ".join(names)) == (names[0] in ("a", "")), "as in files that were written before commas were thought of"


def test_a_runs_folder_tells_everything_and_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = FullRecipe(
        backbone=BackboneRecipe(name="resnet18", weights="none"), form="two_stage", dim=32, heads=4, ffn=32, encoder_layers=1,
        decoder_layers=2, queries=5, levels=2, points=2, resize={"short": 96, "long": 200}, schedule=Schedule(steps=1),
    )  # fmt: skip
    store, detector = Store(tmp_path / "results"), build_detector(recipe, CLASSES).eval()
    save_weights(store.weights(recipe), detector, {"categories": "a, b, c"})
    store.write(Record(id=run_id(recipe), recipe=recipe, metrics={}, curve=[], cost={}, parents={}, provenance={}))
    again, about = load_pretrained(store.folder(recipe))
    assert about.settings["dropout"] == 0.1 and about.settings["backbone"] == recipe.backbone
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in detector.state_dict().items())

    commands.export(store.folder(recipe), tmp_path / "out")
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["size"] == {"shortest_edge": 96, "longest_edge": 200}
    same(detector, load_pretrained(tmp_path / "out")[0])
    with pytest.raises(InputError, match=r"no record\.json, so it is not a complete run"):
        commands.export(tmp_path / "out", tmp_path / "again")


@every_kind
def test_official_files(kind: str, tmp_path: Path) -> None:
    detector = small_detector(kind)
    path = tmp_path / "checkpoint.pth"
    state = official_state(kind, detector)
    if kind == "adamixer":
        torch.save({"state_dict": state, "meta": {"CLASSES": ("a", "b", "c"), "epoch": 12}, "optimizer": {}}, path)
    else:
        args = argparse.Namespace(**ARGS[kind], backbone="resnet50", lr_drop=40, masks=False)
        torch.save({"model": state, "args": args, "optimizer": {"state": {}}, "lr_scheduler": {}, "epoch": 49}, path)
    again, about = load_pretrained(path)
    assert about.origin == "official" and about.names == (("a", "b", "c") if kind == "adamixer" else (None,) * CLASSES)
    assert about.settings["heads"] == 4 and about.settings["queries"] == 5 and about.settings["backbone"]["name"] == "thin_resnet"
    same(detector, again)
    # The state_dict alone does not tell everything.
    torch.save(state, path)
    if kind != "adamixer":
        with pytest.raises(InputError, match=r"nothing tells these settings of it; give heads="):
            load_pretrained(path)
    again, _ = load_pretrained(path, **UNSEEN)
    same(detector, again)


@pytest.mark.parametrize("extra", [False, True], ids=["levels", "extra level"])
def test_mmdetections_names(extra: bool, tmp_path: Path) -> None:
    detector = small_detector("deformable", levels=4 if extra else 3)
    for projection in detector.input_proj:
        nn.init.zeros_(projection[0].bias)
    state = mmdet_state(detector)
    if extra:
        state = {name.replace("neck.convs.3.", "neck.extra_convs.0."): value for name, value in state.items()}
    torch.save({"state_dict": state, "meta": {"CLASSES": ("a", "b", "c")}}, tmp_path / "epoch_50.pth")
    again, about = load_pretrained(tmp_path / "epoch_50.pth", heads=4)
    assert about.origin == "mmdetection" and about.settings["points"] == 2 and about.settings["form"] == "plain"
    same(detector, again)


@pytest.mark.parametrize("prefix", ["module.", "student.", "teacher.", "model.", "module.student.", "student.module."])
def test_prefixes_are_understood(prefix: str, tmp_path: Path) -> None:
    detector, path = small_detector("conditional"), tmp_path / "w.pth"
    state = {prefix + name: value for name, value in official_state("conditional", detector).items()}
    losses = {"losses.features.adapter.weight": torch.ones(2, 2)} if prefix.startswith(("student", "teacher")) else {}
    torch.save(state | losses, path)
    again, about = load_pretrained(path, heads=4)
    assert about.left_out == (("losses",) if losses else ())
    same(detector, again)


def test_of_a_student_and_a_teacher_one_must_be_chosen(tmp_path: Path) -> None:
    student, teacher = (small_detector("deformable", seed=seed) for seed in (1, 2))
    path = tmp_path / "both.pth"
    states = {"student": student.state_dict(), "teacher": teacher.state_dict()}
    torch.save({f"{part}.{name}": value for part, state in states.items() for name, value in state.items()}, path)
    with pytest.raises(InputError, match=r"both\.pth hold a student and a teacher; say part='student' or part='teacher'"):
        load_pretrained(path, heads=4)
    for part, detector in (("student", student), ("teacher", teacher)):
        again, about = load_pretrained(path, heads=4, part=part)
        assert about.left_out == ({"student": "teacher", "teacher": "student"}[part],)
        same(detector, again)
    torch.save(student.state_dict(), path)
    with pytest.raises(InputError, match="hold no tensors of a 'teacher'"):
        load_pretrained(path, heads=4, part="teacher")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_absent_files(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; correct the path"):
        load_pretrained(tmp_path / f"w{suffix}")


@pytest.mark.parametrize("content", [[1], {"model": "path"}, {"epoch": 3}, {}])
def test_files_without_tensors(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"save model\.state_dict\(\)"):
        load_pretrained(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda state: state.pop("transformer.encoder.layers.0.norm1.bias"), r"1 missing \(encoder\.0\.norm1\.bias\); it may be"),
        (lambda state: state.update({"label_enc.weight": torch.ones(2)}), r"1 unexpected \(label_enc\.weight\)"),
        (lambda state: state.update({"transformer.level_embed": torch.ones(3, 64)}), r"1 misshaped \(level_embed \[3, 64\] instead of"),
        (lambda state: state.update({"class_embed.1.bias": torch.ones(3)}), r"class_embed\.1\.bias differs from another tensor"),
        (lambda state: [state.pop(f"class_embed.{i}.{kind}") for i in (0, 1) for kind in ("weight", "bias")], "without its class head"),
        (lambda state: state.pop("transformer.decoder.layers.0.norm1.weight"), "without 'decoder.0.norm1.weight'"),
        (lambda state: state.pop("backbone.0.body.conv1.weight"), "its backbone has"),
    ],
    ids=["missing", "unexpected", "misshaped", "unshared", "headless", "no size", "no stem"],
)
def test_the_report(spoil: Callable, message: str, tmp_path: Path) -> None:
    detector, path = small_detector("deformable"), tmp_path / "w.pth"
    state = official_state("deformable", detector)
    spoil(state)
    torch.save({"model": state, "args": argparse.Namespace(**ARGS["deformable"])}, path)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    with pytest.raises(InputError, match=message) as error:
        load_pretrained(path)
    assert "\n" not in str(error.value) and "w.pth" in str(error.value)
    with pytest.raises(InputError):
        load_detector_weights(detector, path)
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())


def test_another_detectors_checkpoint(tmp_path: Path) -> None:
    torch.save(official_state("conditional", small_detector("conditional")), tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"official weights of a Conditional DETR\) cannot be loaded into a DeformableDETR"):
        load_detector_weights(small_detector("deformable"), tmp_path / "w.pth")
    torch.save({"conv1.weight": torch.ones(1), "fc.weight": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"an image classifier: give it as backbone\.weights"):
        load_pretrained(tmp_path / "w.pth")
    torch.save({"transformer.decoder.layers.0.multihead_attn.in_proj_weight": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="no Conditional DETR, Deformable DETR or AdaMixer in any format known here"):
        load_pretrained(tmp_path / "w.pth")
    torch.save(official_state("conditional", small_detector("conditional")), tmp_path / "w.pth")
    with pytest.raises(InputError, match="unknown parameter 'colour'"):
        load_pretrained(tmp_path / "w.pth", heads=4, colour="red")


# Class heads


def of_classes(kind: str, classes: int, path: Path) -> nn.Module:
    """A small detector with that many classes, saved as an official file."""
    detector = small_detector(kind)
    recipe = {"encoder_layers": 1, "decoder_layers": 2, "queries": 5, "dim": 32, "heads": 4, "ffn": 32, "dropout": 0.0}
    thin = BackboneRecipe(name="thin_resnet", width=8, weights="none")
    detector = build_detector(FullRecipe(**(recipe | KINDS[kind]), backbone=thin, schedule=Schedule(steps=1)), classes)
    randomise(detector)
    torch.save({"model": official_state(kind, detector), "args": argparse.Namespace(**ARGS[kind])}, path)
    return detector.eval()


@pytest.mark.parametrize("kind", ["conditional", "deformable", "deformable-refine", "deformable-two-stage"])
def test_91_outputs_by_coco_id_become_the_80_classes_of_the_data(kind: str, tmp_path: Path) -> None:
    whole = of_classes(kind, 91, tmp_path / "w.pth")
    picked, about = load_pretrained(tmp_path / "w.pth", categories=COCO)
    ids = [i for i, name in enumerate(COCO_91) if name]
    assert list(about.rows) == ids and about.rows[:13] == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14)
    images = batch((64, 96), (96, 50))
    with torch.no_grad():
        (all_91,), (only_80,) = (detector.decode(detector.encode(*images)) for detector in (whole, picked))
    torch.testing.assert_close(all_91.logits[..., ids], only_80.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(all_91.boxes, only_80.boxes, atol=1e-4, rtol=1e-4)


def test_80_outputs_are_cocos_classes_one_after_the_other(tmp_path: Path) -> None:
    of_classes("deformable", 80, tmp_path / "w.pth")
    shuffled = COCO[40:] + COCO[:40]
    assert load_pretrained(tmp_path / "w.pth", categories=shuffled)[1].rows == (*range(40, 80), *range(40))


@pytest.mark.parametrize("kind", ["conditional", "deformable-two-stage"])
def test_a_head_is_replaced_only_when_asked(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    whole = of_classes(kind, 91, path)
    wanted = ["zebra", "unicorn", "Person"]
    with pytest.raises(InputError, match=r"1 unknown to it \(unicorn\), 78 not among them \(bicycle, car, motorcycle, \.\.\.\)") as error:
        load_pretrained(path, categories=wanted)
    assert "with replace_head=True it keeps 2 by name, starts 1 afresh and drops 78" in str(error.value)
    detector, about = load_pretrained(path, categories=wanted, replace_head=True)
    assert about.rows == (24, None, 1) and [about.names[row] for row in (24, 1)] == ["zebra", "person"]
    name = "class_embed.weight" if kind == "conditional" else "class_embed.0.weight"
    old, new = whole.state_dict()[name], detector.state_dict()[name]
    assert torch.equal(new[[0, 2]], old[[24, 1]])
    fresh = build_detector(FullRecipe(**about.settings, schedule=Schedule(steps=1)), 3).state_dict()[name]
    assert torch.equal(new[1], fresh[1])
    if kind == "deformable-two-stage":
        # What makes a good proposal is the first output of its head, whatever the classes.
        last = f"class_embed.{len(detector.class_embed) - 1}.weight"
        assert torch.equal(detector.state_dict()[last][0], whole.state_dict()[last][0])


def test_other_class_counts(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    of_classes("deformable", 7, path)
    with pytest.raises(InputError, match=r"has 7 class outputs, the detector 3; give the names of the classes as 'categories'"):
        load_detector_weights(small_detector("deformable"), path)
    with pytest.raises(InputError, match="does not say its classes; name its 7 outputs as 'outputs'"):
        load_pretrained(path, categories=["a", "b", "c"])
    with pytest.raises(InputError, match="2 categories for a detector of 3 classes"):
        load_detector_weights(small_detector("deformable"), path, categories=["a", "b"])
    with pytest.raises(InputError, match="'outputs' names 2 classes, the head has 7"):
        load_pretrained(path, outputs=["a", "b"], categories=["a"])
    outputs = ["a", None, "b", None, None, "c", None]
    _, about = load_pretrained(path, outputs=outputs, categories=["c", "a", "b"])
    assert about.rows == (5, 0, 2)
    about = load_detector_weights(small_detector("deformable"), path, categories=["x", "y", "z"], replace_head=True)
    assert about.rows == (None, None, None)

"""Files as people have them: mmdetection 3, compiled, averaged and wrapped models, and what lies beside the weights."""

import argparse
import re
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detrdistill.checkpoints.pretrained import load_pretrained, read_with_settings
from detrdistill.errors import InputError
from detrdistill.models.weights import read_pickle, save_weights
from detrdistill.recipes.parts import Resize
from tests.checkpoints.test_pretrained import official_state, same
from tests.models.small import QUERIES, small_detector

MMDET3 = ("conditional", "deformable", "deformable-refine", "deformable-two-stage")
FORMS = {
    "conditional": "type='ConditionalDETR', cross_attn_cfg=dict(num_heads=4), self_attn_cfg=dict(num_heads=4)",
    "deformable": "with_box_refine=False, as_two_stage=False, cross_attn_cfg=dict(num_heads=4, num_points=2)",
    "deformable-refine": "with_box_refine=True, as_two_stage=False, cross_attn_cfg=dict(num_heads=4, num_points=2)",
    "deformable-two-stage": f"with_box_refine=True, as_two_stage=True, num_queries={QUERIES}, num_heads=4, num_points=2",
}


def mmdet3_state(kind: str, detector: nn.Module) -> dict[str, Tensor]:
    """A detector's tensors as mmdetection 3 would save them (mmdet/models/detectors, layers/transformer, dense_heads of its 3.x code)."""
    conditional, found = kind == "conditional", {}
    for ours, value in detector.state_dict().items():
        name = re.sub(r"^backbone\.body\.", "backbone.", ours)
        name = re.sub(r"^(encoder|decoder)\.(\d+)\.", r"\1.layers.\2.", name)
        name = name.replace(".linear1.", ".ffn.layers.0.0.").replace(".linear2.", ".ffn.layers.1.")
        name = re.sub(r"^query_embed\.", "query_embedding.", name)
        if name.startswith("encoder"):
            name = re.sub(r"\.norm(\d)\.", lambda m: f".norms.{int(m[1]) - 1}.", name)
            name = name.replace(".self_attn.", ".self_attn.attn.") if conditional else name
        elif conditional:
            name = re.sub(r"\.norm(\d)\.", lambda m: f".norms.{int(m[1]) - 1}.", name)
            name = re.sub(r"\.(sa|ca)_", lambda m: {"sa": ".self_attn.", "ca": ".cross_attn."}[m[1]], name)
            name = re.sub(r"^norm\.", "decoder.post_norm.", name)
            name = re.sub(r"^(query_scale|ref_point_head)\.", r"decoder.\1.", name)
            name = re.sub(r"^input_proj\.", "neck.convs.0.conv.", name)
            heads = {"class_embed.": "fc_cls.", "bbox_embed.layers.0.": "reg_ffn.layers.0.0."}
            heads |= {"bbox_embed.layers.1.": "reg_ffn.layers.1.", "bbox_embed.layers.2.": "fc_reg."}
            name = next((f"bbox_head.{new}{name.removeprefix(old)}" for old, new in heads.items() if name.startswith(old)), name)
        else:
            # Its norms are numbered as they run: after the self-attention, the cross-attention, the feed-forward network.
            name = re.sub(r"\.norm(\d)\.", lambda m: f".norms.{ {'2': 0, '1': 1, '3': 2}[m[1]] }.", name)
            name = re.sub(r"^decoder\.(.*)\.self_attn\.", r"decoder.\1.self_attn.attn.", name)
            if match := re.match(r"input_proj\.(\d+)\.(\d)\.(.*)", name):
                if match[2] == "0" and match[3] == "bias":
                    continue  # none before a norm
                where = f"convs.{match[1]}" if int(match[1]) < 3 else f"extra_convs.{int(match[1]) - 3}"
                name = f"neck.{where}.{'conv' if match[2] == '0' else 'gn'}.{match[3]}"
            name = re.sub(r"^class_embed\.", "bbox_head.cls_branches.", name)
            name = re.sub(r"^bbox_embed\.(\d)\.layers\.(\d)\.", lambda m: f"bbox_head.reg_branches.{m[1]}.{2 * int(m[2])}.", name)
            name = re.sub(r"^reference_points\.", "reference_points_fc.", name)
            name = re.sub(r"^(enc_output|pos_trans)\.", r"\1_fc.", name).replace("enc_output", "memory_trans")
        found[name] = value
        if kind == "deformable" and name.startswith("bbox_head"):
            found[re.sub(r"branches\.0", "branches.1", name)] = value
    return found


def without_neck_bias(kind: str, levels: int = 4) -> nn.Module:
    detector = small_detector(kind, **({} if kind == "conditional" else {"levels": levels}))
    for projection in [] if kind == "conditional" else detector.input_proj:
        nn.init.zeros_(projection[0].bias)
    return detector


@pytest.mark.parametrize("kind", MMDET3)
def test_mmdetection_3(kind: str, tmp_path: Path) -> None:
    detector, path = without_neck_bias(kind), tmp_path / "epoch_50.pth"
    state = mmdet3_state(kind, detector)
    meta = {"dataset_meta": {"classes": ("a", "b", "c"), "palette": [(1, 2, 3)]}, "mmengine_version": "0.10.7", "epoch": 50}
    torch.save({"state_dict": state, "meta": meta}, path)
    given = {"heads": 4} | ({"queries": QUERIES} if kind == "deformable-two-stage" else {})
    with pytest.raises(InputError, match="nothing tells these settings of it; give heads="):
        load_pretrained(path)
    for content, told in ((meta, given), (meta | {"cfg": f"model = dict({FORMS[kind]})"}, {})):
        torch.save({"state_dict": state, "meta": content, "message_hub": {}}, path)
        again, about = load_pretrained(path, **told)
        assert about.origin == "mmdetection" and about.names == ("a", "b", "c")
        back = again.state_dict()
        assert all(torch.equal(value, back[name]) for name, value in detector.state_dict().items() if "num_batches" not in name)
        same(detector, again)
    if kind == "deformable":  # its one head, unrepeated
        torch.save({name: value for name, value in state.items() if "branches.1." not in name}, path)
        same(detector, load_pretrained(path, heads=4)[0])


def test_what_an_mmdetection_config_says(tmp_path: Path) -> None:
    state, path = mmdet3_state("deformable", without_neck_bias("deformable")), tmp_path / "w.pth"

    def load(text, **given):
        torch.save({"state_dict": state, "meta": {"cfg": text, "CLASSES": ("a", "b", "c")}}, path)
        return load_pretrained(path, **given)[1].settings

    assert load("mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], num_heads=4, num_points=2")["resize"] == Resize()
    settings = load("mean=[\n127.5,\n127.5,\n0,\n], std=[255, 255, 255], scale=(\n640,\n480,\n), with_box_refine=True", heads=4)
    assert settings["resize"] == Resize(short=480, long=640, mean=(0.5, 0.5, 0), std=(1, 1, 1)) and settings["form"] == "box_refine"
    for text in ("num_heads=4", "num_heads=4, num_heads=8, num_points=2", "a[num_heads=len([4])]"):  # of which attention, and then?
        with pytest.raises(InputError, match="give heads=, points="):
            load(text)
    for text in ("bgr_to_rgb=False", "to_rgb = False", "{'to_rgb': False}", "dict(type='Resize', keep_ratio=False)"):
        with pytest.raises(InputError, match=r"its config wants BGR images or stretches them"):
            load(text)


def test_how_an_mmdetection_config_says_how_images_are_prepared(tmp_path: Path) -> None:
    state, path = mmdet3_state("deformable", without_neck_bias("deformable")), tmp_path / "w.pth"

    def load(text, settings=None):
        torch.save({"state_dict": state, "meta": {"cfg": text, "CLASSES": ("a", "b", "c")}}, path)
        return read_with_settings(path, {"heads": 4} | (settings or {}))[1].settings["resize"]

    for text in (
        "scale = [ 640, 480 ], mean=(127.5, 0., .0,), std=[1.0, 1.0, 1.0]",
        "{'img_scale': (480, 640), 'mean': [127.5, 0, 0], 'std': (1, 1, 1)}",
    ):
        found = load(text)
        assert (found.short, found.long, found.mean) == (480, 640, (0.5, 0, 0)) and found.std == pytest.approx([1 / 255] * 3, rel=1e-11)
    train, test = "train_pipeline = [\n  dict(scale=[(400, 4200), (500, 4200)]),\n]\n", "test_pipeline = [\n  dict(scale=(640, 480)),\n]\n"
    rest = "x = dict(scale=(96, 96), std=0.01)\n"
    assert load(train + test + rest) == load(rest + test + train) == Resize(short=480, long=640)
    for text, asked in (
        (train, r"resize\.short=, resize\.long="),
        (rest + "y = dict(scale=(64, 64))", r"resize\.short=, resize\.long="),
        (rest + train + "test_pipeline = []", r"resize\.short=, resize\.long="),
        ("mean=[0, 0]", r"resize\.mean="),
        ("std=[1, 1, 1], std=[x, 1, 1]", r"resize\.std="),
    ):
        with pytest.raises(InputError, match=rf"does not say clearly how images are prepared; give {asked}$") as error:
            load(text)
        assert "\n" not in str(error.value)
    stated = {"resize.short": "64", "resize.long": "96", "resize.mean": "0.5, 0.5,0.5"}
    assert load(train + "mean=[0]", stated) == Resize(short=64, long=96, mean=(0.5, 0.5, 0.5))


def test_heads_of_two_stages_are_not_shared_though_they_are_equal(tmp_path: Path) -> None:
    detector, path = without_neck_bias("deformable-two-stage"), tmp_path / "w.pth"
    for heads in (detector.class_embed, detector.bbox_embed):
        for head in heads[1:]:
            head.load_state_dict(heads[0].state_dict())
    torch.save({"state_dict": mmdet3_state("deformable-two-stage", detector)}, path)
    again, about = load_pretrained(path, heads=4, queries=QUERIES)
    assert about.settings["form"] == "two_stage"
    same(detector, again)


@pytest.mark.parametrize("name", ["heads", "points"])
@pytest.mark.parametrize("value", ["0", "abc", "1.5", 0])
def test_numbers_that_are_none(name: str, value: object, tmp_path: Path) -> None:
    torch.save(small_detector("deformable").state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError, match=f"'{name}' = {value!r}: a whole number above 0 is meant"):
        load_pretrained(tmp_path / "w.pth", **{name: value})


def test_a_tensor_called_ema(tmp_path: Path) -> None:
    torch.save(small_detector("conditional").state_dict() | {"ema": torch.ones(2), "model": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"do not fit this ConditionalDETR"):
        load_pretrained(tmp_path / "w.pth", heads=4)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model._orig_mod.", "model.module.", "student._orig_mod.module."]
)
def test_wrappers_in_any_order(prefix: str, tmp_path: Path) -> None:
    detector, path = small_detector("conditional"), tmp_path / "w.pth"
    torch.save({prefix + name: value for name, value in official_state("conditional", detector).items()}, path)
    same(detector, load_pretrained(path, heads=4)[0])


def test_a_compiled_part(tmp_path: Path) -> None:
    detector = small_detector("deformable")
    state = {name.replace("decoder.", "decoder._orig_mod.", 1): value for name, value in detector.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    same(detector, load_pretrained(tmp_path / "w.pth", heads=4)[0])


def averaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"n_averaged": torch.tensor(7)} | {f"module.{name}": value for name, value in state.items()}


@pytest.mark.parametrize("name", ["ema", "model_ema", "ema_model", "ema_state_dict"])
def test_the_average_is_taken_and_said_and_the_model_can_be_asked_for(name: str, tmp_path: Path) -> None:
    model, average, path = small_detector("conditional"), small_detector("conditional", seed=1), tmp_path / "w.pth"
    states = [official_state("conditional", one) for one in (model, average)]
    for saved in (states[1], averaged(states[1]), {"module": states[1], "updates": 9, "warmups": 2000}):
        torch.save({"model": states[0], name: saved, "optimizer": {"state": {}}, "epoch": 3}, path)
        again, about = load_pretrained(path, heads=4)
        same(average, again)
        assert about.entry.startswith(name) and f"w.pth, entry '{about.entry}' (official" in about.title
        again, about = load_pretrained(path, heads=4, part="model")
        same(model, again)
        assert about.entry == "model"
        torch.save({name: saved}, path)
        same(average, load_pretrained(path, heads=4)[0])
        with pytest.raises(InputError, match=r"no entry of a 'model' \(.*\); leave out 'part'"):
            load_pretrained(path, heads=4, part="model")
    torch.save({"model": states[0]}, path)
    assert load_pretrained(path, heads=4)[1].entry is None
    with pytest.raises(InputError, match=r"no entry of a 'ema' \(model\)"):
        load_pretrained(path, heads=4, part="ema")
    save_weights(tmp_path / "w.safetensors", model, {})
    with pytest.raises(InputError, match="hold no moving average; leave out 'part'"):
        load_pretrained(tmp_path / "w.safetensors", heads=4, part="ema")


def test_mmengine_has_the_average_in_the_models_place(tmp_path: Path) -> None:
    """EMAHook swaps them when it saves."""
    model, average, path = without_neck_bias("deformable"), without_neck_bias("deformable"), tmp_path / "w.pth"
    nn.init.ones_(average.level_embed)
    states = [mmdet3_state("deformable", one) for one in (model, average)]
    meta = {"mmengine_version": "0.10.7"}
    torch.save({"state_dict": states[1], "ema_state_dict": averaged(states[0]), "meta": meta}, path)
    same(average, load_pretrained(path, heads=4)[0])
    same(model, load_pretrained(path, heads=4, part="model")[0])


class Note:
    """An object of somebody's own code."""


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old pickle"])
def test_numbers_and_paths_beside_the_weights_are_values(old: bool, tmp_path: Path) -> None:
    detector, path = small_detector("conditional"), tmp_path / "w.pth"
    args = argparse.Namespace(
        nheads=np.int64(4), lr=np.float32(0.5), flag=np.bool_(True), output_dir=Path("runs/a"), names=np.array([1, 2])
    )
    args.elsewhere, args.text, args.old = PureWindowsPath("C:/a"), np.str_("text"), np.array(3.0, dtype=">f8")[()]
    content = {"model": official_state("conditional", detector), "args": args, "best": np.float64(1.5)}
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    read = read_pickle(path)
    assert (read["best"], read["args"].nheads, read["args"].lr, read["args"].flag) == (1.5, 4, 0.5, True)
    assert type(read["args"].nheads) is int and read["args"].output_dir == PurePosixPath("runs/a")
    assert read["args"].elsewhere == PureWindowsPath("C:/a") and read["args"].text is None and not hasattr(read["args"].names, "shape")
    again, about = load_pretrained(path)
    assert about.settings["heads"] == 4
    same(detector, again)
    torch.save(content | {"args": vars(args)}, path)  # a dict of arguments
    same(detector, load_pretrained(path)[0])
    torch.save(content | {"note": Note()}, path)
    with pytest.raises(InputError, match=r"holds '.*Note' .*\(none was run\); if you trust it, save its weights alone .*: torch\.save"):
        load_pretrained(path)


def test_nothing_of_numpy_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array of objects would be unpickled by numpy: here it stands for nothing."""
    path = tmp_path / "w.pth"
    content = {"model": small_detector("conditional").state_dict(), "log": np.array([argparse.Namespace()], dtype=object)}
    torch.save(content | {"structured": np.zeros(1, dtype="i4,f4")[0]}, path)
    read = read_pickle(path)
    assert read["structured"] is None and type(read["log"]).__name__ == "Unread"


def test_part_of_a_model(tmp_path: Path) -> None:
    """As DeepSpeed saves what one process has."""
    path = tmp_path / "mp_rank_00_model_states.pt"
    state = official_state("conditional", small_detector("conditional"))
    torch.save({"module": {name: torch.empty(0) for name in state}, "ds_version": "0.16"}, path)
    with pytest.raises(InputError, match=r"tensors without numbers, .*; join the parts"):
        load_pretrained(path, heads=4)
    torch.save({"module": state, "ds_version": "0.16"}, path)
    load_pretrained(path, heads=4)
    torch.save({"optimizer_state_dict": {"step": 3}, "partitions": [1]}, path)
    with pytest.raises(InputError, match=r"no named tensors, .* \(it has optimizer_state_dict, partitions\); save"):
        load_pretrained(path)


@pytest.mark.parametrize("names", [["n_averaged"], ["module.module."], ["model.module."], ["_orig_mod."]])
def test_nothing_but_wrappers(names: list[str], tmp_path: Path) -> None:
    torch.save({name: torch.ones(1) for name in names}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="no Conditional DETR, Deformable DETR or AdaMixer in any format"):
        load_pretrained(tmp_path / "w.pth")

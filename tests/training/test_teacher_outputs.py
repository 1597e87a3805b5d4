"""Kept outputs of a teacher: equal to computing them anew, bit by bit; of this teacher alone; and only where they have room."""

import contextlib
import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from detrdistill.data.coco import Batch, collate
from detrdistill.errors import InputError
from detrdistill.models.outputs import DetectorOutput
from detrdistill.process import available_memory
from detrdistill.recipes.identity import parents
from detrdistill.recipes.methods import KDDETR, METHODS, FitNet
from detrdistill.recipes.parts import Resize
from detrdistill.recipes.presets import smoke
from detrdistill.runs.load import open_split
from detrdistill.runs.run import run
from detrdistill.runs.store import Store
from detrdistill.training import checkpointing, teacher_outputs, trainer
from detrdistill.training.fabric import make_fabric
from detrdistill.training.teacher_outputs import KeptOutputs, Teacher, flatten, kept_outputs, padded_images
from tests.distill.test_every_method import fitting, lesson
from tests.folders import write_folder
from tests.models.small import CLASSES, KINDS
from tests.training.test_trainer import distilled, sit

MADE_BY = {"teacher": "teacher-1", "weights_sha256": "1" * 64}
FLIPPED = smoke().recipe("detrdistill").replace(**{"resize.train": "flip", "schedule.evaluations": 1})


def images(sizes: Sequence[tuple[int, int]] = ((64, 64),) * 4) -> list[tuple[Tensor, dict]]:
    """Images of these sizes with objects, as a data set has them."""
    random = torch.Generator().manual_seed(0)
    found = []
    for number, size in enumerate(sizes):
        boxes = torch.rand(number, 4, generator=random) * 0.4 + 0.2
        target = {"labels": torch.arange(number) % CLASSES, "boxes": boxes, "image_id": number, "original_size": size}
        found.append((torch.randn(3, *size, generator=random), target))
    return found


def autocast(precision: str) -> contextlib.AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def show(outputs: Teacher, batch: Batch) -> DetectorOutput:
    (output,) = outputs(batch, batch.pixels.contiguous(memory_format=torch.channels_last), batch.padding)
    return output


def differences(one: DetectorOutput, other: DetectorOutput) -> list[str]:
    """The tensors that are not equal bit by bit. (Their names say in which order they lie in memory.)"""
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    return [name for name, x in one.items() if not torch.equal(x, other[name]) or x.dtype != other[name].dtype]


def lookup(folder: Path, *batches: Batch, **changes: str) -> tuple[Teacher, Teacher]:
    """Outputs kept in `folder` after a teacher has seen the batches, and those that it computes."""
    distiller, teacher = lesson("deformable-refine", [FitNet()])
    kept = Teacher(teacher, distiller, KeptOutputs(folder, MADE_BY | changes, 8))
    for batch in batches:
        show(kept, batch)
    return kept, Teacher(teacher, distiller)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_is_computed_anew(tmp_path, kind, precision):
    """Bit by bit, in batches of 8 images of one size, wherever an image stands in them; from memory, and from disk."""
    eight = images([(64, 64)] * 8)
    orders = torch.arange(8), torch.randperm(8, generator=torch.Generator().manual_seed(0)), torch.arange(8).flip(0)
    batches = [collate([eight[i] for i in order]) for order in orders]
    distiller, teacher = lesson(kind, [FitNet()], queries=16)
    with autocast(precision):
        kept = Teacher(teacher, distiller, KeptOutputs(tmp_path, MADE_BY, 8))
        show(kept, batches[0])
        for again in (kept.kept, KeptOutputs(tmp_path, MADE_BY, 8)):
            kept.kept = again
            for batch in batches:
                found = show(kept, batch)
                odd = differences(found, show(Teacher(teacher, distiller), batch))
                assert not odd
                assert found.initial.proposals is None and not found.logits.requires_grad
    assert kept.images == 8, "nothing was computed again"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_padding_it_is_nearly_so(tmp_path, kind, precision):
    """Padding is part of what is looked up; in a batch that kernels do not divide evenly, a place may round otherwise than another."""
    a, b, c, d = images([(64, 96), (96, 50), (80, 64), (96, 96)])
    distiller, teacher = lesson(kind, [FitNet()])
    with autocast(precision):
        kept = Teacher(teacher, distiller, KeptOutputs(tmp_path, MADE_BY, 8))
        for pair in ([a, d], [b, d], [c, d]):
            show(kept, collate(pair))
        for pair in ([d, b], [a, d], [d, c]):
            wanted, found = (flatten(show(outputs, collate(pair))) for outputs in (Teacher(teacher, distiller), kept))
            for name, tensor in wanted.items():
                torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5)
        assert kept.images == 6, "nothing was computed again"
        show(kept, collate([b, c]))
        assert kept.images == 8, "both had been padded to another width"


def test_a_teacher_of_other_statistics_sees_its_own_pixels(tmp_path):
    """A batch normalised for the student teaches as one that was normalised for the teacher; kept outputs too."""
    distiller, teacher = lesson("deformable-refine", [FitNet()])
    ours, its = Resize(), Resize(mean=(0.5, 0.4, 0.3), std=(0.5, 1, 0.2))
    student = collate(images([(64, 96), (96, 50)]))
    colours = student.pixels * torch.tensor(ours.std)[:, None, None] + torch.tensor(ours.mean)[:, None, None]
    pixels = (colours - torch.tensor(its.mean)[:, None, None]) / torch.tensor(its.std)[:, None, None]
    wanted = show(Teacher(teacher, distiller), replace(student, pixels=pixels.masked_fill(student.padding[:, None], 0)))
    kept = Teacher(teacher, distiller, KeptOutputs(tmp_path, MADE_BY, 8), (ours, its))
    for outputs in (Teacher(teacher, distiller, None, (ours, its)), kept, kept):
        torch.testing.assert_close(show(outputs, student).logits, wanted.logits, atol=1e-4, rtol=1e-4)
    assert kept.images == 2 and not torch.allclose(show(Teacher(teacher, distiller), student).logits, wanted.logits, atol=1e-2)
    plain = Teacher(teacher, distiller, kept.kept)
    show(plain, student)
    assert plain.images == 2, "what was kept for other pixels is not taken for these"


@pytest.mark.parametrize("kind", ["deformable-refine", "deformable-two-stage", "conditional", "adamixer"])
def test_every_method_loses_the_same(tmp_path, kind):
    """All that may be kept for; KD-DETR and D3ETR have the teacher decode random queries, or write its attention down."""
    eight = images([(64, 64)] * 8)
    distiller, teacher = lesson(kind, [fitting(name, kind) for name in METHODS if name not in ("kd_detr", "d3etr")], queries=16)
    kept = Teacher(teacher, distiller, KeptOutputs(tmp_path, MADE_BY, 8))
    show(kept, collate(eight))
    batch, losses = collate(eight[::-1]), []
    for outputs in (kept, Teacher(teacher, distiller)):
        torch.manual_seed(4)  # hidden cells
        losses.append(distiller(batch.pixels, batch.padding, batch.targets, [show(outputs, batch)]))
    assert kept.images == 8 and losses[0].keys() == losses[1].keys() and len(losses[0]) > 20
    odd = [part for part, value in losses[0].items() if not torch.equal(value, losses[1][part])]
    assert not odd


def recipes_kept(tmp_path: Path, **changes) -> KeptOutputs | None:
    recipe = FLIPPED.replace(**changes)
    data = open_split(recipe, "train")
    distiller, _ = lesson("deformable-refine", recipe.methods)
    return kept_outputs(make_fabric("cpu", recipe.precision), distiller, data, recipe, "teacher-1", "1" * 64, tmp_path)


def test_only_what_can_be_counted_is_kept(tmp_path):
    assert recipes_kept(tmp_path).count == 2 * 32
    assert recipes_kept(tmp_path, **{"resize.train": "none"}).count == 32
    for augmentation in ("jitter", "detr"):
        assert recipes_kept(tmp_path, **{"resize.train": augmentation}) is None
    for asked in ("kd_detr", "d3etr", "fgd+kd_detr"):
        assert recipes_kept(tmp_path, methods=asked) is None, "the teacher decodes random queries, or writes its attention down"
    assert recipes_kept(tmp_path, methods=[KDDETR(general=0)]) is not None
    assert not list(tmp_path.iterdir())


def test_sizes_of_padded_batches_are_counted(tmp_path):
    """56 x 64 and 64 x 48 pixels, which a batch may pad to 64 in either direction."""
    recipe = FLIPPED.replace(data={"name": "folder", "path": write_folder(tmp_path / "mine")}, **{"resize.short": 64, "resize.long": 64})
    assert padded_images(open_split(recipe, "train"), recipe) == 4 * 2 * 2


def test_all_that_decides_the_bits_has_a_folder_of_its_own(tmp_path):
    folders = [recipes_kept(tmp_path).folder, recipes_kept(tmp_path, methods="fgd", seed=7).folder]
    folders += [recipes_kept(tmp_path, **change).folder for change in ({"precision": "bf16"}, {"schedule.accumulate": 2})]
    assert folders[0] == folders[1] and len(set(folders)) == 3 and folders[0].name.startswith("teacher-1-")


def test_mirrored_images_are_told_apart(tmp_path):
    data = open_split(FLIPPED, "train")
    stored = open_split(FLIPPED.replace(**{"resize.train": "none"}), "train").sample(0, 0)[0]
    seen = [data.sample(0, seed) for seed in range(8)]
    plain = next(one for one in seen if torch.equal(one[0], stored))
    mirrored = next(one for one in seen if torch.equal(one[0], stored.flip(-1)))
    kept, computed = lookup(tmp_path, collate([plain]), collate([mirrored]))
    for image, other in ((plain, mirrored), (mirrored, plain)):
        found, equal = show(kept, collate([image])), [show(computed, collate([one])) for one in (image, other)]
        odd = [differences(found, one) for one in equal]
        assert not odd[0] and "logits" in odd[1]
    assert kept.images == 2


# ---------------------------------------------------------------------------------------------------- whole runs


EIGHT = distilled(**{"resize.train": "flip", "data.train": 8, "schedule.steps": 12, "schedule.evaluations": 1, "queries": 16})


def test_runs_of_other_methods_and_seeds_take_what_is_kept(tmp_path):
    """8 images in two forms; 12 steps of 4 images."""
    recipes = EIGHT, EIGHT.replace(methods="fgd", seed=1)
    for number, recipe in enumerate(recipes):
        computed, _ = sit(tmp_path / f"computed {number}", recipe)
        kept, _ = sit(tmp_path / f"kept {number}", recipe, cache=tmp_path / "cache")
        logs = [(tmp_path / f"{name} {number}" / "log.jsonl").read_bytes() for name in ("computed", "kept")]
        assert logs[0] == logs[1], "not a bit of training depends on where the outputs are from"
        assert computed["teacher_images"] == 48 and (16 <= kept["teacher_images"] < 48 if number == 0 else kept["teacher_images"] == 0)
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(list(folder.iterdir())) == 16


def test_a_killed_run_goes_on_with_what_is_kept(tmp_path, monkeypatch):
    whole, _ = sit(tmp_path / "whole", EIGHT)

    def interrupt(values: dict[str, float], step: int, images: str) -> None:
        if step == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "refuse_non_finite", interrupt)
        patch.setattr(checkpointing, "CHECKPOINT_SECONDS", -1)
        with pytest.raises(KeyboardInterrupt):
            sit(tmp_path / "broken", EIGHT, cache=tmp_path / "cache")
    found, _ = sit(tmp_path / "broken", EIGHT, cache=tmp_path / "cache")
    assert found["resumed"] == 1 and 0 < found["teacher_images"] < whole["teacher_images"]
    assert (tmp_path / "broken" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_a_run_keeps_them_in_the_data_cache_and_refuses_another_teacher_s(tmp_path, finished, monkeypatch):
    """With one line, before anything is written."""
    monkeypatch.setenv("DETRDISTILL_DATA", str(tmp_path / "cache"))
    store, first, other = Store(tmp_path / "store"), *(FLIPPED.replace(seed=seed, **{"schedule.steps": 1}) for seed in (0, 1))
    for parent in parents(first).values():
        shutil.copytree(Store(finished).folder(parent), store.folder(parent))
    go = partial(run, store=store, device="cpu", workers=0, progress=False)
    assert go(first.replace(methods="fgd"), keep_teacher_outputs=False).cost["teacher_images"] == 4
    assert not (tmp_path / "cache" / "teacher_outputs").exists()
    assert go(first).cost["teacher_images"] == 4
    (folder,) = (tmp_path / "cache" / "teacher_outputs").iterdir()
    assert len(list(folder.iterdir())) == 4

    for path in folder.iterdir():
        with safe_open(path, "pt") as file:
            about = file.metadata()
        save_file(load_file(path), path, metadata=about | {"teacher": "teacher-2", "weights_sha256": "2" * 64})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as error:
        go(other)
    assert "\n" not in str(error.value) and "of another teacher" in str(error.value)
    assert "(teacher-2, weights 22222222; wanted: " in str(error.value) and str(error.value).endswith(f"delete {folder}")
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before.keys()
    assert {path.name for path in written} <= {".lock"} and all(path.read_bytes() == held for path, held in before.items())


# ---------------------------------------------------------------------------------------------------- damage and room


@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit", "of another image", "pickle"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    batches = [collate([image]) for image in images()]
    kept, _ = lookup(tmp_path, *batches)
    first, second = sorted(kept.kept.folder.iterdir())[:2]
    held = first.read_bytes()
    changed = {
        "truncated": held[:-20],
        "empty": b"",
        "one bit": held[:-9] + bytes([held[-9] ^ 1]) + held[-8:],
        "of another image": second.read_bytes(),
        "pickle": b"\x80\x04" + held,
    }
    first.write_bytes(changed[damage])
    with pytest.raises(InputError) as error:
        lookup(tmp_path, *batches)
    assert str(error.value).startswith(f"teacher outputs {first}: damaged (") and str(error.value).endswith("); delete the file")
    assert "\n" not in str(error.value) and first.read_bytes() == changed[damage]
    first.unlink()
    again, _ = lookup(tmp_path, *batches)
    assert again.images == 1 and first.stat().st_size == len(held)


def test_a_file_from_another_folder_is_refused(tmp_path):
    batch = collate(images()[:1])
    one, _ = lookup(tmp_path, batch)
    other, _ = lookup(tmp_path, batch, teacher="teacher-2", weights_sha256="2" * 64)
    assert one.kept.folder != other.kept.folder
    for path in one.kept.folder.iterdir():
        shutil.copy(path, other.kept.folder)
    with pytest.raises(InputError, match=r"of another teacher, .*teacher-1, weights 11111111; wanted: teacher-2, weights 22222222\)"):
        lookup(tmp_path, batch, teacher="teacher-2", weights_sha256="2" * 64)


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("memory", "disk", "place"), [(1e9, 1e9, "both"), (1e9, 1e4, "memory"), (1e4, 1e9, "disk"), (1e4, 1e4, "none"), (0, 1e4, "none")]
)
def test_they_are_kept_where_they_have_room(tmp_path, monkeypatch, caplog, memory, disk, place):
    monkeypatch.setattr(teacher_outputs, "available_memory", lambda: memory)
    monkeypatch.setattr(teacher_outputs.shutil, "disk_usage", lambda path: Usage(1e12, 1e12 - disk, disk))
    a, b, _, _ = images()
    kept, computed = lookup(tmp_path / "new", collate([a, b]), collate([a, b]))
    assert kept.images == (4 if place == "none" else 2)
    assert (tmp_path / "new").exists() == (place in ("both", "disk"))
    odd = differences(show(kept, collate([a, b])), show(computed, collate([a, b])))
    assert not odd
    assert len(caplog.messages) == (place == "none") == (kept.kept is None)
    if place == "none":
        assert caplog.messages[0].startswith("teacher outputs are not kept: up to 8 of 0.") and "\n" not in caplog.messages[0]
        assert ("memory" in caplog.messages[0]) == (memory > 0), "what is unknown is not spoken of"
    else:
        assert bool(kept.kept.in_memory) == (place in ("both", "memory"))


def test_a_disk_that_is_full_later_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    a, b, c, d = (collate([image]) for image in images())
    kept, computed = lookup(tmp_path, a)

    def full(*words, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(teacher_outputs, "save_file", full)
    kept.kept.uses_memory = False
    show(kept, b)
    assert len(list(kept.kept.folder.iterdir()) if kept.kept else list(tmp_path.glob("*/*"))) == 1
    (message,) = caplog.messages
    assert message.startswith("teacher outputs are not kept on disk any more: ") and "No space left" in message
    for batch in (b, c, a, d):
        odd = differences(show(kept, batch), show(computed, batch))
        assert not odd


@pytest.mark.parametrize("moment", ["between steps", "at the start", "while it reads", "while it writes"])
def test_a_folder_that_is_deleted_does_not_stop_the_run(tmp_path, monkeypatch, caplog, moment):
    """What was in it is computed again."""
    a, b, _, _ = (collate([image]) for image in images())
    kept, computed = lookup(tmp_path, a)
    folder = kept.kept.folder

    def deleting(call):
        def delete_and_call(*words, **named):
            shutil.rmtree(folder, ignore_errors=True)
            return call(*words, **named)

        return delete_and_call

    if moment == "between steps":
        shutil.rmtree(folder)
    else:
        name = "save_file" if moment == "while it writes" else "safe_open"
        monkeypatch.setattr(teacher_outputs, name, deleting(getattr(teacher_outputs, name)))
    if moment == "at the start":
        kept, _ = lookup(tmp_path)
    else:
        kept.images, kept.kept.uses_memory = 0, False
        kept.kept.in_memory.clear()
    batch = b if moment == "while it writes" else a
    odd = differences(show(kept, batch), show(computed, batch))
    assert not odd and kept.images == 1
    if moment == "while it writes":
        (message,) = caplog.messages
        assert message.startswith("teacher outputs are not kept on disk any more: ") and "\n" not in message
    else:
        assert not caplog.messages and len(list(folder.iterdir())) == 1, "and kept again"


def test_what_is_not_finite_is_not_kept(tmp_path):
    a, b, _, _ = (collate([image]) for image in images())
    kept, _ = lookup(tmp_path, a)
    broken = replace(b, pixels=b.pixels * torch.nan)
    assert show(kept, broken).logits.isnan().any() and show(kept, broken).logits.isnan().any()
    assert kept.images == 3 and len(kept.kept.in_memory) == 1


def test_memory_of_this_machine():
    assert 1 << 20 < available_memory() < 1 << 50

"""Which images a step sees does not depend on resuming, micro-batches or processes; and what loads them ends."""

import errno
import itertools
import signal
from multiprocessing.process import BaseProcess

import pytest

from detrdistill.data.coco import CocoDataset
from detrdistill.training.batches import Draws, loading, mix
from tests.folders import write_folder


def flat(draws: Draws) -> list[tuple[int, int]]:
    return [pair for micro in draws for pair in micro]


def draws(images=10, batch=4, seed=3, first=0, steps=6, accumulate=1, rank=0, world=1) -> Draws:
    return Draws(images, batch, seed, first, steps, accumulate, rank, world)


def test_each_epoch_shows_every_image_once_in_a_new_order():
    seen = [image for image, _ in flat(draws(steps=10))]
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_seeds_are_all_different_and_depend_on_the_run_s_seed():
    seeds = [seed for _, seed in flat(draws(steps=10))]
    assert len(set(seeds)) == 40 and not set(seeds) & {seed for _, seed in flat(draws(steps=10, seed=4))}
    assert all(0 <= mix(*numbers) < 2**63 for numbers in ((0,), (1, 2, 3), (2**62, 5)))


@pytest.mark.parametrize("first", [1, 4, 6])
def test_resuming_continues_the_sequence(first):
    assert flat(draws(first=first)) == flat(draws())[4 * first :]


@pytest.mark.parametrize(("accumulate", "world"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_micro_batches_and_processes_share_out_the_same_images(accumulate, world):
    parts = [draws(accumulate=accumulate, world=world, rank=rank) for rank in range(world)]
    assert {len(micro) for part in parts for micro in part} == {4 // (accumulate * world)}
    assert {len(part) for part in parts} == {6 * accumulate}
    for step in range(6):
        micros = [part[step * accumulate + micro] for micro, part in itertools.product(range(accumulate), parts)]
        assert [pair for micro in micros for pair in micro] == flat(draws())[4 * step : 4 * step + 4]


def test_a_batch_may_be_larger_than_the_data():
    seen = [image for image, _ in flat(draws(images=3, batch=8, steps=3))]
    assert [sorted(seen[i : i + 3]) for i in range(0, 24, 3)] == [[0, 1, 2]] * 8


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's own, of a loader that was made by half
def test_no_process_is_left_where_the_system_starts_no_more(monkeypatch, tmp_path):
    start, started = BaseProcess.start, []

    def start_one(self: BaseProcess) -> None:
        if started:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(self)
        start(self)

    monkeypatch.setattr(BaseProcess, "start", start_one)
    root = write_folder(tmp_path / "mine")
    data = CocoDataset(root / "instances_train.json", root / "images", None)
    with pytest.raises(OSError, match="temporarily unavailable"), loading(data, [[0]], 2):
        pass
    started[0].join(5)
    assert started[0].exitcode == -signal.SIGKILL

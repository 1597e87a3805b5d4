"""Which images an optimizer step sees: a pure function of seed and step, so that runs resume exactly and share out exactly."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import active_children

import numpy as np
from torch.utils.data import DataLoader

from detrdistill.data.coco import Batch, CocoDataset, Key


def mix(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Draws(Sequence[list[tuple[int, int]]]):
    """The images of every micro-batch of one process, as (index, seed of its augmentation).

    Position p of the endless stream of images belongs to epoch p // n, a permutation of its own; an optimizer step takes `batch`
    positions, cut into micro-batches and these dealt to the processes in turn.
    """

    def __init__(self, images: int, batch: int, seed: int, first_step: int, steps: int, accumulate: int, rank: int, world: int) -> None:
        self.images, self.batch, self.seed, self.first_step = images, batch, seed, first_step
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self.length = (steps - first_step) * accumulate

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> list[tuple[int, int]]:
        if not 0 <= item < self.length:
            raise IndexError(item)
        step, micro = divmod(item, self.accumulate)
        share = self.batch // (self.accumulate * self.world)
        start = (self.first_step + step) * self.batch + (micro * self.world + self.rank) * share
        return [(self._image(position), mix(self.seed, position)) for position in range(start, start + share)]

    def _image(self, position: int) -> int:
        epoch, place = divmod(position, self.images)
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.images)
        return int(self._order[place])


def micro_batches(dataset: CocoDataset, draws: Draws, workers: int, pin: bool = False) -> Iterator[list[Batch]]:
    """The micro-batches of each optimizer step in turn; close it, if it is not used up."""
    with loading(dataset, draws, workers, pin=pin) as batches:
        while step := [batch for _, batch in zip(range(draws.accumulate), batches, strict=False)]:
            yield step


def in_order(dataset: CocoDataset, batch: int) -> list[Sequence[Key]]:
    """All images, for `loading`."""
    return [range(len(dataset))[first : first + batch] for first in range(0, len(dataset), batch)]


@contextmanager
def loading(dataset: CocoDataset, keys: Sequence[Sequence[Key]], workers: int, *, pin: bool = False) -> Iterator[Iterator[Batch]]:
    """`dataset.batch` of each of `keys`, loaded by `workers` processes (0: by this one), which end with the block.

    Python ends what processes it has left by SIGTERM, which these ignore: after an error it would wait for them forever.
    """
    before = set(active_children())
    try:
        # torch's data set is the list of keys here, and its collate_fn turns the keys of one batch into the batch.
        options = {"collate_fn": dataset.batch, "num_workers": workers, "pin_memory": pin, "worker_init_fn": ignore_sigterm}
        batches = iter(DataLoader(keys, batch_size=None, **options))
    except BaseException:
        for started in set(active_children()) - before:  # the system would not start all of them
            started.kill()
        raise
    try:
        yield batches
    finally:
        if workers:
            batches._shutdown_workers()  # as torch does when the last traceback that holds it is gone, which may be never
            for worker in batches._workers:  # one that waits for a disk has not heard of it
                worker.kill()


def ignore_sigterm(worker: int) -> None:
    """Schedulers send it to all processes: those that load images must outlive the trainer's last step, and end with it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

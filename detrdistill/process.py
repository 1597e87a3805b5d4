"""This process among others: SIGTERM, with which schedulers announce that it must end, its share of the cores, and free memory."""

import ctypes
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import resource
except ModuleNotFoundError:  # on Windows
    resource = None

TERMINATED = 128 + signal.SIGTERM  # the exit code a shell gives what SIGTERM ended, 143: run it again to continue


@contextmanager
def on_sigterm(act: Callable[[], object]) -> Iterator[None]:
    """Call `act` at SIGTERM instead of ending the process at once. Outside of the main thread, where Python cannot, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def share_of_cores() -> int:
    """Those of this job (of the machine, where the system does not tell), divided among the processes of torchrun; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def keep_freed_memory() -> None:
    """Let this process use again what its tensors freed, instead of giving it back to the system and asking for it anew each step.

    A training step on the CPU frees and takes hundreds of MiB; a fresh page costs the system more than many an operation on it. glibc
    alone can be told so; elsewhere nothing changes.
    """
    if sys.platform == "win32":  # has no library of this process to ask
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(mmap, 2**31 - 1) or mallopt(mmap, 2**25)  # the most that glibc before 2.35 takes
        mallopt(trim, 2**31 - 1)


def peak_memory() -> float | None:
    """MiB that this process took at most so far; None where the system does not tell."""
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def growth(act: Callable[[], object]) -> float | None:
    """MiB that this process grows by, at most, while `act` runs; None but on Linux, which alone forgets an earlier peak.

    What was freed before is given back to the system first, so that it counts when it is taken again.
    """

    def resident() -> dict[str, float]:
        lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
        return {line[0]: int(line[1]) / 1024 for line in lines if line[0] in ("VmHWM:", "VmRSS:")}

    try:
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
        before = resident()["VmRSS:"]
        act()
        return max(0.0, resident()["VmHWM:"] - before)
    except (OSError, TypeError, KeyError):
        return None


def largest_file() -> int | None:
    """Bytes that a file of this process may have (ulimit -f); None for any."""
    limit = resource and resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if resource is None or limit == resource.RLIM_INFINITY else limit


def available_memory() -> int:
    """Bytes that this machine, or this job where it has a limit, can still give without swapping; 0 where the system does not tell.

    Linux tells, and limits of its control groups, version 2. Those of version 1 are not asked, nor is macOS: there it is what the machine
    has, and 0.
    """
    try:
        lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
        own = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
    except OSError:
        return 0
    found = [1024 * int(line[1]) for line in lines if line[0] == "MemAvailable:"]
    group = Path("/sys/fs/cgroup") / own.lstrip("/")
    for folder in (group, *group.parents):  # a limit may be set for a group of groups
        try:
            limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        except OSError:
            continue
        if limit != "max":
            found.append(max(0, int(limit) - int(used)))
    return min(found, default=0)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For code that makes many objects and no circles of them."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()

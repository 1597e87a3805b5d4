"""What only a GPU can tell: `python benchmarks/gpu_check.py`, or `make gpu-check`, in under 8 minutes on one GPU.

In order of worth, each in a process of its own and with a time box: the official implementations' numbers on CUDA, without and with
TF32; a bf16 distillation step of each detector at the paper's size, and where it makes the host wait; milliseconds and peak memory, with
transformers' detectors beside; a run that is killed and resumed; DDP over NCCL; how fast images are loaded; torch.compile; other forms of
deformable attention.

Rows go to benchmarks/gpu.csv as they come: whoever kills it has what was measured. An error is a row, and the next check goes on. It ends
with exit code 1 if anything failed. `--small` takes tiny sizes on the CPU, only to see that all checks work.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import Table, make_parser, table_path  # noqa: E402

if TYPE_CHECKING:
    from benchmarks.gpu_report import Check, Report

MOST_SECONDS = 460  # of all checks together
LEAST_SECONDS = 5  # nothing can be measured in less, after a start
NEEDED = {  # packages by what they are imported as
    "faster_coco_eval": "faster-coco-eval",
    "filelock": "filelock",
    "jaxtyping": "jaxtyping",
    "lightning_fabric": "lightning-fabric",
    "numpy": "numpy",
    "PIL": "pillow",
    "pycocotools": "pycocotools",
    "pydantic": "pydantic",
    "pytest": "pytest",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "torch": "torch",
    "torchvision": "torchvision",
    "tqdm": "tqdm",
    "transformers": "transformers",
}


def main(words: Sequence[str] | None = None) -> int:
    """Run all checks; returns the exit code."""
    parser = make_parser(__doc__, quick=False)
    parser.add_argument("--oracles", type=Path, default=ROOT / "tests" / "parity" / "oracles", help="folder of oracles")
    arguments = parser.parse_args(words)
    if missing := [package for name, package in NEEDED.items() if find_spec(name) is None]:
        print(f"error: packages are missing; install them: python -m pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    import torch

    small = arguments.scale == "small"
    if not small and not torch.cuda.is_available():
        print("error: torch finds no CUDA device here; --small shows on the CPU that the checks work", file=sys.stderr)
        return 2

    os.environ |= {
        "HF_HUB_OFFLINE": "1",  # nothing is fetched, and nothing waits for a network
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # torch wants it for sums in a fixed order
    }

    from benchmarks.gpu_report import COLUMNS, Report
    from detrdistill.runs.provenance import commit

    table = Table(table_path(arguments, "gpu.csv"), COLUMNS)
    device = "CPU, tiny sizes" if small else torch.cuda.get_device_name()
    table.start(f"commit {commit()}; {device}; torch {torch.__version__}; Python {sys.version.split()[0]}")
    report = Report(table, "", "cpu" if small else "cuda", small, arguments.oracles.resolve())
    # A process that has used CUDA must not be forked. On the CPU forking saves a dozen imports of torch, and nothing hurries.
    context = multiprocessing.get_context("fork" if small else "spawn")
    carry_out_all(all_checks(), report, context, patience=4 if small else 1)
    failed = [row for row in table.rows() if row["passed"] == "no"]
    print(f"{len(failed)} of {len(table.rows())} rows failed; {table.path}")
    return 1 if failed else 0


def all_checks() -> "list[Check]":
    """Together their time boxes are longer than all may take: few checks need theirs."""
    from benchmarks.gpu_numbers import one_process, parity, resume, step
    from benchmarks.gpu_report import Check
    from benchmarks.gpu_speed import compiled, cost, loader, sampling
    from detrdistill.recipes.words import DETECTORS

    return [
        Check("parity, TF32 off", 75, parity, (False,)),
        Check("parity, TF32 on", 45, parity, (True,)),
        *(Check(f"bf16 step, {detector}", 50, step, (detector,)) for detector in DETECTORS),
        *(Check(f"cost, {detector}", 60, cost, (detector,)) for detector in DETECTORS),
        Check("kill and resume", 80, resume),
        Check("DDP of one process", 45, one_process),
        Check("loader", 45, loader),
        Check("torch.compile", 140, compiled),
        Check("deformable attention", 45, sampling),
    ]


def carry_out_all(checks: "Sequence[Check]", report: "Report", context: BaseContext, patience: float = 1.0) -> None:
    """Each check in its own process, which is ended when its time box is over or no time is left.

    Args:
        report: of which each check gets one under its own name.
        patience: how many times as long everything may take.
    """
    from benchmarks.gpu_report import carry_out

    end = monotonic() + patience * MOST_SECONDS
    for check in checks:
        own = replace(report, check=check.name, last=monotonic())
        box = min(patience * check.box, end - monotonic())
        if box < LEAST_SECONDS:
            own.add("the check itself", note=f"no time was left of {MOST_SECONDS} s", failed=True)
            continue
        process = context.Process(target=carry_out, args=(own, check))
        process.start()
        try:
            process.join(box)
            hangs = process.is_alive()
        finally:
            end_group(process)  # before its last row: two that write at once lose one
        if hangs:
            own.add("the check itself", note=f"stopped after {box:.0f} s, its time box", failed=True)
        elif process.exitcode:
            own.add("the check itself", note=f"its process ended with exit code {process.exitcode}", failed=True)


def end_group(process: BaseProcess) -> None:
    """End a check's process, and what it has started and left."""
    for kill in (lambda: os.killpg(process.pid, signal.SIGKILL), process.kill):
        try:
            kill()
        except ProcessLookupError:
            pass  # it has ended, or does not yet lead a group
    process.join()


if __name__ == "__main__":
    sys.exit(main())

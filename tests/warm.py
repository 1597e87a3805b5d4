"""Python processes that start at once, for tests of what a process does and not of how it starts.

A server imports torch and its like once for each process of tests, and forks: papermill, kernel, Snakemake and command line are the
real ones, each in a process of its own, without the seconds of imports that hundreds of starts would cost.
"""

import contextlib
import logging
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import papermill
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

from detrdistill.notebooks import unfinished

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(
    [
        *("tests.lean", "pytest", "ipykernel.kernelapp", "papermill", "snakemake.cli", "benchmarks.gpu_report"),
        *("detrdistill.cli", "detrdistill.session", "detrdistill.models", "detrdistill.runs.run", "detrdistill.report.write"),
    ]
)


def start(words: Sequence[object], environment: Mapping[str, str], folder: Path, out: str = os.devnull, err: str = os.devnull) -> "Process":
    """As `python -m words`; what it prints goes to the files `out` and `err`."""
    child = CHILDREN.Process(target=_run, args=([str(word) for word in words], dict(environment), str(folder), out, err))
    child.start()
    return Process(child)


class Process:
    """What `subprocess.Popen` offers, of a child of the server."""

    stdin = stdout = stderr = None

    def __init__(self, child: multiprocessing.Process) -> None:
        self._child = child
        self.pid = child.pid

    @property
    def returncode(self) -> int | None:
        return self._child.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._child.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a warm process", timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self._child.terminate()

    def kill(self) -> None:
        self._child.kill()


def python_m(*words: object, cwd: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess:
    """`subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)`."""
    with tempfile.TemporaryDirectory() as place:
        process = start(words, os.environ, cwd or Path.cwd(), f"{place}/out", f"{place}/err")
        try:
            process.wait(timeout)
        finally:
            process.kill()
        out, err = (Path(f"{place}/{name}").read_text(encoding="utf-8") for name in ("out", "err"))
    return subprocess.CompletedProcess(list(words), process.returncode, out, err)


def execute(source: Path, output: Path, parameters: Mapping[str, object], timeout: int) -> None:
    """As `detrdistill.notebooks.execute`: papermill in this process, and its kernel forked."""
    papermill.execute_notebook(
        *(str(source), str(output), parameters),
        cwd=str(source.parent),
        progress_bar=False,
        execution_timeout=timeout,
        kernel_manager_class=WarmKernel,
    )
    assert unfinished(output) is None


class WarmProvisioner(LocalProvisioner):
    async def launch_kernel(self, cmd: list[str], **options: object) -> dict:
        folder = Path(options.get("cwd") or Path.cwd())
        self.process = start(cmd[cmd.index("-m") + 1 :], options["env"], folder)
        self.pid, self.cwd = self.process.pid, folder
        return self.connection_info


class WarmKernel(AsyncKernelManager):
    async def _async_pre_start_kernel(self, **options: object) -> tuple:
        self.provisioner = self.provisioner or WarmProvisioner(kernel_id="warm", kernel_spec=self.kernel_spec, parent=self)
        return await super()._async_pre_start_kernel(**options)


def _run(words: list[str], environment: dict[str, str], folder: str, out: str, err: str) -> None:
    """In the child: all that tells it from a process started anew, set as there."""
    os.environ.clear()
    os.environ.update(environment, JPY_PARENT_PID=str(os.getppid()))
    os.chdir(folder)
    sys.argv = ["-m", *words[1:]]
    multiprocessing.set_start_method(None, force=True)  # the system's own, for loaders of images
    logging.getLogger().handlers.clear()
    if "matplotlib" in sys.modules:  # it read the environment when it was imported, and a kernel sets this before
        sys.modules["matplotlib"].rcParams["backend"] = environment.get("MPLBACKEND") or "module://matplotlib_inline.backend_inline"
    for number, name in ((1, out), (2, err)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [stream.flush() for stream in (sys.stdout, sys.stderr)])
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)

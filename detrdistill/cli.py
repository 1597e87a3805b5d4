"""The `detrdistill` command.

Faults of the user's input are one line on standard error and exit code 2. A detector in training that is sent SIGTERM saves where it is
and ends with exit code 143, as a shell calls what SIGTERM ended: schedulers may queue it again, and the same command continues. Whatever
comes before the first step (data, crop training, measuring the teacher) ends at once and is done again.
"""

import logging
import os
import sys
import traceback
from typing import NoReturn

import tyro

from detrdistill import __version__
from detrdistill.commands import COMMANDS
from detrdistill.errors import InputError, NonFiniteError, StoppedError
from detrdistill.process import TERMINATED
from detrdistill.runs.provenance import commit

ABOUT = """Distil a large detection transformer into a small one: train, measure, report.

Bad input is one line and exit code 2. A run that is killed continues when the same command is called again.
--version prints version and commit.
"""


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        if sys.argv[1:] == ["--version"]:  # a bug report should begin with this
            print(f"detrdistill {__version__} ({commit() or 'no git checkout'})")
            return
        tyro.extras.subcommand_cli_from_dict({one.__name__: one for one in COMMANDS}, prog="detrdistill", description=ABOUT)
    except (InputError, NonFiniteError) as error:
        # A process that loads images hands its whole traceback over, and the message at its end.
        leave(2, f"error: {str(error).rpartition('InputError: ')[2].strip()}\n")
    except StoppedError as stopped:  # all processes together
        print(f"stopped: {stopped}", file=sys.stderr)
        sys.exit(TERMINATED)
    except KeyboardInterrupt:
        leave(130)
    except Exception:
        if not of_many():
            raise
        leave(1, traceback.format_exc())


def of_many() -> bool:
    """Whether this process is one of several of torchrun."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def leave(code: int, said: str = "") -> NoReturn:
    """Say it and end this process; under torchrun at once, so that it ends the others, which may wait for this one.

    On GPUs Fabric has Python wait at its exit until all processes have closed their connections (NCCL's), hours for those that wait.
    """
    try:
        sys.stderr.write(said)
        sys.stderr.flush()
        sys.stdout.flush()
    finally:  # nothing can be said on a full disk
        if of_many():
            os._exit(code)
    sys.exit(code)

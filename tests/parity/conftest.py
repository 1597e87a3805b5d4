"""`pytest tests/parity --oracles DIR` replays every oracle of DIR; without the option, the small selection stored here."""

from pathlib import Path

import pytest

from tests.parity.checks import CHECKS
from tests.parity.oracle import kind_of, paths

SELECTION = Path(__file__).parent / "oracles"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--oracles", type=Path, default=SELECTION, help="folder of oracles, NAME.json beside NAME.safetensors")


def oracle_paths(config: pytest.Config) -> list[Path]:
    # The option is unknown to pytest when it starts above this folder, as in a plain `pytest`.
    folder = config.getoption("oracles", default=SELECTION)
    found = paths(folder)
    if not found:
        raise pytest.UsageError(f"--oracles {folder}: no NAME.json with a NAME.safetensors beside it")
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = oracle_paths(metafunc.config)
    if "known_oracle" in metafunc.fixturenames:
        known = [path for path in found if kind_of(path) in CHECKS]
        metafunc.parametrize("known_oracle", known, ids=[path.stem for path in known])
    if "all_oracles" in metafunc.fixturenames:
        metafunc.parametrize("all_oracles", [found], ids=["all"])

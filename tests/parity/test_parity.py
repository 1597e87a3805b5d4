"""Our functions against the official implementations, number by number: outputs and gradients, in float32 and float64.

An oracle of a known kind is always replayed, and all it holds is compared.
"""

from pathlib import Path

import pytest
import torch

from tests.parity.checks import CHECKS
from tests.parity.oracle import Oracle, formula_weight, kind_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_oracle(known_oracle: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = Oracle.read(known_oracle, dtype)
    CHECKS[kind_of(known_oracle)](oracle, monkeypatch)


def test_every_oracle_is_of_a_known_kind(all_oracles: list[Path]) -> None:
    unknown = [path.stem for path in all_oracles if kind_of(path) not in CHECKS]
    assert not unknown, f"oracles of unknown kinds: {', '.join(unknown)}; write a check"


def test_formula_weights_are_those_of_the_definition() -> None:
    expected = torch.tensor([-0.198620081, 0.536613703, 0.990602136, 0.678585649])
    torch.testing.assert_close(formula_weight(1, "a", [4]), expected, atol=1e-9, rtol=0)

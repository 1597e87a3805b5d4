"""Numerical oracles: stored inputs, parameters and outputs of the official implementations, and the tolerances to meet.

An oracle is a pair NAME.json and NAME.safetensors. The complete networks' weights are not stored but defined by a formula.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from detrdistill.models.outputs import Targets

# Absolute and relative; `PIXEL` for coordinates in pixels, `SCALAR` for losses, `GRADIENT` relative to the largest entry.
FLOAT32, PIXEL, SCALAR, GRADIENT = (1e-4, 1e-4), (1e-3, 1e-4), (0.0, 1e-5), 1e-3
# Not smaller, because sine tables and reference grids are float32 even in the official code's float64 pass, and a rounding there shows.
FLOAT64 = (1e-8, 0)
# Smaller gradient norms of the official code are pure rounding.
LEAST_NORM = 1e-2


def paths(folder: Path) -> list[Path]:
    """The JSON files in `folder` that have tensors beside them, by name."""
    return sorted(path for path in folder.glob("*.json") if path.with_suffix(".safetensors").exists())


def kind_of(path: Path) -> str:
    """What an oracle is about; complete networks are told apart by the repository they come from."""
    meta = json.loads(path.read_text(encoding="utf-8"))
    return meta["kind"] if meta["kind"] != "full" else f"full {meta['source'][0]['repo'].split('/')[1]}"


@dataclass
class Oracle:
    """One oracle, with its floating-point inputs and parameters in `dtype`. It remembers which of its outputs were compared."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]
    dtype: torch.dtype
    path: Path
    compared: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path, dtype: torch.dtype) -> "Oracle":
        return cls(json.loads(path.read_text(encoding="utf-8")), load_file(path.with_suffix(".safetensors")), dtype, path)

    def beside(self, name: str) -> "Oracle":
        """Another oracle of the same folder."""
        return self.read(self.path.with_name(f"{name}.json"), self.dtype)

    @property
    def config(self) -> dict[str, Any]:
        return self.meta["config"]

    def input(self, name: str, grad: bool = False) -> Tensor:
        value = self.tensors[f"input.{name}"]
        return value.to(self.dtype).requires_grad_(grad) if value.is_floating_point() else value

    def inputs(self, prefix: str, grad: bool = False) -> list[Tensor]:
        """`prefix`0, `prefix`1, ..."""
        names = sorted((n for n in self.tensors if n.startswith(f"input.{prefix}")), key=lambda n: int(n.removeprefix(f"input.{prefix}")))
        return [self.input(name.removeprefix("input."), grad) for name in names]

    def parameters(self) -> dict[str, Tensor]:
        """The official state_dict, stored or by formula, under every official name."""
        if "weights" in self.meta:
            aliases = self.meta.get("alias", {})
            own = {name: rule for name, rule in self.meta["weights"].items() if name not in aliases}
            made = {name: formula_weight(self.meta["seed"], name, *rule) for name, rule in own.items()}
            made |= {name: made[origin] for name, origin in aliases.items()}
        else:
            made = {name.removeprefix("param."): value for name, value in self.tensors.items() if name.startswith("param.")}
        return {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in made.items()}

    def targets(self) -> Targets:
        counts = self.input("target.counts").tolist()
        return Targets.pack(self.input("target.labels").split(counts), self.input("target.boxes").split(counts))

    def expect(self, name: str, value: Tensor, tolerance: tuple[float, float] = FLOAT32, where: Any = ...) -> None:
        """Compare `value` with output `name`, and in a float64 pass with its float64 version, where they exist."""
        if f"output.{name}" in self.tensors or f"output64.{name}" not in self.tensors:
            self._close(f"output.{name}", value, tolerance, where)
        if self.dtype == torch.float64 and f"output64.{name}" in self.tensors:
            self._close(f"output64.{name}", value, FLOAT64, where)

    def expect_equal(self, name: str, value: Tensor) -> None:
        """For indices and masks."""
        stored = self._stored(f"output.{name}")
        assert value.shape == stored.shape and bool((value == stored).all()), f"{name}: not equal"

    def expect_gradient(self, name: str, value: Tensor, prefix: str = "grad.") -> None:
        stored = self._stored(f"{prefix}{name}").to(value.dtype)
        worst, scale = (value - stored).abs().max(), stored.abs().max()
        assert worst <= GRADIENT * scale, f"gradient of {name}: off by {worst:.2e}, its largest entry is {scale:.2e}"

    def expect_gradient_norms(self, gradients: dict[str, Tensor | None]) -> None:
        """Compare L2 norms by official parameter name."""
        stored = self.meta["grad_norm"]
        assert set(gradients) == set(stored), f"gradients of other parameters: {sorted(set(gradients) ^ set(stored))[:5]}"
        wrong = []
        for name, norm in stored.items():
            ours = 0.0 if gradients[name] is None else gradients[name].norm().item()
            if norm is None:
                wrong += [f"{name}: {ours:.4g}, but officially no gradient"] if ours else []
            elif norm >= LEAST_NORM and abs(ours - norm) > GRADIENT * norm:
                wrong.append(f"{name}: {ours:.6g} instead of {norm:.6g}")
        assert not wrong, f"{len(wrong)} gradient norms differ: " + "; ".join(wrong[:5])

    def expect_all_compared(self, except_for: Iterable[str] = ()) -> None:
        """Nothing that the oracle holds was overlooked, but for names starting with `except_for`."""
        given = ("input.", "param.", "output64.") if self.dtype == torch.float32 else ("input.", "param.")
        results = {name for name in self.tensors if not name.startswith(given)}
        left = sorted(name for name in results - self.compared if not name.startswith(tuple(except_for)))
        assert not left, f"not compared: {', '.join(left)}"

    def _stored(self, name: str) -> Tensor:
        self.compared.add(name)
        return self.tensors[name]

    def _close(self, name: str, value: Tensor, tolerance: tuple[float, float], where: Any) -> None:
        stored = self._stored(name)
        assert value.shape == stored.shape, f"{name}: shape {tuple(value.shape)} instead of {tuple(stored.shape)}"
        absolute, relative = tolerance
        torch.testing.assert_close(
            value.detach().double()[where], stored.double()[where], atol=absolute, rtol=relative, msg=lambda text: f"{name}: {text}"
        )


def formula_weight(seed: int, name: str, shape: list[int], scale: float | str = 1.0, shift: Any = 0.0) -> Tensor:
    """A tensor that is defined by its name: FNV-1a hash of "seed/name", then SplitMix64, scaled to [-1, 1)."""
    if scale == "rows constant":
        return torch.tensor(shift, dtype=torch.float32).expand(*shape).clone()
    if scale == "integer, keep 0":
        return torch.zeros(shape, dtype=torch.long)
    key = 0xCBF29CE484222325
    for byte in f"{seed}/{name}".encode():
        key = (key ^ byte) * 0x100000001B3 % 2**64
    # numpy's unsigned integers wrap around, as the formula wants.
    z = np.arange(1, int(np.prod(shape, dtype=np.int64)) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    unit = (z >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1
    return torch.from_numpy((unit * scale + shift).astype(np.float32).reshape(shape))

"""pyproject.toml, constraints.txt and environment.yml say the same, and the tests run in what they say."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(line) for lines in (project["dependencies"], *project["optional-dependencies"].values()) for line in lines]


@pytest.fixture(scope="module")
def pins() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    odd = [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.!]+", line)]
    assert not odd, f"constraints.txt: not of the form name==version: {odd}"
    pins = {canonicalize_name(name): Version(number) for name, number in (line.split("==") for line in lines)}
    assert len(pins) == len(lines), "constraints.txt: a package is listed twice"
    return pins


def test_every_dependency_has_a_lower_bound_and_a_pin_above_it(requirements: list[Requirement], pins: dict[str, Version]) -> None:
    assert len({canonicalize_name(one.name) for one in requirements}) == len(requirements)
    for one in requirements:
        assert [bound.operator for bound in one.specifier] == [">="], f"pyproject.toml: '{one}' should have a lower bound and nothing else"
        pin = pins.get(canonicalize_name(one.name))
        assert pin is not None, f"constraints.txt lacks {one.name}; run `make setup && make constraints`"
        assert pin in one.specifier, f"constraints.txt has {one.name} {pin}, pyproject.toml wants {one.specifier}"


def test_constraints_fit_other_platforms(pins: dict[str, Version]) -> None:
    platform_bound = [name for name in pins if name == "triton" or name.startswith(("nvidia-", "cuda-"))]
    assert not platform_bound, f"constraints.txt lists what torch itself brings for CUDA: {platform_bound}"
    assert not [name for name, pin in pins.items() if pin.local], "constraints.txt lists local builds such as +cpu"


def test_conda_installs_this_package_under_the_same_constraints() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert pip == ["-c constraints.txt", "-e .[test]"]
    # Anything else from conda could differ from the constraints.
    (python, installer) = conda
    assert installer == "pip" and python.startswith("python=")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert Version(python.removeprefix("python=")) in Requirement(f"python{project['requires-python']}").specifier


def test_makefile_installs_this_package_under_the_same_constraints() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "-c constraints.txt -e '.[test]'" in makefile


def test_the_running_environment_has_the_pinned_versions(requirements: list[Requirement], pins: dict[str, Version]) -> None:
    wrong = []
    for name, pin in pins.items():
        try:
            found = Version(version(name))
        except PackageNotFoundError:
            # A pin for another platform or extra does no harm; a dependency that is missing does.
            if any(canonicalize_name(one.name) == name for one in requirements):
                wrong.append(f"{name} is not installed, pinned {pin}")
            continue
        if found.public != pin.public:
            wrong.append(f"{name} {found} is installed, pinned {pin}")
    assert not wrong, "the environment differs from constraints.txt; run `make setup` and use .venv: " + "; ".join(wrong)

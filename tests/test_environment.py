"""pyproject.toml, constraints.txt and environment.yml say the same, and the tests run in what they say."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


EXTRAS = ("notebooks", "batch", "hub", "transformers", "test")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def requirements(project: dict[str, Any]) -> list[Requirement]:
    """What make setup installs: the library alone, and every extra."""
    lists = (project["dependencies"], *(project["optional-dependencies"][extra] for extra in EXTRAS))
    return [Requirement(line) for lines in lists for line in lines]


def test_all_is_every_extra(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    assert set(extras) == {*EXTRAS, "all"} and extras["all"] == [f"{project['name']}[{','.join(EXTRAS)}]"]


def test_the_library_alone_imports_nothing_of_the_extras(project: dict[str, Any]) -> None:
    """Models, losses, training and reports; what needs an extra is imported where it is used, in the files that are named here."""
    extras = {"ipywidgets", "jupyterlab", "papermill", "nbformat", "snakemake", "IPython", "transformers", "huggingface_hub"}
    users = {path.relative_to(ROOT / "detrdistill").as_posix() for path in (ROOT / "detrdistill").rglob("*.py") if extras & imported(path)}
    assert users == {"notebooks.py", "analysis/query_masks.py", "analysis/detections.py", "any_detr/build.py", "checkpoints/locate.py"}
    for module in ("detrdistill.runs.run", "detrdistill.report.write", "detrdistill.session", "detrdistill.cli"):
        blocked = f"import sys; sys.modules.update(dict.fromkeys({sorted(extras)!r})); import {module}"
        subprocess.run([sys.executable, "-W", "ignore", "-c", blocked], check=True, timeout=120)


def imported(path: Path) -> set[str]:
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    names = [
        name
        for node in tree
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names])
    ]
    return {name.partition(".")[0] for name in names}


def test_a_command_whose_extra_is_not_installed_says_which(tmp_path: Path) -> None:
    call = "from detrdistill.cli import main; sys.argv[1:] = ['notebook', 'a.ipynb', 'b.ipynb']; main()"
    blocked = f"import sys; sys.modules['papermill'] = None; {call}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", blocked], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (
        "error: the command 'notebook' needs papermill, which is not installed; install the extra: pip install 'detrdistill[notebooks]'"
        in done.stderr
    )


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
    assert pip == ["-c constraints.txt", "-e .[all]"]
    # Anything else from conda could differ from the constraints.
    (python, installer) = conda
    assert installer == "pip" and python.startswith("python=")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert Version(python.removeprefix("python=")) in Requirement(f"python{project['requires-python']}").specifier


def test_makefile_installs_this_package_under_the_same_constraints() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "-c constraints.txt -e '.[all]'" in makefile


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

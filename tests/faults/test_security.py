"""Nothing in the kit unpickles, evaluates or executes what a user or a file gave, or hands it to a shell.

A walk over the syntax of the package, the notebooks and the Snakefile's shell commands. (ruff's S rules know neither `torch.load` nor
`import_module`, and do not read Snakefiles.)
"""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Modules whose readers execute what they read, or that start programs.
MODULES = {
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "joblib",
    "cloudpickle",
    "subprocess",
    "multiprocessing",
    "pty",
    "runpy",
    "code",
    "ctypes",
}
CALLS = {
    *("eval", "exec", "compile", "__import__", "breakpoint", "importlib.import_module", "numpy.load", "numpy.fromfile"),
    *("os.system", "os.popen", "os.startfile", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"),
    *("torch.load", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "pandas.read_pickle", "pandas.eval"),
}
STARTS = ("os.exec", "os.spawn", "os.posix_spawn", "asyncio.create_subprocess")
# Words that turn a harmless call into one that is not, whatever its name.
WORDS = {"shell", "trust_remote_code", "allow_pickle", "unsafe"}

# The places that may, each as found: its file, what it calls, how often, and why it may.
ALLOWED = {
    ("detrdistill/__init__.py", "importlib.import_module"): (1, "of a table of the kit's own modules"),
    ("detrdistill/notebooks.py", "subprocess.run"): (1, "papermill, as a list of words, no shell"),
    ("detrdistill/runs/provenance.py", "subprocess.run"): (1, "git with fixed words, no shell, to name the commit"),
    ("detrdistill/process.py", "ctypes.CDLL"): (2, "the C library that is loaded already, for two calls with fixed numbers"),
    ("detrdistill/training/batches.py", "multiprocessing.active_children"): (2, "only lists which processes this one has started"),
}
# What the Snakefile's shell commands may name: made from words that were compared with known names, or from whole numbers; names of
# published detectors, which may be anything, are quoted by shlex.
SNAKEFILE = {
    *(
        "CLI",
        "TRAIN",
        "TRAIN_ON",
        "NAME",
        "ROOT",
        "REPORT",
        "params.seed",
        "params.seeds",
        "params.detectors",
        "params.models",
        "WITH_MODELS",
    ),
    *("wildcards.run", "input.notebook", "output", "params.row.name", "params.row.key"),
}


def dangers(code: str) -> Iterator[str]:
    """What a piece of Python calls that could execute what it is given."""
    names: dict[str, str] = {}
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names |= {alias.asname: alias.name} if alias.asname else {top: top}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        # Every mention, not calls alone: a function may be passed on.
        if isinstance(node, ast.Name | ast.Attribute):
            name = dotted(node, names)
            if name.partition(".")[0] in MODULES and "." in name and not name.endswith(("Error", "TimeoutExpired")):
                yield name
            elif name != "torch.load" and (name in CALLS or name.startswith(STARTS)):
                yield name
        if isinstance(node, ast.Call):
            words = {word.arg: word.value for word in node.keywords}
            if dotted(node.func, names) == "torch.load" and not is_true(words.get("weights_only")):
                yield "torch.load"
            yield from (word for word in sorted(WORDS & words.keys()) if not is_false(words[word]))


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """The full name that an expression such as `np.load` stands for, "" for others."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    inner = dotted(node.value, names) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner else ""


def is_true(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def is_false(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def sources() -> Iterator[tuple[str, str]]:
    """Every file's path within the repository, and its Python."""
    for path in sorted((ROOT / "detrdistill").rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        yield path.relative_to(ROOT).as_posix(), "\n".join("".join(cell["source"]) for cell in cells)


def test_the_kit_executes_nothing_it_is_given(tries) -> None:
    found: dict[tuple[str, str], int] = {}
    files = dict(sources())
    assert len(files) > 80 and "detrdistill/cli.py" in files and any(name.endswith(".ipynb") for name in files)
    with tries("unsafe calls in the code"):
        for file, code in files.items():
            for name in dangers(code):
                found[file, name] = found.get((file, name), 0) + 1
        assert found == {place: count for place, (count, _) in ALLOWED.items()}


def test_the_snakefile_hands_over_only_checked_words(tries) -> None:
    text = (ROOT / "workflow" / "Snakefile").read_text(encoding="utf-8")
    commands = re.findall(r"shell(?::\s*|\()\"(.*)\"", text)
    assert len(commands) == len(re.findall(r"\bshell\b", text.partition('"""')[2].partition('"""')[2])) == 5
    with tries("unchecked words in a shell command"):
        assert {word for command in commands for word in re.findall(r"\{([^{}]+)\}", command)} <= SNAKEFILE
        assert len(re.findall(r"shlex\.quote\(model\)", text)) == len(re.findall(r"in MODELS\.items\(\)\)|in MODELS\.items\(\)\]", text))
        # Everything before the rules is plain Python.
        assert not list(dangers(text.partition("\nrule all")[0]))


BAD = [
    "eval(text)",
    "f = eval",
    "exec(text)",
    "compile(text, '', 'exec')",
    "__import__(text)",
    "import importlib; importlib.import_module(text)",
    "from importlib import import_module as load; load(text)",
    "import os; os.system(text)",
    "from os import system as s; s(text)",
    "import os; os.execvp(text, [])",
    "import subprocess as sp; sp.Popen(text)",
    "from subprocess import run; run(text)",
    "import pickle; pickle.load(file)",
    "from pickle import Unpickler; Unpickler(file)",
    "import torch; torch.load(path)",
    "import torch; torch.load(path, weights_only=False)",
    "import torch as t; t.load(path, weights_only=flag)",
    "import torch; torch.hub.load(a, b)",
    "import numpy as np; np.load(path)",
    "import pandas as pd; pd.read_pickle(path)",
    "import yaml; yaml.load(text, yaml.Loader)",
    "AutoModel.from_pretrained(path, trust_remote_code=True)",
    "anything(text, shell=True)",
]
GOOD = [
    "import torch; torch.load(path, weights_only=True)",
    "import yaml; yaml.safe_load(text)",
    "import ast; ast.literal_eval(text)",
    "import pickle\ntry:\n  pass\nexcept pickle.UnpicklingError:\n  pass",
    "import re; re.compile(text)",
    "model.eval()",
]


@pytest.mark.parametrize("code", BAD)
def test_the_walk_sees(code: str) -> None:
    assert list(dangers(code))


@pytest.mark.parametrize("code", GOOD)
def test_the_walk_lets_pass(code: str) -> None:
    assert not list(dangers(code))

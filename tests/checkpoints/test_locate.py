"""A model is found by file, folder, run or hub id, and known by the hash of what is read of it."""

import functools
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from detrdistill.checkpoints.locate import locate, pinned_weights, weights_files
from detrdistill.errors import InputError
from detrdistill.recipes.parts import DetectorWeights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b'{"a": 1}', "preprocessor_config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"older"}


def shell_hash(*names: str, folder: Path) -> str:
    """As the docstring says: `cat NAMES | sha256sum`."""
    return subprocess.run(f"cat {' '.join(names)} | sha256sum", shell=True, cwd=folder, capture_output=True, text=True).stdout.split()[0]


def fill(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_what_is_hashed(tmp_path: Path) -> None:
    folder = fill(tmp_path / "hf")
    whole = shell_hash("config.json", "model.safetensors", folder=folder)
    assert locate(folder) == DetectorWeights(path=folder, sha256=whole)
    assert locate(folder / "model.safetensors").sha256 == whole, "the configuration beside it says the classes"
    assert locate(folder / "pytorch_model.bin").sha256 == sha256(b"older").hexdigest()
    (folder / "model.safetensors").unlink()
    assert locate(folder).sha256 == shell_hash("config.json", "pytorch_model.bin", folder=folder)
    (folder / "pytorch_model.bin").unlink()
    shards = {"weight_map": {"x": "b.safetensors", "y": "../a.safetensors"}}
    fill(folder, {"model.safetensors.index.json": json.dumps(shards).encode(), "a.safetensors": b"a", "b.safetensors": b"b"})
    names = ["config.json", "model.safetensors.index.json", "a.safetensors", "b.safetensors"]
    assert [path.name for path in weights_files(folder)] == names and locate(folder).sha256 == shell_hash(*names, folder=folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"b\.safetensors: cannot be read \(No such file"):
        locate(folder)
    fill(tmp_path / "run", {"weights.safetensors": b"run", "record.json": b"{}", "config.json": b"{}"})
    assert locate(tmp_path / "run").sha256 == sha256(b"run").hexdigest()
    with pytest.raises(InputError, match=r"no weights\.safetensors of a run, and no model\.safetensors or pytorch_model\.bin"):
        locate(fill(tmp_path / "empty", {}))


def test_pinned(tmp_path: Path) -> None:
    path = fill(tmp_path, {"model.pth": b"weights"}) / "model.pth"
    stated = pinned_weights(DetectorWeights(path=path))
    assert stated.sha256 == sha256(b"weights").hexdigest() and pinned_weights(stated) == stated
    path.write_bytes(b"other")
    with pytest.raises(InputError, match=r"their hash is [0-9a-f]{64}, the recipe says [0-9a-f]{64}; put the recipe's weights there"):
        pinned_weights(stated)
    path.unlink()
    assert pinned_weights(stated) == stated, "a run that has converted them does not need them"
    with pytest.raises(InputError, match="no such file or folder; correct the path"):
        pinned_weights(DetectorWeights(path=path))


def test_runs_and_paths_that_lie_above(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("DETRDISTILL_RESULTS", raising=False)
    run = fill(tmp_path / "results" / "quick" / "runs" / "deformable_detr-thin8-plain-seed0-0123abcd", {"weights.safetensors": b"run"})
    old = fill(
        tmp_path / "results" / "reference" / "mini" / "runs" / "adamixer-thin8-plain-seed0-0123abcd", {"weights.safetensors": b"old"}
    )
    fill(tmp_path / "notebooks", {})
    fill(tmp_path, {"model.pth": b"weights"})
    monkeypatch.chdir(tmp_path / "notebooks")
    assert (locate(run.name).path, locate(old.name).path, locate("model.pth").path) == (run, old, tmp_path / "model.pth")
    for name, message in (
        ("adamixer-thin8-plain-seed0-00000000", "run 'adamixer-thin8-plain-seed0-00000000': none in .*results has this id and its weights"),
        ("absent.pth", "no such file or folder .*; give a checkpoint file, a Hugging Face folder"),
        ("weights/absent.pth", "no such file or folder"),
        ("a b", "no such file or folder"),
        ("~nosuchuser/x", "model '~nosuchuser/x': no such file or folder"),
    ):
        with pytest.raises(InputError, match=message) as error:
            locate(name)
        assert "\n" not in str(error.value)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for; counts what is handed out."""

    def __init__(self, given: list[str], files: dict[str, bytes], *words: object) -> None:
        self.given, self.files = given, files
        super().__init__(*words)

    def do_GET(self) -> None:
        if "/api/models/org/name/tree/" in self.path:
            return self._answer(json.dumps([self._entry(name) for name in self.files]).encode())
        if "/api/models/org/name" in self.path and not self.path.endswith("absent"):
            return self._answer(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": n} for n in self.files]}).encode())
        name = self.path.rpartition("/")[2]
        if f"/org/name/resolve/{COMMIT}/" in self.path and name in self.files:
            if self.command == "GET":
                self.given.append(name)
            return self._answer(self.files[name])
        return self._answer(b'{"error": "not there"}', 404)

    do_HEAD = do_GET

    def _entry(self, name: str) -> dict[str, object]:
        return {"type": "file", "path": name, "size": len(self.files[name]), "oid": sha256(self.files[name]).hexdigest()[:40]}

    def _answer(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        headers = {"Content-Length": len(content), "ETag": f'"{sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        headers |= {"X-Error-Code": "RepoNotFound"} if status == 404 and "absent" not in self.path else {}
        headers |= {"X-Error-Code": "RevisionNotFound"} if status == 404 and "absent" in self.path else {}
        headers |= {"X-Error-Code": "EntryNotFound"} if status == 404 and COMMIT in self.path else {}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str], dict[str, bytes], ThreadingHTTPServer]]:
    given: list[str] = []
    files = FILES | {"README.md": b"words", "tf_model.h5": b"another library's"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, given, files))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", given, files, server
    server.shutdown()
    server.server_close()


def test_a_hub_id(hub, tmp_path: Path, monkeypatch) -> None:
    """In a process of its own: huggingface_hub reads its settings when it is imported."""
    endpoint, given, files, server = hub
    for name, value in {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def ask(name: str) -> str:
        code = (
            "from detrdistill.checkpoints.locate import locate\nfrom detrdistill.errors import InputError\n"
            f"try: print(locate({name!r}).model_dump_json())\nexcept InputError as error: print(error)"
        )
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]

    found = DetectorWeights.model_validate_json(ask("org/name"))
    wanted = ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert found.source == f"org/name@{COMMIT}" and sorted(given) == wanted, "what is not needed stays there"
    assert sorted(path.name for path in found.path.iterdir()) == wanted
    assert found.sha256 == shell_hash("config.json", "model.safetensors", folder=found.path)
    assert ask("org/name@" + COMMIT) == ask("org/name") and len(given) == 3, "from the cache"
    for name in ("org/name@absent", "org/other"):
        assert (line := ask(name)).startswith(
            f"model '{name}': no such file or folder, and the hub refuses it ("
        ) and "correct the name" in line
    del files["model.safetensors"]
    monkeypatch.setenv("HF_HOME", str(tmp_path / "another"))
    assert DetectorWeights.model_validate_json(ask("org/name")).sha256 != found.sha256 and "pytorch_model.bin" in given
    del files["pytorch_model.bin"]
    monkeypatch.setenv("HF_HOME", str(tmp_path / "third"))
    assert ask("org/name").startswith("model 'org/name': on the hub, but without model.safetensors and pytorch_model.bin; give")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    server.shutdown()
    server.server_close()
    assert DetectorWeights.model_validate_json(ask("org/name")) == found, "without a network too"
    found.path.joinpath("model.safetensors").unlink()
    why = "the hub cannot be reached and the model is not, or not wholly, in its cache; download it where there is a network"
    assert ask("org/name") == f"model 'org/name': {why}"
    shutil.rmtree(found.path.parents[1] / "trees")  # as where transformers downloaded single files
    assert ask("org/name") == f"model 'org/name': {why}"
    assert ask("org/new") == f"model 'org/new': {why}"

"""Where a detector that someone names lies, and the hash of what is read of it. No torch here: runs are named before any starts."""

import json
import os
import re
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from detrdistill.data.layout import category_ids, data_cache
from detrdistill.errors import InputError
from detrdistill.files import nearby
from detrdistill.recipes.parts import DetectorWeights
from detrdistill.recipes.recipe import Recipe
from detrdistill.records import Record, read_record

CONFIG, OF_RUN = "config.json", "weights.safetensors"
WHOLE = ("model.safetensors", "pytorch_model.bin")  # transformers' names; the first that is there is read
BESIDE = (CONFIG, "preprocessor_config.json")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


def locate(model: str | Path) -> DetectorWeights:
    """The weights that `model` names, with their hash.

    Args:
        model: a checkpoint file, a Hugging Face folder, a run's folder or id, or a hub id, "org/name" or "org/name@revision". Relative
            paths are looked for here and in the folders above; of a hub id's files those needed are downloaded, unless they have been.

    Raises:
        InputError: there is no such thing, or the hub does not hand it out.
    """
    text = str(model)
    path = nearby(Path(os.path.expanduser(text)))  # which leaves a user that it does not know
    if path.exists():
        return pinned_weights(DetectorWeights(path=path))
    if re.fullmatch(r"[\w+.-]+-[0-9a-f]{8}", text):
        root = Path(os.environ.get("DETRDISTILL_RESULTS") or nearby(Path("results")))
        for folder in (found for pattern in ("*", "reference/*") for found in sorted(root.glob(f"{pattern}/runs/{text}"))):
            if (folder / OF_RUN).is_file():
                return pinned_weights(DetectorWeights(path=folder))
        raise InputError(f"run '{text}': none in {root} has this id and its weights; give the run's folder")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text) and not text.endswith(SUFFIXES):
        return pinned_weights(_download(text))
    raise InputError(
        f"model '{text}': no such file or folder (looked in {Path.cwd()} and above); give a checkpoint file, a Hugging Face folder, a "
        "run's folder or id, or a hub id such as SenseTime/deformable-detr"
    )


def record_of(path: Path) -> Record | None:
    """The record of a detector's run, given its folder or the weights in it; None of anything else.

    Raises:
        InputError: the record is damaged.
    """
    folder = path if path.is_dir() else path.parent
    if not (path.is_dir() or path.name == OF_RUN) or not (folder / "record.json").is_file():
        return None
    record = read_record(folder / "record.json")
    return record if isinstance(record.recipe, Recipe) else None


def ids_of_run(path: Path) -> dict[str, int]:
    """The id of each class in the data of a run (its folder or weights), by name; empty for anything else, or where the data is gone."""
    if (record := record_of(path)) is None:
        return {}
    with suppress(InputError, OSError, KeyError, TypeError, ValueError):  # such a run can be used all the same
        return category_ids(record.recipe.data, data_cache())
    return {}


def pinned_weights(weights: DetectorWeights) -> DetectorWeights:
    """The same with the hash of what is there, so that a run is called by it. A stated hash holds where the files are gone.

    Raises:
        InputError: the files are missing, or have another hash than is stated.
    """
    path = nearby(weights.path)
    if weights.sha256 and not path.exists():
        return weights
    found = weights_hash(path)
    if weights.sha256 and weights.sha256 != found:
        raise InputError(f"weights {path}: their hash is {found}, the recipe says {weights.sha256}; put the recipe's weights there")
    return weights.replace(path=path, sha256=found)


def weights_hash(path: Path) -> str:
    """SHA-256 over the files that are read, in the order of `weights_files`.

    In a shell: `sha256sum FILE`, and of a Hugging Face folder `cat config.json model.safetensors | sha256sum`.

    Raises:
        InputError: they are missing.
    """
    digest = sha256()
    for file in weights_files(path):
        try:
            with file.open("rb") as content:
                while block := content.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise InputError(f"weights {file}: cannot be read ({error.strerror}); restore the file") from None
    return digest.hexdigest()


def weights_files(path: Path) -> list[Path]:
    """What is read of a detector's file or folder: config.json where it says the classes, an index of shards, then the weights by name.

    Raises:
        InputError: there is no such file or folder, or no weights in it.
    """
    if not path.exists():
        raise InputError(f"weights {path}: no such file or folder; correct the path")
    if path.is_dir() and (path / OF_RUN).is_file():
        path = path / OF_RUN
    if path.is_file():
        beside = path.with_name(CONFIG)
        alone = path.suffix != ".safetensors" or path.with_name("record.json").is_file() or not beside.is_file()
        return [path] if alone else [beside, path]
    for name in WHOLE:
        if (path / name).is_file():
            return [path / CONFIG, path / name]
        if (index := path / f"{name}.index.json").is_file():
            return [path / CONFIG, index, *(path / shard for shard in _shards(index))]
    raise InputError(
        f"weights {path}: no {OF_RUN} of a run, and no {' or '.join(WHOLE)} of a Hugging Face model; give a folder that has them, or a file"
    )


def _shards(index: Path) -> list[str]:
    """Names of the files that an index lists; none where it is damaged, which is said when it is read."""
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({Path(shard).name for shard in listed})
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []


def _download(name: str) -> DetectorWeights:
    """A hub model's configuration and weights, as safetensors if it has them."""
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RemoteEntryNotFoundError
    except ModuleNotFoundError:
        raise InputError(
            f"model '{name}': no such file or folder, and for a hub id huggingface_hub is not installed; install the extra: "
            "pip install 'detrdistill[hub]'"
        ) from None

    model, _, revision = name.partition("@")
    try:
        for whole in WHOLE:
            stem, _, kind = whole.partition(".")
            wanted = [*BESIDE, whole, f"{whole}.index.json", f"{stem}-*.{kind}"]
            folder = Path(snapshot_download(model, revision=revision or None, allow_patterns=wanted))
            if any((folder / f"{whole}{end}").is_file() for end in ("", ".index.json")):
                return DetectorWeights(path=folder, source=f"{model}@{folder.name}")  # a snapshot is called by its commit
        hf_hub_download(model, WHOLE[0], revision=folder.name)  # asks the hub itself, where a snapshot takes what is held
    except LocalEntryNotFoundError:  # also what a network that fails comes to
        why = "the hub cannot be reached and the model is not, or not wholly, in its cache; download it where there is a network"
    except RemoteEntryNotFoundError:
        why = f"on the hub, but without {' and '.join(WHOLE)}; give a model that has weights of transformers"
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        why = f"no such file or folder, and the hub refuses it ({' '.join(str(error).split())[:160]}); correct the name or the revision"
    else:
        why = "the download was interrupted; call again"
    raise InputError(f"model '{name}': {why}")

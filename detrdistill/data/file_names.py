"""The file that an image's `file_name` means: inside the image folder, whatever slashes or form of Unicode its tool writes."""

import os
import stat
import unicodedata
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from detrdistill.data.values import show, steers


class ImageFolder:
    """Where images lie; what was asked of the disk once is remembered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._real_folder = cache(os.path.realpath)  # it costs ten lstats
        self._hinted = False

    def find(self, name: Any) -> tuple[str | None, tuple[str, str] | None]:
        """The name of a regular file inside the folder that `name` means, and kind and detail of what is wrong if there is none."""
        fault = self._fault(name)
        if fault is None:
            return name, None
        if fault[0] == "missing image" and isinstance(name, str):
            for other in self._other_names(name):
                if self._fault(other) is None:
                    return other, None
            fault = fault[0], fault[1] + self._hint(name)
        return None, fault

    def same_file(self, name: str) -> str:
        """What two names of one file have in common."""
        path = os.path.join(self.folder, name)
        return os.path.join(self._real_folder(os.path.dirname(path)), os.path.basename(path))

    def _fault(self, name: Any) -> tuple[str, str] | None:
        if not isinstance(name, str) or not name:
            return "file name", f"file_name is {show(name)}, not text"
        if steers(name):
            return "file name", f"file_name {show(name)} has letters that cannot be printed"
        path = os.path.join(self.folder, name)
        try:
            parent, root = self._real_folder(os.path.dirname(path)), self._real_folder(str(self.folder))
            real = os.path.realpath(path) if stat.S_ISLNK(os.lstat(path).st_mode) else os.path.join(parent, "")
            if os.path.isabs(name) or os.path.commonpath([root, real]) != root:
                return "file outside the folder", f"file_name {show(name)} leads out of {self.folder}; images must lie inside"
            if not stat.S_ISREG(os.stat(path).st_mode):
                return "missing image", f"file_name {show(name)} in {self.folder} is not a file"
        except (FileNotFoundError, NotADirectoryError):
            return "missing image", f"file_name {show(name)} is missing in {self.folder}"
        except (OSError, ValueError) as error:  # ValueError: a NUL or half a surrogate pair in the name
            reason = getattr(error, "strerror", None) or "impossible name"
            return "missing image", f"file_name {show(name)} in {self.folder} cannot be read ({reason})"
        return None

    def _other_names(self, name: str) -> Iterator[str]:
        """With slashes for backslashes, without the image folder's own name, and as the disk writes it."""
        slashed = name.replace("\\", "/").removeprefix("./")
        inside = slashed.removeprefix(f"{self.folder.name}/")
        yield from dict.fromkeys((slashed, inside))
        yield from (self._listed[form] for one in (slashed, inside) if (form := unicodedata.normalize("NFC", one)) in self._listed)

    @property
    def _listed(self) -> dict[str, str]:
        """All files of the folder, by their names in composed letters; Macs write decomposed ones."""
        if not hasattr(self, "_names"):
            found = (os.path.relpath(os.path.join(place, one), self.folder) for place, _, files in os.walk(self.folder) for one in files)
            self._names = {unicodedata.normalize("NFC", one): one for one in map(Path.as_posix, map(Path, found))}
        return self._names

    def _hint(self, name: str) -> str:
        """The nearest name, for the first that is missing: looking for all would take minutes where a folder is the wrong one."""
        if self._hinted or len(name) > 255:
            return ""
        self._hinted = True
        wanted = _core(name)
        near = [one for one in self._listed if _core(one) == wanted] or get_close_matches(
            name, list(self._listed)[:10_000], n=1, cutoff=0.8
        )
        if not near and not self._listed:
            return ", which has no files"
        return f"; the nearest name there is {show(self._listed[near[0]])}" if near else ""


def _core(name: str) -> str:
    """A name without what often differs: folders, ending, capitals, and letters written as %20."""
    last = unquote(unicodedata.normalize("NFC", name)).replace("\\", "/").rpartition("/")[2]
    return (last.rpartition(".")[0] or last).casefold()

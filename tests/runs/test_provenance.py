"""Which commit a record names."""

import re
import subprocess

from detrdistill.runs import provenance


def test_new_files_are_changes_of_the_code_and_another_checkout_is_not_its_own(monkeypatch, tmp_path):
    (tmp_path / "detrdistill" / "runs").mkdir(parents=True)
    (own := tmp_path / "detrdistill" / "runs" / "provenance.py").write_text("")
    monkeypatch.setattr(provenance, "__file__", str(own))
    git = lambda *words: subprocess.run(  # noqa: E731
        ("git", "-c", "user.name=a", "-c", "user.email=a@b", *words), cwd=tmp_path, check=True, capture_output=True
    )
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    assert provenance.commit() is None, "a copy that nobody tracks"
    git("add", own)
    git("commit", "-m", "second")
    (tmp_path / "notes").write_text("not code")
    assert re.fullmatch("[0-9a-f]{40}", provenance.commit())
    (tmp_path / "detrdistill" / "new.py").write_text("")
    assert provenance.commit().endswith("+changes")

import errno
import os
import subprocess
import sys

import pytest

from litlora.errors import LitLoraError
from litlora.hub.client import Repo
from litlora.hub.download import _lock
from litlora.utils.locks import LOCK, holding, locked, take


def test_locked_folder_is_refused_until_released(tmp_path):
    for _ in range(2):
        with locked(tmp_path, "--out_dir"):
            with pytest.raises(LitLoraError) as refused, locked(tmp_path, "--out_dir"):
                pass
            hint = "wait for its end, or choose another folder"
            assert str(refused.value) == f"--out_dir ({tmp_path}) is in use by another run: {hint}"
            assert (tmp_path / LOCK).exists()
        assert not list(tmp_path.iterdir())


def test_empty_folder_is_removed_with_the_parents_created_for_it(tmp_path):
    with locked(tmp_path / "a/b/c", "--out_dir"):
        (tmp_path / "a/file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]


def test_lock_of_a_killed_process_is_released(tmp_path):
    code = """if True:
        import os, pathlib, signal, sys
        from litlora.utils.locks import locked
        with locked(pathlib.Path(sys.argv[1]), "--out_dir"):
            os.kill(os.getpid(), signal.SIGKILL)"""
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode < 0
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path, "--out_dir"):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_one_sentence(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    hint = "choose a folder on another file system"
    with pytest.raises(LitLoraError) as refused, locked(tmp_path / "out", "--out_dir"):
        pass
    assert str(refused.value) == f"--out_dir ({tmp_path / 'out'}) cannot be locked: {os.strerror(code)}"
    assert not list(tmp_path.iterdir())
    with pytest.raises(LitLoraError, match=hint), holding(tmp_path / "new/held"):
        pass
    with pytest.raises(LitLoraError, match=hint):
        take(tmp_path / "new/taken")
    assert not list(tmp_path.iterdir())
    with pytest.raises(LitLoraError, match=hint):
        _lock(tmp_path / ".download", Repo("a/b", "model", "main", None))

import subprocess
import sys

import pytest

from litlora.errors import LitLoraError
from litlora.utils.locks import LOCK, locked


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

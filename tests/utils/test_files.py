import errno
import os
import resource
import signal

import pytest

from litlora.errors import LitLoraError
from litlora.utils import files
from litlora.utils.files import atomic_directory, write_atomically


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_atomically_creates_the_folder(tmp_path):
    write_atomically({tmp_path / "new/one": b"1", tmp_path / "new/two": b"2"})
    assert names(tmp_path / "new") == ["one", "two"]
    assert (tmp_path / "new/two").read_bytes() == b"2"


def test_full_disk_leaves_the_old_files(tmp_path):
    (tmp_path / "one").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))  # the nearest thing to a full disk
    try:
        with pytest.raises(LitLoraError) as refused:
            write_atomically({tmp_path / "one": b"new", tmp_path / "two": bytes(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(refused.value) == f"cannot write {tmp_path / 'two'}: File too large"
    assert names(tmp_path) == ["one"]
    assert (tmp_path / "one").read_bytes() == b"old"


def test_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LitLoraError) as refused:
        write_atomically({tmp_path / "file/one": b""})
    assert str(refused.value) == f"cannot write {tmp_path / 'file'}: File exists"


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    """The next attempt removes them, and does not remove the folder of a concurrent attempt."""
    child = os.fork()
    if not child:
        with atomic_directory(tmp_path / "new") as folder:
            (folder / "file").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(names(tmp_path)) == 1
    with atomic_directory(tmp_path / "new") as first:
        assert names(tmp_path) == [first.name]
        with pytest.raises(LitLoraError), atomic_directory(tmp_path / "new") as second:
            assert names(tmp_path) == sorted([first.name, second.name])
            raise LitLoraError("enough")
    assert names(tmp_path) == ["new"]


def test_folder_removed_before_it_is_locked_is_created_again(tmp_path, monkeypatch):
    lock, removed = files._folder_lock, []

    def lock_late(folder, **options):
        if not removed:
            removed.append(folder)
            files._remove_leftovers(tmp_path / "new")  # as a concurrent process that writes the same folder
        return lock(folder, **options)

    monkeypatch.setattr(files, "_folder_lock", lock_late)
    with atomic_directory(tmp_path / "new") as folder:
        assert [folder.name] == names(tmp_path) != [removed[0].name]
    assert names(tmp_path) == ["new"]


def test_leftovers_stay_where_locks_are_unsupported(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EBADF, "as on a network file system")

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / ".new.0a1b2c3d.partial").mkdir()
    with atomic_directory(tmp_path / "new") as folder:
        (folder / "file").touch()
    assert names(tmp_path) == [".new.0a1b2c3d.partial", "new"]

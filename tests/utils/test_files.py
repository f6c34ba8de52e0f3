import errno
import os
import resource
import signal

import pytest

from litlora.errors import LitLoraError
from litlora.utils import files
from litlora.utils.files import whole_directory, write_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_files_are_written_into_a_folder_that_is_made_for_them(tmp_path):
    write_whole({tmp_path / "new/one": b"1", tmp_path / "new/two": b"2"})
    assert names(tmp_path / "new") == ["one", "two"]
    assert (tmp_path / "new/two").read_bytes() == b"2"


def test_a_full_disk_leaves_what_was_there(tmp_path):
    (tmp_path / "one").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))  # the nearest thing to a full disk
    try:
        with pytest.raises(LitLoraError) as refused:
            write_whole({tmp_path / "one": b"new", tmp_path / "two": bytes(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(refused.value) == f"cannot write {tmp_path / 'two'}: File too large"
    assert names(tmp_path) == ["one"]
    assert (tmp_path / "one").read_bytes() == b"old"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LitLoraError) as refused:
        write_whole({tmp_path / "file/one": b""})
    assert str(refused.value) == f"cannot write {tmp_path / 'file'}: File exists"


def test_what_a_killed_process_has_left_of_a_folder_vanishes_with_the_next_attempt_alone(tmp_path):
    child = os.fork()
    if not child:
        with whole_directory(tmp_path / "new") as folder:
            (folder / "file").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(names(tmp_path)) == 1
    with whole_directory(tmp_path / "new") as first:
        assert names(tmp_path) == [first.name]
        with pytest.raises(LitLoraError), whole_directory(tmp_path / "new") as second:
            assert names(tmp_path) == sorted([first.name, second.name])
            raise LitLoraError("enough")
    assert names(tmp_path) == ["new"]


def test_a_folder_that_is_taken_for_remains_before_it_is_held_is_made_anew(tmp_path, monkeypatch):
    held, taken = files._held, []

    def late(folder, **options):
        if not taken:
            taken.append(folder)
            files._remove_remains(tmp_path / "new")  # as another process does that writes the same
        return held(folder, **options)

    monkeypatch.setattr(files, "_held", late)
    with whole_directory(tmp_path / "new") as folder:
        assert [folder.name] == names(tmp_path) != [taken[0].name]
    assert names(tmp_path) == ["new"]


def test_where_no_folder_can_be_held_all_remains_stay(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EBADF, "as on a network's disk")

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / ".new.0a1b2c3d.partial").mkdir()
    with whole_directory(tmp_path / "new") as folder:
        (folder / "file").touch()
    assert names(tmp_path) == [".new.0a1b2c3d.partial", "new"]

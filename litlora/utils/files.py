"""Files and folders that are written atomically, and JSON that is read with validation."""

import fcntl
import glob
import json
import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from io import BufferedReader
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO

import yaml

from litlora.errors import LitLoraError

# What PyYAML raises for an invalid text; all but the first where a value does not match its tag.
YAML_ERRORS = (yaml.YAMLError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
HASH_CHUNK = 4_000_000  # bytes
HASH_THREADS = 8
LINK_FOLDERS = "LITLORA_LINK_FOLDERS"  # environment variable: folders to which links of a checkpoint may lead
MOST_BYTES = 500_000_000  # of a file that is read whole
MOST_YAML_BYTES, MOST_VALUES = 1_000_000, 10_000  # of a YAML file
PENDING = ".pending"  # folder of complete files that wait to be moved to their final names


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object."""
    try:
        content = json.loads(read_whole(path))
    except OSError as error:
        raise LitLoraError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise LitLoraError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise LitLoraError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def read_whole(path: Path, most: int = MOST_BYTES) -> bytes:
    """Read a file that a stranger may have written: one of bearable size, and no pipe or device, which has no end."""
    refuse_device(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            fault = f"has {size / 1e6:,.0f} MB, more than any file of its kind"
            raise LitLoraError(f"{path} {fault}: replace it with an intact copy")
        return file.read()


def refuse_device(path: Path) -> None:
    """Refuse a pipe or device where a file is expected: reading it may never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise LitLoraError(f"{path} is not a file but a device or a pipe: remove it")


def read_yaml(path: Path) -> Any:
    """Read a YAML file that a stranger may have written."""
    try:
        loader = yaml.SafeLoader(read_whole(path, MOST_YAML_BYTES))
        root = loader.get_single_node()
        deque(yaml_nodes(str(path), root), maxlen=0)
        return None if root is None else loader.construct_document(root)
    except OSError as error:
        raise LitLoraError(f"cannot read {path}: {error.strerror}") from error
    except YAML_ERRORS as error:
        raise LitLoraError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def yaml_nodes(source: str, root: yaml.Node | None) -> Iterator[yaml.Node]:
    """Yield the values of a YAML document, and refuse more than are written in it: aliases make a few lines endless."""
    nodes, seen = [root] if root else [], 0
    while nodes:
        node, seen = nodes.pop(), seen + 1
        if seen > MOST_VALUES:
            raise LitLoraError(f"{source} holds more than {MOST_VALUES:,} values, or an alias of itself: shorten it")
        if isinstance(node, yaml.MappingNode):
            nodes += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
        yield node


def digest(file: BufferedReader) -> str:
    """Return a hash of a file's content, computed chunk by chunk in several threads."""
    starts = range(0, os.fstat(file.fileno()).st_size, HASH_CHUNK)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        chunks = pool.map(lambda start: sha256(os.pread(file.fileno(), HASH_CHUNK, start)).digest(), starts)
        return sha256(b"".join(chunks)).hexdigest()


def write_atomically(contents: Mapping[Path, bytes]) -> None:
    """Write files under temporary names, sync all of them, then rename them in this order."""
    with ExitStack() as cleanup:
        partials = {path: _stage(path, content, cleanup) for path, content in contents.items()}
        for path, partial in partials.items():
            with reporting_write_errors(path):
                partial.replace(path)
                sync(path.parent)


def _stage(path: Path, content: bytes, cleanup: ExitStack) -> Path:
    """Write and sync `content` beside `path`, under a temporary name that `cleanup` removes."""
    partial = path.with_name(f".{path.name}.{token_hex(4)}.partial")
    with reporting_write_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with reporting_write_errors(path), partial.open("xb") as file:
        cleanup.callback(partial.unlink, missing_ok=True)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return partial


def open_own(path: str, flags: int) -> int:
    """Open a file that litlora has made itself, for the `opener` of `open`: not what a symbolic link leads to."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def refuse_link(path: Path) -> None:
    """Refuse a symbolic link where litlora moves or removes an entry of its own."""
    if path.is_symlink():
        raise LitLoraError(f"{path} is a symbolic link, where litlora expects an entry of its own: remove it")


def copy_own(path: Path, folder: Path) -> None:
    """Copy a file of a checkpoint into a folder, but nothing from elsewhere: a user may publish the copy."""
    refuse_foreign_link(path)
    shutil.copyfile(path, folder / path.name)


def refuse_foreign_link(path: Path) -> None:
    """Refuse a link out of a checkpoint's folder, the Hub cache that it may be part of, and the user's LINK_FOLDERS."""
    home, target = path.parent.resolve(), Path(os.path.realpath(path))  # which takes a loop for a file
    cache = [home.parent.parent / "blobs"] if home.parent.name == "snapshots" else []
    named = [Path(folder).resolve() for folder in os.environ.get(LINK_FOLDERS, "").split(os.pathsep) if folder]
    if not any(target.is_relative_to(root) for root in (home, *cache, *named)):
        hint = f"replace it by the file itself, or name the folder that has it in the environment's {LINK_FOLDERS}"
        raise LitLoraError(f"{path} is a link out of its folder, to {target}, whose content would be copied: {hint}")


def write_transaction(folder: Path, contents: Mapping[str, Iterable[bytes]]) -> None:
    """Write files of a folder, given in pieces, as one transaction.

    It commits when the folder of pending files gets its name; if the process is killed after that,
    `complete_transaction` moves the files that are left.
    """
    with reporting_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    complete_transaction(folder)
    with atomic_directory(folder / PENDING) as staging:
        for name, content in contents.items():
            with reporting_write_errors(folder / name), (staging / name).open("wb") as file:
                file.writelines(content)
    complete_transaction(folder)


def complete_transaction(folder: Path) -> None:
    """Move files to their final names that an interrupted `write_transaction` committed but did not move."""
    staging = folder / PENDING
    refuse_link(staging)
    if not staging.is_dir():
        return
    for path in [folder / staged.name for staged in staging.iterdir()]:
        with reporting_write_errors(path), suppress(FileNotFoundError):  # another process moves them too
            (staging / path.name).replace(path)
    with reporting_write_errors(folder), suppress(FileNotFoundError):
        sync(folder)
        staging.rmdir()


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that is renamed to `path` on success and removed on failure.

    Leftovers of a killed process are removed by the next attempt. Raises LitLoraError if the folder cannot be written,
    or if `path` exists and is not empty.
    """
    refuse_link(path)
    _remove_leftovers(path)
    with reporting_write_errors(path), ExitStack() as cleanup:
        partial = _temporary_folder(path, cleanup)
        yield partial
        for file in partial.iterdir():
            sync(file)
        partial.chmod(0o777 & ~_umask())
        sync(partial)
        partial.replace(path)
        sync(path.parent)


def _umask() -> int:
    """Return the permissions that new files lack."""
    status = Path("/proc/self/status")
    if status.exists() and (
        found := re.search(r"^Umask:\s*([0-7]+)$", status.read_text(encoding="utf-8"), re.MULTILINE)
    ):
        return int(found[1], 8)
    os.umask(umask := os.umask(0o077))  # which other threads would notice
    return umask


def _temporary_folder(path: Path, cleanup: ExitStack) -> Path:
    """Create a folder beside `path`, locked until `cleanup` removes it.

    Before it is locked, another process may remove it as a leftover: then create another one.
    """
    while True:
        folder = path.with_name(f".{path.name}.{token_hex(4)}.partial")  # process ids repeat in containers
        path.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        with suppress(FileNotFoundError):
            cleanup.enter_context(_folder_lock(folder, wait=True))
            if folder.exists():
                return folder


def _remove_leftovers(path: Path) -> None:
    """Remove the folders that `atomic_directory` created for `path` and that no process has locked."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        remove_unlocked(leftover)


def remove_unlocked(folder: Path) -> None:
    """Remove a temporary folder, unless a process has it locked, or its file system has no locks."""
    with suppress(OSError), _folder_lock(folder) as acquired:
        if acquired:
            shutil.rmtree(folder)


@contextmanager
def _folder_lock(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Lock a folder until the block or the process ends; yield whether that worked.

    It fails if another process holds the lock and `wait` is false, and on some network file systems.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield _flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def _flock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation)
    except OSError:
        return False
    return True


def sync(path: Path) -> None:
    """Flush a file's content, or the renames in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def reporting_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a LitLoraError that names the file and the reason."""
    try:
        yield
    except OSError as error:
        # Where numpy writes, a full disk has no name of its own
        raise LitLoraError(f"cannot write {path}: {error.strerror or f'the disk may be full ({error})'}") from error


def require_working_directory() -> None:
    """Refuse a working directory that has been removed, from which libraries cannot be loaded."""
    try:
        Path.cwd()
    except OSError as error:
        raise LitLoraError(f"the working directory cannot be read ({error.strerror}): change to another") from error


@contextmanager
def scratch_file(beside: Path) -> Iterator[BinaryIO]:
    """Yield a file without a name, on the disk of a folder that need not exist yet: /tmp may be in memory."""
    existing = next(folder for folder in (beside, *beside.absolute().parents) if folder.exists())
    file = tempfile.TemporaryFile(dir=existing)  # noqa: SIM115
    try:
        yield file
    finally:
        with suppress(OSError):  # what a full disk does not take is not needed any more
            file.close()


def check_writable(path: Path, flag: str) -> None:
    """Refuse a folder that is not writable, without creating it."""
    try:
        with scratch_file(path):
            pass
    except OSError as error:
        raise LitLoraError(f"{flag} ({path}) cannot be written: {error.strerror}") from error


def check_replaceable(path: Path, flag: str, beginning: bytes) -> None:
    """Refuse to write over a file unless it begins like what litlora writes there."""
    if not path.is_file():
        return
    with reporting_write_errors(path), path.open("rb") as file:
        found = file.read(len(beginning))
    if found and found != beginning:
        raise LitLoraError(f"{flag} ({path}) was not written by this command: choose another, or remove it")


def check_absent(path: Path, flag: str) -> None:
    """Refuse an output file or folder that exists, or that could not be written."""
    if path.exists():
        raise LitLoraError(f"{flag} ({path}) is there already: choose another, or remove it")
    check_writable(path, flag)

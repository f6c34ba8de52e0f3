import fcntl
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from litlora.data import split_encoder
from litlora.data.prompts.styles import StyleSettings
from litlora.data.split_encoder import SplitEncoder
from litlora.data.token_cache import (
    ABOUT,
    FIRST_LABELS,
    FOLDER,
    IDS,
    MANIFEST,
    OFFSETS,
    find_split,
    open_splits,
    peek_splits,
)
from litlora.data.tokenizer import Tokenizer
from litlora.errors import LitLoraError

ROW = '{"instruction": "a", "input": "", "output": "b"}'


@pytest.fixture(scope="module")
def tokenizer(tiny) -> Tokenizer:
    return Tokenizer(tiny)


@pytest.fixture
def encoder(tokenizer) -> SplitEncoder:
    return SplitEncoder(tokenizer, StyleSettings("alpaca"), mask_prompt=True)


@pytest.fixture
def data(data_dir, tmp_path) -> Path:
    """Return prepared data without a token cache."""
    return Path(shutil.copytree(data_dir, tmp_path / "data", ignore=shutil.ignore_patterns(FOLDER)))


def open_all(data: Path, encoder: SplitEncoder, opener=open_splits) -> list[list[np.ndarray]]:
    """Return the four arrays of both splits."""
    splits = [find_split(data / f"{name}.jsonl", encoder) for name in ("train", "val")]
    return [list(tokens[:4]) for tokens in opener(splits, encoder)]


def copied(splits: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
    """Return arrays that stay when the cache entries behind them are removed."""
    return [[array.copy() for array in split] for split in splits]


def assert_same(ours: list[list[np.ndarray]], theirs: list[list[np.ndarray]]) -> None:
    for split, other in zip(ours, theirs, strict=True):
        for array, expected in zip(split, other, strict=True):
            np.testing.assert_array_equal(array, expected)


def folders(data: Path) -> list[Path]:
    return sorted((data / FOLDER).iterdir())


def test_tokens_are_cached_beside_the_data(data, encoder):
    expected = open_all(data, encoder)
    times = [path.stat().st_mtime_ns for folder in folders(data) for path in (folder, *folder.iterdir())]
    assert_same(open_all(data, encoder), expected)
    assert [folder.name.split("-")[0] for folder in folders(data)] == ["train", "val"]
    assert times == [path.stat().st_mtime_ns for folder in folders(data) for path in (folder, *folder.iterdir())]


def test_cache_key_depends_on_everything_that_decides_tokens(data, encoder, tokenizer, pico):
    train = data / "train.jsonl"
    encoders = [
        encoder,
        SplitEncoder(tokenizer, StyleSettings("none"), True),
        SplitEncoder(tokenizer, StyleSettings("{instruction}"), True),
        SplitEncoder(tokenizer, StyleSettings("alpaca"), False),
        SplitEncoder(Tokenizer(pico), StyleSettings("alpaca"), True),
    ]
    keys = [find_split(train, each).name for each in encoders] + [find_split(data / "val.jsonl", encoder).name]
    train.write_bytes(train.read_bytes().replace(b"pear", b"lime", 1))
    keys.append(find_split(train, encoder).name)
    assert len(set(keys)) == len(keys)


def test_cache_key_depends_on_the_chat_template(data, tiny, tmp_path):
    keys = set()
    for system in ("", "Be brief."):
        folder = Path(shutil.copytree(tiny, tmp_path / f"tiny{len(keys)}"))
        each = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
        (folder / "chat_template.jinja").write_text(system + each, encoding="utf-8")
        keys.add(find_split(data / "train.jsonl", SplitEncoder(Tokenizer(folder), StyleSettings("chat"), True)).name)
    assert len(keys) == 2


@pytest.mark.parametrize("name", [IDS, OFFSETS, FIRST_LABELS, ABOUT, MANIFEST])
def test_corrupt_cache_entry_is_replaced(data, encoder, name):
    expected = copied(open_all(data, encoder))
    for corrupt in (Path.unlink, truncate, flip_bit):
        corrupt(folders(data)[0] / name)
        assert_same(open_all(data, encoder), expected)
        assert len(folders(data)) == 2


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_cache_retains_the_newest_entries(data, tokenizer):
    partials = [data / FOLDER / f".train-{name}.partial" for name in ("abandoned", "active", "slow")]
    abandoned, active, slow = partials
    for path in partials:
        path.mkdir(parents=True)
    for path in (abandoned, slow):
        os.utime(path, (0, 0))
    held = os.open(slow, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    encoders = [
        SplitEncoder(tokenizer, StyleSettings(f"{number} {{instruction}}"), mask_prompt=True) for number in range(6)
    ]
    for encoder in encoders:
        open_all(data, encoder)
    newest = {
        find_split(data / f"{name}.jsonl", encoder).name for name in ("train", "val") for encoder in encoders[-4:]
    }
    os.close(held)
    assert {folder.name for folder in folders(data)} == newest | {active.name, slow.name}


def test_entry_of_a_clock_that_was_set_back_stays(data, tokenizer):
    """It is older than all others, also than those of another day."""
    encoders = [SplitEncoder(tokenizer, StyleSettings(f"{n} {{instruction}}"), mask_prompt=True) for n in range(6)]
    for encoder in encoders[:5]:
        open_all(data, encoder)
        for folder in folders(data):
            os.utime(folder, (4e9, 4e9))
    open_all(data, encoders[5])
    newest = {find_split(data / f"{name}.jsonl", encoders[5]).name for name in ("train", "val")}
    assert newest < {folder.name for folder in folders(data)}
    assert len(folders(data)) == 8


def test_unwritable_cache_is_temporary(data, encoder, capsys, tmp_path, monkeypatch):
    expected = copied(open_all(data, encoder))
    shutil.rmtree(data / FOLDER)
    (data / FOLDER).touch()  # root could write into a folder without write permission
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    assert_same(open_all(data, encoder), expected)
    assert capsys.readouterr().err == (
        f"--data_dir ({data / FOLDER}) cannot be written: Not a directory; "
        "the token cache is not saved, and the next run will tokenize again\n"
    )
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("change", ["none", "train", "corrupt", "all"])
def test_peeking_leaves_the_data_as_they_are(data, encoder, change, tmp_path, monkeypatch):
    expected = copied(open_all(data, encoder))
    if change == "train":
        shutil.rmtree(folders(data)[0])
    if change == "corrupt":
        flip_bit(folders(data)[0] / IDS)
    if change == "all":
        shutil.rmtree(data / FOLDER)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    before = {path: path.stat().st_mtime_ns for path in (data, *data.rglob("*"))}
    assert_same(open_all(data, encoder, peek_splits), expected)
    assert {path: path.stat().st_mtime_ns for path in (data, *data.rglob("*"))} == before
    assert list((tmp_path / "tmp").iterdir()) == []


def test_equal_tokens_have_equal_digests(data, encoder, tokenizer):
    splits = [find_split(data / f"{name}.jsonl", encoder) for name in ("train", "val")]
    digests = [tokens.digest for tokens in open_splits(splits, encoder)]
    assert digests == [tokens.digest for tokens in peek_splits(splits, encoder)]
    other = SplitEncoder(tokenizer, StyleSettings("alpaca"), mask_prompt=False)
    digests += [tokens.digest for tokens in peek_splits([find_split(data / "val.jsonl", other)], other)]
    assert len(set(digests)) == 3


def test_concurrent_runs_share_the_cache(data, encoder):
    with ThreadPoolExecutor(8) as pool:
        first, *others = pool.map(lambda _: open_all(data, encoder), range(8))
    for other in others:
        assert_same(other, first)
    assert [folder.name.split("-")[0] for folder in folders(data)] == ["train", "val"]


def test_entry_removed_by_a_concurrent_run_is_ignored(data, encoder):
    (data / FOLDER).mkdir()
    for name in (".train-gone.partial", "train-gone"):
        (data / FOLDER / name).symlink_to("nowhere")  # listed, but gone when it is examined
    assert len(open_all(data, encoder)) == 2


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    """Split a file of any size into chunks of a few rows."""
    monkeypatch.setattr(split_encoder, "CHUNK", 150)


@pytest.fixture
def two_workers(small_chunks, monkeypatch) -> None:
    monkeypatch.setattr(split_encoder, "worker_processes", lambda size: 2)


def test_parallel_tokenization_equals_serial(data, encoder, two_workers, monkeypatch):
    rows = (data / "train.jsonl").read_bytes().replace(b"\n", b"\r\n", 3)
    (data / "train.jsonl").write_bytes(b"\xef\xbb\xbf\n" + rows + rows.rstrip())
    parallel = copied(open_all(data, encoder))
    shutil.rmtree(data / FOLDER)
    monkeypatch.undo()
    assert_same(open_all(data, encoder), parallel)
    assert len(parallel[0][1]) == 2 * 15 + 1


def test_invalid_row_is_named_by_its_line_in_any_chunk(data, encoder, small_chunks):
    lines = [ROW] * 40
    lines[22], lines[23], lines[39] = "", '{"instruction": "a"}', "3"
    (data / "val.jsonl").write_text("\r\n".join(lines), encoding="utf-8")
    with pytest.raises(LitLoraError) as refused:
        open_all(data, encoder)
    sentence = f'{data / "val.jsonl"} line 24: there is no "output" (invalid rows after it: 1); a row must look like '
    assert str(refused.value).startswith(sentence)
    assert not (data / FOLDER).exists()


def test_invalid_row_leaves_no_cache_entry(data, encoder):
    with (data / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write("nonsense")
    with pytest.raises(LitLoraError, match="line 16: this is not valid JSON"):
        open_all(data, encoder)
    assert not (data / FOLDER).exists()


def test_chat_template_error_in_a_worker_is_one_sentence(data, tiny, tmp_path, two_workers):
    folder = Path(shutil.copytree(tiny, tmp_path / "tiny"))
    template = "{% for m in messages %}{% if 'fruit' in m.content %}{{ raise_exception('no fruit') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(template + "{{ m.content }}</s>{% endfor %}", encoding="utf-8")
    with pytest.raises(LitLoraError, match="fails on a conversation: no fruit"):
        open_all(data, SplitEncoder(Tokenizer(folder), StyleSettings("chat"), True))
    assert not (data / FOLDER).exists()


def test_workers_do_not_import_torch():
    code = "import sys, litlora.data.split_encoder; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


KILLED_RUN = """
import os, signal, sys
from multiprocessing import active_children
from pathlib import Path
from litlora.data import split_encoder
from litlora.data.prompts.styles import StyleSettings
from litlora.data.tokenizer import Tokenizer
encoder = split_encoder.SplitEncoder(Tokenizer(Path(sys.argv[1])), StyleSettings("alpaca"), True)
split_encoder.CHUNK = 100
split_encoder.worker_processes = lambda size: 2
chunks = encoder.encode_file(Path(sys.argv[2]))
next(chunks)
print(*[child.pid for child in active_children()], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_killed_run(data, tiny):
    arguments = [sys.executable, "-c", KILLED_RUN, tiny, data / "train.jsonl"]
    done = subprocess.run(
        arguments, stdout=subprocess.PIPE, timeout=600
    )  # waits until no process holds its output open
    assert len(done.stdout.split()) == 2

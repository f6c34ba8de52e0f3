import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from litlora.data import token_cache
from litlora.data.token_cache import FIRST_LABELS, FOLDER, IDS, MANIFEST, OFFSETS, SplitEncoder, find_split, open_splits
from litlora.data.tokenizer import Tokenizer
from litlora.errors import LitLoraError

ROW = '{"instruction": "a", "input": "", "output": "b"}'


@pytest.fixture(scope="module")
def tokenizer(tiny) -> Tokenizer:
    return Tokenizer(tiny)


@pytest.fixture
def encoder(tokenizer) -> SplitEncoder:
    return SplitEncoder(tokenizer, "alpaca", mask_prompt=True)


@pytest.fixture
def data(data_dir, tmp_path) -> Path:
    """Return prepared data that no run has seen."""
    return Path(shutil.copytree(data_dir, tmp_path / "data", ignore=shutil.ignore_patterns(FOLDER)))


def open_all(data: Path, encoder: SplitEncoder) -> list[list[np.ndarray]]:
    """Return the three arrays of both splits."""
    splits = [find_split(data / f"{name}.jsonl", encoder) for name in ("train", "val")]
    return [list(tokens[:3]) for tokens in open_splits(splits, encoder)]


def assert_same(ours: list[list[np.ndarray]], theirs: list[list[np.ndarray]]) -> None:
    for split, other in zip(ours, theirs, strict=True):
        for array, expected in zip(split, other, strict=True):
            np.testing.assert_array_equal(array, expected)


def folders(data: Path) -> list[Path]:
    return sorted((data / FOLDER).iterdir())


def test_tokens_are_made_once_and_kept_beside_the_data(data, encoder):
    made = open_all(data, encoder)
    times = [path.stat().st_mtime_ns for folder in folders(data) for path in (folder, *folder.iterdir())]
    assert_same(open_all(data, encoder), made)
    assert [folder.name.split("-")[0] for folder in folders(data)] == ["train", "val"]
    assert times == [path.stat().st_mtime_ns for folder in folders(data) for path in (folder, *folder.iterdir())]


def test_another_content_tokenizer_style_or_mask_has_tokens_of_its_own(data, encoder, tokenizer, pico):
    train = data / "train.jsonl"
    keys = [
        encoder.key(train),
        SplitEncoder(tokenizer, "none", True).key(train),
        SplitEncoder(tokenizer, "{instruction}", True).key(train),
        SplitEncoder(tokenizer, "alpaca", False).key(train),
        SplitEncoder(Tokenizer(pico), "alpaca", True).key(train),
        encoder.key(data / "val.jsonl"),
    ]
    train.write_bytes(train.read_bytes().replace(b"pear", b"lime", 1))
    keys.append(encoder.key(train))
    assert len(set(keys)) == len(keys)


def test_another_chat_template_has_tokens_of_its_own(data, tiny, tmp_path):
    keys = set()
    for system in ("", "Be brief."):
        folder = Path(shutil.copytree(tiny, tmp_path / f"tiny{len(keys)}"))
        each = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
        (folder / "chat_template.jinja").write_text(system + each, encoding="utf-8")
        keys.add(SplitEncoder(Tokenizer(folder), "chat", True).key(data / "train.jsonl"))
    assert len(keys) == 2


@pytest.mark.parametrize("name", [IDS, OFFSETS, FIRST_LABELS, MANIFEST])
def test_tokens_that_are_damaged_are_made_again(data, encoder, name):
    made = [[array.copy() for array in split] for split in open_all(data, encoder)]
    for damage in (lambda path: path.unlink(), cut, flip):
        damage(folders(data)[0] / name)
        assert_same(open_all(data, encoder), made)
        assert len(folders(data)) == 2


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_only_the_tokens_of_the_newest_recipes_are_kept(data, tokenizer):
    orphan, at_work = (data / FOLDER / f".train-{name}.partial" for name in ("orphan", "at work"))
    orphan.mkdir(parents=True)
    at_work.mkdir()
    os.utime(orphan, (0, 0))
    recipes = [SplitEncoder(tokenizer, f"{number} {{instruction}}", mask_prompt=True) for number in range(6)]
    for encoder in recipes:
        open_all(data, encoder)
    newest = {find_split(data / f"{name}.jsonl", encoder).name for name in ("train", "val") for encoder in recipes[-4:]}
    assert {folder.name for folder in folders(data)} == newest | {at_work.name}


def test_data_that_cannot_be_written_trains_all_the_same(data, encoder, capsys, tmp_path, monkeypatch):
    made = [[array.copy() for array in split] for split in open_all(data, encoder)]
    shutil.rmtree(data / FOLDER)
    (data / FOLDER).touch()  # a folder without the right to write would not stop root
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    assert_same(open_all(data, encoder), made)
    assert capsys.readouterr().err == (
        f"--data_dir ({data / FOLDER}) cannot be written: Not a directory; its tokens are made again at each start\n"
    )
    assert list((tmp_path / "tmp").iterdir()) == []


def test_runs_at_once_do_not_disturb_each_other(data, encoder):
    with ThreadPoolExecutor(8) as pool:
        first, *others = pool.map(lambda _: open_all(data, encoder), range(8))
    for other in others:
        assert_same(other, first)
    assert [folder.name.split("-")[0] for folder in folders(data)] == ["train", "val"]


def test_what_another_run_removes_meanwhile_is_no_failure(data, encoder):
    (data / FOLDER).mkdir()
    for name in (".train-gone.partial", "train-gone"):
        (data / FOLDER / name).symlink_to("nowhere")  # listed, and not there when it is looked at
    assert len(open_all(data, encoder)) == 2


@pytest.fixture
def in_pieces(monkeypatch) -> None:
    """Have other processes read a file of any size, in pieces of a few rows."""
    monkeypatch.setattr(token_cache, "PIECE", 150)
    monkeypatch.setattr(token_cache, "SMALL", 0)


@pytest.fixture
def in_processes(in_pieces, monkeypatch) -> None:
    monkeypatch.setattr(token_cache, "_processes", lambda size: 2)


def test_tokens_made_in_parallel_are_the_same(data, encoder, in_processes, monkeypatch):
    rows = (data / "train.jsonl").read_bytes().replace(b"\n", b"\r\n", 3)
    (data / "train.jsonl").write_bytes(b"\xef\xbb\xbf\n" + rows + rows.rstrip())
    parallel = [[array.copy() for array in split] for split in open_all(data, encoder)]
    shutil.rmtree(data / FOLDER)
    monkeypatch.undo()
    assert_same(open_all(data, encoder), parallel)
    assert len(parallel[0][1]) == 2 * 15 + 1


def test_a_bad_row_is_named_by_its_line_wherever_the_file_is_split(data, encoder, in_pieces, monkeypatch):
    monkeypatch.setattr(token_cache, "_processes", lambda size: 1)
    lines = [ROW] * 40
    lines[22], lines[23], lines[39] = "", '{"instruction": "a"}', "3"
    (data / "val.jsonl").write_text("\r\n".join(lines), encoding="utf-8")
    with pytest.raises(LitLoraError) as refused:
        open_all(data, encoder)
    sentence = f'{data / "val.jsonl"} line 24: there is no "output" (wrong rows after it: 1); a row must look like '
    assert str(refused.value).startswith(sentence)
    assert not (data / FOLDER).exists()


def test_a_bad_row_of_one_split_leaves_no_tokens_of_the_other(data, encoder):
    with (data / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write("nonsense")
    with pytest.raises(LitLoraError, match="line 16: this is no JSON"):
        open_all(data, encoder)
    assert not (data / FOLDER).exists()


def test_a_chat_template_that_fails_in_another_process_is_refused_in_one_sentence(data, tiny, tmp_path, in_processes):
    folder = Path(shutil.copytree(tiny, tmp_path / "tiny"))
    template = "{% for m in messages %}{% if 'fruit' in m.content %}{{ raise_exception('no fruit') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(template + "{{ m.content }}</s>{% endfor %}", encoding="utf-8")
    with pytest.raises(LitLoraError, match="fails on a conversation: no fruit"):
        open_all(data, SplitEncoder(Tokenizer(folder), "chat", True))
    assert not (data / FOLDER).exists()


def test_a_process_that_tokenizes_does_not_wait_for_torch():
    code = "import sys, litlora.data.token_cache; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


ORPHANS = """
import os, signal, sys
from multiprocessing import active_children
from pathlib import Path
from litlora.data import token_cache
from litlora.data.tokenizer import Tokenizer
encoder = token_cache.SplitEncoder(Tokenizer(Path(sys.argv[1])), "alpaca", True)
token_cache.PIECE = 100
token_cache._processes = lambda size: 2
pieces = token_cache._read(Path(sys.argv[2]), encoder)
next(pieces)
print(*[child.pid for child in active_children()], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_process_outlives_a_run_that_is_killed(data, tiny):
    arguments = [sys.executable, "-c", ORPHANS, tiny, data / "train.jsonl"]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, timeout=600)  # ends once nothing holds its output open
    assert len(done.stdout.split()) == 2

import gzip
import io
import threading
import time
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pytest
from helpers.hub_server import reachable_hub
from pyarrow import parquet

from litlora.__main__ import main
from litlora.args.data import PrepareArgs
from litlora.data.dataset import read_examples
from litlora.data.readers import sources
from litlora.data.readers.sources import mix, open_source, split_weight
from litlora.errors import LitLoraError

ROWS = b"".join(b'{"prompt": "%d", "completion": "x"}\n' % number for number in range(10))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.partition("?")[0]
        if path == "/stalls.jsonl":
            time.sleep(600)  # in a thread that nobody waits for
        elif path == "/elsewhere.jsonl":
            self.answer(302, b"", Location="file:///etc/hostname")
        elif path == "/cut.jsonl":
            self.answer(200, ROWS, length=len(ROWS) + 1)
        elif path == "/page.jsonl":
            self.answer(200, b"\n<!DOCTYPE html><title>Sign in</title>")
        elif path == "/rows.jsonl":
            self.answer(200, ROWS)
        elif path == "/rows.jsonl.gz":
            self.answer(200, gzip.compress(ROWS))
        elif path == "/table.parquet":
            self.answer(200, table("one"))
        else:
            self.answer(404, b"no such file")

    def answer(self, status, body, length=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(length or len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="module")
def site():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@contextmanager
def opened(source, flag="--source"):
    with ExitStack() as fetched:
        yield open_source(source, PrepareArgs(Path("out"), source, 0.1), fetched, flag)


@contextmanager
def fetched(source):
    with opened(source) as found:
        yield found.files[0]


def refusal(source):
    with pytest.raises(LitLoraError) as refused, opened(source):
        pass
    return str(refused.value)


def test_address_is_fetched_and_logged(site, capsys):
    url = f"{site}/rows.jsonl"
    with fetched(url) as file, file.open() as content:
        assert (file.name, file.suffix, content.read()) == (url, ".jsonl", ROWS)
    assert capsys.readouterr() == ("", f"fetching {url}\n")


@pytest.mark.parametrize(("name", "first"), [("rows.jsonl.gz", "0"), ("table.parquet", "one")])
def test_fetched_file_is_read_from_the_disk(site, tmp_path, name, first):
    assert main(["prepare_json", "--source", f"{site}/{name}", "--destination_path", str(tmp_path / "out")]) == 0
    examples = read_examples(tmp_path / "out/train.jsonl") + read_examples(tmp_path / "out/val.jsonl")
    assert len(examples) == 10
    assert first in {example.turns[0].instruction for example in examples}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_query_of_an_address_is_never_printed_or_written(site, tmp_path, capsys):
    for source in ("rows.jsonl?token=secret", "missing.jsonl?token=secret", "page.jsonl?a=b&token=secret#secret",
                   "x?token= secret", "cut.jsonl?token=secret"):  # fmt: skip
        main(["prepare_json", "--source", f"{site}/{source}", "--destination_path", str(tmp_path / "data")])
    assert main(["prepare_json", "--source", "ftp://host/rows.jsonl?token=secret", "--destination_path", "x"]) == 1
    said = capsys.readouterr()
    assert f"fetching {site}/rows.jsonl?...\n" in said.err
    assert "secret" not in said.out + said.err
    written = (tmp_path / "data/dataset.json").read_text(encoding="utf-8")
    assert f'"source": "{site}/rows.jsonl?..."' in written


@pytest.mark.parametrize("address", ["https://me:secret@host/rows.jsonl", "HTTP://secret@host/rows.jsonl?a=b"])
def test_password_in_an_address_is_refused_and_not_printed(address):
    assert refusal(address) == (
        "--source contains a user name or password, which would be written to dataset.json: "
        "download the file yourself and give its path"
    )


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("missing.jsonl", "cannot be fetched: the server returned 404 Not Found"),
        ("cut.jsonl", f"cannot be fetched: the transfer ended after {len(ROWS)} bytes; try again"),
        ("page.jsonl", "is a web page, not data; give --source the address of the raw file"),
    ],
)
def test_incomplete_response_is_refused(site, path, problem):
    assert refusal(f"{site}/{path}") == f"{site}/{path} {problem}"


def test_redirect_to_a_local_file_is_not_followed(site):
    assert "cannot be fetched: the server returned 302" in refusal(f"{site}/elsewhere.jsonl")


def test_silent_server_times_out(site, monkeypatch):
    monkeypatch.setattr(sources, "TIMEOUT_SECONDS", 0.1)
    assert refusal(f"{site}/stalls.jsonl") == f"{site}/stalls.jsonl cannot be fetched: timed out"


def test_unreachable_server_is_refused():
    url = "http://127.0.0.1:9/rows.jsonl"
    assert refusal(url).startswith(f"{url} cannot be fetched: [Errno ")


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:port/a.json", "https:///a.json", "http://a b/c"])
def test_malformed_address_is_refused(url):
    assert refusal(url).startswith(f"{url} cannot be fetched: ")


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/rows.json"])
def test_only_http_is_fetched(url):
    assert refusal(url) == f"--source ({url}) must be a file or an address that starts with http:// or https://"


def test_local_file_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert (
        refusal(str(path))
        == f"there is no file {path}; give --source a file, an http(s) address, or ORG/NAME of the Hub"
    )
    path.write_bytes(ROWS)
    with fetched(str(path)) as file, file.open() as content:
        assert (file.name, file.suffix, content.read()) == (str(path), ".jsonl", ROWS)


@pytest.mark.parametrize("flag", ["--source", "--val_source"])
def test_folder_is_refused(flag, tmp_path):
    with pytest.raises(LitLoraError) as refused, opened(str(tmp_path), flag):
        pass
    assert str(refused.value) == f"{flag} ({tmp_path}) is a folder: give it one of its files"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("rows.jsonl", ("rows.jsonl", None)),
        ("rows.jsonl=0.7", ("rows.jsonl", 0.7)),
        ("my/data=2", ("my/data", 2)),
        ("a=b.jsonl=.5", ("a=b.jsonl", 0.5)),
        ("rows=1.jsonl", ("rows=1.jsonl", None)),
        ("https://host/rows.jsonl=3", ("https://host/rows.jsonl", 3)),
        ("https://host/rows.jsonl?version=3", ("https://host/rows.jsonl?version=3", None)),
        ("there=1", ("there=1", None)),
    ],
)
def test_weight_is_parted_from_a_source(source, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there=1").touch()
    assert split_weight(source) == expected


def test_mixture_depends_on_the_seed_only():
    first, again, other = ([rows.tolist() for rows in mix([100, 50], [1, 1], seed)] for seed in (1, 1, 2))
    assert first == again != other
    assert [rows.tolist() for rows in mix([3, 2], [None, None], 1)] == [[0, 1, 2], [0, 1]]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with reachable_hub(monkeypatch, tmp_path) as server:
        yield server


def prepared(tmp_path, *flags):
    """Return the questions of a data set of the Hub, and the exit code."""
    out = tmp_path / "out"
    code = main(["prepare_json", "--source", "my/set", "--destination_path", str(out), *flags])
    train, val = out / "train.jsonl", out / "val.jsonl"
    examples = read_examples(train) + read_examples(val) if code == 0 else []
    return sorted({example.turns[0].instruction for example in examples})


def lines(name):
    return "".join(f'{{"question": "{name}", "answer": "{n}"}}\n' for n in range(10)).encode()


def table(name):
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([{"question": name, "answer": str(n)} for n in range(10)]), buffer)
    return buffer.getvalue()


CARD = """---
license: mit
configs:
- config_name: easy
  data_files:
  - {split: train, path: easy/*.jsonl}
  - split: test
    path: [easy-test.csv]
- config_name: hard
  default: true
  data_files: hard/part*.jsonl
---
Some data.
"""
CARDED = {
    "README.md": CARD.encode(), "easy/1.jsonl": lines("easy 1"), "easy/2.jsonl": lines("easy 2"),
    "easy-test.csv": b"question,answer\n" + b"easy test,1\n" * 10, "hard/part1.jsonl": lines("hard"),
    "hard/other.jsonl": lines("other"),
}  # fmt: skip
NAMED = {
    "README.md": b"text", "data/train-00000-of-00002.parquet": table("one"),
    "data/train-00001-of-00002.parquet": table("two"), "data/test-00000-of-00001.parquet": table("test"),
    "train.csv": b"question,answer\nsame,1\n", "dataset_infos.json": b"{}",
}  # fmt: skip
PACKED = {
    "train.jsonl.gz": gzip.compress(lines("one")), "more/train.jsonl.gz": gzip.compress(lines("two")),
    "train.csv.gz": gzip.compress(b"question,answer\nsame,1\n"), "images.tar.gz": b"",
}  # fmt: skip
PLAIN = {"questions.jsonl": lines("plain"), "retrain/more.jsonl": lines("more"), "val.jsonl": lines("val")}


@pytest.mark.parametrize(
    ("files", "flags", "expected"),
    [
        (CARDED, [], ["hard"]),
        (CARDED, ["--subset", "easy"], ["easy 1", "easy 2"]),
        (CARDED, ["--subset", "easy", "--split", "test"], ["easy test"]),
        (NAMED, [], ["one", "two"]),
        (NAMED, ["--split", "test"], ["test"]),
        (PACKED, [], ["one", "two"]),
        (PLAIN, [], ["more", "plain"]),
        (PLAIN, ["--split", "val"], ["val"]),
        (PLAIN, ["--subset", "retrain"], ["more"]),
    ],
)
def test_split_of_a_hub_dataset_is_read(hub, tmp_path, files, flags, expected):
    hub.add("datasets/my/set", files)
    assert prepared(tmp_path, *flags) == expected


@pytest.mark.parametrize(
    ("files", "flags", "problem"),
    [
        (CARDED, ["--subset", "huge"], "has no subset huge: choose one with --subset, among easy, hard"),
        (
            {**CARDED, "README.md": CARD.replace("default: true", "").encode()}, [],
            "has several subsets: choose one with --subset, among easy, hard",
        ),
        (
            NAMED, ["--split", "dev"],
            "has no split dev in a format that litlora reads (its files: data/test-00000-of-00001.parquet, "
            "data/train-00000-of-00002.parquet, data/train-00001-of-00002.parquet, train.csv): "
            "choose with --split and --subset, or download a file and give its path",
        ),
        (
            {"load.py": b""}, [],
            "has no split train in a format that litlora reads (its files: load.py): "
            "choose with --split and --subset, or download a file and give its path",
        ),
    ],
)  # fmt: skip
def test_missing_split_of_a_hub_dataset_is_refused(hub, tmp_path, capsys, files, flags, problem):
    hub.add("datasets/my/set", files)
    assert prepared(tmp_path, *flags) == []
    assert capsys.readouterr().err == f"litlora: dataset my/set {problem}\n"


SCRIPT = {"README.md": b"text", "load.py": b"", "data.zip": b"PK"}
CONVERTED = {
    ".gitattributes": b"", "default/train/0000.parquet": table("one"), "default/train/0001.parquet": table("two"),
    "default/test/0000.parquet": table("test"), "hard/partial-train/0000.parquet": table("hard"),
    "default/train/index.duckdb": b"",
}  # fmt: skip
SUBSETS = {"easy/train/0000.parquet": table("easy"), "hard/train/0000.parquet": table("hard")}


@pytest.mark.parametrize(
    ("converted", "flags", "expected"),
    [
        (CONVERTED, [], ["one", "two"]),
        (CONVERTED, ["--split", "test"], ["test"]),
        (CONVERTED, ["--subset", "hard"], ["hard"]),
        (SUBSETS, ["--subset", "easy"], ["easy"]),
    ],
)
def test_conversion_of_the_hub_is_read_where_no_file_can_be(hub, tmp_path, converted, flags, expected, capsys):
    hub.add("datasets/my/set", SCRIPT)
    hub.add("datasets/my/set", converted, "refs/convert/parquet")
    assert prepared(tmp_path, *flags) == expected
    part = ", which has only a part of the split" if expected == ["hard"] else ""
    assert f"dataset my/set: reading the Hub's conversion to Parquet{part}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "flags", "problem"),
    [
        (CONVERTED, ["--split", "dev"], "has no split dev in a format that litlora reads"),
        (SUBSETS, [], "has several subsets: choose one with --subset, among easy, hard"),
    ],
)
def test_missing_split_of_a_conversion_is_refused(hub, tmp_path, files, flags, problem, capsys):
    hub.add("datasets/my/set", SCRIPT)
    hub.add("datasets/my/set", files, "refs/convert/parquet")
    assert prepared(tmp_path, *flags) == []
    assert f"litlora: dataset my/set {problem}" in capsys.readouterr().err


def test_own_files_come_before_their_conversion(hub, tmp_path):
    hub.add("datasets/my/set", PLAIN)
    hub.add("datasets/my/set", CONVERTED, "refs/convert/parquet")
    assert prepared(tmp_path) == ["more", "plain"]


def test_private_hub_dataset_needs_a_token(hub, tmp_path, capsys):
    hub.add("datasets/my/set", PLAIN, private=True)
    hub.grant("hf_welcome", "datasets/my/set")
    assert prepared(tmp_path) == []
    assert "there is no dataset my/set on the Hub, or it is private" in capsys.readouterr().err
    assert prepared(tmp_path, "--access_token", "hf_welcome") == ["more", "plain"]
    assert "hf_welcome" not in (tmp_path / "out/dataset.json").read_text()

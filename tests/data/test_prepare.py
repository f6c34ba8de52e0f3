import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from litlora.__main__ import main
from litlora.args import PrepareArgs
from litlora.data import prepare as preparing
from litlora.data.dataset import read_examples
from litlora.data.prepare import fetch, prepare
from litlora.data.readers import RawFile
from litlora.data.row_formats import ANY
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


def refusal(source):
    with pytest.raises(LitLoraError) as refused:
        fetch(source)
    return str(refused.value)


def test_address_is_fetched_and_logged(site, capsys):
    url = f"{site}/rows.jsonl"
    file = fetch(url)
    assert (file.name, file.suffix, file.open().read()) == (url, ".jsonl", ROWS)
    assert capsys.readouterr() == ("", f"fetching {url}\n")


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
    monkeypatch.setattr(preparing, "TIMEOUT_SECONDS", 0.1)
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
    assert refusal(str(path)) == f"there is no file {path}; give --source a file or an http(s) address"
    path.write_bytes(ROWS)
    file = fetch(str(path))
    with file.open() as opened:
        assert (file.name, file.suffix, opened.read()) == (str(path), ".jsonl", ROWS)


@pytest.fixture
def prepared(tmp_path):
    def prepared(content, fraction=0.2, seed=42):
        args = PrepareArgs(tmp_path / "out", "somewhere/rows.jsonl", fraction, seed)
        prepare(args, RawFile.from_bytes(args.source, ".jsonl", content), ANY)
        return tmp_path / "out"

    return prepared


def test_prepared_data_has_every_row_and_its_origin(prepared, capsys):
    out = prepared(ROWS)
    train, val = read_examples(out / "train.jsonl"), read_examples(out / "val.jsonl")
    assert sorted(int(example.turns[0].instruction) for example in train + val) == list(range(10))
    assert json.loads((out / "dataset.json").read_bytes()) == {
        "source": "somewhere/rows.jsonl",
        "sha256": hashlib.sha256(ROWS).hexdigest(),
        "rows": 10,
        "train": 8,
        "val": 2,
        "val_split_fraction": 0.2,
        "seed": 42,
    }
    assert sorted(path.name for path in out.iterdir()) == ["dataset.json", "train.jsonl", "val.jsonl"]
    assert capsys.readouterr() == ("", f"8 training and 2 validation examples in {out}\n")


def test_seed_selects_validation_rows(prepared):
    kept = {seed: read_examples(prepared(ROWS, seed=seed) / "val.jsonl") for seed in (1, 2)}
    assert kept[1] != kept[2]
    assert read_examples(prepared(ROWS, seed=1) / "val.jsonl") == kept[1]


EMPTY = b'{"prompt": "a", "completion": ""}\n'
UNANSWERED = (
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},'
    b' {"role": "user", "content": "c"}]}\n'
)


def test_empty_outputs_are_reported(prepared, capsys):
    out = prepared(ROWS + EMPTY + ROWS + EMPTY)
    assert capsys.readouterr().err.splitlines() == [
        "2 rows with an empty output, the first at somewhere/rows.jsonl line 11: it teaches the model to stop at once",
        f"18 training and 4 validation examples in {out}",
    ]


def test_unanswered_messages_are_reported(prepared, capsys):
    out = prepared(UNANSWERED + ROWS)
    assert capsys.readouterr().err.splitlines() == [
        "1 row ending in a user message without a response, the first at somewhere/rows.jsonl line 1: "
        "that message is left out",
        f"9 training and 2 validation examples in {out}",
    ]


def test_nothing_is_written_if_a_row_is_invalid(prepared, tmp_path):
    with pytest.raises(LitLoraError, match="line 11: "):
        prepared(ROWS + b"nonsense")
    with pytest.raises(LitLoraError, match="leaves no row for validation"):
        prepared(ROWS, fraction=0.01)
    assert list(tmp_path.iterdir()) == []


def test_destination_that_is_a_file_is_refused(prepared, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(LitLoraError) as refused:
        prepared(ROWS)
    assert str(refused.value) == f"cannot write {tmp_path / 'out'}: File exists"
    assert (tmp_path / "out").read_text() == "mine"

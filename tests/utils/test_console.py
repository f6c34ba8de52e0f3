import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from litlora.__main__ import main
from litlora.errors import LitLoraError, OutputClosedError
from litlora.utils.console import log, log_error, output, printable, read_input, write


def test_messages_go_to_stderr_and_results_to_stdout(capsys):
    log("loading")
    output("done")
    assert capsys.readouterr() == ("done\n", "loading\n")


def test_lines_of_a_message_stay_lines_and_those_of_an_error_do_not(capsys):
    log("one\ntwo")
    log_error("one\ntwo")
    assert capsys.readouterr().err == "one\ntwo\nlitlora: one\\ntwo\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("\x1b[2J", "\\x1b[2J"), ("a\rb", "a\\rb"), ("\u202e", "\\u202e"), ("\ud800", "\\ud800"), ("é 🚪", "é 🚪"),
     ("می\u200cخواهم", "می\u200cخواهم"), ("👩\u200d🚀", "👩\u200d🚀")],
    ids=ascii,
)  # fmt: skip
def test_control_characters_are_escaped_and_letters_are_not(text, expected):
    assert printable(text) == expected


def test_an_error_quotes_no_hub_token(capsys):
    log_error("--config hf_aBcDeFgHiJkLmN cannot be read")
    assert capsys.readouterr().err == "litlora: --config hf_... cannot be read\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf_oauth.eyJ-x_y.z a", "hf_... a"),
        ("api_org_abcdefgh", "api_org_..."),
        ("https://user:p@s%2Fs@host/x@y", "https://...@host/x@y"),
        ("no secret@host, hf_hub and //x", "no secret@host, hf_hub and //x"),
        ("it is s3cret-token-of-a-proxy", "it is ..."),
    ],
)
def test_no_message_quotes_a_token_or_password(text, expected, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "s3cret-token-of-a-proxy")
    log(text)
    assert capsys.readouterr().err == f"{expected}\n"


@contextmanager
def unread(name: str) -> Iterator[None]:
    """Make a standard stream a pipe that nobody reads; pytest replaces the streams after the fixtures."""
    read, written = os.pipe()
    os.close(read)
    with os.fdopen(written, "w", buffering=1) as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, name, stream)
        yield


def test_a_pipe_that_nobody_reads_ends_the_command_quietly(capsys, tiny):
    with unread("stdout"):
        with pytest.raises(OutputClosedError):
            write("a part")
        write("the rest goes nowhere")
    with unread("stdout"):
        assert main(["generate", str(tiny), "--prompt", "x", "--max_new_tokens", "2"]) == 141
    assert capsys.readouterr() == ("", "")


def test_a_message_that_nobody_reads_ends_no_run():
    with unread("stderr"):
        log("loading")
        log("saving")


def test_a_full_disk_behind_stdout_is_one_sentence(monkeypatch):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(LitLoraError, match=r"^standard output cannot be written: No space left on device$"):
            output("done")


def test_input_in_another_encoding_is_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    with pytest.raises(LitLoraError, match=r"^standard input is not valid utf-8: "):
        read_input()


@pytest.mark.parametrize(
    ("redirection", "code", "sentence"),
    [
        ("<&-", 1, "litlora: the prompt is empty: give one with --prompt or on standard input"),
        ("</dev/null >&-", 1, "litlora: the prompt is empty: give one with --prompt or on standard input"),
        ("</dev/null 2>&-", 1, ""),
        ("--print_config >/dev/full", 1, "litlora: standard output cannot be written: No space left on device"),
        ("--print_config >&-", 1, "litlora: standard output cannot be written: Bad file descriptor"),
        ("--print_config --prompt_style \U0001f6aa", 0, ""),
        ("--print_config 2>&-", 0, ""),
        ("--print_config | head -c 1", 0, ""),
    ],
)
def test_streams_that_are_closed_full_or_narrow(redirection, code, sentence, tiny):
    """Closed streams, a full disk behind one, or one in ASCII end in a sentence at most, and never in a traceback."""
    command = f"set -o pipefail; {sys.executable} -m litlora generate {tiny} {redirection}"
    env = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env)
    assert "Traceback" not in done.stderr
    assert (done.returncode, (done.stderr.splitlines() or [""])[-1]) == (code, sentence)


def test_removed_working_directory_is_one_sentence(tiny, tmp_path):
    command = f"mkdir gone; cd gone; rmdir ../gone; {sys.executable} -m litlora generate {tiny} --prompt x"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    sentence = "litlora: the working directory cannot be read (No such file or directory): change to another\n"
    assert (done.returncode, done.stderr) == (1, sentence)

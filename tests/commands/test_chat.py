"""chat in a terminal: prompt_toolkit reads the lines, and Ctrl-C stops an answer alone."""

import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.families import Family
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from transformers import LlamaConfig

from litlora.args.inference import ChatArgs
from litlora.commands.chat import HELP, chat, shown
from litlora.generation.llm import LLM
from litlora.generation.model_files import ModelFiles

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PROMPT_SHOWN, PROMPT_ENDED = "\x1b[?2004h", "\x1b[?2004l"  # prompt_toolkit asks for pasted text as such, or no more
GREEDY = {"temperature": 0.0, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def base(make_checkpoint) -> Path:
    """Return a checkpoint with a chat template and a context that takes minutes to fill."""
    folder = make_checkpoint(Family("chat", LlamaConfig, {"max_position_embeddings": 30_000}))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def talk(base: Path, *lines: str, **settings: object) -> None:
    args = ChatArgs(base, precision="32-true", **GREEDY | settings)
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        typed.send_text("".join(f"{line}\r" for line in (*lines, "/quit")))
        chat(args, ModelFiles.find(args))


def test_commands_of_a_conversation(base, tmp_path, capsys):
    saved = tmp_path / "saved.jsonl"
    talk(base, "Hi", "", "/reset", "/system Be brief.", "Say hello", "/etc/hosts is what?", f"/save {saved}", "/help")
    printed = capsys.readouterr()
    (line,) = saved.read_text(encoding="utf-8").splitlines()
    system, *said = json.loads(line)["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert [message["content"] for message in said[::2]] == ["Say hello", "/etc/hosts is what?"]
    llm = LLM.load(base, precision="32-true")
    answers = [llm.chat([system, *said[:n]], **GREEDY) for n in (1, 3)]
    assert [message["content"] for message in said[1::2]] == answers
    first = llm.chat([{"role": "user", "content": "Hi"}], **GREEDY)
    assert printed.out == "".join(f"{shown(text)}\n" for text in (first, *answers))
    expected = ["the conversation starts anew", "the system message is set", f"conversation in {saved}", HELP]
    assert printed.err.endswith("\n".join([*expected, ""]))


def test_mistakes_do_not_end_the_conversation(base, tmp_path, capsys):
    (tmp_path / "there").touch()
    talk(base, "/save", "/save x", "/rest", "Hi", f"/save {tmp_path / 'there'}", "/system")
    sentences = [
        "litlora: /save needs the name of a file",
        "litlora: there is nothing to save yet",
        "litlora: there is no /rest: /help lists the commands",
        f"litlora: /save ({tmp_path / 'there'}) is there already: choose another, or remove it",
        "there is no system message",
    ]
    assert capsys.readouterr().err.splitlines()[-5:] == sentences


class Impatient(io.StringIO):
    """A terminal at which somebody presses Ctrl-C as soon as an answer begins."""

    def write(self, text: str) -> int:
        if text != "\n":
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_stops_an_answer_and_not_the_program(base, tmp_path, monkeypatch):
    output = Impatient()
    monkeypatch.setattr(sys, "stdout", output)
    talk(base, "Hi", f"/save {tmp_path / 'saved'}", max_new_tokens=25_000)
    messages = json.loads((tmp_path / "saved").read_text(encoding="utf-8"))["messages"]
    assert output.getvalue() == shown(messages[1]["content"]) + "\n"
    assert len(messages[1]["content"]) < 100


def test_keys_of_a_terminal(base, tmp_path):
    """Ctrl-C stops an answer, Ctrl-D ends the program."""
    python = shutil.which(sys.executable)
    command = [python, "-m", "litlora", "chat", str(base), "--max_new_tokens", "25000", "--precision", "32-true"]
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1"}
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    program = subprocess.Popen(command, **streams, env=env, preexec_fn=lambda: take_terminal(theirs))
    os.close(theirs)
    read_until(ours, PROMPT_SHOWN)
    os.write(ours, b"Hi\r")
    begun = read_until(ours, PROMPT_ENDED).partition(PROMPT_ENDED)[2]
    while not re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", begun).strip():
        begun += read_until(ours, "")
    os.write(ours, b"\x03")
    read_until(ours, PROMPT_SHOWN)
    os.write(ours, f"/save {tmp_path / 'saved'}\r".encode())
    read_until(ours, PROMPT_SHOWN)
    os.write(ours, b"\x04")
    assert program.wait() == 0
    os.close(ours)
    messages = json.loads((tmp_path / "saved").read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]


def take_terminal(descriptor: int) -> None:
    os.setsid()
    import fcntl
    import termios

    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)


def read_until(descriptor: int, text: str) -> str:
    """Read what a terminal shows until it has a text."""
    shown = os.read(descriptor, 4096).decode(errors="replace")
    while text not in shown:
        shown += os.read(descriptor, 4096).decode(errors="replace")
    return shown

"""Progress is a live display on a terminal, which never wraps, and plain lines elsewhere."""

import errno
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from fcntl import ioctl
from threading import Thread

import pytest

from litlora.utils import progress
from litlora.utils.console import log, quietly, warn
from litlora.utils.progress import clock, task, track

ESCAPES = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")


def seen_on_terminal(columns: int, work: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what a function writes to stderr, where that is a terminal of n columns."""
    controller, terminal = pty.openpty()
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    chunks: list[bytes] = []
    reader = Thread(target=read_all, args=(controller, chunks))
    reader.start()
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    with os.fdopen(terminal, "w", buffering=1, encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        work()
    reader.join()
    os.close(controller)
    return b"".join(chunks).decode()


def read_all(descriptor: int, chunks: list[bytes]) -> None:
    with suppress(OSError):  # EIO where the other end is closed
        while chunk := os.read(descriptor, 1 << 16):
            chunks.append(chunk)


def train() -> None:
    """Do what a run does: steps, and a validation that shows a message."""
    with task("training", 1234, done=1000, is_main=True) as steps:
        steps.advance(11, "loss 1.2345, val 1.6543, 12,345 tokens/s, 103.21 GB")
        for _ in track(range(300), "validation", 300):
            redraw()
        log("step 1011: validation loss 1.6000")
        redraw()


def redraw() -> None:
    """Draw at once, instead of a few times a second."""
    if progress._display._live is not None:
        progress._display._live.refresh()


@pytest.mark.parametrize("columns", [50, 80, 160])
def test_display_fits_the_terminal(columns, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    seen = seen_on_terminal(columns, train, monkeypatch)
    lines = re.split(r"[\r\n]+", ESCAPES.sub("", seen))
    assert max(map(len, lines)) <= columns
    assert any("training" in line and "1,011/1,234" in line and "81 %" in line for line in lines)
    figures = [line for line in lines if "loss 1.2345, val 1.6543, 12,345" in line]
    assert all(("training" in line) == (columns == 160) for line in figures)  # beside the bar where there is room
    assert any("validation" in line and "299/300" in line for line in lines)
    assert "step 1011: validation loss 1.6000" in lines
    assert "\x1b[?25l" not in seen  # the cursor, which a killed process could not bring back
    assert "1,011/1,234" in lines[-2] + lines[-3]  # stays at the end


def test_short_tasks_do_not_flicker(monkeypatch):
    seen = seen_on_terminal(80, lambda: [redraw() for _ in track(range(3), "loading weights", 3)], monkeypatch)
    assert "loading" not in seen


def test_plain_lines_come_now_and_then_and_at_the_end(monkeypatch, capsys):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    with task("training", 2, is_main=True) as steps:
        steps.advance(figures="loss 1.0000")
        steps.advance(figures="loss 0.5000")
    assert [*track([1], "validation", 1)] == [1]
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"training: 1/2 \(50 %\), loss 1.0000, 0:0\d left", first)
    assert re.fullmatch(r"training: 2/2 \(100 %\), loss 0.5000, in 0:0\d", last)


def test_quiet_prints_warnings_only(monkeypatch, capsys):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    with quietly(True), quietly(False):  # a command within one
        train()
        warn("the loss rises")
    log("not quiet any more")
    assert capsys.readouterr().err == "warning: the loss rises\nnot quiet any more\n"
    with quietly(True):
        assert seen_on_terminal(80, train, monkeypatch) == ""


def test_a_terminal_that_is_gone_ends_no_run(monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    controller, terminal = pty.openpty()
    stream = os.fdopen(terminal, "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", stream)
    with task("training", 2, is_main=True) as steps:
        os.close(controller)
        steps.advance(figures="loss 1.0000")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        stream.write("more\n")
    with suppress(OSError):
        stream.close()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3725, "1:02:05")])
def test_times_are_short(seconds, text):
    assert clock(seconds) == text

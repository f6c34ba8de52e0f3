"""The standard streams: messages go to stderr and results to stdout, and no text from a file controls the terminal."""

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from threading import RLock
from typing import TextIO

from litlora.errors import LitLoraError, OutputClosedError

JOINERS = "\u200c\u200d"  # invisible, but part of how Persian, Hindi and emoji are written
HUB_TOKEN = re.compile(r"\b(hf|api_org)_[\w.-]{8,}")
PASSWORD = re.compile(r"(?<=://)[^/\s]*@")  # and user, of an address
SHORTEST_TOKEN = 8  # characters, below which a text may be part of others by chance
PANIC = re.compile(rb"\n?thread '[^\n]*panicked at .*", re.DOTALL)  # of Rust; those of other threads mix with it
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_capture = RLock()
_settings = {"quiet": False}  # of the command that runs


def open_streams() -> None:
    """Make the standard streams usable, whatever the caller has left of them.

    The descriptor of a closed one would be given to the next file, which would then get what libraries print.
    """
    while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass
    os.close(descriptor)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


@contextmanager
def quietly(quiet: bool) -> Iterator[None]:
    """Print warnings and errors only while the block runs, if `quiet`."""
    before = is_quiet()
    _settings["quiet"] = before or quiet
    try:
        yield
    finally:
        _settings["quiet"] = before


def is_quiet() -> bool:
    """Tell whether only warnings and errors are printed."""
    return _settings["quiet"]


def log(message: str) -> None:
    """Print a message, of one or several lines, on stderr, unless --quiet is on."""
    if not is_quiet():
        notice(message)


def warn(sentence: str) -> None:
    """Print a warning on stderr, with --quiet as well."""
    notice(f"warning: {sentence}")


def notice(message: str) -> None:
    """Print a message on stderr, with --quiet as well; one that nobody reads any more ends no run."""
    lines = "\n".join(printable(line) for line in redacted(message).split("\n"))
    try:
        sys.stderr.write(f"{lines}\n")
    except OSError:
        _discard(sys.stderr)


def log_error(sentence: str) -> None:
    """Print what went wrong as one line on stderr."""
    notice(f"litlora: {printable(sentence)}")


def redacted(text: str) -> str:
    """Return a text without the Hub tokens and passwords that it quotes, in whatever form."""
    for token in (os.environ.get(name, "") for name in TOKEN_VARIABLES):
        text = text.replace(token, "...") if len(token) >= SHORTEST_TOKEN else text
    return PASSWORD.sub("...@", HUB_TOKEN.sub(r"\1_...", text))


def output(text: str) -> None:
    """Print a result on stdout."""
    write(f"{text}\n")


def write(text: str) -> None:
    """Write a part of a result to stdout at once; LitLoraError where that fails."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise OutputClosedError from error
        raise LitLoraError(f"standard output cannot be written: {error.strerror}") from error


def is_terminal() -> bool:
    """Tell whether a person can type and read."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def read_input() -> str:
    """Return all of standard input."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        hint = "convert it, or set PYTHONIOENCODING to its encoding"
        raise LitLoraError(f"standard input is not valid {error.encoding}: {hint}") from error


def _discard(stream: TextIO) -> None:
    """Send the rest of a stream nowhere, since Python reports at its end what it cannot flush."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def without_panics() -> Iterator[None]:
    """Keep from stderr what a library in Rust prints of a panic: its exception becomes a sentence of litlora."""
    with _capture, ExitStack() as closing:
        try:
            memory = os.memfd_create("stderr")
            closing.callback(os.close, memory)
            stderr = os.dup(2)
        except (AttributeError, OSError):  # not Linux, or a closed stderr
            yield
            return
        closing.callback(_restore, stderr, memory)
        os.dup2(memory, 2)
        yield


def _restore(stderr: int, memory: int) -> None:
    """Make a descriptor stderr again, and print there what was written in the meantime."""
    os.dup2(stderr, 2)
    os.close(stderr)
    if size := os.fstat(memory).st_size:
        with suppress(OSError):
            os.write(2, PANIC.sub(b"", os.pread(memory, size, 0)))


def printable(line: str) -> str:
    """Escape the characters that would control the terminal or start a new line."""
    return "".join(c if c.isprintable() or c in JOINERS else c.encode("unicode_escape").decode() for c in line)

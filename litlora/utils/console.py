"""Printing: messages go to stderr and results to stdout, and no text from a file controls the terminal."""

import re
import sys

JOINERS = "\u200c\u200d"  # invisible, but part of how Persian, Hindi and emoji are written
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


def log(message: str) -> None:
    """Print a message, of one or several lines, on stderr."""
    lines = "\n".join(printable(line) for line in message.split("\n"))
    sys.stderr.write(f"{lines}\n")


def log_error(sentence: str) -> None:
    """Print what went wrong as one line on stderr, without any Hub token that it quotes."""
    log(f"litlora: {printable(HUB_TOKEN.sub('hf_...', sentence))}")


def output(text: str) -> None:
    """Print a result on stdout."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def printable(line: str) -> str:
    """Escape the characters that would control the terminal or start a new line."""
    return "".join(c if c.isprintable() or c in JOINERS else c.encode("unicode_escape").decode() for c in line)

"""How far a command is: on a terminal a live display with a line for each running task, elsewhere plain lines.

Tasks may nest: the validation of a run has its line below that of the steps. A thread draws a few times a second;
`advance` only counts.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType, RenderResult
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from litlora.utils.console import is_quiet, log

T = TypeVar("T")
REFRESHES = 4  # of the display, a second
DELAY = 0.5  # seconds after which a task is shown: a short one would only flicker
INTERVAL = 10.0  # seconds between the plain lines of a task
WIDE = 120  # columns from which figures stand beside the bar instead of below it
NUMBER = r"\d+(?:[.,]\d+)*"
GAP = "  "
BAR = 40  # columns of the widest bar


@dataclass
class Task:
    """Something that takes its time, and how far it is."""

    name: str
    total: float
    """0 where it is not known."""
    unit: str = ""
    """B for bytes, else nothing."""
    is_main: bool = False
    """Whether its last state stays on the screen."""
    done: float = 0
    figures: str = ""
    """What it has measured last, such as the loss of a step."""
    started: float = field(default_factory=time.monotonic)
    printed: float = field(default_factory=time.monotonic)
    """When its last plain line was printed."""
    is_over: bool = False

    def __post_init__(self) -> None:
        self._before = self.done

    def advance(self, amount: float = 1, figures: str = "") -> None:
        """Count what is done, and note what was measured."""
        self.done += amount
        self.figures = figures or self.figures
        is_due = time.monotonic() - self.printed >= INTERVAL and not (self.total and self.done >= self.total)
        if is_due and not _display.is_live:
            self.print()

    def print(self) -> None:
        """Print the present state as a plain line."""
        self.printed = time.monotonic()
        if not is_quiet():
            log(f"{self.name}: " + ", ".join(filter(None, [self._position, self.figures, self.time])))

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def count(self) -> str:
        """What is done, of how much."""
        if not self.total:
            return ""
        done, total = (decimal(int(x)) if self.unit == "B" else f"{x:,.0f}" for x in (self.done, self.total))
        return f"{done}/{total}"

    @property
    def percent(self) -> str:
        """The part that is done; never 100 % before the end."""
        return f"{int(100 * min(1, self.done / self.total))} %" if self.total else ""

    @property
    def _position(self) -> str:
        return f"{self.count} ({self.percent})" if self.total else ""

    @property
    def time(self) -> str:
        """The time that is left, if it can be told; the time that it took, once it is over."""
        if self.is_over:
            return f"in {clock(self.elapsed)}"
        own = self.done - self._before
        return f"{clock(self.elapsed / own * max(0, self.total - self.done))} left" if own and self.total else ""


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds, with hours if there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@dataclass(frozen=True)
class Lines:
    """Tasks as rich renders them: a line for each, and on a narrow terminal another below it for its figures."""

    tasks: Sequence[Task]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        is_wide = options.max_width >= WIDE
        cells = [(task.name, task.count, task.percent, task.time) for task in self.tasks]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        room = options.max_width - sum(widths) - len(widths) * len(GAP)
        for task, (name, *rest) in zip(self.tasks, cells, strict=True):
            bar = ProgressBar(task.total or None, task.done, width=max(4, min(BAR, room)), pulse=not task.total,
                              complete_style="cyan", finished_style="green", pulse_style="cyan")  # fmt: skip
            words = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
            figures = _shown(task.figures)
            row: list[RenderableType] = [Text(name.ljust(widths[0]), "bold"), bar, Text(GAP.join(words))]
            row += [figures] if is_wide else []
            table = Table.grid(padding=(0, len(GAP), 0, 0), pad_edge=False)
            for _ in row:
                table.add_column(no_wrap=True, overflow="ellipsis")
            table.add_row(*row)
            yield table
            if task.figures and not is_wide:
                yield Text(GAP, no_wrap=True, overflow="ellipsis").append_text(figures)


def _shown(figures: str) -> Text:
    text = Text(figures, "dim", no_wrap=True, overflow="ellipsis")
    text.highlight_regex(NUMBER, "not dim bold")
    return text


class _Console(Console):
    """A console that leaves the cursor visible, since a process that is killed could not bring it back."""

    @property  # type: ignore[misc]  # which nobody sets
    def size(self) -> ConsoleDimensions:
        """The size of the terminal that is written to, and not of that of another stream."""
        with suppress(OSError):
            size = os.get_terminal_size(self.file.fileno())
            if size.columns and size.lines:
                return ConsoleDimensions(*size)
        return ConsoleDimensions(80, 24)

    def show_cursor(self, show: bool = True) -> bool:
        return False


class Display:
    """The running tasks, and what draws them while there are any."""

    def __init__(self) -> None:
        self._tasks: list[Task] = []
        self._live: Live | None = None

    @property
    def is_live(self) -> bool:
        """Whether tasks are drawn, and need no plain lines."""
        return self._live is not None

    def begin(self, task: Task) -> None:
        """Add a task; the first one starts the display."""
        self._tasks.append(task)
        if self._live is None and is_drawable():
            console = _Console(file=sys.stderr, force_terminal=True, highlight=False)
            live = Live(
                console=console, refresh_per_second=REFRESHES, transient=True, redirect_stdout=False,
                get_renderable=lambda: Lines([each for each in self._tasks if each.elapsed >= DELAY]),
            )  # fmt: skip
            with suppress(OSError):  # a display that nobody sees any more ends no run
                live.start()
                self._live = live

    def end(self, task: Task) -> None:
        """Remove a task; the last one stops the display. The last state of a main one stays."""
        self._tasks.remove(task)
        live, task.is_over = self._live, True
        if live is not None and not self._tasks:
            self._live = None
            with suppress(OSError):
                live.stop()
        if task.is_main and live is None:
            task.print()
        elif task.is_main and live is not None:
            with suppress(OSError):
                live.console.print(Lines([task]))


_display = Display()


def is_drawable() -> bool:
    """Tell whether stderr is a terminal on which lines can be drawn again."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown") and not is_quiet()


@contextmanager
def task(name: str, total: float = 0, unit: str = "", *, done: float = 0, is_main: bool = False) -> Iterator[Task]:
    """Show on stderr how far the block is, of `total`, if that is known."""
    one = Task(name, total, unit, is_main, done)
    _display.begin(one)
    try:
        yield one
    finally:
        _display.end(one)


def track(items: Iterable[T], name: str, total: int) -> Iterator[T]:
    """Yield items, and show on stderr how many of them are done."""
    with task(name, total) as one:
        for item in items:
            yield item
            one.advance()

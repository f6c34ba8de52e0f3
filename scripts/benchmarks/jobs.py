"""What passes between the wrapper and a program's process: a job in, one line of JSON with its result out."""

import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Thread
from typing import Literal

Task = Literal["train", "generate", "convert", "products"]
Precision = Literal["32-true", "bf16-true"]
Layers = Literal["query and value", "all linear layers"]

RANK, ALPHA, DROPOUT = 8, 16, 0.05
LEARNING_RATE = 2e-4  # from the first step to the last, so that the losses of all programs can be compared
MICRO_BATCH_SIZE, GLOBAL_BATCH_SIZE = 4, 16
MAX_SEQ_LENGTH = 512
PROMPT_TOKENS, NEW_TOKENS = 64, 128
CHECKPOINT, DATA, PROMPT = "checkpoint", "data", "prompt.txt"


@dataclass(frozen=True)
class Job:
    """What a program is to do, with what lies ready in a folder."""

    task: Task
    precision: Precision
    folder: str
    rows: int = 0
    layers: Layers = "query and value"
    quantized: bool = False
    """Whether the blocks' weights are in NF4."""
    compiled: bool = False
    devices: int = 1

    @property
    def work(self) -> Path:
        return Path(self.folder)

    @property
    def checkpoint(self) -> Path:
        return self.work / CHECKPOINT

    @property
    def data(self) -> Path:
        """Return the folder with train.jsonl and val.jsonl, in litlora's shape."""
        return self.work / DATA

    @property
    def text(self) -> str:
        """Return the text of which the first tokens are the prompt."""
        return (self.work / PROMPT).read_text(encoding="utf-8")

    @property
    def global_batch_size(self) -> int:
        """Return the rows of a step: fewer where the rows do not fill whole global batches."""
        return MICRO_BATCH_SIZE if self.rows % GLOBAL_BATCH_SIZE else GLOBAL_BATCH_SIZE

    @property
    def steps(self) -> int:
        return self.rows // self.global_batch_size


@dataclass(frozen=True)
class Result:
    """What a program did, and in which time."""

    seconds: float
    """Of the training loop, or of one generation; never of start-up."""
    tokens: int
    """Real ones: no padding, and no last token of a row, which is only ever a label."""
    memory_gb: float
    versions: dict[str, str]
    supervised: int = 0
    losses: list[float] = field(default_factory=list)
    """Of each step, as means over its supervised tokens."""
    ids: list[int] = field(default_factory=list)
    """The prompt and what was generated."""
    compile_seconds: float = 0.0
    """Before the first token, not among the seconds above."""


@dataclass(frozen=True)
class Products:
    """The best rate of matrix products on this machine, and what a model needs of them."""

    rate: float
    """Floating-point operations per second."""
    block_parameters: int
    head_parameters: int

    def limit(self, tokens: int, supervised: int) -> float:
        """Return the seconds below which training cannot go: forward, and the gradient of what went in."""
        return 4 * (self.block_parameters * tokens + self.head_parameters * supervised) / self.rate


def serve(tasks: Mapping[Task, Callable[[Job], Result | Products | None]]) -> None:
    """Do the job that the command line names, and print its result as the last line."""
    job = Job(**json.loads(sys.argv[1]))
    result = tasks[job.task](job)
    print(json.dumps(result and asdict(result)))


def peak_memory_gb() -> float:
    """Return the most memory, in 10^9 bytes, that was resident in this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


@contextmanager
def peak_of_children(interval: float = 0.5) -> Iterator[list[float]]:
    """Give a list whose number becomes the most memory, in 10^9 bytes, that processes started inside have had together.

    What several of them share counts once. It is looked up now and then, since no system keeps the peak of a sum.
    """
    peak, done = [0.0], Event()

    def watch() -> None:
        while not done.wait(interval):
            peak[0] = max(peak[0], sum(map(proportional_gb, multiprocessing.active_children())))

    thread = Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def proportional_gb(process: BaseProcess) -> float:
    """Return the memory of a process in 10^9 bytes, of which it has a share of what others have as well."""
    try:
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="utf-8")
    except OSError:  # it has just ended
        return 0.0
    return int(rollup.split("\nPss:")[1].split()[0]) * 1024 / 1e9 if rollup else 0.0


def versions(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in packages}

"""What passes between the benchmark and a program's process: a job in, its result out as one line of JSON."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

Task = Literal["train", "generate", "convert", "products"]
Precision = Literal["32-true", "bf16-true"]
Layers = Literal["query and value", "all linear layers"]
Device = Literal["cpu", "cuda"]

RANK, ALPHA, DROPOUT = 8, 16, 0.05
LEARNING_RATE = 2e-4  # constant, so that the losses of all programs are comparable
MICRO_BATCH_SIZE, GLOBAL_BATCH_SIZE = 4, 16
MAX_SEQ_LENGTH = 512
PROMPT_TOKENS, NEW_TOKENS = 64, 128
CHECKPOINT, DATA, PROMPT = "checkpoint", "data", "prompt.txt"


@dataclass(frozen=True)
class Job:
    """The task of a program, with its inputs in a folder."""

    task: Task
    precision: Precision
    folder: str
    rows: int = 0
    layers: Layers = "query and value"
    quantized: bool = False
    """Whether the base is in NF4."""
    compiled: bool = False
    device: Device = "cpu"

    @property
    def work(self) -> Path:
        return Path(self.folder)

    @property
    def checkpoint(self) -> Path:
        return self.work / CHECKPOINT

    @property
    def data(self) -> Path:
        """Return the folder with train.jsonl and val.jsonl."""
        return self.work / DATA

    @property
    def text(self) -> str:
        """Return the text whose first tokens are the prompt."""
        return (self.work / PROMPT).read_text(encoding="utf-8")

    @property
    def global_batch_size(self) -> int:
        """Return the rows of a step: one micro-batch if the rows are not a multiple of the global batch."""
        return MICRO_BATCH_SIZE if self.rows % GLOBAL_BATCH_SIZE else GLOBAL_BATCH_SIZE

    @property
    def steps(self) -> int:
        return self.rows // self.global_batch_size


@dataclass(frozen=True)
class Result:
    """What a program computed, and its time."""

    seconds: float
    """Of the training loop, or of one generation, without start-up."""
    tokens: int
    """Without padding and without the last token of a row, which is only ever a label."""
    memory_gb: float
    versions: dict[str, str]
    supervised: int = 0
    losses: list[float] = field(default_factory=list)
    """The mean over the supervised tokens of each step."""
    ids: list[int] = field(default_factory=list)
    """The token ids of prompt and completion."""
    compile_seconds: float = 0.0
    """Before the first token, not included in `seconds`."""


@dataclass(frozen=True)
class Products:
    """The best matmul rate of this machine, and the matmul parameters of a model."""

    rate: float
    """Floating-point operations per second."""
    block_parameters: int
    head_parameters: int

    def limit(self, tokens: int, supervised: int) -> float:
        """Return a lower bound of the training time: the forward pass and the gradients of the inputs."""
        return 4 * (self.block_parameters * tokens + self.head_parameters * supervised) / self.rate


def serve(tasks: Mapping[Task, Callable[[Job], Result | Products | None]]) -> None:
    """Run the job of the command line, and print its result as the last line."""
    job = Job(**json.loads(sys.argv[1]))
    result = tasks[job.task](job)
    print(json.dumps(result and asdict(result)))


def versions(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in packages}

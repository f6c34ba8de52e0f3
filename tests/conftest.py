"""Tiny random checkpoints of every supported kind, made by transformers, and the command line as a user has it."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from getpass import getuser
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from helpers.copies import edit_each, edit_json
from helpers.families import FAMILIES, Family
from helpers.runs import QUERY_VALUE
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

from litlora.__main__ import main

QUIET = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile(
    "few", max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=QUIET
)
settings.register_profile("thorough", settings.get_profile("few"), max_examples=1000, derandomize=False)
settings.load_profile("few")
# A shell has its background jobs ignore this signal, and they would have what they start ignore it as well.
signal.signal(signal.SIGINT, signal.default_int_handler)
PICO = Path(__file__).parent.parent / "checkpoints" / "pico"
ROWS = [
    {"instruction": "Name a fruit that is green.", "input": "", "output": "A pear is green, and so is a lime."},
    {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"},
    {"instruction": "Say hello in three ways.", "input": "", "output": "hello\nhi\ngood morning to you all"},
    {"instruction": "Which is heavier?", "input": "a feather or a stone", "output": "The stone."},
    {"instruction": "Close the door.", "input": "", "output": "Done 🚪"},
]  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs of this machine where no test is for one: a command takes the GPU that it sees."""
    if "not gpu" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(inductor_cache())  # which an import of torch has set already


def inductor_cache() -> Path:
    """Return a folder for code that inductor compiles for this CPU, as the environment limits its instruction sets.

    Inductor would also take what another setting or machine has left in its own folder, and the processes of one run of
    the tests should compile once.
    """
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else platform.processor()
    flags = [line for line in cpu.splitlines() if line.startswith("flags")][:1]
    limits = [torch.__version__, torch.backends.cpu.get_cpu_capability(), os.environ.get("ONEDNN_MAX_CPU_ISA"), *flags]
    key = sha256(repr(limits).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"litlora-inductor-{getuser()}-{key}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the slow tests: at the end, other processes would have nothing to do beside them."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small byte-level BPE tokenizer, as a Hub checkpoint has it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(row.values()) for row in ROWS], trainer)
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: Path) -> Callable[..., Path]:
    """Return a function that has transformers write a random checkpoint of a family, its tokenizer included."""

    def make(family: Family, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB") -> Path:
        folder = tmp_path_factory.mktemp(family.name)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(family.config(), dtype=dtype)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):  # which transformers sets to zero
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        for path in tokenizer_files.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    return make


@pytest.fixture(scope="session")
def checkpoints(make_checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that gives the random checkpoint of a family by its name, in float32 or another dtype."""

    def make(name: str, dtype: torch.dtype = torch.float32) -> Path:
        return make_checkpoint(next(family for family in FAMILIES if family.name == name), dtype)

    return cache(make)


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint that ships, in float32, so that what is stored is not rounded."""
    folder = Path(shutil.copytree(PICO, tmp_path_factory.mktemp("pico") / "pico"))
    edit_each(folder / "model.safetensors", torch.Tensor.float)
    edit_json(folder / "config.json", torch_dtype="float32")
    return folder


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return each device in turn that must give the same numbers."""
    return torch.device(request.param)


@pytest.fixture(scope="session", params=[*(family.name for family in FAMILIES), "pico"])
def checkpoint(request: pytest.FixtureRequest, checkpoints: Callable[[str], Path], pico: Path) -> Path:
    """Return a random checkpoint of each family in turn, and the trained one that ships."""
    return pico if request.param == "pico" else checkpoints(request.param)


@pytest.fixture(scope="session")
def tiny(checkpoints: Callable[[str], Path]) -> Path:
    """Return one random checkpoint, for what does not depend on the family."""
    return checkpoints("llama")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return prepared data of a few rows of very different lengths."""
    folder = tmp_path_factory.mktemp("data")
    for split, rows in {"train": ROWS * 3, "val": ROWS[:3]}.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def adapter(tiny: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an adapter on the one checkpoint, trained for a few steps."""
    out_dir = tmp_path_factory.mktemp("adapter") / "run"
    folders = ["--checkpoint_dir", tiny, "--data_dir", data_dir, "--out_dir", out_dir]
    flags = ["--precision", "32-true", "--train.max_steps", 5, "--train.global_batch_size", 5, "--train.epochs", 3]
    assert main(["finetune_lora", *map(str, folders + flags), *QUERY_VALUE, "--train.learning_rate", "1e-2"]) == 0
    return out_dir / "final"


class Runs:
    """Runs one command at a time in children of a process that has torch in memory already."""

    def __init__(self, scratch: Path, **variables: str) -> None:
        self.stderr = scratch / "stderr"
        command = [sys.executable, "-m", "tests.helpers.fork_server"]
        root = Path(__file__).parent.parent
        # What is freed goes back to the system, so that a limit on memory is felt at the next step.
        env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"} | variables
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env=env
        )
        self.running: list[int] = []

    def start(self, arguments: list[str], headroom: int | None = None) -> int:
        """Start a command, and return its process id."""
        return self.start_all(arguments, [{}], headroom)[0]

    def start_all(
        self, arguments: list[str], places: Sequence[dict[str, str]], headroom: int | None = None
    ) -> list[int]:
        """Start a command in a process for each of these environments, and return their ids."""
        self.end()
        self.server.stdin.write(json.dumps([arguments, str(self.stderr), headroom, places]) + "\n")
        self.server.stdin.flush()
        self.running = self._read()
        return self.running

    def wait(self) -> int:
        """Return the exit code of the one process."""
        return self.wait_all()[0]

    def wait_all(self) -> list[int]:
        """Return the exit codes of all processes."""
        codes, self.running = self._read(), []
        return codes

    def end(self) -> None:
        """Kill what a test that has failed has left running, or the next would wait for it."""
        for process in self.running:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if self.running:
            self.wait_all()

    def close(self) -> None:
        """End the process."""
        self.end()
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()

    def _read(self) -> list[int]:
        return [int(word) for word in self.server.stdout.readline().split()]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Return what runs a command as a process of its own, and soon."""
    runs = Runs(tmp_path_factory.mktemp("runs"))
    yield runs
    runs.close()


@pytest.fixture
def four_threads() -> Iterator[None]:
    """Let torch have four threads for the time of a test, however many cores there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def litlora() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs a command as a user does."""

    def run(*arguments: object, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        command: Sequence[str] = [sys.executable, "-m", "litlora", *map(str, arguments)]
        env = os.environ | {"PYTHONIOENCODING": "utf-8"} | environment
        return subprocess.run(command, input=stdin, capture_output=True, text=True, encoding="utf-8", env=env)

    return run

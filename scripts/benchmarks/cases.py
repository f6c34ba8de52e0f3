"""The cases: which programs run which task. A new case is a new entry of CASES."""

from dataclasses import dataclass

from benchmarks.jobs import Layers, Precision, Task


@dataclass(frozen=True)
class Program:
    """A column of the comparison."""

    name: str
    environment: str
    """The name of its virtual environment and of the module that runs in it."""
    compiled: bool = False


LITLORA = Program("litlora", "litlora")
LITLORA_COMPILED = Program("litlora --compile", "litlora", compiled=True)
PEFT = Program("PEFT + transformers", "peft")
TRANSFORMERS = Program("transformers", "peft")
LITGPT = Program("litgpt", "litgpt")
PRODUCTS = Program("matrix products", "products")


@dataclass(frozen=True)
class Case:
    """One table: the same task in several programs."""

    name: str
    task: Task
    precision: Precision
    programs: tuple[Program, ...]
    layers: Layers = "query and value"
    quantized: bool = False

    @property
    def title(self) -> str:
        number = {"32-true": "float32", "bf16-true": "bfloat16"}[self.precision]
        if self.task == "generate":
            return f"Generation, {number}"
        return f"Training, {number}, LoRA on {self.layers}{' over NF4' if self.quantized else ''}"


TRAINING = (LITLORA, PEFT, LITGPT)
AGAINST_PEFT = (LITLORA, PEFT)
GENERATION = (LITLORA, LITLORA_COMPILED, TRANSFORMERS, LITGPT)
CASES = (
    Case("train-32", "train", "32-true", TRAINING),
    Case("train-bf16", "train", "bf16-true", TRAINING),
    Case("train-all-32", "train", "32-true", AGAINST_PEFT, "all linear layers"),
    Case("train-all-bf16", "train", "bf16-true", AGAINST_PEFT, "all linear layers"),
    Case("train-nf4-32", "train", "32-true", AGAINST_PEFT, quantized=True),
    Case("train-nf4-bf16", "train", "bf16-true", AGAINST_PEFT, quantized=True),
    Case("generate-32", "generate", "32-true", GENERATION),
    Case("generate-bf16", "generate", "bf16-true", GENERATION),
)

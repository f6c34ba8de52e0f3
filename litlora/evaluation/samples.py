"""Sample completions: what a model generates for rows of the validation split, beside what they expect."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from litlora.data.examples import Example
from litlora.data.prompts.styles import PromptStyle
from litlora.data.tokenizer import Tokenizer
from litlora.distributed.process_group import Ranks
from litlora.evaluation.engine import Engine
from litlora.generation.sampler import Sampler
from litlora.generation.session import generate
from litlora.nn.gguf_weight import kept_values
from litlora.utils.progress import track


@dataclass(frozen=True)
class BroadcastSampler(Sampler):
    """Has all ranks take the token that rank 0 samples: with sharded weights, ranks that diverge would wait forever."""

    ranks: Ranks = field(kw_only=True)

    def choose(self, logits: Tensor) -> Tensor:
        """Return rank 0's choice."""
        return self.ranks.broadcast(super().choose(logits))


@dataclass(frozen=True)
class Completion:
    """The greedy completion of a row's first prompt."""

    row: int
    """Of the validation split, counted from 0."""
    system: str
    question: str
    expected: str
    completion: str

    def to_json(self) -> dict[str, Any]:
        """Return it as samples.jsonl holds it."""
        return asdict(self)

    def __str__(self) -> str:
        """Return the lines that are printed."""
        parts = {"  system: ": self.system, "  question: ": self.question, "  expected: ": self.expected}
        named = [f"{name}{_indented(text)}" for name, text in parts.items() if text]
        return "\n".join([*named, f"  -> {_indented(self.completion)}"])


def _indented(text: str) -> str:
    return text.strip().replace("\n", "\n     ")


@dataclass(frozen=True)
class Completer:
    """Completes the prompts of rows."""

    engine: Engine
    tokenizer: Tokenizer
    style: PromptStyle
    max_new_tokens: int
    spare: int = 0
    """Bytes that a completion may take beside the model and its cache."""

    def complete(self, row: int, example: Example) -> Completion:
        """Return the greedy completion of an example's first prompt."""
        turn = example.turns[0]
        prompt = self.style.prompt(turn.instruction, turn.input, example.system)
        ids = self.tokenizer.encode_prompt(self.style, prompt)
        with self.engine.fabric.autocast(), kept_values(self.engine.gpt, self.spare):
            text = "".join(self.tokenizer.stream(ids, self._tokens(ids)))
        question = "\n".join(filter(None, (turn.instruction, turn.input)))
        return Completion(row, example.system, question, turn.output, text)

    def _tokens(self, ids: list[int]) -> Iterator[int]:
        sampler, limit = BroadcastSampler(ranks=self.engine.ranks), self.max_new_tokens
        stop_ids = self.tokenizer.stop_ids_of(self.style)
        tokens = generate(self.engine.gpt, ids, sampler, max_new_tokens=limit, stop_ids=stop_ids)
        return track(tokens, "sample completion", limit)

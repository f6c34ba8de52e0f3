"""Sample completions: what a model generates for an example."""

from dataclasses import dataclass, field

from torch import Tensor

from litlora.data.examples import Example
from litlora.data.prompt_styles import PromptStyle
from litlora.data.tokenizer import Tokenizer
from litlora.distributed.process_group import Ranks
from litlora.evaluation.engine import Engine
from litlora.generation.sampler import Sampler
from litlora.generation.session import generate


@dataclass(frozen=True)
class BroadcastSampler(Sampler):
    """Has all ranks take the token that rank 0 samples: with sharded weights, ranks that diverge would wait forever."""

    ranks: Ranks = field(kw_only=True)

    def choose(self, logits: Tensor) -> Tensor:
        """Return rank 0's choice."""
        return self.ranks.broadcast(super().choose(logits))


def sample_completion(
    engine: Engine, tokenizer: Tokenizer, style: PromptStyle, example: Example, max_new_tokens: int
) -> str:
    """Return the first prompt of an example and its greedy completion, as two lines to print."""
    turn, sampler = example.turns[0], BroadcastSampler(ranks=engine.ranks)
    ids = tokenizer.encode_prompt(style, style.prompt(turn.instruction, turn.input, example.system))
    with engine.fabric.autocast():
        stop_ids = tokenizer.stop_ids_of(style)
        tokens = generate(engine.gpt, ids, sampler, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
        question = " ".join(filter(None, (turn.instruction, turn.input)))
        return f"  {question}\n  -> {''.join(tokenizer.stream(ids, tokens))}"

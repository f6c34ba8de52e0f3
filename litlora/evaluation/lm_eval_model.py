"""litlora's models as a model class of lm-eval, which computes its tasks with them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from litlora.args.inference import GenerateArgs
from litlora.data.tokenizer import Tokenizer
from litlora.errors import LitLoraError
from litlora.evaluation.scoring import load_model
from litlora.evaluation.tasks import Benchmark
from litlora.generation.batch import Request, complete_all
from litlora.generation.sampler import Sampler
from litlora.models.transformer import GPT, evaluating
from litlora.utils.progress import track

MAX_NEW_TOKENS = 256  # where a task does not say, as in lm-eval's own models
PACKED = 4096  # tokens of the requests that are computed at once
Pair = tuple[Any, list[int], list[int]]
"""Its texts, and the tokens of context and continuation."""


def run_tasks(benchmark: Benchmark) -> dict[str, Any]:
    """Run the tasks and return lm-eval's results."""
    subject, args = benchmark.subject, benchmark.subject.args
    model = LitLoraLM(load_model(subject), subject.tokenizer)
    found: dict[str, Any] = simple_evaluate(
        model=model,
        tasks=list(args.tasks),
        task_manager=benchmark.manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        random_seed=args.seed,
    )
    return found


class LitLoraLM(TemplateLM):  # type: ignore[misc]
    """A model with the tokenizer of its checkpoint; texts are tokenized as lm-eval's `hf` model does."""

    def __init__(self, gpt: GPT, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.gpt, self.tokens = gpt, tokenizer

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self.tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self.eot_token_id if self.tokens.bos_id is None else self.tokens.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokenize a text; BOS is not added to one that begins with it."""
        has_bos = bool(self.tokens.bos_token) and string.startswith(str(self.tokens.bos_token))
        return self.tokens.encode(string, not has_bos if add_special_tokens is None else add_special_tokens).ids

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, computed in windows of the context's length."""
        limit, prefix = self.gpt.config.positions, self.prefix_token_id
        windows: list[Pair] = []
        counts = []
        for request in requests:
            pieces = get_rolling_token_windows(self.tok_encode(request.args[0]), prefix, limit, 1)
            windows += [(None, *make_disjoint_window(piece)) for piece in pieces]
            counts.append(len(windows))
        scores = [score for score, _ in self._loglikelihood_tokens(windows)]
        return [sum(scores[start:end]) for start, end in zip([0, *counts], counts, strict=False)]

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[tuple[float, bool]]:
        """Return for each continuation its log-likelihood, and whether it is the greedy completion."""
        found: list[tuple[float, bool]] = []
        with evaluating(self.gpt):
            groups = list(packed(requests, self.gpt.config.positions))
            for group in track(groups, "likelihoods", len(groups)):
                found += self._score(group)
        return found

    def _score(self, group: Sequence[tuple[list[int], int]]) -> Iterator[tuple[float, bool]]:
        """Compute texts, each with the number of its last tokens that are scored, as one packed sequence."""
        device = self.gpt.model.embed_tokens.weight.device
        lengths = [len(ids) - 1 for ids, _ in group]
        tokens = torch.tensor([token for ids, _ in group for token in ids[:-1]], device=device)
        hidden = self.gpt(tokens, lengths).split(lengths)
        for (ids, count), states in zip(group, hidden, strict=True):
            yield self._score_one(states[-count:], torch.tensor(ids[-count:], device=device))

    def _score_one(self, states: Tensor, continuation: Tensor) -> tuple[float, bool]:
        scores = self.gpt.logits(states).float().log_softmax(-1)  # (count, vocab)
        picked = scores.gather(1, continuation[:, None])
        return float(picked.sum()), bool((scores.argmax(-1) == continuation).all())

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the greedy completion of each context, up to the first of its stop texts."""
        questions = [self._question(*request.args) for request in requests]
        own = [Request(each.ids, each.limit, each.ends_with) for each in questions]
        stop_ids, batch_size = self.tokens.stop_ids, GenerateArgs.batch_size
        found = complete_all(self.gpt, own, Sampler(), stop_ids=stop_ids, batch_size=batch_size)
        completions = dict(track(found, "completions", len(requests)))
        texts = ("".join(self.tokens.stream(each.ids, completions[n])) for n, each in enumerate(questions))
        pairs = zip(texts, questions, strict=True)
        return [str(postprocess_generated_text(text, each.stops, None)) for text, each in pairs]

    def _question(self, context: str, settings: Mapping[str, Any]) -> "Question":
        kwargs = normalize_gen_kwargs(dict(settings), MAX_NEW_TOKENS)
        if kwargs.get("do_sample"):
            raise LitLoraError("--tasks: a task asks for sampled completions, and litlora's are greedy: leave it out")
        stops = handle_stop_sequences(kwargs.get("until"), self.tokens.eos_token)
        limit = int(kwargs["max_gen_toks"])
        if limit >= self.gpt.config.positions:
            fault = f"--tasks: a task asks for {limit} new tokens, and the checkpoint has {self.gpt.config.positions}"
            raise LitLoraError(f"{fault} positions: leave it out")
        return Question(self.tokens, self.tok_encode(context)[limit - self.gpt.config.positions :], limit, stops)


@dataclass
class Question:
    """A context to complete, up to the first of some texts."""

    tokenizer: Tokenizer
    ids: list[int]
    limit: int
    stops: list[str]
    completion: list[int] = field(default_factory=list)

    def ends_with(self, token: int) -> bool:
        """Tell whether the completion has a stop text after another token."""
        self.completion.append(token)
        text = "".join(self.tokenizer.stream(self.ids, self.completion))
        return any(stop in text for stop in self.stops)


def packed(requests: Sequence[Pair], positions: int) -> Iterator[list[tuple[list[int], int]]]:
    """Yield groups of requests of about `PACKED` tokens: the last tokens of each, and how many of them are scored."""
    group: list[tuple[list[int], int]] = []
    size = 0
    for _, context, continuation in requests:
        ids = (context + continuation)[-positions - 1 :]
        if group and size + len(ids) > PACKED:
            yield group
            group, size = [], 0
        group.append((ids, min(len(continuation), len(ids) - 1)))
        size += len(ids)
    if group:
        yield group

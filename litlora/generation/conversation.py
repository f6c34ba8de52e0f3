"""A conversation with a model, whose history stays in the KV cache."""

import re
from collections.abc import Generator, Iterator, Sequence

import torch

from litlora.args.inference import Sampling
from litlora.data.examples import Message, assistant
from litlora.data.prompts.rendered import Rendered
from litlora.errors import LitLoraError
from litlora.generation.model_files import ModelFiles
from litlora.generation.sampler import Sampler
from litlora.generation.session import Session, complete
from litlora.models.transformer import GPT, evaluating

THINKING = re.compile(r"<think>\s*\Z")  # a prompt that has opened the block of the answer's reasoning


class Conversation:
    """Messages so far, and the model that answers."""

    def __init__(self, gpt: GPT, files: ModelFiles, sampling: Sampling, system: str = "") -> None:
        self.files, self.style, self.max_new_tokens = files, files.style("chat"), sampling.max_new_tokens
        self.session = Session(gpt, 0)
        self.sampler = Sampler.of(sampling, self.session.device)
        self.system = system
        self.messages: list[Message] = []

    def say(self, text: str) -> Generator[str, None, None]:
        """Yield the answer to a message piece by piece; what was yielded is part of the conversation."""
        question = Message("user", text)
        prompt = self.rendered([*self.messages, question])
        pieces = ["<think>\n"] if THINKING.search(prompt.text) else []
        answer = self.answer(prompt)
        try:
            for piece in answer:
                pieces.append(piece)
                yield piece
        finally:
            self.messages += [question, assistant("".join(pieces))]

    def reset(self) -> None:
        """Forget all messages but the system message."""
        self.messages = []

    @property
    def all_messages(self) -> list[Message]:
        """The messages, after the system message if there is one."""
        return self._with_system(self.messages)

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        return [*([Message("system", self.system)] if self.system else []), *messages]

    def rendered(self, messages: Sequence[Message]) -> Rendered:
        """Return the text of messages, up to the next answer."""
        return self.style.conversation(self._with_system(messages))

    def answer(self, prompt: Rendered) -> Iterator[str]:
        """Yield the completion of a prompt; what the cache holds of it is not computed again."""
        (ids,) = self.files.encode(self.style, [prompt])
        tokenizer, positions = self.files.tokenizer, self.files.base.config.positions
        if len(ids) >= positions:
            fault = f"the conversation's {len(ids)} tokens fill the checkpoint's {positions} positions"
            raise LitLoraError(f"{fault}: start a new one")
        self.files.base.config.check_ids("the conversation", max(ids, default=0))
        return tokenizer.stream(ids, self._tokens(ids, min(self.max_new_tokens, positions - len(ids))))

    @torch.inference_mode()
    def _tokens(self, ids: Sequence[int], limit: int) -> Iterator[int]:
        session = self.session
        session.cache.reserve(len(ids) + limit)
        with evaluating(session.model):
            logits = session.switch_to(torch.tensor(ids, device=session.device))
        stop_ids = self.files.tokenizer.stop_ids_of(self.style)
        yield from complete(session, logits, self.sampler, limit, stop_ids)

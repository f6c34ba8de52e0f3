"""A model that is loaded for generation: what the commands and a Python program call."""

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self, overload

import torch

from litlora.args.inference import GenerateArgs, InferenceArgs, Sampling
from litlora.data.prompts.styles import PromptStyle
from litlora.data.readers.parsers import RowError
from litlora.data.readers.row_formats import PROMPT
from litlora.errors import LitLoraError
from litlora.generation.batch import Request, complete_all
from litlora.generation.compile import compile_decode_step, prepare_for_decoding
from litlora.generation.conversation import Conversation
from litlora.generation.model_files import ModelFiles
from litlora.generation.sampler import Sampler
from litlora.generation.session import generate_samples
from litlora.lora.checkpoint import load_with_adapters, requested_storage
from litlora.models.checkpoint import Checkpoint
from litlora.models.transformer import GPT
from litlora.nn.backend import backend, default_device
from litlora.nn.gguf_weight import keep_values


class LLM:
    """A checkpoint, or adapters on one, in memory."""

    def __init__(self, files: ModelFiles, gpt: GPT) -> None:
        self.files, self.gpt = files, gpt
        self.device = gpt.model.embed_tokens.weight.device
        self.is_prepared = gpt.is_compiled

    @classmethod
    def load(cls, path: str | PathLike[str], *, compile: bool = False, **settings: Any) -> Self:
        """Load the folder of a checkpoint or an adapter.

        The settings are flags of `generate` that choose a model: base_dir, precision, quantize, prompt_style and
        prompt_style_variables; adapters and adapter_weights if the folder is their base.
        """
        base_dir, adapters = settings.pop("base_dir", None), settings.pop("adapters", ())
        base = None if base_dir is None else Path(base_dir)
        args = InferenceArgs(Path(path), base_dir=base, adapters=tuple(map(Path, adapters)), **settings)
        files = ModelFiles.find(args)
        files.style()  # only a check, before the weights are read
        return cls.open(files, compiled=compile)

    @classmethod
    def open(cls, files: ModelFiles, *, compiled: bool = False) -> Self:
        """Load the weights of a model whose files have been read."""
        dtype, quantization = requested_storage(files.args, files.adapters)
        if compiled and quantization:
            fault = f"--compile does not work with a quantized base ({quantization.name})"
            raise LitLoraError(f"{fault}: leave one of them out")
        gpt = load_with_adapters(Checkpoint.open(files.base), files.adapters, dtype, default_device(), quantization)
        if compiled:
            compile_decode_step(gpt)
        device = default_device()
        keep_values(gpt, backend(device).free_memory(device) // 2)
        return cls(files, gpt)

    @overload
    def generate(self, prompt: str, **settings: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[str], **settings: Any) -> list[str]: ...
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        input: str = "",
        system: str = "",
        batch_size: int = GenerateArgs.batch_size,
        **settings: Any,
    ) -> str | list[str]:
        """Return the completion of a prompt, or those of several, which are computed together.

        The settings are those of sampling: max_new_tokens, temperature, top_k, top_p and seed.
        """
        if isinstance(prompt, str):
            return "".join(self.stream(prompt, input=input, system=system, **settings))
        sampling, style = Sampling(**settings), self.files.style()
        ids = self.files.encode(style, [style.prompt(text, input, system) for text in prompt])
        for each in ids:
            self.files.check(each, sampling.max_new_tokens)
        return [text for _, text in sorted(self.complete(ids, style, sampling, batch_size))]

    def stream(self, prompt: str, *, input: str = "", system: str = "", **settings: Any) -> Iterator[str]:
        """Yield the completion of a prompt piece by piece."""
        sampling, style = Sampling(**settings), self.files.style()
        (ids,) = self.files.encode(style, [style.prompt(prompt, input, system)])
        self.files.check(ids, sampling.max_new_tokens)
        yield from next(self.samples(ids, style, sampling, 1))

    def chat(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> str:
        """Return the answer to messages such as {"role": "user", "content": "Hi"}; the settings are as above."""
        try:
            *said, _ = PROMPT.parse({"messages": list(messages)}).example.messages
        except RowError as error:
            raise LitLoraError(f"messages: {error}") from error
        conversation = self.conversation(**settings)
        return "".join(conversation.answer(conversation.rendered(said)))

    def conversation(self, system: str = "", **settings: Any) -> Conversation:
        """Return a conversation, whose `say` yields answers; the settings are as above."""
        sampling = Sampling(**settings)
        self.prepare(sampling.max_new_tokens)
        return Conversation(self.gpt, self.files, sampling, system)

    def samples(
        self, ids: Sequence[int], style: PromptStyle, sampling: Sampling, count: int
    ) -> Iterator[Iterator[str]]:
        """Yield several completions of a prompt, each as a stream of texts that must be read before the next."""
        self.prepare(sampling.max_new_tokens * count)
        tokenizer, sampler = self.files.tokenizer, Sampler.of(sampling, self.device)
        limit, stop_ids = sampling.max_new_tokens, tokenizer.stop_ids_of(style)
        for tokens in generate_samples(self.gpt, ids, sampler, count, max_new_tokens=limit, stop_ids=stop_ids):
            yield tokenizer.stream(ids, tokens)

    def complete(
        self, prompts: Sequence[Sequence[int]], style: PromptStyle, sampling: Sampling, batch_size: int
    ) -> Iterator[tuple[int, str]]:
        """Yield the number of each prompt and its completion, as they end."""
        tokenizer, sampler = self.files.tokenizer, Sampler.of(sampling, self.device)
        limit, generators = sampling.max_new_tokens, self._generators(sampling.seed, len(prompts))
        requests = [Request(ids, limit, generator=own) for ids, own in zip(prompts, generators, strict=True)]
        stop_ids = tokenizer.stop_ids_of(style)
        for number, tokens in complete_all(self.gpt, requests, sampler, stop_ids=stop_ids, batch_size=batch_size):
            yield number, "".join(tokenizer.stream(prompts[number], tokens))

    def _generators(self, seed: int, count: int) -> Iterator[torch.Generator]:
        """Yield a generator for each prompt, so that no completion depends on the others."""
        seeds = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
        return (torch.Generator(self.device).manual_seed(own) for own in seeds)

    def prepare(self, tokens: int) -> None:
        """Repack the weights before the first completion for which that pays."""
        if not self.is_prepared and tokens >= backend(self.device).repacking_pays_from:
            prepare_for_decoding(self.gpt)
            self.is_prepared = True

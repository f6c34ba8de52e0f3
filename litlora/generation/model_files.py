"""A model as its files describe it, read without torch: what does not fit is refused before weights are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from litlora.args.inference import InferenceArgs
from litlora.data.prompts.rendered import Rendered
from litlora.data.prompts.styles import PromptStyle, StyleSettings
from litlora.data.tokenizer import Tokenizer
from litlora.errors import LitLoraError
from litlora.lora.selection import Adapters, find_files, style_settings
from litlora.models.checkpoint_files import CheckpointFiles


@dataclass(frozen=True)
class ModelFiles:
    """A base, the adapters on it, and their tokenizer."""

    args: InferenceArgs
    base: CheckpointFiles
    adapters: Adapters
    tokenizer: Tokenizer

    @classmethod
    def find(cls, args: InferenceArgs) -> Self:
        """Read the files that arguments name, or refuse what does not fit."""
        base, adapters = find_files(args)
        return cls(args, base, adapters, Tokenizer(base.dir, base.hub_config))

    def style(self, untrained: str = "none") -> PromptStyle:
        """Return the prompt style as requested, else the one that was trained, else `untrained`."""
        settings = style_settings(self.args, self.base.dir, self.adapters, StyleSettings(untrained))
        return self.tokenizer.prompt_style(settings)

    def encode(self, style: PromptStyle, prompts: Sequence[Rendered]) -> list[list[int]]:
        """Tokenize prompts."""
        encodings = self.tokenizer.encode_rendered(prompts, style.add_special_tokens)
        return [ids.tolist() for ids in encodings.by_text(encodings.ids)]

    def check(self, ids: Sequence[int], max_new_tokens: int) -> None:
        """Refuse a prompt that, with its completion, does not fit the model."""
        positions = self.base.config.positions
        if len(ids) + max_new_tokens > positions:
            fault = f"the prompt's {len(ids)} tokens and --max_new_tokens ({max_new_tokens}) are more than the"
            raise LitLoraError(f"{fault} checkpoint's {positions} positions: shorten one of them")
        self.base.config.check_ids("the prompt", max(ids, default=0))

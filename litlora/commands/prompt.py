"""What `generate` completes: the tokens of a prompt, and the checkpoint that they are for. Read without torch."""

from dataclasses import dataclass
from typing import Self

from litlora.args.inference import NO_PROMPT, GenerateArgs
from litlora.data.prompt_styles import StyleSettings
from litlora.data.tokenizer import Tokenizer
from litlora.errors import LitLoraError
from litlora.lora.selection import Adapters, find_folders, style_settings
from litlora.models.checkpoint_files import CheckpointFiles
from litlora.utils.console import read_input


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt, with the base, the adapters on it, and the tokenizer of its completion."""

    base: CheckpointFiles
    adapters: Adapters
    tokenizer: Tokenizer
    ids: list[int]
    stop_ids: frozenset[int]

    @classmethod
    def read(cls, args: GenerateArgs) -> Self:
        """Tokenize the prompt for the base, or refuse what does not fit it."""
        base_dir, adapters = find_folders(args)
        base = CheckpointFiles.find(base_dir)
        tokenizer = Tokenizer(base.dir, base.hub_config)
        style = tokenizer.prompt_style(style_settings(args, base.dir, adapters, StyleSettings("none")))
        ids = tokenizer.encode_prompt(style, style.prompt(read_text(args.prompt), args.input, args.system))
        check_length(len(ids), args.max_new_tokens, base.config.positions)
        base.config.check_ids("the prompt", max(ids, default=0))
        return cls(base, adapters, tokenizer, ids, tokenizer.stop_ids_of(style))


def read_text(given: str | None) -> str:
    """Return --prompt, or else standard input without its last line break."""
    text = read_input().removesuffix("\n") if given is None else given
    if not text:
        raise LitLoraError(NO_PROMPT)
    return text


def check_length(prompt: int, new: int, positions: int) -> None:
    """Refuse a prompt and completion that together are longer than the model's context."""
    if prompt + new > positions:
        fault = f"the prompt's {prompt} tokens and --max_new_tokens ({new}) are more than the checkpoint's {positions}"
        raise LitLoraError(f"{fault} positions: shorten one of them")

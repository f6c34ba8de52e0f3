"""How llama.cpp splits a text before it merges, by the names that GGUF files have for it."""

from dataclasses import dataclass
from typing import Any

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD, BREAKS, BLANKS = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\s*[\r\n]+", r"\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
GPT_2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{BLANKS}"
LLAMA_3 = rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BREAKS}|{BLANKS}"
QWEN_2 = LLAMA_3.replace("{1,3}", "")
SEED = rf"{CONTRACTIONS}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{BREAKS}|{BLANKS}"
REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BREAKS}|{BLANKS}"
TEKKEN = rf"{BEFORE}{UPPER}*{LOWER}+|{BEFORE}{UPPER}+{LOWER}*|\p{{N}}|{REST}"
GPT_4O = rf"{BEFORE}{UPPER}*{LOWER}+{CONTRACTIONS}?|{BEFORE}{UPPER}+{LOWER}*{CONTRACTIONS}?|\p{{N}}{{1,3}}|{REST}"


@dataclass(frozen=True)
class Splitting:
    """One of llama.cpp's ways to split a text."""

    name: str
    patterns: tuple[str, ...]
    """Regular expressions, each of which splits what the ones before it left."""
    is_llama_3: bool = False
    """Whether a word that is a token is not merged, and BOS is added where a file does not say."""

    @property
    def pre_tokenizer(self) -> dict[str, Any]:
        """The same as tokenizer.json has it."""
        bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        steps = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in self.patterns
        ]
        return {"type": "Sequence", "pretokenizers": [*steps, bytes_of]}


SPLITTINGS = (
    Splitting("gpt-2", (GPT_2,)),
    Splitting("smollm", (r"\p{N}", GPT_2)),
    Splitting("llama-bpe", (LLAMA_3,), is_llama_3=True),
    Splitting("smaug-bpe", (LLAMA_3,)),
    Splitting("qwen2", (QWEN_2,)),
    Splitting("tekken", (TEKKEN,), is_llama_3=True),
    Splitting("gpt-4o", (GPT_4O,)),
    Splitting("seed-coder", (SEED,)),
)
ALIASES = {
    **dict.fromkeys(("phi-2", "olmo", "exaone4", "mellum", "a.x-4.0", "gigachat", "granite-docling"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone"), "smollm"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral"), "llama-bpe"),
    "dbrx": "smaug-bpe",
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"), "qwen2"),
    **dict.fromkeys(("glm4", "chatglm-bpe"), "smaug-bpe"),
    "llama4": "gpt-4o",
}
"""Other names of the same."""
OTHER_SPLITTING = "litlora.tokenizer.other_splitting"
"""The key of a file in which llama.cpp splits a text otherwise than the checkpoint's tokenizer."""

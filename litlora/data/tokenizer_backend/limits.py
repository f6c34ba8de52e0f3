"""What a tokenizer.json may ask for: its steps are counted and measured, and tried in a process of their own."""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from math import prod
from typing import Any

import tokenizers

from litlora.data.tokenizer_backend.sentencepiece_model import SentencePieceEncoding, SentencePieceModel
from litlora.errors import LitLoraError
from litlora.utils import resource_limits
from litlora.utils.limited_process import LimitedProcess
from litlora.utils.resource_limits import within_cpu_time

STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
CHARSMAP = "precompiled_charsmap"
TRIED = ('"Regex"', '"FixedLength"', f'"{CHARSMAP}"')  # of the steps, those that can take long or panic
MOST_STEPS = 100  # of a tokenizer
MOST_CHARACTERS = 10_000  # of an expression, or of what a step writes
MOST_GROWTH = 100  # characters that the steps may make of one
LONGEST_WORD = 1_000  # characters of a word or prefix in a model, on whose square its time depends
SLOWEST = 10_000  # characters in a second of CPU time; usual are a million
PROCESS = LimitedProcess("litlora.data.tokenizer_backend.process")


def check_cost(file: Mapping[str, Any]) -> None:
    """Refuse a tokenizer.json whose steps take too much: ValueError, TimeoutError or MemoryError.

    What is of another type than the library expects is left to the library.
    """
    steps = {name: step for name in STEPS if isinstance(step := file.get(name), dict)}
    _check_sizes(steps)
    _check_model(file.get("model"))
    text = json.dumps(steps)
    if any(name in text for name in TRIED) or not _writes_text(steps.get("post_processor")):
        _try(text)


def encode_in_time(
    backend: tokenizers.Tokenizer | SentencePieceModel, texts: list[str], add_special_tokens: bool
) -> Sequence[tokenizers.Encoding | SentencePieceEncoding]:
    """Tokenize texts; LitLoraError where the tokenizer takes far longer than any should."""
    encode = partial(backend.encode_batch, texts, add_special_tokens=add_special_tokens)
    characters = sum(map(len, texts))
    try:
        return within_cpu_time(encode, resource_limits.MAX_SECONDS + characters / SLOWEST)
    except TimeoutError as error:
        raise LitLoraError(f"the tokenizer fails: {error} for {characters:,} characters; choose another") from error


@cache
def _try(steps: str) -> None:
    if panic := PROCESS.ask({"steps": steps}):  # which prints lines of its own, here to nowhere
        raise LitLoraError(f"the tokenizer fails ({panic}): download the checkpoint again, or choose another")


def _writes_text(post_processor: Any) -> bool:
    """Tell whether each template of a post-processor for one text has a place for that text."""
    templates = [step["single"] for step in _objects(post_processor) if isinstance(step.get("single"), list)]
    places = ([step.get("id") for step in _objects(template) if "type_id" in step] for template in templates)
    return all("A" in ids and "B" not in ids for ids in places)


def _check_sizes(steps: Mapping[str, Any]) -> None:
    every = [step for part in steps.values() for step in _objects(part)]
    if len(every) > MOST_STEPS:
        raise ValueError(f"it has more than {MOST_STEPS} steps")
    texts = [text for step in every for key, text in step.items() if isinstance(text, str) and key != CHARSMAP]
    if any(len(text) > MOST_CHARACTERS for text in texts):
        raise ValueError(f"a step has an expression or a text of more than {MOST_CHARACTERS:,} characters")
    for name in ("normalizer", "decoder"):
        if prod(map(_growth, _objects(steps.get(name)))) > MOST_GROWTH:
            raise ValueError(f"its {name} can make a text more than {MOST_GROWTH} times as long")


def _objects(node: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON document."""
    nodes = [node]
    while nodes:
        match nodes.pop():
            case dict() as step:
                yield step
                nodes += step.values()
            case list() as steps:
                nodes += steps


def _growth(step: Mapping[str, Any]) -> int:
    """Return by how much a step of a normalizer or decoder can lengthen a text with what the file says."""
    if isinstance(charsmap := step.get(CHARSMAP), str):
        return _longest_entry(charsmap)
    if isinstance(text := step.get("prepend"), str):
        return 1 + len(text)
    if not isinstance(text := step.get("content"), str) or "pattern" not in step:
        return 1
    pattern = step["pattern"]
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    return -(-len(text) // len(literal)) or 1 if isinstance(literal, str) and literal else 1 + len(text)


def _longest_entry(charsmap: str) -> int:
    """Return the length of the longest text that a character map of sentencepiece writes for a character."""
    content = base64.b64decode(charsmap)
    start = 4 + int.from_bytes(content[:4], "little")  # behind the trie
    return max(map(len, content[start:].split(b"\0")), default=1) or 1


def _check_model(model: Any) -> None:
    keys = ("continuing_subword_prefix", "end_of_word_suffix", "max_input_chars_per_word")
    for value in (model.get(key) for key in keys) if isinstance(model, dict) else ():
        size = len(value) if isinstance(value, str) else value
        if isinstance(size, int) and size > LONGEST_WORD:
            raise ValueError(f"its model has words or affixes of more than {LONGEST_WORD:,} characters")

"""receipt.json: what the trained network answers to fixed prompts, by which a copy of it is verified."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from litlora.data.dataset import open_split, read_rows
from litlora.data.encoding import RenderedRow, encode_rows
from litlora.data.examples import Example, Json, Turn
from litlora.data.prompts.styles import PromptStyle, StyleSettings
from litlora.data.readers.parsers import jsonl_lines, jsonl_rows
from litlora.data.readers.row_formats import ANY
from litlora.data.tokenizer import Tokenizer
from litlora.errors import LitLoraError
from litlora.export.scoring import Engine, LitLoraEngine, RandomRounding, Rounding, Scores
from litlora.lora.adapter_folder import WEIGHTS
from litlora.utils.files import read_json

RECEIPT = "receipt.json"
ADAPTER, TEMPLATE = "adapter", "template"  # of its hashes
ROWS = 64  # of the validation split, the shortest of which are prompts
PROMPTS = 2  # beside the fixed one
MAX_TOKENS = 256  # of a prompt with its response
NEW_TOKENS = 8
TYPES: dict[str, Any] = {
    "prompt_style": str, "variables": dict, "date": str | None, "mask_prompt": bool, "stop_ids": list, "dtype": str,
    "stored_dtype": str, "quantization": str | None, "sensitivity": int | float, "hashes": dict, "versions": dict,
}  # fmt: skip
"""Of the fields of a receipt beside its prompts."""
FIXED = Example.of(Turn("Name three primary colors.", "Red, yellow and blue."))


@dataclass(frozen=True)
class Probe:
    """A sequence of a row, and what the trained network says of it."""

    row: Json
    """As train.jsonl holds it."""
    sequence: int
    """Which of the row's sequences it is: some chat templates give one for each answer."""
    text: str
    """As the prompt style renders it; empty where special tokens in it are plain text, which others do not know."""
    prompt_end: int
    """Where the prompt ends in the text."""
    ids: list[int]
    labels: list[bool]
    """Whether each token is supervised."""
    log_probs: Scores
    """Of each token but the first, in float32."""
    continuation: list[int]
    """What greedy decoding adds to the prompt."""
    continuation_log_probs: Scores
    rounded: dict[str, Scores]
    """All log-probabilities as llama.cpp rounds them, by --outtype of a file, or "gguf" for that of the training."""

    @property
    def prompt(self) -> list[int]:
        """The tokens before the first response."""
        return self.ids[: self.labels.index(True)]

    def expected(self, rounding: str | None = None) -> Scores:
        """Return the log-probabilities of all tokens that were scored, in float32 or rounded."""
        return [*self.log_probs, *self.continuation_log_probs] if rounding is None else self.rounded[rounding]


@dataclass(frozen=True)
class Receipt:
    """What identifies a trained network and its prompts."""

    prompts: list[Probe]
    prompt_style: str
    variables: Mapping[str, Any]
    date: str | None
    mask_prompt: bool
    stop_ids: list[int]
    dtype: str
    """Of the base's weights in training: float32 or bfloat16."""
    stored_dtype: str
    """Of the base's weights in its checkpoint."""
    quantization: str | None
    sensitivity: float
    """The largest change of a log-probability that roundings of the weights to bfloat16 make."""
    hashes: dict[str, str]
    """Of base, adapter, tokenizer and rows."""
    versions: dict[str, str]

    @property
    def style(self) -> StyleSettings:
        return StyleSettings(self.prompt_style, self.variables, self.date)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the receipt of a folder."""
        path = folder / RECEIPT
        if not path.is_file():
            raise LitLoraError(f"{folder} has no {RECEIPT}: only what this version of litlora trained can be verified")
        content = read_json(path)
        try:
            prompts = [
                Probe(**{field.name: each[field.name] for field in fields(Probe)}) for each in content["prompts"]
            ]
            others = {field.name: content[field.name] for field in fields(cls) if field.name != "prompts"}
            return cls(prompts=_checked(prompts), **_of_their_types(others))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LitLoraError(
                f"{path} is not as litlora writes it ({error}): train again, or copy it again"
            ) from error

    def of_adapter(self, folder: Path) -> "Receipt":
        """Return the receipt with the hash of the adapter in a folder."""
        return replace(self, hashes={**self.hashes, ADAPTER: file_hash(folder / WEIGHTS)})

    def write(self, folder: Path) -> None:
        """Write the receipt into a folder that is not published yet."""
        (folder / RECEIPT).write_bytes(self.content())

    def content(self) -> bytes:
        """Return the receipt as JSON."""
        return (json.dumps(asdict(self)) + "\n").encode()


def _of_their_types(content: dict[str, Any]) -> dict[str, Any]:
    """Refuse a value of another type than the field of its name has, and a number that is none."""
    for name, kind in TYPES.items():
        if not isinstance(content[name], kind):
            raise TypeError(f"{name} is of the wrong type")
    if not math.isfinite(content["sensitivity"]) or not all(type(token) is int for token in content["stop_ids"]):
        raise ValueError("sensitivity and stop_ids are numbers")
    return content


def _checked(prompts: list[Probe]) -> list[Probe]:
    for probe in prompts:
        lengths = [len(probe.labels), len(probe.log_probs) + 1]
        if lengths != [len(probe.ids)] * 2 or len(probe.continuation) != len(probe.continuation_log_probs):
            raise ValueError("the lengths of a prompt do not agree")
        if any(len(rounded) != len(probe.expected()) for rounded in probe.rounded.values()):
            raise ValueError("the lengths of a prompt do not agree")
        if not any(probe.labels) or not probe.prompt:
            raise ValueError("a prompt has no tokens or no response")
    if not prompts:
        raise ValueError("it has no prompts")
    return prompts


@dataclass(frozen=True)
class TokenizedRow:
    """A tokenized sequence of a row."""

    row: Json
    number: int
    text: str
    prompt_end: int
    ids: list[int]
    labels: list[bool]

    @property
    def prompt(self) -> list[int]:
        """The tokens before the first response."""
        return self.ids[: self.labels.index(True)]


def tokenized(
    row: Json, tokenizer: Tokenizer, style: PromptStyle, limit: int, *, mask_prompt: bool
) -> list[TokenizedRow]:
    """Return the sequences of a row as training has them, cut to a length."""
    rendered = style.render(ANY.parse(row).example)
    tokens = encode_rows([RenderedRow(each, 1) for each in rendered], tokenizer, style, mask_prompt=mask_prompt)
    bounds = zip(tokens.offsets[:-1].tolist(), tokens.offsets[1:].tolist(), strict=True)
    cut = [tokens.ids[start : min(end, start + limit)] for start, end in bounds]
    pairs = [([int(i if i >= 0 else ~i) for i in ids], [bool(i >= 0) for i in ids]) for ids in cut]
    return [
        TokenizedRow(row, number, "" if own.literal else own.text, len(own.prompt), ids, labels)
        for number, (own, (ids, labels)) in enumerate(zip(rendered, pairs, strict=True))
    ]


def choose(
    val: Path, tokenizer: Tokenizer, style: PromptStyle, positions: int, *, mask_prompt: bool
) -> list[TokenizedRow]:
    """Return a fixed prompt and the shortest of the first validation rows."""
    with open_split(val) as file:
        rows, _ = read_rows(islice(jsonl_rows(jsonl_lines(file)), ROWS), ANY)
    limit = min(MAX_TOKENS, positions - NEW_TOKENS)
    found = [
        sequence
        for row in _as_rows([FIXED, *(row.example for _, row in rows)])
        for sequence in _tokenized_or_none(row, tokenizer, style, limit, mask_prompt=mask_prompt)[:1]
        if any(sequence.labels[1:]) and not sequence.labels[0]
    ]
    fixed, others = found[:1], sorted(found[1:], key=lambda sequence: len(sequence.ids))
    return [*fixed, *others[:PROMPTS]]


def _tokenized_or_none(*args: Any, **options: Any) -> list[TokenizedRow]:
    """Return the sequences of a row, none if the template does not take it."""
    try:
        return tokenized(*args, **options)
    except LitLoraError:
        return []


def _as_rows(examples: Iterable[Example]) -> Iterator[Json]:
    for example in examples:
        try:
            yield example.to_json()
        except ValueError:  # no row of train.jsonl can hold it
            continue


def record(engine: LitLoraEngine, chosen: Sequence[TokenizedRow]) -> list[Probe]:
    """Return what the network says of sequences."""
    continuations = engine.continued([own.prompt for own in chosen], NEW_TOKENS)
    answered = list(zip(chosen, continuations, strict=True))
    scored = engine([ids for own, more in answered for ids in (own.ids, [*own.prompt, *more])])
    return [
        Probe(
            own.row, own.number, own.text, own.prompt_end, own.ids, own.labels,
            log_probs, more, more_log_probs[-len(more) :], {},
        )
        for (own, more), log_probs, more_log_probs in zip(answered, scored[::2], scored[1::2], strict=True)
    ]  # fmt: skip


def score(engine: Engine, probes: Sequence[Probe]) -> list[Scores]:
    """Return the log-probabilities that an engine gives for what each probe has scored."""
    sequences = [ids for probe in probes for ids in (probe.ids, [*probe.prompt, *probe.continuation])]
    scored = engine(sequences, [len(probe.prompt) for probe in probes for _ in range(2)])
    pairs = zip(scored[::2], scored[1::2], probes, strict=True)
    return [[*own, *more[-len(probe.continuation) :]] for own, more, probe in pairs]


def rounded(engine: LitLoraEngine, probes: Sequence[Probe], roundings: Mapping[str, Rounding]) -> list[Probe]:
    """Return probes with what the network says of them where llama.cpp rounds it."""
    found = {name: score(replace(engine, rounding=own), probes) for name, own in roundings.items()}
    return [
        replace(probe, rounded={name: scores[number] for name, scores in found.items()})
        for number, probe in enumerate(probes)
    ]


def sensitivity(engine: LitLoraEngine, probes: Sequence[Probe]) -> float:
    """Return the largest change of a log-probability where the weights are rounded to bfloat16 at random."""
    changed = score(replace(engine, rounding=RandomRounding(torch.bfloat16, seed=0)), probes)
    return max(largest_difference(own, probe.expected()) for own, probe in zip(changed, probes, strict=True))


def largest_difference(actual: Scores, expected: Scores) -> float:
    """Return the largest difference of two log-probabilities of a token, as far as there are both."""
    return max(_distance(one, other) for one, other in zip(actual, expected, strict=True))


def _distance(one: float | None, other: float | None) -> float:
    """Return the absolute difference, 0 where an engine has no number, infinite where it is not a number."""
    if one is None or other is None:
        return 0.0
    distance = abs(one - other)
    return distance if distance == distance else float("inf")


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_hash(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def dtype_name(tensor: Tensor) -> str:
    """Return the name of a tensor's dtype, such as bfloat16."""
    return str(tensor.dtype).removeprefix("torch.")


def versions() -> dict[str, str]:
    """Return the versions of what computed a receipt."""
    return {package: version(package) for package in ("litlora", "torch", "tokenizers")}

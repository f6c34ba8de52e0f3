"""The tokenizer of a GGUF file: tokens, their kinds, merges or scores, special tokens and the chat template."""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Regex, pre_tokenizers

from litlora.data.prompts.styles import PromptStyle
from litlora.data.tokenizer import Tokenizer
from litlora.data.tokenizer_backend.sentencepiece_model import SPACE, SentencePieceModel
from litlora.errors import LitLoraError
from litlora.models.gguf.library import gguf
from litlora.models.gguf.splittings import OTHER_SPLITTING, SPLITTINGS, Splitting
from litlora.utils.console import log

UNSPLIT = "llama.cpp has nothing that splits a text as this tokenizer does"
PROBE = (
    "Hello World, it's WE'LL I'd camelCase HTTPServer x2y 1 12 123 1234 12345.67 3½ ½\n\n\n  two\t\ttabs \r\n"
    " end.\n/path/to//file !!\n ??? ()\n()[] — «ça» naïve Straße ÉCOLE e\u0301 日本語テスト 한국어 مرحبا हिन्दी \n \n"
    "😀👍🏽 a_b-c+d=e*f  \u00a0nbsp\u3000wide 'quoted' “it’s” don't DON'T $5 5% #tag @me ~ ` ^ trailing   "
)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocab_size: int, style: PromptStyle) -> None:
    """Write a checkpoint's tokenizer, completed to as many tokens as the embedding has rows, for prompts of a style."""
    backend = tokenizer.backend
    if isinstance(backend, SentencePieceModel):
        _add_sentencepiece(writer, tokenizer, vocab_size, _own_scores(backend), backend.has_prefix)
    else:
        _add_bpe(writer, tokenizer, json.loads(backend.to_str()), vocab_size)
    _add_special_tokens(writer, tokenizer, style)


def _add_bpe(writer: gguf.GGUFWriter, tokenizer: Tokenizer, content: dict[str, Any], vocab_size: int) -> None:
    model = content["model"]
    if model.get("type") != "BPE":
        raise LitLoraError(f"llama.cpp has no tokenizer of the type {model.get('type')}: only BPE can be exported")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not tokenizer.is_byte_level:
        _add_sentencepiece(writer, tokenizer, vocab_size, _scores_of_merges(merges), _writes_prefix(content))
        return
    writer.add_tokenizer_model("gpt2")
    splitting = splitting_of(tokenizer.backend, bool(model.get("ignore_merges")))
    writer.add_tokenizer_pre((splitting or SPLITTINGS[0]).name)
    if splitting is None:
        log(f"{UNSPLIT}: it makes other tokens of the same text, so give it token ids, or use another base")
        writer.add_bool(OTHER_SPLITTING, True)
    _add_tokens(writer, tokenizer, vocab_size, gguf.TokenType.NORMAL)
    writer.add_token_merges(merges)


def splitting_of(backend: Any, ignores_merges: bool) -> Splitting | None:
    """Return what splits a text in llama.cpp as this tokenizer does, by what both make of a probe, if anything does."""
    expected = _pieces(backend.pre_tokenizer, PROBE)
    found = [splitting for splitting in SPLITTINGS if _pieces(_pre_tokenizer(splitting), PROBE) == expected]
    found.sort(key=lambda splitting: splitting.is_llama_3 != ignores_merges)
    return found[0] if found else None


def _pre_tokenizer(splitting: Splitting) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _pieces(pre_tokenizer: pre_tokenizers.PreTokenizer | None, text: str) -> list[str]:
    return [text] if pre_tokenizer is None else [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)]


def _add_sentencepiece(
    writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocab_size: int, scores: dict[str, float], prefix: bool
) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    tokens = _add_tokens(writer, tokenizer, vocab_size, gguf.TokenType.BYTE)
    unreachable = min(scores.values(), default=0.0) - 1
    writer.add_token_scores([scores.get(token, unreachable) for token in tokens])
    writer.add_add_space_prefix(prefix)


def _own_scores(model: SentencePieceModel) -> dict[str, float]:
    return {token: model.score(token_id) for token, token_id in model.get_vocab().items()}


def _scores_of_merges(merges: Sequence[str]) -> dict[str, float]:
    """Return scores by which llama.cpp merges in the same order: a token's is its first merge's place."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        scores.setdefault(merge.replace(" ", ""), -float(rank))
    return scores


def _writes_prefix(content: dict[str, Any]) -> bool:
    """Tell whether a tokenizer writes a space before a text."""
    steps = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")], ensure_ascii=False)
    return f'"prepend": "{SPACE}"' in steps or '"prepend_scheme": "first"' in steps or '"always"' in steps


def _add_tokens(
    writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocab_size: int, kind_of_bytes: gguf.TokenType
) -> list[str]:
    """Write each token and its kind; rows of the embedding beyond the tokenizer's get tokens that no text has."""
    added, kinds, tokens = tokenizer.backend.get_added_tokens_decoder(), [], []
    unknown = tokenizer.unknown_token
    for token_id in range(vocab_size):
        token = tokenizer.backend.id_to_token(token_id)
        if token is None:
            token, kind = f"[PAD{token_id}]", gguf.TokenType.UNUSED
        elif token == unknown:
            kind = gguf.TokenType.UNKNOWN
        elif token_id in added:
            kind = gguf.TokenType.CONTROL if added[token_id].special else gguf.TokenType.USER_DEFINED
        else:
            kind = kind_of_bytes if len(token) == 6 and token.startswith("<0x") else gguf.TokenType.NORMAL
        tokens.append(token)
        kinds.append(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    return tokens


def _add_special_tokens(writer: gguf.GGUFWriter, tokenizer: Tokenizer, style: PromptStyle) -> None:
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    others = sorted(tokenizer.stop_ids_of(style) - {tokenizer.eos_id})  # beyond two, llama.cpp has no name for them
    for add, other in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add(other)
    writer.add_add_bos_token(tokenizer.adds_bos_to(style))
    writer.add_add_eos_token(False)  # nor has training anything after a prompt
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)

"""A byte-level BPE of tiktoken's kind as tokenizer.json, the form in which the Hub serves these checkpoints."""

import base64
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from litlora.data.tokenizer import BYTE_OF_CHARACTER

CHARACTER = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}


def read_tiktoken(path: Path) -> dict[bytes, int]:
    """Read the ranks of a .tiktoken file: a token in base64 and its rank on each line."""
    pairs = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def read_tekken(path: Path) -> tuple[dict[bytes, int], str]:
    """Read the ranks of Mistral's tekken.json, whose special tokens come before them, and its pattern."""
    content = json.loads(path.read_text(encoding="utf-8"))
    size = content["config"]["default_vocab_size"] - content["config"]["default_num_special_tokens"]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in content["vocab"][:size]}
    return ranks, content["config"]["pattern"]


def to_backend(ranks: dict[bytes, int], pattern: str, special: dict[str, int], first_id: int = 0) -> Tokenizer:
    """Return the same BPE as a tokenizer of the tokenizers library, the token of rank 0 with the id `first_id`."""
    names = {token: "".join(map(CHARACTER.__getitem__, token)) for token in ranks}
    halves = ((token[:cut], token[cut:]) for token in ranks for cut in range(1, len(token)))
    merges = [(names[left], names[right]) for left, right in halves if left in ranks and right in ranks]
    vocabulary = {names[token]: first_id + rank for token, rank in ranks.items()} | special
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    backend.add_special_tokens(list(special))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend

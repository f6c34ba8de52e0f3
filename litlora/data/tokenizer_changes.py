"""What differs between two tokenizers."""

import json
from math import inf

import tokenizers

from litlora.data.tokenizer import Tokenizer


def difference(before: Tokenizer, now: Tokenizer) -> str:
    """Tell what differs between tokenizers that give a text other ids: a token, a setting, or a part of the file."""
    return _different_token(before, now) or _different_setting(before, now) or _different_part(before, now)


def _different_token(before: Tokenizer, now: Tokenizer) -> str | None:
    old, new = before.backend.get_vocab(), now.backend.get_vocab()
    differing = [token for token in old.keys() | new.keys() if old.get(token) != new.get(token)]
    if not differing:
        return None
    first = min(differing, key=lambda token: (old.get(token, inf), token))
    what = f"had the id {old[first]} and has {new[first]}" if first in old and first in new else "is new"
    more = f", and {len(differing) - 1:,} more differ" if len(differing) > 1 else ""
    return f"the token {first!r} {'is gone' if first not in new else what}{more}"


def _different_setting(before: Tokenizer, now: Tokenizer) -> str | None:
    for name in ("bos_token", "eos_token"):
        was, value = getattr(before, name), getattr(now, name)
        if was != value:
            return f"{name} was {was!r} and is {value!r}"
    return "the chat template differs" if before.chat_template != now.chat_template else None


def _different_part(before: Tokenizer, now: Tokenizer) -> str:
    was, value = (json.loads(each.backend.to_str()) for each in (before, now))
    if isinstance(was, dict) and isinstance(value, dict):
        for part in sorted(was.keys() | value.keys()):
            if was.get(part) != value.get(part):
                return f"{part} in tokenizer.json differs"
    return f"the installed tokenizers {tokenizers.__version__} gives other ids"

"""The steps of a tokenizer.json around its model, tried on texts of many kinds in a process that may be killed."""

import json
from typing import Any

from tokenizers import Tokenizer

from litlora.utils.limited_process import serve

LENGTH = 1_000  # characters of a run
CHARACTERS = "aZ0 \n\t\r.,_-'é東🦙"
PROSE = "It's 1,234.5 % of the  words:\n\tein Fluß, 東京 (🦙) and `code_like(x)`; https://a.example/b?c=d\n\n"
EXPRESSION = "Onig"  # begins what its engine says of an expression that takes too long on one of the texts
BARE = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}


def _answer(request: dict[str, Any]) -> str | None:
    """Return the first line of a panic that any text brings about; of other failures, the whole tokenizer says why."""
    steps = request["steps"]
    try:
        tokenizer = Tokenizer.from_str(json.dumps(BARE | json.loads(steps)))
        tokenizer.encode_batch(_texts(steps))
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        reason = str(error).partition("\n")[0]
        return None if type(error) is Exception or reason.startswith(EXPRESSION) else reason
    return None


def _texts(steps: str) -> list[str]:
    """Return prose, and runs of what an expression may repeat."""
    characters = dict.fromkeys(CHARACTERS + "".join(sorted(set(steps))[: LENGTH // 10]))
    return [PROSE * (LENGTH // len(PROSE)), *(character * LENGTH + "!" for character in characters)]


if __name__ == "__main__":
    serve(_answer)

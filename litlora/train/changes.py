"""How the base and the tokens of a run differ from those of the run that it resumes."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from litlora.data.split_encoder import SplitEncoder
from litlora.data.token_cache import Split
from litlora.data.tokenizer import Tokenizer
from litlora.data.tokenizer_changes import difference
from litlora.data.tokens import Tokens
from litlora.errors import LitLoraError
from litlora.models.checkpoint import Checkpoint
from litlora.train.resume import BASE, ROWS, TENSORS, TOKENS, Explain, Identity, describe, split_content

Open = Callable[[Sequence[Split], SplitEncoder], list[Tokens]]
"""Opens splits: open_splits or peek_splits."""


def explanations(
    checkpoint: Checkpoint, encoder: SplitEncoder, splits: Sequence[Split], open_: Open
) -> dict[str, Explain]:
    """Return what tells how each content differs from that of a run."""
    base: dict[str, Explain] = {BASE: partial(changed_base, checkpoint)}
    tokens = partial(changed_tokens, encoder, checkpoint.hub_config, open_)
    return base | {split_content(split.path.name): partial(tokens, split) for split in splits}


def changed_base(checkpoint: Checkpoint, was: Identity, folder: Path) -> str | None:
    """Tell which weights of the base differ."""
    differing = checkpoint.difference(was.contents.get(BASE, ""), was.details.get(TENSORS))
    return differing and f"{BASE} have changed ({differing})"


def changed_tokens(
    encoder: SplitEncoder, hub_config: dict[str, object], open_: Open, split: Split, was: Identity, folder: Path
) -> str | None:
    """Tell why a split has other tokens; other files or another tokenizer library may give the same ones."""
    name = split.path.name
    if (recorded := was.details.get(TOKENS + name)) is None:
        return describe(split_content(name), was)
    (tokens,) = open_([split], encoder)
    if tokens.digest == recorded:
        return None
    if was.details.get(ROWS + name) != split.content:
        return f"the rows of {name} have changed"
    try:
        cause = difference(Tokenizer(folder, hub_config), encoder.tokenizer)
    except LitLoraError:
        cause = "the tokenizer differs"
    return f"the tokens of {name} have changed ({cause})"

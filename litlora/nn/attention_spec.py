"""What distinguishes the attention of one layer from another's, without torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """How the queries of a layer weight the keys: by the softmax of softcap · tanh(scale · q k / softcap)."""

    window: int | None
    """A query sees its own position and the window - 1 before it; with None, all before it."""
    scale: float
    """Factor of the products of queries and keys."""
    softcap: float | None = None
    """Bound of the scores (Gemma 2), or None for none."""

"""The leading singular values and vectors of a matrix, exact or by random projections."""

import torch
from torch import Tensor


def leading_singular(matrix: Tensor, rank: int, iterations: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular values (r,) of a matrix (m, n), between their left (m, r) and right vectors (n, r).

    With a number of power iterations they are approximate: the matrix is projected on twice as many random vectors
    (Halko et al. 2011, arXiv 0909.4061). r is the rank, or the matrix's own where that is lower.
    """
    rank = min(rank, *matrix.shape)
    if iterations is None:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.t()
    else:
        u, s, v = torch.svd_lowrank(matrix, min(2 * rank, *matrix.shape), iterations)
    u, s, v = u[:, :rank], s[:rank], v[:, :rank]
    signs = v.gather(0, v.abs().argmax(dim=0, keepdim=True)).sign()
    return u * signs, s, v * signs  # or rounding would decide the direction of singular vectors


def decomposition_bytes(rows: int, columns: int, *, exact: bool) -> int:
    """Return the bytes for a float32 matrix and for decomposing it: exactly by LAPACK's gesdd, or by projections.

    Of projections, only the matrix and one of its size, such as what they leave of it, count.
    """
    short = min(rows, columns)
    vectors = (rows + columns) * short + 4 * short**2 if exact else 0
    return 4 * (2 * rows * columns + vectors)

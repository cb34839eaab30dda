"""The bytes that a head moves between ranks: gathered whole, or with its vocabulary split.

Importing the file needs no torch.
"""

from __future__ import annotations

PARTIAL_BYTES = 4  # of a number on its way into a sum over ranks, float32


def head_traffic(
    rows: int,
    dim: int,
    vocab: int,
    ranks: int,
    bytes: int,
    *,
    trained: bool = True,
    gradients: bool = True,
) -> tuple[int, int]:
    """Return the bytes that a rank receives per call for (a gathered head, a split vocabulary).

    rows: N, scored rows of all ranks together
    dim: D
    vocab: V
    ranks: G, that hold one copy of the head among themselves
    bytes: of a number of hidden states and of the weight in products
    trained: the head has a gradient
    gradients: False: a reference, or an evaluation

    A gathered head: V D gathered, and V D summed if trained. A split vocabulary: N D gathered, N D
    summed for any gradient, and a few numbers a row. Rows are taken to be equally many on all
    ranks, within the workspace: rows beyond the workspace are gathered twice (vocabulary.py).
    """
    of_others = ranks - 1  # a rank receives the parts of all others, each the 1/G of a whole
    summed = PARTIAL_BYTES if gradients else 0
    gathered = vocab * dim * (bytes + (summed if trained else 0))
    row = dim * (bytes + summed)
    # Target (8); maximum (4), sum and target's logit (8 each), there and back; coefficient (4).
    row += 8 + 2 * (4 + 8 + 8) + summed
    return gathered * of_others // ranks, rows * row * of_others // ranks

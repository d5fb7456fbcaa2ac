"""Functions that a graph calls to run frames folded into dimension 0 in several pieces.

::

    y = net(x)                        # (B·T, ...)                all frames at once

    pieces = cut(x, 2)                # (⌊B·T/2⌋, ...), (⌈B·T/2⌉, ...)
    first = net(pieces[0])
    second = net(pieces[1])
    y = joined([first, second], x)    # (B·T, ...)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxtemporal.ir.leaf import leaf_function

__all__ = ["cut", "joined", "shaped"]


@leaf_function
def cut(folded: Tensor, pieces: int) -> tuple[Tensor, ...]:
    """Views of ``folded``, (N, ...), whose numbers of rows differ by at most one.

    If N is below ``pieces``, the last row replaces empty pieces, since not every op runs on zero
    rows; :func:`joined` drops their results.
    """
    rows = folded.size(0)
    if 0 < rows < pieces:
        return tuple(folded.narrow(0, min(piece, rows - 1), 1) for piece in range(pieces))
    # Unlike those of tensor_split, these sizes stay free in torch.export.
    ends = [piece * rows // pieces for piece in range(pieces + 1)]
    return tuple(folded.narrow(0, ends[i], ends[i + 1] - ends[i]) for i in range(pieces))


@leaf_function
def joined(pieces: Sequence[Tensor], folded: Tensor) -> Tensor:
    """The results for the pieces of ``folded``, (N, ...), concatenated: (N, ...)."""
    whole = torch.cat(list(pieces))
    rows = folded.size(0)
    return whole.narrow(0, 0, rows) if 0 < rows < len(pieces) else whole


@leaf_function
def shaped(piece: Tensor, folded: Tensor) -> Tensor:
    """A tensor with the shape, dtype and device of the whole that ``piece`` is a part of.

    Args:
        piece: (n, ...), the result for one piece of ``folded``.
        folded: (N, ...), which has the number of rows of the whole.

    Returns:
        (N, ...), a view that takes no memory. Use only its sizes: its values mean nothing.
    """
    return piece.new_empty(()).expand(folded.size(0), *piece.shape[1:])

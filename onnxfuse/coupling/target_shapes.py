"""Target shapes of Reshape and Expand as constants that hold for every input size.

Exporters compute a target shape from sizes that are read at run time and numbers written into the file, and often use
one such shape, or one such number, in several places. Where one of these places needs another number than the others,
it gets a constant of its own. That is possible because both operators have words for "as it was": in Reshape a 0 copies
the size of the input's axis and a -1 takes what is left, in Expand a 1 leaves the input's axis alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from onnxfuse.coupling.shape_values import Origin, Stated
from onnxfuse.graph.view import NodeView

__all__ = ["Int64Array", "constant_target"]

Int64Array: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


def constant_target(
    node: NodeView,
    origins: Sequence[Origin],
    values: Sequence[int],
    dims: tuple[Sequence[int], Sequence[int]],
    copies: Callable[[int], bool],
) -> Int64Array | None:
    """Write the target shape of a node as a constant.

    Args:
        node: A Reshape or an Expand; others have no such form.
        origins: Where each entry of the target comes from.
        values: The entries at the sizes that were analysed.
        dims: The shapes of input and output at these sizes.
        copies: Whether output axis i is input axis i, whatever their size.

    Returns:
        The constant, int64; None if there is none that holds for every input size.
    """
    if node.op == "Reshape" and node.domain == "":
        return _reshape_target(origins, values, dims[0], copies)
    if node.op == "Expand" and node.domain == "":
        return _expand_target(origins, values, *dims)
    return None


def _reshape_target(
    origins: Sequence[Origin], values: Sequence[int], x: Sequence[int], copies: Callable[[int], bool]
) -> Int64Array | None:
    target: list[int] = []
    for i, (origin, value) in enumerate(zip(origins, values, strict=True)):
        if isinstance(origin, Stated) and value > 0:
            target.append(value)
        elif i < len(x) and copies(i):
            target.append(0)
        else:
            target.append(-1)
    return np.array(target, np.int64) if target.count(-1) <= 1 else None


def _expand_target(
    origins: Sequence[Origin], values: Sequence[int], x: Sequence[int], y: Sequence[int]
) -> Int64Array | None:
    target: list[int] = []
    for i, (origin, value) in enumerate(zip(origins, values, strict=True)):
        behind = len(values) - i
        if behind <= len(x) and x[-behind] == y[-behind] and not isinstance(origin, Stated):
            target.append(1)
        elif isinstance(origin, Stated) and value > 0:
            target.append(value)
        else:
            return None
    return np.array(target, np.int64)

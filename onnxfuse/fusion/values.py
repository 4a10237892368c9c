"""What computed values become once groups are fused: the original's values, mapped as the weights that make them."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from onnxfuse.coupling.groups import CouplingGroup
from onnxfuse.coupling.layout import Atom, Layout, leaves
from onnxfuse.coupling.sets import places
from onnxfuse.fusion.mapping import map_sides
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.graph.view import Operand
from onnxfuse.matrices import transposed

__all__ = ["Applied", "fused_values"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Applied: TypeAlias = Sequence[tuple[CouplingGroup, ChannelMap]]
"""The groups that were fused, with their maps, in that order."""


def fused_values(
    values: AnyArray, layouts: Sequence[Layout], name: str, axes: Sequence[int], applied: Applied
) -> AnyArray:
    """Return what numbers of a value should be in the compressed network, given the original's.

    Args:
        values: Any shape.
        layouts: What is on each axis.
        name: The value.
        axes: Which of its axes each one is; -1 for one that has no channels.
        applied: The groups that were fused.
    """
    widths: dict[Atom, int] = {}
    inside = [set(leaves(layout)) for layout in layouts]
    for group, channel_map in applied:
        kept = channel_map.kept // group.sets
        for axis in (axis for axis, atoms in enumerate(inside) if group.atom in atoms):
            old, new = (places(layouts, axis, group, widths, count) for count in (None, kept))
            mirrored = group.mirrored.get((Operand(name), axes[axis]))
            values = map_sides(values, old, new, (channel_map.making, transposed(channel_map.reading)), mirrored)
        widths[group.atom] = kept
    return values

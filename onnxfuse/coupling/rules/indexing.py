"""Looking up, writing to places and moving blocks of indices: Gather, Scatter, Tile, DepthToSpace and their kin.

What is looked up or written along is fixed, since the indices are numbers of the original's, unless the file stores
them and they name whole parts of the axis, which are counted anew; the other axes pass through. Other indices that the
file stores have a shape of their own, which nothing would resize, so they fix all their axes.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from onnxfuse.coupling.constraints import (
    AxisRef,
    Constraint,
    Equal,
    Freeze,
    Fresh,
    Picked,
    Rule,
    Site,
    Tensor,
    Weight,
    cat,
    prod,
)
from onnxfuse.coupling.rules.shape import made_here
from onnxfuse.statistics.features import Role

__all__ = ["RULES", "gather_nd"]

# Indices in shorter runs, on average, name single channels.
_SHORTEST_RUN = 2


def gather(site: Site) -> Iterator[Constraint]:
    """Gather: the axes of the indices replace the axis looked up, cut and joined if these are runs; the others pass."""
    data, indices, y = site.input(0), site.input(1), site.output()
    along = int(site.attribute("axis", 0)) % data.rank
    for i in range(data.rank):
        if i != along:
            yield Equal(data[i], y[i] if i < along else y[i + indices.rank - 1])
            if data.is_weight:
                # A table of vectors: its column c is what makes channel c.
                yield Weight(data[i], Role.PRODUCER)
    picked = None if data.is_weight else list(_whole_parts(site, data[along], data.dims[along], y.axes, along))
    if picked:
        yield Equal(y[along], indices[0])
        yield from picked
        return
    yield Freeze(data[along], f"{site.node.title} picks indices from it")
    for axis, source in zip(y.axes[along : along + indices.rank], indices.axes, strict=True):
        yield Equal(axis, source)
        yield Freeze(axis, f"the indices of {site.node.title}")


def _whole_parts(site: Site, axis: AxisRef, size: int, made: Sequence[AxisRef], along: int) -> Iterator[Constraint]:
    """Stored indices that are runs, as where an axis is cut and joined, or an axis with its two factors exchanged."""
    indices = site.input(1)
    if not indices.operand.is_constant or indices.rank != 1 or indices.value is None or not indices.dims[0]:
        return
    wanted = np.where(indices.value < 0, indices.value + size, indices.value).astype(np.int64)
    for outer in range(2, size // 2 + 1 if len(wanted) == size else 2):
        if size % outer == 0 and np.array_equal(wanted, np.arange(size).reshape(outer, -1).T.ravel()):
            parts = Fresh(outer, "rows"), Fresh(size // outer, "columns")
            yield Equal(axis, prod(*parts))
            yield Equal(made[along], prod(*parts[::-1]))
            yield Picked(1, parts, (1, 0), crossed=True)
            return
    starts = np.flatnonzero(np.diff(wanted, prepend=-2) != 1)
    if len(wanted) < _SHORTEST_RUN * len(starts):
        return
    lasts = np.append(starts[1:], len(wanted)) - 1
    cuts = np.unique([0, size, *wanted[starts], *(wanted[lasts] + 1)])
    pieces = tuple(Fresh(int(n), "picked together") for n in np.diff(cuts))
    order: list[int] = []
    for first, last in zip(wanted[starts], wanted[lasts], strict=True):
        order.extend(range(int(np.searchsorted(cuts, first)), int(np.searchsorted(cuts, last + 1))))
    yield Equal(axis, cat(*pieces))
    yield Equal(made[along], cat(*(pieces[i] for i in order)))
    yield Picked(1, pieces, tuple(order))


def gather_nd(site: Site) -> Iterator[Constraint]:
    """GatherND: vectors of indices pick from the first axes behind the batch; the axes behind those pass through."""
    data, indices, y = site.input(0), site.input(1), site.output()
    batch, depth = int(site.attribute("batch_dims", 0)), indices.dims[-1]
    for i in range(batch):
        yield Equal(data[i], y[i])
    yield from _places(site, indices, y.axes[: indices.rank - 1], indices.axes[:-1])
    yield from (Freeze(axis, f"{site.node.title} picks indices from it") for axis in data.axes[batch : batch + depth])
    for source, axis in zip(data.axes[batch + depth :], y.axes[indices.rank - 1 :], strict=True):
        yield Equal(source, axis)
        yield from made_here(data, source.axis)


def gather_elements(site: Site) -> Iterator[Constraint]:
    """GatherElements: every element is picked along `axis`; the other axes are those of the indices."""
    data, indices, y = site.input(0), site.input(1), site.output()
    along = int(site.attribute("axis", 0)) % data.rank
    for i in range(data.rank):
        if i == along or data.dims[i] != indices.dims[i]:
            yield Freeze(data[i], f"{site.node.title} picks indices from it")
        else:
            yield Equal(data[i], y[i])
            yield from made_here(data, i)
    yield from _places(site, indices, y.axes, indices.axes)
    yield Freeze(y[along], f"the indices of {site.node.title}")


def scatter_nd(site: Site) -> Iterator[Constraint]:
    """ScatterND: vectors of indices say where on the first axes slices are put; the axes of the slices pass through."""
    data, indices, updates, y = (*(site.input(slot) for slot in range(3)), site.output())
    depth, places = indices.dims[-1], indices.rank - 1
    yield from _places(site, indices, updates.axes[:places], indices.axes[:-1])
    for i, axis in enumerate(data.axes):
        yield Equal(axis, y[i])
        if i < depth:
            yield Freeze(axis, f"{site.node.title} writes to indices of it")
        else:
            yield Equal(updates[places + i - depth], y[i])
            yield from made_here(data, i)
            yield from made_here(updates, places + i - depth)


def scatter_elements(site: Site) -> Iterator[Constraint]:
    """ScatterElements, Scatter: elements are put somewhere along `axis`; axes that are put as a whole pass through."""
    data, indices, updates, y = (*(site.input(slot) for slot in range(3)), site.output())
    along = int(site.attribute("axis", 0)) % data.rank
    yield from _places(site, indices, updates.axes, indices.axes)
    for i, axis in enumerate(data.axes):
        yield Equal(axis, y[i])
        if i == along or indices.dims[i] != data.dims[i]:
            reason = f"{site.node.title} writes to indices of it"
            yield from (Freeze(axis, reason), Freeze(updates[i], reason))
        else:
            yield Equal(updates[i], y[i])
            yield from made_here(data, i)
            yield from made_here(updates, i)


def _places(
    site: Site, indices: Tensor, axes: Sequence[AxisRef], of_indices: Sequence[AxisRef]
) -> Iterator[Constraint]:
    """Axes that the indices give: equal to theirs, and fixed where the file stores the indices."""
    if len(of_indices) < indices.rank:
        yield Freeze(indices[-1], f"the indices of {site.node.title}")
    for axis, source in zip(axes, of_indices, strict=True):
        yield Equal(axis, source)
        if indices.is_weight or indices.value is not None:
            yield Freeze(axis, f"the indices of {site.node.title} are stored")


def tile(site: Site) -> Iterator[Constraint]:
    """Tile: whole copies of an axis one after the other, so repeats x axis."""
    x, y = site.input(0), site.output()
    for i, axis in enumerate(x.axes):
        repeats = Fresh(y.dims[i] // max(x.dims[i], 1), "repeats")
        yield Equal(y[i], prod(repeats, axis))
        yield from made_here(x, i)
        yield site.entry_size("", 1, i, repeats)


def depth_to_space(site: Site) -> Iterator[Constraint]:
    """DepthToSpace: the channels are blocks x depth (mode DCR) or depth x blocks (CRD)."""
    x, y = site.input(0), site.output()
    blocks = Fresh(int(site.attribute("blocksize")) ** 2, "blocks", f"the block size of {site.node.title}")
    crd = site.attribute("mode", b"DCR") == b"CRD"
    yield Equal(x[0], y[0])
    yield Equal(x[1], prod(y[1], blocks) if crd else prod(blocks, y[1]))
    yield from (Freeze(axis, f"a spatial axis of {site.node.title}") for axis in (*x.axes[2:], *y.axes[2:]))


def space_to_depth(site: Site) -> Iterator[Constraint]:
    """SpaceToDepth: the new channels are blocks x channels."""
    x, y = site.input(0), site.output()
    blocks = Fresh(int(site.attribute("blocksize")) ** 2, "blocks", f"the block size of {site.node.title}")
    yield Equal(x[0], y[0])
    yield Equal(y[1], prod(blocks, x[1]))
    yield from (Freeze(axis, f"a spatial axis of {site.node.title}") for axis in (*x.axes[2:], *y.axes[2:]))


RULES = (
    Rule("Gather", gather),
    Rule("GatherND", gather_nd, since=11),
    Rule("GatherElements", gather_elements, since=11),
    Rule("ScatterND", scatter_nd, since=11),
    Rule("Scatter", scatter_elements, since=9),
    Rule("ScatterElements", scatter_elements, since=11),
    Rule("Tile", tile, since=6),
    Rule("DepthToSpace", depth_to_space),
    Rule("SpaceToDepth", space_to_depth),
)

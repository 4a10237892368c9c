"""Looking up and moving blocks of indices: Gather, Tile, DepthToSpace, SpaceToDepth."""

from collections.abc import Iterator

from onnxfuse.coupling.constraints import Constraint, Equal, Freeze, Fresh, Rule, Site, Weight, prod
from onnxfuse.statistics.features import Role

__all__ = ["RULES"]


def gather(site: Site) -> Iterator[Constraint]:
    """Gather: the axes of the indices replace the axis looked up; the others pass through, as in an embedding."""
    data, indices, y = site.input(0), site.input(1), site.output()
    along = int(site.attribute("axis", 0)) % data.rank
    for i in range(data.rank):
        if i != along:
            yield Equal(data[i], y[i] if i < along else y[i + indices.rank - 1])
            if data.is_weight:
                # A table of vectors: its column c is what makes channel c.
                yield Weight(data[i], Role.PRODUCER)
    yield Freeze(data[along], f"{site.node.title} picks indices from it")
    for axis, source in zip(y.axes[along : along + indices.rank], indices.axes, strict=True):
        yield Equal(axis, source)
        yield Freeze(axis, f"the indices of {site.node.title}")


def tile(site: Site) -> Iterator[Constraint]:
    """Tile: whole copies of an axis one after the other, so repeats x axis."""
    x, y = site.input(0), site.output()
    for i, axis in enumerate(x.axes):
        repeats = Fresh(y.dims[i] // max(x.dims[i], 1), "repeats")
        yield Equal(y[i], prod(repeats, axis))
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
    Rule("Tile", tile, since=6),
    Rule("DepthToSpace", depth_to_space),
    Rule("SpaceToDepth", space_to_depth),
)

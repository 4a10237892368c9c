"""Reading a picture or a signal at other places: GridSample, RoiAlign, MaxUnpool, Col2Im, Fourier transforms.

Each channel is read by itself and in the same way, so channels pass through; the places are fixed.
"""

from collections.abc import Iterator

from onnxfuse.coupling.constraints import Constraint, Equal, Freeze, Fresh, Rule, Site, prod
from onnxfuse.coupling.rules.selection import frozen, passing

__all__ = ["RULES", "sampled"]


def sampled(site: Site) -> Iterator[Constraint]:
    """GridSample, RoiAlign, MaxRoiPool: channels pass through; batch, places and what names them are fixed."""
    x, y = site.input(0), site.output()
    yield Equal(x[1], y[1])
    for tensor in (x, y):
        for i, axis in enumerate(tensor.axes):
            if i != 1:
                yield Freeze(axis, f"{site.node.title} reads it at other places")
    for places in site.inputs[1:]:
        if places is not None:
            yield from (Freeze(axis, f"the places of {site.node.title}") for axis in places.axes)


def crop(site: Site) -> Iterator[Constraint]:
    """Crop: spatial axes lose their borders, batch and channels pass through."""
    yield from passing(site, set(range(2, site.input(0).rank)), "crops it")


def max_unpool(site: Site) -> Iterator[Constraint]:
    """MaxUnpool: frozen, since its indices count the elements of all channels."""
    yield from frozen(site)


def col2im(site: Site) -> Iterator[Constraint]:
    """Col2Im: the rows are channels x places in a block."""
    x, y = site.input(0), site.output()
    block = Fresh(x.dims[1] // max(y.dims[1], 1), "places of a block", f"the block of {site.node.title}")
    yield Equal(x[0], y[0])
    yield Equal(x[1], prod(y[1], block))
    yield from (Freeze(axis, f"a spatial axis of {site.node.title}") for axis in (*x.axes[2:], *y.axes[2:]))


def dft(site: Site) -> Iterator[Constraint]:
    """DFT: the axis transformed and the last one, real and imaginary parts, are fixed; the others pass through."""
    x = site.input(0)
    given = site.attribute("axis", 1) if site.node.version < 20 else site.integers("axis", 2)
    if site.node.version >= 20 and given is None and site.optional_input(2) is not None:
        yield from frozen(site)
        return
    along = -2 if given is None else int(given if isinstance(given, int) else given[0])
    yield from passing(site, {along % x.rank, x.rank - 1}, "transforms it")


RULES = (
    Rule("GridSample", sampled, since=16),
    Rule("RoiAlign", sampled, since=10),
    Rule("MaxRoiPool", sampled),
    # An experiment of early versions of ONNX, which ONNX Runtime still runs.
    Rule("Crop", crop),
    Rule("MaxUnpool", max_unpool, since=9),
    Rule("Col2Im", col2im, since=18),
    Rule("DFT", dft, since=17),
    Rule("STFT", frozen, since=17),
    Rule("Det", frozen, since=11),
)

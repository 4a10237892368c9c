"""Operators of ONNX Runtime's domain com.microsoft: fused forms of the standard ones, as its optimiser writes them.

Sources: ContribOperators.md of ONNX Runtime.
"""

from collections.abc import Callable, Iterator

from onnxfuse.coupling.constraints import (
    Constraint,
    Equal,
    Freeze,
    Residual,
    Rule,
    Site,
    Statistic,
    Weight,
)
from onnxfuse.coupling.rules.convolution import conv
from onnxfuse.coupling.rules.elementwise import unary
from onnxfuse.coupling.rules.indexing import gather_nd
from onnxfuse.coupling.rules.linear import gemm, product
from onnxfuse.coupling.rules.sampling import sampled
from onnxfuse.coupling.rules.selection import frozen, passing, trilu
from onnxfuse.coupling.rules.shape import pad, squeeze
from onnxfuse.graph.contributed import turned_axes
from onnxfuse.statistics.features import Role

__all__ = ["RULES"]

_DOMAIN = "com.microsoft"


def biased_activation(site: Site) -> Iterator[Constraint]:
    """BiasGelu, FastGelu, BiasSplitGelu's first half: an activation of input plus bias along the last axis."""
    yield from unary(site)
    bias = site.optional_input(1)
    if bias is not None:
        yield Equal(bias[-1], site.input(0)[-1])
        yield Weight(bias[-1], Role.BIAS)


def fused_conv(site: Site) -> Iterator[Constraint]:
    """FusedConv: a Conv with an activation, and a tensor that is added before it."""
    yield from conv(site)
    added = site.optional_input(3)
    if added is not None:
        y = site.output()
        yield from (Equal(a, b) for a, b in zip(added.axes, y.axes, strict=True))
        yield Residual(y[1])


def fused_matmul(site: Site) -> Iterator[Constraint]:
    """FusedMatMul, TransposeMatMul: MatMul whose factors may be transposed first, with a number."""
    a, b = site.input(0), site.input(1)
    yield from product(site, a, b, turned_axes(site.node, "A", a.rank), turned_axes(site.node, "B", b.rank))


def skip_layer_normalization(site: Site) -> Iterator[Constraint]:
    """SkipLayerNormalization and its RMS form: the normalised sum of input, skip and bias."""
    x, skip, y = site.input(0), site.input(1), site.output()
    has_shift = site.node.op == "SkipLayerNormalization"
    bias = site.optional_input(4 if has_shift else 3)
    for position in range(1, x.rank + 1):
        yield Equal(x[-position], y[-position])
        if position <= skip.rank and skip.dims[-position] == x.dims[-position]:
            yield Equal(skip[-position], x[-position])
    yield Residual(x[-1])
    yield Statistic(x[-1], f"the statistics of {site.node.title} run over it")
    shift = site.optional_input(3) if has_shift else None
    for parameter, role in ((site.input(2), Role.CARRIED), (shift, Role.BIAS), (bias, Role.BIAS)):
        if parameter is not None:
            yield Equal(parameter[0], x[-1])
            yield Weight(parameter[0], role)
    for extra in site.outputs[1:3]:
        if extra is not None:
            yield from (Freeze(axis, f"a statistic of {site.node.title}") for axis in extra.axes)
    total = site.outputs[3] if len(site.outputs) > 3 else None
    if total is not None:
        yield from (Equal(a, b) for a, b in zip(total.axes, x.axes, strict=True))


def embed_layer_normalization(site: Site) -> Iterator[Constraint]:
    """EmbedLayerNormalization: the normalised sum of what tables have for words, positions and segments."""
    y = site.output()
    hidden = y[-1]
    yield from (Freeze(axis, f"the tokens of {site.node.title}") for axis in y.axes[:-1])
    for slot in (0, 1, 7, 8):
        numbers = site.optional_input(slot)
        if numbers is not None:
            yield from (Freeze(axis, f"the tokens of {site.node.title}") for axis in numbers.axes)
    for table in (site.optional_input(slot) for slot in (2, 3, 4)):
        if table is not None:
            yield Freeze(table[0], f"{site.node.title} picks indices from it")
            yield Equal(table[1], hidden)
            yield Weight(table[1], Role.PRODUCER)
    yield Statistic(hidden, f"the statistics of {site.node.title} run over it")
    for slot, role in ((5, Role.CARRIED), (6, Role.BIAS)):
        yield Equal(site.input(slot)[0], hidden)
        yield Weight(site.input(slot)[0], role)
    for extra in site.outputs[1:]:
        if extra is not None and extra.rank == y.rank:
            yield Equal(extra[-1], hidden)
        if extra is not None:
            yield from (Freeze(axis, f"the tokens of {site.node.title}") for axis in extra.axes[:2])


def inverse(site: Site) -> Iterator[Constraint]:
    """Inverse: the last two axes are those of the matrices that are inverted."""
    rank = site.input(0).rank
    yield from passing(site, {rank - 2, rank - 1}, "inverts over it")


def _contrib(op: str, infer: Callable[[Site], Iterator[Constraint]]) -> Rule:
    return Rule(op, infer, since=1, domain=_DOMAIN)


RULES = (
    *(_contrib(op, unary) for op in ("Gelu", "QuickGelu", "ScaledSiLU")),
    *(_contrib(op, biased_activation) for op in ("BiasGelu", "FastGelu")),
    _contrib("FusedConv", fused_conv),
    _contrib("FusedGemm", gemm),
    *(_contrib(op, fused_matmul) for op in ("FusedMatMul", "TransposeMatMul")),
    *(_contrib(op, skip_layer_normalization) for op in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")),
    _contrib("EmbedLayerNormalization", embed_layer_normalization),
    # What was here before ONNX had it, or is still written so.
    _contrib("ExpandDims", squeeze),
    _contrib("Pad", pad),
    _contrib("GatherND", gather_nd),
    _contrib("Trilu", trilu),
    *(_contrib(op, sampled) for op in ("GridSample", "CropAndResize")),
    _contrib("Inverse", inverse),
    *(_contrib(op, frozen) for op in ("Unique", "NGramRepeatBlock")),
)

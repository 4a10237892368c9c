"""Fused attention, and rotary positions: heads x the size of a head, in ONNX's own domain and in com.microsoft.

Queries meet keys in products of computed tensors, so a head is dropped as a whole, and what is inside a head is dropped
alike from queries and keys. Values are only averaged, so what is inside a head's values may be fused. Where several
heads of queries share one of keys and values, the queries' heads are *shared heads x heads that share one*.

Sources: ContribOperators.md of ONNX Runtime; Operators.md of ONNX, Attention and RotaryEmbedding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onnxfuse.coupling.constraints import (
    AttributeSize,
    AxisRef,
    Constraint,
    Contracted,
    Default,
    Equal,
    Expr,
    Freeze,
    Fresh,
    Multiple,
    Parallel,
    Rule,
    SelectOnly,
    Site,
    Tensor,
    Weight,
    cat,
    prod,
)
from onnxfuse.statistics.features import Role

__all__ = ["RULES", "packed_attention", "packed_heads"]

_DOMAIN = "com.microsoft"
# GroupQueryAttention has kernels for heads of multiples of 8 channels, and turns multiples of 8 pairs.
_HEAD_UNIT = 8


@dataclass(frozen=True, eq=False)
class _Heads:
    """The parts of an attention's axes.

    Attributes:
        kept: The heads of keys and values.
        sharing: How many heads of queries share one of them.
        size: What queries have in a head.
        key_size: What keys have in a head: as much, but it may be another part.
        value_size: What values have in a head; may be the same part.
    """

    kept: Fresh
    sharing: Fresh
    size: Fresh
    key_size: Fresh
    value_size: Fresh

    @property
    def queries(self) -> Expr:
        """The heads of the queries."""
        return prod(self.kept, self.sharing)

    @property
    def query(self) -> Expr:
        """All heads' queries on one axis."""
        return prod(self.kept, self.sharing, self.size)

    @property
    def key(self) -> Expr:
        """All heads' keys on one axis."""
        return prod(self.kept, self.key_size)

    @property
    def value(self) -> Expr:
        """All heads' values on one axis."""
        return prod(self.kept, self.value_size)

    @property
    def result(self) -> Expr:
        """What the attention returns, on one axis."""
        return prod(self.kept, self.sharing, self.value_size)


def _heads(queries: int, kept: int, size: int, value_size: int | None = None, *, keys_apart: bool = False) -> _Heads:
    """Make the parts; without a size of their own, values have that of queries, as keys do that are not told apart."""
    if kept < 1 or queries % kept:
        what = f"{queries} heads of queries do not share {kept} heads of keys"
        raise ValueError(what)
    inside = Fresh(size, "head size")
    values = inside if value_size is None else Fresh(value_size, "value head size")
    keys = Fresh(size, "head size") if keys_apart else inside
    return _Heads(Fresh(kept, "heads"), Fresh(queries // kept, "heads that share one"), inside, keys, values)


def _scores(site: Site, heads: _Heads, query: Tensor | None = None, key: Tensor | None = None) -> Iterator[Constraint]:
    """What holds for the scores, whatever form queries and keys have; given where they are tensors of their own."""
    title = site.node.title
    yield Parallel(heads.queries, f"{title} has scores of their own for each")
    reason = f"{title} multiplies queries with keys over it"
    if query is None or key is None:
        yield Equal(heads.size, heads.key_size)
        yield SelectOnly(heads.size, reason)
    else:
        yield Contracted(heads.size, heads.key_size, reason, (query[-1], key[-1]))
    # In com.microsoft a factor of 0 means none; without one, the operator finds it by the head size that it sees.
    if not site.attribute("scale", 0.0):
        yield Default("scale", heads.size.size**-0.5, heads.size)


def _told(tensor: Tensor | None, what: str) -> Iterator[Constraint]:
    """An input or output without any channels: whatever is on its axes, stays."""
    if tensor is not None:
        yield from (Freeze(axis, what) for axis in tensor.axes)


def _bias_of_scores(site: Site, bias: Tensor | None, heads: _Heads) -> Iterator[Constraint]:
    """A mask or bias that is broadcast to batch x heads x queries x keys."""
    if bias is None:
        return
    for axis, size in enumerate(bias.dims):
        if axis == bias.rank - 3 and size == heads.kept.size * heads.sharing.size > 1:
            yield Equal(bias[axis], heads.queries)
            yield from _belongs(bias, axis)
        else:
            yield Freeze(bias[axis], f"the positions that {site.node.title} masks")


def _belongs(tensor: Tensor, axis: int) -> Iterator[Constraint]:
    """A number for each index of an axis, if it is stored, is carried along."""
    if tensor.is_weight:
        yield Weight(tensor[axis], Role.CARRIED)


def _cache(site: Site, tensor: Tensor | None, batch: AxisRef, heads: Expr, size: Expr) -> Iterator[Constraint]:
    """Keys or values of other positions: (batch, heads, positions, size)."""
    if tensor is not None:
        yield Equal(tensor[-4], batch)
        yield Equal(tensor[-3], heads)
        yield Freeze(tensor[-2], f"the positions that {site.node.title} caches")
        yield Equal(tensor[-1], size)


def _scores_out(site: Site, slot: int, batch: AxisRef, heads: Expr) -> Iterator[Constraint]:
    scores = _output(site, slot)
    if scores is not None:
        yield Equal(scores[0], batch)
        yield Equal(scores[1], heads)
        yield from (Freeze(axis, f"the positions of {site.node.title}") for axis in scores.axes[2:])


def _output(site: Site, slot: int) -> Tensor | None:
    return site.outputs[slot] if slot < len(site.outputs) else None


def _bias(axis: AxisRef, heads: _Heads) -> Iterator[Constraint]:
    yield Equal(axis, cat(heads.query, heads.key, heads.value))
    yield Weight(axis, Role.BIAS)


def attention(site: Site) -> Iterator[Constraint]:
    """Attention: one weight makes queries, keys and values, of one common size or of stated sizes."""
    x = site.input(0)
    heads = packed_heads(site)
    yield from packed_attention(site, heads)
    yield from _told(site.optional_input(3), f"the mask of {site.node.title}")
    for past in (site.optional_input(4), _output(site, 1)):
        yield from _cache(site, past, x[0], heads.kept, heads.size)
        if past is not None:
            yield Freeze(past[0], "keys and values")
            yield Equal(heads.value_size, heads.size)
    yield from _bias_of_scores(site, site.optional_input(5), heads)
    yield from _told(site.optional_input(6), f"a length that {site.node.title} is told")


def packed_heads(site: Site) -> _Heads:
    """Return the parts of an attention whose one weight makes queries, keys and values."""
    if site.attribute("do_rotary", 0) or site.attribute("past_present_share_buffer", 0):
        what = "rotary positions inside and shared buffers are not covered"
        raise ValueError(what)
    count = int(site.attribute("num_heads"))
    stated = site.attribute("qkv_hidden_sizes")
    sizes = [int(size) // count for size in stated or [site.input(1).dims[1] // 3]]
    return _heads(count, count, sizes[0], sizes[2] if stated else None)


def packed_attention(site: Site, heads: _Heads) -> Iterator[Constraint]:
    """What holds for input, weight and bias in the first three slots, for the result and for the scores."""
    x, w, y, bias = site.input(0), site.input(1), site.output(), site.optional_input(2)
    yield from (Equal(x[i], y[i]) for i in range(2))
    yield Equal(x[2], w[0])
    yield Equal(y[2], heads.result)
    yield Weight(w[0], Role.CONSUMER)
    yield Equal(w[1], cat(heads.query, heads.key, heads.value))
    yield Weight(w[1], Role.PRODUCER)
    if bias is not None:
        yield from _bias(bias[0], heads)
    yield AttributeSize("num_heads", heads.kept)
    if site.attribute("qkv_hidden_sizes"):
        for i, expr in enumerate((heads.query, heads.key, heads.value)):
            yield AttributeSize("qkv_hidden_sizes", expr, i)
    yield from _scores(site, heads)


def multi_head_attention(site: Site) -> Iterator[Constraint]:
    """MultiHeadAttention on separate queries, keys and values, with bias, masks and caches."""
    query, key, value = (site.optional_input(slot) for slot in range(3))
    y, title = site.output(), site.node.title
    if query is None or query.rank != 3 or site.optional_input(9) is not None:
        what = "packed queries and beam search inside are not covered"
        raise ValueError(what)
    count = int(site.attribute("num_heads"))
    heads = _heads(count, count, query.dims[2] // count, y.dims[2] // count, keys_apart=True)
    yield from (Equal(query[i], y[i]) for i in range(2))
    yield Equal(y[2], heads.result)
    yield Equal(query[2], heads.query)
    for tensor, inside in ((key, heads.key_size), (value, heads.value_size)):
        yield from _keys(site, tensor, query[0], heads, inside)
    if key is not None and value is not None and key.rank == value.rank == 3:
        yield Equal(key[1], value[1])
    if site.optional_input(3) is not None:
        yield from _bias(site.input(3)[0], heads)
    yield from _told(site.optional_input(4), f"the mask of {title}")
    yield from _bias_of_scores(site, site.optional_input(5), heads)
    yield from _told(site.optional_input(8), f"a length that {title} is told")
    caches = ((site.optional_input(6), _output(site, 1), heads.key_size),)
    for past, present, inside in (*caches, (site.optional_input(7), _output(site, 2), heads.value_size)):
        for cache in (past, present):
            yield from _cache(site, cache, query[0], heads.kept, inside)
    yield from _scores_out(site, 3, query[0], heads.queries)
    yield AttributeSize("num_heads", heads.kept)
    yield from _scores(site, heads, query, key)


def _keys(site: Site, tensor: Tensor | None, batch: AxisRef, heads: _Heads, inside: Fresh) -> Iterator[Constraint]:
    """Keys or values of MultiHeadAttention: of rank 3, or of rank 4 as a cache has them."""
    if tensor is None:
        return
    match tensor.rank:
        case 3:
            yield Equal(tensor[0], batch)
            yield Equal(tensor[1], tensor[1])
            yield Equal(tensor[2], prod(heads.kept, inside))
        case 4:
            yield from _cache(site, tensor, batch, heads.kept, inside)
        case _:
            what = "keys and values packed together are not covered"
            raise ValueError(what)


def group_query_attention(site: Site) -> Iterator[Constraint]:
    """GroupQueryAttention, packed or not, with rotary positions and caches; the size of a head is a multiple of 8."""
    query, key, value = site.input(0), site.optional_input(1), site.optional_input(2)
    y, title = site.output(), site.node.title
    count, kept = int(site.attribute("num_heads")), int(site.attribute("kv_num_heads"))
    heads = _heads(count, kept, y.dims[2] // count)
    yield from (Equal(query[i], y[i]) for i in range(2))
    yield Equal(y[2], heads.result)
    if key is None or value is None:
        yield Equal(query[2], cat(heads.query, heads.key, heads.value))
    else:
        yield Equal(query[2], heads.query)
        for tensor in (key, value):
            yield Equal(tensor[0], query[0])
            yield Equal(tensor[1], key[1])
            yield Equal(tensor[2], heads.key)
    if site.optional_input(7) is None:
        yield Multiple(heads.size, _HEAD_UNIT, f"{title} takes multiples of {_HEAD_UNIT} as head size")
    for cache in (site.optional_input(3), site.optional_input(4), _output(site, 1), _output(site, 2)):
        yield from _cache(site, cache, query[0], heads.kept, heads.size)
    for slot in (5, 6, 9, 12, 13):
        yield from _told(site.optional_input(slot), f"{title} is told it")
    interleaved = bool(site.attribute("rotary_interleaved", 0))
    yield from _rotated(site, (7, 8), heads.size, interleaved=interleaved, unit=_HEAD_UNIT)
    yield from _bias_of_scores(site, site.optional_input(10), heads)
    for slot, expr in ((11, heads.queries), (14, heads.size), (15, heads.size)):
        numbers = site.optional_input(slot)
        if numbers is not None:
            yield Equal(numbers[0], expr)
            yield from _belongs(numbers, 0)
    yield from _scores_out(site, 3, query[0], heads.queries)
    yield AttributeSize("num_heads", heads.queries)
    yield AttributeSize("kv_num_heads", heads.kept)
    yield from _scores(site, heads)


def standard_attention(site: Site) -> Iterator[Constraint]:
    """Attention of ONNX: queries, keys and values of rank 3 or 4, with shared heads, masks and caches."""
    query, key, value, y = site.input(0), site.input(1), site.input(2), site.output()
    if query.rank == 4:
        heads = _heads(query.dims[1], key.dims[1], query.dims[3], value.dims[3], keys_apart=True)
        yield from _apart(query, heads.queries, heads.size)
        yield from _apart(key, heads.kept, heads.key_size)
        yield from _apart(value, heads.kept, heads.value_size)
        yield from _apart(y, heads.queries, heads.value_size)
    else:
        count, kept = int(site.attribute("q_num_heads")), int(site.attribute("kv_num_heads"))
        heads = _heads(count, kept, query.dims[2] // count, value.dims[2] // kept, keys_apart=True)
        whole = ((query, heads.query), (key, heads.key), (value, heads.value), (y, heads.result))
        yield from (Equal(tensor[2], expr) for tensor, expr in whole)
    positions = 2 if query.rank == 4 else 1
    yield Equal(query[positions], y[positions])
    yield Equal(key[positions], value[positions])
    yield from (Equal(tensor[0], y[0]) for tensor in (query, key, value))
    yield from _bias_of_scores(site, site.optional_input(3), heads)
    caches = ((site.optional_input(4), _output(site, 1), heads.key_size),)
    for past, present, inside in (*caches, (site.optional_input(5), _output(site, 2), heads.value_size)):
        for cache in (past, present):
            yield from _cache(site, cache, query[0], heads.kept, inside)
    yield from _told(site.optional_input(6), f"lengths that {site.node.title} is told")
    yield from _scores_out(site, 3, query[0], heads.queries)
    for name, expr in (("q_num_heads", heads.queries), ("kv_num_heads", heads.kept)):
        if name in site.node.attributes:
            yield AttributeSize(name, expr)
    yield from _scores(site, heads, query, key)


def _apart(tensor: Tensor, count: Expr, inside: Expr) -> Iterator[Constraint]:
    yield Equal(tensor[1], count)
    yield Equal(tensor[3], inside)


def rotary_embedding(site: Site) -> Iterator[Constraint]:
    """RotaryEmbedding: pairs of channels are turned by an angle for each pair, so a pair is one channel."""
    own = site.node.domain == _DOMAIN
    x, y = site.input(0), site.output()
    slots, places = ((2, 3), 1) if own else ((1, 2), 3)
    cosines = site.input(slots[0])
    stated = int(site.attribute("rotary_embedding_dim", 0))
    yield from (Equal(a, b) for a, b in zip(x.axes, y.axes, strict=True))
    yield from _told(site.optional_input(places), f"positions that {site.node.title} is told")
    if x.rank == 4:
        inside = Fresh(x.dims[3], "head size")
        yield Equal(x[3], inside)
    else:
        # Without a number of heads, com.microsoft finds it by the tables.
        count = int(site.attribute("num_heads", 0)) or x.dims[2] // (2 * cosines.dims[-1])
        heads, inside = Fresh(count, "heads"), Fresh(x.dims[2] // count, "head size")
        yield Equal(x[2], prod(heads, inside))
        if site.attribute("num_heads", 0):
            yield AttributeSize("num_heads", heads)
    yield from _rotated(site, slots, inside, interleaved=bool(site.attribute("interleaved", 0)), stated=bool(stated))


def _rotated(
    site: Site, slots: Sequence[int], inside: Fresh, *, interleaved: bool, stated: bool = False, unit: int = 1
) -> Iterator[Constraint]:
    """Rotary positions inside heads, with tables of cosines and sines whose last axis has one entry for each pair.

    Args:
        site: The node.
        slots: Where it reads the tables.
        inside: The head size; what is behind the pairs is not turned.
        interleaved: Whether the two channels of a pair are neighbours, and not half a head apart.
        stated: Whether an attribute states how many channels are turned.
        unit: What the node wants the number of pairs to be a multiple of.
    """
    tables = [table for slot in slots if (table := site.optional_input(slot)) is not None]
    if not tables:
        return
    title = site.node.title
    pairs = Fresh(tables[0].dims[-1], "pairs of channels")
    two = Fresh(2, "the two of a pair", f"{title} turns pairs")
    turned = prod(pairs, two) if interleaved else prod(two, pairs)
    rest = Fresh(inside.size - 2 * pairs.size, "not turned")
    yield Equal(inside, cat(turned, rest))
    if unit > 1:
        yield Multiple(pairs, unit, f"{title} turns multiples of {unit} pairs")
        yield Multiple(rest, 2 * unit, f"{title} takes multiples of {2 * unit} as head size")
    yield SelectOnly(pairs, f"{title} turns each by an angle of its own")
    for table in tables:
        yield Equal(table[-1], pairs)
        yield from _belongs(table, table.rank - 1)
        yield from (Freeze(axis, f"the positions that {title} has angles for") for axis in table.axes[:-1])
    if stated:
        yield AttributeSize("rotary_embedding_dim", turned)


RULES = (
    Rule("Attention", standard_attention, since=23),
    Rule("RotaryEmbedding", rotary_embedding, since=23),
    Rule("Attention", attention, domain=_DOMAIN),
    Rule("MultiHeadAttention", multi_head_attention, domain=_DOMAIN),
    Rule("GroupQueryAttention", group_query_attention, domain=_DOMAIN),
    Rule("RotaryEmbedding", rotary_embedding, domain=_DOMAIN),
)

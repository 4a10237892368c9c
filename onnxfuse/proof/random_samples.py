"""Synthetic inputs, named as such in reports: random numbers of the right kinds, in shapes that may suit a model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxfuse.errors import UnsupportedGraphError
from onnxfuse.graph.shapes import dims_at_other_sizes
from onnxfuse.graph.symbols import is_expression, value_of
from onnxfuse.graph.view import GraphView
from onnxfuse.proof.samples import Samples, arrange, stated_dims
from onnxfuse.proof.values import needed_sizes, value_hints

__all__ = ["candidate_dims", "feeds_at_other_sizes", "samples_like", "synthetic_samples"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# Choices of symbolic dimensions that need more numbers than this for one run are not tried.
_MOST_NUMBERS = 2**26
# Sizes to try for symbolic dimensions other than the batch; the first that the model runs with is taken.
_SIZES = (64, 32, 16, 224, 8, 4, 128, 256, 512, 1, 1024, 4096, 16_000)
# For how many of them a size that is the sum of others is looked for.
_SUMS = 3
# Sizes above this are for signals of one dimension alone: of two they would make inputs that take gigabytes to run.
_LARGEST_IMAGE = 512


def synthetic_samples(
    graph: GraphView,
    dims: Mapping[str, Sequence[int]],
    seed: int,
    count: int,
    *,
    compared: bool = False,
    batch: int | None = None,
) -> Samples:
    """Make random inputs: standard normal floats, bytes over their range, indices in range, fair booleans.

    Args:
        graph: The model.
        dims: The shape of each input in one run.
        seed: Seed of the random numbers.
        count: How many samples; a batch that the model states is filled.
        compared: Whether single numbers that the graph compares with constants take, besides random values, those
            that decide the comparison, in turn; at least one sample of each is made.
        batch: How many samples the model takes at once, if it is known to take no other number; runs are filled.

    Raises:
        UnsupportedGraphError: An input is of a type that random values make no sense for, such as strings.
    """
    rng = np.random.default_rng(seed)
    arrays = {}
    hints = {name: value_hints(graph, name) for name in graph.inputs}
    deciding = {n: h.compared for n, h in hints.items() if compared and h.compared and math.prod(dims[n]) == 1}
    count = max(count, *(len(values) + 1 for values in deciding.values()), 1)
    count = -(-count // (batch or 1)) * (batch or 1)
    for name, info in graph.inputs.items():
        shape = tuple(dims[name])
        batched = _is_batched(info, shape)
        whole = (max(count, shape[0]), *shape[1:]) if batched else (count, *shape)
        arrays[name] = _random(rng, whole, info, hints[name].below)
        for turn, value in enumerate(deciding.get(name, ())):
            arrays[name][turn :: len(deciding[name]) + 1] = value
    counts = [len(a) for a in arrays.values()]
    arrays = {name: a[: min(counts)] for name, a in arrays.items()}
    origin = f"{min(counts, default=1)} synthetic samples (random numbers, seed {seed})"
    return replace(arrange(arrays, graph, "synthetic inputs", origin, batch), compared=compared)


def samples_like(graph: GraphView, samples: Samples, seed: int, count: int) -> Samples:
    """Make random inputs of the shapes of some that the model runs with, as many in a run as it takes."""
    batch = None if samples.divisible else samples.batch
    return synthetic_samples(graph, samples.dims, seed, count, compared=samples.compared, batch=batch)


def feeds_at_other_sizes(
    graph: GraphView, dims: Mapping[str, Sequence[int]], seed: int
) -> Iterator[Mapping[str, AnyArray]]:
    """Yield random inputs at other sizes of what the file leaves open behind the batch; the model may refuse them.

    Args:
        graph: The model.
        dims: The shape of each input in a run that it takes.
        seed: Seed of the random numbers.
    """
    for other in dims_at_other_sizes(graph, dims):
        if all(math.prod(shape) <= _MOST_NUMBERS for shape in other.values()):
            try:
                samples = synthetic_samples(graph, other, seed, 1)
            except UnsupportedGraphError:
                return
            yield next(samples.feeds())


def candidate_dims(graph: GraphView, *, most: float = _MOST_NUMBERS) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield choices of concrete input shapes, most likely ones first.

    Symbolic first dimensions are taken for a batch, of 1, and so are others of the same name; the rest gets one common
    size after the other. Sizes that weights demand are taken from there, and what the file says of a size, as in
    ``past_sequence_length + 1``, holds. Where it says nothing, one name after the other is tried as the sum of others.

    Args:
        graph: The model.
        most: How many numbers an input may have; choices that need more are left out.
    """
    stated = _with_batch_of_one(graph)
    free = any(d is None for dims in stated.values() for d in dims)
    tried = []
    single = all(dims.count(None) <= 1 for dims in stated.values())
    for size in (n for n in _SIZES if n <= _LARGEST_IMAGE or single) if free else _SIZES[:1]:
        for chosen in _choices(graph, stated, size):
            if chosen not in tried and all(math.prod(dims) <= most for dims in chosen.values()):
                tried.append(chosen)
                yield chosen


def _choices(
    graph: GraphView, stated: Mapping[str, Sequence[int | None]], size: int
) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the choices for one common size."""
    yield _filled(graph, stated, {}, size)
    yield _filled(graph, _with_states(graph, stated), {}, size)
    if size in _SIZES[:_SUMS]:
        names = {name: _symbols(graph, name) for name in stated}
        free = {
            names[n][i]: None for n, dims in stated.items() for i, d in enumerate(dims) if d is None and names[n][i]
        }
        # The mask of a decoder is as long as what it reads now and what it has read before, of which now may be one.
        for symbol in free if len(free) > 1 else ():
            for total in (2 * size, size + 1):
                yield _filled(graph, stated, {symbol: total}, size)


def _filled(
    graph: GraphView, stated: Mapping[str, Sequence[int | None]], known: Mapping[str, int], size: int
) -> dict[str, tuple[int, ...]]:
    """Give every dimension a size: what is known of its name, what the name itself says, or else the common one."""
    sizes: dict[str, int] = {}
    for name, dims in stated.items():
        for chosen, symbol in zip(dims, _symbols(graph, name), strict=True):
            if not is_expression(symbol):
                sizes.setdefault(symbol, known.get(symbol, size) if chosen is None else chosen)
    found = {}
    for name, dims in stated.items():
        told = (known.get(s) or (value_of(s, sizes) if is_expression(s) else None) for s in _symbols(graph, name))
        found[name] = tuple((other or size) if d is None else d for d, other in zip(dims, told, strict=True))
    return found


def _symbols(graph: GraphView, name: str) -> list[str]:
    """Return the names of an input's dimensions; empty where one has none."""
    return [dim.dim_param for dim in graph.inputs[name].type.tensor_type.shape.dim]


def _with_states(graph: GraphView, stated: Mapping[str, Sequence[int | None]]) -> dict[str, list[int | None]]:
    """Take an unnamed second dimension for a batch, of 1, where the first is stated: layers x batch x hidden size."""
    found = {}
    for name, dims in stated.items():
        symbols = _symbols(graph, name)
        behind = len(dims) > 2 and stated_dims(graph.inputs[name])[0] is not None and not symbols[1]
        found[name] = [1 if behind and i == 1 and d is None else d for i, d in enumerate(dims)]
    return found


def _with_batch_of_one(graph: GraphView) -> dict[str, list[int | None]]:
    """The stated shapes of all inputs with every batch dimension as 1; None for other dimensions that are open."""
    stated = {name: stated_dims(info) for name, info in graph.inputs.items()}
    symbols = {name: _symbols(graph, name) for name in stated}
    batches = {symbols[name][0] for name, dims in stated.items() if dims and dims[0] is None} - {""}
    filled = {}
    for name, dims in stated.items():
        needed = {axis % max(len(dims), 1): size for axis, size in needed_sizes(graph, name).items()}
        is_batch = [i == 0 or symbols[name][i] in batches for i in range(len(dims))]
        filled[name] = [d if d is not None else needed.get(i, 1 if is_batch[i] else None) for i, d in enumerate(dims)]
    return filled


def _is_batched(info: onnx.ValueInfoProto, shape: Sequence[int]) -> bool:
    """Whether the input's own first axis may run over samples: it is there, and symbolic or 1."""
    return len(shape) > 0 and (stated_dims(info)[0] is None or stated_dims(info)[0] == 1)


def _random(rng: np.random.Generator, shape: tuple[int, ...], info: onnx.ValueInfoProto, below: int | None) -> AnyArray:
    kind = info.type.tensor_type.elem_type
    if kind == TensorProto.BOOL:
        return rng.random(shape) < 0.5
    if kind in {TensorProto.UINT8, TensorProto.INT8}:
        bounds = np.iinfo(helper.tensor_dtype_to_np_dtype(kind))
        return rng.integers(bounds.min, bounds.max, shape, endpoint=True).astype(bounds.dtype)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    if dtype.kind in "iu":
        # Indices must be in range; where no table tells it, the smallest ones are.
        return rng.integers(0, 2 if below is None else max(below, 1), shape).astype(dtype)
    if kind == TensorProto.STRING:
        what = f"input {info.name!r} takes strings, and random ones make no sense"
        raise UnsupportedGraphError(what, mend="give samples with --calibration or --data")
    return rng.standard_normal(shape).astype(dtype)

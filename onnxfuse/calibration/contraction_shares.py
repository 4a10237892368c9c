"""What products of two computed tensors do for the value that they end in, seen by doing without them.

How wrong scores are says little: where an attention is nearly even, scores may be anything, and some attentions hardly
change the stream that they are added to. So a few samples run with one side multiplied by zero, one contraction at a
time. What that changes in the value that the attention ends in, relative to that value's variance, is the damage of
doing without all channels of the contraction, in the unit of all other damages.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxfuse.analysis import Analysis
from onnxfuse.calibration.batches import for_samples
from onnxfuse.calibration.linear import LinearNode, ending_of, linear_nodes
from onnxfuse.config import Provider
from onnxfuse.gradient.forward import with_outputs
from onnxfuse.graph.view import GraphView
from onnxfuse.proof.runtime import Session
from onnxfuse.proof.samples import Samples

__all__ = ["contraction_shares"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_SAMPLES = 32
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE})


def contraction_shares(
    analysis: Analysis, nodes: Iterable[int], samples: Samples, provider: Provider
) -> dict[int, float]:
    """Return what each contraction adds to the value that it ends in, as a share of that value's variance.

    Args:
        analysis: The original.
        nodes: The contractions, by index.
        samples: Inputs, of which the first few are used.
        provider: Where to run.

    Returns:
        A share ``>= 0`` for every node; 1 where it multiplies integers, or no linear layer reads what becomes of it.

    Raises:
        RuntimeFailedError: ONNX Runtime could not run the network.
    """
    linear = {node.node.index: node for node in linear_nodes(analysis.graph, analysis.channels)}
    shares = dict.fromkeys(nodes, 1.0)
    on_floats = [n for n in shares if analysis.shapes.types[analysis.graph.nodes[n].inputs[0]] in _FLOATS]
    readers = {node: found for node in on_floats if (found := _first_reader(analysis.graph, node, linear)) is not None}
    if not readers:
        return shares
    ends = {node: ending_of(found, analysis.graph, analysis.channels).value for node, found in readers.items()}
    model = with_outputs(for_samples(analysis.graph.model, samples), dict.fromkeys(ends.values()))
    switches = {node: _add_switch(model, analysis, node) for node in readers}
    session = Session(model, provider, name=f"the original model {analysis.source.name!r}")
    feeds: Mapping[str, AnyArray] = next(iter(samples.in_batches(_SAMPLES).feeds()))
    on = {name: np.ones((), dtype) for name, dtype in switches.values()}
    whole = session.run({**feeds, **on})
    for node, (name, dtype) in switches.items():
        without = session.run({**feeds, **on, name: np.zeros((), dtype)})[ends[node]]
        shares[node] = _change(whole[ends[node]], without, 1 if readers[node].is_convolution else -1)
    return shares


def _first_reader(graph: GraphView, node: int, linear: Mapping[int, LinearNode]) -> LinearNode | None:
    """Return the first layer with weights that reads what becomes of a node's result."""
    waiting, seen, found = [*graph.nodes[node].outputs], set[int](), []
    while waiting:
        for reader in graph.readers.get(waiting.pop(), ()):
            if reader.node in linear:
                found.append(reader.node)
            elif reader.node >= 0 and reader.node not in seen:
                seen.add(reader.node)
                waiting.extend(name for name in graph.nodes[reader.node].outputs if name)
    return linear[min(found)] if found else None


def _add_switch(model: onnx.ModelProto, analysis: Analysis, node: int) -> tuple[str, np.dtype[Any]]:
    """Have what a node reads first multiplied by one number, a new input; return the input's name and type."""
    result, read = (names[0] for names in (analysis.graph.nodes[node].outputs, analysis.graph.nodes[node].inputs))
    kind = analysis.shapes.types[read]
    switch, switched = f"{result} switch", f"{result} switched"
    position = next(i for i, other in enumerate(model.graph.node) if result in other.output)
    model.graph.node[position].input[0] = switched
    model.graph.node.insert(position, helper.make_node("Mul", [read, switch], [switched]))
    model.graph.input.append(helper.make_tensor_value_info(switch, kind, []))
    return switch, np.dtype(helper.tensor_dtype_to_np_dtype(kind))


def _change(whole: AnyArray, without: AnyArray, axis: int) -> float:
    """Return the power of a difference over the variance of its first term; 1 where that can't be told."""
    rows, others = (np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis]).astype(np.float64) for x in (whole, without))
    variance = float(rows.var(axis=0).sum())
    change = float(np.square(rows - others).mean(axis=0).sum())
    return change / variance if variance > 0 and np.isfinite(change / variance) else 1.0

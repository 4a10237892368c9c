"""More than one sample a run, where a file states a batch of one.

Files for phones state their batch, and what they reshape to: ``[1, 1280, 1, 1]``. Such a network computes the same for
many samples at once after those ones are left open, and a calibration is several times as fast. Whether it really does
so is tried: every value of two samples together has to be that of the two apart. The compressed file states what the
original states.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import numpy_helper

from onnxfuse.analysis import Analysis
from onnxfuse.config import Provider
from onnxfuse.errors import OnnxFuseError
from onnxfuse.gradient.forward import with_outputs
from onnxfuse.graph.view import GraphView, NodeView
from onnxfuse.proof.runtime import Session
from onnxfuse.proof.samples import Samples, whole_batches

__all__ = ["for_samples", "in_larger_runs", "open_batch"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# Rounding depends on how many samples a run has.
_TOLERANCE = 1e-4


def open_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model that takes any number of samples where it states one, as far as inputs and Reshape tell.

    Args:
        model: The model; not changed.

    Example:
        >>> text = '''<ir_version: 8, opset_import: ["" : 13]> g (float[1, 2, 3] x) => (float[1, 6] y)
        ...    <int64[2] shape = {1, 6}> { y = Reshape(x, shape) }'''
        >>> opened = open_batch(onnx.parser.parse_model(text))
        >>> session = Session(opened, Provider.CPU)
        >>> session.run({"x": np.zeros((5, 2, 3), np.float32)})["y"].shape
        (5, 6)
    """
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    del opened.graph.value_info[:]
    for info in (*opened.graph.input, *opened.graph.output):
        if _states_one(info):
            info.type.tensor_type.shape.dim[0].Clear()
    for node, shape in _stated_targets(GraphView(opened)):
        # Either what is left over, or, where that is said of another axis, what the value has there.
        shape[0] = -1 if -1 not in shape else 0
        name = f"{node.outputs[0]}<any batch>"
        opened.graph.initializer.append(numpy_helper.from_array(shape, name))
        opened.graph.node[node.index].input[1] = name
    return opened


def _states_one(info: onnx.ValueInfoProto) -> bool:
    dims = info.type.tensor_type.shape.dim
    return len(dims) > 0 and dims[0].dim_value == 1


def _stated_targets(graph: GraphView) -> Iterator[tuple[NodeView, AnyArray]]:
    """Yield the Reshape nodes of computed values whose first axis is stated to be one, with the shape they state."""
    for node in graph.nodes:
        if node.op == "Reshape" and len(node.inputs) > 1 and node.inputs[1] in graph.constants:
            shape = graph.array(node.inputs[1]).copy()
            if node.inputs[0] not in graph.constants and shape.size and shape[0] == 1:
                yield node, shape


def in_larger_runs(analysis: Analysis, samples: Samples, provider: Provider) -> Samples:
    """Return the samples with several in a run, if they have one and the network turns out to compute the same then.

    Args:
        analysis: The network.
        samples: Inputs, one in a run.
        provider: Where to run.
    """
    arrays = samples.arrays
    inputs = analysis.graph.inputs
    is_single = samples.batch == 1 and samples.count > 1 and samples.batched == set(arrays)
    if not (is_single and arrays and all(_states_one(inputs[name]) for name in arrays)):
        return samples
    batch, count = whole_batches(samples.count)
    larger = replace(
        samples,
        arrays={name: array[:count] for name, array in arrays.items()},
        dims={name: (batch, *dims[1:]) for name, dims in samples.dims.items()},
        batch=batch,
        divisible=True,
    )
    return larger if _computes_the_same(analysis, samples, provider) else samples


def for_samples(model: onnx.ModelProto, samples: Samples) -> onnx.ModelProto:
    """Return the model, or one that takes any number of samples, where those at hand ask for that."""
    if samples.divisible and any(_states_one(info) for info in model.graph.input if info.name in samples.batched):
        return open_batch(model)
    return model


def _computes_the_same(analysis: Analysis, samples: Samples, provider: Provider) -> bool:
    """Whether the opened network computes, for two samples at once, what the original does for each."""
    model = analysis.graph.model
    names = [name for node in analysis.graph.nodes for name in node.outputs if name]
    feeds = [feeds for _, feeds in zip(range(2), samples.feeds(), strict=False)]
    both = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
    try:
        single = Session(with_outputs(model, names), provider, name="the original model")
        apart = [single.run(feed) for feed in feeds]
        together = Session(with_outputs(open_batch(model), names), provider, name="the model for any batch").run(both)
    except OnnxFuseError:
        return False
    return all(_agree(together[name], apart[0][name], apart[1][name]) for name in names)


def _agree(together: Any, first: Any, second: Any) -> bool:
    """Whether a value for two samples is made of those for one, or depends on none."""
    values = (together, first, second)
    if not all(isinstance(value, np.ndarray) and value.dtype.kind in "fiub" for value in values):
        return False
    if together.shape == first.shape == second.shape:
        return all(_are_close(together, one) for one in (first, second))
    expected = np.concatenate([first, second]) if first.ndim and first.shape == second.shape else first
    if together.shape != expected.shape:
        # A shape that is computed says how many samples there are; the values that it shapes tell whether all is well.
        return together.dtype.kind in "iu" and together.ndim <= 1
    return _are_close(together, expected)


def _are_close(value: AnyArray, expected: AnyArray) -> bool:
    """Whether values are the same but for rounding, which may turn a truth value and take an integer to the next."""
    if expected.dtype.kind == "b":
        return True
    gap = np.abs(value.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0)
    most = 1.0 if expected.dtype.kind != "f" else _TOLERANCE * max(float(np.abs(expected).max(initial=0.0)), 1.0)
    return bool(gap <= most)

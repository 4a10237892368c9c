"""What a forward run has to return for a backward one, and where losses look."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnxfuse.graph.view import GraphView

__all__ = ["final_values", "loss_values", "with_outputs"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# Operators that only write down in another way what is there already.
_LAST = frozenset({"QuantizeLinear", "ZipMap"})


def final_values(graph: GraphView) -> tuple[str, ...]:
    """Return the values that a loss is a function of: the outputs, before they are quantised or put into maps."""
    found = []
    for name in graph.outputs:
        value = name
        while value in graph.producers and graph.nodes[graph.producers[value]].op in _LAST:
            value = graph.nodes[graph.producers[value]].inputs[0]
        found.append(value)
    return tuple(dict.fromkeys(found))


def loss_values(graph: GraphView, values: Mapping[str, Any]) -> dict[str, AnyArray]:
    """Return those of `final_values` that are made of floats, out of all values of a run."""
    found = {}
    for name in final_values(graph):
        value = values.get(name)
        # Types that NumPy knows only by their size, such as bfloat16, are of kind V.
        if isinstance(value, np.ndarray) and value.dtype.kind in "fV":
            found[name] = value if value.dtype.kind == "f" else value.astype(np.float32)
    return found


def with_outputs(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """Return a model that returns more values."""
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    stated = {output.name for output in model.graph.output}
    extended.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in stated)
    return extended

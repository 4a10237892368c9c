"""What a forward run has to return for a backward one, and where losses look."""

from collections.abc import Iterable

import onnx

from onnxfuse.graph.view import GraphView

__all__ = ["final_values", "with_outputs"]


def final_values(graph: GraphView) -> tuple[str, ...]:
    """Return the values that a loss is a function of: the outputs, before they are quantised if they are."""
    found = []
    for name in graph.outputs:
        value = name
        while value in graph.producers and graph.nodes[graph.producers[value]].op == "QuantizeLinear":
            value = graph.nodes[graph.producers[value]].inputs[0]
        found.append(value)
    return tuple(dict.fromkeys(found))


def with_outputs(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """Return a model that returns more values."""
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    stated = {output.name for output in model.graph.output}
    extended.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in stated)
    return extended

"""A network's values on samples, from front to back, every node run once.

A calibration asks for one value after the other and may change a weight in between. Running the whole network for each
would take time quadratic in its depth; so a walk keeps what later nodes will read, runs only the nodes in between, and
forgets what no node will read again.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxfuse.config import Provider
from onnxfuse.errors import InvariantError
from onnxfuse.graph.view import GraphView, NodeView
from onnxfuse.proof.runtime import Session
from onnxfuse.proof.samples import Samples

__all__ = ["Walk", "largest_gap"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class Walk:
    """One network on samples.

    Args:
        model: The network; not changed.
        samples: Its inputs.
        provider: Where it runs.
        name: What messages call it.

    Attributes:
        runs: In how many runs the samples go through.
    """

    def __init__(self, model: onnx.ModelProto, samples: Samples, provider: Provider, name: str = "the model") -> None:
        """Start before the first node."""
        self.graph = GraphView(model)
        self.provider = provider
        self.name = name
        self._done: set[int] = set()
        self._constants: dict[tuple[str, int], AnyArray] = {}
        feeds = list(samples.feeds())
        self.runs = len(feeds)
        # One array for every run: not every value has the samples on an axis of its own.
        self._live: dict[str, list[AnyArray]] = {name: [feed[name] for feed in feeds] for name in self.graph.inputs}

    def values(self, name: str) -> Sequence[AnyArray]:
        """Return what a value is in every run, running the nodes that it takes.

        Raises:
            InvariantError: Every node that reads it was run already, so that it is forgotten.
            RuntimeFailedError: ONNX Runtime could not run a part of the network.
        """
        if name not in self._live:
            self._advance(name)
        return self._live[name]

    def set_constant(self, output: str, slot: int, value: AnyArray) -> None:
        """Give the node that makes ``output``, which must not have run yet, another constant at an input.

        Raises:
            InvariantError: The node has run.
        """
        if self.graph.producers[output] in self._done:
            what = "a weight changes after its node has run"
            raise InvariantError(what, where=output)
        self._constants[output, slot] = value

    def constant(self, output: str, slot: int) -> AnyArray:
        """Return the constant that the node which makes ``output`` reads at an input, as it is by now."""
        changed = self._constants.get((output, slot))
        node = self.graph.nodes[self.graph.producers[output]]
        return self.graph.array(node.inputs[slot]) if changed is None else changed

    def pending(self, name: str) -> list[NodeView]:
        """Return the nodes that have to run before a value is there, in order."""
        found: set[int] = set()
        stack = [name]
        while stack:
            value = stack.pop()
            maker = self.graph.producers.get(value)
            if value in self._live or maker is None or maker in found:
                continue
            if maker in self._done:
                what = "a value is asked for after its last reader has run"
                raise InvariantError(what, where=value)
            found.add(maker)
            node = self.graph.nodes[maker]
            stack.extend(read for read in (*node.inputs, *node.captured) if read)
        return [self.graph.nodes[index] for index in sorted(found)]

    def _advance(self, name: str) -> None:
        nodes = self.pending(name)
        inside = {node.index for node in nodes}
        made = [output for node in nodes for output in node.outputs if output]
        wanted = [output for output in made if output == name or self._is_read_outside(output, inside)]
        model = self.part(nodes, wanted)
        session = Session(model, self.provider, name=f"a part of {self.name}")
        fed = [i.name for i in model.graph.input]
        results: dict[str, list[AnyArray]] = {output: [] for output in wanted}
        for run in range(self.runs):
            outputs = session.run({read: self._live[read][run] for read in fed})
            for output in wanted:
                results[output].append(outputs[output])
        self._done |= inside
        self._live.update(results)
        for value in [v for v in self._live if v != name and not self._is_read_outside(v, self._done)]:
            del self._live[value]

    def _is_read_outside(self, value: str, inside: Iterable[int]) -> bool:
        return any(reader.node not in inside for reader in self.graph.readers.get(value, ()))

    def part(
        self, nodes: Sequence[NodeView], outputs: Sequence[str], fed: Mapping[tuple[str, int], str] | None = None
    ) -> onnx.ModelProto:
        """Return some nodes as a model of their own, whose inputs are values at hand.

        Args:
            nodes: The nodes, in order; what they read from others must be at hand.
            outputs: The values that the model returns.
            fed: Constants that are inputs too, in the end: the input's name, by the first output of the node that reads
                one, and the slot.
        """
        fed = fed or {}
        source = self.graph.model
        model = onnx.ModelProto(ir_version=source.ir_version)
        model.opset_import.extend(source.opset_import)
        model.functions.extend(source.functions)
        model.graph.name = "part"
        made = {output for node in nodes for output in node.outputs}
        reads: dict[str, None] = {}
        for node in nodes:
            reads.update((name, None) for name in self._add_node(model, node, fed))
        constants = [name for name in reads if name in self.graph.constants]
        inputs = [name for name in reads if name not in self.graph.constants]
        for name in constants:
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(self.graph.constants[name])
            tensor.name = name
        for name in inputs:
            if name not in made:
                kind = helper.np_dtype_to_tensor_dtype(self._live[name][0].dtype)
                shape = [None] * self._live[name][0].ndim
                model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
        for (output, slot), name in fed.items():
            value = self.constant(output, slot)
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            model.graph.input.append(helper.make_tensor_value_info(name, kind, value.shape))
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        return model

    def _add_node(self, model: onnx.ModelProto, node: NodeView, fed: Mapping[tuple[str, int], str]) -> list[str]:
        """Add a node to a model, with the constants that it has by now; return what else it reads."""
        proto = model.graph.node.add()
        proto.CopyFrom(node.proto)
        reads = []
        for slot, read in enumerate(node.inputs):
            key = (node.outputs[0], slot)
            if key in fed:
                proto.input[slot] = fed[key]
            elif key in self._constants:
                proto.input[slot] = f"{node.outputs[0]}<{slot}>"
                model.graph.initializer.append(numpy_helper.from_array(self._constants[key], proto.input[slot]))
            elif read:
                reads.append(read)
        return [*reads, *node.captured]


def largest_gap(left: Sequence[AnyArray], right: Sequence[AnyArray]) -> float:
    """Return the largest difference of two values of the same shapes; infinite where shapes differ."""
    if any(x.shape != z.shape for x, z in zip(left, right, strict=True)):
        return float("inf")
    gaps = (np.abs(x.astype(np.float64) - z).max(initial=0.0) for x, z in zip(left, right, strict=True))
    return float(max(gaps, default=0.0))

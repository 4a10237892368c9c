"""Values of a network and their gradients on samples, batch by batch: forward, loss, backward."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxfuse.arrays import IntArray
from onnxfuse.config import Provider
from onnxfuse.errors import DataError
from onnxfuse.gradient.backward import Backward, build_backward
from onnxfuse.gradient.expressions import AnyArray, Rule
from onnxfuse.gradient.forward import final_values, loss_values, with_outputs
from onnxfuse.gradient.loss import Loss, choose_loss
from onnxfuse.gradient.rules import DEFAULT_RULES
from onnxfuse.graph.shapes import Shapes, infer_shapes
from onnxfuse.graph.view import GraphView
from onnxfuse.proof.runtime import Session
from onnxfuse.proof.samples import Samples

__all__ = ["Batch", "GradientNetwork", "stream_gradients"]

# How much memory the values and gradients of one run may take.
_MOST_BYTES = 2**29


@dataclass(frozen=True)
class Batch:
    """One run.

    Attributes:
        samples: How many samples it was for.
        values: What each value is in it, as the network computes it.
        gradients: The gradient of the loss, summed over the samples of the run, with respect to each; same shapes.
    """

    samples: int
    values: Mapping[str, AnyArray]
    gradients: Mapping[str, AnyArray]


def stream_gradients(
    graph: GraphView,
    samples: Samples,
    names: Sequence[str],
    loss: Loss | None = None,
    provider: Provider = Provider.CPU,
    *,
    labels: IntArray | None = None,
    rules: Sequence[Rule] = DEFAULT_RULES,
) -> Iterator[Batch]:
    """Run a network and its backward network on samples.

    Args:
        graph: The network.
        samples: Its inputs.
        names: Values to return with their gradients: graph inputs, computed values, or constants (weights).
        loss: The loss; None for the one that suits the network (`choose_loss`).
        provider: Where to run.
        labels: The right class of each sample, for the loss that suits; None where it is not known.
        rules: How gradients go back through each operator.

    Yields:
        One `Batch` for each run, in the order of the samples.

    Raises:
        DataError: A name is not in the network, or there is no loss for these outputs.
        RuntimeFailedError: ONNX Runtime could not run the network.
        UnsupportedGraphError: An operator between the values and the outputs has no rule.

    Example:
        >>> import onnx
        >>> from onnxfuse.proof.samples import load_samples
        >>> text = '<ir_version: 8, opset_import: ["" : 13]> g (float[n, 2] x) => (float[n, 2] y) { y = Mul(x, x) }'
        >>> graph = GraphView(onnx.parser.parse_model(text))
        >>> samples = load_samples({"x": np.array([[1.0, 2.0]], np.float32)}, graph)
        >>> run = next(stream_gradients(graph, samples, ["x"], labels=np.array([0])))
        >>> run.gradients["x"].astype(float).round(2).tolist()
        [[-1.91, 3.81]]
    """
    network = GradientNetwork(graph, samples, names, loss, provider, labels=labels, rules=rules)
    start = 0
    for feeds in network.samples.feeds():
        yield network(feeds, start)
        start += network.samples.batch


class GradientNetwork:
    """A network and its backward network, to be run on one batch after the other.

    Args:
        graph: The network.
        samples: Its inputs; they say what shapes are.
        names: Values to return with their gradients: graph inputs, computed values, or constants (weights).
        loss: The loss; None for the one that suits the network (`choose_loss`).
        provider: Where to run.
        labels: The right class of each sample, for the loss that suits; None where it is not known.
        rules: How gradients go back through each operator.

    Raises:
        DataError: A name is not in the network, or there is no loss for these outputs.
        RuntimeFailedError: ONNX Runtime could not run the network.
        UnsupportedGraphError: An operator between the values and the outputs has no rule.

    Attributes:
        samples: The inputs in batches that fit into memory; runs are to have as many samples as these.
    """

    def __init__(
        self,
        graph: GraphView,
        samples: Samples,
        names: Sequence[str],
        loss: Loss | None = None,
        provider: Provider = Provider.CPU,
        *,
        labels: IntArray | None = None,
        rules: Sequence[Rule] = DEFAULT_RULES,
    ) -> None:
        """Build both networks and load them."""
        known = {*graph.inputs, *graph.producers, *graph.constants}
        for name in names:
            if name not in known:
                what = f"the network has no value called {name!r}"
                raise DataError(what, where=name, mend="name graph inputs, outputs of nodes, or weights")
        shapes = _shapes(graph, samples)
        backward = build_backward(graph, shapes, names, rules)
        self.samples = _in_fitting_batches(graph, samples, shapes, [*backward.values, *names])
        if self.samples is not samples:
            backward = build_backward(graph, _shapes(graph, self.samples), names, rules)
        self._graph, self._names, self._backward = graph, names, backward
        self._loss = loss or choose_loss(graph, self.samples, provider, labels)
        wanted = dict.fromkeys([*backward.values, *names, *final_values(graph)])
        self._forward = Session(with_outputs(graph.model, (n for n in wanted if n in graph.producers)), provider)
        self._reverse = Session(backward.model, provider, name="the backward network") if backward.results else None
        self._constants = {name: graph.array(name) for name in names if name in graph.constants}

    def __call__(self, feeds: Mapping[str, AnyArray], start: int = 0) -> Batch:
        """Run both.

        Args:
            feeds: The inputs.
            start: How many samples there were in the batches before, for losses that know each by its number.

        Raises:
            RuntimeFailedError: ONNX Runtime could not run a network.
        """
        backward, names = self._backward, self._names
        values = {**self._constants, **feeds, **self._forward.run(feeds)}
        seeds = self._loss(loss_values(self._graph, values), start)
        found = {name: np.zeros(values[name].shape, backward.dtype) for name in backward.zeros}
        if self._reverse is not None:
            fed = {own: _cast(values[name], backward) for name, own in backward.values.items()}
            for name, own in backward.seeds.items():
                seed = seeds.get(name)
                fed[own] = np.zeros(values[name].shape, backward.dtype) if seed is None else seed.astype(backward.dtype)
            results = self._reverse.run(fed)
            found |= {name: results[own] for name, own in backward.results.items()}
        batch = self.samples.batch
        return Batch(batch, {name: values[name] for name in names}, {name: found[name] for name in names})


def _cast(value: AnyArray, backward: Backward) -> AnyArray:
    # Types that NumPy knows only by their size, such as bfloat16, are of kind V.
    return value.astype(backward.dtype, copy=False) if value.dtype.kind in "fV" else value


def _shapes(graph: GraphView, samples: Samples) -> Shapes:
    """Infer shapes at the batch of the samples; what inference can't tell is observed."""
    shapes = infer_shapes(graph, samples.dims)
    unknown = [name for name in graph.producers if name not in shapes.dims]
    if not unknown:
        return shapes
    session = Session(with_outputs(graph.model, unknown), Provider.CPU)
    results = session.run(next(samples.feeds()))
    observed = {name: results[name].shape for name in unknown if isinstance(results[name], np.ndarray)}
    return infer_shapes(graph, samples.dims, observed)


def _in_fitting_batches(graph: GraphView, samples: Samples, shapes: Shapes, names: Sequence[str]) -> Samples:
    """Return the samples in batches whose values and gradients fit into memory, where the network takes any."""
    stated = [info.type.tensor_type.shape.dim for info in graph.inputs.values()]
    if any(not dims or dims[0].dim_value > 0 for dims in stated):
        return samples
    one = 8 * sum(int(np.prod(shapes.dims[name])) for name in dict.fromkeys(names) if name in graph.producers)
    return samples.in_batches(_MOST_BYTES // max(one // samples.batch, 1))

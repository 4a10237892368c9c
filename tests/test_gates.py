"""What the gates of recurrent layers add up, and damages relative to it."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnxfuse
from onnxfuse.calibration.gates import Gates, gates_of
from onnxfuse.calibration.observe import observe_readings
from onnxfuse.calibration.sums import OutputSpread
from onnxfuse.config import Provider
from onnxfuse.fusion.weights import WeightState
from onnxfuse.statistics.damage import Reading
from tests.builders import AnyArray, Net, run_ort
from tests.families import FAMILIES
from tests.laws import analysis_of, free_groups, group_called
from tests.test_calibration import samples_for

COUNTS = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS, SAMPLES, INPUTS, UNITS = 5, 40, 6, 7


def recurrent_net(op: str, direction: str) -> onnx.ModelProto:
    """A recurrent layer alone."""
    net, ways, rows = Net(17, seed=3), 1 + (direction == "bidirectional"), COUNTS[op] * UNITS
    weights = net.weight(ways, rows, INPUTS, fan_in=INPUTS), net.weight(ways, rows, UNITS, fan_in=UNITS)
    inputs = [net.input(STEPS, SAMPLES, INPUTS), *weights, net.vector(ways, 2 * rows)]
    way: dict[str, Any] = {"hidden_size": UNITS, "direction": direction}
    way |= {"linear_before_reset": 1} if op == "GRU" else {}
    net.output(*net.many(op, inputs, 2, name="cells", **way))
    return net.model()


def gates_in(model: onnx.ModelProto) -> Gates:
    """Return the gates of the only node."""
    analysis = analysis_of(model)
    state = WeightState(analysis.graph, analysis.shapes, analysis.channels)
    found = gates_of(analysis.graph, state, analysis.graph.nodes[0])
    assert found is not None
    return found


def sigmoid(x: AnyArray) -> AnyArray:
    """The logistic function."""
    return np.asarray(1 / (1 + np.exp(-x)))


def sums_of_gates(op: str, x: AnyArray, w: AnyArray, r: AnyArray, b: AnyArray) -> AnyArray:
    """Compute a recurrent layer step by step; return W x + R h of every gate, shape (steps, samples, G H)."""
    h = c = np.zeros((x.shape[1], UNITS))
    found = []
    fixed = b.reshape(2, -1)
    for step in x:
        read, state = step @ w.T, h @ r.T
        found.append(read + state)
        gates = np.split(read + state + fixed.sum(axis=0), COUNTS[op], axis=1)
        if op == "LSTM":
            i, o, f, g = gates
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        elif op == "GRU":
            last = slice(2 * UNITS, None)
            new = np.tanh((read + fixed[0])[:, last] + sigmoid(gates[1]) * (state + fixed[1])[:, last])
            h = (1 - sigmoid(gates[0])) * new + sigmoid(gates[0]) * h
        else:
            h = np.tanh(gates[0])
    return np.stack(found)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("op", COUNTS)
def test_gates_vary_by_what_they_add_up(op: str, direction: str, *, batch_first: bool) -> None:
    """The variances are those of a computation step by step, whichever way it goes."""
    model = recurrent_net(op, direction)
    w, r, b = (numpy_helper.to_array(tensor).astype(np.float64) for tensor in model.graph.initializer)
    name = model.graph.input[0].name
    x = np.random.default_rng(1).normal(size=(STEPS, SAMPLES, INPUTS)).astype(np.float32)
    y = next(iter(run_ort(model, {name: x}).values()))
    ways = {"forward": [1], "reverse": [-1], "bidirectional": [1, -1]}[direction]
    each = [sums_of_gates(op, x[::way].astype(np.float64), w[i], r[i], b[i]) for i, way in enumerate(ways)]
    expected = np.concatenate([sums.reshape(-1, sums.shape[-1]).var(axis=0) for sums in each])
    gates = gates_in(model)
    if batch_first:
        # ONNX Runtime runs no such layers.
        gates, x, y = replace(gates, batch_first=True), x.swapaxes(0, 1), y.transpose(2, 0, 1, 3)
    spread = OutputSpread(-1)
    gates.add(spread, x, y)
    np.testing.assert_allclose(spread.variances, expected, rtol=1e-4)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_the_last_state_stands_for_all_where_no_other_is_told(direction: str) -> None:
    """It adds a share to what the gates of each step read; without a state that is all."""
    gates = gates_in(recurrent_net("GRU", direction))
    rng = np.random.default_rng(2)
    x, h = rng.normal(size=(STEPS, SAMPLES, INPUTS)), rng.normal(size=(len(gates.directions), SAMPLES, UNITS))
    alone, both, every = (OutputSpread(-1) for _ in range(3))
    gates.add(alone, x, np.zeros_like(h))
    gates.add(both, x, h)
    gates.add(every, x, np.stack([h] * STEPS))
    np.testing.assert_allclose(alone.variances, (gates.reads @ x.reshape(-1, INPUTS).T).var(axis=2).ravel(), rtol=1e-9)
    np.testing.assert_allclose(both.variances, every.variances)
    assert both.variances.mean() > 1.2 * alone.variances.mean()


def first_reading(op: str, direction: str, *, product: bool) -> Reading:
    """What a recurrent layer of one step sees of the channels before it, or a product with the same weights."""
    net, ways, rows = Net(17, seed=3), 1 + (direction == "bidirectional"), COUNTS[op] * UNITS
    h = net.node("Relu", net.gemm(net.input(1, 5, batch="n"), 8, name="first"))
    w = net.rng.normal(size=(ways, rows, 8))
    if product:
        net.output(net.node("MatMul", h, net.constant(w.reshape(-1, 8).T)))
    else:
        x, recurs = net.unsqueeze(h, [0]), net.weight(ways, rows, UNITS)
        net.output(net.node(op, x, net.constant(w), recurs, name="cells", hidden_size=UNITS, direction=direction))
    model = net.model()
    analysis = analysis_of(model)
    group = group_called(analysis, "first")
    return observe_readings(analysis, [group], samples_for(model, 300), Provider.CPU, 0)["first"][0]


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("op", COUNTS)
def test_a_layer_of_one_step_is_a_product(op: str, direction: str) -> None:
    """Without a state before, gates lose what the outputs of a product with their weights lose."""
    layer, product = (first_reading(op, direction, product=product) for product in (False, True))
    np.testing.assert_allclose(layer.strength, product.strength, rtol=1e-3)
    assert layer.damage == pytest.approx(product.damage, rel=1e-3)


@pytest.mark.parametrize("name", ["lstm", "gru", "lstm_both"])
def test_units_are_worth_no_more_than_all_that_their_readers_read(name: str) -> None:
    """The damage without any unit is at most one for each reader, but for how unsure its variance is and its mean."""
    model = FAMILIES[name].net().model()
    samples = samples_for(model, 200)
    analysis = analysis_of(model)
    for group in free_groups(analysis):
        for reading in observe_readings(analysis, [group], samples, Provider.CPU, 0)[group.name]:
            assert 0 < reading.damage < 1.5


@pytest.mark.parametrize("op", ["GRU", "RNN"])
def test_a_unit_that_never_changes_goes_for_nothing(op: str) -> None:
    """What the layer itself, and what is behind it, read of the unit goes into their biases."""
    net, gates = Net(17, seed=3), COUNTS[op]
    x = net.input(STEPS, SAMPLES, INPUTS)
    w, r, b = (
        net.rng.normal(size=(gates, UNITS, INPUTS)),
        net.rng.normal(size=(gates, UNITS, UNITS)),
        np.zeros((2, gates, UNITS)),
    )
    w[:, 2], r[:, 2], b[0, :, 2] = 0.0, 0.0, np.arctanh(0.7)
    start = np.zeros((1, SAMPLES, UNITS))
    start[:, :, 2] = 0.7
    weights = (net.constant(a.reshape(1, gates * UNITS, -1)) for a in (w * INPUTS**-0.5, r * UNITS**-0.5))
    inputs = [x, *weights, net.constant(b.reshape(1, -1)), "", net.constant(start)]
    way: dict[str, Any] = {"linear_before_reset": 1} if op == "GRU" else {}
    y = net.many(op, inputs, 1, name="cells", hidden_size=UNITS, **way)[0]
    net.output(net.matmul(net.node("Squeeze", y, net.constant(np.array([1]))), 3, name="head"))
    model = net.model()
    options: dict[str, Any] = {"refit": False, "prove": False, "provider": "cpu", "candidates": ()}
    made = onnxfuse.compress(model, keep=f"cells={UNITS - 1}", calibration=net.feeds, **options)
    report = next(group for group in made.report.groups if group.name == "cells")
    assert report.damage is not None
    assert report.damage < 1e-6
    before, after = (next(iter(run_ort(m, net.feeds).values())) for m in (model, made.model))
    np.testing.assert_allclose(after, before, atol=1e-4 * before.std())

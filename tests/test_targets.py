"""Target shapes that several nodes share are put together for each where they would have to differ."""

import numpy as np

import onnxfuse
from onnxfuse.graph.targets import with_own_targets
from onnxfuse.graph.view import GraphView
from tests.builders import Net, run_ort
from tests.laws import analysis_of, free_groups

LENGTH, WIDTH, SIZE = 5, 6, 4


def two_branches(*, is_shared: bool = True) -> Net:
    """Two layers of one width, cut into heads by one target; or by one each."""
    net = Net(18, seed=1)
    x = net.input(2, LENGTH, WIDTH, batch="n")
    read = net.node("Gather", net.node("Shape", x), net.constant(np.array([0], np.int64)), axis=0)
    target, parts = "", []
    for name in ("left", "right"):
        if not target or not is_shared:
            target = net.node("Concat", read, net.constant(np.array([LENGTH, 2, SIZE], np.int64)), axis=0)
        made = net.matmul(x, 2 * SIZE, name=name)
        like = net.reshape(made, 2, LENGTH, 2, SIZE)
        net.nodes.pop()
        parts.append(net.node("Reshape", made, target, like=like))
    mixed = net.node("Concat", net.node("Tanh", parts[0]), net.node("Relu", parts[1]), axis=3)
    net.output(net.matmul(net.reshape(mixed, -1, LENGTH, 4 * SIZE), 3, name="out"))
    return net


def test_each_gets_its_own() -> None:
    """Both layers lose channels, each another number, although the file states their width once."""
    net = two_branches()
    groups = [g.name for g in free_groups(analysis_of(net.model(), feeds=net.feeds)) if g.channels == SIZE]
    assert len(groups) == 2
    keep = [f"{groups[0]}=1", f"{groups[1]}=3"]
    result = onnxfuse.compress(net.model(), ratio=0.0, keep=keep, method="prune")
    assert {tuple(t.dims) for t in result.model.graph.initializer} >= {(WIDTH, 2 * 1), (WIDTH, 2 * 3)}


def test_the_same_numbers_come_out() -> None:
    """Nothing else is computed."""
    net = two_branches()
    found = with_own_targets(GraphView(net.model()))
    assert found is not None
    before, after = (next(iter(run_ort(model, net.feeds).values())) for model in (net.model(), found))
    np.testing.assert_array_equal(after, before)


def test_a_target_of_one_node_stays() -> None:
    """Where no target is shared there is nothing to do."""
    assert with_own_targets(GraphView(two_branches(is_shared=False).model())) is None


def test_a_shared_target_stays_where_widths_agree() -> None:
    """A file is not written in another way without need."""
    net = Net(18, seed=2)
    x = net.input(2, LENGTH, WIDTH, batch="n")
    read = net.node("Gather", net.node("Shape", x), net.constant(np.array([0], np.int64)), axis=0)
    target = net.node("Concat", read, net.constant(np.array([LENGTH, 2, SIZE], np.int64)), axis=0)
    made, parts = net.matmul(x, 2 * SIZE, name="made"), []
    for op in ("Tanh", "Relu"):
        bent = net.node(op, made)
        like = net.reshape(bent, 2, LENGTH, 2, SIZE)
        net.nodes.pop()
        parts.append(net.node("Reshape", bent, target, like=like))
    net.output(net.matmul(net.reshape(net.node("Add", *parts), -1, LENGTH, 2 * SIZE), 3, name="out"))
    assert with_own_targets(GraphView(net.model())) is not None
    analysis = analysis_of(net.model(), feeds=net.feeds)
    assert SIZE in {group.channels for group in free_groups(analysis)}
    assert analysis.graph.model is analysis.source.model

"""Matrices that several nodes read are stored once, before and after: whatever the method, the file never grows."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import pytest

import onnxfuse
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.fusion.methods import METHODS
from tests.builders import Net, initializers, run_ort
from tests.laws import analysis_of, assert_same_outputs, assert_same_shapes, free_groups, fuse


def heads(net: Net, *, normalised: bool = False) -> None:
    """One head of two layers over three resolutions, with normalisations of its own for each, or without."""
    x = net.node("Relu", net.conv(net.input(2, 3, 16, 16, batch="N"), 12, name="stem"))
    tower, last = net.weight(12, 12, 3, 3, name="tower"), net.weight(5, 12, 1, 1, name="out")
    for _ in range(3):
        h = net.conv(x, 12, weight=tower, bias=False)
        h = net.node("Relu", net.batch_norm(h) if normalised else h)
        net.output(net.conv(h, 5, 1, weight=last))
        x = net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])


def language(net: Net, *, product: bool = False) -> None:
    """An embedding that is the output layer too, as a Gemm or as a product with what is turned over."""
    ids = net.input(2, 5, batch="N", dtype=onnx.TensorProto.INT64)
    table = net.weight(40, 16, name="table")
    e = net.node("Gather", table, ids)
    h = net.node("Add", net.matmul(net.node("Relu", net.matmul(e, 24)), 16), e)
    if product:
        net.output(net.node("MatMul", h, net.node("Transpose", table, perm=[1, 0])))
    else:
        net.output(net.node("Gemm", net.reshape(h, -1, 16), table, transB=1))
        net.turned.update(net.outputs)


def again(net: Net) -> None:
    """One layer that is run three times."""
    weight = net.weight(16, 16, name="layer")
    h = net.node("Relu", net.gemm(net.input(3, 6, batch="N"), 16))
    for _ in range(3):
        h = net.node("Relu", net.node("Gemm", h, weight, net.vector(16)))
    net.output(net.gemm(h, 4))


def mirrored(net: Net) -> None:
    """An encoder whose layers are the decoder's, turned over."""
    wide, narrow = net.weight(20, 14, name="wide"), net.weight(14, 10, name="narrow")
    h = net.node("Relu", net.node("Gemm", net.input(3, 20, batch="N"), wide))
    h = net.node("Relu", net.node("Gemm", h, narrow))
    h = net.node("Relu", net.node("Gemm", h, narrow, transB=1))
    net.output(net.node("Gemm", h, wide, transB=1))


NETWORKS: Mapping[str, Callable[[Net], None]] = {
    "heads": heads,
    "normalised heads": lambda net: heads(net, normalised=True),
    "language": language,
    "language, product": lambda net: language(net, product=True),
    "again": again,
    "mirrored": mirrored,
}
every = pytest.mark.parametrize("name", NETWORKS)


def built(name: str) -> Net:
    """Write a network anew."""
    net = Net(17, seed=4)
    NETWORKS[name](net)
    return net


def matrices(model: onnx.ModelProto) -> set[str]:
    """Return the names of all constants that are more than one row."""
    return {name for name, value in initializers(model).items() if value.size > max(value.shape, default=1)}


@every
@pytest.mark.parametrize("method", sorted(METHODS))
def test_shared_matrices_stay_one(name: str, method: str) -> None:
    """No matrix is stored more often than before, and as much goes as with whole channels that are dropped."""
    net = built(name)
    model = net.model()
    result = onnxfuse.compress(model, ratio=0.3, method=method, provider="cpu", effort=0)
    assert matrices(result.model) == matrices(model)
    dropped = onnxfuse.compress(model, ratio=0.3, method="prune", provider="cpu")
    vectors = sum(value.size for value in initializers(model).values() if value.ndim == 1)
    assert result.report.after.parameters <= dropped.report.after.parameters + 3 * vectors
    assert_same_shapes(run_ort(model, net.feeds), run_ort(result.model, net.feeds))


@every
def test_permutation(name: str) -> None:
    """The channels of all readers are the same, so permuting them changes nothing."""
    net, rng = built(name), np.random.default_rng(3)
    groups = free_groups(analysis_of(net.model()))
    assert groups
    for group in groups:
        maps = {group.name: ChannelMap.permutation(rng.permutation(group.channels))}
        fused = fuse(analysis_of(net.model()), maps)
        assert_same_outputs(run_ort(net.model(), net.feeds), run_ort(fused.model, net.feeds))
        assert matrices(fused.model) == matrices(net.model())


def test_a_target_is_met() -> None:
    """A budget for parameters counts what is shared once, and holds."""
    result = onnxfuse.compress(built("heads").model(), target="params=0.5", provider="cpu", effort=0)
    assert result.report.after.parameters <= 0.5 * result.report.before.parameters


def test_equal_numbers_are_not_shared_on_purpose() -> None:
    """What was never trained is often stored once for all layers, and ties none of them."""
    net = Net(17, seed=4)
    zeros = net.constant(np.zeros((8, 8)), name="zeros")
    h = net.node("Relu", net.gemm(net.input(3, 6, batch="N"), 8, name="a"))
    h = net.node("Relu", net.node("Add", h, net.node("Gemm", h, zeros)))
    h = net.node("Relu", net.gemm(h, 8, name="b"))
    h = net.node("Relu", net.node("Add", h, net.node("Gemm", h, zeros)))
    net.output(net.gemm(h, 4))
    assert {group.name for group in free_groups(analysis_of(net.model()))} == {"a", "b"}

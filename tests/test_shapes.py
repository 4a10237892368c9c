"""Shapes and static values, against a real run."""

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import TensorProto

from onnxfuse.analysis import analyse
from onnxfuse.graph.cost import measure_cost
from onnxfuse.graph.files import read_model
from onnxfuse.graph.shapes import infer_shapes
from onnxfuse.graph.view import GraphView
from onnxfuse.proof.samples import load_samples
from tests.builders import Net, run_ort, run_ort_all
from tests.laws import analysis_of
from tests.strategies import OPSETS, RandomNet, nets

LAWS = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


class TestInference:
    """`infer_shapes` on random networks."""

    @LAWS
    @given(nets())
    def test_shapes(self, net: RandomNet) -> None:
        """Every value is inferred, and as it is in a run, whatever the batch."""
        graph = GraphView(net.model)
        for feeds in (net.feeds, net.larger):
            shapes = infer_shapes(graph, {name: array.shape for name, array in feeds.items()})
            seen = run_ort_all(net.model, feeds)
            assert {name: shapes.dims[name] for name in seen} == {name: array.shape for name, array in seen.items()}

    @LAWS
    @given(nets())
    def test_static_values(self, net: RandomNet) -> None:
        """Values that are told beforehand are those of a run; the fixed ones also of a run on another batch."""
        graph = GraphView(net.model)
        shapes = infer_shapes(graph, {name: array.shape for name, array in net.feeds.items()})
        for feeds, names in ((net.feeds, shapes.static.keys()), (net.larger, shapes.fixed)):
            seen = run_ort_all(net.model, feeds)
            for name in names & seen.keys():
                np.testing.assert_array_equal(shapes.static[name], seen[name], err_msg=name)

    def test_fixed(self) -> None:
        """What depends on the input's shape is static but not fixed, what depends on constants alone is both."""
        net = Net(17)
        h = net.conv(net.input(1, 2, 4, 4, batch="N"), 4)
        size = net.node("Shape", h)
        doubled = net.node("Mul", net.constant(np.array([1, 2], np.int64)), net.constant(np.array([2], np.int64)))
        weight = net.node("Shape", net.weight(3, 4))
        net.output(net.conv(h, 2))
        shapes = analysis_of(net.model()).shapes
        assert shapes.static[size].tolist() == [1, 4, 4, 4]
        assert size not in shapes.fixed
        assert shapes.static[doubled].tolist() == [2, 4]
        assert {doubled, weight} <= shapes.fixed

    def test_sizes_too_small_for_a_kernel_say_nothing(self) -> None:
        """A width that is known is fixed, though at the smaller sizes that are tried a kernel does not fit."""
        text = """
            <ir_version: 8, opset_import: ["" : 17]> net (float[n, 1, h] x) => (float[n, 4, k] y)
            <float[4, 1, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}> {
                y = Conv(x, w)
                all = Shape(y)
                width = Shape <start = 1, end = 2> (y)
            }"""
        shapes = infer_shapes(GraphView(onnx.parser.parse_model(text)), {"x": (2, 1, 8)})
        assert "width" in shapes.fixed
        assert shapes.moving["all"].tolist() == [True, False, True]

    @pytest.mark.parametrize(("length", "rows"), [(4, 12), (12, 12), (40, 12)])
    def test_a_table_that_is_cut_to_the_length_is_not_fixed(self, length: int, rows: int) -> None:
        """Not even at lengths from which on all of it is read; what any length leaves as it is, is."""
        text = f"""
            <ir_version: 8, opset_import: ["" : 17]> net (float[n, t, 6] x) => (float[n, t, 6] y)
            <float[{rows}, 6] table = {{{", ".join(map(str, range(6 * rows)))}}}, int64[1] zero = {{0}},
             int64[1] one = {{1}}, int64[1] nine = {{9}}> {{
                shape = Shape(x)
                length = Gather(shape, one)
                positions = Slice(table, zero, length, zero)
                bound = Min(length, nine)
                first = Slice(table, zero, nine, zero)
                y = Identity(x)
            }}"""
        shapes = infer_shapes(GraphView(onnx.parser.parse_model(text)), {"x": (1, length, 6)})
        assert {"positions", "bound", "first"} <= set(shapes.static)
        assert {"positions", "bound", "first"} & shapes.fixed == {"first"}

    @pytest.mark.parametrize(
        ("call", "extra"),
        [
            ("Gelu(x)", ""),
            ("QuickGelu(x)", ""),
            ("FastGelu(x)", ""),
            ("BiasGelu(x, bias)", ""),
            ("SkipLayerNormalization(x, x, bias)", ""),
            ("FusedMatMul(x, x)", "transB"),
            ("FusedMatMul(x, x)", "transA"),
            ("FusedMatMul(x, x)", "transBatchA = 1, transBatchB = 1, transB"),
            ("FusedMatMul(x, x)", "transBatchA = 1, transBatchB = 1, transA"),
            ("SimplifiedLayerNormalization(x, bias)", "standard"),
            ("FusedConv(x, filters)", "conv"),
        ],
    )
    def test_what_a_graph_computes_from_shapes_of_fused_operators(self, call: str, extra: str) -> None:
        """Operators that ONNX has no schema of don't stand in the way; their shapes are those of a run."""
        operator, _, reads = call.partition("(")
        attributes = f"<{extra} = 1>" if "trans" in extra else '<activation = "Relu">' * (extra == "conv")
        domain = "" if extra == "standard" else "com.microsoft."
        text = f"""
            <ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
            net (float[n, 3, 4] x) => (float[a, b, c] y, int64[3] size)
            <float[4] bias = {{1, 2, 3, 4}}, float[2, 3, 1] filters = {{1, 2, 3, 4, 5, 6}}> {{
                y = {domain}{operator}{attributes}({reads}
                size = Shape(y)
            }}"""
        model = onnx.parser.parse_model(text)
        shapes = infer_shapes(GraphView(model), {"x": (2, 3, 4)})
        seen = run_ort(model, {"x": np.ones((2, 3, 4), np.float32)})
        assert shapes.dims["y"] == seen["y"].shape
        assert shapes.types["y"] == TensorProto.FLOAT
        np.testing.assert_array_equal(shapes.static["size"], seen["size"])

    @pytest.mark.parametrize("opset", OPSETS)
    def test_values_are_those_of_the_version(self, opset: int) -> None:
        """Nodes that compute a shape are run in the form that the version has, with axes as attributes or as inputs."""
        net = Net(opset)
        x = net.input(2, 3, 4, 5, batch="N")
        sizes = net.node("Shape", x)
        number = net.node("Gather", sizes, net.constant(np.array(2, np.int64)))
        pair = net.slice(sizes, [2], [4], [0])
        parts = [net.unsqueeze(number, [0]), net.reduce("Sum", pair, [0]), net.split(sizes, [1, 3], 2, axis=0)[0]]
        parts.append(net.unsqueeze(net.squeeze(net.slice(sizes, [1], [2], [0]), [0]), [0]))
        target = net.node("Concat", *parts, axis=0)
        net.output(net.node("Cast", target, to=TensorProto.INT64))
        model = net.model()
        found = infer_shapes(GraphView(model), {"x0": (2, 3, 4, 5)})
        assert found.static[target].tolist() == [4, 9, 2, 3]
        assert run_ort(model, net.feeds)[net.outputs[0]].tolist() == [4, 9, 2, 3]

    def test_a_version_that_the_evaluator_lacks(self) -> None:
        """Of some operators the evaluator has newer versions only; a zero that is stored quantised is known."""
        net = Net(13)
        stored = net.constant(np.array(3, np.int8))
        zero = net.node("DequantizeLinear", stored, net.constant(0.5), net.constant(np.array(3, np.int8)))
        net.output(net.node("Add", net.input(2, 3), zero))
        found = infer_shapes(GraphView(net.model()), {"x0": (2, 3)})
        assert found.static[zero].tolist() == 0

    def test_observed(self) -> None:
        """What inference can't tell is read off a run, where there are samples."""
        net = Net(17)
        h = net.conv(net.input(1, 2, 4, 4), 4, name="before")
        places = net.node("NonZero", net.node("Greater", h, net.constant(-1000.0)))
        net.types[places] = net.types[net.constant(np.zeros((4, 64), np.int64))]
        count = net.node("Cast", places, to=1)
        net.output(net.node("ReduceMean", net.node("Add", count, net.constant(1.0)), axes=[0, 1], keepdims=0))
        net.output(net.conv(h, 2))
        source = read_model(net.model())
        graph = GraphView(source.model)
        assert places not in analyse(source, graph, None).shapes.dims
        assert analyse(source, graph, load_samples(net.feeds, graph)).shapes.dims[places] == (4, 64)

    def test_random_values_are_not_static(self) -> None:
        """A value that is different in every run is never taken for a constant."""
        net = Net(17)
        noise = net.node("RandomNormal", shape=[4, 1, 1])
        net.output(net.conv(net.node("Add", net.conv(net.input(1, 2, 4, 4), 4), noise), 2))
        assert noise not in analysis_of(net.model()).shapes.static


class TestCost:
    """Parameters and multiply-accumulates by hand."""

    def test_parameters(self) -> None:
        """Weights and biases count, normalisation without its statistics, and what two read once."""
        net = Net(17)
        h = net.batch_norm(net.conv(net.input(1, 2, 4, 4), 4, 3, name="first"))
        weight = net.weight(4, 4, 1, 1)
        h = net.conv(net.conv(h, 4, 1, weight=weight), 4, 1, weight=weight, bias=False)
        net.output(net.gemm(net.reshape(h, 0, -1), 3))
        cost = analysis_of(net.model()).cost
        assert cost.parameters == (4 * 2 * 9 + 4) + 2 * 4 + (16 + 4) + (64 * 3 + 3)
        assert cost.macs == 16 * (4 * 2 * 9) + 2 * 16 * 16 + 64 * 3

    def test_unknown_shapes(self) -> None:
        """What is not known costs nothing, and is no error."""
        net = Net(17)
        net.output(net.gemm(net.input(1, 4), 3))
        analysis = analysis_of(net.model())
        assert measure_cost(analysis.graph, analysis.shapes, lambda _: None).macs == 0


@pytest.mark.parametrize("op", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_the_sum_that_goes_on_beside_its_normalisation(op: str) -> None:
    """ONNX Runtime's optimiser lets the residual stream go on as the fourth output; sizes are read from it."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> net (float[n, t, 8] x) => (float[n, t, 8] y)
        <float[8] scale = {{1, 2, 3, 4, 5, 6, 7, 8}}, int64 last = {{2}}>
        {{ a, m, v, sum = com.microsoft.{op}(x, x, scale)  dims = Shape(sum)  width = Gather(dims, last)
           count = Cast <to = 1> (width)  b = Div(sum, count)  y = Add(a, b) }}
    """)
    shapes = infer_shapes(GraphView(model), {"x": (2, 5, 8)})
    assert shapes.dims["sum"] == (2, 5, 8)
    assert "width" in shapes.fixed

"""The laws that hold for every network, as assertions; each of them is shown to fail on what is wrong in test_laws.

Nothing here knows how the package finds or fuses channels: networks are run before and after, and compared.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnxfuse.analysis import Analysis, analyse
from onnxfuse.arrays import IntArray
from onnxfuse.coupling.constraints import Rule
from onnxfuse.coupling.groups import CouplingGroup, ParameterAxis
from onnxfuse.coupling.rules import DEFAULT_RULES
from onnxfuse.coupling.sets import Places, places, sets_first
from onnxfuse.coupling.solve import solve_coupling
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.fusion.rewrite import collect_edits, new_sizes
from onnxfuse.fusion.weights import WeightState
from onnxfuse.graph.cost import measure_cost
from onnxfuse.graph.edits import apply_edits
from onnxfuse.graph.files import read_model
from onnxfuse.graph.view import GraphView, Operand
from onnxfuse.proof.samples import load_samples
from onnxfuse.statistics.features import Role
from tests.builders import AnyArray, Arrays, initializers, run_ort_all

__all__ = [
    "TOLERANCE",
    "Fused",
    "analysis_of",
    "assert_only_weights_differ",
    "assert_predicted",
    "assert_same_bytes",
    "assert_same_outputs",
    "assert_same_shapes",
    "assert_same_weights",
    "assert_valid",
    "free_groups",
    "fuse",
    "fused_outputs",
    "group_called",
    "macs_of_run",
    "with_copies",
    "with_unread",
]

# Largest difference of two outputs over their largest value. A permutation only changes the order of sums: float32 has
# 24 bits, so 1e-5 leaves a factor of 100 for depth; float16 has 11.
TOLERANCE: Mapping[str, float] = {"float64": 1e-11, "float32": 1e-5, "float16": 3e-2}


@dataclass(frozen=True)
class Fused:
    """A rewritten model, with what is needed to judge it."""

    analysis: Analysis
    state: WeightState
    model: onnx.ModelProto


def analysis_of(
    model: onnx.ModelProto, rules: tuple[Rule, ...] = DEFAULT_RULES, *, feeds: Arrays | None = None
) -> Analysis:
    """Analyse a model by its stated shapes and, if there are feeds, a run; with other rules if they are given."""
    source = read_model(model)
    graph = GraphView(source.model)
    found = analyse(source, graph, None if feeds is None else load_samples(feeds, graph))
    if rules is DEFAULT_RULES:
        return found
    channels = solve_coupling(found.graph, found.shapes, rules)
    return Analysis(found.source, found.graph, found.shapes, found.input_dims, channels, found.cost)


def free_groups(analysis: Analysis) -> list[CouplingGroup]:
    """Return the groups that may change."""
    return [group for group in analysis.channels.groups if not group.frozen]


def group_called(analysis: Analysis, name: str) -> CouplingGroup:
    """Return the one group of that name."""
    return next(group for group in analysis.channels.groups if group.name == name)


def fuse(analysis: Analysis, maps: Mapping[str, ChannelMap]) -> Fused:
    """Apply maps, by the name of the group, and rewrite the model."""
    state = WeightState(analysis.graph, analysis.shapes, analysis.channels)
    for group in sets_first(analysis.channels.groups, lambda group: group):
        if group.name in maps:
            state.fuse(group, maps[group.name])
    edits = collect_edits(analysis.graph, analysis.shapes, analysis.channels, state)
    model = apply_edits(analysis.graph, edits, new_sizes(analysis.channels, state))
    return Fused(analysis, state, model)


def fused_outputs(
    model: onnx.ModelProto, maps: Mapping[str, ChannelMap], feeds: Arrays, run: Callable[..., Mapping[str, AnyArray]]
) -> Mapping[str, AnyArray]:
    """Apply maps to a model and run the result."""
    return run(fuse(analysis_of(model), maps).model, feeds)


# Networks of which something is known -------------------------------------------------------------------------------


def _where(analysis: Analysis, group: CouplingGroup, parameter: ParameterAxis) -> Places:
    where = places(analysis.channels.layouts[parameter.operand], parameter.axis, group, {})
    assert where.index.size, "the group is from another analysis"
    return where


def _change_rows(array: AnyArray, where: Places, change: Callable[[AnyArray], None]) -> None:
    """Let a function change an array in place, seen with the axes of the channels as one, which is the first."""
    moved = np.moveaxis(array, where.axes, range(len(where.axes)))
    rows = moved.reshape(-1, *moved.shape[len(where.axes) :]).copy()
    change(rows)
    moved[...] = rows.reshape(moved.shape)


def _replaced(model: onnx.ModelProto, values: Mapping[str, AnyArray]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensors = [(t.name, t) for t in copy.graph.initializer]
    for node in copy.graph.node:
        stored = [a.t for a in node.attribute if node.op_type == "Constant" and a.name == "value"]
        tensors.extend((node.output[0], t) for t in stored)
    for name, tensor in tensors:
        if name in values:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values[name], name))
    return copy


def with_copies(
    analysis: Analysis, group: CouplingGroup, labels: IntArray, *, readers: bool = False
) -> onnx.ModelProto | None:
    """Make the channels of a group copies of each other where their labels are equal.

    Args:
        analysis: The analysis of the model.
        group: The group.
        labels: One for every channel, the same in every set of channels; or one for every channel of all sets, set by
            set, different in different sets.
        readers: Whether what reads copies is made alike too.

    Returns:
        The model with other weights; None if some of them are not stored as they are read.
    """
    values = initializers(analysis.source.model)
    changed: dict[str, AnyArray] = {}
    if len(labels) < group.sets * group.channels:
        labels = np.concatenate([labels + number * group.channels for number in range(group.sets)])
    first = np.array([np.flatnonzero(labels == label)[0] for label in labels])
    for parameter in group.parameters:
        if parameter.role is Role.CONSUMER and not readers:
            continue
        name = parameter.operand.name
        if name not in values:
            return None
        array = changed.setdefault(name, values[name].copy())
        where = _where(analysis, group, parameter)

        def copy(rows: AnyArray, index: IntArray = where.index) -> None:
            rows[index.ravel()] = rows[index[first].ravel()]

        _change_rows(array, where, copy)
    return _replaced(analysis.source.model, changed)


def with_unread(analysis: Analysis, group: CouplingGroup, dropped: IntArray) -> onnx.ModelProto | None:
    """Make the consumers' weights for some channels, of all sets in a row, zero, so that nothing reads them.

    Of a contraction the mirrored side takes the place of consumers.

    Returns:
        The model with other weights; None if some of them are not stored as they are read.
    """
    values = initializers(analysis.source.model)
    changed: dict[str, AnyArray] = {}
    for parameter in group.parameters:
        mirrored = group.mirrored.get((parameter.operand, parameter.axis))
        if parameter.role is not Role.CONSUMER and (mirrored is None or not mirrored.any()):
            continue
        name = parameter.operand.name
        if name not in values:
            return None
        array = changed.setdefault(name, values[name].copy())
        where = _where(analysis, group, parameter)
        columns = where.index if mirrored is None else where.index[:, mirrored]

        def forget(rows: AnyArray, index: IntArray = columns[dropped]) -> None:
            rows[index.ravel()] = 0

        _change_rows(array, where, forget)
    return _replaced(analysis.source.model, changed)


# Assertions ---------------------------------------------------------------------------------------------------------


def assert_same_outputs(expected: Arrays, actual: Arrays, *, tolerance: float | None = None) -> None:
    """Assert that two runs say the same: names, shapes, types, NaN where NaN was, and values nearly.

    Differences are measured against the largest value of all outputs, and against a thousandth where all are tiny.
    """
    assert expected.keys() == actual.keys()
    for name, want in expected.items():
        got = actual[name]
        assert (got.shape, got.dtype) == (want.shape, want.dtype), name
        if want.dtype.kind != "f":
            np.testing.assert_array_equal(got, want, err_msg=name)
            continue
        limit = TOLERANCE[want.dtype.name] if tolerance is None else tolerance
        both = np.nan_to_num(np.abs(want.astype(np.float64)), nan=0.0, posinf=0.0)
        scale = max(float(both.max(initial=0.0)), 1e-3)
        np.testing.assert_allclose(
            got.astype(np.float64), want.astype(np.float64), rtol=0, atol=limit * scale, err_msg=name
        )


def assert_same_shapes(expected: Arrays, actual: Arrays) -> None:
    """Assert that two runs have results of the same names and shapes."""
    assert {n: a.shape for n, a in expected.items()} == {n: a.shape for n, a in actual.items()}


def assert_same_weights(original: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Assert that every constant is the same, bit by bit."""
    before, after = initializers(original), initializers(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert (value.shape, value.dtype) == (after[name].shape, after[name].dtype), name
        assert value.tobytes() == after[name].tobytes(), name


def assert_same_bytes(original: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Assert that two models are the same in everything but the entries that onnxfuse adds to the metadata."""
    assert _plain(original) == _plain(model)


def _plain(model: onnx.ModelProto) -> bytes:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    entries = [(p.key, p.value) for p in copy.metadata_props if not p.key.startswith("onnxfuse")]
    del copy.metadata_props[:]
    for key, value in entries:
        copy.metadata_props.add(key=key, value=value)
    data: bytes = copy.SerializeToString(deterministic=True)
    return data


# Attributes that a node may leave out where the file relies on their default, and that are written down once the size
# that the default follows from has changed.
_TURNING = frozenset({"Gather", "Reshape", "Transpose", "Unsqueeze"})
_WRITTEN_DOWN = {"Attention": {"scale"}, "MultiHeadAttention": {"scale"}, "GroupQueryAttention": {"scale"}}


def assert_only_weights_differ(original: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Assert that a rewritten model has the nodes, names, versions, interface and documentation of the original.

    Nodes that compute a target shape from other shapes do not count: a constant may have replaced them. Nor does that
    stacked projections are cut apart, which has tests of its own.
    """
    original = analysis_of(original).graph.model
    sizes = _computed_sizes(original)

    def frame(proto: onnx.ModelProto) -> list[object]:
        weights = set(initializers(proto))
        nodes = [n for n in proto.graph.node if n.op_type != "Constant" and not sizes.issuperset(n.output)]
        return [
            proto.ir_version,
            sorted((o.domain, o.version) for o in proto.opset_import),
            (proto.producer_name, proto.producer_version, proto.domain, proto.model_version, proto.doc_string),
            [(p.key, p.value) for p in proto.metadata_props if not p.key.startswith("onnxfuse")],
            (proto.graph.name, proto.graph.doc_string),
            [i.SerializeToString(deterministic=True) for i in proto.graph.input if i.name not in weights],
            [o.SerializeToString(deterministic=True) for o in proto.graph.output],
            [(n.name, n.op_type, n.domain, list(n.output), n.doc_string) for n in nodes],
            [[i for i in n.input if i not in weights | sizes] for n in nodes],
            [sorted({a.name for a in n.attribute} - _WRITTEN_DOWN.get(n.op_type, set())) for n in nodes],
            [f.SerializeToString(deterministic=True) for f in proto.functions],
        ]

    for before, after in zip(frame(original), frame(model), strict=True):
        assert before == after


def _computed_sizes(model: onnx.ModelProto) -> set[str]:
    """Return the values that are computed from sizes and constants, which a constant may take the place of."""
    known = set(initializers(model))
    found: set[str] = set()
    for node in model.graph.node:
        is_known = found | known >= set(node.input) - {""}
        # A table that is looked up or turned, such as that of relative positions, may be stored as it is read.
        follows = is_known and (found & set(node.input) or (node.input and node.op_type in _TURNING))
        if node.op_type in {"Shape", "Size"} or follows:
            found.update(node.output)
    return found


def assert_valid(model: onnx.ModelProto) -> None:
    """Assert that ONNX's own checker, shapes included, has nothing to say."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise AssertionError(str(error)) from error


def assert_predicted(fused: Fused, feeds: Arrays) -> None:
    """Assert that the written model has the shapes and the cost that were predicted for it.

    The feeds have the input shapes of the analysis; the model is run with every value as an output.
    """
    graph, shapes = fused.analysis.graph, fused.analysis.shapes
    channels, widths = fused.analysis.channels, fused.state.widths
    seen = {name: value.shape for name, value in run_ort_all(fused.model, feeds).items()}
    for name, dims in seen.items():
        if Operand(name) in channels.layouts:
            assert channels.dims(Operand(name), widths) == dims, f"{name} is {dims}"

    def predicted(operand: Operand) -> tuple[int, ...] | None:
        if operand in channels.layouts:
            return channels.dims(operand, widths)
        return shapes.dims.get(operand.name)

    cost = measure_cost(graph, shapes, predicted)
    assert cost.macs == macs_of_run(fused.model, feeds)
    stored = {name: value.shape for name, value in initializers(fused.model).items()}
    for operand in channels.layouts:
        if operand.is_constant:
            node = next(n for n in fused.model.graph.node if _same_node(n, graph.nodes[operand.node].outputs))
            name = node.input[operand.slot]
            if name in stored:
                assert channels.dims(operand, widths) == stored[name], name


def _same_node(proto: onnx.NodeProto, outputs: tuple[str, ...]) -> bool:
    return tuple(proto.output) == outputs


def macs_of_run(model: onnx.ModelProto, feeds: Arrays) -> int:
    """Count the multiply-accumulates of convolutions and products by the shapes of a real run, one by one."""
    seen = {**run_ort_all(model, feeds), **initializers(model), **feeds}
    dims = {name: list(array.shape) for name, array in seen.items()}
    total = 0
    for node in model.graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        shape = [dims[name] if name else [] for name in node.input]
        match f"{node.domain}:{node.op_type}":
            case ":Conv" | ":ConvInteger" | "com.microsoft:FusedConv":
                n, out, *space = dims[node.output[0]]
                total += n * out * math.prod(space) * math.prod(shape[1][1:])
            case ":QLinearConv" | "com.microsoft:QLinearConv":
                total += math.prod(dims[node.output[0]]) * math.prod(shape[3][1:])
            case ":ConvTranspose":
                n, into, *space = shape[0]
                total += n * into * math.prod(space) * math.prod(shape[1][1:])
            case ":Gemm" | "com.microsoft:QGemm":
                rows, columns = dims[node.output[0]]
                total += rows * columns * shape[0][0 if attributes.get("transA") else 1]
            case ":MatMul" | ":MatMulInteger" | ":QLinearMatMul":
                total += math.prod(dims[node.output[0]]) * shape[0][-1]
            case (
                "com.microsoft:MatMulNBits"
                | "com.microsoft:DynamicQuantizeMatMul"
                | "com.microsoft:MatMulIntegerToFloat"
            ):
                total += math.prod(dims[node.output[0]]) * shape[0][-1]
            case ":LSTM" | ":GRU" | ":RNN":
                steps, batch, _ = shape[0]
                total += steps * batch * (math.prod(shape[1]) + math.prod(shape[2]))
            case _:
                total += _macs_of_fused(node, attributes, shape, dims[node.output[0]] if node.output else [])
    return total


def _macs_of_fused(node: onnx.NodeProto, attributes: Mapping[str, Any], x: list[list[int]], y: list[int]) -> int:
    """Count those of other operators that multiply two computed tensors, or may do so; the others have none."""
    match f"{node.domain}:{node.op_type}":
        case "com.microsoft:FusedMatMul" | "com.microsoft:TransposeMatMul":
            rows = 0 if attributes.get("transBatchA") else -2
            return math.prod(y) * x[0][rows if attributes.get("transA") else -1]
        case ":Einsum" if b"." not in attributes["equation"] and len(x) > 1:
            # Every product of ones adds one to the sum.
            return int(np.einsum(attributes["equation"].decode(), *map(np.ones, x)).sum())
        case "com.microsoft:Attention" | "com.microsoft:QAttention":
            batch, length, width = x[0]
            return batch * length * (width * x[1][1] + 2 * length * y[2])
        case "com.microsoft:MultiHeadAttention" | "com.microsoft:GroupQueryAttention" | ":Attention" if x[1]:
            return x[1][-2] * (math.prod(x[0]) + math.prod(y))
    return 0

"""Building small ONNX models with pinned versions, and running them: in ONNX Runtime and in ONNX's own evaluator."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, defs, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from onnxfuse.graph.unsigned import with_unsigned_weights
from onnxfuse.proof.runtime import bytes_overflow

__all__ = [
    "AnyArray",
    "Arrays",
    "Net",
    "Style",
    "as_ir_version",
    "initializers",
    "run_ort",
    "run_ort_all",
    "run_reference",
    "value_names",
]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Arrays: TypeAlias = Mapping[str, AnyArray]
Style: TypeAlias = Literal["initializer", "input", "node"]

_CONSTANTS_ARE_INPUTS_BELOW = 4


def as_ir_version(opset: int) -> int:
    """Return an IR version that goes with an operator set, and that ONNX Runtime takes."""
    if opset < 9:
        return 3
    return 8 if opset < 21 else 10


class Net:
    """A model that is written node by node, and that knows the shape of every value on the way.

    Operators whose attributes have become inputs over time have a method each, which does what the version asks for.

    Attributes:
        opset: Version of ONNX's operator set.
        rng: Source of weights.
        style: How constants are stored from here on.
        stored: Element type that weights are stored in; a Cast follows them where it is not that of the net.
        stated: Values whose shape the file states.
        turned: Values whose first axis is not the batch.
        types: Type of every value.
        values: Every constant.
    """

    def __init__(
        self,
        opset: int = 17,
        *,
        seed: int = 0,
        ir_version: int | None = None,
        dtype: int = TensorProto.FLOAT,
        style: Style = "initializer",
    ) -> None:
        """Start an empty net."""
        self.opset = opset
        self.rng = np.random.default_rng(seed)
        self.ir_version = as_ir_version(opset) if ir_version is None else ir_version
        self.dtype = dtype
        self.stored = dtype
        self.style: Style = "input" if self.ir_version < _CONSTANTS_ARE_INPUTS_BELOW else style
        self.types: dict[str, onnx.TypeProto] = {}
        self.values: dict[str, AnyArray] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[str] = []
        self.feeds: dict[str, AnyArray] = {}
        self.domains: dict[str, int] = {}
        self.functions: list[onnx.FunctionProto] = []
        self.symbolic: str = ""
        self.stated: list[str] = []
        self.turned: set[str] = set()

    # Values ------------------------------------------------------------------------------------------------------

    def input(self, *dims: int, batch: str = "", name: str = "", dtype: int | None = None) -> str:
        """Add a graph input; ``batch`` names the first axis, which then stays open."""
        name = name or f"x{len(self.feeds)}"
        kind = self.dtype if dtype is None else dtype
        stated: list[int | str] = [batch, *dims[1:]] if batch else list(dims)
        self.symbolic = batch
        self.inputs.append(helper.make_tensor_value_info(name, kind, stated))
        self.types[name] = helper.make_tensor_type_proto(kind, dims)
        kind_of = helper.tensor_dtype_to_np_dtype(kind)
        feed = self.rng.standard_normal(dims) if kind_of.kind != "i" else self.rng.integers(0, 2, dims)
        self.feeds[name] = feed.astype(kind_of)
        return name

    def constant(self, value: Any, *, name: str = "", dtype: int | None = None) -> str:
        """Add a constant, of the net's own type if it is made of floats."""
        array = np.asarray(value)
        if array.dtype.kind == "f":
            array = array.astype(helper.tensor_dtype_to_np_dtype(self.dtype if dtype is None else dtype))
        name = name or f"k{len(self.values)}"
        tensor = numpy_helper.from_array(array, name)
        self.values[name] = array
        self.types[name] = helper.make_tensor_type_proto(tensor.data_type, array.shape)
        if self.style == "node":
            self.nodes.append(helper.make_node("Constant", [], [name], name=f"{name}_node", value=tensor))
            return name
        self.initializers.append(tensor)
        if self.style == "input":
            self.inputs.append(helper.make_tensor_value_info(name, tensor.data_type, array.shape))
        return name

    def weight(self, *dims: int, name: str = "", fan_in: int = 0) -> str:
        """Add a random weight, scaled so that what it makes stays of order one, and cast if it is stored otherwise."""
        fan = fan_in or int(np.prod(dims[1:])) or 1
        value = self.rng.standard_normal(dims) * np.sqrt(2.0 / fan)
        if self.stored == self.dtype:
            return self.constant(value, name=name)
        stored = self.constant(value, name=f"{name}_stored" if name else "", dtype=self.stored)
        return self.node("Cast", stored, to=self.dtype)

    def vector(self, *dims: int, low: float = -0.5, high: float = 0.5, name: str = "") -> str:
        """Add a constant of uniform random numbers."""
        return self.constant(self.rng.uniform(low, high, dims), name=name)

    def dims(self, name: str) -> tuple[int, ...]:
        """Return the shape of a value."""
        return tuple(d.dim_value for d in self.types[name].tensor_type.shape.dim)

    def channels(self, name: str) -> int:
        """Return the size of axis 1 of a value."""
        return self.dims(name)[1]

    # Nodes -------------------------------------------------------------------------------------------------------

    def many(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: int,
        *,
        name: str = "",
        domain: str = "",
        like: str = "",
        **attributes: Any,
    ) -> tuple[str, ...]:
        """Add a node with any number of outputs; with ``like``, they have that value's type."""
        made = tuple(f"v{len(self.types)}_{i}" for i in range(outputs))
        name = name or f"{op.lower()}{len(self.nodes)}"
        given = {key: value for key, value in attributes.items() if value is not None}
        node = helper.make_node(op, list(inputs), list(made), name=name, domain=domain, **given)
        self.nodes.append(node)
        if like:
            self.types.update(dict.fromkeys(made, self.types[like]))
            return made
        data = {i: numpy_helper.from_array(self.values[i], i) for i in inputs if i in self.values}
        inferred = shape_inference.infer_node_outputs(
            defs.get_schema(op, self.opset, domain),
            node,
            {i: self.types[i] for i in inputs if i},
            data,
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=self.ir_version,
        )
        self.types.update({name: inferred[name] for name in made if name in inferred})
        return made

    def node(self, op: str, *inputs: str, name: str = "", domain: str = "", like: str = "", **attributes: Any) -> str:
        """Add a node with one output."""
        return self.many(op, inputs, 1, name=name, domain=domain, like=like, **attributes)[0]

    def conv(
        self,
        x: str,
        channels: int,
        kernel: int | Sequence[int] = 3,
        *,
        bias: bool = True,
        group: int = 1,
        name: str = "",
        weight: str = "",
        **attributes: Any,
    ) -> str:
        """Add a convolution; it keeps the spatial size if nothing is said about pads and strides."""
        rank = len(self.dims(x)) - 2
        taps = [kernel] * rank if isinstance(kernel, int) else list(kernel)
        if not attributes and any(k % 2 for k in taps):
            attributes = {"pads": [k // 2 for k in taps] * 2}
        weight = weight or self.weight(channels, self.channels(x) // group, *taps, name=f"{name}_w" if name else "")
        inputs = [x, weight, *([self.vector(channels)] if bias else [])]
        return self.node("Conv", *inputs, name=name, group=group if group > 1 else None, **attributes)

    def conv_transpose(
        self, x: str, channels: int, kernel: int = 2, *, bias: bool = True, group: int = 1, name: str = "", **more: Any
    ) -> str:
        """Add a transposed convolution."""
        rank = len(self.dims(x)) - 2
        weight = self.weight(self.channels(x), channels // group, *[kernel] * rank, fan_in=self.channels(x))
        inputs = [x, weight, *([self.vector(channels)] if bias else [])]
        return self.node("ConvTranspose", *inputs, name=name, group=group if group > 1 else None, **more)

    def gemm(self, x: str, channels: int, *, bias: bool = True, name: str = "", **attributes: Any) -> str:
        """Add a Gemm; its weight is (channels, inputs) with ``transB``."""
        inner = self.dims(x)[0 if attributes.get("transA") else 1]
        shape = (channels, inner) if attributes.get("transB") else (inner, channels)
        weight = self.weight(*shape, fan_in=inner, name=f"{name}_w" if name else "")
        c = [self.vector(channels)] if bias else []
        return self.node("Gemm", x, weight, *c, name=name, **attributes)

    def matmul(self, x: str, channels: int, *, bias: bool = True, name: str = "") -> str:
        """Add a product with a constant on the right, and a bias."""
        y = self.node("MatMul", x, self.weight(self.dims(x)[-1], channels, fan_in=self.dims(x)[-1]), name=name)
        return self.node("Add", y, self.vector(channels)) if bias else y

    def batch_norm(
        self, x: str, *, name: str = "", epsilon: float | None = None, parameters: Sequence[str] = ()
    ) -> str:
        """Add a batch normalisation with statistics of its own, unless parameters are given."""
        c = self.channels(x)
        given = parameters or (
            self.vector(c, low=-1.5, high=1.5),
            self.vector(c),
            self.vector(c),
            self.vector(c, low=0.2, high=2.0),
        )
        return self.node("BatchNormalization", x, *given, name=name, epsilon=epsilon)

    # Operators that have changed their form -----------------------------------------------------------------------

    def _integers(
        self, op: str, x: str, since: int, slots: Mapping[str, Sequence[int] | None], name: str, **attributes: Any
    ) -> str:
        """Add a node whose integers are attributes before version ``since`` and inputs from it on."""
        if self.opset < since:
            stated: dict[str, Any] = {**slots, **attributes}
            return self.node(op, x, name=name, **stated)
        inputs = ["" if v is None else self.constant(np.array(v, np.int64)) for v in slots.values()]
        while inputs and not inputs[-1]:
            inputs.pop()
        return self.node(op, x, *inputs, name=name, **attributes)

    def reshape(self, x: str, *target: int, name: str = "") -> str:
        """Add a Reshape to a stated target."""
        return self.node("Reshape", x, self.constant(np.array(target, np.int64)), name=name)

    def squeeze(self, x: str, axes: Sequence[int] | None, name: str = "") -> str:
        """Add a Squeeze."""
        return self._integers("Squeeze", x, 13, {"axes": axes}, name)

    def unsqueeze(self, x: str, axes: Sequence[int], name: str = "") -> str:
        """Add an Unsqueeze."""
        return self._integers("Unsqueeze", x, 13, {"axes": axes}, name)

    def reduce(self, kind: str, x: str, axes: Sequence[int] | None, *, keepdims: int = 1, name: str = "") -> str:
        """Add a reduction, such as ``Mean``."""
        since = 13 if kind == "Sum" else 18
        return self._integers(f"Reduce{kind}", x, since, {"axes": axes}, name, keepdims=keepdims)

    def slice(
        self,
        x: str,
        starts: Sequence[int],
        ends: Sequence[int],
        axes: Sequence[int] | None,
        steps: Sequence[int] | None = None,
        name: str = "",
    ) -> str:
        """Add a Slice."""
        slots: dict[str, Sequence[int] | None] = {"starts": starts, "ends": ends, "axes": axes}
        if steps is not None:
            slots["steps"] = steps
        return self._integers("Slice", x, 10, slots, name)

    def pad(self, x: str, pads: Sequence[int], *, value: float | None = None, mode: str = "", name: str = "") -> str:
        """Add a Pad."""
        if self.opset < 11:
            return self.node("Pad", x, name=name, pads=pads, value=value, mode=mode or None)
        inputs = [x, self.constant(np.array(pads, np.int64)), *([] if value is None else [self.constant(value)])]
        return self.node("Pad", *inputs, name=name, mode=mode or None)

    def split(
        self, x: str, sizes: Sequence[int] | None, parts: int, *, axis: int = 1, name: str = ""
    ) -> tuple[str, ...]:
        """Add a Split."""
        if sizes is None:
            number = parts if self.opset >= 18 else None
            return self.many("Split", [x], parts, axis=axis, num_outputs=number, name=name)
        if self.opset < 13:
            return self.many("Split", [x], parts, axis=axis, split=sizes, name=name)
        return self.many("Split", [x, self.constant(np.array(sizes, np.int64))], parts, axis=axis, name=name)

    def clip(self, x: str, low: float, high: float) -> str:
        """Add a Clip."""
        if self.opset < 11:
            return self.node("Clip", x, min=low, max=high)
        return self.node("Clip", x, self.constant(low), self.constant(high))

    def dropout(self, x: str) -> str:
        """Add a Dropout, which does nothing at run time."""
        if self.opset < 12:
            return self.node("Dropout", x, ratio=0.5)
        return self.node("Dropout", x, self.constant(np.float32(0.5)))

    def upsample(self, x: str) -> str:
        """Double the spatial size."""
        scales = [1.0, 1.0, *[2.0] * (len(self.dims(x)) - 2)]
        if self.opset < 9:
            return self.node("Upsample", x, scales=scales)
        factors = self.constant(np.array(scales, np.float32), dtype=TensorProto.FLOAT)
        if self.opset < 10:
            return self.node("Upsample", x, factors)
        if self.opset < 11:
            return self.node("Resize", x, factors)
        # The region of interest became optional with version 13.
        region = "" if self.opset >= 13 else self.constant(np.zeros(0, np.float32))
        return self.node("Resize", x, region, factors)

    # The whole ----------------------------------------------------------------------------------------------------

    def output(self, *names: str) -> None:
        """Make values graph outputs."""
        self.outputs.extend(names)

    def _info(self, name: str) -> onnx.ValueInfoProto:
        tensor = self.types[name].tensor_type
        dims: list[int | str] = list(self.dims(name))
        if self.symbolic and dims and name not in self.turned:
            dims[0] = self.symbolic
        return helper.make_tensor_value_info(name, tensor.elem_type, dims)

    def model(self) -> onnx.ModelProto:
        """Return the model, with documentation and metadata wherever there is room for it."""
        graph = helper.make_graph(
            self.nodes,
            "net",
            self.inputs,
            [self._info(name) for name in self.outputs],
            self.initializers,
            doc_string="the graph",
            value_info=[self._info(name) for name in self.stated if name not in self.outputs],
        )
        imports = [helper.make_opsetid(d, v) for d, v in (("", self.opset), *self.domains.items())]
        model = helper.make_model(
            graph,
            opset_imports=imports,
            functions=self.functions,
            producer_name="a producer",
            producer_version="1.2.3",
            doc_string="the model",
            domain="com.example",
            model_version=7,
        )
        model.ir_version = self.ir_version
        model.metadata_props.add(key="author", value="somebody")
        for tensor in model.graph.initializer:
            tensor.doc_string = f"the constant {tensor.name}"
        for node in model.graph.node:
            node.doc_string = f"the node {node.name}"
        return model


def initializers(model: onnx.ModelProto) -> dict[str, AnyArray]:
    """Return every constant that a model stores, by name: initializers and the tensors of Constant nodes."""
    found = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value":
                found[node.output[0]] = numpy_helper.to_array(attribute.t)
    return found


def value_names(model: onnx.ModelProto) -> list[str]:
    """Return the names of everything that the nodes compute."""
    return [o for n in model.graph.node if n.op_type != "Constant" for o in n.output if o]


def run_ort(model: onnx.ModelProto, feeds: Arrays, *, optimise: bool = False) -> dict[str, AnyArray]:
    """Run a model in ONNX Runtime on the CPU; return its outputs by name."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    exact = with_unsigned_weights(model) if bytes_overflow() else model
    session = ort.InferenceSession(exact.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def run_ort_all(model: onnx.ModelProto, feeds: Arrays) -> dict[str, AnyArray]:
    """Run a model in ONNX Runtime and return everything that its nodes compute, by name."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    stated = {o.name for o in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=n) for n in value_names(model) if n not in stated)
    return run_ort(copy, feeds)


def run_reference(model: onnx.ModelProto, feeds: Arrays) -> dict[str, AnyArray]:
    """Run a model in ONNX's reference implementation; return its outputs by name."""
    names = [o.name for o in model.graph.output]
    # Some BLAS builds raise the processor's flag for invalid values in products that have none.
    with np.errstate(invalid="ignore"):
        return dict(zip(names, ReferenceEvaluator(model).run(names, dict(feeds)), strict=True))

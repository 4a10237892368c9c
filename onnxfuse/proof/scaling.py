"""Which channels can be proven by a change of scale: those that all nodes on their way only scale, add up and move.

A permutation can't tell what an axis of a weight does with the channels: producers, consumers, biases and slopes are
all reordered alike. A positive factor for each channel can: what makes the channels is multiplied by it, what reads
them divided, and what is carried along stays. That leaves a network as it was where all in between is positively
homogeneous, f(a x) = a f(x) for a > 0, channel by channel, such as Relu, pooling, and sums of what has one factor.
"""

from collections.abc import Sequence

from onnxfuse.coupling.groups import ChannelGraph, CouplingGroup
from onnxfuse.coupling.layout import Atom, leaves
from onnxfuse.graph.view import DEFAULT_DOMAIN, GraphView, NodeView, Operand
from onnxfuse.statistics.features import Role

__all__ = ["scalable_groups"]

# One tensor in, every channel by itself, and a positive factor comes out again.
_HOMOGENEOUS = frozenset(
    {
        *(
            "Abs",
            "AveragePool",
            "Concat",
            "DepthToSpace",
            "Dropout",
            "Expand",
            "Flatten",
            "Gather",
            "GlobalAveragePool",
        ),
        *("GlobalMaxPool", "Identity", "LeakyRelu", "MaxPool", "Neg", "Relu", "Reshape", "Shape", "Slice"),
        *(
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceSum",
            "SpaceToDepth",
            "Split",
            "Squeeze",
            "Tile",
            "Transpose",
            "Unsqueeze",
            "Upsample",
        ),
    }
)
_SUMS = frozenset({"Add", "Sub", "Sum"})
# A sum over the channels, or over anything else, with a weight.
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def scalable_groups(graph: GraphView, channels: ChannelGraph, groups: Sequence[CouplingGroup]) -> list[CouplingGroup]:
    """Return the groups whose channels may be scaled without a change, by what the nodes between are.

    Better too few than too many: a group that is scaled and should not be would be frozen.
    """
    made = {(p.operand.node, group.atom) for group in groups for p in group.parameters if p.role is Role.PRODUCER}
    broken: set[Atom] = set()
    for node in graph.nodes:
        sides = [_atoms(channels, Operand(name)) if name else set() for name in node.inputs]
        results = set().union(*(_atoms(channels, Operand(name)) for name in node.outputs if name))
        for atom in results.union(*sides) - broken:
            computed = [atom in side for side in sides]
            starts = (node.index, atom) in made
            if not (any(computed) or starts) or not _keeps(graph, channels, node, atom, computed):
                broken.add(atom)
    # What is between the sides of a contraction and their makers is linear, and one side is divided.
    return [
        group
        for group in groups
        if group.mirrored or (group.atom not in broken and not (group.unmixable or group.statistic))
    ]


def _keeps(graph: GraphView, channels: ChannelGraph, node: NodeView, atom: Atom, computed: Sequence[bool]) -> bool:
    """Whether a node gives back a factor of the channels of ``atom``, which some of its computed inputs may have."""
    if node.domain != DEFAULT_DOMAIN:
        return False
    if node.op in _SUMS:
        constants = [_atoms(channels, Operand(name, node.index, slot)) for slot, name in enumerate(node.inputs)]
        return all(own or atom in constant for own, constant in zip(computed, constants, strict=True))
    many = sum(computed)
    return {
        "BatchNormalization": node.index in channels.normalising,
        "Mul": many == 1,
        "Div": many == 1 and computed[0],
        "PRelu": many == 1 and computed[0],
        "Pad": node.op == "Pad" and _pads_with_zeros(graph, node),
        "Resize": node.attributes.get("coordinate_transformation_mode") != b"tf_crop_and_resize",
        **dict.fromkeys(_PRODUCTS, many <= 1 and _has_own_shift(channels, node, atom)),
    }.get(node.op, node.op in _HOMOGENEOUS)


def _has_own_shift(channels: ChannelGraph, node: NodeView, atom: Atom) -> bool:
    """Whether what a product adds to its channels is one number for each: one for all has no factor."""
    if len(node.inputs) < 3 or not node.inputs[2] or atom not in _atoms(channels, Operand(node.outputs[0])):
        return True
    return any(
        atom in _atoms(channels, operand)
        for operand in (Operand(node.inputs[2]), Operand(node.inputs[2], node.index, 2))
    )


def _pads_with_zeros(graph: GraphView, node: NodeView) -> bool:
    """Whether what a Pad adds has the factor of what it is added to: zeros, or copies."""
    value = node.inputs[2] if len(node.inputs) > 2 else ""
    known = not value or (value in graph.constants and not graph.array(value).any())
    zeros = known and not node.attributes.get("value", 0.0)
    return zeros or bool(node.attributes.get("mode", b"constant") != b"constant")


def _atoms(channels: ChannelGraph, operand: Operand) -> set[Atom]:
    return {atom for layout in channels.layouts.get(operand, ()) for atom in leaves(layout)}

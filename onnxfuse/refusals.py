"""What a run is refused for before anything changes: nothing to do, nothing to go by, or an output that is an input."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from onnxfuse.analysis import Analysis
from onnxfuse.arrays import is_finite
from onnxfuse.bodies import Bodies
from onnxfuse.calibration.observe import reading_places
from onnxfuse.config import CompressionConfig, flag_of
from onnxfuse.coupling.groups import CouplingGroup
from onnxfuse.errors import DataError, OutputError, UnsupportedGraphError
from onnxfuse.graph.files import data_path, weight_files
from onnxfuse.graph.view import GraphView
from onnxfuse.planning.widths import GroupPlan
from onnxfuse.proof.samples import Samples

__all__ = ["refuse_nothing", "refuse_overflow", "refuse_overwriting"]

# How many reasons an error message names, and how many characters of each.
_MOST_REASONS = 3
_LONGEST_REASON = 120


def refuse_overwriting(target: Path | None, model: Path | None, others: Mapping[str, object]) -> None:
    """Refuse to write over a file that is read.

    Args:
        target: Where the result goes; None to keep it in memory.
        model: The file of the model; None if there is none.
        others: What else is read, by what messages call it; what is no path is no file.

    Raises:
        OutputError: They are the same file.
    """
    if target is None:
        return
    read = [("the input file", model)]
    read += [("a file with the model's weights", file) for file in (weight_files(model) if model else [])]
    read += [(word, Path(other)) for word, other in others.items() if isinstance(other, str | os.PathLike)]
    for word, file in read:
        if file is None or not file.exists():
            continue
        # A large model is written with its weights in a file beside it.
        for place, said in ((target, "the output"), (data_path(target), "the file of weights beside the output")):
            if place.exists() and place.samefile(file):
                what = f"{said} is {word}, which onnxfuse never changes"
                raise OutputError(what, where=str(place), mend="choose another output path")


def refuse_nothing(analysis: Analysis, plans: Sequence[GroupPlan], bodies: Bodies, config: CompressionConfig) -> None:
    """Refuse a run that would change nothing, in the model or in its bodies, although it was asked to.

    Args:
        analysis: The model.
        plans: How many channels its groups keep.
        bodies: Its bodies.
        config: The options.

    Raises:
        UnsupportedGraphError: Nothing would change; the message counts the reasons.
    """
    if config.ratio == 0 or bodies.may_change or any(plan.kept < plan.group.channels for plan in plans):
        return
    told = [*(plan.reason for plan in plans), *(group.frozen for group in bodies.groups), *bodies.left]
    fed = _fed_weight(analysis.graph)
    if not told and fed:
        what = f"there is nothing to compress: weights such as {fed!r} are not stored but given as graph inputs"
        raise UnsupportedGraphError(what, where=analysis.source.name, mend="store the weights in the model")
    if not told:
        what = "there is nothing to compress: no Conv, Gemm or MatMul with constant weights makes channels"
        raise UnsupportedGraphError(what, where=analysis.source.name, mend="onnxfuse compresses neural networks")
    reasons = Counter(reason or "it can't have fewer channels" for reason in told).most_common(_MOST_REASONS)
    total = f"of {len(told)} groups" if len(told) > 1 else "of 1 group"
    total += " and bodies" if bodies.left else ""
    what = "nothing can be compressed as asked: "
    what += "; ".join(f"{_shortened(reason)} ({count} {total})" for reason, count in reasons)
    mend = "`onnxfuse inspect` lists every group with its reason; widen --scope, --only or --skip if they exclude it"
    least = {name: getattr(config, name) for name in ("round_to", "min_channels") if getattr(config, name) > 1}
    mend += "".join(f"; lower {flag_of(name)}, which is {number}" for name, number in least.items())
    raise UnsupportedGraphError(what, where=analysis.source.name, mend=mend)


def refuse_overflow(
    analysis: Analysis,
    groups: Sequence[CouplingGroup],
    judgements: Mapping[str, object],
    samples: Samples,
    config: CompressionConfig,
) -> None:
    """Refuse samples on which nothing that a budget could be spent by is finite.

    Args:
        analysis: The model.
        groups: Its groups that may change.
        judgements: What is known of them, by name.
        samples: The user's samples.
        config: The options.

    Raises:
        DataError: There are layers that read channels of groups, and of none is anything known.
    """
    if judgements or not config.target or not any(reading_places(analysis, groups).values()):
        return
    largest = {name: float(np.abs(array[is_finite(array)]).max(initial=0)) for name, array in samples.arrays.items()}
    told = ", ".join(f"{size:.3g} in {name!r}" for name, size in largest.items())
    what = f"what the layers read is not finite, or overflows, on these samples, whose largest number is {told}"
    mend = "scale the samples as the model expects them"
    raise DataError(what, where=samples.origin, mend=mend)


def _fed_weight(graph: GraphView) -> str:
    """Return a graph input that a linear operator reads as its weight; empty if there is none."""
    for node in graph.nodes:
        if node.op in {"Conv", "ConvInteger", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger"}:
            name = node.inputs[1]
            dims = graph.inputs[name].type.tensor_type.shape.dim if name in graph.inputs else []
            if len(dims) > 1 and all(dim.dim_value > 0 for dim in dims):
                return name
    return ""


def _shortened(text: str) -> str:
    """Cut the middle out of a long text: exporters join the names of many layers into one."""
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON // 2]}...{text[-_LONGEST_REASON // 3 :]}"

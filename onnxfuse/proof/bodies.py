"""Inputs for the bodies of If, Loop and Scan, as they occur when the model around them runs.

A branch of an If needs values from around it, which are computed whether it is taken or not. The body of a Loop or Scan
is run by itself, step after step, from the values that its node starts with.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnxfuse.config import Provider
from onnxfuse.errors import UnsupportedGraphError
from onnxfuse.graph.bodies import Body, scan_axis
from onnxfuse.proof.runtime import Feeds, Session
from onnxfuse.proof.samples import Samples

__all__ = ["body_arrays", "values_around", "with_output_types"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# Of how many steps of a loop in each run inputs are taken.
_MOST_STEPS = 8


def values_around(
    model: onnx.ModelProto,
    bodies: Sequence[Body],
    constants: Mapping[str, AnyArray],
    samples: Samples,
    provider: Provider,
    most: int,
) -> list[dict[str, AnyArray]]:
    """Run a model and return what its bodies read, one entry for each run.

    Args:
        model: The model around the bodies.
        bodies: The bodies.
        constants: What the nodes of the bodies read that is known before a run.
        samples: Inputs of the model.
        provider: Where to run it.
        most: How many runs to look at, at most.

    Raises:
        RuntimeFailedError: The model does not run with them.
    """
    wanted = {name for body in bodies for name in (*body.captured, *body.node.inputs) if name}
    wanted -= constants.keys() | samples.arrays.keys() | {t.name for t in model.graph.initializer}
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    stated = {o.name for o in model.graph.output}
    observed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted - stated))
    session = Session(observed, provider, name="the model around a body")
    found = []
    for feeds in islice(samples.feeds(), most):
        results = session.run(feeds) if wanted else {}
        found.append({**constants, **feeds, **{name: np.asarray(results[name]) for name in wanted}})
    return found


def body_arrays(body: Body, around: Sequence[Mapping[str, AnyArray]], provider: Provider) -> dict[str, AnyArray]:
    """Return inputs that a body runs with; the first axis of each runs over samples.

    Raises:
        RuntimeFailedError: The body does not run with the values around it.
        UnsupportedGraphError: Its node runs it not even once.
    """
    session = Session(body.model, provider, name=f"{body.name} by itself")
    feeds = [step for values in around for step in islice(_steps(body, values, session), _MOST_STEPS)]
    if not feeds:
        what = f"{body.name} does not run on these inputs, not even for one step"
        raise UnsupportedGraphError(what, where=body.name)
    for step in feeds:
        session.run(step)
    # A state may grow from step to step; the last step has met most of what there is.
    shapes = {name: value.shape for name, value in feeds[-1].items()}
    alike = [step for step in feeds if all(step[name].shape == shape for name, shape in shapes.items())]
    # As many as there were runs, and from all of them.
    chosen = alike[:: -(-len(alike) // len(around))]
    return {name: np.stack([step[name] for step in chosen]) for name in shapes}


def with_output_types(body: Body, arrays: Mapping[str, AnyArray], provider: Provider) -> Body:
    """Return a body whose outputs state their type and number of axes: a graph has to, a body need not."""
    session = Session(body.model, provider, name=f"{body.name} by itself")
    results = session.run({name: np.asarray(array[0]) for name, array in arrays.items()})
    model = onnx.ModelProto()
    model.CopyFrom(body.model)
    for info in model.graph.output:
        value = results[info.name]
        stated = info.type.tensor_type
        if isinstance(value, np.ndarray | np.generic) and not (stated.elem_type and stated.HasField("shape")):
            kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            info.CopyFrom(onnx.helper.make_tensor_value_info(info.name, kind, [None] * value.ndim))
    return replace(body, model=model)


def _steps(body: Body, values: Mapping[str, AnyArray], session: Session) -> Iterator[Feeds]:
    captured = {name: values[name] for name in body.captured}
    given = [values.get(name) if name else None for name in body.node.inputs]
    match body.node.op:
        case "Loop":
            yield from _steps_of_loop(body, given, captured, session)
        case "Scan":
            yield from _steps_of_scan(body, given, captured, session)
        case _:
            yield captured


def _steps_of_loop(
    body: Body, given: Sequence[AnyArray | None], captured: Feeds, session: Session
) -> Iterator[dict[str, AnyArray]]:
    most = _MOST_STEPS if given[0] is None else int(given[0].ravel()[0])
    goes_on = True if given[1] is None else bool(given[1].ravel()[0])
    states: list[AnyArray | None] = list(given[2:])
    for i in range(most):
        if not goes_on:
            return
        values = [np.array(i, np.int64), np.array(goes_on), *states]
        feeds = {**captured, **_named(body.formal, values)}
        yield feeds
        results = [np.asarray(result) for result in session.run(feeds).values()]
        goes_on, states = bool(results[0].ravel()[0]), [*results[1 : 1 + len(states)]]


def _steps_of_scan(
    body: Body, given: Sequence[AnyArray | None], captured: Feeds, session: Session
) -> Iterator[dict[str, AnyArray]]:
    first = len(given) - int(body.node.attributes["num_scan_inputs"])
    states, scans = list(given[:first]), [x for x in given[first:] if x is not None]
    axes = [scan_axis(body.node, i, x.ndim) for i, x in enumerate(scans)]
    turned = [bool(d) for d in body.node.attributes.get("scan_input_directions", [0] * len(scans))]
    length = scans[0].shape[axes[0]]
    for i in range(length):
        parts = [
            np.take(x, length - 1 - i if back else i, axis=axis)
            for x, axis, back in zip(scans, axes, turned, strict=True)
        ]
        feeds = {**captured, **_named(body.formal, [*states, *parts])}
        yield feeds
        states = list(session.run(feeds).values())[:first]


def _named(names: Sequence[str], values: Sequence[AnyArray | None]) -> dict[str, AnyArray]:
    return {name: np.asarray(v) for name, v in zip(names, values, strict=False) if v is not None}

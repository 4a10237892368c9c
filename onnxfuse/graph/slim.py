"""Copies of models without their large weights, which are most of what they weigh.

Whoever changes a few nodes of a model, or lays its weights beside it, needs a copy of everything else only.
"""

import math
from pathlib import Path

import onnx
from google.protobuf.message import Message
from onnx import numpy_helper

__all__ = ["byte_size", "save_apart", "without_large_weights"]

# Where a tensor has its values.
_VALUES = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")
# Where data of a tensor begin in a file, so that a runtime can map them into its memory.
_PAGE = 4096
# Initializers of more bytes are counted apart.
_COUNTED_APART = 2**20
# What a tensor's values need beside themselves: a tag and a length for them, and a longer length for the tensor.
_AROUND_VALUES = 16


def byte_size(model: onnx.ModelProto) -> int:
    """Return how many bytes a model has as a message, or a few more.

    Unlike protobuf's own count, which writes all of the message into memory, this takes next to no time and memory.
    """
    slim, empty = without_large_weights(model, _COUNTED_APART)
    apart = (tensor for tensor in model.graph.initializer if tensor.name in empty)
    values = sum((len(t.raw_data) if t.HasField("raw_data") else t.ByteSize()) + _AROUND_VALUES for t in apart)
    return int(slim.ByteSize()) + values


def without_large_weights(model: onnx.ModelProto, size: int) -> tuple[onnx.ModelProto, set[str]]:
    """Return a copy of a model in which large initializers have name, type and dimensions, but no values.

    Args:
        model: The model; not changed.
        size: From how many bytes on an initializer is large.

    Returns:
        The copy, and the names of these initializers.
    """
    slim = onnx.ModelProto()
    _copy_fields(slim, model, "graph")
    _copy_fields(slim.graph, model.graph, "initializer")
    empty = set()
    for tensor in model.graph.initializer:
        copy = slim.graph.initializer.add()
        if tensor.data_type == onnx.TensorProto.STRING or _weighs_less(tensor, size):
            copy.CopyFrom(tensor)
        else:
            _copy_fields(copy, tensor, *_VALUES)
            empty.add(tensor.name)
    return slim, empty


def save_apart(model: onnx.ModelProto, path: Path, data: Path, size: int) -> None:
    """Write a model with its large initializers in a file beside it; one after the other, so none is copied in memory.

    Args:
        model: The model; not changed.
        path: Where it goes.
        data: Where the initializers go, in the same folder.
        size: From how many bytes on an initializer is large.

    Raises:
        OSError: A file can't be written.
        ValueError: The model is too large for one file without them.
    """
    slim, empty = without_large_weights(model, size)
    with data.open("wb") as file:
        for source, target in zip(model.graph.initializer, slim.graph.initializer, strict=True):
            if source.name in empty:
                start = file.seek(-(-file.tell() // _PAGE) * _PAGE)
                length = file.write(source.raw_data or numpy_helper.to_array(source).tobytes())
                target.data_location = onnx.TensorProto.EXTERNAL
                for key, value in (("location", data.name), ("offset", str(start)), ("length", str(length))):
                    target.external_data.add(key=key, value=value)
    path.write_bytes(slim.SerializeToString())


def _weighs_less(tensor: onnx.TensorProto, size: int) -> bool:
    """Whether a tensor has less than so many bytes; those of many elements are not asked, which would take a copy."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.HasField("raw_data"):
        # An element has half a byte at least.
        elements = math.prod(tensor.dims)
        if elements >= 2 * size:
            return False
    return tensor.ByteSize() < size


def _copy_fields(target: Message, source: Message, *left_out: str) -> None:
    """Copy all fields of a message but some, of which the values are not looked at."""
    for field in source.DESCRIPTOR.fields:
        if field.name in left_out:
            continue
        value = getattr(source, field.name)
        if hasattr(value, "extend"):
            getattr(target, field.name).extend(value)
        elif source.HasField(field.name):
            if isinstance(value, Message):
                getattr(target, field.name).CopyFrom(value)
            else:
                setattr(target, field.name, value)

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

class Tensor:
    name: str

class Variable(Tensor):
    def __init__(self, name: str) -> None: ...

class Constant(Tensor):
    values: np.ndarray[Any, np.dtype[Any]]
    def __init__(self, name: str, values: np.ndarray[Any, np.dtype[Any]]) -> None: ...

class Node:
    name: str
    op: str
    attrs: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]

class Graph:
    nodes: list[Node]
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    def tensors(self) -> dict[str, Tensor]: ...

def import_onnx(onnx_graph: onnx.ModelProto) -> Graph: ...
def export_onnx(graph: Graph, do_type_check: bool = ...) -> onnx.ModelProto: ...

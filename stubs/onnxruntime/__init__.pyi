from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

__version__: str

class GraphOptimizationLevel(Enum):
    ORT_DISABLE_ALL = 0
    ORT_ENABLE_ALL = 99

class SessionOptions:
    log_severity_level: int
    intra_op_num_threads: int
    enable_cpu_mem_arena: bool
    graph_optimization_level: GraphOptimizationLevel
    def add_session_config_entry(self, name: str, value: str) -> None: ...

class NodeArg:
    name: str
    shape: list[int | str | None]
    type: str

class InferenceSession:
    def __init__(
        self,
        path_or_bytes: str | bytes,
        sess_options: SessionOptions | None = ...,
        providers: Sequence[str] | None = ...,
        *,
        enable_fallback: int = ...,
    ) -> None: ...
    def get_providers(self) -> list[str]: ...
    def get_inputs(self) -> list[NodeArg]: ...
    def get_outputs(self) -> list[NodeArg]: ...
    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]) -> list[Any]: ...

def get_available_providers() -> list[str]: ...
def preload_dlls() -> None: ...
def set_default_logger_severity(severity: int) -> None: ...

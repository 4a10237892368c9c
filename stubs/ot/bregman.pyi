from typing import Literal, TypedDict

import numpy as np
import numpy.typing as npt

class _SinkhornLog(TypedDict):
    err: list[float]
    niter: int
    log_u: npt.NDArray[np.float64]
    log_v: npt.NDArray[np.float64]
    u: npt.NDArray[np.float64]
    v: npt.NDArray[np.float64]

def sinkhorn_log(
    a: npt.NDArray[np.float64],
    b: npt.NDArray[np.float64],
    cost: npt.NDArray[np.float64],
    reg: float,
    most_iterations: int,
    stop: float,
    /,
    *,
    warn: bool = ...,
    log: Literal[True],
    warmstart: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None = ...,
) -> tuple[npt.NDArray[np.float64], _SinkhornLog]: ...

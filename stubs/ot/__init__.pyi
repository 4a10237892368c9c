from typing import Literal, TypedDict

import numpy as np
import numpy.typing as npt

class _EmdLog(TypedDict):
    cost: float
    u: npt.NDArray[np.float64]
    v: npt.NDArray[np.float64]
    warning: str | None
    result_code: int

def emd(
    a: npt.NDArray[np.float64],
    b: npt.NDArray[np.float64],
    cost: npt.NDArray[np.float64],
    most_pivots: int,
    /,
    *,
    log: Literal[True],
) -> tuple[npt.NDArray[np.float64], _EmdLog]: ...

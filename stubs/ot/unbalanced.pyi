import numpy as np
import numpy.typing as npt

def mm_unbalanced(
    a: npt.NDArray[np.float64],
    b: npt.NDArray[np.float64],
    cost: npt.NDArray[np.float64],
    marginal_weight: float,
    /,
    *,
    div: str,
) -> npt.NDArray[np.float64]: ...

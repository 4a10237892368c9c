import numpy as np
import numpy.typing as npt

def partial_wasserstein(
    a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], cost: npt.NDArray[np.float64], /, *, m: float
) -> npt.NDArray[np.float64]: ...

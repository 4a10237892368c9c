from typing import Literal, Self

import numpy as np
import numpy.typing as npt

class KMeans:
    labels_: npt.NDArray[np.int32]
    cluster_centers_: npt.NDArray[np.float64]
    def __init__(
        self,
        n_clusters: int = ...,
        *,
        n_init: int | Literal["auto"] = ...,
        random_state: int | None = ...,
    ) -> None: ...
    def fit(
        self,
        points: npt.NDArray[np.float64],
        /,
        sample_weight: npt.NDArray[np.float64] | None = ...,
    ) -> Self: ...

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
        init: Literal["k-means++", "random"] | npt.NDArray[np.float64] = ...,
        n_init: int | Literal["auto"] = ...,
        max_iter: int = ...,
        random_state: int | None = ...,
    ) -> None: ...
    def fit(
        self,
        points: npt.NDArray[np.float64],
        /,
        sample_weight: npt.NDArray[np.float64] | None = ...,
    ) -> Self: ...

def kmeans_plusplus(
    points: npt.NDArray[np.float64],
    /,
    n_clusters: int,
    *,
    random_state: int | None = ...,
    n_local_trials: int | None = ...,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]: ...

from typing import Literal, Self

import numpy as np
import numpy.typing as npt

class GaussianMixture:
    def __init__(
        self,
        n_components: int = ...,
        *,
        covariance_type: Literal["full", "tied", "diag", "spherical"] = ...,
        reg_covar: float = ...,
        init_params: Literal["kmeans", "k-means++", "random", "random_from_data"] = ...,
        weights_init: npt.NDArray[np.float64] | None = ...,
        means_init: npt.NDArray[np.float64] | None = ...,
        precisions_init: npt.NDArray[np.float64] | None = ...,
        random_state: int | None = ...,
    ) -> None: ...
    def fit(self, points: npt.NDArray[np.float64], /) -> Self: ...
    def predict_proba(self, points: npt.NDArray[np.float64], /) -> npt.NDArray[np.float64]: ...

from collections.abc import Mapping
from enum import Enum

import numpy as np

class QuantFormat(Enum):
    QOperator = 0
    QDQ = 1

class QuantType(Enum):
    QInt8 = 0
    QUInt8 = 1

class CalibrationDataReader:
    def get_next(self) -> Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]] | None: ...

def quantize_dynamic(model_input: str, model_output: str, *, per_channel: bool = ...) -> None: ...
def quantize_static(
    model_input: str,
    model_output: str,
    calibration_data_reader: CalibrationDataReader,
    *,
    quant_format: QuantFormat = ...,
    per_channel: bool = ...,
    weight_type: QuantType = ...,
) -> None: ...

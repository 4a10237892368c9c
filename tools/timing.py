"""Times of several functions, called in turn, so that what else the machine does hits all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping

__all__ = ["StageTimes", "interleaved", "median_ratio"]


class StageTimes:
    """Seconds of processor time, over all threads, of every stage of a compression: what others do counts less in it.

    Attributes:
        seconds: By stage.
    """

    def __init__(self) -> None:
        """Start before the first stage."""
        self.seconds: dict[str, float] = {}
        self._stage, self._start = "", time.process_time()

    def __call__(self, stage: str, _done: int, _total: int) -> None:
        """Count what has passed since the last call; the argument ``progress`` of `onnxfuse.compress`."""
        now = time.process_time()
        stage_before, self._stage = self._stage or stage, stage
        self.seconds[stage_before] = self.seconds.get(stage_before, 0.0) + now - self._start
        self._start = now


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: int = 1
) -> dict[str, list[float]]:
    """Call every function once a round and return the seconds of each call, by name.

    Args:
        functions: What to call, by name.
        rounds: How often.
        warm_up: Rounds before those, which are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warm_up + rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Return the median over the rounds of one time divided by the other.

    Example:
        >>> median_ratio([2.0, 6.0, 4.0], [1.0, 2.0, 1.0])
        3.0
    """
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))

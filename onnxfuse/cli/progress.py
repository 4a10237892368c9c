"""A progress bar on a terminal, and nothing where there is none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["shown_progress"]

_TITLES = {
    "load": "reading",
    "couple": "finding coupled channels",
    "prove coupling": "proving the coupling",
    "fuse": "fusing",
    "refit": "fitting readers anew",
    "prove": "proving",
}


@contextmanager
def shown_progress(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show the stages of a compression as they go; the display vanishes at the end.

    Args:
        quiet: Show nothing.

    Yields:
        A function to call with a stage, the steps done and the steps there are.
    """
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
    if quiet or not console.is_terminal:
        yield lambda _stage, _done, _total: None
        return
    with bar:
        task = bar.add_task("starting", total=1)

        def show(stage: str, done: int, total: int) -> None:
            bar.update(task, description=_TITLES.get(stage, stage), completed=done, total=total)

        yield show

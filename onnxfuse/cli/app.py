"""The commands and their flags.

The flags of ``compress`` are the fields of `CompressionConfig` and `FusionOptions`, and their help is those classes'
documentation, so the command line and the Python API can't say different things.
"""

import io
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from cyclopts import App, ArgumentCollection, CycloptsError, Group, Parameter
from rich.console import Console, RenderableType

from onnxfuse import __version__
from onnxfuse.cli import EXIT_INTERRUPTED, INTERRUPTED, caught_signals, refusal_as_json
from onnxfuse.cli.progress import shown_progress
from onnxfuse.cli.render import (
    compression_tables,
    inspection_tables,
    method_tables,
    plan_tables,
    validation_tables,
)
from onnxfuse.config import CompressionConfig, Pixels, Provider
from onnxfuse.errors import ConfigError, InvariantError, OnnxFuseError, OutputError
from onnxfuse.fusion.options import FusionOptions
from onnxfuse.graph.files import check_output_path, weight_files
from onnxfuse.pipeline import compress as run_compress
from onnxfuse.pipeline import inspect as run_inspect
from onnxfuse.pipeline import plan as run_plan
from onnxfuse.pipeline import validate as run_validate
from onnxfuse.plugins import load_plugins

__all__ = ["run"]

_PIPE_WIDTH = 100_000

_WHAT = Group("What to compress, and how much", sort_key=1)
_HOW = Group("How channels are fused", sort_key=2)
_OUTPUT = Group("Output", sort_key=3)

# Both classes spread into flags of their own, without a prefix; only the command line needs to know.
Parameter(name="*", group=_HOW)(FusionOptions)
Parameter(name="*", group=_WHAT)(CompressionConfig)
# By their values, which the help lists and of which one has a leading hyphen; the config says which there are.
Parameter(converter=lambda _type, tokens: tokens[0].value, show_choices=False, allow_leading_hyphen=True)(Pixels)

Verbose = Annotated[bool, Parameter(alias="-v", negative="", group=_OUTPUT)]
Quiet = Annotated[bool, Parameter(alias="-q", negative="", group=_OUTPUT)]
Json = Annotated[bool, Parameter(name="--json", negative="", group=_OUTPUT)]


def _shown_default(value: object) -> object:
    """Leave out of the help that a flag or a list is not given by default."""
    return None if value is False or value in ((), "") else value


def _refuse_fractions(_app: App, _commands: tuple[str, ...], flags: ArgumentCollection) -> None:
    """Refuse a fraction where a flag takes a whole number, which would be rounded in silence.

    Raises:
        ConfigError: There is one.
    """
    for flag in flags:
        for token in flag.tokens if flag.hint is int else ():
            if "." in token.value:
                what = f"{token.keyword} is {token.value}"
                raise ConfigError(what, where=token.keyword or "", mend="give a whole number")


app = App(
    name="onnxfuse",
    help="Compress trained ONNX files by fusing their channels with optimal transport.",
    version=__version__,
    help_epilogue="Exit codes: 0 done, 2 usage, 3 model, 4 nothing to compress, 5 data, 6 provider, 7 ONNX Runtime, "
    "8 proof failed, 9 output, 10 solver, 11 compression, 12 a plugin, 70 a defect of onnxfuse, 130 interrupted.",
    default_parameter=Parameter(negative_iterable=(), show_default=_shown_default),
    suppress_keyboard_interrupt=False,
    config=_refuse_fractions,
)


@app.command
def inspect(
    model: Path,
    /,
    *,
    prove: bool = True,
    provider: Provider = Provider.CPU,
    seed: int = 0,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show the groups of channels that must change together, and why the frozen ones are frozen.

    Args:
        model: The ONNX file.
        prove: Whether to prove the coupling by permuting the channels of every group in ONNX Runtime.
        provider: Where ONNX Runtime runs.
        seed: Seed of the inputs and permutations.
        json: Print one JSON object instead of tables.
        verbose: Show the nodes of every group, and tracebacks of errors.
    """
    report = run_inspect(model, prove=prove, provider=provider, seed=seed)
    _print(report.to_json() if json else inspection_tables(report, verbose=verbose))


@app.command
def compress(
    model: Path,
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o", group=_OUTPUT)],
    config: CompressionConfig | None = None,
    calibration: Annotated[Path | None, Parameter(group=_WHAT)] = None,
    plan: Annotated[Path | None, Parameter(group=_WHAT)] = None,
    report: Annotated[Path | None, Parameter(group=_OUTPUT)] = None,
    json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Write a smaller, faster ONNX file, proven in ONNX Runtime before it is there.

    Args:
        model: The ONNX file; it is never changed.
        output: Where to write the result.
        config: All other options.
        calibration: Unlabelled samples, an .npz file keyed by input name, first axis samples, or a folder of pictures:
            what is kept is chosen and fitted on them. Without, images, sounds and tokens are made up, and for other
            inputs what is kept is chosen by moments that are worked out from the weights.
        plan: How many channels each group keeps, from the plan command, instead of a ratio or a target.
        report: Write the whole report to this JSON file.
        json: Print the whole report as one JSON object instead of tables.
        verbose: Show every group, and tracebacks of errors.
        quiet: Print nothing but errors.
    """
    config = config or CompressionConfig()
    if report is not None:
        read = {"the model": model, "the calibration file": calibration, "the plan": plan}
        _check_report_path(report, {**read, "the output": output})
    with shown_progress(quiet=quiet) as progress:
        result = run_compress(model, output, config=config, calibration=calibration, plan=plan, progress=progress)
    if report is not None:
        _write_report(report, result.report.to_json())
    if json:
        _print(result.report.to_json())
    elif not quiet:
        _print(compression_tables(result.report, verbose=verbose))


@app.command
def plan(
    model: Path,
    /,
    *,
    output: Annotated[Path | None, Parameter(alias="-o", group=_OUTPUT)] = None,
    config: CompressionConfig | None = None,
    calibration: Annotated[Path | None, Parameter(group=_WHAT)] = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Decide how many channels each group keeps, as a JSON file to read, to edit, and to give to compress --plan.

    Args:
        model: The ONNX file.
        output: Where to write the plan; a table of it is shown then. By default it is printed.
        config: All other options, as for compress.
        calibration: Unlabelled samples, as for compress.
        verbose: Show tracebacks of errors.
        quiet: Show no progress, and no table.
    """
    del verbose  # Read by `main`, which shows errors.
    if output is not None:
        _check_report_path(output, {"the model": model, "the calibration file": calibration}, "the plan", "--output")
    with shown_progress(quiet=quiet) as progress:
        found = run_plan(model, config=config or CompressionConfig(), calibration=calibration, progress=progress)
    if output is None:
        _print(found.to_json())
    else:
        _write_report(output, found.to_json())
        if not quiet:
            _print(plan_tables(found))


@app.command
def methods() -> None:
    """List the methods, and everything that they can be told to use, with a line each."""
    _print(method_tables())


@app.command
def validate(
    original: Path,
    compressed: Path,
    /,
    *,
    data: Path | None = None,
    provider: Provider = Provider.AUTO,
    seed: int = 0,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run two models on the same inputs and show how far their outputs are apart.

    Args:
        original: The reference.
        compressed: The model to judge.
        data: Samples, an .npz file keyed by input name, or a folder of pictures; with an array `labels` in the file,
            top-1 accuracy is measured as well.
        provider: Where ONNX Runtime runs.
        seed: Seed of the synthetic inputs that are used without data.
        json: Print one JSON object instead of tables.
        verbose: Show tracebacks of errors.
    """
    del verbose  # Read by `main`, which shows errors.
    result = run_validate(original, compressed, data=data, provider=provider, seed=seed)
    _print(result.to_json() if json else validation_tables(result))


def run(words: Sequence[str]) -> int:
    """Run the command line.

    Args:
        words: Those after the program's name.

    Returns:
        The exit code: 0, or one that tells the kind of error (see `onnxfuse.errors`).
    """
    verbose = "-v" in words or "--verbose" in words
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, stream=sys.stderr, format="%(message)s")
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        load_plugins()
        # These unwind, so that no temporary files are left.
        with caught_signals(signal.default_int_handler):
            app(words, exit_on_error=False, print_error=False, result_action="return_value")
    except OnnxFuseError as error:
        if verbose:
            errors.print_exception()
        refusal, code = error, error.exit_code
    except CycloptsError as error:
        refusal = _usage_error(error, words)
        code = refusal.exit_code
    except KeyboardInterrupt:
        refusal, code = OnnxFuseError(INTERRUPTED), EXIT_INTERRUPTED
    except Exception as error:
        if _was_interrupted(error):
            refusal, code = OnnxFuseError(INTERRUPTED), EXIT_INTERRUPTED
        elif verbose:
            raise
        else:
            what = f"a defect of onnxfuse: {type(error).__name__}: {error}"
            refusal = InvariantError(what, mend="run the same again with -v at the end, and report what it prints")
            code = refusal.exit_code
    else:
        return 0
    errors.print(f"onnxfuse: {refusal}")
    if "--json" in words:
        _print_refusal(refusal, code)
    return code


def _print_refusal(refusal: OnnxFuseError, code: int) -> None:
    """Print an error as the one JSON object that a program waits for."""
    with suppress(OutputError):
        _print(refusal_as_json(refusal.what, refusal.where, refusal.mend, code))


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an error came up while an interrupt was being handled, as a complaint about the unwinding may."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _usage_error(error: CycloptsError, words: Sequence[str]) -> OnnxFuseError:
    """Return what is wrong with the flags; a config's own complaint about a value keeps its three parts."""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, OnnxFuseError):
        return cause
    mend = "`onnxfuse COMMAND --help` shows every flag"
    if words and words[0].startswith("-"):
        mend = "flags come behind the command, as in `onnxfuse COMMAND MODEL -v`"
    return ConfigError(str(error), mend=mend)


def _print(what: RenderableType) -> None:
    """Print a result: text as it is, tables in the width of the terminal."""
    if isinstance(what, str):
        _write(what + "\n")
        return
    # On a terminal, long names fold; in a pipe every group is one line, whatever its length.
    stdout, page = Console(), io.StringIO()
    width = stdout.width if stdout.is_terminal else _PIPE_WIDTH
    Console(file=page, width=width, force_terminal=stdout.is_terminal).print(what, crop=False)
    _write(page.getvalue())


def _write(text: str) -> None:
    """Write to standard output, if there is one.

    Raises:
        OutputError: It takes no more.
    """
    if sys.stdout is None:
        return
    try:
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError:
            # JSON is UTF-8 by its standard, and a name that can't be read is better than no result.
            sys.stdout.buffer.write(text.encode())
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has seen enough, as `head` has.
        _drop_stdout()
    except OSError as error:
        _drop_stdout()
        what = f"the result can't be printed: {error.strerror or error}"
        raise OutputError(what, where="standard output", mend="free some space, or send it elsewhere") from error


def _drop_stdout() -> None:
    """Send what is left to print nowhere, else Python tries again at its end, and complains."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, sys.stdout.fileno())
    os.close(sink)


def _check_report_path(
    path: Path, others: Mapping[str, Path | None], word: str = "the report", flag: str = "--report"
) -> None:
    """Refuse a report that could not be written in the end, or that would overwrite something else.

    Args:
        path: Where it is to be written.
        others: What it must not be, by what messages call it; one is "the model".
        word: What messages call it.
        flag: What it was given with.

    Raises:
        OutputError: It can't be written, or it is one of ``others`` or of the files with the model's weights.
    """
    target = check_output_path(path, replaced=False)
    taken = [*others.items()]
    if target.exists() and (model := others["the model"]) is not None:
        taken += [("a file with the model's weights", file) for file in weight_files(model)]
    for other, file in taken:
        if file is not None and target.resolve() == file.resolve():
            what = f"{word} and {other} are the same file"
            raise OutputError(what, where=str(path), mend=f"choose another path for {flag}")


def _write_report(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        what = f"the report can't be written: {error.strerror or error}"
        raise OutputError(what, where=str(path), mend="choose another path for --report") from error

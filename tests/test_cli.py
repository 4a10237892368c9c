"""The command line as its users see it: what is printed where, which files are written, what the help says."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from rich.console import Console

import onnxfuse
from onnxfuse import cli as command_line
from onnxfuse.cli import app as app_module
from onnxfuse.cli import main
from onnxfuse.cli.render import compression_tables, inspection_tables
from onnxfuse.config import CompressionConfig, Pixels
from onnxfuse.fusion.candidates import CANDIDATES
from onnxfuse.fusion.methods import METHODS
from onnxfuse.fusion.options import FusionOptions
from onnxfuse.importance import IMPORTANCES
from onnxfuse.registry import Registry
from onnxfuse.transport import MASSES, SOLVERS, TARGETS
from tests.builders import Net
from tests.conftest import HANGS, QUICK, Command, MakeMlp, Outcome, names_in

# Without the proof, and with little of a fit.
FAST = ("--no-prove", "--effort", str(QUICK))

REGISTRIES: dict[str, Registry[Any]] = {
    "method": METHODS,
    "importance": IMPORTANCES,
    "transport-target": TARGETS,
    "source-mass": MASSES,
    "target-mass": MASSES,
    "solver": SOLVERS,
}


def assert_quiet(outcome: Outcome) -> None:
    """Assert success without a word on stderr and without terminal codes on stdout."""
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    assert "\x1b" not in outcome.out


def one_object(text: str) -> dict[str, Any]:
    """Read the one JSON object that a text is; NaN and infinity are not JSON."""

    def refuse(word: str) -> float:
        raise ValueError(word)

    found = json.loads(text, parse_constant=refuse)
    assert isinstance(found, dict)
    return found


def help_of(text: str) -> dict[str, str]:
    """Return the help of every flag on one line each: the boxes are taken off, and folded lines joined."""
    found: dict[str, str] = {}
    flag = ""
    for line in text.splitlines():
        inside = line.strip("│ ")
        match = re.match(r"(?:\* +)?--([a-z-]+)", inside)
        if match:
            flag = match[1]
        if flag and line.startswith("│"):
            found[flag] = f"{found.get(flag, '')} {inside}"
    return found


def words_of(text: str) -> set[str]:
    """Return the words of a text; names with hyphens are one word."""
    return {word.strip(".,:;()[]'") for word in text.split()}


@pytest.mark.parametrize(
    "outcome", [Outcome(1, "", ""), Outcome(0, "", "a warning"), Outcome(0, "\x1b[1mbold\x1b[0m", "")]
)
def test_the_check_for_quiet_runs_can_fail(outcome: Outcome) -> None:
    """The check for quiet runs can fail."""
    with pytest.raises(AssertionError):
        assert_quiet(outcome)


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1} {"b": 2}', 'note\n{"a": 1}', '{"a": NaN}'])
def test_the_check_for_one_object_can_fail(text: str) -> None:
    """The check for one object can fail."""
    with pytest.raises((ValueError, AssertionError)):
        one_object(text)


# Real processes ------------------------------------------------------------------------------------------------------


def test_inspect_prints_groups_and_reasons(process: Command, digits: Path) -> None:
    """Inspect prints groups and reasons."""
    outcome = process("inspect", digits)
    assert_quiet(outcome)
    lines = [line.rstrip() for line in outcome.out.splitlines()]
    assert lines[:5] == [
        str(digits),
        "opset ai.onnx 17, IR 8, 161.1 kB",
        "inputs: image 1x1x8x8",
        "38,234 parameters, 828,736 MACs",
        "100.0 % of the parameters follow channels that can be fused",
    ]
    assert lines[5].split() == ["coupling", "group", "channels", "parameters", "state"]
    assert "/block1/conv1/Conv        16       4,672  free" in lines
    assert "/fc/Gemm                  10         330  frozen: graph output 'logits'" in lines
    assert len(lines) == 12


def test_compress_writes_one_file_and_says_what_it_did(process: Command, digits: Path, models: Path) -> None:
    """Compress writes one file and says what it did."""
    before = digits.read_bytes()
    calibration = models / "digits_calibration.npz"
    words = ["compress", digits.name, "-o", "small.onnx", "--calibration", calibration, "--effort", QUICK]
    outcome = process(*words, cwd=digits.parent)
    assert_quiet(outcome)
    assert names_in(digits.parent) == ["digits.onnx", "small.onnx"]
    assert digits.read_bytes() == before
    assert "parameters    38,234   18,281  47.8 %" in outcome.out
    assert "/block1/conv1/Conv  16 -> 11" in outcome.out
    assert "groups not shown: 1 kept as they are (-v shows all)" in outcome.out
    assert f"drift on 256 samples from {calibration}, run on " in outcome.out
    assert outcome.out.splitlines()[-1] == "written to small.onnx"
    onnx.checker.check_model(str(digits.parent / "small.onnx"), full_check=True)


def test_validate_prints_drift_and_accuracy(process: Command, digits: Path, models: Path) -> None:
    """Validate prints drift and accuracy."""
    data = models / "digits_test.npz"
    outcome = process("validate", digits, models / "digits_folded.onnx", "--data", data, "--provider", "cpu")
    assert_quiet(outcome)
    assert f"drift on 450 samples from {data}, run on cpu" in outcome.out
    assert "100.0 %" in outcome.out
    last = outcome.out.splitlines()[-1]
    assert re.fullmatch(r"top-1 accuracy on 450 labelled samples: original 99\.78 %, compressed 99\.78 %", last)


def test_validate_says_which_samples_are_broken(cli: Command, digits: Path, models: Path) -> None:
    """Validate says which samples are broken."""
    with np.load(models / "digits_test.npz") as file:
        images = file["image"][:8].astype(np.float32)
    images[3, 0, 0, 0] = np.nan
    np.savez(digits.with_name("some.npz"), image=images)
    outcome = cli("validate", digits, digits, "--data", digits.with_name("some.npz"))
    note = "note: 1 of the 8 samples have values that are NaN or infinite; what these reach is not counted"
    assert outcome.out.splitlines()[-1] == note


def test_json_is_one_object_and_nothing_else(process: Command, digits: Path) -> None:
    """JSON is one object and nothing else."""
    inspected = process("inspect", digits, "--json")
    assert_quiet(inspected)
    assert one_object(inspected.out)["cost"]["parameters"] == 38234
    words = ["compress", digits, "-o", "s.onnx", "--json", "--p", "inf", "--report", "s.json", "--effort", QUICK]
    compressed = process(*words)
    assert_quiet(compressed)
    report = one_object(compressed.out)
    assert report["after"]["parameters"] == 18281
    assert report["config"]["p"] == "inf"
    written = (digits.parent.parent / "s.json").read_text(encoding="utf-8")
    assert one_object(written) == report
    validated = process("validate", digits, "s.onnx", "--json")
    assert_quiet(validated)
    assert one_object(validated.out)["drift"]["outputs"][0]["name"] == "logits"


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (["inspect", "missing.onnx"], 3, "there is no such file"),
        (["inspect"], 2, 'Command "inspect" parameter MODEL requires an argument.'),
        (["compress", "missing.onnx", "-o", "s.onnx", "--ratio", "2"], 2, "the ratio is 2.0"),
        (["validate", "missing.onnx", "missing.onnx"], 3, "there is no such file"),
    ],
)
def test_json_is_one_object_on_errors_too(process: Command, words: list[str], code: int, what: str) -> None:
    """JSON is one object on errors too; the message for people is the same as without."""
    outcome = process(*words, "--json")
    error = one_object(outcome.out)["error"]
    assert (error["what"], error["exit_code"], outcome.code) == (what, code, code)
    plain = process(*words)
    assert (plain.code, plain.out, plain.err) == (code, "", outcome.err)
    assert error["mend"] in plain.err


def test_json_is_one_object_on_defects_and_interrupts_too(
    cli: Command, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON is one object on defects and interrupts too."""
    for raised, code in ((ZeroDivisionError("by zero"), 70), (KeyboardInterrupt(), 130)):
        monkeypatch.setattr(app_module, "run_inspect", _raising(raised))
        outcome = cli("inspect", digits, "--json")
        assert (outcome.code, one_object(outcome.out)["error"]["exit_code"]) == (code, code)


def _raising(error: BaseException) -> Any:
    def fail(*_arguments: object, **_options: object) -> None:
        raise error

    return fail


def run_into(stdout: str, *words: object) -> tuple[int, str]:
    """Run the command line with standard output redirected by a shell; return exit code and standard error."""
    line = f"{shlex.quote(sys.executable)} -m onnxfuse {shlex.join(map(str, words))} {stdout}"
    script = f"set -o pipefail; {line}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=HANGS, check=False)
    return done.returncode, done.stderr


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@needs_bash
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_reader_that_leaves_early_is_no_error(digits: Path, more: list[str]) -> None:
    """A reader that leaves early, as `head` does, is no error."""
    assert run_into("| true", "inspect", digits, *more) == (0, "")


@needs_bash
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_result_that_can_not_be_printed_is_an_output_error(digits: Path, more: list[str]) -> None:
    """A result that can't be printed is an output error, with one message."""
    message = (
        "onnxfuse: the result can't be printed: No space left on device\n  at:   standard output\n"
        "  mend: free some space, or send it elsewhere\n"
    )
    assert run_into(">/dev/full", "inspect", digits, *more) == (9, message)


@needs_bash
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_without_standard_output_the_work_is_done(digits: Path, more: list[str]) -> None:
    """Without standard output, as in some services, the work is done all the same."""
    small = digits.with_name("s.onnx")
    assert run_into(">&-", "compress", digits, "-o", small, "--ratio", 0.5, "--method", "prune", *more) == (0, "")
    assert small.exists()


def test_names_that_standard_output_can_not_spell(digits: Path) -> None:
    """A name that the encoding of standard output lacks does not cost the result."""
    path = Path(shutil.copy(digits, digits.with_name("netz-größe-三.onnx")))
    done = subprocess.run(
        [sys.executable, "-m", "onnxfuse", "inspect", str(path), "--json"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert one_object(done.stdout.decode())["model"] == str(path)


def test_quiet_prints_nothing(process: Command, digits: Path) -> None:
    """Quiet prints nothing."""
    outcome = process("compress", digits, "-o", "s.onnx", "-q", "--effort", QUICK)
    assert outcome == Outcome(0, "", "")


def test_verbose_shows_a_traceback_of_an_error(process: Command, tmp_path: Path) -> None:
    """Verbose shows a traceback of an error."""
    outcome = process("compress", "missing.onnx", "-o", "s.onnx", "-v")
    assert outcome.code == 3
    assert outcome.out == ""
    assert "Traceback" in outcome.err
    assert outcome.err.endswith("onnxfuse: there is no such file\n  at:   missing.onnx\n  mend: check the path\n")
    assert list(tmp_path.iterdir()) == []


INTERRUPTED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
from onnxfuse import pipeline
from onnxfuse.cli import main

def slow(*_):
    print("proving", flush=True)
    for _ in range(600):  # a signal that comes just before a sleep is only seen after it
        time.sleep(0.1)

pipeline.measure_drift = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals to send to one process")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_during_the_proof_leaves_nothing(digits: Path, sent: signal.Signals) -> None:
    """Interrupt during the proof leaves nothing."""
    folder = digits.parent
    (folder / "small.onnx").write_bytes(b"an earlier result")
    words = [sys.executable, "-c", INTERRUPTED, "compress", "digits.onnx", "-o", "small.onnx", "--effort", str(QUICK)]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "proving\n"
        assert len(list(folder.iterdir())) == 3  # the staged result is there while it is being proven
        running.send_signal(sent)
        _, err = running.communicate(timeout=HANGS)
    assert running.returncode == 130, err
    assert err == "onnxfuse: interrupted; nothing was written\n"
    assert names_in(folder) == ["digits.onnx", "small.onnx"]
    assert (folder / "small.onnx").read_bytes() == b"an earlier result"


# Stands for a package that is slow to import: the signal comes in the middle of that, where an exception may get lost.
IMPORTED = """
import os, signal, time
signal.raise_signal({number})
for _ in range(600):
    time.sleep(0.1)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals to send to one process")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("package", ["numpy", "onnx", "cyclopts"])
def test_interrupt_during_an_import_is_answered_at_once(tmp_path: Path, package: str, sent: signal.Signals) -> None:
    """Interrupt during an import is answered at once."""
    (tmp_path / f"{package}.py").write_text(IMPORTED.format(number=int(sent)))
    start = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    start += "from onnxfuse.cli import main; sys.exit(main(sys.argv[1:]))"
    paths = os.pathsep.join([str(tmp_path), str(Path(onnxfuse.__file__).parent.parent)])
    words = [sys.executable, "-c", start, "inspect", "digits.onnx", "--json"]
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stderr) == (130, "onnxfuse: interrupted; nothing was written\n")
    assert one_object(done.stdout)["error"]["exit_code"] == 130


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such jobs")
def test_a_job_in_the_background_goes_on_through_an_interrupt_that_it_ignores(tmp_path: Path) -> None:
    """A job in the background goes on through an interrupt that it ignores."""
    (tmp_path / "onnx_graphsurgeon.py").write_text(
        "import signal; signal.raise_signal(signal.SIGINT)\nraise SystemExit(5)"
    )
    start = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    start += "from onnxfuse.cli import main; sys.exit(main(sys.argv[1:]))"
    paths = os.pathsep.join([str(tmp_path), str(Path(onnxfuse.__file__).parent.parent)])
    words = [sys.executable, "-c", start, "--version"]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": paths}, timeout=50, check=False)
    assert done.returncode == 5


# Flags ---------------------------------------------------------------------------------------------------------------


WHOLE = ["round-to", "min-channels", "seed"]


def test_the_flags_that_take_whole_numbers_are_all_known() -> None:
    """The flags that take whole numbers are all known."""
    found = [f.name for options in (CompressionConfig, FusionOptions) for f in fields(options) if f.type is int]
    assert [name.replace("_", "-") for name in found] == WHOLE


@pytest.mark.parametrize(
    ("command", "flag"),
    [*((c, flag) for c in ("compress", "plan") for flag in WHOLE), ("inspect", "seed"), ("validate", "seed")],
)
@pytest.mark.parametrize("form", ["--{} 1.5", "--{}=2.0", "--{} .6"])
def test_a_fraction_is_no_whole_number(cli: Command, digits: Path, command: str, flag: str, form: str) -> None:
    """A fraction is no whole number."""
    words = [command, digits, *([digits] if command == "validate" else []), *form.format(flag).split()]
    outcome = cli(*words, *(["-o", digits.with_name("small.onnx")] if command == "compress" else []))
    assert (outcome.code, outcome.out) == (2, "")
    number = form.format(flag).replace("=", " ").split()[1]
    mend = "  mend: give a whole number\n"
    assert outcome.err == f"onnxfuse: --{flag} is {number}\n  at:   --{flag}\n{mend}"
    assert names_in(digits.parent) == ["digits.onnx"]


# Help ----------------------------------------------------------------------------------------------------------------


def test_every_command_has_help(cli: Command) -> None:
    """Every command has help."""
    for words in ([], ["--help"], ["inspect", "--help"], ["compress", "--help"], ["validate", "--help"]):
        outcome = cli(*words)
        assert outcome.code == 0
        assert "Usage: onnxfuse" in outcome.out
        assert "Exit codes: 0 done" in outcome.out
        assert outcome.err == ""


def test_version(cli: Command) -> None:
    """Version."""
    assert cli("--version").out == f"{onnxfuse.__version__}\n"


def test_every_option_is_a_flag_in_its_group(cli: Command) -> None:
    """Every option is a flag in its group."""
    text = cli("compress", "--help").out
    found = help_of(text)
    options = {f.name for f in fields(CompressionConfig)} | {f.name for f in fields(FusionOptions)}
    for name in options - {"fusion"}:
        assert name.replace("_", "-") in found
    assert {"calibration", "report", "json", "verbose", "quiet", "output"} <= found.keys()
    titles = ["What to compress, and how much", "How channels are fused", "Output"]
    assert [title for title in re.findall(r"╭─ (.+?) ─", text) if title != "Arguments"] == titles
    assert not re.search(r"--empty|\(\)|default: False", text)


def missing_names(registry: Registry[Any], help_text: str) -> list[str]:
    """Return the names in a registry that a help text does not mention."""
    return [name for name in registry if name not in words_of(help_text)]


@pytest.mark.parametrize("flag", REGISTRIES)
def test_help_names_every_member_of_a_registry(cli: Command, flag: str) -> None:
    """Help names every member of a registry."""
    found = help_of(cli("compress", "--help").out)
    # A word cut by a line break would count as missing, so the check holds for the width of a plain terminal.
    text = re.sub(r"\[default: .*", "", found[flag])
    assert missing_names(REGISTRIES[flag], text) == []


def test_a_name_that_the_help_lacks_is_found() -> None:
    """A name that the help lacks is found."""
    solvers: Registry[int] = Registry("solver")
    solvers.register("exact")(1)
    solvers.register("unheard-of")(2)
    assert missing_names(solvers, "How it is solved: exact, or not.") == ["unheard-of"]


def test_help_says_no_words_of_the_code(cli: Command) -> None:
    """Help says no words of the code."""
    for command in ("inspect", "compress", "validate"):
        text = cli(command, "--help").out
        assert not re.search(r"IMPORTANCES|METHODS|TARGETS|MASSES|SOLVERS|``|None|Args:", text)


def test_help_shows_patterns_as_they_are_written(cli: Command) -> None:
    """Help shows patterns as they are written: an asterisk is no markup."""
    found = help_of(cli("compress", "--help").out)
    assert "'/layer1/*=12'" in found["keep"]
    assert "'/layer1/*=0.75'" in found["keep"]
    assert "'/layer1/*'" in found["only"]
    assert "[default: ]" not in found["target"]


@pytest.mark.parametrize("pixels", Pixels)
def test_pixels_are_given_as_the_help_writes_them(cli: Command, digits: Path, pixels: Pixels) -> None:
    """Pixels are given as the help writes them, those with a leading hyphen too."""
    assert str(pixels) in words_of(help_of(cli("compress", "--help").out)["pixels"])
    words = ["compress", digits, "-o", digits.with_name("s.onnx"), "--json", "--method", "prune", "--pixels", pixels]
    assert one_object(cli(*words).out)["config"]["pixels"] == pixels


# Flags ---------------------------------------------------------------------------------------------------------------


def test_every_fusion_option_reaches_the_report(cli: Command, digits: Path) -> None:
    """Every fusion option reaches the report."""
    words = {
        "ratio": 0.5, "method": "intra-fusion", "scope": "hidden", "order": "forward", "seed": 3,
        "importance": "l2", "transport-target": "most-important", "source-mass": "importance", "target-mass": "softmax",
        "p": 2.0, "solver": "entropic", "regularisation": 0.1, "output-norm": "mean", "provider": "cpu",
    }  # fmt: skip
    flags = [part for name, value in words.items() for part in (f"--{name}", value)]
    flags += ["--no-normalised", "--bias-in-cost", "--no-prove"]
    outcome = cli("compress", digits, "-o", digits.with_name("s.onnx"), "--json", *flags)
    assert_quiet(outcome)
    config = one_object(outcome.out)["config"]
    assert {name: config[name.replace("-", "_")] for name in words} == words
    assert (config["normalised"], config["bias_in_cost"], config["prove"]) == (False, True, False)


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_every_method_gives_a_proven_file(cli: Command, digits: Path, method: str) -> None:
    """Every method gives a proven file."""
    outcome = cli("compress", digits, "-o", digits.with_name("s.onnx"), "--method", method, "--json", *FAST)
    report = one_object(outcome.out)
    assert report["after"]["parameters"] == 18281
    assert report["config"]["method"] == method
    assert bool(report["refits"]) == (method == "auto")


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_every_importance_gives_a_proven_file(cli: Command, digits: Path, importance: str) -> None:
    """Every importance gives a proven file."""
    words = ["--importance", importance, "--method", "prune", "--no-prove", "--json"]
    outcome = cli("compress", digits, "-o", digits.with_name("s.onnx"), *words)
    assert one_object(outcome.out)["after"]["parameters"] == 18281


def widths(outcome: Outcome) -> dict[str, tuple[int, int]]:
    """Return the channels of every group before and after."""
    report = one_object(outcome.out)
    return {g["name"]: (g["channels_before"], g["channels_after"]) for g in report["groups"]}


def test_only_and_skip_choose_groups_by_pattern(cli: Command, digits: Path) -> None:
    """Only and skip choose groups by pattern."""
    words = ["compress", digits, "-o", digits.with_name("s.onnx"), "--json", "--ratio", "0.5", *FAST]
    only = widths(cli(*words, "--only", "/block1/*", "--only", "/conv/Conv"))
    assert {name for name, (before, after) in only.items() if after < before} == {"/block1/conv1/Conv", "/conv/Conv"}
    skip = widths(cli(*words, "--skip", "/block?/conv1/Conv"))
    assert {name for name, (before, after) in skip.items() if after < before} == {"/conv/Conv", "/block2/conv2/Conv"}
    both = widths(cli(*words, "--only", "/block*", "--skip", "/block2/*"))
    assert [name for name, (before, after) in both.items() if after < before] == [
        "/block1/conv1/Conv",
        "/block3/conv1/Conv",
    ]


def test_scope_hidden_leaves_residual_streams(cli: Command, digits: Path) -> None:
    """Scope hidden leaves residual streams."""
    words = ["compress", digits, "-o", digits.with_name("s.onnx"), "--json", "--scope", "hidden", *FAST]
    outcome = cli(*words)
    groups = one_object(outcome.out)["groups"]
    assert {g["name"]: g["frozen"] for g in groups if g["residual"]} == dict.fromkeys(
        ("/conv/Conv", "/block2/conv2/Conv"), "a residual addition ties it, and the scope is hidden"
    )


@pytest.mark.parametrize(("ratio", "kept"), [("0", 16), ("0.3", 11), ("0.5", 8), ("0.99", 1)])
def test_ratio_is_the_share_removed(cli: Command, digits: Path, ratio: str, kept: int) -> None:
    """Ratio is the share removed."""
    outcome = cli("compress", digits, "-o", digits.with_name("s.onnx"), "--json", "--ratio", ratio, *FAST)
    assert widths(outcome)["/block1/conv1/Conv"] == (16, kept)


def test_default_ratio(cli: Command, digits: Path) -> None:
    """Default ratio."""
    outcome = cli("compress", digits, "-o", digits.with_name("s.onnx"), "--json", *FAST)
    assert one_object(outcome.out)["config"]["ratio"] == 0.3


def test_same_seed_same_bytes(cli: Command, digits: Path) -> None:
    """Same seed same bytes."""
    first, second, third = (digits.with_name(f"{i}.onnx") for i in range(3))
    for path, seed in ((first, 1), (second, 1), (third, 2)):
        cli("compress", digits, "-o", path, "--importance", "random", "--seed", seed, "-q", *FAST)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes() != third.read_bytes()


# Tables --------------------------------------------------------------------------------------------------------------


def test_names_with_brackets_and_colons_are_shown_as_they_are(cli: Command, make_mlp: MakeMlp, tmp_path: Path) -> None:
    """Names with brackets and colons are shown as they are."""
    path = tmp_path / "m.onnx"
    onnx.save(make_mlp(names=("first[relu]:smile:[/x]", "second[bold]")), path)
    text = cli("inspect", path, "-v").out
    assert "\nfirst[relu]:smile:[/x]" in text
    assert "\nsecond[bold]" in text
    text = cli("compress", path, "-o", tmp_path / "s.onnx", "-v").out
    assert re.search(r"^first\[relu\]:smile:\[/x\] +6 -> 4 ", text, re.MULTILINE)


def test_long_names_and_paths_stay_on_their_line_in_a_pipe(cli: Command, make_mlp: MakeMlp, tmp_path: Path) -> None:
    """Long names and paths stay on their line in a pipe."""
    name = ";".join(f"functional_1/layer_{i}/BiasAdd" for i in range(12))
    folder = tmp_path / ("folder" * 15)
    folder.mkdir()
    onnx.save(make_mlp(names=(name, "second")), folder / "m.onnx")
    text = cli("compress", folder / "m.onnx", "-o", folder / "s.onnx").out
    assert f"\n{name}    6 -> 4  " in text
    assert f"\nwritten to {folder / 's.onnx'}\n" in text
    assert cli("inspect", folder / "m.onnx").out.splitlines()[0] == str(folder / "m.onnx")


def test_many_inputs_are_counted_not_listed(cli: Command, tmp_path: Path) -> None:
    """Many inputs are counted not listed."""
    names = [f"input_{i}" for i in range(100)]
    x = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 2]) for name in names]
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 2])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Sum", names, ["y"])], "g", x, [y])
    path = tmp_path / "m.onnx"
    onnx.save(onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)]), path)
    shown = cli("inspect", path).out.splitlines()[2]
    assert shown == f"inputs: {', '.join(f'{name} 1x2' for name in names[:6])}, 94 more"


def test_more_than_twenty_groups_are_cut_short(cli: Command, tmp_path: Path) -> None:
    """More than twenty groups are cut short."""
    layers = 25
    rng = np.random.default_rng(0)
    weights = [onnx.numpy_helper.from_array(rng.normal(size=(4, 4)).astype(np.float32), f"w{i}") for i in range(layers)]
    nodes = []
    for i in range(layers):
        nodes.append(onnx.helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"h{i}"], name=f"layer{i}"))
        nodes.append(onnx.helper.make_node("Relu", [f"h{i}"], [f"x{i + 1}"], name=f"relu{i}"))
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in ("x0", f"x{layers}")]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
    onnx.save(model, tmp_path / "m.onnx")
    words = ["compress", tmp_path / "m.onnx", "-o", tmp_path / "s.onnx", "--no-prove"]
    short = cli(*words).out
    assert "layer19" in short
    assert "layer20" not in short
    assert "groups not shown: 4 more fused, 1 kept as they are (-v shows all)" in short
    long = cli(*words, "-v").out
    assert all(f"layer{i} " in long for i in range(layers))
    assert "groups not shown" not in long


def test_a_model_without_numeric_outputs_is_told_to_have_no_drift(cli: Command, tmp_path: Path) -> None:
    """A model without numeric outputs is told to have no drift."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 4] x) => (seq(float[n, 4]) y) {
      a = Constant <value = float[4, 4] {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}> ()
      h = MatMul (x, a)
      r = Relu (h)
      b = Constant <value = float[4, 4] {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}> ()
      z = MatMul (r, b)
      y = SequenceConstruct (z)
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    outcome = cli("compress", tmp_path / "m.onnx", "-o", tmp_path / "s.onnx")
    assert outcome.code == 0
    assert "no output is a tensor of numbers, so there is nothing to compare" in outcome.out


def test_words_of_the_checker_stay_off_the_streams(process: Command, zoo: Path, tmp_path: Path) -> None:
    """Words of the checker stay off the streams."""
    model = zoo / "models" / "squeezenet_tensor_input.onnx"
    if not model.is_file():
        pytest.skip(f"there is no {model}")
    outcome = process("compress", model, "-o", tmp_path / "s.onnx", "--json", "--no-prove", "--method", "prune")
    assert_quiet(outcome)
    assert one_object(outcome.out)["drift"]["outputs"] == []


def test_tables_show_no_empty_columns(models: Path) -> None:
    """Tables show no empty columns."""
    report = onnxfuse.compress(
        models / "digits_folded.onnx", only=("/block?/conv1/Conv",), effort=QUICK, prove=False
    ).report
    shown = Console(width=80)
    with shown.capture() as capture:
        shown.print(compression_tables(report, verbose=False))
    assert "state" not in capture.get()
    assert "kept in memory" in capture.get()


def test_a_terminal_folds_long_names(make_mlp: MakeMlp) -> None:
    """A terminal folds long names."""
    report = onnxfuse.inspect(make_mlp(names=("layer" * 40, "second")))
    shown = Console(width=80)
    with shown.capture() as capture:
        shown.print(inspection_tables(report, verbose=True))
    table = capture.get().split("coupling group")[1].split("nodes whose weights")[0]
    assert all(len(line) <= 80 for line in table.splitlines())
    assert "layer" * 40 in "".join(line.split(" ")[0] for line in table.splitlines())


# What main itself does -----------------------------------------------------------------------------------------------


def test_a_defect_is_called_one(cli: Command, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect is called one."""

    def broken(*_args: object, **_options: object) -> None:
        message = "by zero"
        raise ZeroDivisionError(message)

    monkeypatch.setattr(app_module, "run_inspect", broken)
    outcome = cli("inspect", digits)
    assert outcome.code == 70
    assert outcome.err == (
        "onnxfuse: a defect of onnxfuse: ZeroDivisionError: by zero\n"
        "  mend: run the same again with -v at the end, and report what it prints\n"
    )
    with pytest.raises(ZeroDivisionError):
        command_line.main(["inspect", str(digits), "-v"])


def test_the_handler_of_the_caller_comes_back(cli: Command) -> None:
    """The handler of the caller comes back."""
    before = signal.getsignal(signal.SIGTERM)
    assert cli("--version").code == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_while_unwinding_from_an_interrupt_counts_as_one(
    monkeypatch: pytest.MonkeyPatch, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error while unwinding from an interrupt counts as one."""

    def interrupted(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            what = "the folder is not empty"
            raise OSError(what)

    monkeypatch.setattr("onnxfuse.pipeline.measure_drift", interrupted)
    assert main(["compress", str(digits), "-o", str(digits.with_name("s.onnx")), *FAST]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_plan_is_printed_written_and_replayed(cli: Command, digits: Path) -> None:
    """A plan is printed or written; compress follows it; a plan that can't be written is refused."""
    printed = cli("plan", digits, "--ratio", "0.5", "--method", "prune", "--no-prove")
    assert_quiet(printed)
    assert one_object(printed.out)["groups"]["/block1/conv1/Conv"]["keep"] == 8
    path, small = digits.with_name("plan.json"), digits.with_name("s.onnx")
    assert_quiet(cli("plan", digits, "-o", path, "--ratio", "0.5", "--method", "prune", "--no-prove"))
    assert path.read_text(encoding="utf-8") == printed.out
    outcome = cli("compress", digits, "-o", small, "--plan", path, "--method", "prune", "--no-prove", "--json")
    assert one_object(outcome.out)["after"]["macs"] < 0.5 * one_object(outcome.out)["before"]["macs"]
    assert cli("plan", digits, "-o", digits).code == 9


def test_methods_lists_every_member_of_every_registry(cli: Command) -> None:
    """Every name that a flag takes is listed with a line of its own, without markup."""
    outcome = cli("methods")
    assert_quiet(outcome)
    first = {line.split("  ")[0] for line in outcome.out.splitlines()}
    for registry in (METHODS, IMPORTANCES, TARGETS, MASSES, SOLVERS, CANDIDATES):
        assert first >= set(registry)
    assert "auto" in first
    assert "`" not in outcome.out


def test_inspect_marks_statistics_and_channels_that_can_not_be_mixed() -> None:
    """Inspect marks groups with a statistic, and those that can only be dropped; a legend explains the marks shown."""
    net = Net(17, seed=1)
    x = net.input(1, 3, 4)
    h = net.node("LayerNormalization", net.matmul(x, 6, name="stream"), net.vector(6), net.vector(6))
    product = net.node(
        "MatMul",
        net.node("Relu", net.matmul(h, 5, bias=False, name="query")),
        net.node("Transpose", net.matmul(h, 5, bias=False, name="key"), perm=[0, 2, 1]),
    )
    net.output(product)
    report = onnxfuse.inspect(net.model(), provider="cpu")
    found = {group.name: group for group in report.groups}
    assert (found["stream"].statistic is None, found["stream"].unmixable) == (False, None)
    assert found["query"].statistic is None
    assert "multiplies two computed tensors over it" in str(found["query"].unmixable)
    assert json.loads(report.to_json())["groups"][0]["statistic"] == found["stream"].statistic
    texts = {}
    for verbose in (False, True):
        with (shown := Console(width=200)).capture() as capture:
            shown.print(inspection_tables(report, verbose=verbose))
        texts[verbose] = [line.rstrip() for line in capture.get().splitlines()]
    states = {line.split()[0]: line.split("free")[1] for line in texts[False] if " free" in line}
    assert states == {"stream": " ~", "query": " /"}
    assert sum(line.startswith(("~ ", "/ ")) for line in texts[False]) == 2
    assert f"query / {found['query'].unmixable}" in texts[True]
    assert f"query / {found['query'].unmixable}" not in texts[False]


def test_inspect_explains_no_marks_that_it_does_not_show(make_mlp: MakeMlp) -> None:
    """Without such groups there is no legend."""
    with (shown := Console(width=200)).capture() as capture:
        shown.print(inspection_tables(onnxfuse.inspect(make_mlp()), verbose=True))
    assert not any(line.startswith(("~ ", "/ ")) for line in capture.get().splitlines())

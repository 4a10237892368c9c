"""Reports as tables for people."""

import re
from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onnxfuse.fusion.candidates import CANDIDATES
from onnxfuse.fusion.methods import METHODS
from onnxfuse.importance import IMPORTANCES
from onnxfuse.planning.files import Plan
from onnxfuse.proof.drift import Drift
from onnxfuse.report import CompressionReport, GroupReport, InspectReport, ModelCost, ValidationReport
from onnxfuse.transport import MASSES, SOLVERS, TARGETS

__all__ = ["compression_tables", "inspection_tables", "method_tables", "plan_tables", "validation_tables"]

_MOST_GROUPS = 20
_MOST_INPUTS = 6
# Columns of words; all others but the first have numbers.
_WORDS = frozenset({"method", "state"})
_STATISTIC, _DROPPED = "~", "/"
_DAMAGE = "J: what is lost of the variance of what the group's readers end in, before any layer is fitted anew"
_SMALLEST_PERCENT = 0.005
_LEGEND = {
    _STATISTIC: "a statistic is computed over these channels, which fewer channels can only approximate",
    _DROPPED: "these channels can be dropped, but not mixed",
}


def inspection_tables(report: InspectReport, *, verbose: bool) -> RenderableType:
    """Show what `inspect` found."""
    opsets = ", ".join(f"{domain} {version}" for domain, version in report.opset.items())
    head = _lines(
        report.model,
        f"opset {opsets}, IR {report.ir_version}, {_bytes(report.cost.bytes)}",
        f"inputs: {_inputs(report.input_shapes)}",
        f"{report.cost.parameters:,} parameters, {report.cost.macs:,} MACs",
        f"{100 * report.compressible_share:.1f} % of the parameters follow channels that can be fused",
    )
    table = _table("coupling group", "channels", "parameters", "state")
    for group in report.groups:
        state = f"frozen: {group.frozen}" if group.frozen else ("residual stream" if group.residual else "free")
        marks = "" if group.frozen else "".join(f" {mark}" for mark, _ in _marks(group))
        _add(table, group.name, str(group.channels_before), f"{group.parameters:,}", state + marks)
    used = {mark for group in report.groups if not group.frozen for mark, _ in _marks(group)}
    legend = [Text(f"{mark} {meaning}", style="dim") for mark, meaning in _LEGEND.items() if mark in used]
    why = [f"{g.name} {mark} {reason}" for g in report.groups if not g.frozen for mark, reason in _marks(g)]
    if why and verbose:
        legend.extend(Text(line, style="dim") for line in why)
    nodes = [f"{group.name}: {', '.join(group.nodes)}" for group in report.groups] if verbose else []
    more = [Text("nodes whose weights follow the channels", style="bold"), *map(Text, nodes)] if nodes else []
    return Group(head, *([table] if report.groups else []), *legend, *more, *_notes(report.notes))


def compression_tables(report: CompressionReport, *, verbose: bool) -> RenderableType:
    """Show what `compress` did."""
    fused = [g for g in report.groups if g.channels_after < g.channels_before]
    shown = report.groups if verbose else fused[:_MOST_GROUPS]
    table, legend = _group_table(shown)
    hidden = {"more fused": len(fused) - _MOST_GROUPS, "kept as they are": len(report.groups) - len(fused)}
    words = ", ".join(f"{count} {word}" for word, count in hidden.items() if count > 0)
    more = [Text(f"groups not shown: {words} (-v shows all)", style="dim")] if words and not verbose else []
    seconds = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in report.seconds.items())
    last = _lines(f"written to {report.output}" if report.output else "kept in memory")
    return Group(
        _cost_table(report.before, report.after),
        *([table] if shown else []),
        *legend,
        *more,
        _drift_table(report.drift),
        *_notes(report.notes),
        Text(seconds, style="dim"),
        last,
    )


def plan_tables(plan: Plan) -> RenderableType:
    """Show what `plan` decided, for those who have the plan itself in a file."""
    damaged = any(group.damage is not None for group in plan.groups.values())
    table = _table("coupling group", "channels", *(["J"] if damaged else []), "state")
    for name, group in plan.groups.items():
        state = f"kept: {group.frozen}" if group.frozen else ("kept" if group.keep == group.channels else "")
        shown = _damage(group.damage) if group.keep < group.channels else ""
        _add(table, name, f"{group.channels} -> {group.keep}", *([shown] if damaged else []), state)
    return Group(table, *([Text(_DAMAGE, style="dim")] if damaged else []), *_notes(plan.notes))


def _group_table(groups: Sequence[GroupReport]) -> tuple[Table, list[Text]]:
    """Return a line for each group with what won for it and the damage that does, and what the words of it mean."""
    fused = [group.channels_after < group.channels_before for group in groups]
    states = [_state(group) for group in groups]
    damaged = any(group.damage is not None for group, is_fused in zip(groups, fused, strict=True) if is_fused)
    columns = (("method", any(fused)), ("J", damaged), ("state", any(states)))
    table = _table("coupling group", "channels", *(name for name, is_used in columns if is_used))
    for group, is_fused, state in zip(groups, fused, states, strict=True):
        cells = ((group.method or "-", _damage(group.damage)) if is_fused else ("", "")) + (state,)
        used = (cell for cell, (_, is_used) in zip(cells, columns, strict=True) if is_used)
        _add(table, group.name, f"{group.channels_before} -> {group.channels_after}", *used)
    return table, [Text(_DAMAGE, style="dim")] if damaged else []


def _damage(damage: float | None) -> str:
    """Return J in percent, with two digits or more, so that small ones can be told apart."""
    if damage is None:
        return "-"
    percent = 100 * damage
    return f"{percent:.2f} %" if percent >= _SMALLEST_PERCENT or percent == 0 else f"{percent:.1e} %"


def validation_tables(report: ValidationReport) -> RenderableType:
    """Show what `validate` measured."""
    parts: list[RenderableType] = [_cost_table(report.before, report.after), _drift_table(report.drift)]
    if report.accuracy is not None:
        right = ", ".join(f"{word} {100 * share:.2f} %" for word, share in report.accuracy.items())
        parts.append(Text(f"top-1 accuracy on {report.drift.samples} labelled samples: {right}", style="bold"))
    return Group(*parts, *_notes(report.notes))


def method_tables() -> RenderableType:
    """Show what there is to choose from, with the first line of what each says of itself."""
    tables = []
    for flag, registry in (
        ("--method", METHODS),
        ("--importance", IMPORTANCES),
        ("--transport-target", TARGETS),
        ("--source-mass, --target-mass", MASSES),
        ("--solver", SOLVERS),
        ("--candidates", CANDIDATES),
    ):
        table = _table(flag, "state")
        table.columns[1].header = ""
        if flag == "--method":
            _add(table, "auto", "Keep the channels with which their readers lose least, and fit those readers anew.")
        for name, member in registry.items():
            _add(table, name, _first_line(member.__doc__ or ""))
        tables.append(table)
    return Group(*tables)


def _first_line(text: str) -> str:
    """Return the first line of a docstring without its markup."""
    return re.sub(r":math:|``?", "", text.strip().split("\n")[0])


def _cost_table(before: ModelCost, after: ModelCost) -> Table:
    table = _table("", "before", "after", "kept")
    rows = (
        ("parameters", f"{before.parameters:,}", f"{after.parameters:,}", after.parameters, before.parameters),
        ("MACs", f"{before.macs:,}", f"{after.macs:,}", after.macs, before.macs),
        ("file", _bytes(before.bytes), _bytes(after.bytes), after.bytes, before.bytes),
    )
    for name, was, now, part, whole in rows:
        _add(table, name, was, now, f"{100 * part / whole:.1f} %" if whole else "-")
    return table


def _drift_table(drift: Drift) -> RenderableType:
    head = _lines(f"drift on {drift.data}, run on {drift.provider}")
    if not drift.outputs:
        return Group(head, Text("no output is a tensor of numbers, so there is nothing to compare", style="yellow"))
    table = _table("output", "max |diff|", "mean |diff|", "cosine", "SQNR dB", "same top-1")
    for o in drift.outputs:
        _add(
            table,
            o.name,
            f"{o.max_abs:.4g}",
            f"{o.mean_abs:.4g}",
            "-" if o.cosine is None else f"{o.cosine:.4f}",
            "-" if o.sqnr_db is None else f"{o.sqnr_db:.1f}",
            "-" if o.top1_agreement is None else f"{100 * o.top1_agreement:.1f} %",
        )
    return Group(head, table)


def _marks(group: GroupReport) -> list[tuple[str, str]]:
    """Return what is special about a group that may change, as mark and reason."""
    told = ((_STATISTIC, group.statistic), (_DROPPED, group.unmixable))
    return [(mark, reason) for mark, reason in told if reason]


def _state(group: GroupReport) -> str:
    if group.channels_after < group.channels_before:
        return "residual stream" if group.residual else ""
    return f"kept: {group.frozen}" if group.frozen else "kept"


def _notes(notes: Sequence[str]) -> list[Text]:
    return [Text(f"note: {note}", style="yellow") for note in notes]


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        # Names of nodes can be long; they fold, numbers never do.
        is_number = i > 0 and name not in _WORDS
        table.add_column(name, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    return table


def _add(table: Table, *cells: str) -> None:
    """Add a row of plain text: names may hold brackets and colons, which are markup in a string."""
    table.add_row(*map(Text, cells))


def _lines(*lines: str) -> Text:
    """Text that is never wrapped, so that paths can be copied."""
    return Text("\n".join(lines), no_wrap=True, overflow="ignore")


def _inputs(shapes: Mapping[str, Sequence[int]]) -> str:
    """Name the inputs with their shapes, but not hundreds of them."""
    words = [f"{name} {'x'.join(map(str, dims)) or 'scalar'}" for name, dims in shapes.items()]
    more = len(words) - _MOST_INPUTS
    return ", ".join([*words[:_MOST_INPUTS], *([f"{more} more"] if more > 0 else [])]) or "none"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        # What would be shown as 1000.0 is 1.0 of the next unit.
        if size < 999.95:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"

"""Reports as tables for people."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onnxfuse.proof.drift import Drift
from onnxfuse.report import CompressionReport, GroupReport, InspectReport, ModelCost, ValidationReport

__all__ = ["compression_tables", "inspection_tables", "validation_tables"]

_MOST_GROUPS = 20


def inspection_tables(report: InspectReport, *, verbose: bool) -> RenderableType:
    """Show what `inspect` found."""
    inputs = ", ".join(f"{n} {'x'.join(map(str, d)) or 'scalar'}" for n, d in report.input_shapes.items())
    opsets = ", ".join(f"{domain} {version}" for domain, version in report.opset.items())
    head = Text(
        f"{report.model}\n"
        f"opset {opsets}, IR {report.ir_version}, {_bytes(report.cost.bytes)}, "
        f"{report.cost.parameters:,} parameters, {report.cost.macs:,} MACs with {inputs}\n"
        f"{100 * report.compressible_share:.1f} % of the parameters follow channels that can be fused"
    )
    table = _table("coupling group", "channels", "parameters", "state")
    for group in report.groups:
        state = f"frozen: {group.frozen}" if group.frozen else ("residual stream" if group.residual else "free")
        table.add_row(group.name, str(group.channels_before), f"{group.parameters:,}", state)
        if verbose:
            table.add_row(Text("  " + ", ".join(group.nodes), style="dim"), "", "", "")
    return Group(head, table, *_notes(report.notes))


def compression_tables(report: CompressionReport, *, verbose: bool) -> RenderableType:
    """Show what `compress` did."""
    shown = report.groups if verbose else [g for g in report.groups if g.channels_after < g.channels_before]
    table = _table("coupling group", "channels", "state")
    for group in shown if verbose else shown[:_MOST_GROUPS]:
        table.add_row(group.name, f"{group.channels_before} -> {group.channels_after}", _state(group))
    hidden = len(report.groups) - min(len(shown), len(shown) if verbose else _MOST_GROUPS)
    more = [Text(f"{hidden} more groups; -v shows them all", style="dim")] if hidden else []
    seconds = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in report.seconds.items())
    last = Text(f"written to {report.output}" if report.output else "kept in memory")
    return Group(
        _cost_table(report.before, report.after),
        table,
        *more,
        _drift_table(report.drift),
        *_notes(report.notes),
        Text(seconds, style="dim"),
        last,
    )


def validation_tables(report: ValidationReport) -> RenderableType:
    """Show what `validate` measured."""
    parts: list[RenderableType] = [_cost_table(report.before, report.after), _drift_table(report.drift)]
    if report.accuracy is not None:
        right = ", ".join(f"{word} {100 * share:.2f} %" for word, share in report.accuracy.items())
        parts.append(Text(f"top-1 accuracy on {report.drift.samples} labelled samples: {right}", style="bold"))
    return Group(*parts)


def _cost_table(before: ModelCost, after: ModelCost) -> Table:
    table = _table("", "before", "after", "kept")
    rows = (
        ("parameters", f"{before.parameters:,}", f"{after.parameters:,}", after.parameters, before.parameters),
        ("MACs", f"{before.macs:,}", f"{after.macs:,}", after.macs, before.macs),
        ("file", _bytes(before.bytes), _bytes(after.bytes), after.bytes, before.bytes),
    )
    for name, was, now, part, whole in rows:
        table.add_row(name, was, now, f"{100 * part / whole:.1f} %" if whole else "-")
    return table


def _drift_table(drift: Drift) -> RenderableType:
    table = _table("output", "max |diff|", "mean |diff|", "cosine", "SQNR dB", "same top-1")
    for o in drift.outputs:
        table.add_row(
            o.name,
            f"{o.max_abs:.4g}",
            f"{o.mean_abs:.4g}",
            "-" if o.cosine is None else f"{o.cosine:.4f}",
            "-" if o.sqnr_db is None else f"{o.sqnr_db:.1f}",
            "-" if o.top1_agreement is None else f"{100 * o.top1_agreement:.1f} %",
        )
    return Group(Text(f"drift on {drift.data}, {drift.samples} run on {drift.provider}"), table)


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
        is_number = i > 0 and name != "state"
        table.add_column(name, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    return table


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"

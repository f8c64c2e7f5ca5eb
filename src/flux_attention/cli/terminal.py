"""What the commands print: route strips, tables, errors."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from flux_attention.report import RouteRow, Table, ramp


def strip(row: RouteRow) -> Text:
    """One cell per layer: tall = full attention, low = sparse, coloured by p_full."""
    text = Text()
    for full, shade in zip(row.use_full, row.shades, strict=True):
        text.append("█" if full else "▂", style="rgb({},{},{})".format(*ramp(shade)))
    return text


def print_routes(console: Console, rows: Sequence[RouteRow]) -> None:
    """A heat row per prompt."""
    grid = RichTable.grid(padding=(0, 2))
    for row in rows:
        grid.add_row(Text(row.label), strip(row), Text(f"Ω {row.sparsity:.2f}"))
    console.print(grid)
    legend = Text("█ full attention  ▂ sparse    p(full) 0 ", style="dim")
    for step in range(9):
        legend.append("━", style="rgb({},{},{})".format(*ramp(step / 8)))
    legend.append(f" 1    {len(rows[0].use_full)} layers, first to last", style="dim")
    console.print(legend)


def print_table(console: Console, table: Table, title: str = "") -> None:
    """A table with numbers to the right."""
    found = RichTable(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for i, head in enumerate(table.head):
        found.add_column(head, justify="left" if i == 0 else "right")
    for i, row in enumerate(table.rows):
        found.add_row(*row, style="bold" if i == table.strong else None)
    console.print(found)


def print_error(console: Console, error: BaseException) -> None:
    """One clean line: errors of bad input say by themselves what to do."""
    message = str(error) or type(error).__name__
    console.print(Text("error: ", style="bold red").append(message, style="red"), soft_wrap=True)

"""The command `latent-grpo data`: which data sets there are, and how they come into the data folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from latent_grpo.common.terminal_text import TextConsole

data = typer.Typer(no_args_is_help=True, help="Lists the benchmarks' and training sets, and fetches them.")


@data.command("list")
def list_sets() -> None:
    """Lists the known data sets with their sizes, files of the data folder, origins and licences."""
    from latent_grpo.deploy.data.sets import SETS

    table = Table(header_style="bold", box=None, padding=(0, 2, 0, 0))
    for name in ("name", "use", "rows", "file", "from", "licence"):
        table.add_column(name, overflow="fold", justify="right" if name == "rows" else "left")
    for found in SETS.values():
        rows = "?" if found.rows is None else f"{found.rows:,}"
        origin = "your own copy" if found.refused else f"hub: {found.repository}"
        table.add_row(found.name, found.use, rows, found.written_as, origin, found.licence)
    TextConsole().print(table)


@data.command("fetch")
def fetch_sets(
    names: Annotated[list[str], typer.Argument(help="Names of data sets; `latent-grpo data list` shows them.")],
    to: Annotated[Path, typer.Option(help="The data folder.")] = Path("data"),
    local: Annotated[
        Path | None, typer.Option("--from", help="Folder with the authors' own files, instead of the hub.")
    ] = None,
) -> None:
    """Fetches data sets from the hub, or takes the authors' files from a folder, and writes them with a manifest."""
    from latent_grpo.deploy.data.fetch import fetch
    from latent_grpo.deploy.data.sets import chosen
    from latent_grpo.deploy.run.progress import Reporter

    fetch(chosen(names), to, Reporter(), local=local)

"""The commands `plan`, what a run will need and take, and `manifest`, its files for KubeRay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from latent_grpo.common.terminal_text import TextConsole
from latent_grpo.deploy.cli.arguments import listed, overrides, settings

planning = typer.Typer()
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
Profile = Annotated[str, typer.Option(help="Name of a shipped profile, or the path of a YAML file.")]


@planning.command(context_settings=SETTINGS)
def plan(
    context: typer.Context,
    profile: Profile = "quickstart",
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of the run; 0: the CPU.")] = 0,
    gpu: Annotated[str | None, typer.Option(help="Kind of card, for its memory: h100, h200, a100, ...")] = None,
    rates: Annotated[Path | None, typer.Option(help="A run whose own steps say how fast the device is.")] = None,
    growth: Annotated[
        bool, typer.Option("--growth", help="Also simulate 1 to 1,024 workers, with the driver as fast as it is here.")
    ] = False,
    allow_plugins: Annotated[
        str, typer.Option(help="Modules that the profile names, separated by commas: import and check them too.")
    ] = "",
) -> None:
    """Says what a run will need and take: memory, seconds of each stage, waiting, hours. Starts nothing."""
    from latent_grpo.deploy.planning.plan import plan as rows_of
    from latent_grpo.deploy.planning.rates import rates_of

    config = settings(profile, context, gpus or None, sized=bool(gpus))
    measured = None if rates is None else rates_of(rates)
    console, table = TextConsole(), Table(title=f"{profile}: plan", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    rows = rows_of(config, gpus=gpus, gpu=gpu, rates=measured, grow=growth, allowed=listed(allow_plugins))
    for name, found in rows:
        table.add_row(name, found)
    console.print(table)


manifest = typer.Typer(help="Files for a cluster, made for a profile.")
planning.add_typer(manifest, name="manifest")


@manifest.callback()
def _manifest() -> None:
    """Keeps `kuberay` a command of its own beside others to come."""


@manifest.command(context_settings=SETTINGS)
def kuberay(
    context: typer.Context,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the run; a profile's counts for them are taken.")],
    profile: Profile = "gsm8k-aug",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs that a node has.")] = 8,
    image: Annotated[str | None, typer.Option(help="The image; default: that of rayjob.yaml, to be changed.")] = None,
    claim: Annotated[str, typer.Option(help="The storage claim that is mounted at /shared.")] = "latent-grpo-shared",
) -> None:
    """Prints a RayJob for KubeRay whose GPU pods autoscale: `latent-grpo manifest kuberay ... | kubectl apply -f -`."""
    from latent_grpo.deploy.cluster.kuberay import kuberay_manifest

    config = settings(profile, context, gpus)
    text = kuberay_manifest(
        config, profile, gpus=gpus, per_node=gpus_per_node, image=image, claim=claim, overrides=overrides(context.args)
    )
    typer.echo(text, nl=False)

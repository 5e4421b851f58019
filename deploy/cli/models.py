"""The commands that use a trained model, and that make one of a run: `generate`, `serve` and `export`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from latent_grpo.common.config import ConfigError
from latent_grpo.common.config.section import SEED_LIMIT
from latent_grpo.common.terminal_text import TextConsole
from latent_grpo.deploy.cli.arguments import interruptible

models = typer.Typer()
Model = Annotated[str, typer.Option(help="Folder or hub id of a trained model, or the URL of one in a remote run.")]


def _say(sentence: str) -> None:
    """Prints a remark beside the responses, which have standard output for themselves."""
    TextConsole(stderr=True, highlight=False, soft_wrap=True).print(Text(sentence, "yellow"))


@models.command()
def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Option(help="A problem; without it and --file, lines of standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A .jsonl, .parquet or .csv file of problems, one a row.")] = None,
    column: Annotated[
        str | None, typer.Option(help="Column of the problems; default: messages, problem, question or prompt.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this many rows, the first ones.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the responses to --file into this .jsonl file, not to standard output.")
    ] = None,
    thoughts: Annotated[bool, typer.Option("--thoughts", help="Show the latent steps: tokens and weights.")] = False,
    samples: Annotated[int, typer.Option(min=1, help="Responses to each problem.")] = 1,
    seed: Annotated[
        int, typer.Option(min=0, max=SEED_LIMIT - 1, help="Seed of the draws; the same seed gives the same responses.")
    ] = 0,
    noise: Annotated[float, typer.Option(help="Scale of the noise in latent steps; 0: off.")] = 0.0,
    temperature: Annotated[float | None, typer.Option(help="Of visible steps; default: the model's own.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Default: the model's own.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of visible steps; 0: no bound; default: the model's own.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most steps, latent and visible together; default: the model's own.")
    ] = None,
    engine: Annotated[Literal["transformers", "vllm"], typer.Option(help="The engine.")] = "transformers",
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Of the weights; default: as they are stored.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; of the engine transformers.")] = "auto",
) -> None:
    """Generates responses with a trained model: to a problem, to lines that are typed, or to the rows of a file."""
    from latent_grpo.deploy.run.storage.copy import model_copy
    from latent_grpo.deploy.serving import generate as generating
    from latent_grpo.rollout_workers.latent_model import MAX_ROWS, LatentModel, Sampling

    if prompt is not None and file is not None:
        raise ConfigError("--prompt and --file exclude each other; give one of them")
    of_files = {"--column": column, "--limit": limit, "--output": output}
    given = [name for name, value in of_files.items() if value is not None]
    if file is None and given:
        raise ConfigError(f"{given[0]} has no effect without --file; leave it out, or give a file of problems")
    problems = [] if file is None else generating.problems_of(file, column, limit)
    sampling = Sampling(noise=noise, temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens)
    wish = generating.Wish(sampling=sampling, samples=samples, seed=seed, thoughts=thoughts)
    rows = max(samples, MAX_ROWS)
    with (
        interruptible(),
        LatentModel(model_copy(model), engine=engine, dtype=dtype, device=device, max_rows=rows, say=_say) as loaded,
    ):
        if file is not None:
            with generating.rows_writer(output) as write:
                written = generating.generate_rows(loaded, problems, wish, write)
            _say(f"{written:,} responses to {len(problems):,} problems" + (f" in {output}" if output else ""))
        else:
            console = generating.terminal()
            asked = generating.typed_problems(typer.get_text_stream("stdin"), console) if prompt is None else [prompt]
            generating.generate_here(loaded, asked, wish, console)


@models.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Model,
    only_print: Annotated[bool, typer.Option("--print", help="Print vLLM's command, and start nothing.")] = False,
) -> None:
    """Starts vLLM's own server with latent steps. Options of vLLM follow: `--port 8000 --max-num-seqs 64 ...`."""
    from latent_grpo.deploy.run.storage.copy import model_copy
    from latent_grpo.deploy.serving.serve import serve as start

    command = start(model_copy(model), context.args, say=_say, only_print=only_print)
    typer.echo(shlex.join(command))


@models.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its URL.")],
    to: Annotated[str, typer.Option(help="The folder to write, or hf:OWNER/NAME for a repository of the hub.")],
    step: Annotated[int | None, typer.Option(help="Export the checkpoint of this step.")] = None,
    best: Annotated[bool, typer.Option("--best", help="Export the best checkpoint (checkpoint.keep_best).")] = False,
    public: Annotated[bool, typer.Option("--public", help="A repository that is new is public, not private.")] = False,
) -> None:
    """Exports a run's trained model, or one of its checkpoints, as a Hugging Face folder with a model card."""
    from latent_grpo.deploy.export.export import export as write

    with interruptible():
        where = write(run, to, step=step, best=best, public=public, say=_say)
    typer.echo(where)


@models.command()
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run that does not go on.")],
    to: Annotated[str | None, typer.Option(help="s3://BUCKET/PREFIX, for a run that has no copy there yet.")] = None,
) -> None:
    """Uploads what a run's copy in an object store lacks, after a run whose upload did not end."""
    from latent_grpo.deploy.run.storage.upload import push as upload

    with interruptible():
        where = upload(run, _say, to)
    typer.echo(where)

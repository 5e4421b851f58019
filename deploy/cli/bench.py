"""The command `latent-grpo bench`: one subcommand per benchmark, each in a module of `deploy/bench`.

A benchmark prints what it measured on this machine and does not judge it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from latent_grpo.common.config.section import SEED_LIMIT
from latent_grpo.deploy.bench.figures import write_json
from latent_grpo.deploy.cli.arguments import overrides

bench = typer.Typer(no_args_is_help=True, help="Measures a part of the pipeline on this machine.")
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]
Found = TypeVar("Found")


def _give(
    found: Found,
    show: Callable[[Found], None],
    json_file: Path | None,
    write: Callable[[Found, Path], None] = write_json,
) -> None:
    """Shows the figures, and writes them where a file is wanted."""
    show(found)
    if json_file is not None:
        write(found, json_file)


@bench.command("reward")
def bench_reward(
    cases: Annotated[int, typer.Option(min=1, help="Number of gradings per workload.")] = 4000,
    processes: Annotated[int, typer.Option(min=1, help="Number of grader processes in the pool.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=SEED_LIMIT - 1, help="Seed of the generated answers.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Measures gradings per second and core, and the time of single ones, on GSM8K-like and MATH-like answers."""
    from latent_grpo.deploy.bench.reward import measure, show

    results = measure(cases, processes, seed)
    _give(results, show, json_file)


@bench.command("loop", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench_loop(
    context: typer.Context,
    profile: Annotated[str, typer.Option(help="Name of a shipped profile, or the path of a YAML file.")] = "quickstart",
    model: Annotated[str | None, typer.Option(help="Initial model; default: the profile's.")] = None,
    steps: Annotated[int, typer.Option(min=6, help="Steps of each loop; the first three are not counted.")] = 20,
    json_file: JsonFile = None,
) -> None:
    """Compares a step of the pipeline (Ray, DeepSpeed) with a step of the same loop in one process."""
    from latent_grpo.common.config import load_config, of_model
    from latent_grpo.deploy.bench.loop import compare, show, write_json

    config = load_config(profile, [*overrides(context.args), *(of_model(model) if model else [])])
    found = compare(config, steps)
    _give(found, show, json_file, write_json)


@bench.command("report")
def bench_report(
    trajectories: Annotated[int, typer.Option(min=8, help="Trajectories in the report.")] = 2000,
    latent_steps: Annotated[int, typer.Option(min=1, help="Latent steps per trajectory.")] = 20,
    k: Annotated[int, typer.Option(min=1, help="Tokens per latent step.")] = 10,
    openings: Annotated[
        int, typer.Option(min=1, help="How often the page is opened, at its list and at its start.")
    ] = 5,
    seed: Annotated[int, typer.Option(min=0, max=SEED_LIMIT - 1, help="Seed of the generated trajectories.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Measures how fast a report is written, opened and searched in a real Chromium."""
    from latent_grpo.deploy.bench.report import measure, show

    result = measure(trajectories, latent_steps, k, openings, seed)
    _give(result, show, json_file)


@bench.command("rollout")
def bench_rollout(
    vocabulary: Annotated[int, typer.Option(min=64, help="Vocabulary size of the model.")] = 2048,
    hidden: Annotated[int, typer.Option(min=32, help="Hidden size, a multiple of 32.")] = 128,
    layers: Annotated[int, typer.Option(min=1, help="Number of layers.")] = 2,
    rows: Annotated[int, typer.Option(min=1, help="Samples decoded side by side.")] = 64,
    k: Annotated[int, typer.Option(min=1, help="Mixture width of latent steps.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each case; medians are shown.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Compares the Transformers engine with `model.generate`, and latent with hard steps, there and in vLLM, on CPU."""
    from latent_grpo.deploy.bench.rollout import measure, show

    found = measure(vocabulary=vocabulary, hidden=hidden, layers=layers, k=k, repeats=repeats, batch=rows)
    _give(found, show, json_file)


@bench.command("replay")
def bench_replay(
    hidden: Annotated[int, typer.Option(min=32, help="Hidden size, a multiple of 32.")] = 576,
    layers: Annotated[int, typer.Option(min=1, help="Number of layers.")] = 6,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each case; medians are shown.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Compares the learner's passes with a group's prompt computed once and once a sample, on CPU."""
    from latent_grpo.deploy.bench.replay import measure, show

    found = measure(hidden=hidden, layers=layers, repeats=repeats)
    _give(found, show, json_file)


@bench.command("logprobs")
def bench_logprobs(
    vocabulary: Annotated[int, typer.Option(min=64, help="Vocabulary size of the output layer.")] = 151_936,
    positions: Annotated[int, typer.Option(min=1, help="Number of response steps.")] = 4096,
    hidden: Annotated[int, typer.Option(min=8, help="Hidden size.")] = 256,
    turns: Annotated[int, typer.Option(min=1, help="Turns; medians are shown.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Compares time and memory of the learner's log-probs with the plain way that holds all logits, on CPU."""
    from latent_grpo.deploy.bench.logprobs import Sizes, measure, show

    found = measure(Sizes(positions=positions, vocabulary=vocabulary, hidden=hidden), turns)
    _give(found, show, json_file)


@bench.command("memory")
def bench_memory(json_file: JsonFile = None) -> None:
    """Compares the memory of a learner rank of 135 M parameters with the prediction of `validate`, on CPU."""
    from latent_grpo.deploy.bench.memory import measure, show

    found = measure()
    _give(found, show, json_file)


@bench.command("scale")
def bench_scale(
    steps: Annotated[int, typer.Option(min=60, help="Steps of the run whose memory is looked at.")] = 500,
    json_file: JsonFile = None,
) -> None:
    """Measures what a step costs as prompts, samples, lengths, k, vocabulary, workers and steps grow, on CPU."""
    from latent_grpo.deploy.bench.scale import measure, show

    found = measure(steps=steps)
    _give(found, show, json_file)


@bench.command("trl")
def bench_trl(
    steps: Annotated[int, typer.Option(min=1, help="Counted steps of each way in a turn.")] = 8,
    turns: Annotated[int, typer.Option(min=1, help="Turns; medians are shown.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Compares a step of TRL's GRPOTrainer with one of ours on the same model and prompts, on CPU."""
    from latent_grpo.deploy.bench.trl import measure, show

    found = measure(steps, turns)
    _give(found, show, json_file)


@bench.command("agreement", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench_agreement(
    context: typer.Context,
    profile: Annotated[str, typer.Option(help="Name of a shipped profile, or the path of a YAML file.")] = "quickstart",
    groups: Annotated[int, typer.Option(min=1, help="Groups of the profile's group_size that are compared.")] = 64,
    json_file: JsonFile = None,
) -> None:
    """Measures how far the learner's log-probs are from the engine's, as the self-test does, without limits."""
    from latent_grpo.common.config import load_config
    from latent_grpo.deploy.bench.agreement import measure, show, write_json

    found = measure(load_config(profile, overrides(context.args)), groups)
    _give(found, show, json_file, write_json)


@bench.command("gpu")
def bench_gpu(
    minutes: Annotated[float, typer.Option(min=0.0, help="Time after which no further part is begun.")] = 8.0,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu; a CPU runs small shapes only, to try the parts.")] = (
        "auto"
    ),
    json_folder: Annotated[Path | None, typer.Option(help="Also write one JSON file a finished part here.")] = None,
) -> None:
    """Measures one GPU: float32 logits, sampling, decoding, log-probs with MFU, and publication of weights."""
    from latent_grpo.deploy.bench.gpu import measure

    measure(minutes, json_folder, device)


@bench.command("staleness")
def bench_staleness(
    workers: Annotated[int, typer.Option(min=1, help="Number of simulated rollout workers.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Counted steps of each case.")] = 8,
    json_file: JsonFile = None,
) -> None:
    """Measures how long the learner waits for rollouts by max_staleness: the real loop, with parts that sleep."""
    from latent_grpo.deploy.bench.staleness import measure, show

    found = measure(workers, steps)
    _give(found, show, json_file)


@bench.command("publish")
def bench_publish(
    size: Annotated[
        list[str] | None, typer.Option(help="3M, 135M or 1B (bfloat16); several times for several.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of workers that take the weights.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Counted publications of each way.")] = 4,
    json_file: JsonFile = None,
) -> None:
    """Measures a publication of weights beside plain copies of the same bytes, by each transport."""
    from latent_grpo.deploy.bench.publish import measure, show, write_json

    found = measure(size or ("135M", "1B"), workers, rounds)
    _give(found, show, json_file, write_json)


@bench.command("soak")
def bench_soak(
    kills: Annotated[int, typer.Option(min=0, help="How many processes are killed.")] = 100,
    seed: Annotated[int, typer.Option(min=0, max=SEED_LIMIT - 1, help="Seed of what is killed, and when.")] = 0,
    steps: Annotated[int | None, typer.Option(min=10, help="Steps of the run; default: ten a kill, and 80.")] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Keep both runs, their logs and a report here; a soak that was interrupted goes on in it."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Kills processes of a tiny run at random and compares its end with that of an undisturbed one."""
    from latent_grpo.common.errors import RunError
    from latent_grpo.deploy.bench.soak import measure, show

    found = measure(kills, seed, steps, folder)
    _give(found, show, json_file)
    if len(found.kills) < kills:
        raise RunError(f"the run ended after {len(found.kills)} of {kills} kills; give it more --steps")
    if found.lost or found.duplicated or found.different or not found.same_weights:
        raise RunError("the disturbed run did not end as the undisturbed one")

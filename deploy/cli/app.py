"""`latent-grpo`, or `python -m latent_grpo.deploy`: one function for each command; each only calls its module.

Settings are given as `--key.sub VALUE` or `key.sub=VALUE` after the command's own options.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from latent_grpo.common import __version__
from latent_grpo.common.config import ConfigError, config_as_json
from latent_grpo.common.errors import LatentGRPOError, RayLost, one_line
from latent_grpo.common.files import FULL, unwritable
from latent_grpo.common.secrets import redacted
from latent_grpo.common.terminal_text import TextConsole
from latent_grpo.deploy.cli.arguments import (
    argument_with_home,
    interruptible,
    listed,
    overrides,
    settings,
    whole_numbers,
)
from latent_grpo.deploy.cli.bench import bench
from latent_grpo.deploy.cli.data import data
from latent_grpo.deploy.cli.faults import debugging, exit_code_of, in_one_line, unexpected
from latent_grpo.deploy.cli.models import models
from latent_grpo.deploy.cli.planning import planning
from latent_grpo.deploy.cli.reading import reading
from latent_grpo.deploy.run import link
from latent_grpo.deploy.run.machine import keep_local

HELP = """Trains and evaluates models that reason in latent steps.

Settings follow a command's own options: `key.sub=VALUE` or `--key.sub VALUE`; `latent-grpo settings` lists them.
"""
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=HELP)
app.add_typer(bench, name="bench")
app.add_typer(data, name="data")
app.add_typer(reading)
app.add_typer(models)
app.add_typer(planning)
console = TextConsole()


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"latent-grpo {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


STATUS = {"ok": "green", "warn": "yellow", "fail": "red"}
ERROR, SUPERVISOR = Text("error", "bold red"), Text("supervisor", "yellow")
DISK = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM)  # errors of a place that the user has chosen
MISPLACED = (errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)  # something else than a file or folder is there
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
Profile = Annotated[str, typer.Option(help="Name of a shipped profile, or the path of a YAML file.")]
Allowed = Annotated[
    str,
    typer.Option("--allow-plugins", help="Modules, comma-separated, that another user's run may have this import."),
]


@app.command(context_settings=SETTINGS)
def validate(
    context: typer.Context,
    profile: Profile = "quickstart",
    files: Annotated[bool, typer.Option(help="Also read every problem file, as the run will.")] = False,
    cpus: Annotated[float | None, typer.Option(help="CPUs of the cluster that the run will use.")] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs of the cluster that the run will use.")] = None,
    measured: Annotated[
        str | None, typer.Option(help="A run whose measured steps say how long this one will take.")
    ] = None,
    allow_plugins: Annotated[
        str, typer.Option(help="Modules that the profile names, separated by commas: import and check them too.")
    ] = "",
) -> None:
    """Checks a profile and prints its resolved settings and the size of a step. Needs no GPU and no weights."""
    from latent_grpo.deploy.checks.validate import validate as rows_of

    config = settings(profile, context, gpus)
    allowed = listed(allow_plugins)
    rows = rows_of(config, files=files, cpus=cpus, gpus=gpus, measured=measured, allowed=allowed)
    console.print_json(redacted(config_as_json(config)))
    table = Table(title=f"{profile}: {config.algorithm}", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # a rendered prompt has long words, and its end matters
    for name, found in rows:
        table.add_row(name, found)
    console.print(table)


@app.command(context_settings=SETTINGS)
def train(
    context: typer.Context,
    profile: Profile = "quickstart",
    resume: Annotated[str | None, typer.Option(help="Continue the stopped run in this folder, or at this URL.")] = None,
    gpus: Annotated[int | None, typer.Option(help="Take the profile's settings for this number of GPUs.")] = None,
    rollout_only: Annotated[
        bool, typer.Option("--rollout-only", help="Start no learner; generate rollouts with the initial weights.")
    ] = False,
    train_only: Annotated[
        str | None, typer.Option(help="Start no rollout worker; train on this run's dumps, with its settings.")
    ] = None,
    allow_plugins: Allowed = "",
) -> None:
    """Trains a new run from a profile, or continues a stopped one (`--resume RUN`) from its last checkpoint."""
    if sum(map(bool, (resume, rollout_only, train_only))) > 1:
        raise ConfigError("--resume, --rollout-only and --train-only exclude each other; give one of them")
    if gpus is not None and (resume or train_only):
        raise ConfigError("--gpus chooses settings of a profile, and this run has its settings; change keys instead")
    if not (rollout_only or train_only or link.supervised()):
        from latent_grpo.deploy.supervisor import supervise

        given = ["--resume", resume] if resume else ["--profile", profile]
        if gpus is not None and not resume:
            given += ["--gpus", str(gpus)]
        if allow_plugins:
            given += ["--allow-plugins", allow_plugins]
        raise typer.Exit(supervise([*given, *context.args], say))

    from latent_grpo.deploy import single_service
    from latent_grpo.deploy import train as training

    with interruptible():
        if rollout_only:
            single_service.rollout_only(settings(profile, context, gpus, sized=True), profile)
        elif train_only:
            single_service.train_only(train_only, overrides(context.args), allowed=listed(allow_plugins))
        elif resume:
            training.resume(resume, overrides(context.args), allowed=listed(allow_plugins))
        else:
            training.train(settings(profile, context, gpus, sized=True), profile)


@app.command()
def scale(
    run: Annotated[str, typer.Argument(help="The folder of a run that goes on.")],
    workers: Annotated[int, typer.Option(min=1, help="Number of rollout workers from now on.")],
    now: Annotated[bool, typer.Option("--now", help="Workers that leave do not finish their groups.")] = False,
) -> None:
    """Changes the number of a run's rollout workers while it goes on. Exit code 1: the run has refused."""
    from latent_grpo.deploy.run.control import request_scale

    reply = request_scale(run, workers, now)
    console.print(f"{'accepted' if reply.accepted else 'refused'}: {reply.sentence}", highlight=False, soft_wrap=True)
    if not reply.accepted:
        raise typer.Exit(1)


@app.command(context_settings=SETTINGS)
def replay(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="A run's folder.")],
    step: Annotated[int, typer.Option(help="The step to replay, counted from 1.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON, and nothing else.")] = False,
) -> None:
    """Computes a step's loss and gradient norm again. Exit code 1: they differ; 2: the step cannot be replayed."""
    from latent_grpo.deploy.replay import replay as replaying
    from latent_grpo.deploy.run.progress import Reporter

    with interruptible():
        reporter = Reporter(TextConsole(stderr=True, highlight=False)) if as_json else None
        result = replaying.replay(run, step, overrides(context.args), reporter)
    if as_json:
        typer.echo(json.dumps(result.as_json(), allow_nan=False))
    else:
        replaying.show(result, console)
    if not result.reproduced:
        raise typer.Exit(1)


@app.command(context_settings=SETTINGS)
def sft(
    context: typer.Context,
    profile: Profile = "quickstart",
    resume: Annotated[
        str | None, typer.Option(help="Continue the stopped Latent-SFT in this folder, or at this URL.")
    ] = None,
    allow_plugins: Allowed = "",
) -> None:
    """Runs Latent-SFT alone: the latent start that RL needs, or the explicit one of the baseline (algorithm=grpo)."""
    from latent_grpo.deploy.sft.loop import resume_sft
    from latent_grpo.deploy.sft.loop import sft as latent_sft

    with interruptible():
        if resume:
            resume_sft(resume, overrides(context.args), allowed=listed(allow_plugins))
        else:
            latent_sft(settings(profile, context), profile)


@app.command(context_settings=SETTINGS)
def evaluate(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="Folder or hub id of a Hugging Face model, or the URL of one in a remote run.")
    ],
    tasks: Annotated[
        str, typer.Option(help="Named benchmarks, e.g. gsm8k-aug,svamp; default: those of the profile.")
    ] = "",
    data_folder: Annotated[str, typer.Option("--data", help="Folder with the benchmarks' files.")] = "data",
    profile: Annotated[
        str | None, typer.Option(help="Profile with the settings; default: the settings of the model's own run.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Also measure pass@k, with noise, from this many samples per problem.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only this many problems of each task, the first ones.")
    ] = None,
    allow_plugins: Allowed = "",
) -> None:
    """Measures a model: pass@1 (noise off), pass@k (with noise), chain length and invalid rate."""
    from latent_grpo.deploy.evaluation.evaluate import evaluate_model, evaluation_config

    names = listed(tasks)
    given = overrides(context.args) + ([] if samples is None else [f"evaluation.samples={samples}"])
    config, name, noise = evaluation_config(
        model, given, profile=profile, tasks=names, data=data_folder, limit=limit, allowed=listed(allow_plugins)
    )
    with interruptible():
        evaluate_model(config, name, noise=noise)


@app.command(context_settings=SETTINGS)
def reproduce(
    context: typer.Context,
    suite: Annotated[str, typer.Argument(help="Name of a shipped suite, or the path of a YAML file.")],
    quick: Annotated[bool, typer.Option("--quick", help="Run the suite's short form.")] = False,
    arms: Annotated[str, typer.Option(help="Run only these arms now, with their starts, e.g. mixture,uniform.")] = "",
    seeds: Annotated[str, typer.Option(help="Use these seeds instead of the suite's, e.g. 0,1,2.")] = "",
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder of the results; a stopped suite continues in it. Default: runs/reproduce-SUITE."),
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Units that run at the same time; default: as many as fit.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only check every unit's settings, models and files, and list the units.")
    ] = False,
    unit: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Runs the arms of a suite over its seeds and writes one report; a stopped suite continues where it stopped."""
    from latent_grpo.deploy.reproduce import scheduler as suites
    from latent_grpo.deploy.reproduce.unit import Request, run_unit

    chosen = folder or suites.default_folder(suite, quick)
    request = Request(
        source=suite,
        folder=chosen,
        quick=quick,
        seeds=whole_numbers("--seeds", seeds),
        overrides=overrides(context.args),
    )
    with interruptible():
        if check:
            for line in suites.check(request, arms=listed(arms), say=partial(say, heading=Text("reproduce", "yellow"))):
                console.print(line, soft_wrap=True, highlight=False)
        elif unit is not None:
            run_unit(request, unit)
        else:
            suites.reproduce(request, parallel, arms=listed(arms))


@app.command()
def grade(
    file: Annotated[Path, typer.Argument(help="JSONL or Parquet file with a response and a gold answer per row.")],
    kind: Annotated[
        str, typer.Option(help="Verifier: math, number, choice, an import path, or a name defined in --profile.")
    ],
    profile: Annotated[str | None, typer.Option(help="Take verifiers and limits from this profile.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also list the rows on which plain math-verify disagrees.")
    ] = False,
    golds: Annotated[bool, typer.Option("--golds", help="Check only the gold answers; needs no responses.")] = False,
    response_column: Annotated[
        str | None, typer.Option(help="Column of the responses; default: response, completion, output, ...")
    ] = None,
    gold_column: Annotated[
        str | None, typer.Option(help="Column of the gold answers; default: gold, answer, ground_truth, ...")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Rows shown for each reason.")] = 3,
    fallback: Annotated[
        str, typer.Option(help="What counts as the answer where there is no box: none, or last_number.")
    ] = "none",
    processes: Annotated[int, typer.Option(min=1, help="Number of grader processes.")] = 2,
    time_limit: Annotated[float, typer.Option(help="Time limit of a row, in seconds.")] = 5.0,
    output: Annotated[Path | None, typer.Option(help="Write every row's verdict to this JSONL file.")] = None,
    machine: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Grades a file of responses and shows the reasons with examples, or checks a file's gold answers."""
    from latent_grpo.deploy.grading.audit import Limits, run_audit

    with interruptible():
        run_audit(
            file, kind, Limits(processes=processes, time_limit_s=time_limit, fallback=fallback), profile=profile,
            compare=compare, golds=golds, columns=(response_column, gold_column), examples=examples, output=output,
            machine=machine, console=console,
        )  # fmt: skip


@app.command("settings")
def settings_reference(
    prefix: Annotated[str, typer.Argument(help="A section or a key, e.g. rollout or optimizer.lr.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/settings.md.")] = False,
) -> None:
    """Prints every key with its type, values, default, rules and meaning; PREFIX limits it to a section or a key."""
    from latent_grpo.common.config import reference_formats as formats

    if as_json and as_markdown:
        raise ConfigError("--json and --markdown exclude each other; give one of them")
    if as_json:
        text = formats.as_json(prefix)
    elif as_markdown:
        text = formats.as_markdown(prefix)
    else:
        text = formats.as_text(prefix, console.width)
    typer.echo(text, nl=False)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder, or one without such files.")],
) -> None:
    """Writes a small project of your own: a commented profile, a sample of data, a verifier. It trains at once."""
    from latent_grpo.deploy.cli.project import make_project, next_steps

    for path in make_project(folder):
        console.print(str(path), highlight=False, soft_wrap=True)
    console.print(next_steps(folder), highlight=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """Checks the installation and reports what to fix; exit code 1 if something must be fixed."""
    from latent_grpo.deploy.checks.doctor import run_doctor

    checks = run_doctor()
    table = Table("", "check", "found", "what to do", title="latent-grpo doctor")
    for check in checks:
        table.add_row(Text(check.status, STATUS[check.status]), check.name, check.found, check.fix)
    console.print(table)
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@app.command(context_settings=SETTINGS)
def submit(
    context: typer.Context,
    address: Annotated[str | None, typer.Option(help="Address of the cluster's job server: http://HEAD:8265.")] = None,
    follow: Annotated[bool, typer.Option(help="Print the driver's log and return its exit code.")] = True,
    env: Annotated[
        list[str] | None, typer.Option(help="Pass this variable of yours to the job, without printing it. Repeatable.")
    ] = None,
) -> None:
    """Runs a command of this program as a Ray job: `latent-grpo submit train --profile svamp`."""
    from latent_grpo.deploy.cluster.submit import passed_variables
    from latent_grpo.deploy.cluster.submit import submit as submit_job

    passed = passed_variables(env or [], os.environ)
    raise typer.Exit(submit_job(command_of_job(context.args), address, follow, environment=passed))


def command_of_job(arguments: list[str]) -> list[str]:
    """Returns the job's arguments, led by its command: `train` where none is given. Raises ConfigError for others."""
    first = arguments[0] if arguments else ""
    if not first or first.startswith("-") or "=" in first:
        return ["train", *arguments]
    known = sorted(getattr(typer.main.get_command(app), "commands", ()))
    if first not in known:
        raise ConfigError(f"submit: {first!r} is not a command; give one of {', '.join(known)}, or only settings")
    return arguments


def say(message: str, heading: Text = SUPERVISOR) -> None:
    """Prints one line to standard error."""
    TextConsole(stderr=True).print(Text.assemble(heading, " ", redacted(message)), soft_wrap=True)


def main() -> None:
    """Runs the command line. Any error ends it with one line and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or a file that cannot show a character gets another one
            stream.reconfigure(errors="replace")
    if (here := os.getcwd()) not in sys.path and "" not in sys.path:
        sys.path.append(here)  # a user's verifiers, tasks and sinks are there; `python -m` has it already
    if link.supervised():
        link.connect()
    keep_local()
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Runs one command and returns its exit code, after it has told the supervisor, if there is one.

    An expected error is one line on standard error and has an exit code of its own; an unexpected one is one line too
    (`deploy.cli.faults`). With `LATENT_GRPO_DEBUG=1` their tracebacks are shown before it.
    """
    try:
        try:
            given = [argument_with_home(argument) for argument in arguments]
            ended = app(args=given, prog_name="latent-grpo", standalone_mode=False)
        finally:
            _flush()
        code = ended if isinstance(ended, int) else 0  # of typer.Exit
        link.tell(ended=code)
    except LatentGRPOError as error:
        code = _failed(error, str(error), error.exit_code)
    except BrokenPipeError:  # whoever read the output has seen enough
        code = 1
        link.tell(ended=code)
    except OSError as error:
        if error.errno in DISK:
            where = error.filename or "the output, or a file,"
            code = _failed(error, f"{where} {unwritable(error)}; make room there, or choose another folder", 1)
        elif error.errno in MISPLACED and error.filename:
            said = f"{error.filename}: {error.strerror}; move away what is there, or bring the file back from a copy"
            code = _failed(error, said, ConfigError.exit_code)
        else:
            code = _failed(error, unexpected(error, arguments), exit_code_of(error))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        link.tell(ended=code)
    except Exception as error:
        if (usage := misused(error)) is not None:
            code = _failed(error, usage, ConfigError.exit_code)
        else:
            code = _failed(error, unexpected(error, arguments), exit_code_of(error))
    except BaseException:
        link.tell(ended=1)
        raise
    return code


def misused(error: Exception) -> str | None:
    """Returns the line for arguments that a command does not take, or a path whose links lead in a circle; else None.

    A group of commands without one shows its help.
    """
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # of Path.resolve
        return f"{error}; remove the link, or give another path"
    if not hasattr(error, "format_message"):  # typer's errors, whose class is another one in each of its versions
        return None
    if type(error).__name__ == "NoArgsIsHelpError":
        return "give one of the commands above"
    command = getattr(getattr(error, "ctx", None), "command_path", "latent-grpo")
    return f"{' '.join(error.format_message().split()).rstrip('.')}; `{command} --help` says what it takes"


def _flush() -> None:
    """Writes what is left of the output: an interpreter that cannot do so at its end says it in lines of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what cannot be written is given up
        raise


def _failed(error: Exception, sentence: str, code: int) -> int:
    """Says what has ended the command, to the user and to the supervisor, and returns the exit code."""
    if debugging():
        traceback.print_exception(error)
    say(sentence if isinstance(error, LatentGRPOError) else one_line(sentence), ERROR)
    if isinstance(error, (RayLost, *ray_is_gone())):
        lost = str(error) if isinstance(error, RayLost) else in_one_line(error)
        link.tell(crashed=f"has lost its Ray: {lost}")
    else:
        link.tell(ended=code)
    return code


def ray_is_gone() -> tuple[type[BaseException], ...]:
    """The errors by which Ray says that its head or raylet is gone; none where Ray is not loaded."""
    exceptions = sys.modules.get("ray.exceptions")
    names = ("RaySystemError", "LocalRayletDiedError", "RpcError")
    return tuple(getattr(exceptions, name) for name in names if hasattr(exceptions, name))

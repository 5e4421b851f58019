"""Sends a command to a Ray cluster as a job and follows it: `latent-grpo submit train --profile gsm8k-aug`.

The upload is a staged copy of the five packages and of the profile files that the command names: well under a
megabyte, whatever the user's folder holds. The cluster's image holds the dependencies (`deploy/cluster/Dockerfile`).
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

import latent_grpo
from latent_grpo.common.config import ConfigError, DeadlineConfig, parse_override, read_profile, with_value
from latent_grpo.common.config.yaml_files import is_path
from latent_grpo.common.interrupts import LEAVE_S
from latent_grpo.common.plugins import is_import_path
from latent_grpo.common.ports import address_port_fault
from latent_grpo.common.secrets import REDACTED, literal_secrets
from latent_grpo.deploy.cluster.staging import SubmitError, stage_modules, stage_profile
from latent_grpo.deploy.run.manifest import commit_for_job
from latent_grpo.deploy.run.versions import SUBMITTED, versions

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PACKAGES = ("common", "reward", "rollout_workers", "learner", "deploy")
UPLOAD_LIMIT_BYTES = 20 * 2**20
INTERRUPTED = 130
_POLL_S = 2.0
_NOTICE_S = 30.0  # for Ray to notice that a job has ended


def submit(
    arguments: Sequence[str],
    address: str | None = None,
    follow: bool = True,
    *,
    environment: dict[str, str] | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Runs `python -m latent_grpo.deploy ARGUMENTS` on the cluster; returns the driver's exit code, 0 without `follow`.

    `address` is the job server, `http://head:8265`; the default is RAY_API_SERVER_ADDRESS or RAY_ADDRESS.
    `environment` holds variables for the job, which are never printed. Ray finds the authentication token itself
    (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH). While following, Ctrl-C stops the job and returns 130. Raises
    :class:`SubmitError` if there is no cluster.
    """
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    arguments = list(arguments)
    if not arguments:
        raise SubmitError("no command to run: give one, for example `train --profile gsm8k-aug`")
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not address:
        raise SubmitError("no cluster address: give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS")
    if (fault := address_port_fault(address)) is not None:
        raise SubmitError(f"address {address}: {fault}; a job server's is 8265 where nobody has changed it")
    if secrets := secrets_in(arguments):
        raise SubmitError(
            f"{', '.join(secrets)}: a secret does not belong into a job's command line, which the job "
            "server shows; keep it in an environment variable of the nodes, or pass it with submit --env NAME: "
            "docs/cluster.md, Secrets, says who can read it there"
        )
    stop_s = stop_seconds(arguments)
    with tempfile.TemporaryDirectory(prefix="lgs-") as folder:
        staged = stage(Path(folder), arguments)
        try:
            client = JobSubmissionClient(address)
            job = client.submit_job(
                entrypoint=shlex.join(["python", "-m", "latent_grpo.deploy", *staged]),
                runtime_env={
                    "working_dir": folder,
                    "env_vars": {
                        "PYTHONUNBUFFERED": "1",
                        "RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(stop_s)),  # else Ray kills the job 3 s after SIGTERM
                        SUBMITTED: json.dumps(versions()),
                        **commit_for_job(),
                        **(environment or {}),
                    },
                },
            )
        except (RayError, ConnectionError, RuntimeError, ValueError) as error:
            said = _without(str(error), environment)
            raise SubmitError(
                f"{address} did not accept the job: {said}. Is the head running, is port 8265 reachable (kubectl "
                "port-forward, ssh -L), and is RAY_AUTH_TOKEN the cluster's token?"
            ) from error
    say(f"job {job} submitted to {address}")
    if not follow:
        say(f"follow it with: ray job logs --address {address} --follow {job}")
        return 0
    try:
        asyncio.run(_tail(client, job))
        return _exit_code(client, job, say)
    except KeyboardInterrupt:
        _stop(client, job, stop_s + _NOTICE_S, say)
        return INTERRUPTED


def passed_variables(names: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables of `submit --env NAME` with their values. Raises SubmitError, which shows no value."""
    for name in names:
        if not name.isidentifier():  # such as NAME=value, which the shell's history and `ps` would show
            raise SubmitError(
                f"--env takes the name of a variable alone, got {name.partition('=')[0]!r} with more; export it, and "
                "give its name"
            )
        if name not in environment:
            raise SubmitError(f"--env {name}: there is no such variable here; export it first")
    return {name: environment[name] for name in names}


def secrets_in(arguments: Sequence[str]) -> list[str]:
    """Returns the names of the arguments that hold a secret in plain text, whatever their form."""
    found = [name for key, value in _given(arguments) for name in literal_secrets(_parsed(key, value), key)]
    return list(dict.fromkeys(found))


def stop_seconds(arguments: Sequence[str]) -> float:
    """Returns how long a stopped job may go on: for its step and state (`deadlines.terminate_s`), and to end.

    The key is read where the job reads it: in its arguments, else in the run that it resumes, else in its profile. A
    suite's own files are not read, nor what lies on the cluster only, as a run there does: the key's default counts
    then, unless an argument gives it. Raises ConfigError for a value that the job would refuse.
    """
    options = dict(_given(arguments))
    settings = {"deadlines": _stored_deadlines(options)}
    for key in options:
        if key.split(".")[0] == "deadlines":
            path, value = parse_override(f"{key}={options[key]}")
            settings = with_value(settings, path, value, key)
    try:
        return DeadlineConfig.model_validate(settings["deadlines"]).terminate_s + LEAVE_S
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors())
        raise SubmitError(f"deadlines of the job: {found}") from error


def _given(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the arguments as (key, value): `key=value`, `--key=value`, `--key value`; others by their number.

    Whether an option takes a value is the command's to know, so what follows one counts as its value and for itself.
    """
    found = []
    for number, (before, argument) in enumerate(zip(["", *arguments], arguments, strict=False), start=1):
        key, equals, value = argument.removeprefix("--").partition("=")
        is_value = before.startswith("--") and "=" not in before
        if is_value:
            found.append((before[2:], argument))
        if equals and "://" not in key:
            found.append((key, value))
        elif not is_value:
            found.append((f"argument {number}", argument))
    return found


def _parsed(key: str, value: str) -> Any:
    """The value as a setting; a text that is no YAML, such as a prompt, is itself."""
    try:
        return parse_override(f"{key}={value}")[1]
    except ConfigError:
        return value


def _stored_deadlines(options: dict[str, str]) -> dict[str, Any]:
    """Returns the section `deadlines` of the run or profile that the job's options name; empty where it is not here."""
    run, profile = options.get("resume") or options.get("train-only"), options.get("profile")
    found: dict[str, Any] = {}
    if run is not None:
        path = Path(run) / "config.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    elif profile is not None and (Path(profile).is_file() or not Path(profile).suffix):
        found = read_profile(profile)
    return found.get("deadlines") or {}


def stage(folder: Path, arguments: Sequence[str]) -> list[str]:
    """Copies the packages, laid out as in a wheel, and the named local YAML files into `folder`.

    With a profile or suite go the local files that it extends, a suite's own profile, and the modules of verifiers,
    tasks and sinks that they name by import path (`deploy.cluster.staging`). Returns the arguments for the job.
    """
    root, upload = Path(__file__).resolve().parents[2], folder / "latent_grpo"
    upload.mkdir()
    shutil.copyfile(Path(latent_grpo.__file__), upload / "__init__.py")
    for package in PACKAGES:
        shutil.copytree(root / package, upload / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    staged = []
    for argument in arguments:
        option, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
        if is_path(value) and Path(value).is_file():
            value = stage_profile(Path(value), folder, suite=arguments[0] == "reproduce")
        elif "=" in argument or is_import_path(value):
            stage_modules([value.rpartition("=")[2]], [Path.cwd()], folder)
        staged.append(f"{option}{equals}{value}")
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    if size > UPLOAD_LIMIT_BYTES:
        raise SubmitError(
            f"the upload would be {size / 2**20:.0f} MiB, at most {UPLOAD_LIMIT_BYTES / 2**20:.0f} MiB are allowed: "
            f"move data and runs out of the folders {', '.join(PACKAGES)} in {root}"
        )
    return staged


def _without(text: str, environment: Mapping[str, str] | None) -> str:
    """The text without the values of variables, which an error of the job server may repeat."""
    for value in sorted((environment or {}).values(), key=len, reverse=True):
        text = text.replace(value, REDACTED) if value else text
    return text


async def _tail(client: JobSubmissionClient, job: str) -> None:
    """Prints the driver's output until the job ends. After a broken connection it continues where it stopped."""
    shown = 0
    while True:
        position = 0
        try:
            async for text in client.tail_job_logs(job):
                fresh = text[max(0, shown - position) :]  # the server starts from the beginning each time
                position += len(text)
                shown = max(shown, position)
                sys.stdout.write(fresh)
                sys.stdout.flush()
        except (ConnectionError, RuntimeError, OSError) as error:
            print(f"log stream interrupted ({error}); reconnecting", file=sys.stderr)
        if client.get_job_status(job).is_terminal():
            return
        await asyncio.sleep(_POLL_S)


def _exit_code(client: JobSubmissionClient, job: str, say: Callable[[str], None]) -> int:
    details = client.get_job_info(job)
    status = str(details.status.value)
    if status == "SUCCEEDED":
        say(f"job {job}: {status}")
        return 0
    # Ray appends the log's end to its message; it has just been streamed
    reason = (details.message or "no reason given").partition(", last available logs")[0]
    say(f"job {job}: {status}: {reason}")
    return details.driver_exit_code or 1


def _stop(client: JobSubmissionClient, job: str, within_s: float, say: Callable[[str], None]) -> None:
    say(f"stopping job {job}")
    client.stop_job(job)
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if client.get_job_status(job).is_terminal():
            say(f"job {job} stopped")
            return
        time.sleep(1.0)
    say(f"job {job} has not stopped within {within_s:.0f} s; see `ray job status {job}`")

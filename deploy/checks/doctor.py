"""The checks of `latent-grpo doctor`, which report whether this machine can run the pipeline and what to fix.

The checks are independent and quick. Only the last one starts something: a local Ray in a child process, which is
ended, with everything it started, at its deadline.
"""

from __future__ import annotations

import codecs
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from latent_grpo.deploy.checks.bfloat16 import bfloat16_slowdown, slowdown_sentence
from latent_grpo.deploy.checks.tested_versions import never_tested
from latent_grpo.deploy.checks.torch_build import describe_torch
from latent_grpo.deploy.run.machine import ray_faults, temporary_fault
from latent_grpo.rollout_workers.vllm_plugin.support import installed, vllm_problem

RAY_DEADLINE_S = 90.0
SHM_BYTES = 2 * 2**30
DISK_BYTES = 2 * 2**30
MEMORY_BYTES = 3 * 2**30

_RAY_PROBE = """
import ray, sys
ray.init(address="local", num_cpus=1, num_gpus=0, include_dashboard=False, log_to_driver=False,
         logging_level="error", object_store_memory=128 * 2**20, _temp_dir=sys.argv[1])
@ray.remote(num_cpus=1)
def answer():
    return 42
print("answer", ray.get(answer.remote(), timeout=float(sys.argv[2])))
ray.shutdown()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding. The status `warn` means that it works, but slower or less safely than it could."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing has to be fixed; a warning is ok."""
        return self.status != "fail"


def run_doctor(folder: str | Path = ".", ray_deadline_s: float = RAY_DEADLINE_S) -> list[Check]:
    """Runs all checks; `folder` is where run folders will be made. The machine is fit only if every check is `ok`."""
    checks: list[Callable[[], list[Check]]] = [
        _python,
        _packages,
        _torch,
        bfloat16_checks,
        _vllm,
        _compiler,
        _shared_memory,
        lambda: _disk(Path(folder)),
        _memory,
        _security,
        terminal,
        ray_environment,
        lambda: _ray(ray_deadline_s),
    ]
    return [finding for check in checks for finding in check()]


def _python() -> list[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    fix = "" if good else "use Python 3.11 to 3.13: make clean install PYTHON=python3.12"
    return [Check(name="python", status="ok" if good else "fail", found=f"{version} at {sys.executable}", fix=fix)]


def _packages() -> list[Check]:
    """Compares every requirement of this package (without extras) with what is installed."""
    findings: list[Check] = []
    fine: dict[str, str] = {}  # package -> version
    try:
        requirements = importlib.metadata.requires("latent-grpo") or []
    except importlib.metadata.PackageNotFoundError:
        fix = "run `make install`, or `pip install -c constraints.txt -e .` in the checkout"
        return [Check(name="packages", status="warn", found="latent-grpo itself is not installed", fix=fix)]
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        fix = f"pip install -c constraints.txt '{requirement.name}{requirement.specifier}'"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Check(name=requirement.name, status="fail", found="not installed", fix=fix))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found = f"{version} is installed, {requirement.specifier} is needed"
            findings.append(Check(name=requirement.name, status="fail", found=found, fix=fix))
        fine[requirement.name] = version
    fix = "pip install -c constraints.txt -e . takes versions that were tested"
    untested = [Check(name="versions", status="warn", found=sentence, fix=fix) for sentence in never_tested(fine)]
    listed = ", ".join(f"{name} {version}" for name, version in fine.items())
    return [*(findings or [Check(name="packages", status="ok", found=listed)]), *untested]


def _torch() -> list[Check]:
    try:
        description = describe_torch()
    except (importlib.metadata.PackageNotFoundError, OSError) as error:
        return [Check(name="torch build", status="fail", found=f"cannot be read: {error}", fix="run `make install`")]
    has_gpu = shutil.which("nvidia-smi") is not None
    found, _, advice = description.partition(". ")
    if has_gpu and "CPU build" in found:
        return [Check(name="torch build", status="warn", found=f"{found}, but this machine has a GPU", fix=advice)]
    return [Check(name="torch build", status="ok", found=found)]


def bfloat16_checks(slowdown: Callable[[str], float] = bfloat16_slowdown) -> list[Check]:
    """Compares the speed of the two dtypes that a run may use, on each kind of device that this machine has."""
    import torch

    findings = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        ratio = slowdown(device)
        slow = slowdown_sentence(ratio, device)
        found = f"{device}: {ratio:.2g} times the time of float32"
        fix = slow or ""
        findings.append(Check(name="bfloat16", status="warn" if slow else "ok", found=found, fix=fix))
    return findings


def _vllm() -> list[Check]:
    """Checks vLLM, which only `rollout.engine: vllm` needs."""
    found = installed()
    if found is None:
        return [Check(name="vllm", status="ok", found="not installed; only rollout.engine vllm needs it")]
    build, version = found
    problem = vllm_problem(found)
    return [
        Check(name="vllm", status="warn" if problem else "ok", found=f"{version}, {build} build", fix=problem or "")
    ]


def _compiler() -> list[Check]:
    """Looks for a C++ compiler, which DeepSpeed's fused optimizers and vLLM's kernels need on GPUs; CPUs need none."""
    name = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if name:
        return [Check(name="compiler", status="ok", found=shutil.which(name) or name)]
    fix = "only needed for GPU kernels that are built at first use (Triton, vLLM): install g++"
    return [Check(name="compiler", status="warn", found="no C++ compiler on PATH", fix=fix)]


def _shared_memory() -> list[Check]:
    """Checks /dev/shm, which holds Ray's object store; without room there Ray falls back to the disk, which is slow."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return [Check(name="/dev/shm", status="ok", found="not used on this system")]
    free = shutil.disk_usage(path).free
    fix = "in a container: --shm-size=8g (Docker), or an emptyDir with medium: Memory at /dev/shm (Kubernetes)"
    return [_room("/dev/shm", free, SHM_BYTES, "warn", fix)]


def _disk(folder: Path) -> list[Check]:
    """Checks the disks of the run folders and of Ray's session and spill files."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError:  # said by `ray_environment`
        temporary = folder
    findings = [
        _room(
            f"disk at {folder}",
            shutil.disk_usage(folder).free,
            DISK_BYTES,
            "fail",
            "free some space, or set runs_folder to another disk",
        ),
        _room(
            f"disk at {temporary}",
            shutil.disk_usage(temporary).free,
            DISK_BYTES,
            "warn",
            "free some space, or set TMPDIR to a folder on another disk, with a short path",
        ),
    ]
    if not os.access(folder, os.W_OK):
        fix = "run from a folder of your own, or set runs_folder"
        findings.append(Check(name="run folder", status="fail", found=f"{folder} is not writable", fix=fix))
    return findings


def _memory() -> list[Check]:
    free = psutil.virtual_memory().available
    return [_room("memory", free, MEMORY_BYTES, "warn", "close other programs, or lower rollout.workers and max_rows")]


def _security() -> list[Check]:
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode == "token":
        return [Check(name="ray authentication", status="ok", found="token")]
    fix = "unset RAY_AUTH_MODE or set it to token: without it, anyone who reaches a Ray port can run code"
    return [Check(name="ray authentication", status="warn", found=f"RAY_AUTH_MODE={mode}", fix=fix)]


def terminal(encoding: str | None = None) -> list[Check]:
    """Looks for an encoding of the output that lacks characters, which are then replaced by question marks."""
    found = encoding or sys.stdout.encoding or "none"
    if found != "none" and codecs.lookup(found).name.startswith("utf"):
        return [Check(name="terminal", status="ok", found=found)]
    fix = "characters that it lacks are shown as ?: set PYTHONIOENCODING=utf-8, or LANG=C.UTF-8"
    return [Check(name="terminal", status="warn", found=found, fix=fix)]


def ray_environment(
    environment: Mapping[str, str] = os.environ, answers: Callable[[str, float], bool] | None = None
) -> list[Check]:
    """Checks the variables by which a run's own Ray starts; the check `ray` has a home and an address of its own."""
    faults = ray_faults(environment, RAY_DEADLINE_S, answers)
    if not faults:
        named = environment.get("RAY_ADDRESS")
        found = f"RAY_ADDRESS={named}" if named else "a Ray of this machine alone"
        return [Check(name="ray environment", status="ok", found=found)]
    return [Check(name="ray environment", status="fail", found=fault.found, fix=fault.fix) for fault in faults]


def _room(name: str, free: int, needed: int, status: Literal["warn", "fail"], fix: str) -> Check:
    found = f"{free / 2**30:.1f} GiB free"
    if free >= needed:
        return Check(name=name, status="ok", found=found)
    return Check(name=name, status=status, found=f"{found}, {needed / 2**30:.0f} GiB needed", fix=fix)


def _ray(deadline_s: float) -> list[Check]:
    if temporary_fault({}) is not None:
        return []  # said by `ray_environment`: there is no place for a session
    home = tempfile.mkdtemp(prefix="lgd-")  # a private home: the check leaves no token and no session behind
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"HOME": home, "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", _RAY_PROBE, os.path.join(home, "r"), str(deadline_s)]
    try:
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
            try:
                code: int | None = process.wait(deadline_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
            output.seek(0)
            printed = output.read().decode(errors="replace").strip()
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if code == 0 and "answer 42" in printed:
        return [Check(name="ray", status="ok", found="a local Ray started and ran a task")]
    last = printed.splitlines()[-1] if printed else "it printed nothing"
    if code is None:
        found = f"a local Ray did not answer within {deadline_s:.0f} s ({last})"
        fix = "look for a full /tmp, a firewall on the loopback interface, or http_proxy without no_proxy=127.0.0.1"
    else:
        found, fix = (
            f"a local Ray did not start: {last}",
            "run `python -c 'import ray; ray.init()'` to see all of its output",
        )
    return [Check(name="ray", status="fail", found=found, fix=fix)]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the child and its descendants, since Ray's daemons outlive a driver that is killed."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    if process.poll() is None:
        process.kill()
    process.wait()
    for child in family:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue

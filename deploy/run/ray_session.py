"""The Ray session of a run: the cluster that it was submitted to, or a local one on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from types import FrameType

from latent_grpo.common.config import ConfigError, RunConfig
from latent_grpo.common.errors import RayLost
from latent_grpo.deploy.run import link, local_ray
from latent_grpo.deploy.run.head_watch import head_watch
from latent_grpo.deploy.run.machine import check_machine, private_token
from latent_grpo.deploy.run.object_store import ON_A_CLUSTER, Store, local_store, running_store, spill_watch
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.reservation import Reservation, Services, amounts, reserved

CONNECT_S = 60.0  # for a head that answers to accept this program


def needed_resources(config: RunConfig, services: Services = "both") -> dict[str, float]:
    """Returns the resources that all actors of the run reserve together."""
    total: dict[str, float] = {}
    for count, resources in (
        (config.rollout.workers if services != "learner" else 0, config.rollout.resources),
        (config.learner.ranks if services != "rollout" else 0, config.learner.resources),
    ):
        for name, amount in amounts(resources).items():
            total[name] = total.get(name, 0.0) + count * amount
    return {name: amount for name, amount in total.items() if amount > 0}


def check_resources(config: RunConfig, available: dict[str, float], where: str, services: Services = "both") -> None:
    """Raises ConfigError where the run's actors can never all be placed; Ray would wait forever without a message."""
    short = [
        f"{name}: {amount:g} needed, {available.get(name, 0):g} available"
        for name, amount in needed_resources(config, services).items()
        if amount > available.get(name, 0) + 1e-6
    ]
    if short:
        rollout, learner = config.rollout, config.learner
        raise ConfigError(
            f"{where} cannot hold {rollout.workers} rollout worker(s) and {learner.ranks} learner rank(s) ("
            f"{'; '.join(short)}); lower rollout.workers or learner.ranks, or let actors share a device with fractions "
            "of rollout.resources.num_cpus/num_gpus and learner.resources.num_cpus/num_gpus"
        )


def room_for_workers(config: RunConfig, services: Services = "both") -> int:
    """Returns how many rollout workers the nodes that are there now can hold beside the run's ranks."""
    import ray

    ranks = config.learner.ranks if services != "rollout" else 0
    taken, each = amounts(config.learner.resources), amounts(config.rollout.resources)
    there = ray.cluster_resources()
    left = [(there.get(name, 0.0) - ranks * taken.get(name, 0.0)) / amount for name, amount in each.items()]
    return max(int(min(left, default=float(config.rollout.workers)) + 1e-6), 0)


def grows() -> bool:
    """Whether the Ray that the run works with may get more nodes: a cluster's, and not one of this machine alone."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextlib.contextmanager
def ray_session(
    config: RunConfig, reporter: Reporter, services: Services = "both", published_bytes: int = 0
) -> Iterator[Reservation]:
    """Connects to Ray, reserves room for the run, and disconnects at the end without leaving anything.

    RAY_ADDRESS (set inside a job) names the cluster; without it a local Ray is started with this machine's cores, and
    an object store for publications of `published_bytes`. Says what it has started, and if Ray spills objects. A
    cluster may grow, so a run waits there for room (`deploy.run.reservation`); this machine does not, so what it can
    never hold is refused at once. Raises ConfigError.
    """
    import ray

    if ray.is_initialized():  # by a notebook, a test or an embedding program: its Ray is used and stays connected
        _report(_running(config, published_bytes), reporter)
        with spill_watch(reporter.say, ON_A_CLUSTER), reserved(config, services, reporter.say) as places:
            yield places
        return
    check_machine(config.deadlines.start_s)
    address = os.environ.get("RAY_ADDRESS")
    private_token(make=not address)  # a cluster's own token is its to give
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # a worker's error is not asked for where a rank's has ended the run, and Ray would print its traceback
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    temporary = None
    if address:
        limit = min(CONNECT_S, config.deadlines.start_s)
        with start_errors(f"RAY_ADDRESS={address}"), alarm(limit):
            ray.init(address=address, logging_level=logging.WARNING)
        _report(_running(config, published_bytes), reporter)
    else:
        with start_errors(f"TMPDIR={tempfile.gettempdir()}"):
            temporary = tempfile.mkdtemp(prefix="lg-")  # short: Unix socket paths end at 107 bytes
        link.tell(ray=temporary)
        try:
            store = local_store(config, published_bytes)
            _report(store, reporter)
            with start_errors(f"its folder {temporary}, below TMPDIR"):
                local_ray.start(store, temporary, config.deadlines.start_s, reporter.say)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    try:
        with head_watch(ray.get_runtime_context().gcs_address, config.deadlines.driver_s, reporter.say):
            if not address:
                check_resources(config, ray.cluster_resources(), "this machine", services)
            remedy = ON_A_CLUSTER if address else "raise ray.object_store_bytes"
            with spill_watch(reporter.say, remedy), reserved(config, services, reporter.say) as places:
                yield places
    finally:
        ray.shutdown()
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def _running(config: RunConfig, published_bytes: int) -> Store:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return running_store(config, published_bytes, [int(node.get("object_store_memory", 0)) for node in nodes])


def _report(store: Store, reporter: Reporter) -> None:
    reporter.say(store.sentence)
    if store.warning:
        reporter.say(f"[yellow]{store.warning}[/]")


@contextlib.contextmanager
def alarm(limit_s: float) -> Iterator[None]:
    """Raises TimeoutError in the block after `limit_s`: Ray tries for a quarter of an hour to reach a head.

    It comes when Ray returns from the attempt that it is at, which takes up to 30 s. Only a main thread can be called.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no connection within {limit_s:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def start_errors(where: str) -> Iterator[None]:
    """Turns what Ray raises where it cannot start into one line. `where` is the variable that decides it.

    That is a ConfigError, but RayLost in a run that recovers: it had a Ray before, so another attempt may have one.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # sockets, gRPC, authentication and versions each have errors of their own
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        said = f"Ray cannot start ({where}): {type(error).__name__}: {first}"
        if link.recovering():
            raise RayLost(said) from error
        raise ConfigError(f"{said}; `latent-grpo doctor` looks for the cause") from error

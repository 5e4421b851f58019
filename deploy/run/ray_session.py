"""The Ray session of a run: the cluster that it was submitted to, or a local one on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator

from latent_grpo.common.config import ConfigError, RunConfig
from latent_grpo.deploy.run import link
from latent_grpo.deploy.run.object_store import ON_A_CLUSTER, Store, local_store, running_store, spill_watch
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.reservation import Reservation, Services, amounts, reserved


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
    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    temporary = None
    if address:
        ray.init(address=address, logging_level=logging.WARNING)
        _report(_running(config, published_bytes), reporter)
    else:
        temporary = tempfile.mkdtemp(prefix="lg-")  # short: Unix socket paths end at 107 bytes
        link.tell(ray=temporary)
        _start_local(local_store(config, published_bytes), temporary, reporter)
    try:
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


def _start_local(store: Store, folder: str, reporter: Reporter) -> None:
    import ray

    _report(store, reporter)
    # with every start it warns that authentication is on, as it should be
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    try:
        ray.init(
            address="local",  # never a Ray that another program has left on this machine
            include_dashboard=False,
            object_store_memory=store.size,
            logging_level=logging.WARNING,
            _temp_dir=folder,
        )
    except ValueError as error:  # more than the machine's memory, or than it has shared memory
        raise ConfigError(f"{store.sentence}: {error}; lower ray.object_store_bytes") from error

"""The KubeRay manifest of a run: `rayjob.yaml` beside this file, with the pods that a profile needs on N GPUs.

All GPU pods are alike. As many as the ranks and `rollout.min_workers` need are there from the start, the others come
and go with Ray's autoscaler, up to `rollout.max_workers`.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from latent_grpo.common.config import ConfigError, RunConfig
from latent_grpo.common.config.yaml_files import is_path
from latent_grpo.common.interrupts import LEAVE_S
from latent_grpo.common.remote_url import is_url
from latent_grpo.deploy.run.preparation import check_secrets

TEMPLATE = Path(__file__).parent / "rayjob.yaml"
SHARED = "/shared"
NAME = re.compile(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?")  # of a RayJob, which names services and pods after itself


def kuberay_manifest(
    config: RunConfig,
    profile: str,
    *,
    gpus: int,
    per_node: int = 8,
    image: str | None = None,
    claim: str = "latent-grpo-shared",
    overrides: Sequence[str] = (),
) -> str:
    """Returns the YAML of a RayJob that trains `profile` on `gpus` GPUs of nodes that have `per_node` each.

    `config` are the settings that the job will have. Raises ConfigError where an actor or the run does not fit the
    nodes, and for a profile that is a file of this machine.
    """
    if is_path(profile):
        raise ConfigError(
            f"manifest kuberay --profile {profile}: a file of this machine is not in the image; give the name of a "
            "shipped profile and settings, or use `latent-grpo submit`, which takes files along"
        )
    pods, least, most = _pods(config, gpus, per_node)
    check_secrets(config)  # the manifest shows every override
    name = config.run_name or profile.replace("_", "-").lower()
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"run_name {name!r:.80}: the job gets this name, and Kubernetes allows at most 47 lower-case letters, "
            "digits and `-`, a letter first"
        )
    grace = math.ceil(config.deadlines.terminate_s + LEAVE_S)
    job: dict[str, Any] = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    job["metadata"]["name"] = name
    spec, own = job["spec"], [o for o in overrides if not o.startswith(("run_name=", "runs_folder=", "work_folder="))]
    fixed = [f"runs_folder={SHARED}/runs", f"run_name={name}"]
    if is_url(config.runs_folder):  # the pods work on what they share
        fixed = [f"runs_folder={config.runs_folder}", f"work_folder={SHARED}/runs", f"run_name={name}"]
    spec["entrypoint"] = shlex.join(["latent-grpo", "train", "--profile", profile, "--gpus", str(gpus), *fixed, *own])
    spec["runtimeEnvYAML"] = yaml.safe_dump({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(grace)}})
    cluster = spec["rayClusterSpec"]
    cluster["enableInTreeAutoscaling"] = least < most
    (group,) = cluster["workerGroupSpecs"]
    group.update(replicas=least, minReplicas=least, maxReplicas=most)
    for of in (cluster["headGroupSpec"], group):
        pod = of["template"]["spec"]
        pod["terminationGracePeriodSeconds"] = grace
        pod["volumes"][0]["persistentVolumeClaim"]["claimName"] = claim
        pod["containers"][0]["image"] = image or pod["containers"][0]["image"]
    for amounts in group["template"]["spec"]["containers"][0]["resources"].values():
        amounts["nvidia.com/gpu"] = pods
    return yaml.safe_dump(job, sort_keys=False, width=120)


def _pods(config: RunConfig, gpus: int, per_node: int) -> tuple[int, int, int]:
    """Returns the GPUs of a pod, and the pods that must be there and that there may be."""
    rollout, learner = config.rollout, config.learner
    of_worker, of_rank = rollout.resources.num_gpus, learner.resources.num_gpus
    for what, needed in (("rollout.resources.num_gpus", of_worker), ("learner.resources.num_gpus", of_rank)):
        if needed > per_node:
            raise ConfigError(
                f"{what} is {needed:g}, and a node has {per_node} GPUs; lower it, or give --gpus-per-node"
            )
    if gpus > per_node and gpus % per_node:
        raise ConfigError(
            f"--gpus {gpus} does not fill nodes of {per_node} GPUs; give a multiple of {per_node}, or --gpus-per-node"
        )
    pod = min(gpus, per_node)
    taken = learner.ranks * of_rank + rollout.workers * of_worker
    if taken > gpus + 1e-6:
        raise ConfigError(
            f"{rollout.workers} worker(s) and {learner.ranks} rank(s) take {taken:g} GPUs, --gpus is {gpus}; lower "
            "rollout.workers or learner.ranks"
        )
    if not taken:
        raise ConfigError("the settings use no GPU; set rollout.resources.num_gpus and learner.resources.num_gpus")

    def pods_for(workers: int) -> int:
        return max(math.ceil((learner.ranks * of_rank + workers * of_worker) / pod - 1e-9), 1)

    least = pods_for(min(rollout.min_workers, rollout.workers))
    return pod, least, max(pods_for(rollout.max_workers or rollout.workers), gpus // pod, least)

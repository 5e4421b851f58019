"""The manifest for KubeRay: pods that fit the run and autoscale, in the form that KubeRay accepts."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator

from latent_grpo.common.config import ConfigError, load_config
from latent_grpo.deploy.cluster.kuberay import kuberay_manifest

SCHEMAS = "LATENT_GRPO_KUBERAY_SCHEMAS"  # a folder with rayjobs.v1.schema.json.gz: openAPIV3Schema of the resource
ON_GPUS = ("rollout.resources.num_gpus=1", "learner.resources.num_gpus=1")


def manifest(gpus, *overrides, profile="gsm8k-aug", **options):
    config = load_config(profile, [*ON_GPUS, *overrides], gpus)
    return yaml.safe_load(kuberay_manifest(config, profile, gpus=gpus, overrides=[*ON_GPUS, *overrides], **options))


def test_a_run_in_an_object_store_works_on_what_the_pods_share():
    entry = manifest(8, "runs_folder=s3://bucket/runs", "work_folder=elsewhere")["spec"]["entrypoint"]
    assert "runs_folder=s3://bucket/runs work_folder=/shared/runs" in entry
    assert "elsewhere" not in entry


def group_of(job):
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return group


@pytest.mark.parametrize("gpus", [8, 32, 64])
def test_the_pods_hold_what_the_profile_needs(gpus):
    job = manifest(gpus)
    group = group_of(job)
    (container,) = group["template"]["spec"]["containers"]
    pod = container["resources"]["limits"]["nvidia.com/gpu"]
    config = load_config("gsm8k-aug", ON_GPUS, gpus)
    assert pod == container["resources"]["requests"]["nvidia.com/gpu"] == min(gpus, 8)
    assert group["maxReplicas"] * pod == gpus
    assert group["minReplicas"] * pod >= config.learner.ranks + config.rollout.min_workers
    assert f"--profile gsm8k-aug --gpus {gpus} " in job["spec"]["entrypoint"]
    assert job["spec"]["entrypoint"].endswith(" ".join(ON_GPUS))


def test_workers_beyond_the_least_come_and_go():
    job = manifest(32, "rollout.workers=12", "rollout.min_workers=2", "rollout.max_workers=28", "learner.ranks=4")
    group = group_of(job)
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (1, 1, 4)
    assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is True


def test_what_does_not_fit_a_node_is_refused():
    with pytest.raises(ConfigError, match=r"learner.resources.num_gpus is 16, and a node has 8 GPUs"):
        manifest(32, "learner.resources.num_gpus=16", "learner.ranks=1")
    with pytest.raises(ConfigError, match="--gpus 32 does not fill nodes of 12 GPUs; give a multiple of 12"):
        manifest(32, per_node=12)
    with pytest.raises(ConfigError, match=r"20 worker\(s\) and 4 rank\(s\) take 24 GPUs, --gpus is 8"):
        manifest(8, "rollout.workers=20", "learner.ranks=4")
    config = load_config("gsm8k-aug", ON_GPUS, 8)
    with pytest.raises(ConfigError, match="is not in the image"):
        kuberay_manifest(config, "./mine.yaml", gpus=8)


@pytest.mark.skipif(SCHEMAS not in os.environ, reason=f"{SCHEMAS} names no folder with KubeRay's schemas")
@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_the_manifest_has_the_form_that_kuberay_accepts(gpus):
    schema = json.loads(gzip.decompress(Path(os.environ[SCHEMAS], "rayjobs.v1.schema.json.gz").read_bytes()))
    shared = ("rollout.resources.num_gpus=0.5", "learner.resources.num_gpus=0.5") if gpus == 1 else ()
    Draft7Validator(_closed(schema)).validate(manifest(gpus, *shared))


def _closed(node):
    """The schema with unknown keys refused, as `kubectl` refuses them."""
    if isinstance(node, dict):
        closed = {key: _closed(value) for key, value in node.items()}
        known = isinstance(node.get("properties"), dict) and "type" in node
        if known and "additionalProperties" not in node and not node.get("x-kubernetes-preserve-unknown-fields"):
            closed["additionalProperties"] = False
        return closed
    return [_closed(item) for item in node] if isinstance(node, list) else node


@pytest.mark.parametrize("name", ["My_Run", "a.b", "a" * 48, "run-", "7b"])
def test_a_name_that_kubernetes_does_not_take_is_refused(name):
    with pytest.raises(ConfigError, match=r"run_name .*Kubernetes allows at most 47 lower-case letters"):
        manifest(8, f"run_name={name}")


def test_a_manifest_shows_no_secret():
    with pytest.raises(ConfigError, match=r"tasks.0.path: a secret does not belong into settings") as refused:
        manifest(8, "tasks.0.path=https://me:sesame@host/x")
    assert "sesame" not in str(refused.value)

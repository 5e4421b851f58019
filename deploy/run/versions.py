"""The versions of this program's code, of its installation and of the packages, here and where a job was submitted.

A job brings its code and uses the packages of the cluster. Both can differ from what the submitter has tested, so a
run compares them at its start and reports every difference.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence

from latent_grpo.common import __version__
from latent_grpo.deploy.run.program import DISTRIBUTION, OUR_PACKAGES, ROOT, installed_copies, source_hash

PACKAGES = ("torch", "transformers", "ray", "deepspeed", "pyarrow", "pydantic", "numpy")
ARITHMETIC = 6
"""Rises when the same draws and steps may differ in their last bits. 2: the lean decode step, shared
prompts. 3: log-probs of the learner, AdamW. 4: log-probs of a large vocabulary, and all with ZeRO-3.
5: prompts by the lean forward pass. 6: Latent-SFT's own mixtures, by a shorter pass."""
SUBMITTED = "LATENT_GRPO_SUBMITTED"
"""Environment variable of a job: the submitter's :func:`versions`, as JSON."""


def versions() -> dict[str, str]:
    """The versions of Python, of this program and of the packages."""
    found = {"python": platform.python_version(), "latent-grpo": __version__}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def bits_may_differ(arithmetic: Sequence[int]) -> str:
    """Returns a sentence where a deterministic run goes on with other last bits; else an empty text.

    `arithmetic` has the value of :data:`ARITHMETIC` with which each lineage of the run began.
    """
    if len(set(arithmetic)) < 2:
        return ""
    return (
        "an earlier version began this run, and this one computes the last bits of scores otherwise: with "
        "deterministic: true its steps from here on need not equal those of an undisturbed run"
    )


def differences(here: Mapping[str, str] | None = None, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Returns one sentence for each version that is not the expected one; none where all agree.

    `here` holds the versions that run (default: :func:`versions`).
    """
    here, found = here or versions(), []
    code = here["latent-grpo"]
    try:
        installed = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        installed = code  # an image with the dependencies only
    if installed != code:
        found.append(f"the code that runs is latent-grpo {code}, but latent-grpo {installed} is installed here")
    else:
        found += differing_copies()
    submitted = json.loads(environment.get(SUBMITTED, "{}"))
    found += [
        f"{name} is {here[name]} here and {version} where the job was submitted"
        for name, version in submitted.items()
        if name in here and here[name] != version
    ]
    return found


def differing_copies(search: Sequence[str] | None = None) -> list[str]:
    """Returns a sentence for each installed copy of this program whose sources differ from those that run.

    `search` lists the folders to look in; the default is the import path.
    """
    return [
        f"the code that runs is {ROOT}, whose sources differ from those of latent-grpo {version} installed in {copy}"
        for version, copy in installed_copies(search)
        if source_hash(OUR_PACKAGES, copy) != source_hash(OUR_PACKAGES)
    ]

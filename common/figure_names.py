"""The names of an evaluation's figures in metrics, summaries and results.

    svamp/pass_at_1                      by this project's protocol
    svamp/reference/pass_at_1            by that of the paper's authors, with the noise off
    svamp/reference-noise/pass_at_1      the same with the noise on

What stands before the figure is its label.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from latent_grpo.common.config.monitoring_and_checkpoints import EvaluationProtocol
from latent_grpo.common.types import NoiseMode

T = TypeVar("T")
_MARKS = {"reference": "reference, noise off", "reference-noise": "reference, noise on"}


def label(task: str, protocol: EvaluationProtocol, noise: NoiseMode) -> str:
    """Returns the label of a task's figures; `noise` is that of pass@1."""
    if protocol == "ours":
        return task
    return f"{task}/{protocol}" + ("" if noise == "off" else "-noise")


def protocol_of(label: str) -> str:
    """Returns the protocol that a label names, for people: `ours`, `reference, noise off`."""
    return _MARKS.get(label.rpartition("/")[2], "ours")


def task_of(label: str) -> str:
    """Returns the task that a label names."""
    return label if protocol_of(label) == "ours" else label.rpartition("/")[0]


def titled(label: str, value: str = "") -> str:
    """Returns a label for people, with a value: `svamp 0.5 (protocol reference, noise off)`."""
    return f"{task_of(label)}{value and ' '}{value} (protocol {protocol_of(label)})"


def by_label(metrics: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Turns `label/name` -> value into label -> name -> value."""
    found: dict[str, dict[str, T]] = {}
    for key, value in metrics.items():
        of, _, name = key.rpartition("/")
        found.setdefault(of, {})[name] = value
    return found


def of_first_protocol(labels: Mapping[str, T]) -> tuple[str, dict[str, T]]:
    """Returns the protocol of the first label, and task -> what those of that protocol have.

    Figures of two protocols are never averaged, and by this order those of this project come first.
    """
    protocol = protocol_of(next(iter(labels), ""))
    mark = {shown: f"/{mark}" for mark, shown in _MARKS.items()}.get(protocol, "")
    return protocol, {of.removesuffix(mark): value for of, value in labels.items() if protocol_of(of) == protocol}

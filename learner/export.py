"""A checkpoint as a Hugging Face folder, without the ranks that wrote it: any machine with enough memory can read one.

Below ZeRO stage 3 the weights are whole in the state; at stage 3 DeepSpeed puts the ranks' parts together (its
`zero_to_fp32`). LoRA's factors in a state of Latent-SFT are added to their weights (`learner.sft.lora`).
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latent_grpo.common.config import RunConfig
from latent_grpo.learner.base_rank import write_model_folder
from latent_grpo.learner.checkpoint import CheckpointError
from latent_grpo.learner.policy import load_policy_model
from latent_grpo.learner.sft.lora import UP, Addition, plain_parameters
from latent_grpo.learner.zero_engine import FACTS, TAG

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "model."  # of the policy in the module that is trained


def export_checkpoint(state: Path, source: str | Path, folder: Path, config: RunConfig) -> None:
    """Writes the policy of a learner's state (`CHECKPOINT/learner`) into `folder`, in the run's dtype.

    `source` is the model that the learner started from; its tokenizer, chat template and licence are copied. Raises
    :class:`CheckpointError` for a state that does not fit it.
    """
    model = load_policy_model(str(source), config.model.dtype)
    parameters = dict(_plain(model_parameters(state), model, config))
    missing = [name for name, _ in model.named_parameters() if name not in parameters]
    if missing:
        raise CheckpointError(
            f"{state} has not all parameters of {source}, the first missing one is {missing[0]!r}; was the model "
            "changed after the run began?"
        )
    write_model_folder(parameters, str(source), folder, config.model)


def model_parameters(state: Path) -> dict[str, torch.Tensor]:
    """Returns the parameters of a learner's state on the CPU, by the names of the trained model.

    Raises :class:`CheckpointError` for a folder that the learner has not written.
    """
    facts = state / FACTS
    if not facts.is_file():
        raise CheckpointError(f"{state}: it has no {FACTS}; give a checkpoint that a learner has written")
    stage = int(json.loads(facts.read_text(encoding="utf-8"))["zero_stage"])
    found: dict[str, Any]
    if stage < 3:  # every rank holds whole weights, and each writes them
        files = sorted((state / TAG).glob("*_model_states.pt"))
        found = torch.load(files[0], map_location="cpu", weights_only=False)["module"]
    else:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it prints a lot
            found = get_fp32_state_dict_from_zero_checkpoint(str(state), tag=TAG)
    return {name.removeprefix(PREFIX): tensor for name, tensor in found.items() if name.startswith(PREFIX)}


def _plain(
    parameters: dict[str, torch.Tensor], model: PreTrainedModel, config: RunConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the parameters of the plain model, by the names of its own; aliases of tied ones are left out."""
    from transformers.pytorch_utils import Conv1D

    additions = {}
    if lora := None if config.warm_start is None else config.warm_start.lora:
        layers = [name.removesuffix(UP) for name in parameters if name.endswith(UP)]
        additions = {
            layer: Addition(lora.alpha / lora.rank, isinstance(model.get_submodule(layer), Conv1D)) for layer in layers
        }
    own = {name for name, _ in model.named_parameters()}
    in_order = sorted(parameters.items(), key=lambda item: item[0].endswith(UP))  # a weight before its factors' end
    yield from ((name, tensor) for name, tensor in plain_parameters(in_order, additions) if name in own)

"""A checkpoint as a Hugging Face folder, without the ranks that wrote it: any machine with enough memory can read one.

The trained weights are whole in the state (`learner.state`), the frozen ones are those of the model that training began
with. Where DeepSpeed wrote a state at stage 3, its `zero_to_fp32` puts the ranks' parts together. LoRA's factors in a
state are added to their weights (`learner.lora`).
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latent_grpo.common.config import LoRAConfig, RunConfig
from latent_grpo.learner.base_rank import write_model_folder
from latent_grpo.learner.checkpoint import CheckpointError
from latent_grpo.learner.lora import UP, WEIGHT, Addition, plain_parameters
from latent_grpo.learner.policy import load_policy_model
from latent_grpo.learner.state import OLD_TAG, LearnerStateMismatch, OldFacts, read_facts, read_tensors, weights_only

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "model."  # of the policy in the module that is trained


def export_checkpoint(
    state: Path, source: str | Path, folder: Path, config: RunConfig, lora: LoRAConfig | None = None
) -> None:
    """Writes the policy of a learner's state (`CHECKPOINT/learner`) into `folder`, in the run's dtype.

    `source` is the model that the learner started from: its frozen parameters, tokenizer, chat template and licence are
    taken. `lora` is that of the stage which wrote the state. Raises :class:`CheckpointError` for a state that does not
    fit the model.
    """
    model = load_policy_model(str(source), config.model.dtype)
    dtype = getattr(torch, config.model.dtype)  # that of the weights which the learner has published
    trained = {name: tensor.to(dtype) for name, tensor in model_parameters(state).items()}
    parameters = dict(plain_parameters(*_with_factors(trained, model, lora)))
    known = model.state_dict()  # aliases of tied parameters too, which an old state has
    other = [name for name, tensor in parameters.items() if name not in known or known[name].shape != tensor.shape]
    if other or not parameters:
        why = f"{source} has no parameter like its {other[0]!r}" if other else "it has no parameters of a policy"
        raise CheckpointError(f"{state} does not fit: {why}; was the model changed after the run began?")
    own = {name for name, _ in model.named_parameters()}
    write_model_folder({n: t for n, t in parameters.items() if n in own}, str(source), folder, config.model)


def model_parameters(state: Path) -> dict[str, torch.Tensor]:
    """Returns the trained parameters of a learner's state on the CPU in float32, by the names of the trained model.

    A state that DeepSpeed wrote has the frozen ones too, and in the run's dtype below stage 3. Raises
    :class:`CheckpointError` for a folder that the learner has not written.
    """
    try:
        facts = read_facts(state)
        if isinstance(facts, OldFacts):
            found = _old_parameters(state, facts)
        else:
            found = {name: tensors["weight"] for name, tensors in read_tensors(state, facts, ("weight",))}
    except LearnerStateMismatch as error:
        raise CheckpointError(str(error)) from error
    return {name.removeprefix(PREFIX): tensor for name, tensor in found.items() if name.startswith(PREFIX)}


def _old_parameters(state: Path, facts: OldFacts) -> dict[str, Any]:
    """Reads a state that DeepSpeed wrote: below stage 3 every rank's file has whole weights, above it has parts."""
    with weights_only(state):
        if facts.zero_stage < 3:
            files = sorted((state / OLD_TAG).glob("*_model_states.pt"))
            if not files:
                raise LearnerStateMismatch(f"{state / OLD_TAG}: it has no *_model_states.pt; was the state removed?")
            return dict(torch.load(files[0], map_location="cpu", weights_only=True)["module"])
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it prints a lot
            return dict(get_fp32_state_dict_from_zero_checkpoint(str(state), tag=OLD_TAG))


def _with_factors(
    trained: dict[str, torch.Tensor], model: PreTrainedModel, lora: LoRAConfig | None
) -> tuple[list[tuple[str, torch.Tensor]], dict[str, Addition]]:
    """Returns what :func:`plain_parameters` takes: beside LoRA's factors the weights to which they are added."""
    from transformers.pytorch_utils import Conv1D

    layers = [name.removesuffix(UP) for name in trained if name.endswith(UP)] if lora else []
    frozen = {layer + WEIGHT: model.get_parameter(f"{layer}.weight") for layer in layers}
    additions = {
        layer: Addition(lora.alpha / lora.rank, isinstance(model.get_submodule(layer), Conv1D))
        for layer in layers
        if lora
    }
    in_order = sorted(
        (frozen | trained).items(), key=lambda item: item[0].endswith(UP)
    )  # a weight before its factors' end
    return in_order, additions

"""LoRA in Latent-SFT and RL, through `peft`: low-rank additions to linear layers are trained, the weights are not.

    y = W x + (alpha / rank) B A x        A [rank, in] and B [out, rank] are trained, B begins at 0

Whoever takes the model gets W + (alpha / rank) B A under the layer's own name (:func:`plain_parameters`): the engines,
the model that a training leaves, and whatever starts from it know nothing of LoRA. The initial model is the same module
without the additions (:func:`without_additions`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from latent_grpo.common.config import LoRAConfig
from latent_grpo.common.errors import ConfigError
from latent_grpo.learner.policy import freeze_lower_layers, transformer_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"  # peft's name for the only one
WEIGHT, DOWN, UP = ".base_layer.weight", f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


class Addition(NamedTuple):
    """How the product of a layer's two factors is added to its weights."""

    scale: float  # alpha / rank
    transposed: bool  # the weights are [in, out], as GPT-2's are


def missing_package(find: Callable[[str], object | None] = find_spec) -> str | None:
    """Returns a sentence that says what to install for LoRA, or None where it is there. `find` looks for a package."""
    if find("peft") is not None:
        return None
    return "LoRA needs the package peft, which is not installed: pip install 'peft>=0.21,<0.22'"


def add_lora(
    model: PreTrainedModel, settings: LoRAConfig, *, seed: int, trained_layers: int | None = None
) -> dict[str, Addition]:
    """Freezes the model, puts trainable factors into its layers in place, and returns them by the layer's name.

    `trained_layers`: only into so many layers, the uppermost ones (`model.train_layers`). The factors are a function of
    `seed`. Raises ConfigError for targets that the model does not have.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    freeze_lower_layers(model, trained_layers)  # refuses more layers than there are
    targets = linear_targets(model, settings, trained_layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(
            LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,  # type: ignore[arg-type]  # annotated int, and only divided by the rank
                lora_dropout=0.0,  # the module stays in evaluation mode
                target_modules=sorted(targets),
                fan_in_fan_out=any(targets.values()),
            ),
            model,
            ADAPTER,
        )
    return {
        name: Addition(layer.scaling[ADAPTER], targets[name])
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def linear_targets(model: PreTrainedModel, settings: LoRAConfig, trained_layers: int | None) -> dict[str, bool]:
    """Returns the names of the linear layers that get factors, and whether their weights are [in, out].

    The model may lie on the device `meta`. Raises ConfigError for targets that it does not have.
    """
    from transformers.pytorch_utils import Conv1D

    layers = transformer_layers(model)[-(trained_layers or 0) :]
    inside = {id(module) for layer in layers for module in layer.modules()}
    found = {
        name: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, nn.Linear | Conv1D)
    }
    known = {name.rpartition(".")[2] for name in found}
    wanted = known if settings.targets is None else set(settings.targets)
    if unknown := sorted(wanted - known):
        raise ConfigError(
            f"lora.targets: the model has no linear layers {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    return {name: transposed for name, transposed in found.items() if name.rpartition(".")[2] in wanted}


def plain_parameters(
    parameters: Iterable[tuple[str, torch.Tensor]], additions: Mapping[str, Addition]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the parameters of the plain model: factors are added to their weights, in float32, and keep their dtype.

    `parameters` has a layer's weights before its two factors, as modules list them. Names are those of the model
    folder.
    """
    held: dict[str, torch.Tensor] = {}
    for name, parameter in parameters:
        if name.endswith((WEIGHT, DOWN)):
            held[name] = parameter
        elif name.endswith(UP):
            layer = name.removesuffix(UP)
            weight, down, addition = held.pop(layer + WEIGHT), held.pop(layer + DOWN), additions[layer]
            product = parameter.detach().float() @ down.detach().float() * addition.scale
            change = product.T if addition.transposed else product
            yield f"{layer}.weight", (weight.detach().float() + change).to(weight.dtype)
        else:
            yield plain_name(name), parameter


def plain_name(name: str) -> str:
    """Returns the name in the model's folder of a parameter that is not a factor."""
    return name.replace(".base_layer.", ".")


@contextmanager
def without_additions(model: nn.Module) -> Iterator[None]:
    """Makes the layers of `model` compute W x inside, as before its training. For passes without gradient."""
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    scales = [layer.scaling[ADAPTER] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[ADAPTER] = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[ADAPTER] = scale

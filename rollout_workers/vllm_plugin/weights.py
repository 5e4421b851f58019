"""Loading of published weights into a running vLLM model, and the proof that it holds them.

vLLM's own in-place reload does the loading: it splits and fuses the published (Hugging Face) parameters as the model
needs them and keeps every address, so captured CUDA graphs stay valid. Afterwards each published tensor is compared
with what the model's layers hold of it: fused layers part by part, padded vocabularies, tied heads, and with several
ranks each rank's own share.

    begin ──► load (some tensors; again and again) ──► end ──► differing (the same tensors again)

Both passes take bucket by bucket, so that only one at a time is on its way between processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

Model = Any
"""A vLLM model: a module with `load_weights`, `config` and, where it fuses layers, `packed_modules_mapping`."""


def keep_plain_weights() -> None:
    """Stops vLLM on CPU from packing weights, which could not be read back and would miss a reload of a tied head.

    vLLM's linear layers call the replaced function to choose how to multiply; torch's own product is as fast in
    float32.
    """
    from vllm.model_executor.layers import utils

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = plain


def layer_of(model: Model, name: str) -> str:
    """Returns the name of the layer that holds a published parameter: a fused one, or its own."""
    module, _, _ = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    fused = (layer for layer, leaves in getattr(model, "packed_modules_mapping", {}).items() if leaf in leaves)
    return next((f"{parent}.{layer}" for layer in fused if _submodule(model, f"{parent}.{layer}") is not None), module)


def begin(model: Model) -> None:
    """Begins a load. Until `end` the model's layers wait for their parameters and cannot compute."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    initialize_layerwise_reload(model)


def load(model: Model, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Loads some of the published tensors, under their Hugging Face names; a layer applies its own once complete."""
    model.load_weights(iter(tensors))


def end(model: Model, model_config: Any) -> None:
    """Ends a load, also one that failed: all layers can compute again.

    Those of which nothing was loaded have their weights of before; those loaded in part have undefined ones.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, model_config)


def differing(model: Model, tensors: Sequence[tuple[str, torch.Tensor]]) -> list[str]:
    """Returns the names of those tensors that the model does not hold as they were published."""
    return [name for name, tensor in tensors if not _holds(model, name, tensor)]


def _holds(model: Model, name: str, published: torch.Tensor) -> bool:
    found = list(_held(model, name))
    return bool(found) and all(torch.equal(held, _share(published, held, first)) for held, first in found)


def _held(model: Model, name: str) -> Iterator[tuple[torch.Tensor, int | None]]:
    """Yields what the model's layers hold of a published parameter, and the first of its rows if that is known."""
    module_name, _, parameter = name.rpartition(".")
    parent, _, leaf = module_name.rpartition(".")
    for fused, leaves in getattr(model, "packed_modules_mapping", {}).items():
        layer = _submodule(model, f"{parent}.{fused}") if leaf in leaves else None
        held = getattr(layer, parameter, None)
        if layer is not None and held is not None:
            place, sizes = leaves.index(leaf), layer.output_partition_sizes
            yield held.data.narrow(0, sum(sizes[:place]), sizes[place]), None
            return
    layer = _submodule(model, module_name)
    if getattr(layer, parameter, None) is not None:
        yield _without_padding(layer, getattr(layer, parameter).data)
    if getattr(model.config, "tie_word_embeddings", False) and module_name.endswith("embed_tokens"):
        yield _without_padding(model.lm_head, model.lm_head.weight.data)


def _submodule(model: Model, name: str) -> Any:
    """Returns a layer of the model, or None if it has no such layer."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _without_padding(layer: nn.Module, held: torch.Tensor) -> tuple[torch.Tensor, int | None]:
    """Removes padding, since vocabularies are padded to a multiple of 64 rows before they are divided over ranks."""
    vocabulary = getattr(layer, "shard_indices", None)
    if vocabulary is None:
        return held, None
    return held[: vocabulary.num_org_elements], vocabulary.org_vocab_start_index


def _share(published: torch.Tensor, held: torch.Tensor, first: int | None) -> torch.Tensor:
    """Returns the part of a published tensor that this rank should hold, in the shape of `held`."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    if first is not None:
        return published.narrow(0, first, len(held)).to(held.device)
    world, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    for dim, (whole, part) in enumerate(zip(published.shape, held.shape, strict=True)):
        if whole != part:  # key and value heads may be fewer than ranks: then some ranks hold the same ones
            published = published.narrow(dim, (rank * (whole // part) // world) * part, part)
    return published.to(held.device)

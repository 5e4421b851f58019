"""Models for ZeRO-3 whose weights stay in their files until each rank takes its share of every parameter.

    file, mapped ──► one parameter at a time, in the rank's dtype ──► the rank's share, a copy of 1 / ranks of it

A model is made with all of its modules, buffers and ties, and with no memory for its parameters. The files are mapped,
so the ranks of a machine read the same pages of its page cache, and no rank's own memory ever holds the whole model.
Copies are the weights that transformers puts together while it reads them (experts of a mixture, stored one by one),
and all weights of files in more than one data type, which a warning names.
"""

from __future__ import annotations

import copy
import logging
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from latent_grpo.common.errors import ConfigError
from latent_grpo.common.fingerprint import fingerprint
from latent_grpo.common.head import install_float32_head
from latent_grpo.common.hub import hub_errors
from latent_grpo.common.model_check import check_loading, check_model, quiet_loading, snapshot
from latent_grpo.common.model_files import stored_tensors
from latent_grpo.common.models import DTYPES, check_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Data types in which tensors can be mapped as they are stored."""


class StoredWeights:
    """Knows where the weights of the models that :meth:`load` has made are, until :meth:`shard` has taken them."""

    def __init__(self) -> None:
        self._tensors: dict[nn.Parameter, torch.Tensor] = {}

    def load(self, path: str, dtype: str) -> PreTrainedModel:
        """Returns the model of a folder or hub id, of parameters without memory, as `common.models.load_model` would.

        What is computed with them before :meth:`shard` is not a number, except within :meth:`lent`. Raises ConfigError
        where `load_model` does.
        """
        check_model(path, tokenizer=False)
        with hub_errors(path), quiet_loading():
            stored = _mapped(path)
            model = _without_memory(stored, DTYPES[dtype], path)
        tensors = dict(stored.named_parameters())
        self._tensors |= {parameter: tensors[name].detach() for name, parameter in model.named_parameters()}
        install_float32_head(model)
        with self.lent(model):
            check_logits(model, path)
        return model

    @contextmanager
    def lent(self, model: nn.Module) -> Iterator[None]:
        """Gives each module of `model` its own weights while it computes, and no longer."""

        def give(module: nn.Module, inputs: object) -> None:
            for parameter in module.parameters(recurse=False):
                parameter.data = self._tensors[parameter].to(parameter.dtype)

        def take(module: nn.Module, inputs: object, output: object) -> None:
            for parameter in module.parameters(recurse=False):
                parameter.data = _nothing(parameter.shape, parameter.dtype)

        modules = list(model.modules())
        hooks = [m.register_forward_pre_hook(give) for m in modules] + [m.register_forward_hook(take) for m in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def shard(self, module: nn.Module, *, dtype: torch.dtype, device: torch.device, config: dict[str, Any]) -> None:
        """Makes ZeRO-3 parameters of those of `module`, of which this rank holds its share alone; all ranks call it.

        `config` is DeepSpeed's. Parameters that no file holds, as LoRA's factors, are taken from rank 0. Raises
        ConfigError on all ranks if they have read different weights.
        """
        import deepspeed

        tensors = {parameter: self._tensors.pop(parameter, None) for parameter in module.parameters()}
        _check_equal((tensor for tensor in tensors.values() if tensor is not None), device)

        class Shares(deepspeed.zero.Init):  # type: ignore[misc]  # DeepSpeed is not typed
            def _convert_to_zero_parameters(self, param_list: Iterable[nn.Parameter]) -> None:
                for parameter in param_list:
                    tensor: Any = tensors.pop(parameter)
                    parameter.data = (parameter.data if tensor is None else tensor).to(device, dtype)
                    if tensor is None:
                        super()._convert_to_zero_parameters([parameter])
                    else:  # every rank has read it, and a broadcast would write into the mapped file's pages
                        self._convert_to_deepspeed_param(parameter)
                        parameter.partition()  # type: ignore[attr-defined]  # by the call above

        Shares(module=module, dtype=dtype, config_dict_or_path=config)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(device)


def _mapped(path: str) -> PreTrainedModel:
    """Returns the model in the data type of its files, so that its parameters are the mapped files themselves."""
    found = _loaded(path, "auto")
    folder = snapshot(path)  # by now a hub's model too has one
    if folder is None:
        raise ConfigError(f"model {path}: its files were read, and are not in the hub's cache; give its folder")
    kinds = {t.dtype for t in stored_tensors(folder, found.config.to_dict()).values()} & (STORED.keys() | {"F64"})
    dtype = STORED.get(min(kinds), torch.float32) if len(kinds) == 1 else torch.float32
    if len(kinds) > 1 or "F64" in kinds:
        log.warning(
            "model %s: its files hold weights of %s, so each learner rank copies all of them to float32 as it loads; "
            "save the model in one data type to have them mapped",
            path,
            " and ".join(sorted(kinds)),
        )
    return found if found.dtype == dtype else _loaded(path, dtype)


def _loaded(path: str, dtype: torch.dtype | str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation="sdpa",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        trust_remote_code=False,
    )
    check_loading(loaded[1], path)
    model: PreTrainedModel = loaded[0]
    return model


def _without_memory(stored: PreTrainedModel, dtype: torch.dtype, path: str) -> PreTrainedModel:
    """Returns the same model in `dtype`, of parameters without memory; buffers are as a load in `dtype` makes them."""
    parameters = dict(stored.named_parameters())  # tied ones once, so that they are tied again
    state = {
        name: _nothing(tensor.shape, dtype) if name in parameters else tensor
        for name, tensor in stored.state_dict().items()
        if name in parameters or not isinstance(_at(stored, name), nn.Parameter)
    }
    loaded: Any = type(stored).from_pretrained(
        None,
        config=copy.deepcopy(stored.config),
        state_dict=state,
        dtype=dtype,
        attn_implementation="sdpa",
        output_loading_info=True,
        trust_remote_code=False,
    )
    check_loading(loaded[1], path)
    model: PreTrainedModel = loaded[0]
    for parameter in model.parameters():  # transformers may have made copies of some, in another dtype
        parameter.data = _nothing(parameter.shape, parameter.dtype)
    return model.eval()


def _at(module: nn.Module, name: str) -> object:
    parent, _, last = name.rpartition(".")
    return getattr(module.get_submodule(parent), last)


def _nothing(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Returns a tensor of one value in memory, which is not a number: whoever computes with it is noticed."""
    return torch.full((1,), torch.nan, dtype=dtype).expand(shape)


def checksum_of(tensors: Iterable[torch.Tensor]) -> int:
    """Returns a checksum, 32 bits, of all bytes of tensors in this order, their shapes and data types."""
    found = [fingerprint(str(number), tensor) for number, tensor in enumerate(tensors)]
    return zlib.crc32("".join(found).encode())


def _check_equal(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """Raises ConfigError unless all ranks have read the same weights: nobody sends them to the others."""
    code = checksum_of(tensors)
    ends = torch.tensor([code, -code], device=device)
    torch.distributed.all_reduce(ends, op=torch.distributed.ReduceOp.MAX)
    if int(ends[0]) != -int(ends[1]):
        raise ConfigError(
            "the learner's ranks read different weights from the model's path; put the same files on all nodes"
        )

"""Whether a model can be used, decided from its files before a run's folder, Ray or a worker exists.

Names, shapes and headers are compared with what the model's configuration asks for: its model is made without memory
(on torch's `meta` device), and transformers' own loading decides which tensors would reach it, so ties, ignorable keys
and conversions are as transformers knows them. No code of a model's folder is ever run.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from latent_grpo.common.errors import ConfigError
from latent_grpo.common.hub import check_folder, hub_errors, network_errors
from latent_grpo.common.model_files import (
    StoredTensor,
    check_kind,
    check_settings,
    check_tokenizer_files,
    has_weights,
    named,
    read_json,
    refused,
    stored_tensors,
    words,
)
from latent_grpo.common.model_limits import ANOTHER, not_compared, refusal

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

COMPARED_ROWS = 16  # of weights that should be tied
CONSTANTS = (".masked_bias", ".position_ids")  # buffers of old checkpoints that no model reads any more
LARGEST = {
    "num_hidden_layers": 1_000, "num_experts": 10_000, "num_local_experts": 10_000, "n_routed_experts": 10_000,
}  # fmt: skip
"""What a damaged configuration must not make: each is a module of its own, memory or not."""
GENERAL_CODE = "give a model whose architecture transformers has itself"


def check_model(model: str | Path, *, tokenizer: bool = True) -> list[str]:
    """Checks a model, a folder or hub id, from its files, and returns warnings. Raises ConfigError with one line.

    Of a hub id the files in the cache are checked, and where weights are not there yet, their headers on the hub.
    Without `tokenizer` a folder of weights alone passes.
    """
    check_folder(model)
    folder = snapshot(model)
    if folder is not None:
        check_settings(folder)
        if tokenizer:
            check_tokenizer(folder, cached=not Path(model).is_dir())
    settings = read_settings(model)
    if (reason := refusal(settings)) is not None:
        raise refused(model, reason)
    shape = empty_model(settings, model)
    check_class(shape, settings, model)
    if folder is not None and (Path(model).is_dir() or has_weights(folder)):
        tensors = stored_tensors(folder, settings.to_dict())
        check_weights(tensors, shape, model)
        check_ties(tensors, shape, folder)
    elif (remote := _tensors_on_hub(str(model), folder)) is not None:
        check_weights(remote, shape, model)
    return [*own_code(settings, shape), *([] if (line := not_compared(settings)) is None else [line])]


def snapshot(model: str | Path) -> Path | None:
    """Returns the folder with a model's files: its own, or that of a hub id in the cache; None: there is none yet."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(str(model), "config.json")
    except HFValidationError:  # no such name can be on the hub, which the reading of its settings says
        return None
    return Path(found).parent if isinstance(found, str) else None


# --- the configuration -------------------------------------------------------------------------------------------


def read_settings(model: str | Path) -> PretrainedConfig:
    """Returns a model's configuration (folder or hub id); reads no weights and runs no code of the model's.

    Raises ConfigError for one that transformers has no code for, and for one whose values do not fit together.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    check_folder(model)
    folder = snapshot(model)
    if folder is not None:
        if not Path(model).is_dir():
            check_kind(folder)
        stated = check_settings(folder)
        kind = stated["model_type"]
        if kind not in CONFIG_MAPPING:
            if isinstance(stated.get("auto_map"), dict):
                raise refused(
                    model, f"it needs code of its own folder (auto_map, {kind}), which is never run; {GENERAL_CODE}"
                )
            raise refused(model, f"this transformers has no architecture {kind!r} (model_type); {GENERAL_CODE}")
    try:
        with hub_errors(model):
            return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except ConfigError:
        raise
    except Exception as error:  # a configuration from elsewhere may break any constructor
        raise refused(
            model, f"its config.json cannot be used ({words(error)}); copy it again from the original"
        ) from error


def empty_model(settings: PretrainedConfig, model: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Returns the causal language model of a configuration without memory for its weights (on torch's meta device)."""
    from transformers import AutoModelForCausalLM

    for key, most in LARGEST.items():
        if isinstance(count := getattr(settings, key, None), int) and count > most:
            raise refused(model, f"its config.json has {key} {count:,}, which no model has; copy it again")
    try:
        with quiet_loading(), torch.device("meta"):
            made: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(settings), dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
            )
    except Exception as error:  # a configuration from elsewhere may break any constructor
        if "Unrecognized configuration class" in str(error):
            raise refused(model, f"{settings.model_type} is no causal language model; {GENERAL_CODE}") from error
        if "scaled_dot_product_attention" in str(error):
            raise refused(
                model,
                f"transformers cannot compute the attention of {settings.model_type} by PyTorch's own (sdpa), which "
                f"rows of different length need; {ANOTHER}",
            ) from error
        raise refused(
            model, f"its config.json makes no model ({words(error)}); copy it again from the original"
        ) from error
    return made


def check_class(shape: PreTrainedModel, settings: PretrainedConfig, model: str | Path) -> None:
    """Raises ConfigError where `config.json` names another class than the causal language model that would be made.

    Such a folder is a classifier, a reward model, an embedding model, or has code of its own.
    """
    stated: Any = settings.architectures or []  # as config.json has it
    wanted, made = stated if isinstance(stated, list) else [stated], type(shape).__name__
    if shape.base_model is shape:
        raise refused(model, f"({made}) its class has no base model below its output layer; {ANOTHER}")
    if wanted and made.lower() not in [str(name).lower() for name in wanted]:
        own = getattr(settings, "auto_map", None)
        why = "which is code of its own folder and never run" if own else "which has no output layer for the next token"
        raise refused(model, f"its config.json names the architecture {named(wanted)}, {why}; expected {made}")


def own_code(settings: PretrainedConfig, shape: PreTrainedModel) -> list[str]:
    """Returns a warning for a model that brings code of its own where transformers has the same architecture."""
    if not isinstance(getattr(settings, "auto_map", None), dict):
        return []
    return [
        f"the model names code of its own (auto_map), which is never run; transformers' {type(shape).__name__} is used"
    ]


def check_tokenizer(folder: Path, *, cached: bool = False) -> None:
    """Raises ConfigError for a folder whose tokenizer is missing, damaged or code of its own.

    Of a `cached` snapshot only what is there is checked: the rest may still have to be downloaded.
    """
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    file = folder / "tokenizer_config.json"
    settings: dict[str, Any] = read_json(file, folder) if file.exists() else {}
    own, name = settings.get("auto_map"), settings.get("tokenizer_class")
    if own and (not isinstance(name, str) or tokenizer_class_from_name(name) is None):
        raise refused(
            folder,
            f"its tokenizer ({name}) is code of its own folder (auto_map in tokenizer_config.json), which is never "
            "run; give a model with a tokenizer.json of a class that transformers has",
        )
    template = settings.get("chat_template")
    if not isinstance(template, str | list | None):
        raise refused(folder, f"its tokenizer_config.json has the chat_template {template!r:.40}, expected a text")
    if not cached:
        check_tokenizer_files(folder)


# --- the weights -------------------------------------------------------------------------------------------------


def check_weights(tensors: dict[str, StoredTensor], shape: PreTrainedModel, model: str | Path) -> None:
    """Raises ConfigError where a checkpoint's names and shapes are not those of the model's configuration.

    `shape` is the empty model. Transformers decides, on tensors without memory, what would reach which parameter.
    """
    empty = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    try:
        with quiet_loading():
            loaded: Any = type(shape).from_pretrained(
                None,
                config=copy.deepcopy(shape.config),
                state_dict=empty,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                device_map={"": "meta"},
                trust_remote_code=False,
            )
    except Exception as error:  # conversions, as of experts to one tensor, meet shapes that they were not made for
        absent = _gaps(tensors)
        why = (
            f"{len(absent):,} missing ({named(absent)})" if absent else f"they cannot be put together ({words(error)})"
        )
        raise refused(model, f"its weights do not fit its config.json: {why}. {_advice([], [])}") from error
    check_loading(loaded[1], model)


def check_ties(tensors: dict[str, StoredTensor], shape: PreTrainedModel, folder: Path) -> None:
    """Raises ConfigError where weights that the configuration ties are stored twice, with different values.

    Transformers would then leave them untied, against the model's own configuration. A few rows are compared.
    """
    embedding = shape.get_input_embeddings().weight
    tied = [name for name, part in shape.named_parameters(remove_duplicate=False) if part is embedding]
    both = [name for name in tied if name in tensors and tensors[name].file.endswith(".safetensors")]
    if len(both) < 2:
        return
    rows = torch.linspace(0, tensors[both[0]].shape[0] - 1, COMPARED_ROWS).long().tolist()
    parts = []
    for name in both:
        with safe_open(folder / tensors[name].file, framework="pt") as file:
            stored = file.get_slice(name)
            parts.append([stored[row : row + 1].float() for row in rows])
    if any(not torch.equal(one, two) for one, two in zip(*parts[:2], strict=True)):
        raise refused(
            folder,
            f"its config.json ties {' and '.join(both)}, but they are stored with different values; set "
            "tie_word_embeddings to false in its config.json, if both were trained",
        )


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keeps transformers' table of a load back, since :func:`check_loading` says the same in one line."""
    from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity

    before = get_verbosity()
    set_verbosity(logging.CRITICAL)
    disable_progress_bar()  # every actor would draw its own
    try:
        yield
    finally:
        set_verbosity(before)


def _gaps(names: Iterable[str]) -> list[str]:
    """Returns the names that a checkpoint lacks among those that differ in their numbers alone (layers, experts)."""
    numbers: dict[str, set[tuple[str, ...]]] = {}
    for name in names:
        numbers.setdefault(re.sub(r"\b\d+\b", "{}", name), set()).add(tuple(re.findall(r"\b\d+\b", name)))
    return [
        pattern.format(*one)
        for pattern, present in numbers.items()
        for one in itertools.product(*(sorted(set(values), key=int) for values in zip(*present, strict=True)))
        if one not in present
    ]


def check_loading(found: dict[str, Any], model: str | Path) -> None:
    """Raises ConfigError for what transformers reports of a load (`output_loading_info`) that is not a perfect fit."""
    missing = sorted(found["missing_keys"])
    unexpected = sorted(name for name in found["unexpected_keys"] if not name.endswith(CONSTANTS))
    reshaped = sorted(found["mismatched_keys"])
    faults = []
    if missing:
        faults.append(f"{len(missing):,} missing ({named(missing)})")
    if unexpected:
        faults.append(f"{len(unexpected):,} unexpected ({named(unexpected)})")
    if reshaped:
        shapes = [f"{name} {list(had)} instead of {list(wanted)}" for name, had, wanted in reshaped]
        faults.append(f"{len(reshaped):,} of another shape ({named(shapes)})")
    if errors := found["error_msgs"]:
        faults.append(words(errors[0]))
    if faults:
        raise refused(
            model, f"its weights do not fit its config.json: {'; '.join(faults)}. {_advice(missing, unexpected)}"
        )


def _advice(missing: list[str], unexpected: list[str]) -> str:
    prefix = next((name.removesuffix(end) for name in unexpected for end in missing if name.endswith(f".{end}")), None)
    if prefix:
        wrapped = {"_orig_mod.": " (torch.compile's)", "module.": " (DistributedDataParallel's)"}.get(prefix, "")
        return f"Its names carry the prefix {prefix}{wrapped}; save the model without it"
    if missing == ["lm_head.weight"] and not unexpected:
        return "If its output layer is the embeddings, set tie_word_embeddings to true in its config.json"
    if any(".lora_" in name or ".base_layer." in name or name.startswith("base_model.") for name in unexpected):
        return "They are an adapter's; merge it into its base model first (`merge_and_unload`)"
    return "Give the config.json that belongs to these weights, or download both again"


def _tensors_on_hub(model: str, cached: Path | None) -> dict[str, StoredTensor] | None:
    """Returns the headers of a hub model's safetensors files, without their weights; None: it has others.

    Raises ConfigError where the hub cannot be reached: the folder `cached` has no weights. None: nor has it settings.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HFValidationError, NotASafetensorsRepoError

    try:
        found = get_safetensors_metadata(model)
    except (HFValidationError, NotASafetensorsRepoError):
        return None  # what is loaded later is checked again then
    except network_errors() as error:
        place = "the cache" if cached is None else f"the cache ({cached})"
        raise refused(
            model,
            f"{place} has its settings and no weights, and the hub cannot be asked for them ({words(error)}); download "
            f"the model where there is a network (`hf download {model}`), or give its folder",
        ) from error
    return {
        name: StoredTensor(tuple(tensor.shape), str(tensor.dtype), file)
        for file, content in found.files_metadata.items()
        for name, tensor in content.tensors.items()
    }

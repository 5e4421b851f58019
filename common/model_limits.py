"""What engines and learner can compute of a model, decided from its configuration: refusals, windows, and the
architectures whose results were compared with Hugging Face's own forward pass.

Engines attend to everything before a token and take the output layer's logits as they are (METHOD §2, §3). A model that
does otherwise would be sampled as another policy than its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

COMPARED = {
    "llama": "Llama 1-3, rotary positions also `llama3`, `linear` and `yarn`, SmolLM2, TinyLlama, Yi",
    "qwen2": "Qwen2 and Qwen2.5, R1 distillations",
    "qwen3": "Qwen3",
    "gpt2": "GPT-2",
    "mistral": "Mistral",
    "gemma": "Gemma 1",
    "phi3": "Phi-3, Phi-4, Phi-4-mini",
    "olmo2": "OLMo 2",
    "smollm3": "SmolLM3",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-MoE",
    "qwen3_moe": "Qwen3-MoE",
    "mixtral": "Mixtral",
    "phi": "Phi-1, Phi-1.5, Phi-2",
    "stablelm": "StableLM",
    "gpt_neox": "GPT-NeoX, Pythia",
    "opt": "OPT",
    "falcon": "Falcon with rotary positions",
    "glm4": "GLM-4",
    "starcoder2": "StarCoder2",
    "granite": "Granite whose `logits_scaling` is 1",
    "granitemoe": "Granite MoE whose `logits_scaling` is 1",
    "olmo": "OLMo 1",
    "olmoe": "OLMoE",
    "nemotron": "Nemotron-4, Minitron",
    "seed_oss": "Seed-OSS",
    "ernie4_5": "ERNIE 4.5, dense",
    "hunyuan_v1_dense": "Hunyuan, dense",
    "glm": "GLM-4-9B of 2024",
    "glm4_moe": "GLM-4.5, GLM-4.6",
    "phimoe": "Phi-3.5-MoE",
    "helium": "Helium",
    "arcee": "AFM",
    "apertus": "Apertus",
    "persimmon": "Persimmon",
    "gpt_bigcode": "SantaCoder, StarCoder 1",
    "exaone4": "EXAONE 4, within its window",
    "gemma3_text": "Gemma 3 of text alone, within its window",
    "olmo3": "OLMo 3, within its window",
}
"""`model_type` of the architectures that `tests/contracts/test_architectures.py` compares, and what it covers."""

LOGIT_SCALES = (
    "logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier", "logits_mup_width_multiplier",
)  # fmt: skip
LOGIT_CAPS = ("final_logit_softcapping", "attn_logit_softcapping", "attention_logit_cap", "logit_cap")
WHOLE_MODEL_WINDOWS = (
    "mistral", "mixtral", "starcoder2", "phi3", "phimoe", "minimax", "qwen3_moe", "doge", "ministral3",
)  # fmt: skip
"""Architectures whose layers all have `sliding_window`, whatever `layer_types` or `use_sliding_window` say."""
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
ALIBI = ("bloom", "mpt")
ANOTHER = "use a model of the Llama, Qwen2, Qwen3 or GPT-2 kind, or another of docs/models.md"


@dataclass(frozen=True, slots=True)
class Window:
    """The number of steps, prompt and response together, up to which a model attends to everything before a token."""

    steps: int
    why: str  # as `its sliding_window is 4,096`


def refusal(settings: PretrainedConfig) -> str | None:
    """Returns why engines and learner cannot compute this model as its own code does, and what to do; None: they can.

    A window is no refusal (:func:`window_of`).
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING as ENCODERS

    kind = settings.model_type
    if getattr(settings, "is_encoder_decoder", False):
        return f"it is an encoder-decoder ({kind}), and responses continue a prompt; give a causal language model"
    if settings.get_text_config() is not settings or any(
        getattr(settings, key, None) is not None for key in ("vision_config", "audio_config")
    ):
        return f"it is a multimodal model ({kind}), of which only text models can be used; give its language model"
    if getattr(settings, "use_bidirectional_attention", None) or getattr(settings, "is_causal", None) not in (
        None,
        True,
    ):
        return f"its attention ({kind}) looks ahead, so it cannot continue a text; give a causal language model"
    if kind == "xlnet" or (getattr(settings, "is_decoder", True) is False and type(settings) in ENCODERS):
        return f"it is an encoder ({kind}), which looks ahead and cannot continue a text; give a causal language model"
    if alibi := _alibi(settings):
        return f"its positions are alibi ({alibi}), which the engine's rows of different length do not have; {ANOTHER}"
    for key in (*LOGIT_SCALES, *LOGIT_CAPS):
        if not isinstance(value := getattr(settings, key, None), int | float | None):
            return f"its config.json ({kind}) has {key} {value!r}, expected a number; copy it again from the original"
    for key in LOGIT_CAPS:
        if getattr(settings, key, None):
            return (
                f"its config.json ({kind}) has {key} {getattr(settings, key):g}, and engine and learner neither cap "
                f"nor scale logits; {ANOTHER}"
            )
    for key in LOGIT_SCALES:
        if (scale := getattr(settings, key, None)) is not None and scale != 1:
            return (
                f"its config.json ({kind}) has {key} {scale:g}, and engine and learner neither cap nor scale logits; "
                f"{ANOTHER}"
            )
    if others := sorted(set(layer_kinds(settings)) - ATTENTION):
        return f"some layers of this {kind} are no attention over all that came before ({', '.join(others)}); {ANOTHER}"
    if getattr(settings, "kv_lora_rank", None):
        return f"its attention ({kind}) keeps compressed keys and values (kv_lora_rank), not whole ones; {ANOTHER}"
    return None


def _alibi(settings: PretrainedConfig) -> str | None:
    """Returns how a model states alibi; None if it has other positions."""
    if settings.model_type in ALIBI:
        inner = getattr(settings, "attn_config", None)
        return settings.model_type if inner is None or getattr(inner, "alibi", True) else None
    for key, value in (("alibi", True), ("position_embedding_type", "alibi"), ("use_alibi", True)):
        if getattr(settings, key, None) == value:
            return f"{key} in its config.json"
    return None


def layer_kinds(settings: PretrainedConfig) -> list[str]:
    """Returns the kind of each layer's attention as transformers names it; empty where a model has one kind."""
    kinds: Any = getattr(settings, "layer_types", None) or getattr(settings, "layers_block_type", None) or []
    names = {"attention": "full_attention"}
    return [names.get(str(kind), str(kind)) for kind in kinds]


def window_of(settings: PretrainedConfig) -> Window | None:
    """Returns the smallest window of a model's layers; None: every layer attends to everything.

    The engine decodes with full attention, so it computes the model's own policy as long as prompt and response
    together are no longer than this.
    """
    found: list[Window] = []
    kinds = layer_kinds(settings)
    whole = settings.model_type in WHOLE_MODEL_WINDOWS
    masks = {
        "sliding_window": whole or "sliding_attention" in kinds,
        "attention_chunk_size": "chunked_attention" in kinds,
        "window_size": "local" in (getattr(settings, "attention_layers", None) or ()),  # GPT-Neo
    }
    unknown = not kinds and getattr(settings, "use_sliding_window", True) is not False
    for key, applies in masks.items():
        size = getattr(settings, key, None)
        guessed = unknown and key != "window_size" and type(size) is int and size > 0
        # a mask of 0 or less leaves nothing to attend to; where none is made (Llama), it only says that there is none
        if isinstance(size, int) and (applies or guessed):
            found.append(Window(size, f"{key} in its config.json is {size:,}"))
    rotary = getattr(settings, "rope_parameters", None) or {}
    # these compute positions from the longest sequence of a batch, so a longer one would change its neighbours
    if rotary.get("rope_type") == "longrope":
        size = rotary.get("original_max_position_embeddings") or settings.max_position_embeddings
        found.append(Window(int(size), f"its rotary positions (longrope) are others beyond {size:,}"))
    return min(found, key=lambda window: window.steps, default=None)


def longest_exact(settings: PretrainedConfig, positions: int | None = None) -> int | None:
    """Returns how long prompt and response may be together: the model's positions, or its window if that is shorter.

    `positions` is their number where a run has raised it; None: the model's own. Returns None without any limit.
    """
    window = window_of(settings)
    limits = [positions or getattr(settings, "max_position_embeddings", None), window.steps if window else None]
    return min((limit for limit in limits if limit is not None), default=None)


def not_compared(settings: PretrainedConfig) -> str | None:
    """Returns the warning for an architecture whose results were never compared; None for one of :data:`COMPARED`."""
    if settings.model_type in COMPARED:
        return None
    return (
        f"the architecture {settings.model_type} was never compared with Hugging Face's own forward pass "
        "(docs/models.md lists those that were); look at the self-test of a short run first"
    )

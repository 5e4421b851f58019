"""Functions that make, load and save the policy and its tokenizer (Hugging Face format, safetensors)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.utils import logging as transformers_logging

from latent_grpo.common.config import ConfigError, NewModelConfig
from latent_grpo.common.head import float32_logits, install_float32_head
from latent_grpo.common.hub import check_folder, hub_errors
from latent_grpo.common.model_check import check_loading, check_model, check_tokenizer, quiet_loading, read_settings
from latent_grpo.common.model_files import refused, words
from latent_grpo.common.model_limits import ANOTHER, LOGIT_CAPS, LOGIT_SCALES
from latent_grpo.common.tasks.arithmetic import make_arithmetic_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
transformers_logging.disable_progress_bar()  # every actor would draw its own
CHECKED_TOKENS = 4
LOGIT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative to the largest; tested ones are bit-equal
EXTRAPOLATING = ("default", "linear", "llama3")  # rotary positions that do not depend on how many there are
USABLE = f"U{ANOTHER[1:]}, that neither scales nor caps its logits"
GENERAL_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
BPE_SPECIAL_TOKENS = ("<pad>", "<eos>", "<think>", "</think>")
BPE_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<think>{% endif %}"
)


def make_model(config: NewModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Makes a causal LM with random float32 weights, a function of `seed`, and the tokenizer's vocabulary."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if config.hidden_size % config.num_heads:
        raise ConfigError(
            f"model.new.hidden_size ({config.hidden_size}) is not divisible by num_heads ({config.num_heads})"
        )
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if config.architecture == "gpt2":
        sizes: dict[str, Any] = {
            "n_embd": config.hidden_size,
            "n_inner": config.intermediate_size,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_positions": config.max_positions,
            # the learner replays the engine's samples, and dropout would make the two differ
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    else:
        sizes = {
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_heads,
            "head_dim": config.hidden_size // config.num_heads,
            "max_position_embeddings": config.max_positions,
        }
    if config.architecture == "qwen2":
        sizes.pop("head_dim")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config.architecture, **shared, **sizes), dtype=torch.float32, trust_remote_code=False
        )
    return model.eval()


def make_tokenizer(config: NewModelConfig, texts: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """Makes the tokenizer of a new model: the arithmetic one, a byte-level BPE trained on `texts`, or another model's.

    Raises ConfigError for a folder or hub id without a tokenizer, and for a vocabulary that is too small for bytes.
    """
    if config.tokenizer == "arithmetic":
        return make_arithmetic_tokenizer()
    if (path := config.tokenizer_path) is not None:
        try:
            return load_tokenizer(path)
        except ConfigError as error:
            raise ConfigError(str(error).replace("model", "model.new.tokenizer", 1)) from error
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + len(BPE_SPECIAL_TOKENS)
    if config.vocab_size < least:
        raise ConfigError(f"model.new.vocab_size must be at least {least} for a bpe tokenizer, got {config.vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    # single digits, so that frequent numbers of the training text do not become tokens
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(BPE_SPECIAL_TOKENS),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=BPE_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def load_model(path: str | Path, dtype: str = "float32", max_positions: int | None = None) -> PreTrainedModel:
    """Loads a causal LM from a folder or the hub, in `dtype` (`float32`, `bfloat16`), in evaluation mode (no dropout).

    Its logits are float32 in either (`common.head`). `max_positions` raises the number of positions
    (:func:`extend_positions`). Raises ConfigError where the files are not those of a model that can be used
    (`common.model_check`), and if the logits are not those that engine and learner compute (:func:`check_logits`).
    """
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise ConfigError(f"model.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    check_model(path, tokenizer=False)
    with hub_errors(path), quiet_loading():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES[dtype],
            attn_implementation="sdpa",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    model: PreTrainedModel = loaded[0]
    check_loading(loaded[1], path)
    model.eval()
    check_logits(model, str(path))
    extend_positions(model.config, max_positions)
    return model


@torch.no_grad()
def check_logits(model: PreTrainedModel, name: str) -> None:
    """Raises ConfigError if the model's own logits are not its output layer applied to its base model's hidden states.

    The output layer is made to give float32 logits first (`common.head`).

    Engine and learner compute the latter, and agree with each other, so no self-test would see the difference. The
    check takes two passes over a few tokens, on whole weights, before ZeRO-3 shards them.
    """
    architecture = type(model).__name__
    if model.get_output_embeddings() is None:
        raise ConfigError(f"model {name} ({architecture}) has no output layer; {USABLE}")
    embed, head = model.get_input_embeddings(), install_float32_head(model)
    rows = embed.get_parameter("weight").shape[0]
    spread = torch.arange(1, rows, max(rows // (CHECKED_TOKENS + 2), 1)).tolist()  # padding would cause a warning
    ids = torch.tensor([[i for i in spread if i != model.config.pad_token_id][:CHECKED_TOKENS]])
    own = model(input_ids=ids, use_cache=False).logits.float()
    hidden = model.base_model(inputs_embeds=embed(ids), use_cache=False).last_hidden_state
    computed = float32_logits(head, hidden)
    if not own.isfinite().all() or not hidden.any():  # an output layer alone may begin with zeros, and is trained
        what = "hidden states are all zero" if own.isfinite().all() else "logits are not finite"
        raise ConfigError(f"model {name} ({architecture}): its {what}, so its weights are damaged")
    gap, largest = float((own - computed).abs().max()), float(computed.abs().max())
    allowed = LOGIT_TOLERANCE[model.dtype]
    if not gap <= allowed * largest:
        found = [
            f"{key}={value}"
            for key in (*LOGIT_SCALES, *LOGIT_CAPS)
            if (value := getattr(model.config, key, None)) is not None
        ]
        named = f" (its configuration: {', '.join(found)})" if found else ""
        raise ConfigError(
            f"model {name} ({architecture}) changes the logits of its output layer{named}, by up to {gap:.2g} where "
            f"they are up to {largest:.2g} (allowed: {allowed:g} of the largest). Engine and learner use the output "
            f"layer's logits unchanged, and would sample and train another policy. {USABLE}"
        )


def output_facts(path: str | Path) -> tuple[int, tuple[int, ...]]:
    """Returns the rows of the model's output and the ids that end a text by its configuration; reads no weights."""
    from transformers import GenerationConfig

    config = read_settings(path)
    try:
        ends = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # a model without generation_config.json
        ends = config.eos_token_id
    except (TypeError, ValueError) as error:
        raise refused(path, f"its generation_config.json cannot be used ({words(error)}); copy it again") from error
    if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends]) if end is not None):
        raise refused(path, f"its configuration ends a text with {ends!r}, expected the id of a token, or several")
    return config.vocab_size, tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)


def position_limit(path: str | Path) -> int | None:
    """Returns the model's own number of positions, or None if its configuration has none; reads no weights."""
    return getattr(read_settings(path), "max_position_embeddings", None)


def extended_limit(path: str | Path, wanted: int | None) -> int | None:
    """Returns the number of positions of a run on the model (:func:`extend_positions`); reads no weights."""
    return extend_positions(read_settings(path), wanted)


def stored_dtype(path: str | Path) -> Literal["float32", "bfloat16"]:
    """Returns the data type that a model is loaded in where nothing else is asked for; reads no weights.

    It is bfloat16 for weights that are stored so, and float32 for all others, which hold them exactly.
    """
    return "bfloat16" if read_settings(path).dtype in (torch.bfloat16, "bfloat16") else "float32"


def extend_positions(settings: PretrainedConfig, wanted: int | None) -> int | None:
    """Raises the number of positions in a model's `settings` to `wanted` (`model.max_positions`), and returns it.

    The model's own number, or None, changes nothing. Rotary positions are a function of the position alone, so a
    model reads positions beyond those of its training, at what quality it may. Raises ConfigError for a smaller number,
    which nothing would keep to, for a model with learned positions, which has no others, and for rotary ones that are
    computed from their number, where the same weights would be another model.
    """
    own: int | None = getattr(settings, "max_position_embeddings", None)
    if wanted is None or own is None or wanted == own:
        return own
    if wanted < own:
        raise ConfigError(
            f"model.max_positions ({wanted:,}) is below the {own:,} positions of this {settings.model_type} model, and "
            "only a larger number has an effect; set it to null, and limit lengths by the tasks' max_response_tokens"
        )
    rotary = getattr(settings, "rope_parameters", None)
    kind = rotary.get("rope_type") if rotary else None
    if kind not in EXTRAPOLATING:
        why = f"its rotary positions ({kind}) depend on their number" if kind else "its positions are learned"
        raise ConfigError(
            f"model.max_positions ({wanted:,}) exceeds the {own:,} positions of this {settings.model_type} model, and "
            f"{why}; leave model.max_positions out, and lower the tasks' budgets"
        )
    settings.max_position_embeddings = wanted
    return wanted


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model folder or hub id. Raises ConfigError if there is none of that name."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    check_folder(path)
    if Path(path).is_dir():
        check_tokenizer(Path(path))
    # For some architectures (qwen2) AutoTokenizer puts the family's tokenizer on another one's vocabulary, and its
    # normaliser and decoder change the text; a folder that names the general class means its file as it is.
    settings = Path(path) / "tokenizer_config.json"
    named = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class") if settings.is_file() else None
    general = named in GENERAL_TOKENIZERS and (Path(path) / "tokenizer.json").is_file()
    try:
        with hub_errors(path):
            return (PreTrainedTokenizerFast if general else AutoTokenizer).from_pretrained(
                path, trust_remote_code=False
            )
    except ConfigError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot read
        raise refused(path, f"its tokenizer cannot be read ({words(error)}); copy its files again") from error


def save_model(folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes a folder that :func:`load_model`, :func:`load_tokenizer` and any Hugging Face tool can read."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # where `accelerate` is installed, save_pretrained imports DeepSpeed, which says which accelerator it found
    deepspeed_log = logging.getLogger("DeepSpeed")
    deepspeed_log.addFilter(_says_more_than_the_accelerator)
    try:
        model.save_pretrained(folder)
    finally:
        deepspeed_log.removeFilter(_says_more_than_the_accelerator)
    tokenizer.save_pretrained(folder)


def _says_more_than_the_accelerator(record: logging.LogRecord) -> bool:
    return "Setting accelerator to" not in record.getMessage()

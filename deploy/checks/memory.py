"""An estimate of memory: what a learner rank holds of the model and what a micro-batch adds, and a rollout worker.

    weights, gradients, optimizer states   by ZeRO stage and ranks; with LoRA those of the factors alone
  + the initial model                      with a KL term
  + the encoder                            in Latent-SFT with induced labels
  + a copy of the state                    while a checkpoint is written beside the steps
  + the larger of
      a micro-batch's                      activations saved for the backward pass, float32 logits of one chunk, the
                                           gradient of a trained output layer, DeepSpeed's bucket of gradients, and with
                                           ZeRO-3 weights that are gathered
      the optimizer's step                 with ZeRO-1 and 2 the gradients in a row

It needs the model's shape alone. How close it comes is measured by `bench memory` (docs/measured.md); it tells a run
that fits from one that does not.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_grpo.common.config import ConfigError, LearnerConfig, LoRAConfig, RunConfig
from latent_grpo.common.model_check import empty_model, read_settings
from latent_grpo.common.models import make_model
from latent_grpo.deploy.run.object_store import held_versions
from latent_grpo.learner.logprobs import calls_size, chunk_size
from latent_grpo.learner.policy import transformer_layers
from latent_grpo.learner.zero_engine import LIVE_PARAMETERS, communication

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GIB = 2**30
MIB = 2**20
BYTES = {"float32": 4, "bfloat16": 2}
SAVED_WIDTHS = {"float32": 10, "bfloat16": 13}  # values of width D that a layer saves for a token; norms are float32
SFT_COPIES = 3  # of a chunk's logits in Latent-SFT: their log_softmax, its gradient, and that of the logits
SAVED_MLP_WIDTHS = 4  # of the MLP's width: gate, its activation, up, their product
AWAY = {
    "none": (),
    "optimizer": ("optimizer", "gradients"),
    "parameters": ("optimizer", "gradients", "parameters", "reference"),
}  # what each `learner.offload` keeps in the machine's memory
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2.5-Math-7B": (
        "qwen2",
        {
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        },
    ),
    "Llama3.2-1B": (
        "llama",
        {
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
    ),
}
"""The paper's models: architecture and sizes as their `config.json` has them, for a checkpoint that is not here."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a causal LM that decide its memory."""

    parameters: int
    largest: int  # values of the largest single parameter
    embeddings: int  # values of the input embeddings
    tied: bool  # whether the output layer shares them
    layers: int
    width: int
    mlp_width: int
    rows: int  # of the vocabulary
    linear: Mapping[str, int]  # inputs and outputs of the layers' linear layers, by name, over all layers together
    kept: int  # values of keys and values that an engine keeps of one token

    @classmethod
    def of(cls, config: RunConfig, source: str | Path | None, tokenizer: PreTrainedTokenizerBase) -> ModelShape:
        """The shape of the run's model, which is read from its configuration; no weights are made or read.

        `source`: the model's folder; None: a `model.new` that is still to be made.
        """
        import torch

        if source is not None:
            return cls.of_model(empty_model(read_settings(source), source))
        if config.model.new is None:
            raise ConfigError("model: one of `path` and `new` must be given")
        with torch.device("meta"):
            return cls.of_model(make_model(config.model.new, tokenizer, seed=0))

    @classmethod
    def published(cls, path: str) -> tuple[str, ModelShape] | None:
        """The name and the shape of the paper's model whose checkpoint `path` (a hub id) names; None: it names none."""
        from transformers import AutoConfig

        plain = _plain(Path(path).name)
        name = next((name for name in PUBLISHED if plain.startswith(_plain(name))), None)
        if name is None:
            return None
        architecture, sizes = PUBLISHED[name]
        return name, cls.of_model(empty_model(AutoConfig.for_model(architecture, **sizes), name))

    @classmethod
    def of_model(cls, model: Any) -> ModelShape:
        """The shape of a causal LM; its parameters may lie on the device `meta`."""
        embedding, settings = model.get_input_embeddings().weight, model.config.get_text_config()
        linear: dict[str, int] = defaultdict(int)
        for layer in transformer_layers(model):
            for name, parameter in layer.named_parameters():
                if parameter.dim() == 2:
                    linear[name.split(".")[-2]] += sum(parameter.shape)
        heads = settings.num_attention_heads
        head_width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
        key_heads = getattr(settings, "num_key_value_heads", None) or heads
        return cls(
            parameters=model.num_parameters(),
            largest=max(parameter.numel() for parameter in model.parameters()),
            embeddings=embedding.numel(),
            tied=model.get_output_embeddings().weight is embedding,
            layers=settings.num_hidden_layers,
            width=settings.hidden_size,
            mlp_width=getattr(settings, "intermediate_size", None) or 4 * settings.hidden_size,
            rows=embedding.shape[0],
            linear=dict(linear),
            kept=2 * settings.num_hidden_layers * key_heads * head_width,
        )

    def trained(self, layers: int | None, *, frozen_embeddings: bool) -> int:
        """Parameters that are trained: with `layers`, only those of the uppermost layers and of an untied head."""
        head = 0 if self.tied else self.embeddings
        if layers is None:
            return self.parameters - (self.embeddings if frozen_embeddings else 0)
        of_layers = self.parameters - self.embeddings - head
        return of_layers * min(layers, self.layers) // self.layers + head

    def trains_output(self, layers: int | None, *, frozen_embeddings: bool) -> bool:
        """Whether the output layer is trained, which with `layers` a tied one is not."""
        return not self.tied or (layers is None and not frozen_embeddings)

    def factors(self, lora: LoRAConfig, layers: int | None) -> int:
        """Parameters of LoRA's factors, which are all that is then trained; with `layers`, of so many layers."""
        widths = sum(size for name, size in self.linear.items() if lora.targets is None or name in lora.targets)
        return lora.rank * widths * min(layers or self.layers, self.layers) // self.layers

    def saved_bytes(self, dtype: str, *, checkpointing: bool | int, layers: int | None = None) -> int:
        """Bytes that one token's forward pass saves for the backward pass, in all trained layers together.

        `checkpointing`: those of all trained layers, or of so many of the lowest, are computed again, one layer at a
        time and after the others have been used.
        """
        size, count = 4 if dtype == "float32" else 2, min(layers or self.layers, self.layers)
        layer = size * (SAVED_MLP_WIDTHS * self.mlp_width + SAVED_WIDTHS[dtype] * self.width)
        again = count if checkpointing is True else min(checkpointing, count)
        kept = (count - again) * layer
        return again * size * self.width + max(kept, layer) if again else kept


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of a learner rank, estimated."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    output_gradient: int = 0  # of the output layer's weights, while it is computed
    bucket: int = 0  # of gradients that ranks exchange at once, which DeepSpeed allocates whole
    gathered: int = 0  # weights of other ranks, with ZeRO-3
    update: int = 0  # what the optimizer's step takes, when a micro-batch's memory is free again
    reference: int = 0  # the initial model, for the KL term
    encoder: int = 0  # which induces the labels of Latent-SFT
    checkpoint: int = 0  # a copy of the trained parameters' state, while it is written beside the steps
    host: int = 0  # of the machine's memory instead of the GPU's (learner.offload, checkpoint.background)

    @property
    def states(self) -> int:
        """Weights, gradients and optimizer state, in bytes."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        batch = self.activations + self.logits + self.output_gradient + self.bucket + self.gathered
        return self.states + max(batch, self.update) + self.reference + self.encoder + self.checkpoint

    def __str__(self) -> str:
        parts = {
            "weights": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "initial model (kl_coefficient)": self.reference,
            "encoder (warm_start.source)": self.encoder,
            "copy of the state (checkpoint.background)": self.checkpoint,
            "output layer's gradient": self.output_gradient,
            "bucket (learner.bucket_elements)": self.bucket,
            "gathered weights (ZeRO-3)": self.gathered,
            "logits": self.logits,
        }
        offloaded = f"; {size(self.host)} of the machine's memory besides" if self.host else ""
        return in_parts(self.total, parts) + offloaded


def in_parts(total: int, parts: dict[str, int]) -> str:
    """Says what a total of bytes is made of, in its unit (:func:`size`); parts that round to nothing are left out."""
    unit, _, digits = _unit(total)
    said = {what: f"{part / unit:,.{digits}f}" for what, part in parts.items()}
    shown = [f"{number} {what}" for what, number in said.items() if float(number.replace(",", ""))]
    return f"about {size(total)}: {', '.join(shown) or 'nothing that counts'}"


def size(number: int) -> str:
    """Says a number of bytes in GiB, or in MiB below one."""
    unit, name, digits = _unit(number)
    return f"{number / unit:,.{digits}f} {name}"


def _unit(number: int) -> tuple[int, str, int]:
    return (GIB, "GiB", 1) if number >= GIB else (MIB, "MiB", 0)


def rank_memory(
    config: RunConfig,
    shape: ModelShape,
    tokens: int,
    *,
    frozen_embeddings: bool,
    longest: int = 0,
    lora: LoRAConfig | None = None,
    reference: bool = False,
    latent_sft: bool = False,
) -> RankMemory:
    """Estimates the memory of each learner rank.

    `tokens` is the size of a step on one rank, `longest` that of its longest row, which is never split;
    `frozen_embeddings` says whether the input embeddings are left as they are. With `lora` only its factors are
    trained. `reference`: the rank holds the initial model besides, with ZeRO-3 its share of it. `latent_sft`: it is a
    rank of Latent-SFT, which writes no checkpoint beside its steps and holds a whole encoder with induced labels.
    """
    learner, dtype, layers = config.learner, config.model.dtype, config.model.train_layers
    own, on_gpus = BYTES[dtype], learner.resources.num_gpus > 0
    if lora is None:
        trained, held = shape.trained(layers, frozen_embeddings=frozen_embeddings), shape.parameters
    else:
        trained = shape.factors(lora, layers)
        held = shape.parameters + trained
    parts = _shares(learner, {"parameters": own * held, "gradients": 4 * trained, "optimizer": 12 * trained})
    if learner.zero_stage == 0:
        parts["optimizer"] = 8 * trained  # the weights themselves are the master weights
    share = learner.ranks if learner.zero_stage == 3 else 1
    parts["reference"] = own * shape.parameters // share if reference else 0
    copied = config.checkpoint.background and not latent_sft
    parts["checkpoint"] = 12 * trained // learner.ranks if copied else 0
    away = (*AWAY[learner.offload], "checkpoint") if on_gpus else ()
    host = sum(parts[name] for name in away)
    at_once = min(max(learner.tokens_per_microbatch, longest), tokens)
    trains_output = lora is None and shape.trains_output(layers, frozen_embeddings=frozen_embeddings)
    logits, output_gradient = _output_layer(learner, shape, dtype, at_once, trained=trains_output, sft=latent_sft)
    whole = max(min(LIVE_PARAMETERS, shape.parameters), shape.largest)  # a single one is gathered whatever the limit
    return RankMemory(
        **parts | dict.fromkeys(away, 0),
        activations=at_once * shape.saved_bytes(dtype, checkpointing=learner.gradient_checkpointing, layers=layers),
        logits=logits,
        output_gradient=output_gradient,
        bucket=_bucket_bytes(learner, dtype, on_gpus),
        gathered=own * whole if learner.zero_stage == 3 and learner.ranks > 1 else 0,
        update=4 * trained // learner.ranks if learner.zero_stage in (1, 2) else 0,
        encoder=4 * shape.parameters if latent_sft and config.latent_sft.source == "induced" else 0,
        host=host,
    )


def _shares(learner: LearnerConfig, whole: dict[str, int]) -> dict[str, int]:
    """Returns what a rank holds of the states, by the ZeRO stage from which each is partitioned."""
    stages = {"optimizer": 1, "gradients": 2, "parameters": 3}
    return {name: size // (learner.ranks if learner.zero_stage >= stages[name] else 1) for name, size in whole.items()}


def _output_layer(
    learner: LearnerConfig, shape: ModelShape, dtype: str, tokens: int, *, trained: bool, sft: bool
) -> tuple[int, int]:
    """Returns the bytes of logits at once, and of the gradient [V, D] of a `trained` layer.

    RL adds that gradient up in float32 and then casts it (`learner.logprobs`). In Latent-SFT autograd adds up those of
    the chunks: one is there beside a chunk's logits; once these are freed but for one copy, there are three.
    """
    positions = (calls_size if sft else chunk_size)(learner, shape.rows)
    chunk, weights = 4 * shape.rows * min(positions, tokens), shape.rows * shape.width
    if not sft:
        return chunk, (4 + (2 if dtype == "bfloat16" else 0)) * weights if trained else 0
    own = BYTES[dtype] * weights
    return SFT_COPIES * chunk, own + 2 * max(own - chunk, 0) if trained else 0


def _bucket_bytes(learner: LearnerConfig, dtype: str, on_gpus: bool) -> int:
    """Returns the bytes of what DeepSpeed allocates for gradients on their way, whatever the number of ranks.

    ZeRO-1 has them in float32, 2 and 3 in the model's dtype; 1 and 2 have a second buffer to overlap.
    """
    if learner.zero_stage == 0:
        return 0
    elements, overlap = communication(learner, on_gpus)
    buffers = 2 if overlap and learner.zero_stage < 3 else 1
    return buffers * elements * (4 if learner.zero_stage == 1 else BYTES[dtype])


@dataclass(frozen=True, slots=True)
class WorkerMemory:
    """Bytes of a rollout worker, estimated."""

    weights: int
    kept: int  # keys and values of `samples` at their longest
    samples: int
    longest: int  # tokens of a sample

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.weights + self.kept

    def __str__(self) -> str:
        kept = f"keys and values of {self.samples:,} samples of {self.longest:,} tokens"
        return in_parts(self.total, {"weights": self.weights, kept: self.kept})


def worker_memory(config: RunConfig, shape: ModelShape) -> WorkerMemory:
    """Estimates the memory of a rollout worker that decodes `rollout.max_rows` samples, all at their longest.

    vLLM takes its share of a GPU whatever it needs, and lets samples wait where their keys and values do not fit.
    """
    size = BYTES[config.model.dtype]
    longest = max(t.max_prompt_tokens + t.max_response_tokens for t in (*config.tasks, *config.evaluation.tasks))
    kept = config.rollout.max_rows * longest * shape.kept * size
    return WorkerMemory(size * shape.parameters, kept, config.rollout.max_rows, longest)


def staged_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Returns the bytes of published weights that learner rank 0 holds at most for `weights.transport: collective`.

    It copies each version that workers may ask for: to its GPU with `weights.backend: nccl`, else to its machine's
    memory. Frozen weights are copied once, though they are counted with each version. Other transports need none.
    """
    if config.weights.transport != "collective":
        return 0
    return held_versions(config) * BYTES[config.model.dtype] * shape.parameters


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c not in "-_ ")


def machine_bytes() -> int:
    """The physical memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

"""The sections about problems and the model: tasks, prompts, verifiers by name, and the policy."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from latent_grpo.common.config.section import Section

Dtype = Literal["float32", "bfloat16"]


class Columns(Section):
    """These are the column names of a problem file. verl's `prompt` and `reward_model.ground_truth`, and the raw
    columns of GPQA, are found without settings."""

    problem: str = "problem"
    """This column holds the text of the problem."""
    answer: str = "answer"
    """This column holds the gold answer, which the verifier grades against."""
    cot: str = "cot"
    """This column holds the explicit chain of thought; only Latent-SFT reads it (METHOD §7)."""


class PromptConfig(Section):
    """A problem becomes a prompt in this way (METHOD §8). The rendered prompt ends with the start-of-thinking text."""

    system: str | None = None
    """The chat begins with this system message; null: it has none."""
    user: str = "{problem}"
    """The user message is this text, with the problem in place of `{problem}`."""
    format: str | None = None
    """A plain-text prompt with `{problem}` replaces the chat template; null: the template is used."""
    think_start: str = "<think>"
    """This text is appended unless the rendered prompt already ends with it (for `grpo` too: its explicit chain is
    thinking)."""
    think_end: str = "</think>"
    """The first token id of this text under the model's tokenizer is the latent-end token (METHOD §1). A run has one
    for all tasks."""


class TaskConfig(Section):
    """A task is a source of problems. The name of a benchmark (`common/tasks/benchmarks.py`) gives other defaults for
    verifier, prompt and token budgets."""

    name: str
    """The name identifies the task; with a row's index it identifies a problem (METHOD §2.5)."""
    path: str | None = None
    """The problems come from a `.parquet`, `.jsonl` or `.csv` file, from `hf:owner/dataset[:split]`, or from a program
    that makes them: `builtin:NAME`, or your own, `python:package.module:Name` (`examples/own_task`)."""
    options: dict[str, int | float | str | bool] = Field(default_factory=dict)
    """A generated task takes these options (`common/tasks/arithmetic.py`), and `size`, its number of problems; `config`
    names the configuration of a dataset of the hub."""
    columns: Columns = Columns()
    weight: Annotated[float, Field(gt=0)] = 1.0
    """The task's share of the run's prompts is this, relative to the weights of the other tasks."""
    limit: PositiveInt | None = None
    """At most this many rows are used, the first ones; null: all."""
    max_prompt_tokens: PositiveInt = 1024
    """Problems whose prompts have more tokens than this are dropped, counted and listed in the summary."""
    max_response_tokens: PositiveInt = 1024
    """A response has at most this many steps, latent and hard together; one that needs more is an invalid sample
    (METHOD §4.1)."""
    verifier: str = "math"
    """Responses are graded by `math`, `number`, `choice`, another registered verifier, one that `verifiers` defines, or
    one given by its import path `package.module:Name`."""
    prompt: PromptConfig | None = None
    """This section replaces `model.prompt` for this task."""


class VerifierDefinition(Section):
    """A verifier gets a name that tasks can use: a plug-in with options, or a composition (docs/verifiers.md)."""

    kind: str
    """The verifier is `weighted_sum`, `format`, `length_penalty`, `gate`, any other registered name, or an import path
    `package.module:Name`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The verifier's constructor gets these arguments. An inner verifier is again a mapping with `kind` and
    `options`."""


class NewModelConfig(Section):
    """A small model with random weights is made at the start of the run (quickstart, demonstrations, tests)."""

    architecture: Literal["llama", "qwen2", "qwen3", "gpt2"] = "llama"
    """The model is a causal language model of this kind."""
    tokenizer: Literal["arithmetic", "bpe"] = "arithmetic"
    """The tokenizer has the fixed vocabulary of the generated task (`arithmetic`), or is trained on the first task's
    text (`bpe`)."""
    vocab_size: PositiveInt = 2048
    """The BPE tokenizer has at most this many tokens."""
    hidden_size: PositiveInt = 128
    """Embeddings and hidden states have this width; `num_heads` must divide it."""
    intermediate_size: PositiveInt = 384
    """The feed-forward layers have this width."""
    num_layers: PositiveInt = 2
    """The model has this many transformer layers."""
    num_heads: PositiveInt = 4
    """Each layer has this many attention heads."""
    max_positions: PositiveInt = 512
    """The model has this many positions; prompt and response of every task must fit into them."""
    tie_embeddings: bool = False
    """The output layer shares its weights with the input embeddings."""
    initializer_range: Annotated[float, Field(gt=0)] = 0.05
    """Initial weights are drawn with this standard deviation."""


class ModelConfig(Section):
    """The policy comes from exactly one of `path` and `new`."""

    path: str | None = None
    """The model is this folder or hub id of a Hugging Face causal language model with its tokenizer."""
    new: NewModelConfig | None = None
    dtype: Dtype = "float32"
    """Forward passes compute in this type; master weights and logits are always float32 (METHOD §5)."""
    prompt: PromptConfig = PromptConfig()

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.new is None):
            given = "both" if self.path else "neither"
            raise ValueError(f"model: exactly one of `path` and `new` must be given, got {given}; set model.path")
        return self

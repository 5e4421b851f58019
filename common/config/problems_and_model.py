"""The sections about problems and the model: tasks, prompts, verifiers by name, and the policy."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from latent_grpo.common.config.rules import Rule
from latent_grpo.common.config.section import AsGiven, LocalPath, Section, Share

Dtype = Literal["float32", "bfloat16"]
DATE_FORMAT = "%d %b %Y"
DEFAULT_DATE = "26 Jul 2024"  # what the templates of Llama 3.1 and 3.2 print where they are given no date
MADE_TOKENIZERS = ("arithmetic", "bpe")


LOW: dict[str, str | int] = {"verifier": "number", "max_prompt_tokens": 192, "max_response_tokens": 128}
HIGH: dict[str, str | int] = {"verifier": "math", "max_prompt_tokens": 1024, "max_response_tokens": 4096}
BENCHMARK_DEFAULTS: dict[str, dict[str, str | int]] = {
    **dict.fromkeys(("gsm8k-aug", "gsm-hard", "svamp", "multiarith"), LOW),
    **dict.fromkeys(("math500", "aime2024", "aime2025"), HIGH),
    "gpqa": HIGH | {"verifier": "choice"},
}
"""Name of a benchmark -> the defaults of its task (METHOD §8). The rest of it is in `common/tasks/benchmarks.py`."""


class Columns(AsGiven):
    """Column names of a problem file; one that is named here must be there. verl's `prompt` and
    `reward_model.ground_truth`, and the raw columns of GPQA, are found without settings."""

    problem: str = "problem"
    """Column with the text of the problem."""
    answer: str = "answer"
    """Column with the gold answer, which the verifier grades against; where it is a list of golds, any of them is
    right."""
    cot: str = "cot"
    """Column with the explicit chain of thought, which only Latent-SFT reads (METHOD §7)."""
    solution: str | None = "solution"
    """Column with the visible text after the chain, its box at the end, which Latent-SFT trains whole (METHOD §7);
    `cot_answer` of the authors' files is found without settings. The gold answer is its last box where the file has no
    answer column. null, or a file without such a column: the visible text is the boxed answer."""


class PromptConfig(AsGiven):
    """How a problem becomes a prompt (METHOD §8). The rendered prompt ends with the start-of-thinking text. Each key
    counts by itself: that of `tasks.N.prompt`, else of `model.prompt`, else of the benchmark. Rows in verl's layout
    bring whole messages, so only `tasks.N.prompt` changes them."""

    system: str | None = None
    """System message at the beginning of the chat, in place of a row's own; null: none, also where a row or a benchmark
    has one. A chat template may then print a text of its own, as Qwen2.5's does; a run's start shows the prompt."""
    user: str = "{problem}"
    """Template of the user message; `{problem}` is replaced by the problem."""
    format: str | None = None
    """Plain-text prompt with `{problem}`, used instead of the chat template; null: the chat template is used."""
    think_start: str = "<think>"
    """Start-of-thinking text, appended unless the rendered prompt already ends with it (also for `grpo`, whose explicit
    chain is thinking)."""
    think_end: str = "</think>"
    """End-of-thinking text. Its first token id under the model's tokenizer is the latent-end token (METHOD §1), of
    which a run has one for all tasks."""


class TaskConfig(Section):
    """A task is a source of problems; the name of a benchmark (`common/tasks/benchmarks.py`) gives other defaults for
    verifier, prompt and token budgets."""

    name: str
    """Name of the task. Together with a row's index it identifies a problem (METHOD §2.5)."""
    path: LocalPath | None = None
    """Source of the problems: a `.parquet`, `.arrow`, `.jsonl`, `.json`, `.csv` or `.tsv` file (text also as `.gz`,
    `.bz2` or `.zst`), a folder with the shards of one set, a glob, a folder of `save_to_disk`,
    `hf:owner/dataset[:split]`, or a program that makes them, `builtin:NAME` or your own `python:package.module:Name`
    (`examples/own_task`)."""
    options: dict[str, int | float | str | bool] = Field(default_factory=dict)
    """Options of a generated task (`common/tasks/arithmetic.py`, `common/tasks/words.py`), among them `size`, its
    number of problems. For a dataset of the hub, `config` names the dataset's configuration."""
    columns: Columns = Columns()
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the run's prompts, relative to the weights of the other tasks."""
    limit: PositiveInt | None = None
    """Maximum number of rows, of which the first ones are used; null: all rows."""
    max_dropped_share: Annotated[Share, Rule.MAY_CHANGE] = 0.1
    """Upper bound on the share of rows that are not used, because they have no problem or no answer, because the
    verifier cannot read their gold answer, or because their prompt is longer than `max_prompt_tokens`. Above it the run
    does not start, unless it is a single row; with 0 it has to have none. Latent-SFT has a bound of its own on rows
    whose chain does not fit."""
    max_prompt_tokens: PositiveInt = 1024
    """Maximum number of prompt tokens. Problems with longer prompts are dropped, counted and listed in the summary."""
    max_response_tokens: PositiveInt = 1024
    """Maximum number of response steps, latent and hard together. A sample that needs more is invalid (METHOD §4.1)."""
    verifier: str = "math"
    """Verifier that grades responses: `math`, `number`, `choice`, another registered one, one that `verifiers` defines,
    or an import path `package.module:Name`."""
    prompt: PromptConfig | None = None
    """Keys of the prompt for this task, before those of `model.prompt`."""

    @model_validator(mode="after")
    def _benchmark_defaults(self) -> Self:
        """Fills in the benchmark's values where nobody gave any, so that a run's settings have those that apply."""
        for key, value in BENCHMARK_DEFAULTS.get(self.name, {}).items():
            if key not in self.model_fields_set:
                object.__setattr__(self, key, value)
        return self


class VerifierDefinition(Section):
    """A named verifier is a plug-in with options, or a composition (docs/verifiers.md)."""

    kind: str
    """Kind of verifier: `weighted_sum`, `format`, `length_penalty`, `gate`, any other registered name, or an import
    path `package.module:Name`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the verifier's constructor. An inner verifier is again a mapping with `kind` and `options`."""


class NewModelConfig(Section):
    """A small model with random weights, made at the start of the run (quickstart, demonstrations, tests)."""

    architecture: Literal["llama", "qwen2", "qwen3", "gpt2"] = "llama"
    """Architecture of the causal language model."""
    tokenizer: LocalPath = "arithmetic"
    """Tokenizer: the fixed vocabulary of the generated task (`arithmetic`), BPE trained on the first task's text
    (`bpe`), or that of a model, given by its folder or hub id, which has a `/` in it."""
    vocab_size: PositiveInt = 2048
    """Maximum number of tokens in the vocabulary of the BPE tokenizer."""
    hidden_size: PositiveInt = 128
    """Width of embeddings and hidden states; must be divisible by `num_heads`."""
    intermediate_size: PositiveInt = 384
    """Width of the feed-forward layers."""
    num_layers: PositiveInt = 2
    """Number of transformer layers."""
    num_heads: PositiveInt = 4
    """Number of attention heads per layer."""
    max_positions: PositiveInt = 512
    """Number of positions; prompt plus response of every task must fit."""
    tie_embeddings: bool = False
    """Whether the output layer shares its weights with the input embeddings."""
    initializer_range: Annotated[float, Field(gt=0)] = 0.05
    """Standard deviation of the initial weights."""

    @property
    def tokenizer_path(self) -> str | None:
        """Folder or hub id of the model whose tokenizer is used; None: the tokenizer is made."""
        return None if self.tokenizer in MADE_TOKENIZERS else self.tokenizer

    @model_validator(mode="after")
    def _known_tokenizer(self) -> Self:
        if self.tokenizer not in MADE_TOKENIZERS and "/" not in self.tokenizer:
            raise ValueError(
                f"tokenizer must be {', '.join(MADE_TOKENIZERS)}, or a model's folder or hub id with a / in it (a "
                f"folder beside you is ./{self.tokenizer}), got {self.tokenizer!r}"
            )
        return self


class ModelConfig(Section):
    """The model of the policy, given by exactly one of `path` and `new`."""

    path: LocalPath | None = None
    """Folder or hub id of a Hugging Face causal language model with its tokenizer."""
    new: NewModelConfig | None = None
    dtype: Annotated[Dtype, Rule.MAY_CHANGE, Rule.LAST_BIT] = "float32"
    """Data type of forward passes; master weights and logits are always float32 (METHOD §5), so they are kept where a
    resumed run has another one."""
    max_positions: PositiveInt | None = None
    """Number of positions, prompt and response together, where it is to exceed that of the checkpoint: rotary positions
    extrapolate (METHOD §5: 12,000 for Qwen2.5-Math-7B, which states 4,096). Engines serve so many, and the trained
    model's `config.json` states it. null: the checkpoint's own; a smaller number is refused."""
    prompt: PromptConfig = PromptConfig()
    date_string: str = DEFAULT_DATE
    """Date that a chat template prints, if it prints one (Llama 3.2's does), as `26 Jul 2024`. It is fixed, so that
    prompts do not change from one day to the next, in a resumed run or in an evaluation."""
    train_layers: PositiveInt | None = None
    """Number of transformer layers that are trained, the uppermost ones, with the final norm and an output layer that
    is not tied; everything below stays as it is, input embeddings included, in Latent-SFT and in RL. null: all."""

    @property
    def source(self) -> str | None:
        """Folder or hub id that is read for the model, or for a new model's tokenizer; None: everything is made."""
        return self.path if self.new is None else self.new.tokenizer_path

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.new is None):
            given = "both" if self.path else "neither"
            raise ValueError(f"model: exactly one of `path` and `new` must be given, got {given}; set model.path")
        try:
            datetime.strptime(self.date_string, DATE_FORMAT)
        except ValueError:
            raise ValueError(f"date_string must be a date such as {DEFAULT_DATE!r}, got {self.date_string!r}") from None
        return self

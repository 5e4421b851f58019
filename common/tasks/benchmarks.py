"""The eight benchmarks (METHOD §8): verifier, prompt, budget and file of each, and how to get that file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from latent_grpo.common.config import ConfigError, PromptConfig, TaskConfig
from latent_grpo.common.config.monitoring_and_checkpoints import EvaluationProtocol

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
LOW_PROMPT = PromptConfig(user=INSTRUCTION + "\n{problem}")
HIGH_PROMPT = PromptConfig(system=INSTRUCTION)
CHOICE_PROMPT = PromptConfig(
    system=INSTRUCTION,
    user="{problem}\nPlease give the letter of the correct option (A, B, C, or D) as the final answer.",
)
REFERENCE_CHOICE_PROMPT = PromptConfig(
    system=INSTRUCTION,
    user="{problem}\nPlease provide the option letter (A, B, C, or D) as your final answer.",
)
REFERENCE_TEMPERATURE, REFERENCE_TOP_P, REFERENCE_TOP_K = 0.6, 0.95, 0  # sampling of the protocol `reference`: no top_k
GSM8K_AUG = "https://github.com/da03/Internalize_CoT_Step_by_Step"
GET_GPQA = (
    "GPQA does not come with this program: its authors ask that it not be published in plain text. Accept their terms "
    "at https://huggingface.co/datasets/Idavidrein/gpqa and download gpqa_diamond.csv (or unpack the archive of "
    "https://github.com/idavidrein/gpqa); put it into the data folder as it is. Or let `latent-grpo data fetch "
    "gpqa --from FOLDER` copy it there: it takes gpqa_diamond.csv, and GPQA-test.jsonl of the paper's authors. Or let "
    "it be read from the hub: path hf:Idavidrein/gpqa with options.config gpqa_diamond, after `hf auth login`"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRules:
    """How the authors' own evaluation measures a benchmark (METHOD §8)."""

    runs: int
    verifier: str  # of `latent_grpo.reward.reference`, on the whole decoded text with the proxy tokens in it
    uncut_lengths: bool  # whether lengths are those of the samples that the budget did not cut
    noise_too: bool  # whether it is also measured with the noise on
    prompt: PromptConfig | None = None  # where it is another than this project's


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark, besides the defaults of its task's settings (`BENCHMARK_DEFAULTS`)."""

    level: Literal["low", "high"]
    prompt: PromptConfig
    problems: int  # of the whole benchmark, as published
    own_files: tuple[str, ...]  # the product's names
    authors_stem: str  # of the file in the authors' repository: STEM.jsonl or STEM.parquet (METHOD §8)
    how_to_get: str
    reference: ReferenceRules

    @property
    def files(self) -> tuple[str, ...]:
        """Names that are looked for in the data folder, in this order: the product's, then the authors' own."""
        others = (name.removesuffix(".parquet") + ".jsonl" for name in self.own_files if name.endswith(".parquet"))
        authors = [f"{self.authors_stem}.parquet", f"{self.authors_stem}.jsonl"]
        if self.reference.prompt is not None:
            authors.reverse()  # verl's rows bring the prompt of one protocol; the .jsonl has raw columns, good for both
        return tuple(dict.fromkeys([*self.own_files, *others, *authors]))


def _low(file: str, authors: str, problems: int, source: str) -> Benchmark:
    return Benchmark(
        level="low", prompt=LOW_PROMPT, problems=problems, own_files=(file,), authors_stem=authors,
        how_to_get=_source(source),
        reference=ReferenceRules(runs=5, verifier="reference_number", uncut_lengths=True, noise_too=False),
    )  # fmt: skip


def _high(
    files: tuple[str, ...],
    authors: str,
    problems: int,
    how_to_get: str,
    reference_runs: int,
    verifier: str = "math",
    prompt: PromptConfig = HIGH_PROMPT,
    reference_prompt: PromptConfig | None = None,
) -> Benchmark:
    reference = ReferenceRules(
        runs=reference_runs, verifier=f"reference_{verifier}", uncut_lengths=False, noise_too=True,
        prompt=reference_prompt,
    )  # fmt: skip
    return Benchmark(
        level="high", prompt=prompt, problems=problems, own_files=files, authors_stem=authors, how_to_get=how_to_get,
        reference=reference,
    )  # fmt: skip


def _source(repository: str) -> str:
    return f"A .parquet or .jsonl file with the columns problem and answer is expected (published at {repository})"


BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k-aug": _low("gsm8k_aug_test.parquet", "GSM8k-Aug-test", 1319, GSM8K_AUG),
    "gsm-hard": _low("gsm_hard.parquet", "GSM8k-Hard-test", 1319, "https://github.com/reasoning-machines/pal"),
    "svamp": _low("svamp.parquet", "Svamp-test", 1000, "https://github.com/arkilpatel/SVAMP"),
    "multiarith": _low("multiarith.parquet", "Multiarith-test", 600, "https://github.com/reasoning-machines/pal"),
    "math500": _high(("math500.parquet",), "Math-500-test", 500, _source("https://github.com/openai/prm800k"), 4),
    "aime2024": _high(
        ("aime2024.parquet",), "AIME-2024-test", 30, _source("https://github.com/QwenLM/Qwen2.5-Math"), 64
    ),
    "aime2025": _high(
        ("aime2025.parquet",),
        "AIME-2025-test",
        30,
        _source("https://artofproblemsolving.com/wiki/index.php/2025_AIME_I"),
        64,
    ),
    "gpqa": _high(
        ("gpqa_diamond.csv", "gpqa_diamond.parquet", "gpqa_diamond.jsonl"),
        "GPQA-test",
        198,
        GET_GPQA,
        8,
        "choice",
        CHOICE_PROMPT,
        REFERENCE_CHOICE_PROMPT,
    ),
}
MADE_FROM_TEXT = f"docs/latent_sft.md says how to make it from the text that is published at {GSM8K_AUG}"
PROFILE_FILES = {
    "gsm8k-train": (
        "A .parquet file with the columns problem, answer and cot (`<<48/2=24>> <<48+24=72>>`) is expected; "
        + MADE_FROM_TEXT
    ),
    "gsm8k-test": f"A .parquet file with the columns problem and answer is expected; {MADE_FROM_TEXT}",
}
"""Tasks of shipped profiles that are no benchmarks -> how to get their files."""
TRAINING_STEMS = {"gsm8k-aug-oss-dup-all": "GSM8k-Aug-oss-dup-all", "dapo-math-17k-en": "DAPO-Math-17k-en-train"}
"""Training sets of the authors' repository -> the stems of their files (METHOD §8)."""
TRAINING_SETS = (*TRAINING_STEMS, "gsm8k-aug-train", "math-train")
"""Training sets that `latent-grpo data fetch` knows besides the benchmarks (`deploy.data.sets`)."""


def known_files(name: str) -> tuple[str, ...]:
    """Returns the names of a set's file in a data folder, the product's first; empty for an unknown set."""
    if name in BENCHMARKS:
        return BENCHMARKS[name].files
    own = f"{name.replace('-', '_')}.parquet"
    if name in TRAINING_STEMS:
        return (own, f"{TRAINING_STEMS[name]}.parquet", f"{TRAINING_STEMS[name]}.jsonl")
    return (own,) if name in TRAINING_SETS else ()


def reference_rules(name: str) -> ReferenceRules | None:
    """Returns how the protocol `reference` measures a task; None for a task that it does not know."""
    return BENCHMARKS[name].reference if name in BENCHMARKS else None


def prompt_of(task: TaskConfig, model: PromptConfig, protocol: EvaluationProtocol = "ours") -> PromptConfig:
    """The prompt of a task's plain problems: each key from the task, else from `model.prompt`, else from the benchmark.

    The instruction never appears twice: a benchmark's user text loses it where the system message holds it. The
    benchmark's is that of the `protocol`.
    """
    rules = reference_rules(task.name)
    own = BENCHMARKS[task.name].prompt if task.name in BENCHMARKS else PromptConfig()
    benchmark = (rules.prompt if protocol == "reference" and rules and rules.prompt else own).given
    chosen = model.given | (task.prompt.given if task.prompt else {})
    if "user" in benchmark and INSTRUCTION in (chosen.get("system") or ""):
        lines = benchmark["user"].split("\n")
        benchmark["user"] = "\n".join(line for line in lines if line != INSTRUCTION)
    if "system" in benchmark and INSTRUCTION in (chosen.get("user") or ""):
        del benchmark["system"]
    return PromptConfig(**(PromptConfig().__dict__ | benchmark | chosen))


def prompt_of_messages(task: TaskConfig, model: PromptConfig) -> PromptConfig:
    """The prompt of rows that bring whole messages, which only the task's own keys change.

    The texts around thinking are the model's. Nothing but these is given, in the sense of :class:`PromptConfig`: a
    `system` of null that the task gives takes the row's system message away, and one that nobody gave leaves it.
    """
    thinking = {name: value for name, value in model.given.items() if name in ("think_start", "think_end")}
    return PromptConfig(**(thinking | (task.prompt.given if task.prompt else {})))


def fetch_commands(missing: Iterable[tuple[str, str | Path]]) -> list[str]:
    """The commands that bring tasks' files, (name, folder) each, one for each folder; none for unknown tasks."""
    names: dict[str, dict[str, None]] = {}
    for name, folder in missing:
        if name in BENCHMARKS or name in TRAINING_SETS:
            names.setdefault(str(folder), {})[name] = None
    return [f"latent-grpo data fetch {' '.join(found)} --to {folder}" for folder, found in names.items()]


def how_to_get(name: str) -> str:
    """Returns ". " and a sentence on how to get the file of a benchmark or a profile; empty for another task."""
    known = BENCHMARKS[name].how_to_get if name in BENCHMARKS else PROFILE_FILES.get(name)
    return f". {known}" if known else ""


def benchmark_tasks(names: Sequence[str], folder: str | Path) -> list[TaskConfig]:
    """Returns the named benchmarks with files of `folder`. Raises ConfigError for unknown names or missing files."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown or not names:
        raise ConfigError(
            f"unknown benchmark(s) {', '.join(unknown) or '(none given)'}; known are {', '.join(BENCHMARKS)}"
        )
    tasks, missing = [], []
    for name in dict.fromkeys(names):
        there = [path for file in BENCHMARKS[name].files if (path := Path(folder, file)).is_file()]
        if there:
            tasks.append(TaskConfig(name=name, path=str(there[0])))
        else:
            missing.append(name)
    if missing:
        place = Path(folder).resolve()
        lines = [f"no {' or '.join(BENCHMARKS[name].files)} in {place}{how_to_get(name)}" for name in missing]
        raise ConfigError(*fetch_commands((name, folder) for name in missing), *lines)
    return tasks

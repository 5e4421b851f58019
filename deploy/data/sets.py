"""The data sets that `latent-grpo data` knows, by the names of the tasks that use them.

The paper's authors publish all of theirs in one repository of the hub (METHOD §8). Two more training sets come from
those who published them first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from latent_grpo.common.config import ConfigError
from latent_grpo.common.tasks.benchmarks import BENCHMARKS, GET_GPQA, TRAINING_STEMS

AUTHORS = "DJCheng/Latent-GRPO-Data"
MATH_PARTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra"),
    "precalculus",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """One data set. Rows are those that its publishers name; None where they name no number."""

    name: str
    use: Literal["benchmark", "training"]
    file: str  # in the data folder: what profiles and `evaluate` look for first
    rows: int | None
    licence: str
    repository: str  # of the hub
    stem: str | None = None  # of the authors' files: STEM.jsonl or STEM.parquet; None: it is not one of theirs
    parts: tuple[str | None, ...] = (None,)  # configurations of the hub's data set
    split: str = "train"
    refused: str = ""  # why the hub's is not fetched, and what to do instead; a local file is copied as it lies

    @property
    def authors_files(self) -> tuple[str, ...]:
        """The names that are looked for with `--from`, in this order: the authors' own; GPQA's publishers' as well."""
        own = BENCHMARKS[self.name].own_files if self.refused else ()
        return () if self.stem is None else (f"{self.stem}.parquet", f"{self.stem}.jsonl", *own)

    @property
    def written_as(self) -> str:
        """The file of the data folder; several names where a file is copied under the one that it has."""
        return " or ".join(self.authors_files) if self.refused else self.file


def _benchmark(name: str, licence: str, refused: str = "") -> DataSet:
    known = BENCHMARKS[name]
    return DataSet(
        name=name, use="benchmark", file=known.files[0], rows=known.problems, licence=licence, repository=AUTHORS,
        stem=known.authors_stem, split="test", refused=refused,
    )  # fmt: skip


MIT, APACHE, MAA = "MIT", "Apache-2.0", "problem texts by the MAA; copies MIT"
SETS: dict[str, DataSet] = {
    found.name: found
    for found in (
        _benchmark("gsm8k-aug", MIT),
        _benchmark("gsm-hard", APACHE),
        _benchmark("svamp", MIT),
        _benchmark("multiarith", APACHE),
        _benchmark("math500", MIT),
        _benchmark("aime2024", MAA),
        _benchmark("aime2025", MAA),
        _benchmark("gpqa", "CC-BY-4.0, behind an agreement not to publish it in plain text", GET_GPQA),
        DataSet(
            name="gsm8k-aug-oss-dup-all", use="training", file="gsm8k_aug_oss_dup_all.parquet", rows=None,
            licence="see its repository", repository=AUTHORS, stem=TRAINING_STEMS["gsm8k-aug-oss-dup-all"],
        ),
        DataSet(
            name="dapo-math-17k-en", use="training", file="dapo_math_17k_en.parquet", rows=None,
            licence="see its repository (DAPO-Math-17k: Apache-2.0)", repository=AUTHORS,
            stem=TRAINING_STEMS["dapo-math-17k-en"],
        ),
        DataSet(
            name="gsm8k-aug-train", use="training", file="gsm8k_aug_train.parquet", rows=385_620, licence=MIT,
            repository="whynlp/gsm8k-aug",
        ),
        DataSet(
            name="math-train", use="training", file="math_train.parquet", rows=7_500, licence=MIT,
            repository="EleutherAI/hendrycks_math", parts=MATH_PARTS,
        ),
    )
}  # fmt: skip


def chosen(names: Iterable[str]) -> list[DataSet]:
    """Returns the sets of these names. Raises ConfigError for unknown ones."""
    wanted = list(dict.fromkeys(names))
    unknown = [name for name in wanted if name not in SETS]
    if unknown or not wanted:
        raise ConfigError(f"no data set {', '.join(unknown) or '(none given)'}; known are {', '.join(SETS)}")
    return [SETS[name] for name in wanted]

"""The definition of a suite: arms of one profile over seeds, the starts that they share, and the claims that they test.

    starts (one a seed)          arms (one run a seed)            claims
    latent   ─── base model ──┬─ mixture, uniform, two-sided ... ─┬─► reproduced / not reproduced /
    explicit ─── base model ──┴─ explicit GRPO                   ─┘    not testable here

A suite is a YAML file below `deploy/suites/` (or a path); `extends: NAME` starts from another one. Every unit's
settings are resolved and checked before anything runs. Imports neither torch nor Ray.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, ValidationError, model_validator
from pydantic_core import ErrorDetails

from latent_grpo.common.config import ConfigError, RunConfig, Section, load_config
from latent_grpo.common.config.section import SEED_LIMIT, Seed
from latent_grpo.common.config.yaml_files import is_path, read_mapping
from latent_grpo.common.tasks.present import with_present_files

Metric = str
"""`pass_at_1`, `chain_length`, `latent_length`, `latent_share`, `invalid_rate` or `sampled_pass_at_K`."""


class SuiteError(ConfigError):
    """A suite that cannot be run as requested; the message says what to change."""


class Difference(Section):
    """The difference `arm` - `than` of a metric, for two arms or starts; with `gain`, of their gains over their starts.

    The claim "better" holds if the mean reaches `at_least` and the 95 % interval is above 0. With `equal_will_do` the
    claim is "at least equal": the interval's lower end is not below -`margin`, so that noise makes neither easier.
    """

    kind: Literal["difference"]
    arm: str
    than: str
    metric: Metric = "pass_at_1"
    gain: bool = False
    at_least: float = 0.0
    equal_will_do: bool = False
    margin: Annotated[float, Field(ge=0)] = 0.05
    """The deficit that still counts as equal, in the metric's units."""
    matched: Annotated[float, Field(gt=0)] | None = None
    """Seeds whose two starts differ by more than this in pass@1 are left out and named; needs `gain`."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.matched is not None and not self.gain:
            raise ValueError(
                "matched compares the starts of two gains, so it needs gain: true; add it, or leave matched out"
            )
        if self.equal_will_do and self.at_least:
            raise ValueError(
                f"at_least ({self.at_least:g}) has no effect with equal_will_do: true, which uses margin; leave it out"
            )
        if "margin" in self.model_fields_set and not self.equal_will_do:
            raise ValueError("margin has an effect only with equal_will_do: true; leave it out, or use at_least")
        return self


class Ratio(Section):
    """`arm` / `than` of a metric reaches `at_least`."""

    kind: Literal["ratio"]
    arm: str
    than: str
    metric: Metric = "chain_length"
    at_least: float


class NoDecline(Section):
    """The last evaluation of every seed's run is at most `drop` below its best one, its start's included."""

    kind: Literal["no_decline"]
    arm: str
    drop: float = 0.03


class MassMoves(Section):
    """The answer's share of the last latent step's probability falls and the fillers' share rises during the run."""

    kind: Literal["mass_moves"]
    arm: str


class Untestable(Section):
    """A claim that this suite cannot test; `reason` says why, and the report shows it beside the others."""

    kind: Literal["untestable"]
    reason: str


class Claim(Section):
    """A sentence that the suite tests; the report gives its verdict with the numbers."""

    text: str
    """The claim in words."""
    source: str = "paper"
    """The place in the paper where it is claimed."""
    test: Annotated[Difference | Ratio | NoDecline | MassMoves | Untestable, Field(discriminator="kind")]


class Start(Section):
    """An initialisation: made by the profile's warm start, once per seed, or a finished model."""

    title: str
    """The name that the report shows."""
    overrides: list[str] = Field(default_factory=list)
    """Overrides for the start and for every arm that begins there (another task, the explicit chain)."""
    path: str | None = None
    """Folder or hub id of a finished model: nothing is trained for it."""


class Arm(Section):
    """A training run, once per seed, from one of the starts."""

    title: str
    """The name that the report shows."""
    start: str
    """The start that it begins from."""
    overrides: list[str] = Field(default_factory=list)
    """Overrides for this arm, after the suite's and the start's."""


class Quick(Section):
    """The short form of the suite, which `--quick` runs."""

    seeds: list[Seed] = Field(default_factory=lambda: [0], min_length=1)
    arms: list[str]
    overrides: list[str] = Field(default_factory=list)


class Suite(Section):
    """A study: arms over seeds, each from its seed's start, and the claims that their results are to decide."""

    title: str
    """The name that the report shows."""
    profile: str
    """Profile, by name or path, that every unit begins with."""
    runner: Literal["pipeline", "in_process"] = "pipeline"
    """`in_process`: each unit in one thread of one process (`deploy.reproduce.in_process`), for small models on CPU."""
    seeds: list[Seed] = Field(min_length=1)
    overrides: list[str] = Field(default_factory=list)
    """Overrides for every start and arm."""
    starts: dict[str, Start] = Field(min_length=1)
    arms: dict[str, Arm]
    claims: dict[str, Claim] = Field(default_factory=dict)
    quick: Quick | None = None
    probe_every: PositiveInt | None = None
    """Where set, each run's evaluations are also searched for the answer's token's mass (`deploy.reproduce.probe`)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        both = sorted(self.starts.keys() & self.arms.keys())
        if both:
            raise ValueError(f"starts and arms need different names, both have {both}")
        for name, arm in self.arms.items():
            if arm.start not in self.starts:
                raise ValueError(f"arms.{name}.start: no start {arm.start!r}; the starts are {sorted(self.starts)}")
        known = {*self.starts, *self.arms}
        for name, claim in self.claims.items():
            missing = [n for n in named_in(claim) if n not in known]
            if missing:
                raise ValueError(f"claims.{name}: no start or arm {missing}; the names are {sorted(known)}")
        unknown = [n for n in (self.quick.arms if self.quick else []) if n not in self.arms]
        if unknown:
            raise ValueError(f"quick.arms: no arm {unknown}; the arms are {sorted(self.arms)}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be distinct, got {self.seeds}")
        return self


def named_in(claim: Claim) -> list[str]:
    """Returns the starts and arms that a claim compares."""
    return [getattr(claim.test, name) for name in ("arm", "than") if hasattr(claim.test, name)]


# --- loading -------------------------------------------------------------------------------------------------------


def suites_folder() -> Path:
    """The folder of the shipped suites."""
    return Path(__file__).resolve().parents[1] / "suites"


def load_suite(
    source: str | Path, *, quick: bool = False, seeds: Sequence[int] = (), overrides: Sequence[str] = ()
) -> Suite:
    """Loads a suite by name or path, with `overrides` for every unit, and `seeds` instead of its own.

    Raises :class:`SuiteError` with one line per fault.
    """
    data = read_mapping(source, suites_folder(), "suite")
    profile, beside = data.get("profile"), Path(source).parent
    if is_path(source) and isinstance(profile, str) and is_path(profile) and (beside / profile).is_file():
        data["profile"] = str(beside / profile)
    try:
        suite = Suite.model_validate(data)
    except ValidationError as error:
        raise SuiteError(f"suite {source}:", *map(_explain, error.errors())) from error
    if quick:
        suite = _quick(suite, source)
    if seeds:
        if any(not 0 <= seed < SEED_LIMIT for seed in seeds):
            raise SuiteError(f"--seeds: seeds must be from 0 to 2**63 - 1, got {[*seeds]}")
        if len(set(seeds)) != len(seeds):
            raise SuiteError(f"--seeds: seeds must be distinct, got {[*seeds]}")
        suite = suite.model_copy(update={"seeds": [*seeds]})
    if overrides:
        suite = suite.model_copy(update={"overrides": [*suite.overrides, *overrides]})
    return suite


def _explain(error: ErrorDetails) -> str:
    where = ".".join(map(str, error["loc"])) or "suite"
    return f"{where}: {error['msg']}, got {error['input']!r:.200}"


def _quick(suite: Suite, source: str | Path) -> Suite:
    if suite.quick is None:
        raise SuiteError(f"suite {source} has no section quick; run it without --quick")
    arms = {name: suite.arms[name] for name in suite.quick.arms}
    starts = {name: start for name, start in suite.starts.items() if name in {arm.start for arm in arms.values()}}
    changed = {
        "seeds": suite.quick.seeds,
        "arms": arms,
        "starts": starts,
        "overrides": [*suite.overrides, *suite.quick.overrides],
        "quick": None,
    }
    return suite.model_copy(update=changed)


# --- units ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Unit:
    """One start or one arm at one seed, which is run, skipped or resumed as a whole."""

    name: str
    seed: int
    is_start: bool

    @property
    def key(self) -> str:
        """The unit's name in the suite: `ARM-seedN`."""
        return f"{self.name}-seed{self.seed}"


def units(suite: Suite) -> Iterator[Unit]:
    """Yields units seed by seed, so that an interrupted suite has whole seeds; starts come right before their arms."""
    for seed in suite.seeds:
        for start in suite.starts:
            yield Unit(start, seed, True)
            yield from (Unit(name, seed, False) for name, arm in suite.arms.items() if arm.start == start)


def units_of(suite: Suite, arms: Sequence[str]) -> Iterator[Unit]:
    """Yields the units of these arms (none: of all) and their starts. Raises :class:`SuiteError` for unknown arms."""
    unknown = [name for name in arms if name not in suite.arms]
    if unknown:
        raise SuiteError(f"--arms: no arm {', '.join(unknown)}; the suite has {', '.join(suite.arms)}")
    kept = {*arms, *(suite.arms[name].start for name in arms)}
    return (unit for unit in units(suite) if not arms or unit.name in kept)


def start_of(suite: Suite, unit: Unit) -> Unit:
    """Returns the unit from which an arm starts."""
    return Unit(suite.arms[unit.name].start, unit.seed, True)


def unit_config(suite: Suite, unit: Unit, folder: Path) -> RunConfig:
    """Returns the unit's settings.

    `folder` is the suite's; an arm's model is its start's result there, or the start's `path`.
    """
    start = suite.starts[unit.name if unit.is_start else suite.arms[unit.name].start]
    chosen = [*suite.overrides, *start.overrides]
    model = start.path
    if not unit.is_start:
        chosen += suite.arms[unit.name].overrides
        model = model or str(unit_folder(folder, start_of(suite, unit)) / "base")
    if model is not None:
        chosen += [f"model.path={model}", "model.new=null", "warm_start=null"]
    chosen += [f"seed={unit.seed}", f"runs_folder={folder}"]
    if not unit.is_start:
        chosen.append("evaluation.at_start=false")  # its start was evaluated, on the same problems
    if suite.probe_every is not None:
        chosen += ["dump.evaluation=true", f"evaluation.every={suite.probe_every}"]
    try:
        return with_present_files(load_config(suite.profile, chosen))
    except ConfigError as error:
        raise SuiteError(*(f"{unit.key}: {line}" for line in error.args)) from error


def unit_folder(folder: Path, unit: Unit) -> Path:
    """Returns the folder of a unit's run."""
    return folder / ("starts" if unit.is_start else "runs") / unit.key


def resolved(suite: Suite, folder: Path) -> dict[str, Any]:
    """Returns everything that decides what a suite computes: its definition and every unit's settings.

    Raises :class:`SuiteError` for settings that cannot work, before anything runs.
    """
    configs = {}
    for unit in units(suite):
        config = unit_config(suite, unit, folder)
        if unit.is_start and config.warm_start is None and suite.starts[unit.name].path is None:
            raise SuiteError(
                f"{unit.key}: a start needs a warm start (profile {suite.profile} has no section warm_start) or a "
                f"finished model; set starts.{unit.name}.path"
            )
        configs[unit.key] = json.loads(config.model_dump_json(exclude={"runs_folder"}))
    return {"suite": json.loads(suite.model_dump_json()), "units": configs}


def changes(before: object, after: object, at: str = "") -> Iterator[str]:
    """Yields `key: old -> new` for every difference of two resolved suites."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys(itertools.chain(before, after)):
            yield from changes(before.get(key), after.get(key), f"{at}.{key}" if at else str(key))
    elif before != after:
        yield f"{at}: {before!r:.80} -> {after!r:.80}"

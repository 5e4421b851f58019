"""The model card of an exported model: what it is, how to run it, its figures with their protocol, and its making."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from latent_grpo.common import __version__
from latent_grpo.common.config import RunConfig, config_as_json
from latent_grpo.common.figure_names import by_label, protocol_of, task_of
from latent_grpo.common.metrics import FILE as METRICS_FILE
from latent_grpo.common.metrics import read_metrics
from latent_grpo.common.model_chain import CHAIN_FILE, read_chain
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.deploy.run.manifest import ManifestError, read_manifest
from latent_grpo.deploy.run.manifest_schema import DataFacts

CARD, SETTINGS = "README.md", "run_config.json"
START_CARD = "README.start.md"  # the card of the model that the run started from
NAMES = {"pass_at_1": "pass@1", "chain_length": "chain length", "latent_length": "of it latent",
         "invalid_rate": "invalid rate"}  # fmt: skip
SHOWN = ("algorithm", "steps", "k", "tau", "noise.mode", "noise.scale", "latent_exit", "temperature", "top_p", "top_k",
         "group_size", "prompts_per_step", "optimizer.lr", "kl_coefficient", "model.dtype", "seed")  # fmt: skip


def write_card(target: Path, run: RunFolder, config: RunConfig, what: str, step: int | None) -> None:
    """Writes the card and the run's settings into an exported folder; `what` is exported, of `step` (None: the end).

    The card of the model that the run started from stays, as :data:`START_CARD`; its licence is taken over.
    """
    (target / SETTINGS).write_text(config_as_json(config), encoding="utf-8")
    card, licence = target / CARD, None
    if card.is_file():
        licence = _licence(card)
        card.replace(target / START_CARD)
    card.write_text("\n".join(_lines(target, run, config, what, step, licence)) + "\n", encoding="utf-8")


def _lines(
    target: Path, run: RunFolder, config: RunConfig, what: str, step: int | None, licence: str | None
) -> Iterator[str]:
    chain = read_chain(target)
    yield from ("---", "library_name: latent-grpo", "pipeline_tag: text-generation")
    yield from ([f"license: {licence}"] if licence else [])
    yield from ("tags:", "- latent-reasoning", "- reinforcement-learning", f"- {config.algorithm}", "---", "")
    yield f"# {run.name}, {what}"
    yield ""
    latent, explicit = "thinks in latent steps, mixtures of token embeddings", "writes its chain of thought as text"
    yield (
        f"A model that {latent if config.latent else explicit}. It was trained with "
        f"`{config.algorithm}` by [latent-grpo](https://arxiv.org/abs/2604.27998) {__version__}"
        + (f"; its chain ({CHAIN_FILE}): {chain.describe()}." if chain else ".")
    )
    yield from ("", "## How to run it", "")
    if config.latent:
        yield from ("Plain `transformers` cannot decode latent steps, and its text would be meaningless.", "")
    yield from (
        "```", "pip install latent-grpo",
        "latent-grpo generate --model MODEL --prompt '...' --thoughts   # in the terminal",
        "latent-grpo serve --model MODEL                                # vLLM's server", "```", "",
        "```python", "from latent_grpo import LatentModel", "",
        'for response in LatentModel("MODEL").generate(["..."]):', "    print(response.answer, response.latent_steps)",
        "```",
    )  # fmt: skip
    yield from ("", "## Figures", "")
    yield from _figures(run, step)
    yield from ("", "## Settings", "", "| key | value |", "|---|---|")
    yield from (f"| `{key}` | {value} |" for key in SHOWN if (value := _value(config, key)) is not None)
    yield from ("", f"All of them are in `{SETTINGS}`.", "", "## Data", "")
    yield from _data(run)


def _figures(run: RunFolder, step: int | None) -> Iterator[str]:
    found = _measured(run, step)
    if not found:
        yield "This model was not evaluated; `latent-grpo evaluate --model MODEL --tasks ...` does it."
        return
    yield from ("| task | protocol | " + " | ".join(NAMES.values()) + " |", "|---|---|" + "---|" * len(NAMES))
    for label, values in by_label(found).items():
        cells = [f"{values[name]:.3f}" if isinstance(values.get(name), float) else "-" for name in NAMES]
        yield f"| {task_of(label)} | {protocol_of(label)} | " + " | ".join(cells) + " |"
    yield from (
        "",
        "`ours`: pass@1 is the mean over problems and repetitions, noise off, invalid samples included. `reference`: "
        "the rules of the paper's authors; published numbers are comparable with these alone.",
    )


def _measured(run: RunFolder, step: int | None) -> Mapping[str, Any]:
    """Returns the evaluation of a step; None: that after the training."""
    if step is None:
        summary = run.path / "summary.json"
        return run.read_json("summary.json").get("after", {}) if summary.exists() else {}
    if not (run.path / METRICS_FILE).is_file():
        return {}
    rows = [row for row in read_metrics(run.path, kind="evaluation") if row["step"] == step]
    return rows[-1]["metrics"] if rows else {}


def _data(run: RunFolder) -> Iterator[str]:
    try:
        data = read_manifest(run.path).data
    except ManifestError:
        yield "The run has no manifest, so its data are not known."
        return
    yield from ("| task | use | problems | source | hash (xxh3-128) |", "|---|---|---|---|---|")
    yield from (
        f"| {one.task} | {one.use} | {'without end' if one.problems is None else one.problems} | {_source(one)} | "
        f"{one.xxh3_128 or one.problems_xxh3_128 or '-'} |"
        for one in data
    )


def _source(data: DataFacts) -> str:
    """Returns where the problems came from; of a file its name alone, since its folder is nobody's business."""
    source = data.source or "-"
    return source if ":" in source else Path(source).name


def _value(config: RunConfig, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


def _licence(card: Path) -> str | None:
    """Returns the licence that a model card states."""
    from huggingface_hub import ModelCardData, metadata_load

    try:
        stated = metadata_load(card) or {}
    except ValueError:  # its front matter is no YAML mapping
        return None
    licence = ModelCardData(**stated, ignore_metadata_errors=True).license
    return licence if isinstance(licence, str) else None

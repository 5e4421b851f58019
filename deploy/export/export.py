"""`latent-grpo export`: a checkpoint of a run as a Hugging Face folder, with its chain file and a model card.

    RUN ── the trained model, a step's checkpoint, or the best one ──► folder ──► (hub)

The folder is complete before it appears under its name, and nothing is overwritten.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from latent_grpo.common.config import ConfigError, RunConfig
from latent_grpo.common.files import FULL, linked_out, save_whole, unwritable
from latent_grpo.common.model_chain import exported_chain, read_chain, write_chain
from latent_grpo.common.model_check import check_model
from latent_grpo.common.models import load_tokenizer
from latent_grpo.deploy.export.card import write_card
from latent_grpo.deploy.export.upload import Hub, upload
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.deploy.run.storage.copy import local_copy
from latent_grpo.deploy.run.storage.twin import foreign
from latent_grpo.learner.best_checkpoint import best_checkpoint
from latent_grpo.learner.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    verify_checkpoint,
)

HUB = "hf:"
EXPORTED = ("checkpoints", "sft", "model", "base", "initial")
"""The parts of a run's folder that are copied from an object store for an export."""
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is exported: a finished model folder, or a learner's state in a checkpoint."""

    name: str  # for people, and the model card: `step 20, the best by evaluation/pass_at_1 (0.530)`
    step: int | None  # None: the run's last
    model: Path | None = None
    state: Path | None = None


def export(
    run: str | Path,
    to: str,
    *,
    step: int | None = None,
    best: bool = False,
    public: bool = False,
    say: Callable[[str], None] = lambda line: None,
    hub: Callable[[], Hub] | None = None,
) -> str:
    """Exports a run's model to the folder `to`, or to the hub's repository `hf:OWNER/NAME`; returns where it is.

    Without `step` and `best` it is the trained model, or the last checkpoint of a run that has not ended. `hub()` makes
    the client of the hub. Raises ConfigError, and CheckpointError for damaged checkpoints.
    """
    folder = RunFolder(local_copy(run, EXPORTED))
    if not all((folder.path / name).exists() for name in ("config.json", "run.json")):
        raise ConfigError(f"export {run}: it has no config.json and run.json; give a run folder: runs/quickstart-...")
    if folder.read_json("run.json").get("kind") == "evaluate":
        raise ConfigError(
            f"export {run}: this is an evaluation, which trains no model; give the folder of the run that trained it"
        )
    if step is not None and best:
        raise ConfigError("--step and --best exclude each other; give one of them")
    repository = _repository(to)
    target = Path(to)
    if repository is None and target.exists():
        raise ConfigError(f"--to {to} exists already; give a folder that does not, or remove it")
    if repository is None and public:
        raise ConfigError("--public has no effect on a folder; leave it out, or give --to hf:OWNER/NAME")
    config = folder.placed_config()
    client = None if repository is None else upload(repository, hub)  # refuses what cannot work before the weights
    chosen = choose(folder, config, step, best, say)
    _check_links(folder, config, chosen)
    say(f"exporting {chosen.name} of {folder.path}")
    fill = partial(_fill, folder, config, chosen)
    if client is None:
        _write(target, fill)
        return str(target)
    with tempfile.TemporaryDirectory(prefix="latent-grpo-export-") as temporary:
        whole = Path(temporary, "model")
        save_whole(whole, fill)
        return client(whole, f"{chosen.name} of {folder.name}", public)


def _check_links(folder: RunFolder, config: RunConfig, chosen: Chosen) -> None:
    """Raises ConfigError where what is copied leads out of a folder that is not the user's own."""
    if (whose := foreign(folder.path)) is None:
        return
    copied = [chosen.model] if chosen.state is None else [chosen.state, start_of(folder, config, chosen)]
    inside = [place for place in copied if isinstance(place, Path)]  # others are models of the settings
    if (why := linked_out(folder.path, (file for place in inside for file in place.rglob("*")))) is not None:
        raise ConfigError(f"export: {whose}, and {why}")


def _write(target: Path, fill: Callable[[Path], None]) -> None:
    """Makes the folder. Raises ConfigError where it cannot be written."""
    making = True
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        making = False
        save_whole(target, fill)
    except OSError as error:
        if not making and error.errno not in FULL and target.parent not in Path(error.filename or target).parents:
            raise  # a file of the run
        error.filename = str(target)
        raise ConfigError(f"--to {target} {unwritable(error)}; make room there, or give another folder") from error


def choose(folder: RunFolder, config: RunConfig, step: int | None, best: bool, say: Callable[[str], None]) -> Chosen:
    """Returns what to export of a run. Raises ConfigError where it has no such model."""
    root = folder.checkpoints if _has(folder.checkpoints) or not _has(folder.sft) else folder.sft
    if best:
        return _best(root, say)
    if step is not None:
        return _at_step(root, step)
    ended = folder.path / "summary.json"
    trained = folder.model if (folder.model / "config.json").is_file() else folder.base_model
    over = ended.exists() and "minutes" in folder.read_json("summary.json")
    if (trained / "config.json").is_file() and (over or (trained == folder.base_model and not _has(root))):
        return Chosen("the trained model", None, model=trained)
    checkpoint = latest_checkpoint(root)
    if checkpoint is None:
        raise ConfigError(
            f"{folder.path} has neither a trained model nor a checkpoint; it ended before its first one "
            "(checkpoint.every). Continue it with `latent-grpo train --resume`"
        )
    for skipped in checkpoint.skipped:
        say(f"checkpoint {skipped.path.name} skipped: {skipped.reason}")
    return Chosen(f"the checkpoint of step {checkpoint.step}", checkpoint.step, state=checkpoint.path / "learner")


def _best(root: Path, say: Callable[[str], None]) -> Chosen:
    found = best_checkpoint(root)
    if found is None:
        raise ConfigError(
            f"--best: no checkpoint of {root.parent} has a score; it takes evaluations while the run goes on "
            f"(evaluation.tasks, evaluation.every, checkpoint.keep_best). {_present(root)}"
        )
    checkpoint, metric, score = found
    for skipped in checkpoint.skipped:
        say(f"checkpoint {skipped.path.name}, which was better, skipped: {skipped.reason}")
    name = f"the checkpoint of step {checkpoint.step}, the best by {metric} ({score:.3f})"
    return Chosen(name, checkpoint.step, state=checkpoint.path / "learner")


def _at_step(root: Path, step: int) -> Chosen:
    paths = [path for found, path in list_checkpoints(root) if found == step]
    if not paths:
        raise ConfigError(f"--step {step}: {root.parent} has no checkpoint of that step. {_present(root)}")
    try:
        verify_checkpoint(paths[-1])
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {paths[-1].name} is damaged: {error}. {_present(root)}") from error
    return Chosen(f"the checkpoint of step {step}", step, state=paths[-1] / "learner")


def _present(root: Path) -> str:
    steps = sorted({step for step, _ in list_checkpoints(root)})
    return f"There are checkpoints of step {', '.join(map(str, steps))}" if steps else "There is no checkpoint at all"


def _has(root: Path) -> bool:
    return bool(list_checkpoints(root))


def _fill(folder: RunFolder, config: RunConfig, chosen: Chosen, target: Path) -> None:
    """Writes weights, tokenizer, chain file and card."""
    source = start_of(folder, config, chosen)
    if chosen.model is not None:
        check_model(chosen.model)  # a damaged model is found here, under its own name
        shutil.copytree(chosen.model, target)
    elif chosen.state is not None:
        from latent_grpo.learner.export import export_checkpoint

        target.mkdir()
        lora = config.latent_sft.lora if _of_sft(folder, chosen.state) else config.lora
        export_checkpoint(chosen.state, source, target, config, lora)
    write_chain(target, exported_chain(config, load_tokenizer(target), read_chain(source)))
    write_card(target, folder, config, chosen.name, chosen.step)


def start_of(folder: RunFolder, config: RunConfig, chosen: Chosen) -> str | Path:
    """Returns the model that the exported weights' learner started from. Raises ConfigError where it is gone."""
    here = folder.path / "initial" if chosen.state is not None and _of_sft(folder, chosen.state) else folder.base_model
    if (here / "config.json").is_file():
        return here
    if config.model.path is None:
        raise ConfigError(f"{here}: the model that the run started from is not there; restore it from a backup")
    return config.model.path


def _of_sft(folder: RunFolder, state: Path) -> bool:
    return folder.sft in state.parents


def _repository(to: str) -> str | None:
    """Returns the hub repository that `to` names, or None for a folder. Raises ConfigError for a malformed one."""
    if not to.startswith(HUB):
        return None
    name = to.removeprefix(HUB)
    if not REPOSITORY.fullmatch(name):
        raise ConfigError(f"--to {to}: expected {HUB}OWNER/NAME, with a name of the hub on both sides of the /")
    return name

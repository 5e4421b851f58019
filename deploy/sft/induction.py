"""The loop of stage 1 of Latent-SFT (METHOD §7b), which trains the encoder, the decoder, then both.

Stage 2 (`deploy.sft.loop`) uses its labels.

initial model ─► encoder learns ─► decoder learns ─► both learn ─► stage 2 begins from the decoder,
                                                                   its soft labels come from the encoder
"""

from __future__ import annotations

import shutil
from pathlib import Path

from latent_grpo.common.files import save_whole
from latent_grpo.common.interrupts import deferred_interrupts
from latent_grpo.deploy.run.session import Run
from latent_grpo.deploy.run.sft_data import SFTData
from latent_grpo.deploy.run.stepping import LearnerSteps, StateKeeper
from latent_grpo.learner.checkpoint import latest_checkpoint, write_checkpoint
from latent_grpo.learner.sft.induction import DECODER, PHASES, Phase
from latent_grpo.learner.sft.induction_learner import InductionLearner

EVALUATED_ROWS = 256  # held-out rows that are evaluated at the end of a phase


def induce(run: Run, data: SFTData) -> Path:
    """Runs stage 1 and returns the decoder's folder, which has the encoder's beside it.

    A stopped run keeps its finished phases and resumes the current one from its last state (`checkpoint.every`).
    """
    model: str | Path = run.initial
    for number, phase in enumerate(PHASES, start=1):
        folder = run.folder.induction / f"{number}-{phase}"
        if not (folder / DECODER / "config.json").is_file():
            learner = InductionLearner(run.config, model, phase, run.reservation.ranks)
            try:
                run.await_workers()
                _learn(run, data, learner, phase, number)
                with deferred_interrupts():  # the trained model is saved before an interrupt ends the run
                    _judge(run, data, learner, phase)
                    save_whole(folder, learner.export)
            finally:
                learner.close()
            shutil.rmtree(run.folder.induction / f"{phase}-states", ignore_errors=True)
        model = folder / DECODER
    return Path(model)


def _learn(run: Run, data: SFTData, learner: InductionLearner, phase: Phase, number: int) -> None:
    settings, name = run.config.latent_sft.induction, f"stage 1 ({phase})"
    total, states = getattr(settings, f"{phase}_steps"), run.folder.induction / f"{phase}-states"
    every, kind = run.config.checkpoint.every, f"induction_{phase}"
    # each phase of stage 1 continues reading the data where the phase before it stopped
    first = sum(getattr(settings, f"{earlier}_steps") for earlier in PHASES[: number - 1])

    def record(done: int, values: dict[str, float]) -> None:
        run.metrics.write(done, values, kind=kind, lineage=run.lineage)

    def record_state(done: int, values: dict[str, float]) -> None:
        run.metrics.write(done, values, kind=f"{kind}_checkpoint", lineage=run.lineage)

    def write(done: int) -> None:
        write_checkpoint(states, done, lambda folder: learner.save(folder / "learner"), {}, run.config.checkpoint.keep)

    before = _restored(run, learner, states, phase)
    keeper = StateKeeper(name, before, write, record_state, run.config.deadlines, run.reporter)
    steps = LearnerSteps(learner, before, record, keeper)
    with steps.interruptible(run.reporter), run.reporter.phase(f"stage 1, {phase}", total) as advance:
        advance(steps.done)
        while steps.done < total:
            steps.start(data.rows(first + steps.done, settings.batch_size), steps.done, total)
            values = steps.finish(advance)
            advance(steps.done, f"answer loss {values['answer_loss']:.3f}")
            if every and steps.done % every == 0 and steps.done < total:
                steps.keep()


def _judge(run: Run, data: SFTData, learner: InductionLearner, phase: Phase) -> None:
    """Reports the answer loss on held-out problems, given their own induced latents and given other problems'."""
    rows = [data.row(task, problem) for task, problem in data.held_out[:EVALUATED_ROWS]]
    own, shuffled = (learner.judge(rows, shuffled=s)["answer_loss"] for s in (False, True))
    done, kind = getattr(run.config.latent_sft.induction, f"{phase}_steps"), f"induction_{phase}_held_out"
    run.metrics.write(done, {"answer_loss": own, "shuffled": shuffled}, kind=kind, lineage=run.lineage)
    run.reporter.say(
        f"stage 1, {phase}: held-out answer loss {own:.3f} from induced latents, {shuffled:.3f} from other problems'"
    )


def _restored(run: Run, learner: InductionLearner, states: Path, phase: Phase) -> int:
    """Loads the last state, if there is one, and returns its number of steps, else 0."""
    checkpoint = latest_checkpoint(states)
    if checkpoint is None:
        return 0
    for skipped in checkpoint.skipped:
        run.reporter.say(f"[yellow]state {skipped.path.name} of stage 1 skipped: {skipped.reason}[/]")
    learner.load(checkpoint.path / "learner")
    run.reporter.say(f"stage 1, {phase}: resuming from step {checkpoint.step}, lineage {run.lineage}")
    return checkpoint.step

"""The loop of Latent-SFT's stage 1 (METHOD §7b): encoder, decoder, both. Stage 2 (`deploy.sft`) then uses its labels.

initial model ─► encoder learns ─► decoder learns ─► both learn ─► stage 2 begins from the decoder,
                                                                   its soft labels come from the encoder
"""

from __future__ import annotations

import shutil
from pathlib import Path

from common.config import InductionConfig
from deploy.run import Run, save_whole
from learner.checkpoint import latest_checkpoint, write_checkpoint
from learner.induction import DECODER, PHASES, Phase
from learner.induction_learner import InductionLearner
from learner.latent_sft import SFTRow

JUDGED = 256  # held-out rows at the end of a step


def induce(run: Run, data) -> Path:
    """The decoder's folder, with the encoder's beside it. `data`: the rows of `deploy.sft.prepare_sft`.

    What a stopped run has finished stays; within a step it goes on from the last state (`checkpoint.every`).
    """
    model: str | Path = run.initial
    for number, phase in enumerate(PHASES, start=1):
        folder = run.folder.induction / f"{number}-{phase}"
        if not (folder / DECODER / "config.json").is_file():
            learner = InductionLearner(run.config, model, phase)
            try:
                _learn(run, data, learner, phase, number)
                save_whole(folder, learner.export)
            finally:
                learner.close()
            shutil.rmtree(run.folder.induction / f"{phase}-states", ignore_errors=True)
        model = folder / DECODER
    return Path(model)


def _learn(run: Run, data, learner: InductionLearner, phase: Phase, number: int) -> None:
    settings: InductionConfig = run.config.warm_start.induction
    total, states = getattr(settings, f"{phase}_steps"), run.folder.induction / f"{phase}-states"
    done = 0
    if (checkpoint := latest_checkpoint(states)) is not None:
        learner.load(checkpoint.path / "learner")
        done = checkpoint.step
        run.reporter.say(f"stage 1, {phase}: goes on from step {done}, lineage {run.lineage}")
    every, kind = run.config.checkpoint.every, f"induction_{phase}"
    first = (number - 1) * max(settings.encoder_steps, settings.decoder_steps, settings.union_steps)
    with run.reporter.phase(f"stage 1, {phase}", total) as advance:
        advance(done)
        while done < total:
            # other rows than the steps before
            values = learner.train(data.rows(first + done, settings.batch_size), done, total)
            done += 1
            run.metrics.write(done, values, kind=kind, lineage=run.lineage)
            advance(done, f"answer loss {values['answer_loss']:.3f}")
            if every and done % every == 0 and done < total:
                write_checkpoint(
                    states, done, lambda target: learner.save(target / "learner"), {}, run.config.checkpoint.keep
                )
    rows = held_out_rows(data)
    own, shuffled = (learner.judge(rows, shuffled=s)["answer_loss"] for s in (False, True))
    run.metrics.write(done, {"answer_loss": own, "shuffled": shuffled}, kind=f"{kind}_held_out", lineage=run.lineage)
    run.reporter.say(
        f"stage 1, {phase}: held-out answer loss {own:.3f} from induced latents, {shuffled:.3f} from other problems'"
    )


def held_out_rows(data) -> list[SFTRow]:
    return [data.row(task, problem) for task, problem in data.held_out[:JUDGED]]

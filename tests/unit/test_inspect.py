"""`inspect`: what is shown is what was recorded, filters filter, hostile text is never sent, faults are a sentence."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re

import numpy as np
import pyarrow as pa
import pytest
from fake_run import damage_page, fake_records, fake_trajectory
from fake_run import fake_run as make_fake_run
from rich.console import Console
from typer.testing import CliRunner

from latent_grpo.common.learner_record import record_schema
from latent_grpo.common.metrics import MetricsWriter
from latent_grpo.common.schema import decode, encode
from latent_grpo.common.store import DumpError, LearnerStore, TrajectoryStore
from latent_grpo.common.terminal_text import visible, visible_token
from latent_grpo.deploy.cli.reading import reading
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.deploy.view.inspect import inspect
from latent_grpo.deploy.view.run_view import open_run
from latent_grpo.deploy.view.selection import Filters, InspectionError, parse_steps
from latent_grpo.deploy.view.thoughts import TokenTexts, drawn_noise, load
from latent_grpo.deploy.view.trajectory import diff


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    return make_fake_run(tmp_path_factory.mktemp("runs") / "fake").path


def shown(path, filters=None, width=100, **options):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    inspect(open_run(path), filters or Filters(), console=console, **options)
    return console.file.getvalue()


def shown_json(path, filters=None, **options):
    return json.loads(shown(path, filters, machine=True, limit=0, **options))


def one_group_run(path, rows, purpose="training", step=1):
    """A run with these trajectories only."""
    folder = make_fake_run(path, steps=1, learner=False)
    for file in folder.trajectories.rglob("*.parquet"):
        file.unlink()
    TrajectoryStore(folder.trajectories).write(step, encode(rows, 3), purpose)
    return folder.path


# --- overview


def test_the_overview_names_the_state_and_every_dumped_step(fake):
    text = shown(fake)
    assert "finished after 3 steps" in text
    overview = shown_json(fake)
    assert [(s["step"], s["dumped"]) for s in overview["steps"]] == [(1, 16), (2, 16), (3, 16)]
    assert overview["steps"][0]["metrics"]["rollout/steps"] > 0


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"latent_gap_mean": 3e-6, "hard_gap_mean": 2e-5, "drift_mean": 0.7}, "2.0e-05"),
        ({"latent_gap_mean": 4e-5, "hard_gap_mean": 2e-6, "drift_mean": 0.7}, "4.0e-05"),
        ({"drift_mean": 0.7}, "7.0e-01"),
    ],
    ids=["hard is larger", "latent is larger", "of 0.2.0"],
)
def test_the_gap_is_what_the_self_test_and_the_alarm_speak_of(tmp_path, metrics, expected):
    folder = make_fake_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    lines[0]["metrics"] |= {f"learner/{name}": value for name, value in metrics.items()}
    (folder.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = shown(folder.path)
    assert " gap " in text
    assert expected in text
    assert ("7.0e-01" in text) == (expected == "7.0e-01")


def test_an_unfinished_run_says_how_far_it_is(tmp_path):
    path = make_fake_run(tmp_path / "run", finished=False).path
    (path / "metrics.jsonl").write_text((path / "metrics.jsonl").read_text()[:-40])  # the last line is torn
    assert "unfinished: 2 of 3 steps recorded so far" in shown(path)


def test_a_run_that_has_just_begun_is_shown(tmp_path):
    path = make_fake_run(tmp_path / "run", steps=1, finished=False).path
    (path / "metrics.jsonl").unlink()
    for file in (path / "trajectories").rglob("*.parquet"):
        file.unlink()
    assert "no step has been recorded yet" in shown(path)
    with pytest.raises(InspectionError, match=r"no trajectory dumps yet: unfinished.*dump.every"):
        shown(path, Filters(failed=True))


# --- filters


@pytest.mark.parametrize(
    ("filters", "holds"),
    [
        (Filters(steps=parse_steps(["2"])), lambda row: row["step"] == 2),
        (Filters(steps=parse_steps(["1", "3-9"])), lambda row: row["step"] in (1, 3)),
        (Filters(task="chain"), lambda row: row["task"] == "chains"),
        (Filters(failed=True), lambda row: row["grade_reason"] != "correct"),
        (Filters(correct=True), lambda row: row["grade_reason"] == "correct"),
        (Filters(reason="ungraded"), lambda row: row["grade_reason"] == "ungraded"),
        (Filters(reason="length"), lambda row: row["finish_reason"] == "length"),
        (Filters(reason="masked"), lambda row: row["outcome"] == "masked"),
        (Filters(reason="all_equal"), lambda row: row["why"] == "all_equal"),
        (Filters(group="training/4/"), lambda row: row["group_uid"] == "training/4/chains/4"),
        (Filters(problem="chains/5"), lambda row: row["problem_uid"] == "chains/5"),
        (Filters(sample_index=0), lambda row: row["sample_index"] == 0),
        (Filters(sample_index=1), lambda row: row["sample_index"] == 1),
        (Filters(min_length=6), lambda row: row["length"] >= 6),
        (Filters(max_length=5), lambda row: row["length"] <= 5),
    ],
    ids=lambda value: str(value) if isinstance(value, Filters) else "",
)
def test_a_filter_gives_exactly_the_rows_that_it_names(fake, filters, holds):
    every = shown_json(fake, Filters(sort="length"))["trajectories"]
    found = shown_json(fake, filters)
    expected = {(r["group_uid"], r["sample_index"]) for r in every if holds(r)}
    assert 0 < len(expected) <= len(every) == 48
    assert {(r["group_uid"], r["sample_index"]) for r in found["trajectories"]} == expected


def test_a_filter_of_number_0_is_a_filter(fake):
    """The first sample of a group, and what a run wrote before its first resume."""
    for filters in (Filters(sample_index=0), Filters(lineage=0)):
        assert filters.choosing
        assert "one in full: add --show NUMBER" in shown(fake, filters), "matches are listed, not the overview"
        assert str(filters).endswith(" 0")
    assert not Filters().choosing


def test_a_partial_reward_does_not_make_an_answer_correct_and_is_shown(tmp_path):
    """A near miss gets a part of the reward, and a correct answer loses a part of it."""
    verdicts = [("wrong", 0.318), ("correct", 0.75), ("correct", 1.0), ("wrong", 0.0)]
    rng = np.random.default_rng(0)
    rows = [
        fake_trajectory(rng, step=1, group=0, index=i, reward=reward, reason=reason)
        for i, (reason, reward) in enumerate(verdicts)
    ]
    path = one_group_run(tmp_path / "partial", rows)
    steps = parse_steps(["1"])
    text = shown(path, Filters(steps=steps), width=200)
    assert "✗ wrong 0.318" in text
    assert "✓ correct 0.75" in text
    assert "✓ correct 1" not in text
    assert "✗ wrong 0 " not in text
    of = {name: shown_json(path, Filters(steps=steps, **{name: True})) for name in ("correct", "failed")}
    found = {name: [row["sample_index"] for row in rows["trajectories"]] for name, rows in of.items()}
    assert found == {"correct": [1, 2], "failed": [0, 3]}


def test_a_name_in_full_does_not_match_longer_ones(fake):
    found = shown_json(fake, Filters(problem="chains/1"))["trajectories"]
    assert {row["problem_uid"] for row in found} == {"chains/1"}  # and not chains/10, chains/11
    found = shown_json(fake, Filters(problem="hains/1"))["trajectories"]
    assert {row["problem_uid"] for row in found} == {"chains/1", "chains/10", "chains/11"}


@pytest.mark.parametrize(
    ("sort", "key"), [("length", "length"), ("latent", "latent"), ("reward", "reward"), ("advantage", "advantage")]
)
def test_sorting_ascends_and_descends_and_puts_what_has_none_last(fake, sort, key):
    for sign, order in (("", 1), ("-", -1)):
        values = [row[key] for row in shown_json(fake, Filters(sort=sign + sort))["trajectories"]]
        known = [v for v in values if v is not None]
        assert known == sorted(known, reverse=order < 0)
        assert all(v is None for v in values[len(known) :])


# --- one trajectory


def test_a_trajectory_in_full_is_its_record(fake):
    run = open_run(fake)
    row = run.rows(Filters(correct=True, steps=((1, 1),)))[0]
    found = shown_json(fake, Filters(correct=True, steps=((1, 1),)), show=1)
    thoughts = load(run, [row])[0]
    t, record = thoughts.trajectory, thoughts.record
    latent = [step for step in found["steps"] if step["kind"] == "latent"]
    assert len(latent) == len(t.latent_ids)
    assert len(found["steps"]) == t.num_steps == found["length"]
    for i, step in enumerate(latent):
        weights = np.exp(t.latent_scores[i]) / np.exp(t.latent_scores[i]).sum()
        np.testing.assert_allclose(step["weights"], weights, rtol=1e-5)
        np.testing.assert_allclose(step["noise"], t.latent_scores[i] - t.latent_log_probs[i], atol=1e-6)
        assert step["entropy"] == pytest.approx(-(weights * np.log(weights)).sum(), rel=1e-5)
        assert step["effective_width"] == pytest.approx(np.exp(step["entropy"]))
        assert step["old_log_prob"] == pytest.approx(record.old_log_probs[i])
        assert step["new_log_prob"] == pytest.approx(record.new_log_probs[i])
        assert step["ratio"] == pytest.approx(record.ratios[i])
        assert step["advantage"] == record.step_advantages[i]
    assert [step["id"] for step in found["steps"][len(latent) :]] == t.hard_ids.tolist()
    assert [r["sample_index"] for r in found["group"]] == [0, 1, 2, 3]
    text = shown(fake, Filters(correct=True, steps=((1, 1),)), show=1)
    for word in ("entropy", "width", "noise", "ratio", "advantage", "winner of its group", "gold 3", "its group"):
        assert word in text


def test_without_learner_records_the_rollouts_own_log_probs_are_shown_and_it_says_so(tmp_path):
    path = make_fake_run(tmp_path / "run", learner=False).path
    text = shown(path, Filters(steps=((1, 1),)), show=1)
    assert "learner: no record" in text
    assert "log π" in text
    found = shown_json(path, Filters(steps=((1, 1),)), show=1)
    assert found["learner"] is None
    d = np.array(found["steps"][0]["noise"])
    surrogate = (np.array(found["steps"][0]["weights"]) * (-d - np.exp(-d))).sum()  # METHOD §3.1
    assert found["steps"][0]["rollout_log_prob"] == pytest.approx(surrogate, rel=1e-5)
    with pytest.raises(InspectionError, match="no learner records"):
        shown(path, Filters(sort="advantage"))


def test_the_noise_is_drawn_again_from_the_key(tmp_path):
    import torch

    from latent_grpo.common.latent import sample_mixture_keyed
    from latent_grpo.common.noise import trajectory_key

    rng = np.random.default_rng(0)
    base = fake_trajectory(rng, step=1, group=0, index=2, reward=1.0)
    steps = len(base.latent_ids)
    key = trajectory_key(
        run_seed=0, purpose="training", problem_uid="chains/0", epoch=0, sample_index=2, policy_version=0
    )
    ids, scores, _, log_probs = sample_mixture_keyed(
        torch.randn(steps, 24),
        torch.full((steps,), key),
        torch.arange(steps),
        k=3,
        top_p=0.95,
        noise_scale=1.0,
        tau=1.0,
    )
    real = dataclasses.replace(
        base, latent_ids=ids.numpy().astype(np.int32), latent_scores=scores.numpy(), latent_log_probs=log_probs.numpy()
    )
    run = open_run(one_group_run(tmp_path / "run", [real]))
    thoughts = load(run, run.rows(Filters()))[0]
    np.testing.assert_allclose(drawn_noise(thoughts), thoughts.noise, atol=1e-5)
    assert "the trajectory's key gives the same noise again" in shown(run.folder.path, show=1)
    forged = one_group_run(tmp_path / "forged", [base])
    assert "do not belong together" in shown(forged, show=1)


def test_a_visible_only_run_has_no_thoughts_and_is_shown(tmp_path):
    path = make_fake_run(tmp_path / "run", k=0).path
    assert "no noise was drawn" in shown(path, Filters(steps=((1, 1),)), show=1)


def test_long_chains_are_cut_and_say_how_to_see_the_rest(fake):
    text = shown(fake, Filters(sort="-latent"), show=1, max_thoughts=1)
    assert "3 more latent steps: --thoughts 4" in text


def test_model_text_cannot_control_the_terminal(tmp_path):
    hostile = "\x1b]0;owned\x07\x1b[31m[red]x[/red] \u202e\r\x9b2J"
    rows = [fake_trajectory(np.random.default_rng(0), step=1, group=0, index=i, reward=1.0) for i in range(2)]
    rows = [
        dataclasses.replace(r, response_text=hostile, parsed_answer=hostile, gold_answer=hostile, problem_uid=hostile)
        for r in rows
    ]
    path = one_group_run(tmp_path / "run", rows)
    for text in (
        shown(path, Filters(sort="length"), width=400),
        shown(path, show=1, width=400),
        shown(path, Filters(reason="correct"), show=2, width=400),
    ):
        assert not set(text) & {"\x1b", "\x07", "\x9b", "\r", "\u202e"}
        assert "[red]x[/red]" in text


def test_tokens_show_their_spaces_and_control_characters():
    assert visible_token(" a\n") == "␣a⏎"
    assert visible("a\x00\u200b") == "a␀⟨200B⟩"
    assert (visible("می\u200cخواهم"), visible_token("\u200c")) == ("می\u200cخواهم", "⟨200C⟩")
    assert TokenTexts(None, "why")[7] == "#7"


# --- one problem at two versions


def two_evaluations(path):
    rng = np.random.default_rng(1)
    folder = make_fake_run(path, steps=1)
    store = TrajectoryStore(folder.trajectories)
    for step, rewards in ((0, (0.0, 0.0, 1.0)), (20, (0.0, 1.0, 0.0))):
        rows = [fake_trajectory(rng, step=step + 1, group=g, index=0, reward=r) for g, r in enumerate(rewards)]
        store.write(step, encode(rows, 3), "evaluation")
    return folder.path


def diff_of(path, a, b, filters=None, machine=False, thoughts=64):
    console = Console(file=io.StringIO(), width=120)
    diff(open_run(path), a, b, filters or Filters(), max_thoughts=thoughts, machine=machine, console=console)
    return console.file.getvalue()


def test_diff_shows_a_problem_whose_grade_changed_at_both_versions(tmp_path):
    path = two_evaluations(tmp_path / "run")
    found = json.loads(diff_of(path, 0, 20, machine=True))
    assert (found["problem"], found["common_problems"], found["changed_grade"]) == ("chains/1", 3, 2)
    assert (found["before"]["version"], found["after"]["version"]) == (0, 20)
    assert (found["before"]["reward"], found["after"]["reward"]) == (0.0, 1.0)
    text = diff_of(path, 0, 20, Filters(problem="chains/0"))
    assert "step 0, version 0" in text
    assert "step 20, version 20" in text


def test_diff_shows_so_many_thoughts_and_all_that_was_said(tmp_path):
    path = two_evaluations(tmp_path / "run")
    store = TrajectoryStore(RunFolder(path).trajectories)
    pair = [t for step in (0, 20) for t in decode(store.read(step, "evaluation")) if t.problem_uid == "chains/0"]
    silent = min(len(t.latent_ids) for t in pair)  # up to there neither of the two says anything
    whole, short = (diff_of(path, 0, 20, Filters(problem="chains/0"), thoughts=t) for t in (64, 1))
    steps = [set(re.findall(r"^ *([0-9]+) ", text, re.MULTILINE)) for text in (whole, short)]
    assert steps[0] - steps[1] == {str(i) for i in range(2, silent + 1)}
    assert f"{silent - 1} more latent steps: --thoughts {silent}" in short
    assert "more latent steps" not in whole


def test_diff_without_a_common_problem_says_how_to_get_one(fake):
    with pytest.raises(InspectionError, match=r"no problem was dumped at both steps.*dump.evaluation=true"):
        diff_of(fake, 1, 2)


@pytest.mark.parametrize("option", [("--show", "2"), ("--step", "20"), ("--limit", "3")])
def test_diff_refuses_an_option_that_it_would_ignore(tmp_path, option):
    path = two_evaluations(tmp_path / "run")
    result = CliRunner().invoke(reading, ["inspect", str(path), "--diff", "0", "20", *option])
    assert isinstance(result.exception, InspectionError)
    assert f"--diff and {option[0]} exclude each other" in str(result.exception)
    assert "--problem UID" in str(result.exception)
    found = CliRunner().invoke(reading, ["inspect", str(path), "--diff", "0", "20", "--problem", "chains/0"])
    assert "step 20, version 20" in found.output


# --- bad input: one clear sentence each


@pytest.mark.parametrize(
    ("filters", "sentence"),
    [
        (Filters(steps=((15, 15),)), r"--step 15: no trajectory of that step was dumped.*training: 1-3"),
        (Filters(reason="timeout"), r"matches --reason timeout; 48 were searched.*reasons found: .*wrong \("),
        (Filters(min_length=99), r"no trajectory matches --min-length 99.*lengths: 5 to 7"),
        (Filters(task="gsm8k"), r"tasks: chains"),
        (Filters(group="x"), r"for example, group training/0/chains/0"),
        (Filters(purpose="evaluation"), r"no such dumps.*it has dumps of training"),
    ],
)  # fmt: skip
def test_a_choice_without_a_match_says_what_there_is(fake, filters, sentence):
    with pytest.raises(InspectionError, match=sentence):
        shown(fake, filters)


def test_options_that_cannot_match_are_refused():
    for make, sentence in (
        (lambda: Filters(failed=True, correct=True), "exclude each other"),
        (lambda: Filters(min_length=5, max_length=4), "--min-length 5 is larger"),
        (lambda: Filters(sort="beauty"), "expected one of step, length"),
        (lambda: parse_steps(["ten"]), "expected a step such as 10"),
        (lambda: parse_steps(["9-3"]), "expected a step such as 10"),
    ):
        with pytest.raises(InspectionError, match=sentence):
            make()


def test_show_beyond_the_matches_is_refused(fake):
    with pytest.raises(InspectionError, match=r"--show 99: 48 trajectories match; give a number from 1 to 48"):
        shown(fake, show=99)


def test_a_missing_run_names_the_runs_beside_it(fake, tmp_path):
    with pytest.raises(InspectionError, match=r"no such run folder; runs in .*: fake"):
        open_run(fake.parent / "typo")
    with pytest.raises(InspectionError, match=r"is not a run folder: it has no config.json"):
        open_run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InspectionError, match=r"config.json is damaged \(Expecting"):
        open_run(tmp_path)


def test_a_damaged_dump_is_left_out_and_named_and_refused_where_it_alone_was_asked_for(tmp_path):
    path = make_fake_run(tmp_path / "run").path
    files = sorted((path / "trajectories").rglob("*.parquet"))
    files[1].write_bytes(files[1].read_bytes()[:-50])  # truncated
    files[2].write_bytes(b"PAR1 nothing of ours")
    text = shown(path, Filters(failed=True))
    assert text.count("left out: ") == 2
    assert "truncated, damaged or foreign" in " ".join(text.split())
    with pytest.raises(DumpError, match="not a readable Parquet file"):
        shown(path, Filters(steps=((2, 2),)))
    assert "left out: " in shown(path)  # the overview too


def test_machines_are_told_what_was_left_out(tmp_path):
    path = make_fake_run(tmp_path / "run").path
    first, second, _ = sorted((path / "trajectories").rglob("*.parquet"))
    for file, column in ((first, "reward"), (second, "latent_scores")):  # one that lists read, one that they do not
        damage_page(file, column)
    for found in (shown_json(path, Filters(failed=True)), shown_json(path, Filters(failed=True), show=20)):
        (sentence,) = found["left_out"]
        assert str(first) in sentence
        assert "truncated, damaged or foreign" in sentence
    assert {row["step"] for row in shown_json(path, Filters(failed=True))["trajectories"]} == {2, 3}
    assert shown_json(path)["left_out"] == []  # the overview only counts rows, which the damage does not touch
    second.write_bytes(second.read_bytes()[:-50])
    (sentence,) = shown_json(path)["left_out"]
    assert str(second) in sentence
    with pytest.raises(DumpError, match="damaged"):
        shown_json(path, Filters(steps=((2, 2),)), show=1)


def test_a_trajectory_whose_own_page_is_damaged_is_refused_in_a_sentence(tmp_path):
    path = make_fake_run(tmp_path / "run", steps=1).path
    (file,) = (path / "trajectories").rglob("*.parquet")
    damage_page(file, "latent_scores")
    assert shown_json(path, Filters(failed=True))["left_out"] == []
    with pytest.raises(DumpError, match=f"{file.name}: not a readable Parquet file.*damaged"):
        shown_json(path, show=1)


def test_diff_tells_machines_what_was_left_out(tmp_path):
    path = two_evaluations(tmp_path / "run")
    broken = path / "trajectories" / "evaluation" / "step=20" / "lineage-0000-part-0001.parquet"
    broken.write_bytes(b"PAR1 nothing of ours")
    found = json.loads(diff_of(path, 0, 20, machine=True))
    assert found["problem"] == "chains/1"
    (sentence,) = found["left_out"]
    assert str(broken) in sentence


def test_a_damaged_learner_record_costs_only_the_learners_columns(tmp_path):
    path = make_fake_run(tmp_path / "run", steps=1).path
    (file,) = (path / "learner_records").rglob("*.parquet")
    file.write_bytes(file.read_bytes()[:-50])
    assert shown_json(path, Filters(failed=True))["trajectories"][0]["outcome"] is None
    text = shown(path, Filters(failed=True), show=1)
    assert "log π" in text
    assert text.count("left out: ") == 1


def test_log_probs_that_are_no_numbers_are_shown_and_are_null_for_machines(tmp_path):
    folder = make_fake_run(tmp_path / "run", steps=1)
    store = LearnerStore(folder.learner_records)
    table = store.read(1).to_pylist()
    for row in table:
        for name in ("behaviour_log_probs", "old_log_probs", "new_log_probs", "ratios"):
            row[name] = row[name] and [math.nan, math.inf, *row[name][2:]]
        row["advantage"] = row["advantage"] and math.nan
    (file,) = folder.learner_records.rglob("*.parquet")
    file.unlink()
    store.write(1, pa.RecordBatch.from_pylist(table, schema=record_schema()))
    found = shown_json(folder.path, Filters(sort="length"), show=1)
    assert found["steps"][0]["rollout_log_prob"] is None
    assert found["steps"][1]["ratio"] is None
    assert "nan" in shown(folder.path, Filters(correct=True), show=1)


def test_a_foreign_or_old_parquet_is_refused_with_its_version(tmp_path):
    import pyarrow.parquet as pq

    path = make_fake_run(tmp_path / "run", steps=1).path
    (file,) = (path / "trajectories").rglob("*.parquet")
    table = pq.ParquetFile(file).read()
    pq.write_table(table.replace_schema_metadata({"latent_grpo.schema_version": "0", "latent_grpo.k": "3"}), file)
    with pytest.raises(DumpError, match="schema version 0, this program reads versions 1 and 2"):
        shown(path, Filters(failed=True))
    pq.write_table(pa.table({"a": [1]}), file)
    with pytest.raises(DumpError, match="not a trajectory batch"):
        shown(path, Filters(failed=True))


def test_a_resumed_run_shows_its_live_history(tmp_path):
    folder = make_fake_run(tmp_path / "run", steps=2)
    again = encode([fake_trajectory(np.random.default_rng(5), step=2, group=9, index=0, reward=1.0)], 3)
    TrajectoryStore(folder.trajectories).write(2, again, lineage=1)
    LearnerStore(folder.learner_records).write(2, fake_records(again, 0, np.random.default_rng(6)), lineage=1)
    with MetricsWriter(folder.path) as metrics:
        metrics.write(2, {"rollout/reward": 0.9}, lineage=1)
    overview = shown_json(folder.path)
    assert [(s["step"], s["dumped"]) for s in overview["steps"]] == [(1, 16), (2, 1)]
    assert overview["steps"][1]["metrics"] == {"rollout/reward": 0.9}
    assert shown_json(folder.path, Filters(steps=((2, 2),), lineage=0))["matches"] == 16


# --- what the run was made with, and its alarms


def test_the_manifest_is_shown(tmp_path):
    from latent_grpo.deploy.run.manifest import write_manifest

    folder = make_fake_run(tmp_path / "run", steps=1)
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    data = [{"task": "chains", "use": "training", "source": "chains.parquet", "xxh3_128": "f00d", "problems": 3}]
    write_manifest(folder, folder.config(), 0, model, data)
    overview = shown_json(folder.path)
    manifest = overview["manifest"]
    facts = overview["facts"]
    assert manifest["lineages"][0]["hardware"]["cpu"] in facts["hardware"]
    assert manifest["model"]["initial"]["files"]["model.safetensors"]["xxh3_128"] in facts["models"]
    assert "f00d" in facts["data"]
    assert "torch" in facts["versions"]
    text = shown(folder.path, width=400)
    for name in ("seeds", "data", "models", "program", "command", "hardware", "versions"):
        assert f" {name} " in text


def test_alarms_that_last_are_shown_with_what_to_do_and_those_that_are_over_are_counted(tmp_path):
    from latent_grpo.deploy.run.health import HealthMonitor

    folder = make_fake_run(tmp_path / "run")
    monitor = HealthMonitor(folder.path, folder.config(), 0)
    monitor.judge(1, {"rollout/truncated_share": 0.9, "rollout/ungraded_share": 0.5})
    for _ in range(2 * folder.config().health.window):  # until the mean has been below the limit for a whole window
        monitor.judge(2, {"rollout/truncated_share": 0.9, "rollout/ungraded_share": 0.0})
    monitor.close()
    text = " ".join(shown(folder.path, width=400).split())
    assert "alarm since step 1: 90% of rollouts were cut off by the token budget" in text
    assert "raise tasks.*.max_response_tokens" in text
    assert "1 earlier alarms are over" in text
    assert "could not be graded" not in text


def test_a_damaged_line_of_the_alarms_is_left_out_and_named_and_everything_else_is_shown(tmp_path):
    from latent_grpo.deploy.run.health import FILE, HealthMonitor

    folder = make_fake_run(tmp_path / "run")
    monitor = HealthMonitor(folder.path, folder.config(), 0)
    monitor.judge(1, {"rollout/truncated_share": 0.9})
    monitor.close()
    with (folder.path / FILE).open("a") as file:
        file.write("{damaged\n")
    text = " ".join(shown(folder.path, width=400).split())
    assert "alarm since step 1: 90% of rollouts were cut off by the token budget" in text
    assert "3 of 3 recorded steps" in text
    assert f"{FILE}, line 2: not JSON" in text
    overview = shown_json(folder.path)
    assert [alarm["step"] for alarm in overview["alarms"]] == [1]
    (sentence,) = overview["left_out"]
    assert f"{FILE}, line 2: not JSON" in sentence

"""Reports: one file that holds what was recorded, in whole groups, and says what is missing; same data, same bytes."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import math
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from fake_run import fake_run, fake_trajectory
from typer.testing import CliRunner

from latent_grpo.common.metrics import MetricsWriter
from latent_grpo.common.schema import encode
from latent_grpo.common.store import TrajectoryStore
from latent_grpo.deploy.view.report.build import PARTS, report_note, write_report
from latent_grpo.deploy.view.report.compare import comparison, write_comparison
from latent_grpo.deploy.view.report.curves import charts
from latent_grpo.deploy.view.report.sample import Sample, sample, sampled_groups, shorten_prompts, write_out
from latent_grpo.deploy.view.run_view import open_run
from latent_grpo.deploy.view.selection import Filters, InspectionError
from latent_grpo.deploy.view.thoughts import TokenTexts, load


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("runs") / "fake")


def contents(path, name="index"):
    """What the page unpacks."""
    packed = re.search(rf'<script type="application/gzip" id="{name}">([^<]*)</script>', path.read_text())[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_the_report_holds_every_trajectory_of_a_small_run_as_it_was_recorded(fake):
    path = write_report(open_run(fake.path))
    assert path == fake.path / "report.html"
    found = contents(path)
    run = open_run(fake.path)
    rows = {(row.group_uid, row.sample_index): row for row in run.rows(Filters())}
    assert len(found["trajectories"]) == len(rows) == 48
    for entry in found["trajectories"][::7]:
        row = rows[entry["uid"], entry["sample"]]
        thoughts = load(run, [row])[0]
        group = contents(path, f"g{entry['group']}")
        shown = group["samples"][entry["place"]]
        assert (entry["reward"], entry["grade"], entry["length"], entry["why"]) == (
            row.reward, row.grade_reason, row.length, row.why,
        )  # fmt: skip
        assert [[found["vocabulary"][i] for i in step] for step in shown["ids"]] == [
            [f"#{token}" for token in step] for step in thoughts.trajectory.latent_ids
        ]
        np.testing.assert_allclose(shown["logp"], thoughts.trajectory.latent_log_probs, rtol=1e-4)
        np.testing.assert_allclose(shown["noise"], thoughts.noise, rtol=1e-4, atol=1e-6)
        if thoughts.taught:
            np.testing.assert_allclose(shown["old"], thoughts.record.old_log_probs, rtol=1e-4)
            np.testing.assert_allclose(shown["ratio"], thoughts.record.ratios, rtol=1e-4)
            np.testing.assert_allclose(shown["advantage"], thoughts.record.step_advantages)


def test_the_file_needs_no_network_and_no_other_file(fake):
    page = write_report(open_run(fake.path)).read_text()
    outside = re.sub(r'<script type="application/gzip".*?</script>', "", page, flags=re.S)
    assert not re.search(r"https?://|<link|@import|src=|url\(", outside)
    assert "default-src 'none'" in outside


def test_the_same_data_give_the_same_bytes(fake, tmp_path):
    first, second = (write_report(open_run(fake.path), tmp_path / name) for name in ("a.html", "b.html"))
    assert first.read_bytes() == second.read_bytes()


def test_texts_of_a_model_never_stand_in_the_page_itself(tmp_path):
    import dataclasses

    folder = fake_run(tmp_path / "run", steps=1)
    hostile = "</script><script>alert(1)</script>{{program}}"
    row = fake_trajectory(np.random.default_rng(0), step=2, group=0, index=0, reward=1.0)
    row = dataclasses.replace(row, response_text=hostile, problem_uid=hostile, parsed_answer=hostile)
    TrajectoryStore(folder.trajectories).write(2, encode([row], 3))
    path = write_report(open_run(folder.path))
    assert "alert(1)" not in path.read_text()
    assert contents(path)["trajectories"][-1]["text"] == hostile


# --- the sample


def test_a_sample_is_whole_groups_spread_over_the_steps(fake):
    rows = open_run(fake.path).rows(Filters())
    groups = sampled_groups(rows, 24)
    assert all([row.sample_index for row in group] == [0, 1, 2, 3] for group in groups)
    assert [group[0].step for group in groups] == [1, 1, 2, 2, 3, 3]
    assert sum(map(len, sampled_groups(rows, 1000))) == 48


def test_steps_with_few_trajectories_leave_their_share_to_others(fake, tmp_path):
    folder = fake_run(tmp_path / "run", steps=2)
    one = encode([fake_trajectory(np.random.default_rng(0), step=3, group=0, index=0, reward=1.0)], 3)
    TrajectoryStore(folder.trajectories).write(3, one)
    groups = sampled_groups(open_run(folder.path).rows(Filters()), 25)
    assert [group[0].step for group in groups] == [1, 1, 1, 2, 2, 2, 3]


def test_a_limit_below_a_groups_size_still_shows_a_group(fake):
    (group,) = sampled_groups(open_run(fake.path).rows(Filters()), 1)
    assert (group[0].step, len(group)) == (3, 4)


def test_what_the_sample_leaves_out_is_said(fake, tmp_path):
    path = write_report(open_run(fake.path), tmp_path / "r.html", limit=8)
    notes = " ".join(contents(path)["notes"])
    assert "holds 4 of 48 dumped" in notes or "holds 8 of 48 dumped" in notes
    assert "tokens are shown as ids" in notes


def test_more_than_a_browser_can_hold_is_cut_and_said(fake):
    run = open_run(fake.path)
    made = sample(run, run.rows(Filters()), 48, TokenTexts(None), "mixture", max_components=200)
    assert 0 < len(made.trajectories) < 48
    assert {entry["step"] for entry in made.trajectories} >= {2, 3}  # thinned evenly, not cut off at the end
    assert any("limited to about 200 tokens" in note for note in made.notes)


def test_questions_are_prompts_without_what_all_have_in_common(fake):
    prompts = ["<u>Reason.\n12 + 7?<think>", "<u>Reason.\n13 * 7?<think>", "<u>Reason.\nHow many?<think>"]
    made = Sample(groups=[{"prompt": p} for p in prompts])
    shorten_prompts(made)
    assert [group["question"] for group in made.groups] == ["12 + 7?", "13 * 7?", "How many?"], "the mark is theirs"
    alone = Sample(groups=[{"prompt": prompts[0]}])
    shorten_prompts(alone)
    assert alone.groups[0]["question"] == prompts[0]


def test_chain_arithmetic_is_written_out_in_words(fake):
    tasks = [{"name": "sums", "path": "builtin:chain_arithmetic", "options": {"modulus": 10}}, {"name": "gsm8k"}]
    questions = [("sums", "2-9*5"), ("gsm8k", "2-9*5"), ("sums", "how many?"), ("sums", "2-9*")]
    made = Sample(
        trajectories=[{"group": i, "task": task} for i, (task, _) in enumerate(questions)],
        groups=[{"question": question} for _, question in questions],
    )
    write_out(made, {"tasks": tasks})
    assert [group.get("written") for group in made.groups] == ["2-9=3;3*5=5;", None, None, None]


# --- curves


def test_curves_are_the_metrics_and_shares_add_up(fake):
    found = {chart["title"]: chart for chart in charts(open_run(fake.path))}
    rows = open_run(fake.path).metric_rows("train")
    reward = found["Reward"]["series"][0]
    assert reward["x"] == [1, 2, 3]
    np.testing.assert_allclose(reward["y"], [row["metrics"]["rollout/reward"] for row in rows], rtol=1e-4)
    times = found["Where the time goes"]["series"]
    assert {series["name"] for series in times} == {"learner", "rollout wait", "other"}
    np.testing.assert_allclose(np.sum([series["y"] for series in times], axis=0), 1.0, rtol=1e-4)
    assert not any(title.startswith("Latent-SFT") for title in found)  # nothing is drawn that was not measured


def test_evaluations_have_their_errors_and_lost_values_leave_gaps(tmp_path):
    folder = fake_run(tmp_path / "run")
    with MetricsWriter(folder.path) as metrics:
        metrics.write(0, {"sums/pass_at_1": 0.5, "sums/standard_error": 0.02}, kind="evaluation")
        metrics.write(3, {"sums/pass_at_1": 0.75, "sums/standard_error": 0.01}, kind="evaluation")
        metrics.write(4, {"rollout/reward": math.nan})
    found = {chart["title"]: chart for chart in charts(open_run(folder.path))}
    assert found["pass@1"]["series"] == [{"name": "sums", "x": [0, 3], "y": [0.5, 0.75], "error": [0.02, 0.01]}]
    assert "first" not in found["pass@1"]["explain"]
    run = open_run(folder.path)
    run = dataclasses.replace(run, settings=run.settings | {"evaluation": {"interim_problems": 64}})
    assert "the first 64 problems of each task" in next(c for c in charts(run) if c["title"] == "pass@1")["explain"]
    assert found["Reward"]["series"][0]["x"] == [1, 2, 3]


# --- health


def test_the_health_panel_judges_the_runs_metrics_and_has_its_alarms(tmp_path):
    from latent_grpo.deploy.run.health import HealthMonitor

    folder = fake_run(tmp_path / "run")
    monitor = HealthMonitor(folder.path, folder.config(), 0)
    with MetricsWriter(folder.path) as metrics:
        for step in (4, 5, 6, 7, 8):
            values = {"rollout/truncated_share": 0.75, "learner/ratio_p99": 1.1, "learner/drift_mean": math.nan}
            metrics.write(step, values)
            monitor.judge(step, values)
    monitor.close()
    with (folder.path / "alarms.jsonl").open("a") as file:
        file.write("{damaged\n")
    found = contents(write_report(open_run(folder.path)))
    assert "alarms.jsonl, line 2: not JSON" in " ".join(found["notes"])
    health = found["health"]
    watched = {rule["name"]: rule for rule in health["watched"]}
    assert (watched["truncated share"]["state"], watched["truncated share"]["value"]) == ("alarm", 0.75)
    assert watched["truncated share"]["raised"] == 1
    assert "75% of rollouts were cut off" in watched["truncated share"]["message"]
    assert (watched["ratio p99"]["state"], watched["ratio p99"]["value"]) == ("fine", 1.1)
    assert (watched["log prob gap"]["state"], watched["log prob gap"]["value"]) == ("unknown", None)
    assert [alarm["step"] for alarm in health["alarms"]] == [4]
    assert "raise tasks.*.max_response_tokens" in health["alarms"][0]["sentence"]


def test_without_steps_or_with_foreign_settings_the_panel_says_why_it_is_not_there(tmp_path):
    folder = fake_run(tmp_path / "run")
    settings = json.loads((folder.path / "config.json").read_text())
    (folder.path / "config.json").write_text(json.dumps(settings | {"from_the_future": 1}))
    found = contents(write_report(open_run(folder.path)))
    assert found["health"] is None
    assert "from_the_future" in found["no_health"]
    (folder.path / "metrics.jsonl").unlink()
    assert "No step has been recorded yet" in contents(write_report(open_run(folder.path)))["no_health"]


# --- bad input


def test_a_run_without_dumps_gives_a_report_that_says_so(tmp_path):
    folder = fake_run(tmp_path / "run", finished=False)
    for file in folder.trajectories.rglob("*.parquet"):
        file.unlink()
    found = contents(write_report(open_run(folder.path)))
    assert found["trajectories"] == []
    assert "no trajectory dumps yet" in found["notes"][0]
    assert "unfinished" in found["state"]


def test_a_damaged_dump_and_missing_learner_records_are_named_in_the_report(tmp_path):
    folder = fake_run(tmp_path / "run", learner=False)
    file = sorted(folder.trajectories.rglob("*.parquet"))[0]
    file.write_bytes(file.read_bytes()[:100])
    found = contents(write_report(open_run(folder.path)))
    assert len(found["trajectories"]) == 32
    notes = " ".join(found["notes"])
    assert "truncated" in notes
    assert "no learner records" in notes


def test_a_filter_without_a_match_is_an_error_and_writes_nothing(tmp_path):
    folder = fake_run(tmp_path / "run")
    with pytest.raises(InspectionError, match="no trajectory of that step was dumped"):
        write_report(open_run(folder.path), filters=Filters(steps=((9, 9),)))
    with pytest.raises(InspectionError, match=r"cannot be written.*--out"):
        write_report(open_run(folder.path), tmp_path / "nowhere" / "r.html")
    assert not (folder.path / "report.html").exists()


def test_the_command_writes_the_chosen_part(fake, tmp_path):
    from latent_grpo.deploy.cli.app import app

    out = tmp_path / "failed.html"
    result = CliRunner().invoke(app, ["report", str(fake.path), "--failed", "--step", "2", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert str(out) in result.output.replace("\n", "")
    found = contents(out)["trajectories"]
    assert {entry["step"] for entry in found} == {2}
    assert not any(entry["correct"] for entry in found)


def test_a_run_ends_with_its_report_or_with_the_command_for_it(tmp_path):
    folder = fake_run(tmp_path / "run")
    assert str(folder.path / "report.html") in report_note(folder)
    assert (folder.path / "report.html").is_file()
    assert f"latent-grpo report {folder.path}" in report_note(folder, quick_bytes=10)
    (folder.path / "summary.json").write_text("no json\n")
    assert "no report was written: " in report_note(folder)


def test_every_part_of_the_page_is_in_the_package():
    from importlib import resources

    files = {file.name for file in (resources.files("latent_grpo.deploy.view.report") / "page").iterdir()}
    assert files == {"index.html", "style.css", *(f"{part}.js" for part in PARTS)}
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert "view/report/page/*" in project["tool"]["setuptools"]["package-data"]["latent_grpo.deploy"]


# --- several runs --------------------------------------------------------------------------------------------------


def two_runs(folder):
    """Two runs of the same kind; the second has more steps and another seed."""
    runs = [fake_run(folder / "a", steps=2), fake_run(folder / "b", steps=12, seed=1)]
    return [open_run(run.path) for run in runs]


def test_runs_are_compared_in_the_same_charts_and_by_the_settings_that_differ(tmp_path):
    path = write_comparison(two_runs(tmp_path))
    assert path == tmp_path / "comparison.html"
    found = contents(path)
    by_title = {chart["title"]: chart["series"] for chart in found["charts"]}
    assert [series["name"] for series in by_title["Chain length: latent steps"]] == ["a", "b"]
    assert [len(series["x"]) for series in by_title["Gradient norm"]] == [2, 12]
    assert "Where the time goes" not in by_title, "shares of two runs cannot lie upon each other"
    facts = dict(found["facts"])
    assert facts["steps"] == "a: 2 · b: 12"
    assert "k" not in facts
    assert facts["b"].startswith("finished after 12 steps, last reward ")
    assert found["trajectories"] == []


def test_runs_of_the_same_name_keep_apart_and_the_same_run_is_refused(tmp_path):
    one, other = fake_run(tmp_path / "x" / "a"), fake_run(tmp_path / "y" / "a")
    index = comparison([open_run(one.path), open_run(other.path)], ["p", "q"])
    assert [name for name, _ in index["facts"][:2]] == ["p", "q"]
    named = contents(write_comparison([open_run(one.path), open_run(other.path)], tmp_path / "out.html"))
    assert [name for name, _ in named["facts"][:2]] == [str(one.path), str(other.path)]
    with pytest.raises(InspectionError, match="is given twice"):
        write_comparison([open_run(one.path), open_run(one.path)])


def test_the_command_compares_runs_and_refuses_filters_then(tmp_path):
    from latent_grpo.deploy.cli.app import app

    paths = [str(view.folder.path) for view in two_runs(tmp_path)]
    assert CliRunner().invoke(app, ["report", *paths]).exit_code == 0
    refused = CliRunner().invoke(app, ["report", *paths, "--failed"])
    assert isinstance(refused.exception, InspectionError)
    assert "does not have" in str(refused.exception)

"""The progress of a phase: its pace and remaining time hold for steps of any length, and it moves within a step."""

from __future__ import annotations

import io
from datetime import datetime

import pytest
from rich.console import Console

from latent_grpo.deploy.run.progress import LOG_EVERY_S, Pace, Reporter, StepShare, duration, end_of, first_step_line


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


@pytest.mark.parametrize("each", [0.001, 0.5, 29.0, 31.0, 400.0, 9000.0])
@pytest.mark.parametrize("before", [0, 12])
def test_the_remaining_time_is_right_for_steps_of_any_length(each, before):
    clock = Clock()
    pace = Pace(40, "steps", clock)
    pace.advance(before)
    assert (pace.seconds_each, pace.left_s, pace.rate, pace.left) == (None, None, "", "")
    for done in range(before + 1, 38):
        clock.time += each
        pace.advance(done)
        assert pace.left_s == pytest.approx((40 - done) * each)


def test_the_remaining_time_falls_within_a_step_and_a_fraction_is_no_step():
    clock = Clock()
    pace = Pace(4, "steps", clock)
    pace.advance(0)
    clock.time += 60
    pace.advance(0.9, "rollout 9/10 groups")
    assert pace.left_s is None
    clock.time += 40
    pace.advance(1)
    clock.time += 30
    pace.advance(1.3)
    assert (pace.seconds_each, pace.left_s, pace.done) == (100, 270, 1.3)
    clock.time += 1000  # a step that takes longer than those before
    assert pace.left_s == 0


def test_a_pace_that_changes_is_that_of_the_last_steps():
    clock = Clock()
    pace = Pace(1000, "steps", clock)
    pace.advance(0)
    for done in range(1, 200):
        clock.time += 1.0 if done < 100 else 50.0
        pace.advance(done)
    assert pace.seconds_each == pytest.approx(50)


@pytest.mark.parametrize(
    ("each", "rate"),
    [(0.01, "100 steps/s"), (0.8, "1.25 steps/s"), (4.24, "4.2 s/step"), (43, "43 s/step"), (126, "2.1 min/step")],
)
def test_the_unit_suits_the_length_of_a_step(each, rate):
    clock = Clock()
    pace = Pace(10, "steps", clock)
    pace.advance(0)
    clock.time += each
    pace.advance(1)
    assert pace.rate == rate


def test_durations_and_ends_are_readable():
    assert [duration(s) for s in (0.0, 8.2, 43.4, 99.6, 130, 5_990, 12_240)] == [
        *("0.0 s", "8.2 s", "43 s", "100 s", "2.2 min", "100 min", "3.4 h")
    ]
    noon = datetime(2026, 11, 28, 12, 0)
    assert [end_of(9_120, noon), end_of(54_600, noon)] == ["14:32", "Nov 29 03:10"]


def test_a_log_says_the_pace_and_no_remaining_time_before_there_is_one():
    clock = Clock()
    console = Console(file=io.StringIO(), width=200, highlight=False, soft_wrap=True)
    with Reporter(console, clock).phase("evaluate", 16, "problems") as advance:
        advance(0)
        clock.time += LOG_EVERY_S + 1
        advance(0, "worker 1 is starting")
        clock.time += 4
        advance(4)
        clock.time += LOG_EVERY_S + 1
        advance(8)
        clock.time += 40
        advance(16)
    assert console.file.getvalue().splitlines() == [
        "evaluate: 16 problems",
        "evaluate: 0/16 · worker 1 is starting",
        "evaluate: 8/16 · 4.5 s/problem · 36 s left",
        "evaluate: 16/16 · 4.8 s/problem",
        "evaluate: done after 76 s",
    ]


@pytest.mark.parametrize("seconds", [29.0, 31.0, 300.0])
def test_a_bar_shows_pace_and_remaining_time(seconds):
    clock = Clock()
    console = Console(file=io.StringIO(), width=160, force_terminal=True, highlight=False)
    with Reporter(console, clock).phase("latent_grpo", 16) as advance:
        advance(0)
        clock.time += seconds
        advance(1, "reward 0.250")
    text = console.file.getvalue()
    assert f"1/16 {duration(seconds)}/step" in text
    assert f"{duration(15 * seconds)} left" in text


def test_the_share_of_a_step_follows_its_parts_and_never_falls():
    clock = Clock()
    share = StepShare(clock)
    assert share.at("rollout", 0.5) == (0.0, "rollout 50%")  # nothing is known of a first step
    share.learn(rollout=10, learner=30, publish=0)
    seen = []
    for arrived in (0.0, 0.4, 1.0):
        clock.time += 6
        seen.append(share.at("rollout", arrived)[0])
    for seconds in (0, 15, 15, 60):  # the learner takes longer than in the step before
        clock.time += seconds
        done, note = share.at("learner", None)
        seen.append(done)
    assert seen == pytest.approx([0.0, 0.1, 0.25, 0.25, 0.625, 0.99, 0.99])
    assert note == "learner 90 s"
    assert share.at("publish", None)[0] == 0.99  # it took no time before
    share.learn(rollout=10, learner=90, publish=1)
    assert share.at("rollout", 0.0)[0] == 0.0


def test_the_first_step_says_what_a_step_costs_and_when_the_run_ends():
    noon = datetime(2026, 11, 28, 12, 0)
    line = first_step_line("training", 43.3, 99, {"rollout": 6.5, "learner": 34.3, "publish": 2.5}, noon)
    assert line == (
        "training: the first step took 43 s (rollout 6.5 s, learner 34 s, publish 2.5 s); 99 more at this pace take "
        "71 min, until 13:11"
    )
    assert first_step_line("Latent-SFT", 4.0, 0, {}) == "Latent-SFT: the step took 4.0 s"


def test_what_data_say_is_text_whatever_it_looks_like():
    console = Console(file=io.StringIO(), width=200, record=True, force_terminal=True)
    reporter = Reporter(console)
    reporter.say("an answer [/b] and [a,b]")  # markup that would end in an error, or vanish
    reporter.say("[yellow]task \x1b]8;;evil\x07 [red]x[/]")
    reporter.say("two\nlines")
    shown = console.file.getvalue()
    assert "an answer [/b] and [a,b]" in shown
    assert "task ␛]8;;evil␇ [red]x" in shown
    assert "\x1b]8" not in shown
    assert "two\nlines" in shown

"""The authors' protocol (METHOD §8) on a made checkpoint: what is sampled, what both protocols share, and the figures.

The figures are computed again from the samples, in plain Python and with nothing of the program but its decoded rows.
"""

from __future__ import annotations

import collections
import io
import json
import re
import statistics

import authors_files
import pytest
from rich.console import Console

from latent_grpo.common.config import ConfigError, load_config, of_model
from latent_grpo.common.models import load_model, load_tokenizer
from latent_grpo.common.schema import concat, decode
from latent_grpo.deploy.checks.validate import validate
from latent_grpo.deploy.controller import gather
from latent_grpo.deploy.evaluation.evaluate import evaluation_config, measure
from latent_grpo.deploy.evaluation.report import protocol_line, report, show, table
from latent_grpo.deploy.reproduce.in_process import InProcessPool, versioned
from latent_grpo.deploy.run.preparation import prepare
from latent_grpo.deploy.run.progress import Reporter

QUIET = Reporter(Console(quiet=True))


@pytest.fixture(scope="module")
def authors(tmp_path_factory):
    """A folder with made files: `llama`, `qwen` and `data`."""
    folder = tmp_path_factory.mktemp("authors")
    for kind in ("llama", "qwen"):
        authors_files.checkpoint(folder / kind, kind)
    authors_files.data(folder / "data", problems=3)
    return folder


class Evaluated:
    """An evaluation of a made checkpoint in this process, with the samples that it kept."""

    def __init__(self, authors, kind, tasks, *overrides):
        model = str(authors / kind)
        self.config, _, _ = evaluation_config(model, list(overrides), tasks=tasks, data=str(authors / "data"))
        prepared = prepare(self.config, QUIET)
        pool = InProcessPool(self.config, prepared, "test")
        pool.publish(versioned(0, load_model(model, "float32").named_parameters()))
        self.problems = prepared.problems
        self.tokenizer, self.samples, self.requests = load_tokenizer(model), [], []

        def ask(requests, arrived):
            self.requests += requests
            return gather(pool, requests, arrived)

        def keep(groups):
            self.samples += decode(concat(groups))

        self.results = measure(self.config, ask, self.problems.evaluation, "t", reporter=QUIET, keep=keep).tasks
        self.by_label = {result.label: result for result in self.results}

    def report(self):
        return report(
            self.results, self.problems.evaluation, self.config, model="m", checksum="c", chain=None, versions={}
        )


# --- the protocol once more, independently


def box_of(text):
    """What the last box holds; None without one, and where it is not closed."""
    _, box, after = text.rpartition("\\boxed{")
    return after.partition("}")[0] if box and "}" in after else None


def answer_of(text):
    if box_of(text):
        return box_of(text)
    if text.rpartition("####")[2].strip() and "####" in text:
        return text.rpartition("####")[2].strip()
    numbers = re.findall(r"-?[0-9]+(?:\.[0-9]+)?", text)
    return numbers[-1] if numbers else None


def is_right(sample, text, level):
    answer = answer_of(text) if level == "low" else None
    if level == "low":
        try:
            return abs(float(answer) - float(sample.gold_answer)) <= 1e-5
        except (TypeError, ValueError):
            return False
    box = box_of(text)
    if level == "choice":
        letter = box if box in ("A", "B", "C", "D") else (re.findall(r"\b[ABCD]\b", text) or [None])[-1]
        return letter == sample.gold_answer
    return box == sample.gold_answer


def plainly(evaluated, task, level, noise, runs):
    """(pass@1, mean length, runs' accuracies) of the samples, by the protocol's text."""
    eos = evaluated.tokenizer.eos_token_id
    right, lengths, by_run = collections.defaultdict(list), [], collections.defaultdict(list)
    for sample in evaluated.samples:
        settings = sample.sampling
        if (sample.task, settings.noise_mode, settings.top_k) != (task, noise, 0) or sample.sample_index >= runs:
            continue
        proxies, hard = [step[0] for step in sample.latent_ids.tolist()], sample.hard_ids.tolist()
        text = evaluated.tokenizer.decode(proxies + [i for i in hard if i != eos])
        right[sample.problem_uid].append(is_right(sample, text, level))
        by_run[sample.sample_index].append(right[sample.problem_uid][-1])
        cut = hard[-1:] != [eos]
        if level != "low" or not cut:
            lengths.append(len(proxies) + len(hard))
    return (
        statistics.mean(statistics.mean(of) for of in right.values()),
        statistics.mean(lengths),
        [statistics.mean(by_run[run]) for run in range(runs)],
    )


def check(evaluated, task, level, noise, runs):
    found = evaluated.by_label[f"{task}/reference" + ("" if noise == "off" else "-noise")]
    rate, length, each = plainly(evaluated, task, level, noise, runs)
    assert found.pass_at_1 == pytest.approx(rate)
    assert found.chain_length == pytest.approx(length)
    assert found.runs == pytest.approx(each)
    assert 0 < rate < 1, "the samples must say something"
    return found


# --- low tasks


@pytest.fixture(scope="module")
def low(authors):
    """Both protocols; svamp's samples are cut early."""
    return Evaluated(authors, "llama", ["gsm8k-aug", "svamp"], "evaluation.protocol=both",
                     "evaluation.tasks.1.max_response_tokens=7")  # fmt: skip


def test_low_tasks_are_measured_once_by_either_protocol(low):
    assert list(low.by_label) == ["gsm8k-aug", "gsm8k-aug/reference", "svamp", "svamp/reference"]
    asked = collections.Counter((r.task, r.sampling.top_k, len(r.sample_indices)) for r in low.requests)
    assert asked == {(task, top_k, 5): 3 for task in ("gsm8k-aug", "svamp") for top_k in (30, 0)}
    assert {(r.sampling.noise_mode, r.sampling.temperature, r.sampling.top_p) for r in low.requests} == {
        ("off", 0.6, 0.95)
    }
    assert len({r.group_uid for r in low.requests}) == len(low.requests)


@pytest.mark.parametrize("task", ["gsm8k-aug", "svamp"])
def test_figures_of_low_tasks_are_those_of_a_plain_computation(low, task):
    found = check(low, task, "low", "off", 5)
    assert found.pass_at_1 != low.by_label[task].pass_at_1, "this project's protocol knows no number without a box"
    if task == "svamp":
        assert found.invalid_rate > 0.2
        assert found.chain_length < low.by_label[task].chain_length, "cut samples have no part in the mean length"
    assert low.by_label[task].chain_length == pytest.approx(
        statistics.mean(s.num_steps for s in low.samples if s.task == task and s.sampling.top_k == 30)
    )


def test_samples_are_kept_with_the_grades_of_the_protocol_that_asked_for_them(low):
    unboxed = [s for s in low.samples if s.grade_reason == "correct" and "boxed" not in s.response_text]
    assert unboxed
    assert {s.sampling.top_k for s in unboxed} == {0}


def test_both_protocols_share_the_samples_where_they_sample_alike(authors, low):
    """With no top_k of one's own nothing differs but the rules; the figures stay those of separate samples."""
    shared = Evaluated(authors, "llama", ["gsm8k-aug"], "evaluation.protocol=both", "top_k=0", "evaluation.runs=3")
    assert [len(r.sample_indices) for r in shared.requests] == [5, 5, 5]
    check(shared, "gsm8k-aug", "low", "off", 5)
    ours, theirs = shared.results
    assert (ours.samples, theirs.samples) == (9, 15)
    assert theirs == low.by_label["gsm8k-aug/reference"]
    assert ours.pass_at_1 == pytest.approx(statistics.mean(
        s.reward for s in shared.samples if s.sample_index < 3
    )), "kept as this project grades them"  # fmt: skip


def test_pass_at_k_of_low_tasks_is_asked_for_with_noise(authors):
    found = Evaluated(authors, "llama", ["svamp"], "evaluation.protocol=reference", "evaluation.samples=8",
                      "evaluation.sampled_problems=2")  # fmt: skip
    noisy = [r for r in found.requests if r.sampling.noise_mode == "one_sided"]
    assert [len(r.sample_indices) for r in noisy] == [8, 8]
    (result,) = found.results
    assert [at.k for at in result.pass_at_k] == [1, 4, 8]
    assert {at.problems for at in result.pass_at_k} == {2}
    assert result.pass_at_k[-1].value >= result.pass_at_k[0].value > 0


# --- high tasks


@pytest.fixture(scope="module")
def high(authors):
    budgets = [f"evaluation.tasks.{i}.max_response_tokens=40" for i in range(3)]
    return Evaluated(
        authors, "qwen", ["math500", "aime2024", "gpqa"], "evaluation.protocol=reference", "latent_exit=first", *budgets
    )


def test_high_tasks_are_measured_with_the_noise_off_and_on(high):
    assert list(high.by_label) == [
        f"{task}/{mark}" for task in ("math500", "aime2024", "gpqa") for mark in ("reference", "reference-noise")
    ]
    asked = {(r.task, r.sampling.noise_mode): len(r.sample_indices) for r in high.requests}
    assert asked == {
        (task, noise): runs
        for task, runs in (("math500", 4), ("aime2024", 64), ("gpqa", 8))
        for noise in ("off", "one_sided")
    }
    assert {r.sampling.top_k for r in high.requests} == {0}


@pytest.mark.parametrize("noise", ["off", "one_sided"])
@pytest.mark.parametrize(
    ("task", "level", "runs"), [("math500", "math", 4), ("aime2024", "math", 64), ("gpqa", "choice", 8)]
)
def test_figures_of_high_tasks_are_those_of_a_plain_computation(high, task, level, runs, noise):
    found = check(high, task, level, noise, runs)
    ks = [] if noise == "off" else [k for k in (1, 4, 8, 16, 32, 64) if k <= runs]
    assert [at.k for at in found.pass_at_k] == ks, "pass@k is that of the runs with noise"
    if ks:
        assert found.pass_at_k[0].value == pytest.approx(found.pass_at_1)
        assert found.pass_at_k[-1].value >= found.pass_at_1


def test_more_samples_with_noise_are_shared_by_both_rows(authors):
    found = Evaluated(authors, "qwen", ["math500"], "evaluation.protocol=reference", "evaluation.samples=8",
                      "evaluation.tasks.0.max_response_tokens=40")  # fmt: skip
    assert {r.sampling.noise_mode: len(r.sample_indices) for r in found.requests} == {"off": 4, "one_sided": 8}
    quiet, noisy = found.results
    assert [at.k for at in quiet.pass_at_k] == [1, 4, 8]
    assert quiet.pass_at_k == noisy.pass_at_k
    assert (noisy.samples, len(noisy.runs)) == (12, 4), "pass@1 is that of the protocol's repetitions"


def test_gpqa_asks_what_the_reference_asks(high):
    (task,) = [task for task in high.problems.evaluation if task.name == "gpqa"]
    prompt = task.renderer.render(task.source.problem(0))
    assert prompt == (
        f"<|im_start|>system\n{authors_files.INSTRUCTION}<|im_end|>\n<|im_start|>user\nWhich letter?\n"
        "(A) wrong 2\n(B) wrong 1\n(C) wrong 3\n(D) this one\n"
        f"{authors_files.LETTER_LINE}<|im_end|>\n<|im_start|>assistant\n<think>"
    )
    assert task.source.problem(0).answer == "D"
    assert task.first_prompt()[1] == []


def test_both_protocols_ask_gpqa_differently_and_the_rest_alike(authors):
    config, _, _ = evaluation_config(
        str(authors / "qwen"), ["evaluation.protocol=both"], tasks=["math500", "gpqa"], data=str(authors / "data")
    )
    tasks = prepare(config, QUIET).problems.evaluation
    assert [(task.name, task.protocols) for task in tasks] == [
        ("math500", ("ours", "reference")), ("gpqa", ("ours",)), ("gpqa", ("reference",)),
    ]  # fmt: skip
    ours, theirs = (task.renderer.render(task.source.problem(0)) for task in tasks[1:])
    assert "A. " in ours
    assert "(A) " in theirs


# --- what is said


def test_every_figure_says_its_protocol(low, high):
    content = json.loads(json.dumps(low.report(), allow_nan=False))
    assert content["settings"]["protocol"] == "both"
    assert [(t["task"], t["protocol"], t["noise"]) for t in content["tasks"]] == [
        (task, protocol, "off") for task in ("gsm8k-aug", "svamp") for protocol in ("ours", "reference")
    ]
    ours, theirs = content["tasks"][:2]
    assert (ours["verifier"], ours["graded_text"], ours["sampling"]["top_k"]) == ("number", "visible", 30)
    assert theirs["verifier"] == "reference_number"
    assert theirs["graded_text"] == "whole, with proxy tokens"
    assert theirs["lengths"] == "samples that the budget did not cut"
    assert theirs["sampling"].items() >= {"runs": 5, "top_k": 0, "temperature": 0.6, "noise_mode": "off"}.items()
    assert [(m["protocol"], m["problems"]) for m in content["macro_averages"]] == [("ours", 6), ("reference", 6)]
    assert content["macro_average"]["protocol"] == "ours"
    assert [(m["protocol"], m["noise"]) for m in high.report()["macro_averages"]] == [
        ("reference", "off"), ("reference", "one_sided"),
    ]  # fmt: skip
    console = Console(width=200, record=True, file=io.StringIO())
    show(console, table([*low.results, *high.results], "m"))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert {tuple(line[:2]) for line in lines if line[:1] == ["svamp"]} == {("svamp", "ours"), ("svamp", "reference,")}
    assert [" ".join(line[1:4]) for line in lines if line[:1] == ["math500"]] == [
        "reference, noise off", "reference, noise on",
    ]  # fmt: skip
    metrics = [name for result in low.results for name in result.metrics()]
    assert len(metrics) == len(set(metrics))
    assert "svamp/reference/pass_at_1" in metrics


def test_made_files_of_a_few_problems_have_no_published_numbers_beside_them(low, high):
    assert all(t["published"] == [] for evaluated in (low, high) for t in evaluated.report()["tasks"])


def test_what_the_protocol_does_is_said_at_the_start(low):
    assert protocol_line(low.config) == (
        "protocol reference: temperature 0.6, top_p 0.95, no top_k; repetitions: gsm8k-aug 5, svamp 5"
    )
    mixed = load_config("quickstart", ["evaluation.protocol=both"])
    assert protocol_line(mixed).endswith("repetitions: none; chain-arithmetic-held-out: by protocol ours alone")
    assert protocol_line(load_config("quickstart")) is None


def test_the_reference_s_protocol_is_refused_for_tasks_that_it_does_not_know(tmp_path):
    config = load_config("quickstart", ["evaluation.protocol=reference", f"runs_folder={tmp_path}"])
    with pytest.raises(
        ConfigError, match=r"chain-arithmetic-held-out: evaluation\.protocol reference measures gsm8k-aug,"
    ):
        prepare(config, QUIET)


def test_repetitions_that_no_worker_can_hold_are_refused(authors):
    config, _, _ = evaluation_config(
        str(authors / "qwen"), ["evaluation.protocol=reference", "rollout.max_rows=32"], tasks=["aime2024"],
        data=str(authors / "data"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"rollout\.max_rows \(32\) is smaller than the 64 repetitions"):
        prepare(config, QUIET)


def test_repetitions_that_the_protocol_would_ignore_are_refused(authors):
    given = [*of_model(str(authors / "llama")), "evaluation.protocol=reference", "evaluation.runs=2"]
    with pytest.raises(ConfigError, match=r"evaluation\.runs \(2\) has no effect .* set it back to 5$"):
        validate(load_config("paper-low", given))

"""What Latent-SFT learns from: unusable problems are dropped with a count, bad settings are named."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from latent_grpo.common.config import ConfigError, TaskConfig, load_config
from latent_grpo.common.encoding import TextEncoder
from latent_grpo.common.prompts import resolve_tokens
from latent_grpo.common.tasks.arithmetic import ChainArithmetic, make_arithmetic_tokenizer
from latent_grpo.common.tasks.sources import StoredTask, TaskError
from latent_grpo.common.types import Problem
from latent_grpo.deploy.run.problems import prepare_task, read_task
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.sft_data import NO_BOX, NO_CHAIN, TOO_LONG, TOO_SHORT, prepare_sft
from latent_grpo.learner.sft.learner import least_calls, plan_rows, self_feeding_share
from latent_grpo.learner.sft.rows import encode_chain

TOKENIZER = make_arithmetic_tokenizer()
FACTS = resolve_tokens(TOKENIZER, len(TOKENIZER), latent=True)
PLAIN = Problem(uid="plain/0", task="plain", messages=(("user", "1+1?"),), answer="2")


def stored(tmp_path, cots: list[str], *overrides: str):
    """A quickstart on a file whose rows have these chains of thought."""
    rows = [{"problem": f"{i % 11}+1?", "answer": "7", "cot": cot} for i, cot in enumerate(cots)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = TaskConfig(name="rows", path=str(path), max_prompt_tokens=32, max_response_tokens=12, verifier="number")
    config = load_config("quickstart", list(overrides)).model_copy(update={"tasks": [task]})
    return config, [prepare_task(read_task(task, config), config, TextEncoder(TOKENIZER))]


def test_unusable_chains_are_dropped_and_counted_by_reason(tmp_path):
    good = "1+2=3;"
    config, tasks = stored(tmp_path, ["", "3", good * 9, *[good] * 12])
    (task,) = prepare_sft(config, tasks, TextEncoder(TOKENIZER), FACTS).tasks
    dropped = task.source.dropped
    assert (dropped[NO_CHAIN], dropped[TOO_SHORT], dropped[TOO_LONG]) == ([0], [1], [2])
    assert task.source.size == 11  # twelve good ones, one of them held out


VISIBLE = "1+2=3;\\boxed{3}"


def with_rows(tmp_path, rows: list[dict], **columns):
    """A quickstart on these rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = TaskConfig(name="rows", path=str(path), columns=columns, max_response_tokens=24, verifier="number")
    config = load_config("quickstart").model_copy(update={"tasks": [task]})
    return config, [prepare_task(read_task(task, config), config, TextEncoder(TOKENIZER))]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"solution": VISIBLE}, {}),
        ({"solution": VISIBLE, "answer": "3"}, {}),
        ({"cot_answer": VISIBLE}, {}),
        ({"cot_answer": VISIBLE, "answer": ""}, {}),
        ({"cot_answer": VISIBLE}, {"answer": "cot_answer"}),
        ({"answer": VISIBLE}, {}),
        ({"text": VISIBLE, "answer": "3"}, {"solution": "text"}),
        ({"solution": f"</think>{VISIBLE}"}, {}),
    ],
)
def test_a_solution_is_trained_whole_and_its_last_box_is_the_gold_answer(tmp_path, row, columns):
    config, tasks = with_rows(tmp_path, [{"problem": "1+2?", "cot": "1+2=3;", **row}] * 12, **columns)
    problem = tasks[0].source.problem(0)
    assert problem.answer == "3"
    data = prepare_sft(config, tasks, TextEncoder(TOKENIZER), FACTS)
    expected = TOKENIZER.encode(f"</think>{VISIBLE}", add_special_tokens=False)
    assert data.row(tasks[0], problem).hard_ids.tolist() == [*expected, TOKENIZER.eos_token_id]


def test_a_solution_column_can_be_left_out(tmp_path):
    rows = [{"problem": "1+2?", "cot": "1+2=3;", "answer": "3", "solution": VISIBLE}] * 12
    config, tasks = with_rows(tmp_path, rows, solution=None)
    data = prepare_sft(config, tasks, TextEncoder(TOKENIZER), FACTS)
    expected = TOKENIZER.encode("</think>\\boxed{3}", add_special_tokens=False)
    assert data.row(tasks[0], tasks[0].source.problem(0)).hard_ids.tolist() == [*expected, TOKENIZER.eos_token_id]
    with pytest.raises(TaskError, match=r"no column 'text'.*columns are answer, cot, problem, solution.* or null"):
        with_rows(tmp_path, rows, solution="text")


def test_a_solution_without_a_box_teaches_no_answer_and_is_dropped(tmp_path):
    good, bad = ({"problem": "1+2?", "cot": "1+2=3;", "answer": "3", "solution": s} for s in (VISIBLE, "1+2=3;"))
    config, tasks = with_rows(tmp_path, [bad, *[good] * 12])
    (task,) = prepare_sft(config, tasks, TextEncoder(TOKENIZER), FACTS).tasks
    assert task.source.dropped[NO_BOX] == [0]
    config, tasks = with_rows(tmp_path, [bad] * 12)
    with pytest.raises(TaskError, match=r"task rows: 12 of 12 solutions have no \\boxed\{\} answer.*columns\.solution"):
        prepare_sft(config, tasks, TextEncoder(TOKENIZER), FACTS)
    without = [{key: text for key, text in row.items() if key != "answer"} for row in (bad, *[good] * 9)]
    _, tasks = with_rows(tmp_path, without)
    assert tasks[0].source.dropped == {"empty answer": [0]}, "without an answer column it cannot be graded either"


def test_dropped_chains_are_a_warning_and_their_counts_are_kept(tmp_path):
    config, tasks = stored(tmp_path, ["", "", "3", *["1+2=3;"] * 12])
    other = dataclasses.replace(tasks[0], source=StoredTask(TaskConfig(name="[plain]", path="x"), [PLAIN], {}))
    data = prepare_sft(config, [*tasks, other], TextEncoder(TOKENIZER), FACTS)
    assert data.dropped == {"rows": {NO_CHAIN: 2, TOO_SHORT: 1}, "[plain]": {NO_CHAIN: 1}}
    console = Console(width=300, record=True, file=io.StringIO(), force_terminal=True, highlight=False)
    for line in data.summaries:
        Reporter(console).say(line)
    text = console.export_text(styles=True)
    assert text.count("\x1b[33m") == 2, "both lines are yellow"
    assert "2 no chain of thought (rows 0, 1); 1 chain of thought under warm_start.compression (row 2)" in text
    assert "Latent-SFT leaves out [plain]: no chain of thought" in text

    config, tasks = stored(tmp_path, ["1+2=3;"] * 12)
    data = prepare_sft(config, tasks, TextEncoder(TOKENIZER), FACTS)
    assert (data.dropped, [line.startswith("Latent-SFT on rows: ") for line in data.summaries]) == ({}, [True])


@pytest.mark.parametrize("overrides", [(), ("algorithm=grpo", "tasks.0.max_response_tokens=44")])
def test_a_chain_is_learned_with_one_end_of_thinking(tmp_path, overrides):
    """Whatever its text holds, latent or explicit; nothing but an end is no chain."""
    ends = ["1+2=3;</think>", "</think>1+2</think>=3;", " </think>"]
    config, tasks = stored(tmp_path, [*ends, *["1+2=3;"] * 12], *overrides)
    data = prepare_sft(config, tasks, TextEncoder(TOKENIZER), FACTS)
    assert data.dropped == {"rows": {NO_CHAIN: 1}}
    rows = [data.row(tasks[0], tasks[0].source.problem(index)) for index in (0, 1, 3)]
    assert {tuple(row.hard_ids) for row in rows} == {tuple(rows[2].hard_ids)}
    assert all((row.hard_ids == FACTS.latent_end_id).sum() == 1 for row in rows)
    assert {tuple(row.cot_ids) for row in rows} == {tuple(rows[2].cot_ids)}


@pytest.mark.parametrize(
    ("bad", "counts"),
    [
        (["3"] * 6, r"6 of 11 rows .*: 6 are shorter than warm_start\.compression \(3 tokens\), 0 do not fit"),
        (["1+2=3;" * 9] * 6, r"6 of 11 rows .*: 0 are shorter .*, 6 do not fit into max_response_tokens \(12\)"),
        (["3", "1+2=3;" * 9] * 3, r"6 of 11 rows .*: 3 are shorter .*, 3 do not fit .*Lower warm_start\.compression"),
    ],
)
def test_a_file_that_loses_most_of_its_chains_for_their_length_is_refused(tmp_path, bad, counts):
    config, tasks = stored(tmp_path, ["", "", *bad, *["1+2=3;"] * 5])
    with pytest.raises(TaskError, match=rf"task rows: {counts}"):
        prepare_sft(config, tasks, TextEncoder(TOKENIZER), FACTS)
    config, tasks = stored(tmp_path, ["", "", *bad, *["1+2=3;"] * 6])
    (task,) = prepare_sft(config, tasks, TextEncoder(TOKENIZER), FACTS).tasks  # half may go
    assert task.source.size == 5


def test_chains_shorter_than_a_latent_step_alone_are_an_error(tmp_path):
    config, tasks = stored(tmp_path, ["1+", "3", "1"])
    with pytest.raises(
        ConfigError, match=r"no problem is left; dropped 3 chain of thought under warm_start\.compression"
    ):
        prepare_sft(config, tasks, TextEncoder(TOKENIZER), FACTS)


def test_a_generated_chain_that_is_too_short_names_the_problem_and_the_setting():
    config = load_config("quickstart", ["warm_start.compression=7", "k=7", "tasks.0.options.operations=1"])
    tasks = [prepare_task(read_task(config.tasks[0], config), config, TextEncoder(TOKENIZER))]
    with pytest.raises(ConfigError, match=r"problem chain-arithmetic/0: .* has 6 token\(s\).*compression 7"):
        prepare_sft(config, tasks, TextEncoder(TOKENIZER), FACTS)


class CountingEncoder(TextEncoder):
    """An encoder that counts the texts that it encodes."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER)
        self.count = 0

    def encode(self, name, texts, *, special_tokens):
        self.count += len(texts)
        return super().encode(name, texts, special_tokens=special_tokens)


def test_a_row_is_encoded_once(tmp_path):
    """A stored problem's chain however often it is used, a generated one's from the check to the first step."""
    encoder = CountingEncoder()
    config, tasks = stored(tmp_path, ["1+2=3;"] * 12)
    data = prepare_sft(config, tasks, encoder, FACTS)
    first, again = data.rows(0, 8), data.rows(0, 8)
    assert encoder.count == 24, "a chain and an answer each"
    assert all(np.array_equal(a.hard_ids, b.hard_ids) for a, b in zip(first, again, strict=True))

    encoder = CountingEncoder()
    config = load_config("quickstart", ["warm_start.batch_size=4"])
    tasks = [prepare_task(read_task(config.tasks[0], config), config, encoder)]
    data = prepare_sft(config, tasks, encoder, FACTS)
    data.rows(0, 4)
    assert encoder.count == 8


def test_a_stored_task_keeps_the_ids_of_its_prompts(tmp_path):
    config, (task,) = stored(tmp_path, ["1+2=3;"] * 12)
    for index in range(12):
        problem = task.source.problem(index)
        assert np.array_equal(task.prompt_ids(problem), task.renderer.encode(problem))
    encoder = CountingEncoder()
    task = prepare_task(read_task(config.tasks[0], config), config, encoder)
    task.prompt_ids(task.source.problem(0))
    assert encoder.count == 12


def test_too_few_problems_to_hold_any_out_is_an_error(tmp_path):
    config, tasks = stored(tmp_path, ["1+2=3;"])
    with pytest.raises(ConfigError, match=r"1 usable problem\(s\) are too few"):
        prepare_sft(config, tasks, TextEncoder(TOKENIZER), FACTS)


def test_no_task_with_a_chain_is_an_error(tmp_path):
    config, tasks = stored(tmp_path, ["", ""])
    with pytest.raises(ConfigError, match="needs an explicit chain of thought"):
        prepare_sft(config, tasks, TextEncoder(TOKENIZER), FACTS)


def test_k_must_hold_the_tokens_of_a_step_but_an_explicit_chain_does_not_care():
    with pytest.raises(ConfigError, match=r"k \(3\) is smaller than warm_start.compression \(4\)"):
        load_config("quickstart", ["warm_start.compression=4"])
    problem = ChainArithmetic(name="a", operations=2).problem(0)
    chain = encode_chain(TOKENIZER, problem.cot, problem.answer, c=12, latent_end_id=20, explicit=True)
    assert len(chain.row(TOKENIZER.encode("1?"), c=12, k=3).chain.ids) == 0


def test_soft_labels_are_not_chosen_for_an_explicit_chain():
    with pytest.raises(ConfigError, match="induced has no effect"):
        load_config("quickstart", ["algorithm=grpo", "tasks.0.max_response_tokens=44", "warm_start.source=induced"])


def test_self_feeding_rises_over_its_ramp():
    settings = load_config("quickstart", ["warm_start.self_feeding_ramp=4"]).warm_start
    assert [self_feeding_share(settings, step) for step in (0, 1, 3, 4, 99)] == [0.125, 0.25, 0.5, 0.5, 0.5]
    assert self_feeding_share(load_config("quickstart").warm_start, 0) == 0.5


def test_ranks_call_the_output_layer_equally_often():
    """Unequal rows: every micro-batch of every rank gets the largest number of calls among them."""
    problems = [ChainArithmetic(name="a", operations=n).problem(0) for n in (1, 6, 2, 4, 1, 1, 3)]
    chains = [encode_chain(TOKENIZER, p.cot, p.answer, c=3, latent_end_id=20) for p in problems]
    rows = [chain.row(TOKENIZER.encode("1?"), c=3, k=3) for chain in chains]
    plan = plan_rows([len(row) for row in rows], ranks=2, tokens_per_microbatch=40)
    calls = least_calls(plan, rows, chunk_tokens=4, feed=True)
    assert len(calls) == len(plan[0]) == len(plan[1])
    for pieces, least in zip(zip(*plan, strict=True), calls, strict=True):
        latent = [sum(len(rows[i].chain.ids) for i in piece.rows) for piece in pieces]
        assert least.latent == max(-(-n // 4) for n in latent)
        assert least.feed
    assert sorted(i for rank in plan for piece in rank if piece.counts for i in piece.rows) == list(range(len(rows)))


def test_held_out_problems_are_never_learned_from(tmp_path):
    config, tasks = stored(tmp_path, [f"1+{i % 10}=3;" for i in range(30)])
    data = prepare_sft(config, tasks, TextEncoder(TOKENIZER), FACTS)
    held_out = {problem.uid for _, problem in data.held_out}
    learned = {data.stream[i].problem.uid for i in range(200)}
    assert len(held_out) == 3
    assert not held_out & learned


def test_setting_one_key_of_its_optimizer_leaves_the_others():
    optimizer = load_config("quickstart", ["warm_start.optimizer.warmup_steps=2"]).warm_start.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.warmup_steps) == (3e-3, (0.9, 0.98), 2)

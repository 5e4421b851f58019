"""METHOD §2.5, §8: problems keep their identity, faulty sources are named, the order is a function of an ordinal."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmark_files import DATA, MISSING

from latent_grpo.common.config import Columns, PromptConfig, TaskConfig, load_config
from latent_grpo.common.config.problems_and_model import BENCHMARK_DEFAULTS
from latent_grpo.common.tasks.arithmetic import MODULUS, ChainArithmetic, solve, split_of
from latent_grpo.common.tasks.benchmarks import INSTRUCTION, prompt_of, prompt_of_messages
from latent_grpo.common.tasks.sources import (
    BENCHMARKS,
    PromptStream,
    TaskError,
    describe_dropped,
    load_task,
)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbered(path: Path, count: int, name: str = "numbers") -> TaskConfig:
    rows = [{"problem": f"what is {i}?", "answer": i} for i in range(count)]
    return TaskConfig(name=name, path=write_jsonl(path / f"{name}.jsonl", rows))


# --- the generated task


def test_generated_problem_depends_only_on_seed_split_and_index():
    one, again = (ChainArithmetic(name="a", seed=3) for _ in range(2))
    assert [one.problem(i) for i in (5, 0, 9)] == [again.problem(i) for i in (5, 0, 9)]
    assert one.problem(0) != ChainArithmetic(name="a", seed=4).problem(0)
    assert one.problem(10**9).uid == "a/1000000000"


def test_generated_chain_leads_from_the_problem_to_the_answer():
    source = ChainArithmetic(name="a")
    for index in range(50):
        problem = source.problem(index)
        steps = problem.cot.split(";")[:-1]
        assert len(steps) == 6
        value = None
        for step in steps:
            left, result = step.split("=")
            if value is not None:
                assert left.startswith(value)
            assert eval(left) % MODULUS == int(result)
            value = result
        assert value == problem.answer
        (role, text), *_ = problem.messages
        assert role == "user"
        assert text.endswith("?")


@pytest.mark.parametrize("operations", [2, 6])
def test_training_and_evaluation_never_share_a_problem(operations):
    training, held_out = (
        {ChainArithmetic(name="a", operations=operations, split=s).problem(i).messages for i in range(400)}
        for s in ("training", "evaluation")
    )
    assert not training & held_out
    assert all(split_of(messages[0][1].removesuffix("?")) == "evaluation" for messages in held_out)


def test_chains_of_varied_length_other_numbers_and_names():
    problems = [
        ChainArithmetic(name="a", operations=5, shortest=2, modulus=10, named=True).problem(i) for i in range(80)
    ]
    assert {p.cot.count(";") for p in problems} == {2, 3, 4, 5}
    assert all(len(number) == 1 for p in problems for number in [p.answer, *p.cot.replace(";", "=").split("=")[1::2]])
    names = {p.messages[0][1].partition(": ")[0] for p in problems}
    assert len(names) > 70
    assert all(name.isalpha() for name in names)
    for option in ({"shortest": 7}, {"shortest": -1}, {"modulus": 12}, {"rechecks": 2.0}, {"visible": -0.5}):
        with pytest.raises(TaskError, match=next(iter(option))):
            load_task(TaskConfig(name="a", path="builtin:chain_arithmetic", options=option), seed=0)


def test_rechecks_repeat_the_last_operation_and_change_neither_problem_nor_answer():
    source = ChainArithmetic(name="a", operations=2, rechecks=0.75)
    counts = set()
    for index in range(100):
        problem = source.problem(index)
        first, *rest = problem.cot.split(";")[:-1]
        assert len(set(rest)) == 1
        assert problem.cot.endswith(f"={problem.answer};")
        assert problem.messages[0][1].startswith(first.partition("=")[0])
        counts.add(len(rest))
    assert counts == {1, 2, 3, 4, 5}


def test_a_visible_end_goes_on_where_the_chain_stops():
    whole = ChainArithmetic(name="a", operations=4)
    source, kept = ChainArithmetic(name="a", operations=4, visible=0.75), Counter()
    for index in range(200):
        problem = source.problem(index)
        numbers, operators = re.findall(r"\d+", problem.messages[0][1]), re.findall(r"[-+*]", problem.messages[0][1])
        chain, answer = solve([int(n) for n in numbers], operators)
        assert problem.answer == str(answer)
        assert problem.cot + problem.solution.partition("\\boxed")[0] == chain
        assert problem.solution.endswith(f"\\boxed{{{answer}}}") == (problem.cot != chain)
        kept[problem.cot.count(";")] += 1
    assert set(kept) == {1, 2, 3, 4}
    assert 25 < kept[4] < 75
    assert not whole.problem(0).solution


def test_generated_task_is_endless_unless_sized():
    endless = load_task(TaskConfig(name="a", path="builtin:chain_arithmetic"), seed=1)
    assert endless.size is None
    sized = load_task(TaskConfig(name="a", path="builtin:chain_arithmetic", options={"size": 4}), seed=1)
    assert sized.size == 4
    assert sized.problem(3) == endless.problem(3)
    with pytest.raises(IndexError, match="outside its 4"):
        sized.problem(4)


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("builtin:chess", {}, "known are chain_arithmetic"),
        ("builtin:chain_arithmetic", {"moves": 3}, "moves"),
        ("builtin:chain_arithmetic", {"operations": 0}, "at least 1"),
        ("builtin:chain_arithmetic", {"split": "test"}, "training or evaluation"),
        ("builtin:chain_arithmetic", {"size": 0}, "options.size"),
    ],
)
def test_wrong_generated_task_is_refused(path, options, message):
    with pytest.raises(TaskError, match=message):
        load_task(TaskConfig(name="a", path=path, options=options), seed=0)


# --- files


def test_rows_keep_their_number_when_others_are_dropped(tmp_path):
    rows = [
        {"problem": "one?", "answer": "1", "cot": "1=1"},
        {"problem": "  ", "answer": "2"},
        {"problem": "three?", "answer": "many"},
        {"problem": "four?", "answer": None},
        {"problem": "five?", "answer": 5},
    ]
    task = load_task(TaskConfig(name="t", path=write_jsonl(tmp_path / "t.jsonl", rows)), 0, gradable=str.isdigit)
    assert [p.uid for p in (task.problem(0), task.problem(1))] == ["t/0", "t/4"]
    assert task.problem(0).cot == "1=1"
    assert task.problem(1).answer == "5"
    assert task.dropped == {"empty problem": [1], "unreadable gold answer": [2], "empty answer": [3]}
    assert "1 empty problem (row 1)" in describe_dropped(task.dropped)


def test_filter_counts_what_it_refuses_and_an_empty_rest_is_an_error(tmp_path):
    task = load_task(numbered(tmp_path, 6), 0)
    short = task.filtered(lambda p: int(p.answer) < 4, "prompt too long")
    assert (len(short), short.dropped) == (4, {"prompt too long": [4, 5]})
    assert task.dropped == {}
    with pytest.raises(TaskError, match="no problem is left; dropped 6 prompt too long"):
        task.filtered(lambda p: False, "prompt too long")


def test_limit_takes_the_first_rows(tmp_path):
    config = numbered(tmp_path, 10).model_copy(update={"limit": 3})
    assert [load_task(config, 0).problem(i).answer for i in range(3)] == ["0", "1", "2"]
    assert load_task(config, 0).size == 3


def test_parquet_with_named_columns(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"question": ["a?", "b?"], "gold": [1, 2]}), path)
    config = TaskConfig(name="t", path=str(path), columns=Columns(problem="question", answer="gold"))
    assert load_task(config, 0).problem(1).messages == (("user", "b?"),)
    with pytest.raises(TaskError, match=r"no column 'problem'; its columns are gold, question. Set columns.problem"):
        load_task(TaskConfig(name="t", path=str(path)), 0)


def test_verl_rows_are_found_by_themselves(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    rows = [{"prompt": chat, "reward_model": {"ground_truth": "2", "style": "rule"}, "data_source": "x"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    jsonl = write_jsonl(tmp_path / "t.jsonl", rows)
    for path in (str(tmp_path / "t.parquet"), jsonl):
        problem = load_task(TaskConfig(name="t", path=path), 0).problem(0)
        assert problem.messages == (("system", "Be brief."), ("user", "1+1?"))
        assert problem.answer == "2"


def test_faulty_sources_are_named(tmp_path):
    def load(path, **more):
        return load_task(TaskConfig(name="t", path=path, **more), 0, gradable=str.isdigit)

    with pytest.raises(TaskError, match="no file"):
        load(str(tmp_path / "absent.parquet"))
    with pytest.raises(TaskError, match="path is missing"):
        load(None)
    (tmp_path / "t.txt").write_text("a,b")
    with pytest.raises(TaskError, match=r"expected a \.parquet, \.arrow, \.jsonl, .* or \.tsv file"):
        load(str(tmp_path / "t.txt"))
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(TaskError, match="cannot be read as parquet"):
        load(str(tmp_path / "bad.parquet"))
    (tmp_path / "bad.jsonl").write_text('{"problem": "a", "answer": "1"}\n{"problem": \n')
    with pytest.raises(TaskError, match="line 2 is not valid JSON"):
        load(str(tmp_path / "bad.jsonl"))
    with pytest.raises(TaskError, match=r"none of the 2 rows.*2 unreadable gold answer"):
        load(write_jsonl(tmp_path / "u.jsonl", [{"problem": "a", "answer": "x"}] * 2))
    with pytest.raises(TaskError, match="has no rows"):
        load(write_jsonl(tmp_path / "empty.jsonl", []))
    with pytest.raises(TaskError, match=r"'reward_model' holds a list .*; expected an object with ground_truth"):
        load(write_jsonl(tmp_path / "v.jsonl", [{"prompt": [], "reward_model": []}]))


PROBLEM_FIRST = "Think.\n{problem}"


@pytest.mark.parametrize(
    ("name", "model", "own", "expected"),
    [
        ("mine", {}, None, (None, "{problem}")),
        ("mine", {"system": "M"}, {"user": PROBLEM_FIRST}, ("M", PROBLEM_FIRST)),
        ("svamp", {}, None, (None, INSTRUCTION + "\n{problem}")),
        ("svamp", {"user": PROBLEM_FIRST}, None, (None, PROBLEM_FIRST)),
        ("svamp", {"user": PROBLEM_FIRST}, {"user": "{problem}"}, (None, "{problem}")),
        # the instruction stands once, in the message that the user chose
        ("svamp", {"system": INSTRUCTION}, None, (INSTRUCTION, "{problem}")),
        ("math500", {"user": INSTRUCTION + "\n{problem}"}, None, (None, INSTRUCTION + "\n{problem}")),
        # GPQA keeps its line about the letters
        ("gpqa", {"system": "M"}, None, ("M", BENCHMARKS["gpqa"].prompt.user)),
        ("gpqa", {}, {"system": "Choose."}, ("Choose.", BENCHMARKS["gpqa"].prompt.user)),
        ("math500", {}, {"system": None}, (None, "{problem}")),
        ("mine", {"system": "M"}, {"system": None}, (None, "{problem}")),
        ("math500", {"system": None}, {"user": PROBLEM_FIRST}, (None, PROBLEM_FIRST)),
    ],
)
def test_what_the_user_sets_wins_key_by_key(name, model, own, expected):
    task = TaskConfig(name=name, prompt=None if own is None else PromptConfig(**own))
    found = prompt_of(task, PromptConfig(**model))
    assert (found.system, found.user) == expected


def test_a_default_that_is_written_out_is_no_demand():
    """The stored settings of a run ask for the same prompts as its profile."""
    source = {
        "model": {"path": "m", "prompt": {"think_start": "<t>"}},
        "tasks": [{"name": "svamp", "path": "svamp.parquet"}, {"name": "gpqa", "path": "x", "prompt": {"system": "C"}}],
    }
    config = load_config(source)
    again = load_config(config.model_dump(mode="json"))
    assert again.model_dump(mode="json")["model"]["prompt"] == {"think_start": "<t>"}
    for before, after in zip(config.tasks, again.tasks, strict=True):
        assert prompt_of(before, config.model.prompt) == prompt_of(after, again.model.prompt)
    plain = load_config({**source, "model": {"path": "m", "prompt": {"user": "{problem}"}}})
    assert prompt_of(plain.tasks[0], plain.model.prompt).user == "{problem}", "a default that somebody set is set"


def test_the_models_prompt_never_touches_whole_messages():
    model = PromptConfig(system="M", user=PROBLEM_FIRST, think_start="<t>")
    found = prompt_of_messages(TaskConfig(name="svamp"), model)
    assert (found.system, found.user, found.think_start) == (None, "{problem}", "<t>")
    own = TaskConfig(name="svamp", prompt=PromptConfig(system="C"))
    assert prompt_of_messages(own, model).system == "C"
    none = TaskConfig(name="svamp", prompt=PromptConfig(system=None))
    assert prompt_of_messages(none, model).given == {"think_start": "<t>", "system": None}


def test_benchmark_defaults_yield_to_what_the_user_gave():
    config = TaskConfig(name="svamp", path="x", max_response_tokens=64)
    assert (config.verifier, config.max_prompt_tokens, config.max_response_tokens) == ("number", 192, 64)
    own = TaskConfig(name="gpqa")
    assert (own.verifier, own.max_response_tokens) == ("choice", 4096)
    assert TaskConfig(name="mine").verifier == "math"
    assert set(BENCHMARKS) == set(BENCHMARK_DEFAULTS) == {
        "gsm8k-aug", "gsm-hard", "svamp", "multiarith", "math500", "aime2024", "aime2025", "gpqa",
    }  # fmt: skip


@pytest.mark.skipif(not DATA.is_dir(), reason=MISSING)
@pytest.mark.parametrize(("name", "rows"), [("gsm_hard", 1319), ("svamp", 1000), ("math500", 500), ("aime2025", 30)])
def test_published_benchmarks_load_whole(name, rows):
    task = load_task(TaskConfig(name=name, path=str(DATA / f"{name}.parquet")), 0)
    assert (task.size, task.dropped) == (rows, {})


# --- order


def test_stream_is_a_function_of_the_ordinal(tmp_path):
    tasks = [load_task(numbered(tmp_path, 7, "a"), 0), load_task(numbered(tmp_path, 3, "b"), 0)]
    forward = PromptStream(tasks, [2.0, 1.0], seed=5)
    order = [forward[i] for i in range(60)]
    resumed = PromptStream(tasks, [2.0, 1.0], seed=5)
    assert resumed[47] == order[47]
    assert resumed[3] == order[3]
    assert [d.task for d in order].count(0) == 40
    assert [PromptStream(tasks, [2.0, 1.0], seed=6)[i] for i in range(60)] != order


def test_every_epoch_asks_each_problem_once_in_another_order(tmp_path):
    stream = PromptStream([load_task(numbered(tmp_path, 20), 0)], [1.0], seed=0)
    epochs = [[stream[e * 20 + i] for i in range(20)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert {d.epoch for d in epoch} == {number}
        assert len({d.problem.uid for d in epoch}) == 20
    assert [d.problem.uid for d in epochs[0]] != [d.problem.uid for d in epochs[1]]


def test_endless_task_never_repeats(tmp_path):
    stream = PromptStream([load_task(TaskConfig(name="a", path="builtin:chain_arithmetic"), 0)], [1.0], seed=0)
    draws = [stream[i] for i in range(100)]
    assert {d.epoch for d in draws} == {0}
    assert len({d.problem.uid for d in draws}) == 100


def test_stream_needs_a_weight_per_task(tmp_path):
    with pytest.raises(ValueError, match="positive weight per task"):
        PromptStream([load_task(numbered(tmp_path, 2), 0)], [], seed=0)


def test_a_jsonl_that_is_not_utf8_is_named_with_its_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"problem": "a", "answer": "1"}\n{"problem": "\xff", "answer": "1"}\n')
    with pytest.raises(TaskError, match="line 2 is not UTF-8"):
        load_task(TaskConfig(name="t", path=str(path)), 0)

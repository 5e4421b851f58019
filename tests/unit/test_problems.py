"""Rows that are known to be wrong, and problems in two tasks, are said at the start and never dropped."""

import json

import pytest

from latent_grpo.common.config import NewModelConfig, TaskConfig, load_config
from latent_grpo.common.encoding import TextEncoder
from latent_grpo.common.models import make_tokenizer
from latent_grpo.common.tasks.benchmarks import INSTRUCTION
from latent_grpo.common.tasks.known_faults import fingerprint
from latent_grpo.common.tasks.sources import StoredTask
from latent_grpo.common.types import Problem
from latent_grpo.deploy.run.findings import contradictions, mislabelled, notes, overlaps, refused_golds
from latent_grpo.deploy.run.problems import Problems, Sources
from latent_grpo.reward.verifier import load_verifier

CARNIVAL = (  # a row of GSM8K's test split
    "The girls are trying to raise money for a carnival. Kim raises $320 more than Alexandra, who raises $430, and "
    "Maryam raises $400 more than Sarah, who raises $300. How much money, in dollars, did they all raise in total?"
)


def task(name, *rows):
    problems = [
        Problem(uid=f"{name}/{i}", task=name, messages=(("system", "s"), ("user", text)), answer=answer)
        for i, (text, answer) in enumerate(rows)
    ]
    return StoredTask(TaskConfig(name=name, path="x.parquet"), problems, {})


def test_a_known_fault_is_named_with_its_row_and_the_right_answer():
    source = task("gsm8k", ("1 + 1?", "2"), (CARNIVAL, "2280"))
    assert mislabelled(source) == (
        "gsm8k: 1 row is known to be mislabelled, kept as published: row 1, answer 2280, right 2180"
    )
    assert len(source) == 2
    assert mislabelled(task("gsm8k", (CARNIVAL, "2180"))) == ""


def test_problems_of_two_tasks_are_counted_and_differing_answers_listed():
    train = task("train", ("Same  text?", "1"), ("Another?", "2"), ("Alone?", "3"))
    held_out = task("held-out", ("same text?", "1"), ("Another?", "7"), ("New?", "4"))
    (line,) = overlaps([train, held_out])
    assert line == (
        "train and held-out share 2 problems, 1 of them with answers that are written differently (row 1: 2, row 1: 7)"
    )
    assert notes([train], [held_out], load_verifier) == [line]
    assert overlaps([train, task("other", ("Else?", "1"))]) == []


def test_a_task_that_is_evaluated_too_does_not_overlap_with_itself():
    source = task("train", ("Same text?", "1"))
    assert notes([source], [source], load_verifier) == []


@pytest.mark.parametrize(
    ("kind", "golds", "refused"),
    [
        ("math", ["7", r"\frac{1}{2}", "east", "(1, 2)", "1.5"], []),
        ("math", ["7", "['7']", '("a", "b")', "x is 5"], [1]),
        ("number", ["7", "7 apples", "-0.5"], []),
        ("choice", ["A", "(B)"], []),
        ("latent_grpo.reward.plain_math_verify:PlainMathVerify", ["['7']"], []),  # a user's own is asked by `grade`
    ],
)
def test_a_gold_that_its_own_verifier_would_not_accept_is_said(kind, golds, refused):
    source = task("t", *((f"{i}?", gold) for i, gold in enumerate(golds)))
    line = refused_golds(source, load_verifier(kind))
    assert [i for i in range(len(golds)) if f"row {i}: " in line] == refused
    assert (f"would not accept {len(refused)} of the gold answers as a response" in line) is bool(refused)
    assert line in notes([source], [], lambda name: load_verifier(kind)) or not line


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (
            (("Same?", "1"), ("same ?", "2")),
            "t: 1 problem occurs again with another answer, kept as they are (row 0: 1, row 1: 2)",
        ),
        ((("Same?", "1"), ("Same?", "1.0"), ("Other?", "2")), ""),
        ((("Same?", "1"), ("Same?", "1")), ""),
    ],
)
def test_a_problem_that_occurs_again_with_another_answer_is_said(rows, line):
    assert contradictions(task("t", *rows), load_verifier("math")) == line


def test_a_fingerprint_sees_neither_space_nor_case_nor_punctuation_but_every_sign():
    assert fingerprint("Same\n  Text: $2+2$?") == fingerprint("same text 2 + 2.")
    assert fingerprint("2+2") != fingerprint("2-2")
    assert fingerprint("\ud800") != fingerprint("")


def test_a_choice_task_that_asks_for_no_letter_is_a_warning(tmp_path, tokenizer):
    row = {"Question": "Q?", "Correct Answer": "c", **{f"Incorrect Answer {i}": str(i) for i in (1, 2, 3)}}
    (tmp_path / "gpqa.jsonl").write_text(json.dumps(row))
    task = {"name": "gpqa", "path": str(tmp_path / "gpqa.jsonl")}

    def warnings(prompt):
        config = load_config({"model": {"path": "m", "prompt": prompt}, "tasks": [task]})
        (prepared,) = Sources.read(config).prepared(config, TextEncoder(tokenizer)).training
        return prepared.first_prompt()[1]

    assert warnings({}) == []
    assert warnings({"system": "Think."}) == []
    (line,) = warnings({"user": "Think.\n{problem}"})
    assert line.startswith("task gpqa: verifier choice grades a letter, and its prompt does not ask for one")


def test_gpqa_as_whole_prompts_is_said_by_the_protocol_ours_and_compared_with_nothing(tmp_path, tokenizer):
    chat = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": "Q?\n(A) c\nWhich option?"}]
    file = tmp_path / "GPQA-test.jsonl"
    file.write_text(json.dumps({"prompt": chat, "reward_model": {"ground_truth": "A"}}))
    task = {"name": "gpqa", "path": str(file)}
    config = load_config({
        "model": {"path": "m"}, "tasks": [task], "evaluation": {"tasks": [task], "protocol": "both"},
        "rollout": {"max_rows": 64},
    })  # fmt: skip
    problems = Problems(config, Sources.read(config).prepared(config, TextEncoder(tokenizer)))
    ours, reference = (prepared.first_prompt()[1] for prepared in problems.evaluation)
    assert f"the rows of {file} bring whole prompts, so figures by the protocol ours are of the file's" in str(ours)
    assert reference == []
    assert not [line for line in problems.summaries if "share" in line]


# --- rows that bring whole messages


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(NewModelConfig(tokenizer="bpe", vocab_size=300), [INSTRUCTION])


def verl_rows(path):
    """The authors' layout for the low benchmarks: the instruction inside the one user message."""
    message = {"role": "user", "content": f"{INSTRUCTION}\nHow many are 1 and 1?"}
    path.write_text(json.dumps({"prompt": [message], "reward_model": {"ground_truth": "2"}}))
    return str(path)


@pytest.mark.parametrize(
    ("model", "own", "said", "twice"),
    [
        ({"user": INSTRUCTION + "\n{problem}"}, None, f"{INSTRUCTION}\nHow many are 1 and 1?\n<think>", False),
        ({}, {"system": INSTRUCTION}, f"{INSTRUCTION}\n{INSTRUCTION}\nHow many are 1 and 1?\n<think>", True),
    ],
    ids=["the model's prompt leaves them", "the task's own does not, with a warning"],
)
@pytest.mark.parametrize("name", ["gsm8k-aug", "mine"])
def test_a_rows_own_messages_are_the_prompt(tmp_path, tokenizer, model, own, said, twice, name):
    row = {"name": name, "path": verl_rows(tmp_path / "rows.jsonl"), "verifier": "number", "max_prompt_tokens": 999}
    task = row if own is None else {**row, "prompt": own}
    config = load_config({"model": {"path": "m", "prompt": model}, "tasks": [task]})
    encoder = TextEncoder(tokenizer)
    (prepared,) = Sources.read(config).prepared(config, encoder).training
    text, warnings = prepared.first_prompt()
    first, _, prompt = text.partition("\n")
    assert prompt == said
    assert first.startswith(f"{len(tokenizer.encode(said))} tokens, the last of them ")
    assert first.endswith("'<think>':")
    assert bool(warnings) == twice
    if twice:
        assert warnings == [
            f"task {name}: its prompt says twice: {INSTRUCTION!r}; look at model.prompt and tasks.N.prompt"
        ]


@pytest.mark.parametrize(
    ("given", "said"), [([], "Own.\n1+1?\n<think>"), (["tasks.0.prompt.system=null"], "1+1?\n<think>")]
)
def test_a_rows_system_message_is_left_out_where_the_task_says_null(tmp_path, tokenizer, given, said):
    row = {"prompt": [{"role": "system", "content": "Own."}, {"role": "user", "content": "1+1?"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "reward_model": {"ground_truth": "2"}}))
    task = {"name": "mine", "path": str(tmp_path / "rows.jsonl"), "verifier": "number"}
    config = load_config({"model": {"path": "m"}, "tasks": [task]}, given)
    for read in (config, load_config(config.model_dump(mode="json"))):  # also from a run's stored settings
        (prepared,) = Sources.read(read).prepared(read, TextEncoder(tokenizer)).training
        assert prepared.first_prompt()[0].partition("\n")[2] == said

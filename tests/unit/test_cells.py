"""A cell is read as what it holds, or refused by row, column and type: never asked or graded as Python spells it."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from latent_grpo.common.config import ConfigError, TaskConfig, load_config
from latent_grpo.common.golds import alternatives, any_of, spelled
from latent_grpo.common.tasks.cells import CellError, cell_text, chat, gold_text, held, joined_text
from latent_grpo.common.tasks.sources import EMPTY_ANSWER, EMPTY_PROBLEM, TaskError, load_task
from latent_grpo.deploy.cli.app import app
from latent_grpo.deploy.data.layouts import UnknownLayout, product_row
from latent_grpo.deploy.grading.answer_file import AuditError, read_answers
from latent_grpo.deploy.run.problems import read_task
from latent_grpo.deploy.serving.generate import problems_of

NAN = float("nan")
USER = {"role": "user", "content": "1+1?"}
PARTS = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]
BOXED = {"\\boxed{1/2}": "1/2"}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


def written(tmp_path, rows, suffix="jsonl"):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("7", "7"),
        (" 7 ", " 7 "),
        ("nan", "nan"),
        ("", ""),
        (None, ""),
        (NAN, ""),
        (7, "7"),
        (-7, "-7"),
        (10**40, "1" + "0" * 40),
        (5.0, "5"),
        (-0.0, "0"),
        (0.1, "0.1"),
        (1e16, "10000000000000000"),
        (1e-7, "0.0000001"),
        (2.5e20, "250000000000000000000"),
        (Decimal("5.00"), "5.00"),
        (Decimal("1E+3"), "1000"),
        (Decimal("NaN"), ""),
    ],
)
def test_texts_and_numbers_are_written_as_people_write_them(value, text):
    assert cell_text(value) == text


@pytest.mark.parametrize(
    ("value", "described"),
    [
        (True, r"a boolean \(true\)"),
        (["7"], r'a list \(\["7"\]\)'),
        ({"a": 1}, r'an object \({"a": 1}\)'),
        (b"7", "bytes"),
        (float("inf"), "inf"),
        (datetime.date(2024, 1, 2), r"type date \(.?2024-01-02.?\)"),
        ((), "a list"),
        ([b"x"], "a list"),
    ],
)
def test_anything_else_is_refused_by_its_type(value, described):
    with pytest.raises(CellError, match=described):
        cell_text(value)


NO_CHATS = [  # problems about JSON and Python
    '{"type": "sum", "a": 1}',
    '{"text": "Translate"}',
    '[{"value": 1}, {"value": 2}]',
    '[{"type": "text", "size": 1}]',
    '[{"from": "a", "to": "b", "value": 2}, {"from": "b", "to": "c", "value": 1}]',
    '{"from": "Paris", "to": "Rome", "value": 3}',
    "{'from': 'A', 'value': 3}",
    '{"role": "admin"}',
    "{'value': 3, 'x': 4} is a Python dict d. What is d['x']?",
    "[{'role': 'user', 'content': 'x'}][0]['role'] is?",
    "{'role': 'admin', 'name': 'x'}",
    "{'type': " * 5000,
]


@pytest.mark.parametrize(
    ("value", "messages"),
    [
        ("1+1?", [("user", "1+1?")]),
        (11, [("user", "11")]),
        ([USER], [("user", "1+1?")]),
        ([{"role": "system", "content": None}, USER], [("system", ""), ("user", "1+1?")]),
        ([{"role": "user", "content": PARTS}], [("user", "1+1?")]),
        (PARTS, [("user", "1+1?")]),
        (json.dumps([USER]), [("user", "1+1?")]),
        (f" {json.dumps(PARTS)}", [("user", "1+1?")]),
        ('[{"role": is a text', [("user", '[{"role": is a text')]),
        *((text, [("user", text)]) for text in NO_CHATS),
        ([USER, {"role": "assistant", "content": "2"}, USER], [("user", "1+1?"), ("assistant", "2"), ("user", "1+1?")]),
        ([], []),
        (None, []),
        (NAN, []),
    ],
)
def test_a_problem_is_a_text_a_chat_or_parts_of_a_text(value, messages):
    assert chat(value)[0] == tuple(messages)


REFUSED = [
    (True, "a boolean"),
    ({"role": "user", "content": "1+1?"}, "an object"),
    (["1+1?"], "a list"),
    ([["1+1?"]], "a list"),
    ([{"from": "human", "value": "1+1?"}], "a list .*role and content"),
    ([{"role": "user", "content": [*PARTS, IMAGE]}], "a part of the type 'image_url'"),
    ([IMAGE], "a part of the type 'image_url'"),
    ([{"role": "user", "content": True}], "a boolean"),
    ([{"role": "user", "content": {"text": "x"}}], "an object"),
    ([{"role": 1, "content": "x"}], "a message's role is 1"),
    ([USER, {"role": "assistant", "content": "2"}], "last message is the assistant's"),
    (str([USER]), "a chat as Python spells it"),
    (str([{"role": "user", "content": PARTS}]), "a chat as Python spells it"),
    (f"array([{USER}], dtype=object)", "a chat as Python spells it"),
    (str([{"from": "human", "value": "1+1?"}]), "a chat as Python spells it"),
    (json.dumps([{"from": "human", "value": "1+1?"}]), "a list .*role and content"),
    (json.dumps([{"from": "System", "value": "s"}, {"from": "me", "value": "1+1?"}]), "a list .*role and content"),
    (json.dumps({"from": "human", "value": "1+1?"}), "an object"),
    (json.dumps(USER), "an object"),
    (str(USER), "a chat as Python spells it"),
    (f"[{USER}\n {USER}]", "a chat as Python spells it"),  # as NumPy and pandas do
    (
        str([{"role": "user", "content": PARTS}]).replace(str(PARTS), f"array({PARTS}, dtype=object)"),
        "a chat as Python",
    ),
]


@pytest.mark.parametrize(("value", "message"), REFUSED)
def test_a_problem_of_another_kind_is_refused_with_row_and_column_by_every_command(value, message, tmp_path):
    path = written(tmp_path, [{"problem": "ok?", "answer": "1"}, {"problem": value, "answer": "1"}])
    with pytest.raises(TaskError, match=rf"task t: .*rows\.jsonl, row 1: column 'problem' cannot be read: .*{message}"):
        load_task(TaskConfig(name="t", path=str(path)), 0)
    with pytest.raises(ConfigError, match=rf"row 1: column 'problem' cannot be read: .*{message}"):
        problems_of(path, None, None)
    with pytest.raises(AuditError, match=rf"row 1: column 'problem' cannot be read: .*{message}"):
        read_answers(path, golds_only=True)
    if not isinstance(value, str):
        with pytest.raises(UnknownLayout, match=r"'problem' cannot be read"):
            product_row({"problem": value, "answer": "1"})


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_chat_in_the_named_column_is_asked_as_a_chat(suffix, tmp_path):
    path = written(tmp_path, [{"prompt": [{"role": "system", "content": "s"}, USER], "answer": "7"}], suffix)
    problem = load_task(TaskConfig(name="t", path=str(path), columns={"problem": "prompt"}), 0).problem(0)
    assert (problem.messages, problem.answer, problem.whole) == ((("system", "s"), ("user", "1+1?")), "7", True)
    assert problems_of(path, "prompt", None) == [[{"role": "system", "content": "s"}, USER]]


def test_the_parts_of_a_verl_prompt_are_joined(tmp_path):
    row = {"prompt": [{"role": "user", "content": PARTS}], "reward_model": {"ground_truth": "7"}}
    path = written(tmp_path, [row])
    for columns in ({}, {"problem": "prompt"}):
        task = TaskConfig(name="t", path=str(path), columns=columns)
        assert load_task(task, 0).problem(0).messages == (("user", "1+1?"),)


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        ("7", "7"),
        (7, "7"),
        (7.0, "7"),
        (["7"], "7"),
        ([7.0], "7"),
        (["7", "7"], "7"),
        ([], ""),
        ([None], ""),
        (["", "7"], "7"),
        (["7", 7.5, None, " ", "7"], any_of(["7", "7.5"])),
        ("1, 2", "1, 2"),
        ('["1", "2"]', '["1", "2"]'),
    ],
)
def test_a_gold_is_a_text_or_a_list_of_golds_of_which_any_is_right(value, gold):
    assert gold_text(value) == gold


def test_several_golds_are_read_from_every_layout_and_survive_a_file_of_the_products(tmp_path):
    verl = {"prompt": [USER], "reward_model": {"ground_truth": ["1/2", "0.5"]}}
    rows = [{"problem": "a", "answer": ["1/2", 0.5]}, {"problem": "b", "answer": ["\\boxed{1/2}", "0.5"]}]
    fetched = product_row({"problem": "a", "answer": ["1/2", "0.5"]})
    for layout in ([verl], rows, [fetched]):
        path = str(written(tmp_path, layout))
        task = load_task(TaskConfig(name="t", path=path), 0, boxed=BOXED.get)
        found = [task.problem(i) for i in range(task.size)]
        assert {alternatives(problem.answer) for problem in found} == {("1/2", "0.5")}
        assert {problem.solution for problem in found} == {""}, "a list of golds is no solution"
    assert spelled(found[0].answer) == "1/2 or 0.5"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([["7"]], "a list"),
        (["7", {"value": "8"}], "an object"),
        ({"value": "7"}, "an object"),
        (True, r"a boolean \(true\)"),
        ([True], "a boolean"),
    ],
)
def test_another_gold_is_refused_with_row_and_column_by_every_command(value, message, tmp_path):
    path = written(tmp_path, [{"problem": "a", "answer": "1"}, {"problem": "b", "answer": value}])
    with pytest.raises(TaskError, match=rf"row 1: column 'answer' cannot be read: .*{message}"):
        load_task(TaskConfig(name="t", path=str(path)), 0)
    found = CliRunner().invoke(app, ["grade", str(path), "--kind", "math", "--golds"])
    assert isinstance(found.exception, AuditError)
    with pytest.raises(UnknownLayout, match="'answer' cannot be read"):
        product_row({"problem": "a", "answer": value})
    verl = [{"prompt": [USER], "reward_model": {"ground_truth": value}}]
    with pytest.raises(TaskError, match=rf"row 0: column 'reward_model.ground_truth' .*{message}"):
        load_task(TaskConfig(name="t", path=str(written(tmp_path, verl))), 0)


def test_a_part_of_verls_answer_is_read_where_the_user_names_it(tmp_path):
    row = {"prompt": [USER], "reward_model": {"ground_truth": {"target": ["7", "seven"]}}}
    path = str(written(tmp_path, [row]))
    with pytest.raises(TaskError, match=r"column 'reward_model.ground_truth' cannot be read: it holds an object"):
        load_task(TaskConfig(name="t", path=path), 0)
    named = TaskConfig(name="t", path=path, columns={"answer": "reward_model.ground_truth.target"})
    assert alternatives(load_task(named, 0).problem(0).answer) == ("7", "seven")


def test_a_list_of_steps_is_a_chain_and_a_solution():
    assert joined_text(["1+1=2", 2.0, None, "2+1=3"]) == "1+1=2 2 2+1=3"
    with pytest.raises(CellError, match="a list"):
        joined_text([["1+1=2"]])


@pytest.mark.parametrize(
    ("gold", "inside"),
    [
        ("['7']", "7"),
        ('["x y"]', "x y"),
        ("('7',)", "7"),
        ("{'value': 7.5}", "7.5"),
        ('{"name": "Ann"}', "Ann"),
        ("Decimal('7')", "7"),
        ("array(['7'], dtype=object)", "7"),
        ("array(['7'], dtype='<U1')", "7"),
        ("b'7'", "7"),
        ('"7"', "7"),
        ("The answer is 7.", "7"),
        ("So the answer: $1,000$", "1,000"),
    ],
)
def test_what_a_gold_holds_that_is_no_value_itself_is_recognised(gold, inside):
    assert held(gold) == inside


@pytest.mark.parametrize(
    "gold",
    [
        "7", "[1, 2]", "['7', \"8\"]", '("a", "b")', "{'value': 7, 'unit': 'm'}", "['a', 7]", 'f("x")', "x is 7",
        "Area equals 3/4", "(f'(x), g''(x))", "5'6\"", r"\text{the answer is 7}", "''",
    ],
)  # fmt: skip
def test_a_gold_that_is_a_value_itself_is_left_as_it_is(gold):
    assert held(gold) == gold


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": [USER], "reward_model": None}, EMPTY_ANSWER),
        ({"prompt": [USER], "reward_model": {}}, EMPTY_ANSWER),
        ({"prompt": [USER], "reward_model": {"ground_truth": None}}, EMPTY_ANSWER),
        ({"prompt": [USER]}, EMPTY_ANSWER),
        ({"prompt": None, "reward_model": {"ground_truth": "7"}}, EMPTY_PROBLEM),
        ({"prompt": [], "reward_model": {"ground_truth": "7"}}, EMPTY_PROBLEM),
        ({"prompt": [{"role": "user", "content": " "}], "reward_model": {"ground_truth": "7"}}, EMPTY_PROBLEM),
        ({"prompt": [{"role": "system", "content": "s"}], "reward_model": {"ground_truth": "7"}}, EMPTY_PROBLEM),
    ],
)
def test_one_row_without_a_part_is_dropped_and_shown(bad, reason, tmp_path):
    good = {"prompt": [USER], "reward_model": {"ground_truth": "7"}}
    task = load_task(TaskConfig(name="t", path=str(written(tmp_path, [good, bad, good]))), 0)
    assert (task.size, task.dropped) == (2, {reason: [1]})
    assert "prompt" in task.examples[reason]


@pytest.mark.parametrize("layout", ["problem", "prompt", "question", "cot_answer"])
def test_null_parts_of_a_published_set_are_incomplete_rows(layout):
    rows = {
        "problem": {"problem": None, "answer": "1"},
        "prompt": {"prompt": [USER], "reward_model": None},
        "question": {"question": "q", "steps": None, "answer": None},
        "cot_answer": {"problem": "p", "cot": None, "cot_answer": None},
    }
    with pytest.raises(UnknownLayout, match=r"cannot be found|is empty"):
        product_row(rows[layout])


def rows_with(bad, good=9):
    return [{"problem": "1+1?", "answer": "2"}] * good + [{"problem": "1+1?", "answer": answer} for answer in bad]


def test_above_a_share_of_dropped_rows_the_run_stops_and_shows_one_of_each(tmp_path, tiny_config):
    path = written(tmp_path, rows_with([""]))
    task = TaskConfig(name="t", path=str(path), verifier="number")
    assert read_task(task, tiny_config).size == 9
    path = written(tmp_path, rows_with(["", "two apples"]))
    with pytest.raises(
        TaskError,
        match=r"2 of 11 rows of .* cannot be used \(18\.2%; max_dropped_share is 0\.1\): "
        r"dropped 1 empty answer \(row 9\); 1 unreadable gold answer \(row 10\), for example row 9: .*; "
        r"row 10: two apples.*raise max_dropped_share",
    ):
        read_task(task, tiny_config)
    single = written(tmp_path, rows_with([""], good=1))
    assert read_task(task, tiny_config).size == 1, "one row is no share"
    with pytest.raises(TaskError, match=r"1 of 2 rows .* \(50\.0%; max_dropped_share is 0\)"):
        read_task(task.model_copy(update={"path": str(single), "max_dropped_share": 0.0}), tiny_config)
    path = written(tmp_path, rows_with(["", "two apples"]))
    allowed = task.model_copy(update={"max_dropped_share": 0.5})
    assert read_task(allowed, tiny_config).size == 9


@pytest.fixture
def tiny_config():
    return load_config("quickstart")

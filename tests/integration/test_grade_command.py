"""`latent-grpo grade`: every row gets its reason, examples are shown safely, golds and disagreements are listed."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from latent_grpo.common.config import ConfigError
from latent_grpo.deploy.cli.app import app
from latent_grpo.deploy.grading.answer_file import AuditError, read_answers

pytestmark = pytest.mark.integration

ROWS = [
    {"response": r"so \boxed{\frac12}", "gold": "0.5"},
    {"response": r"so \boxed{36.}", "gold": "36"},
    {"response": r"so \boxed{204_6}", "gold": "204"},
    {"response": "the answer is 7", "gold": 7},
    {"response": "\\boxed{9^{9^{9^{9^9}}}} \x1b[2J[bold]", "gold": "x"},
    {"response": r"\boxed{5}", "gold": ""},
]
CARNIVAL = (  # a row of GSM8K's test split, which is published with a wrong answer
    "The girls are trying to raise money for a carnival. Kim raises $320 more than Alexandra, who raises $430, and "
    "Maryam raises $400 more than Sarah, who raises $300. How much money, in dollars, did they all raise in total?"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    table = {"completion": [row["response"] for row in ROWS], "answer": [str(row["gold"]) for row in ROWS]}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "rows.parquet")
    return folder


def grade(*arguments) -> str:
    result = CliRunner().invoke(app, ["grade", *map(str, arguments), "--processes", "1", "--time-limit", "0.5"])
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.mark.parametrize("end", ["raise SystemExit(3)", "raise RuntimeError('no licence')"])
def test_a_verifier_whose_constructor_does_not_return_is_one_line(folder, importable, end):
    name = f"ends_{abs(hash(end))}"
    (folder / f"{name}.py").write_text(f"class Ends:\n    def __init__(self):\n        {end}\n    grade = None\n")
    importable(folder)
    with pytest.raises(ConfigError, match=rf"Verifier '{name}:Ends' cannot be built: (SystemExit: 3|.*no licence)"):
        grade(folder / "rows.jsonl", "--kind", f"{name}:Ends")


def test_every_row_has_its_reason_and_the_report_is_readable_by_machines(folder):
    report = json.loads(
        grade(folder / "rows.jsonl", "--kind", "math", "--json", "--compare", "--output", folder / "out.jsonl")
    )
    assert {reason: found["count"] for reason, found in report["reasons"].items()} == {
        "correct": 2, "wrong": 1, "no_answer": 1, "timeout": 1, "out_of_memory": 0, "ungraded": 1,
    }  # fmt: skip
    assert report["mean_reward"] == pytest.approx(2 / 5)
    assert report["reasons"]["wrong"]["examples"] == [
        {"row": 2, "gold": "204", "parsed": "204_6", "response_end": r"so \boxed{204_6}"}
    ]
    assert {(case["row"], case["plain_reason"]) for case in report["disagreements"]} >= {(2, "correct"), (3, "correct")}
    written = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [(row["row"], row["reason"]) for row in written] == [
        (0, "correct"), (1, "correct"), (2, "wrong"), (3, "no_answer"), (4, "timeout"), (5, "ungraded"),
    ]  # fmt: skip


def test_the_table_shows_hostile_text_as_text_and_parquet_reads_the_same(folder):
    shown = grade(folder / "rows.parquet", "--kind", "math", "--examples", "1")
    assert "\x1b[2J" not in shown
    assert "[bold]" in shown
    assert "33.33%" in shown  # correct
    assert shown.count("16.67%") == 4


def test_the_gold_check_lists_unreadable_mislabelled_and_contradictory_rows(folder):
    rows = [
        (CARNIVAL, "2280"),
        ("3+1?", "4"),
        ("1+1?", "2"),
        ("1+1?", "2"),
        ("1+1?", "3"),
        ("e?", "a dozen"),
        ("h?", "0.5"),
    ]
    file = folder / "golds.jsonl"
    file.write_text("\n".join(json.dumps({"problem": p, "answer": a}) for p, a in rows))
    report = json.loads(grade(file, "--kind", "number", "--golds", "--json"))
    assert [issue["row"] for issue in report["unreadable"]] == [5]
    assert [issue["row"] for issue in report["mislabelled"]] == [0]
    assert [(issue["row"], issue["gold"]) for issue in report["contradictory"]] == [(4, "3")]
    assert (report["rows"], report["repeated"], report["refused"]) == (7, 1, [])
    assert "GSM8K test: the right answer is 2180" in " ".join(grade(file, "--kind", "number", "--golds").split())


def test_the_gold_check_reports_what_a_run_would_drop_and_what_no_response_would_match(tmp_path):
    golds = ["7", "#### 7", "<answer>7</answer>", "['7']", "{'value': 7}", "The answer is 7", "[7]", '("a", "b")']
    file = tmp_path / "golds.jsonl"
    file.write_text("\n".join(json.dumps({"problem": f"{i}?", "answer": gold}) for i, gold in enumerate(golds)))
    report = json.loads(grade(file, "--kind", "math", "--golds", "--json"))
    assert [issue["gold"] for issue in report["unreadable"]] == golds[1:3]
    assert {issue["gold"] for issue in report["refused"]} == set(golds[3:6])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("[1]", "expected an object"),
        ('{"response": ', "line 1 is not valid JSON"),
        (
            '{"text": "x", "gold": "1"}',
            "none of the columns response, .*; its columns are text, gold. Choose one with --response",
        ),
        ('{"response": "x", "gold": {"a": 1}}', "row 0: column 'gold' cannot be read: it holds an object"),
        ('{"response": true, "gold": "1"}', "row 0: column 'response' cannot be read: it holds a boolean"),
        ('{"response": "x", "gold": NaN}', r"none of its 1 rows can be graded: dropped 1 without gold \(row 0\)"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_that_says_where(tmp_path, text, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(AuditError, match=message):
        read_answers(file)


def test_an_output_that_cannot_be_written_is_one_line(folder, tmp_path):
    with pytest.raises(AuditError, match=r"--output .*none/out\.jsonl cannot be written: No such file.*; give another"):
        grade(folder / "rows.jsonl", "--kind", "math", "--output", tmp_path / "none" / "out.jsonl")


def test_a_device_stays_one(folder):
    grade(folder / "rows.jsonl", "--kind", "number", "--output", "/dev/null")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(AuditError, match=r"--output /dev/full cannot be written: No space left on device"):
        grade(folder / "rows.jsonl", "--kind", "number", "--output", "/dev/full")


def test_rows_without_a_part_are_left_out_and_counted(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"response": "x", "gold": "1"}, {"gold": "1"}, {"response": "x", "gold": None}]
    file.write_text("\n".join(map(json.dumps, rows)))
    found = read_answers(file)
    assert [row.number for row in found.rows] == [0]
    assert found.dropped == {"without response": [1], "without gold": [2]}


@pytest.mark.parametrize("kind", ["math", "number"])
def test_a_gold_that_the_verifier_cannot_read_leaves_its_row_ungraded(tmp_path, kind):
    file = tmp_path / "rows.jsonl"
    rows = [{"response": r"\boxed{24}", "gold": gold} for gold in ("He has 24, of 30.\n#### 24", "24", "25")]
    file.write_text("\n".join(map(json.dumps, rows)))
    report = json.loads(grade(file, "--kind", kind, "--json"))
    assert {reason: found["count"] for reason, found in report["reasons"].items() if found["count"]} == {
        "correct": 1, "wrong": 1, "ungraded": 1,
    }  # fmt: skip
    assert report["mean_reward"] == 0.5


def test_nested_columns_and_wrong_arguments(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "x", "reward_model": {"ground_truth": "1"}}))
    (row,) = read_answers(file, "text").rows
    assert (row.response, row.gold) == ("x", "1")
    with pytest.raises(AuditError, match=r"no file .*none"):
        read_answers(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="Unknown verifier 'maths'"):
        grade(file, "--kind", "maths", "--response-column", "text")
    with pytest.raises(AuditError, match="leave out --compare"):
        grade(file, "--kind", "math", "--golds", "--compare")

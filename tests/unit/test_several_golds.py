"""A gold cell that lists several golds: any of them is right, by every verifier and both protocols, and is shown so."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from latent_grpo.common.config import TaskConfig, load_config
from latent_grpo.common.golds import OR, any_of
from latent_grpo.common.tasks.sources import load_task
from latent_grpo.deploy.grading.answer_file import read_answers
from latent_grpo.deploy.grading.audit import audit, show
from latent_grpo.deploy.grading.gold_check import check_golds
from latent_grpo.deploy.run.findings import notes
from latent_grpo.deploy.run.problems import read_task
from latent_grpo.learner.sft.rows import visible_text
from latent_grpo.reward.answers import gold_is_parsable, grade
from latent_grpo.reward.pool import VerifierPool
from latent_grpo.reward.verifier import ANY_OF, Grade, UnreadableGoldError, judged, load_verifier

SHAPED = {
    "kind": "weighted_sum",
    "options": {"parts": [{"kind": "math", "weight": 1.0}, {"kind": "format", "weight": 0.5}]},
}


def test_what_readers_write_is_what_graders_read():
    assert OR == ANY_OF


@pytest.mark.parametrize(
    ("kind", "golds", "right", "wrong"),
    [
        ("number", ["7", "8.5"], r"\boxed{8.5}", r"\boxed{7.5}"),
        ("math", ["x+1", r"\frac{1}{2}"], r"\boxed{1+x}", r"\boxed{x+2}"),
        ("math", ["Paris", "Lutetia"], r"\boxed{lutetia}", r"\boxed{Rome}"),
        ("choice", ["A", "C"], r"\boxed{(C)}", r"\boxed{B}"),
        ("reference_number", ["7", "9"], "#### 9", "#### 8"),
        ("reference_math", ["x+1", "1+x"], r"\boxed{1+x}", r"\boxed{x + 2}"),
        ("reference_choice", ["A", "C"], "so C", "so B"),
        ("shaped", ["3", "4"], r"\boxed{4}", r"\boxed{5}"),
    ],
)
def test_any_of_several_golds_is_right_here_and_in_the_pool(kind, golds, right, wrong):
    gold = any_of(golds)
    with VerifierPool(1, definitions={"shaped": SHAPED}) as pool:
        found = pool.grade_many([(kind, text, gold) for text in (right, wrong, "")])
        assert found == pool.grade_many([(kind, text, any_of(golds[::-1])) for text in (right, wrong, "")])
    assert [verdict.reason for verdict in found] == ["correct", "wrong", "no_answer"]
    if kind != "shaped":
        assert [grade(kind, text, gold) for text in (right, wrong, "")] == found


def test_several_parts_that_a_verifier_reads_are_one_gold_as_ever():
    assert grade("math", r"\boxed{1, 2}", "1, 2").reason == "correct"
    assert grade("math", r"\boxed{1}", "1, 2").reason == "wrong"
    assert grade("math", r"\boxed{2, 1}", any_of(["1, 2", "2, 1"])).reason == "correct"
    assert grade("number", r"\boxed{7, 8}", any_of(["7", "8"])).reason == "wrong", "several answers hedge, as ever"


def test_golds_that_cannot_be_read_are_passed_over_unless_none_can():
    assert grade("number", r"\boxed{7}", any_of(["seven or so", "7"])).reason == "correct"
    assert gold_is_parsable("number", any_of(["seven or so", "7"]))
    assert not gold_is_parsable("number", any_of(["a few", "some"]))
    with pytest.raises(UnreadableGoldError, match="some"):
        grade("number", r"\boxed{7}", any_of(["a few", "some"]))


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([Grade(0.0, "wrong"), Grade(0.3, "wrong")], Grade(0.3, "wrong")),
        ([Grade(0.3, "wrong"), Grade(None, "ungraded"), Grade(0.0, "wrong")], Grade(None, "ungraded")),
        ([Grade(None, "ungraded"), Grade(0.9, "correct")], Grade(0.9, "correct")),
        ([Grade(0.0, "wrong"), None], None),
        ([None, Grade(1.0, "correct")], Grade(1.0, "correct")),
    ],
    ids=["the best", "one that could not judge", "one suffices", "not known yet", "known whatever the other is"],
)
def test_the_verdict_over_several_golds(verdicts, expected):
    by_gold = dict(zip("abc", verdicts, strict=False))
    assert judged(by_gold.__getitem__, any_of(by_gold)) == expected


def test_a_verifier_is_asked_until_one_gold_is_right():
    asked = []

    def against(gold):
        asked.append(gold)
        return Grade(1.0, "correct") if gold == "b" else Grade(0.0, "wrong")

    assert judged(against, any_of("abc")).reason == "correct"
    assert asked == ["a", "b"]


def test_a_task_says_that_rows_list_several_golds_and_trains_the_first(tmp_path):
    rows = [
        {"problem": "half?", "answer": ["1/2", "0.5"]},
        {"problem": "half?", "answer": ["0.5", "50%"]},
        {"problem": "third?", "answer": "3"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "mine", "path": str(path), "verifier": "math"}
    config = load_config({"model": {"path": "m"}, "tasks": [task]})
    source = read_task(config.tasks[0], config)
    assert notes([source], [], load_verifier) == [
        "mine: 2 rows list several gold answers, and any of them is right, for example row 0: 1/2 or 0.5"
    ], "golds that share one contradict nothing, and each is right by itself"
    assert visible_text(source.problem(0).answer) == r"</think>\boxed{1/2}"
    clash = {"problem": "half?", "answer": ["7", "8"]}
    path.write_text("".join(json.dumps(row) + "\n" for row in [rows[0], clash]))
    found = notes([load_task(TaskConfig(**task), 0)], [], load_verifier)
    assert "1 problem occurs again with another answer" in found[-1]
    assert "row 0: 1/2 or 0.5, row 1: 7 or 8" in found[-1]


def test_grade_reads_lists_of_golds_and_shows_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"problem": "p", "response": r"\boxed{8}", "gold": ["7", "8"]},
        {"problem": "p", "response": r"\boxed{9}", "gold": ["7", "some"]},
        {"problem": "p", "response": r"\boxed{9}", "gold": ["5", "6"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_answers(path).rows
    console = Console(file=io.StringIO(), width=200)
    with VerifierPool(1) as pool:
        report = audit(path, "number", pool, rows=read, examples=3)
        findings = check_golds(read, "number", pool)
    assert [verdict.reason for verdict in report.grades] == ["correct", "wrong", "wrong"]
    show(report, console, 3)
    assert "7 or 8" in console.file.getvalue()
    assert [(issue.row, issue.gold) for issue in findings.unreadable] == [(1, "some")]
    assert [(issue.row, issue.gold) for issue in findings.contradictory] == [(2, "5 or 6")]
    assert findings.refused == []

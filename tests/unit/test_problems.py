"""Rows that are known to be wrong, and problems in two tasks, are said at the start and never dropped."""

from latent_grpo.common.config import TaskConfig
from latent_grpo.common.tasks.known_faults import fingerprint
from latent_grpo.common.tasks.sources import StoredTask
from latent_grpo.common.types import Problem
from latent_grpo.deploy.run.problems import mislabelled, notes, overlaps

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
    assert notes([train], [held_out]) == [line]
    assert overlaps([train, task("other", ("Else?", "1"))]) == []


def test_a_task_that_is_evaluated_too_does_not_overlap_with_itself():
    source = task("train", ("Same text?", "1"))
    assert notes([source], [source]) == []


def test_a_fingerprint_sees_neither_space_nor_case_nor_punctuation_but_every_sign():
    assert fingerprint("Same\n  Text: $2+2$?") == fingerprint("same text 2 + 2.")
    assert fingerprint("2+2") != fingerprint("2-2")
    assert fingerprint("\ud800") != fingerprint("")

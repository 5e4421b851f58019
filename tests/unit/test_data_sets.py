"""`data fetch`: the authors' files as they lie become the product's columns, and a changed set does not pass unseen."""

from __future__ import annotations

import csv
import errno
import io
import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from latent_grpo.common.config import ConfigError, TaskConfig, load_config
from latent_grpo.common.files import file_hash
from latent_grpo.common.tasks.benchmarks import BENCHMARKS, INSTRUCTION, TRAINING_SETS, benchmark_tasks
from latent_grpo.common.tasks.sources import load_task
from latent_grpo.deploy.cli.app import app
from latent_grpo.deploy.data.fetch import MANIFEST, FetchError, Source, fetch, open_hub, open_local, remedy
from latent_grpo.deploy.data.layouts import UnknownLayout, product_row
from latent_grpo.deploy.data.sets import SETS, chosen
from latent_grpo.deploy.run.preparation import file_faults
from latent_grpo.deploy.run.progress import Reporter

GPQA_ROW = {"Question": "Q", "Correct Answer": "c", **{f"Incorrect Answer {i}": str(i) for i in (1, 2, 3)}}
SOLUTION = "Add them. The answer is \\boxed{5}."


def verl(problem: str, answer: str, *, high: bool = False, **extra):
    """verl's layout as the authors have it: low rows hold the instruction in the user message."""
    user = {"role": "user", "content": problem if high else f"{INSTRUCTION}\n{problem}"}
    system = [{"role": "system", "content": INSTRUCTION}] if high else []
    return {
        "data_source": "x",
        "prompt": [*system, user],
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"index": 0, **extra},
    }


@pytest.fixture
def authors(tmp_path):
    """A folder of files in the authors' layouts and names."""
    folder = tmp_path / "authors"
    folder.mkdir()
    rows = [{"problem": f"What is {i} and 2?", "answer": str(i + 2)} for i in range(3)]
    (folder / "Svamp-test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(
        pa.Table.from_pylist([verl("1+1?\nSay.", "2"), verl("2+2?", "4")]), folder / "GSM8k-Aug-test.parquet"
    )
    high = [verl("Solve x.", "7", high=True)]
    pq.write_table(pa.Table.from_pylist(high), folder / "DAPO-Math-17k-en-train.parquet")
    train = [{"problem": "2+3?", "cot": "<<2+3=5>>", "cot_answer": SOLUTION}]
    pq.write_table(pa.Table.from_pylist(train), folder / "GSM8k-Aug-oss-dup-all.parquet")
    return folder


def fetched(names, folder, **options) -> str:
    console = Console(file=io.StringIO(), width=300, soft_wrap=True)
    fetch(chosen(names), folder, Reporter(console), **options)
    return console.file.getvalue()


# --- layouts


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"problem": "p", "answer": 5}, ("p", "5", "", "")),
        ({"problem": "p", "cot": "c", "cot_answer": SOLUTION}, ("p", "5", "c", SOLUTION)),
        ({"problem": "p", "cot": "c", "cot_answer": SOLUTION, "answer": "6"}, ("p", "6", "c", SOLUTION)),
        (verl("two\nlines", "2"), ("two\nlines", "2", "", "")),
        (verl("p", "2", high=True), ("p", "2", "", "")),
        (verl("p", "2", question="the question itself"), ("the question itself", "2", "", "")),
        (verl("p", "2", question=f"{INSTRUCTION}\nWhat is 2?"), ("What is 2?", "2", "", "")),
        (verl(f"What is 2?\n{INSTRUCTION} ", "2", high=True), ("What is 2?", "2", "", "")),
        ({"question": "q", "steps": ["<<1+1=2>>", "<<2+1=3>>"], "answer": "3"}, ("q", "3", "<<1+1=2>> <<2+1=3>>", "")),
        ({"problem": "p", "solution": SOLUTION, "level": "1"}, ("p", "5", "", SOLUTION)),
    ],
)
def test_every_layout_becomes_the_products_columns(row, expected):
    assert tuple(product_row(row).values()) == expected


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x"}, "the columns text are none of the known layouts"),
        ({"problem": "p", "answer": None}, "answer cannot be found"),
        ({"problem": "p", "cot": "c", "cot_answer": "no box"}, "answer cannot be found"),
        ({**verl("p", "2"), "prompt": [{"role": "user", "content": "p"}]}, "not one user message with the instruction"),
        ({**verl("p", "2"), "reward_model": {}}, "reward_model has no ground_truth"),
        (verl(f"{INSTRUCTION} What is 2?", "2", high=True), "the user message has the instruction"),
        (
            {
                **verl("p", "2"),
                "prompt": [
                    {"role": "system", "content": "You are helpful."},
                    {"role": "user", "content": f"What is 2? {INSTRUCTION}"},
                ],
            },
            "on a line with other text",
        ),
        (verl("p", "2", question=f"What is 2? {INSTRUCTION}"), "extra_info.question has the instruction"),
    ],
)
def test_a_row_that_cannot_be_read_for_sure_is_refused(row, said):
    with pytest.raises(UnknownLayout, match=re.escape(said)):
        product_row(row)


# --- the authors' own files


def test_the_authors_files_are_taken_by_their_names_and_layouts(authors, tmp_path):
    names = ["svamp", "gsm8k-aug", "gsm8k-aug-oss-dup-all", "dapo-math-17k-en"]
    said = fetched(names, tmp_path / "data", local=authors)
    assert "svamp: 3 rows, where 1,000 were published" in said
    assert pq.read_table(tmp_path / "data/gsm8k_aug_test.parquet").to_pylist() == [
        {"problem": "1+1?\nSay.", "answer": "2"},
        {"problem": "2+2?", "answer": "4"},
    ]
    (row,) = pq.read_table(tmp_path / "data/gsm8k_aug_oss_dup_all.parquet").to_pylist()
    assert row == {"problem": "2+3?", "answer": "5", "cot": "<<2+3=5>>", "solution": SOLUTION}
    manifest = json.loads((tmp_path / "data" / MANIFEST).read_text())
    assert manifest.keys() == set(names)
    source = manifest["svamp"]["source"]
    assert (source["files"], source["revision"]) == (["Svamp-test.jsonl"], None)
    (task,) = benchmark_tasks(["svamp"], tmp_path / "data")
    assert load_task(task, 0).problem(2).answer == "4"


def test_a_fetched_set_is_left_alone_and_a_changed_one_is_refused(authors, tmp_path):
    folder = tmp_path / "data"
    fetched(["svamp"], folder, local=authors)
    assert "svamp: 3 rows" in fetched(["svamp"], folder, local=authors)  # the same rows once more
    content = (folder / "svamp.parquet").read_bytes()
    file = authors / "Svamp-test.jsonl"
    file.write_text(file.read_text().replace('"4"', '"9"'))
    first = json.loads((folder / MANIFEST).read_text())["svamp"]["source"]["xxh3_128"]
    with pytest.raises(FetchError, match="its rows are not those of the first fetch") as refusal:
        fetched(["svamp"], folder, local=authors)
    for known in (first, file_hash(file)):
        assert f"{file} (xxh3_128 {known})" in str(refusal.value)
    assert "revision" not in str(refusal.value), "local files have none"
    assert (folder / "svamp.parquet").read_bytes() == content
    (folder / "svamp.parquet").write_bytes(b"mine")
    with pytest.raises(FetchError, match="is not the file that was fetched on"):
        fetched(["svamp"], folder, local=authors)


def test_a_file_of_the_users_own_is_never_replaced(authors, tmp_path):
    (tmp_path / "svamp.parquet").write_bytes(b"mine")
    with pytest.raises(FetchError, match="is there, but not from this command"):
        fetched(["svamp"], tmp_path, local=authors)
    assert (tmp_path / "svamp.parquet").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("names", "folder", "said"),
    [
        (["svamp"], "nowhere", "there is no such folder"),
        (["multiarith"], "authors", "needs Multiarith-test.parquet or Multiarith-test.jsonl; the folder has DAPO"),
        (["svamp", "multiarith", "gsm-hard"], "authors", r"gsm-hard needs .*; the folder has .*leave these names out"),
        (["svamp"], "authors/Svamp-test.jsonl", "it is a file; give its folder"),
        (["math-train"], "authors", "math-train is none of the authors' sets"),
        (["gpqa"], "authors", "GPQA does not come with this program"),
    ],
)
def test_a_folder_without_the_set_says_what_it_has(authors, tmp_path, names, folder, said):
    with pytest.raises(FetchError, match=said):
        fetched(names, tmp_path / "data", local=tmp_path / folder)
    assert not (tmp_path / "data").exists(), "nothing is written of the names that are there either"


def test_a_damaged_file_says_which(authors, tmp_path):
    (authors / "Svamp-test.jsonl").write_text('{"problem": "p", "answer": "1"}\n\n{"problem"')
    with pytest.raises(FetchError, match=r"svamp: .*Svamp-test\.jsonl, line 3 is not valid JSON .* is the file compl"):
        fetched(["svamp"], tmp_path / "data", local=authors)
    (authors / "GSM8k-Aug-test.parquet").write_bytes(b"PAR1")
    with pytest.raises(FetchError, match=r"gsm8k-aug: .*GSM8k-Aug-test\.parquet cannot be read"):
        fetched(["gsm8k-aug"], tmp_path / "data", local=authors)
    assert list((tmp_path / "data").glob("*")) == []


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("Svamp-test.jsonl", '["p", "1"]', r"svamp: .*\.jsonl, element 0 of its list: expected an object, got 'p'"),
        ("Svamp-test.jsonl", b'{"problem": "\xff"}', r"Svamp-test\.jsonl, line 1 is not UTF-8"),
        ("gpqa_diamond.csv", "Question,Correct Answer\nQ", r"gpqa_diamond\.csv, row 0 has more or fewer cells than"),
        ("Svamp-test.jsonl", '{"text": "p"}', r"the columns text are none of the known layouts \(problem, answer; "),
        ("GPQA-test.jsonl", '{"problem": "p", "answer": "A"}', "the columns answer, problem; expected the raw ones"),
        ("GPQA-test.jsonl", "", r"gpqa: .* has the columns \(none\); expected the raw"),
    ],
)  # fmt: skip
def test_another_layout_is_named_with_what_is_allowed(authors, tmp_path, name, text, said):
    (authors / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FetchError, match=said):
        fetched(["svamp" if "Svamp" in name else "gpqa"], tmp_path / "data", local=authors)


@pytest.mark.parametrize("under", ["", "data", "data/deeper"])
def test_a_target_that_can_be_no_folder_is_refused_before_rows_are_read(tmp_path, under):
    file = tmp_path / "taken"
    file.write_text("a file, where the folder should be made")
    with pytest.raises(FetchError, match=r"^--to .*: .*taken is a file; give another folder with --to$"):
        fetched(["svamp"], file / under, hub=lambda data, revision: pytest.fail("rows were read"))


def test_a_target_that_cannot_be_made_is_refused_before_rows_are_read(tmp_path):
    folder = tmp_path / ("n" * 300)  # longer than file systems allow
    with pytest.raises(FetchError, match=r"^--to \S+ cannot be made \(.*\); give another folder with --to$"):
        fetched(["svamp"], folder, hub=lambda data, revision: pytest.fail("rows were read"))


def test_only_a_full_disk_asks_for_room(authors, tmp_path):
    assert remedy(OSError(errno.ENOSPC, "")).startswith("make room, or give")
    assert remedy(OSError(errno.EDQUOT, "")).startswith("make room, or give")
    (tmp_path / "data" / MANIFEST).mkdir(parents=True)
    with pytest.raises(FetchError, match=r"manifest\.json cannot be written: .*; give another folder with --to"):
        fetched(["svamp"], tmp_path / "data", local=authors)


def test_gpqa_is_copied_as_it_lies(authors, tmp_path):
    (authors / "GPQA-test.jsonl").write_text(json.dumps(GPQA_ROW))
    fetched(["gpqa"], tmp_path / "data", local=authors)
    (task,) = benchmark_tasks(["gpqa"], tmp_path / "data")
    assert load_task(task, 0).problem(0).answer in "ABCD"
    entry = json.loads((tmp_path / "data" / MANIFEST).read_text())["gpqa"]
    assert (entry["file"], entry["rows"]) == ("GPQA-test.jsonl", 1)
    (tmp_path / "data" / "GPQA-test.jsonl").unlink()
    (authors / "GPQA-test.jsonl").write_text(json.dumps({**GPQA_ROW, "Correct Answer": "another"}))
    with pytest.raises(FetchError, match="gpqa: its rows are not those of the first fetch"):
        fetched(["gpqa"], tmp_path / "data", local=authors)


def test_of_two_files_of_gpqa_the_one_with_the_raw_columns_is_taken(authors, tmp_path):
    pq.write_table(pa.Table.from_pylist([verl("Q\n(A) c", "A", high=True)]), authors / "GPQA-test.parquet")
    with pytest.raises(FetchError, match=r"GPQA-test\.parquet has the columns .*; expected the raw ones"):
        fetched(["gpqa"], tmp_path / "data", local=authors)
    (authors / "GPQA-test.jsonl").write_text(json.dumps(GPQA_ROW))
    fetched(["gpqa"], tmp_path / "data", local=authors)
    assert [path.name for path in (tmp_path / "data").glob("GPQA*")] == ["GPQA-test.jsonl"]


def test_gpqa_as_its_publishers_have_it_is_copied_too(authors, tmp_path):
    with pytest.raises(FetchError, match=r"fetch gpqa --from FOLDER.* takes gpqa_diamond\.csv, and GPQA-test\.jsonl"):
        fetched(["gpqa"], tmp_path / "data")
    with (authors / "gpqa_diamond.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, GPQA_ROW)
        table.writeheader()
        table.writerow({**GPQA_ROW, "Question": "Which, of\nthese?"})
    fetched(["gpqa"], tmp_path / "data", local=authors)
    (task,) = benchmark_tasks(["gpqa"], tmp_path / "data")
    assert task.path == str(tmp_path / "data" / "gpqa_diamond.csv")
    assert "Which, of\nthese?" in load_task(task, 0).problem(0).messages[0][1]


# --- the hub


def test_a_set_of_the_hub_is_fetched_again_at_its_recorded_revision(tmp_path):
    rows = [{"question": "q", "steps": ["<<1+1=2>>"], "answer": "2"}]
    newest = "aaa"

    def hub(data, revision):
        return Source(data.repository, revision or newest, (), None), len(rows), iter(rows)

    def entry():
        return json.loads((tmp_path / MANIFEST).read_text())["gsm8k-aug-train"]

    said = fetched(["gsm8k-aug-train"], tmp_path, hub=hub)
    assert "gsm8k-aug-train: 1 rows in" in said
    assert entry()["source"]["revision"] == "aaa"
    assert "is there and unchanged (1 rows)" in fetched(["gsm8k-aug-train"], tmp_path, hub=hub)
    (tmp_path / "gsm8k_aug_train.parquet").unlink()
    newest = "bbb"
    fetched(["gsm8k-aug-train"], tmp_path, hub=hub)
    assert entry()["source"]["revision"] == "aaa", "not the newest: it may have other rows"
    (tmp_path / "gsm8k_aug_train.parquet").unlink()
    rows[0] = {**rows[0], "answer": "3"}
    with pytest.raises(FetchError, match=r"Then .*: whynlp/gsm8k-aug at revision aaa; now: "):
        fetched(["gsm8k-aug-train"], tmp_path, hub=hub)
    assert not (tmp_path / "gsm8k_aug_train.parquet").exists()
    (tmp_path / MANIFEST).write_text("{}")
    fetched(["gsm8k-aug-train"], tmp_path, hub=hub)
    assert entry()["source"]["revision"] == "bbb", "without an entry the newest"


class HubOfFiles:
    """`datasets` and the hub's client as far as they are used: files get the split that `data_files` gives them."""

    def __init__(self, files: dict[str, list]):
        self.files = files

    def load_dataset(self, repository, part, *, revision, split="train", data_files=None):
        if data_files is None:
            data_files = {"train": list(self.files)}
        if isinstance(data_files, (list, tuple)):
            data_files = {"train": list(data_files)}
        if split not in data_files:
            raise ValueError(f"Unknown split {split!r}")
        return [row for file in data_files[split] for row in self.files[file]]

    def dataset_info(self, repository):
        return SimpleNamespace(sha="abc")

    def list_repo_files(self, repository, repo_type, revision):
        return list(self.files)


@pytest.mark.parametrize("name", ["svamp", "dapo-math-17k-en", "gsm8k-aug-train"])
def test_a_set_of_the_hub_is_the_rows_of_its_file_or_split(tmp_path, monkeypatch, name):
    hub = HubOfFiles({
        "test/Svamp-test.jsonl": [{"problem": "p", "answer": "1"}],
        "DAPO-Math-17k-en-train.parquet": [verl("d", "2", high=True)],
    } if name != "gsm8k-aug-train" else {"x": [{"question": "q", "steps": [], "answer": "3"}]})  # fmt: skip
    monkeypatch.setitem(sys.modules, "datasets", hub)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    fetched([name], tmp_path)
    (row,) = pq.read_table(tmp_path / SETS[name].file).to_pylist()
    assert row["problem"] in ("p", "d", "q")
    assert json.loads((tmp_path / MANIFEST).read_text())[name]["source"]["revision"] == "abc"
    assert open_hub(SETS[name], "def")[0].revision == "def"


def test_an_incomplete_row_is_dropped_from_a_training_set_and_refused_in_a_benchmark(authors, tmp_path):
    rows = [{"problem": "2+3?", "cot": "c", "cot_answer": text} for text in (SOLUTION, "no box")]
    pq.write_table(pa.Table.from_pylist(rows), authors / "GSM8k-Aug-oss-dup-all.parquet")
    assert "1 rows without a problem or an answer are left out" in fetched(
        ["gsm8k-aug-oss-dup-all"], tmp_path / "data", local=authors
    )
    (authors / "Svamp-test.jsonl").write_text('{"problem": "p", "answer": ""}')
    with pytest.raises(FetchError, match=r"row 0 of .*: answer cannot be found"):
        fetched(["svamp"], tmp_path / "data", local=authors)


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        FetchError, match=r"svamp: DJCheng/Latent-GRPO-Data cannot be read from the hub .*give it with --from"
    ):
        fetched(["svamp"], tmp_path)


# --- names


def test_names_of_sets_are_those_of_tasks_and_the_command_comes_first():
    assert set(SETS) == {*BENCHMARKS, *TRAINING_SETS}
    assert {name: found.file for name, found in SETS.items() if found.use == "benchmark"} == {
        name: found.files[0] for name, found in BENCHMARKS.items()
    }
    with pytest.raises(ConfigError, match="no data set gsm9k; known are gsm8k-aug, "):
        chosen(["gsm9k"])
    config = load_config("svamp", ["tasks.0.path=nowhere/x.parquet", "evaluation.tasks.0.path=nowhere/svamp.parquet"])
    config = config.model_copy(update={"tasks": [TaskConfig(name="math-train", path="here/math_train.parquet")]})
    assert file_faults(config)[:2] == [
        "latent-grpo data fetch math-train --to here",
        "latent-grpo data fetch svamp --to nowhere",
    ]


@pytest.mark.parametrize("name", ["Svamp-test.jsonl", "Svamp-test.parquet", "svamp.jsonl"])
def test_evaluate_takes_the_authors_names(tmp_path, name):
    (tmp_path / name).touch()
    (task,) = benchmark_tasks(["svamp"], tmp_path)
    assert task.path == str(tmp_path / name)
    with pytest.raises(ConfigError, match=r"^latent-grpo data fetch gsm8k-aug math500 --to .*\nno gsm8k_aug_test"):
        benchmark_tasks(["gsm8k-aug", "math500", "svamp"], tmp_path)


def test_the_command(authors, tmp_path):
    listed = CliRunner().invoke(app, ["data", "list"], env={"COLUMNS": "200"})
    assert all(name in listed.output for name in SETS)
    assert "GPQA-test.jsonl" in CliRunner().invoke(app, ["data", "list"], env={"COLUMNS": "400"}).output
    done = CliRunner().invoke(app, ["data", "fetch", "svamp", "--from", str(authors), "--to", str(tmp_path / "d")])
    assert done.exit_code == 0, done.output
    assert open_local(replace(SETS["svamp"]), authors)[0].files == ("Svamp-test.jsonl",)

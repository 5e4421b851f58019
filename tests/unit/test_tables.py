"""Files of problems as people keep them: every format gives the same rows, and only what is needed is read."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from latent_grpo.common.config import TaskConfig, load_config
from latent_grpo.common.tasks.sources import TaskError, load_task, open_rows
from latent_grpo.common.tasks.tables import TableError, open_table, source_files
from latent_grpo.deploy.cli.arguments import argument_with_home

ROWS = [{"problem": f"What is {i} + 1? ü", "answer": str(i + 1), "note": "x"} for i in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def as_csv(separator=","):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


def arrow(path, *, stream):
    table = pa.Table.from_pylist(ROWS)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def shards(folder, name="train-{i:05}-of-00005.parquet"):
    folder.mkdir()
    for i, row in enumerate(ROWS):
        pq.write_table(pa.Table.from_pylist([row]), folder / name.format(i=i))


def saved(folder, splits=None):
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    (data if splits is None else datasets.DatasetDict(dict.fromkeys(splits, data))).save_to_disk(str(folder))


def zstd(text):
    target = pa.BufferOutputStream()
    with pa.CompressedOutputStream(target, "zstd") as packed:
        packed.write(text.encode())
    return target.getvalue().to_pybytes()


WRITERS = {
    "rows.jsonl": lambda path: path.write_text(LINES, "utf-8"),
    "windows.jsonl": lambda path: path.write_bytes(LINES.replace("\n", "\r\n").encode("utf-8-sig")),
    "powershell.jsonl": lambda path: path.write_text(LINES, "utf-16"),
    "big-endian.jsonl": lambda path: path.write_bytes(codecs.BOM_UTF16_BE + LINES.encode("utf-16-be")),
    "joined.jsonl": lambda path: path.write_text("".join(f"\ufeff{line}\n" for line in LINES.split("\n")), "utf-8"),
    "no-last-line-end.jsonl": lambda path: path.write_text(LINES.rstrip("\n"), "utf-8"),
    "lines.json": lambda path: path.write_text(LINES, "utf-8"),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=1), "utf-8-sig"),
    "list-utf16.json": lambda path: path.write_text(json.dumps(ROWS), "utf-16"),
    "rows.ndjson": lambda path: path.write_text(LINES, "utf-8"),
    "ROWS.JSONL": lambda path: path.write_text(LINES, "utf-8"),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode("utf-8-sig"))),
    "members.jsonl.gz": lambda path: path.write_bytes(b"".join(map(gzip.compress, LINES.encode().splitlines(True)))),
    "rows.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(LINES.encode())),
    "rows.jsonl.zst": lambda path: path.write_bytes(zstd(LINES)),
    "gzip-in-disguise.jsonl": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "list.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "rows.csv": lambda path: path.write_text(as_csv(), "utf-8"),
    "windows.csv": lambda path: path.write_text(as_csv(), "utf-8-sig"),
    "excel.csv": lambda path: path.write_text(as_csv(), "utf-16"),
    "rows.csv.gz": lambda path: path.write_bytes(gzip.compress(as_csv().encode())),
    "rows.tsv": lambda path: path.write_text(as_csv("\t"), "utf-8"),
    "rows.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2),
    "file.arrow": lambda path: arrow(path, stream=False),
    "stream.arrow": lambda path: arrow(path, stream=True),
    "shards": shards,
    "shards-of-text": lambda path: (path.mkdir(), (path / "part-0.jsonl").write_text(LINES, "utf-8"),
                                    (path / "dataset_info.json").write_text("{}"), (path / "_SUCCESS").touch()),
    "saved-to-disk": saved,
    "saved-with-a-split": lambda path: saved(path, ["train"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_problems(name, tmp_path):
    WRITERS[name](tmp_path / name)
    task = load_task(TaskConfig(name="t", path=str(tmp_path / name)), 0)
    assert [(task.problem(i).messages[0][1], task.problem(i).answer) for i in range(len(ROWS))] == [
        (row["problem"], row["answer"]) for row in ROWS
    ]
    assert task.size == len(ROWS)
    few = load_task(TaskConfig(name="t", path=str(tmp_path / name), limit=3), 0)
    assert [few.problem(i) for i in range(few.size)] == [task.problem(i) for i in range(3)]


def test_a_glob_takes_its_files_in_order_and_their_hash_is_of_all(tmp_path):
    shards(tmp_path / "s", "b{i}.parquet")
    task = load_task(TaskConfig(name="t", path=str(tmp_path / "s" / "b[0-2].parquet")), 0)
    assert [task.problem(i).answer for i in range(task.size)] == ["1", "2", "3"]
    assert [file.name for file in source_files(str(tmp_path / "*" / "*4.parquet"))] == ["b4.parquet"]


def test_a_glob_takes_a_file_once_where_links_lead_in_a_circle(tmp_path):
    (tmp_path / "rows.jsonl").write_text(LINES)
    (tmp_path / "again").symlink_to(tmp_path)
    assert source_files(str(tmp_path / "**" / "*.jsonl")) == [tmp_path / "rows.jsonl"]


def repeated(*names):
    return pa.Table.from_arrays([pa.array([name[:1]]) for name in names], names=list(names))


SPARE = {
    "a.csv": lambda path: path.write_text("problem,answer,,\np,a,,\n"),
    "a.tsv": lambda path: path.write_text("x\tproblem\tx\tanswer\n1\tp\t2\ta\n"),
    "a.parquet": lambda path: pq.write_table(repeated("x", "problem", "answer", "x"), path),
    "a.arrow": lambda path: pa.feather.write_feather(repeated("x", "problem", "x", "answer"), path),
    "a.jsonl": lambda path: path.write_text('{"problem": "p", "answer": "a", "x": {"y": 1, "y": 2}, "z": 1, "z": 2}\n'),
    "a.json": lambda path: path.write_text(
        '[{"problem": [{"role": "user", "id": 1, "id": 2, "content": "p"}], "answer": "a"}]'
    ),
}


@pytest.mark.parametrize("name", SPARE)
def test_columns_and_keys_that_nobody_reads_may_be_given_twice(name, tmp_path):
    SPARE[name](tmp_path / name)
    problem = load_task(TaskConfig(name="t", path=str(tmp_path / name)), 0).problem(0)
    assert (problem.messages, problem.answer) == ((("user", "p"),), "a")


def other_sets(folder):
    shards(folder)
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "test-00000-of-00001.parquet")


def other_columns(folder):
    shards(folder)
    pq.write_table(pa.table({"question": ["?"]}), folder / "train-00004-of-00005.parquet")


def other_formats(folder):
    shards(folder, "part-{i}.parquet")
    (folder / "part-0.jsonl").write_text(LINES)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("absent.jsonl", lambda path: None, "no file .*absent.jsonl"),
        ("*.parquet", lambda path: None, r"no file matches .*\*\.parquet"),
        ("empty", lambda path: path.mkdir(), "a folder without a file of rows. Give a .parquet"),
        ("nested", lambda path: (path / "data").mkdir(parents=True), "it has the folders data"),
        ("two", other_sets, r"files of several sets; give one of them: .*test-\*-of-\*\.parquet.*train-"),
        ("columns", other_columns, "train-00004-of-00005.parquet has no column 'answer', which the first file has"),
        ("formats", other_formats, "files of several sets"),
        ("fewer", lambda path: (shards(path), (path / "train-00003-of-00005.parquet").unlink()),
         r"holds 4 of 5 shards that train-00000-of-00005.parquet counts; fetch .*\*\.parquet"),
        ("pipe.jsonl", os.mkfifo, "pipe.jsonl is a pipe or a device, and a table is read more than once"),
        ("twice.csv", lambda path: path.write_text("problem,answer,answer\n1,2,3\n"), "'answer' .* two values"),
        ("twice.parquet", lambda path: pq.write_table(pa.table([["?"], ["1"], ["2"]], ["problem", "answer", "answer"]),
                                                      path), "two columns of the name 'answer'"),
        ("twice.jsonl", lambda path: path.write_text('{"problem": "?", "answer": "1", "answer": "2"}\n'),
         "row 0: column 'answer' cannot be read: it holds two values under one name; keep one"),
        ("twice.json", lambda path: path.write_text('[{"problem": [{"role": "user", "content": 1, "content": 2}], '
                                                    '"answer": 3}]'), "'problem' cannot be read: it holds two values"),
        ("splits", lambda path: saved(path, ["train", "test"]), "has the splits train, test; give one of them"),
        ("rows.txt", lambda path: path.write_text("a"), "expected a .parquet"),
        ("rows", lambda path: path.write_text("a"), "expected a .parquet"),
        ("rows.parquet.gz", lambda path: path.write_bytes(b""), "compressed inside; unpack this one"),
        ("rows.jsonl", lambda path: path.write_text(""), "has no rows"),
        ("rows.csv", lambda path: path.write_text(""), "has no rows"),
        ("rows.csv", lambda path: path.write_text("problem,answer\n"), "has no rows"),
        ("rows.csv", lambda path: path.write_text("problem;answer\n1;2\n"), "its columns are problem;answer"),
        ("rows.parquet", lambda path: path.write_bytes(b"PAR1"), "cannot be read as parquet"),
        ("rows.arrow", lambda path: path.write_bytes(b"ARROW1"), "cannot be read as arrow"),
        ("rows.jsonl.gz", lambda path: path.write_bytes(gzip.compress(LINES.encode() * 99)[:-200]), "cannot be read"),
        ("rows.jsonl", lambda path: path.write_text('{\n "problem": 1}\n'), "line 1 is not valid JSON .*in one list"),
        ("rows.jsonl", lambda path: path.write_text('{"problem": ' + "9" * 5000 + "}"), "line 1 is not valid JSON"),
        ("rows.jsonl", lambda path: path.write_text("[" * 99999), "is not valid JSON"),
        ("rows.jsonl", lambda path: path.write_text("[1]"), "element 0 of its list: expected an object"),
        ("rows.jsonl", lambda path: path.write_text('{"problem": "a"}\n7\n'), "line 2: expected an object, got '7'"),
        ("rows.jsonl", lambda path: path.write_bytes(b'{"problem": "\xe9"}\n'), "line 1 is not UTF-8"),
        ("rows.jsonl", lambda path: path.write_bytes(LINES.encode("utf-16") + b"\x00"), "is not UTF-16"),
        ("rows.csv", lambda path: path.write_bytes(b"problem,answer\n\xe9,1\n"), "cannot be read as CSV"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line_that_names_it(name, write, message, tmp_path):
    write(tmp_path / name)
    with pytest.raises(TaskError, match=message) as error:
        load_task(TaskConfig(name="t", path=str(tmp_path / name)), 0)
    assert "\n" not in str(error.value)


def test_a_long_cell_of_a_csv_file_is_read(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"problem,answer\n{'7' * 300_000},1\n")
    assert len(load_task(TaskConfig(name="t", path=str(path)), 0).problem(0).messages[0][1]) == 300_000


def test_only_named_columns_are_read(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"a": {"b": 1, "c": 2}, "d": b"x", "e": 3}]), path)
    assert list(open_table(str(path)).rows(["a.b", "e", "absent"])) == [{"a": {"b": 1, "c": 2}, "e": 3}]
    task = TaskConfig(name="t", path=str(path), columns={"problem": "a.b", "answer": "e"})
    assert load_task(task, 0).problem(0).messages == (("user", "1"),)


MEASURE = """
import resource, sys
from latent_grpo.common.config import TaskConfig
from latent_grpo.common.tasks.sources import load_task
import pyarrow.parquet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for limit in (10, None):
    task = load_task(TaskConfig(name="t", path=sys.argv[1], limit=limit), 0)
    print(task.size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_column_that_no_task_names_takes_no_memory(tmp_path):
    path, rows = tmp_path / "rows.parquet", 400
    image = pa.array([os.urandom(100_000) for _ in range(50)] * (rows // 50))
    table = {"problem": [f"q{i}?" for i in range(rows)], "answer": ["5"] * rows, "image": image}
    pq.write_table(pa.table(table), path, compression="none", use_dictionary=False)
    assert path.stat().st_size > 38 * 2**20
    found = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    (few, _), (size, grown) = (map(int, line.split()) for line in found.stdout.splitlines())
    assert (few, size) == (10, rows)
    assert grown * 1024 < 16 * 2**20, f"{grown / 1024:.0f} MiB"


def test_a_path_with_a_tilde_is_below_the_home_folder_wherever_it_stands(tmp_path):
    home = Path("~").expanduser()
    task = {"name": "t", "path": "~/rows.jsonl"}
    config = load_config(
        {"model": {"path": "~/m"}, "tasks": [task], "evaluation": {"tasks": [{**task, "path": "hf:~/d:test"}]}},
        ["runs_folder=~/runs"],
    )
    found = [config.model.path, config.tasks[0].path, config.runs_folder]
    assert found == [str(home / "m"), str(home / "rows.jsonl"), str(home / "runs")]
    assert config.evaluation.tasks[0].path == f"hf:{home}/d:test"
    new = load_config({"model": {"new": {"tokenizer": "~/t/"}}, "tasks": [{**task, "max_prompt_tokens": 8}]},
                      ["tasks.0.max_response_tokens=8"])  # fmt: skip
    assert new.model.source == f"{home}/t/"
    with pytest.raises(ValueError, match=r"runs_folder: there is no home folder '~nobody-of-this-name'"):
        load_config("quickstart", ["runs_folder=~nobody-of-this-name/runs"])


@pytest.mark.parametrize(
    ("argument", "expanded"),
    [
        ("~/run", "{home}/run"),
        ("--resume=~/run", "--resume={home}/run"),
        ("--resume", "--resume"),
        ("tasks.0.path=~/rows", "tasks.0.path=~/rows"),  # a setting's own type does it
        ("a~/b", "a~/b"),
        ("--prompt=~ 7?", "--prompt=~ 7?"),
    ],
)
def test_a_tilde_in_an_argument_that_no_shell_has_written_out(argument, expanded):
    assert argument_with_home(argument) == expanded.format(home=Path("~").expanduser())


def test_a_folder_that_the_hubs_package_reads_is_read_by_its_named_columns(tmp_path):
    shards(tmp_path / "d", "train-{i:05}-of-00005.parquet")
    table = open_rows(TaskConfig(name="t", path=f"hf:{tmp_path / 'd'}"))
    assert table.columns == tuple(ROWS[0])
    assert list(table.rows(["answer"], 2)) == [{"answer": "1"}, {"answer": "2"}]


def test_with_a_limit_a_dataset_is_read_no_further_than_its_rows(tmp_path):
    """The second shard is damaged, which whoever builds the whole set meets."""
    folder = tmp_path / "d"
    shards(folder, "train-{i:05}-of-00005.parquet")
    first, second, *_ = sorted(folder.iterdir())
    second.write_bytes(b"PAR1")
    few = TaskConfig(name="t", path=f"hf:{folder}", limit=pq.read_metadata(first).num_rows)
    assert load_task(few, 0).size == few.limit
    for task in (few.model_copy(update={"limit": few.limit + 1}), TaskConfig(name="t", path=f"hf:{folder}")):
        with pytest.raises(TaskError, match=f"task t: .*{folder}"):
            load_task(task, 0)


def test_tables_that_are_no_tasks_say_so_without_its_name(tmp_path):
    with pytest.raises(TableError, match=r"^no file"):
        open_table(str(tmp_path / "x.jsonl"))

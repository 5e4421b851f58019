"""A run in an object store: whatever moment a kill comes at, its copy is a state that the run was in."""

from __future__ import annotations

import io
import json
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from fake_run import fake_config, fake_run

from latent_grpo.common.config import ConfigError
from latent_grpo.common.interrupts import Interrupted
from latent_grpo.deploy.run.folder import FolderInUse, RunFolder, run_lock, write_identity
from latent_grpo.deploy.run.foreign_code import check_origin
from latent_grpo.deploy.run.storage.copy import brought_up_to_date, local_copy, model_copy, remote_runs, working_copy
from latent_grpo.deploy.run.storage.index import BEGUN, INDEX, OWN, checksum, read_index
from latent_grpo.deploy.run.storage.lease import Lease, held_by
from latent_grpo.deploy.run.storage.store import StorageError, Store, WrittenElsewhere
from latent_grpo.deploy.run.storage.twin import read_twin
from latent_grpo.deploy.run.storage.upload import Upload, Uploader, push, uploading
from latent_grpo.learner.checkpoint import latest_checkpoint, write_checkpoint


class Dead(StorageError):
    """The machine that used the store is gone."""


class Dying(Store):
    """A store whose user is killed at the operation after `left` others, in the middle of a write."""

    def __init__(self, url: str, left: int):
        super().__init__(url)
        self.left = left

    def write(self, name, source, size):
        if not self.left and not name.startswith(OWN):  # these are one request: the store has them or has not
            super().write(name, io.BytesIO(source.read(size // 2)), size // 2)
        self.lives()
        return super().write(name, source, size)

    def read(self, name):
        self.lives()
        return super().read(name)

    def listed(self, folder=""):
        self.lives()
        return super().listed(folder)

    def remove(self, name):
        self.lives()
        return super().remove(name)

    def remove_folder(self, name):
        self.lives()
        return super().remove_folder(name)

    def lives(self):
        if not self.left:
            raise Dead("killed")
        self.left -= 1


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a run that matter elsewhere."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not any(p.startswith(".") for p in name.split("/"))}


def export(model: Path, content: bytes) -> None:
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(content)


def checkpoint(folder: Path, step: int) -> None:
    def fill(at: Path) -> None:
        (at / "learner").mkdir()
        (at / "learner" / "state").write_bytes(bytes([step]) * 100)

    write_checkpoint(folder / "checkpoints", step, fill, {"step": step}, keep=1)


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    """The states of a run between passes of its upload: each a copy of its folder."""
    root = tmp_path_factory.mktemp("lives")
    run, states = root / "run", []

    def state() -> None:
        states.append(Path(shutil.copytree(run, root / f"state-{len(states)}")))

    fake_run(run, steps=1, groups=1, group_size=2, finished=False)
    state()
    checkpoint(run, 1)
    (run / "checkpoints" / "scores.json").write_text('{"metric": "m", "scores": {}}')
    state()
    checkpoint(run, 2)  # the one before is removed
    with (run / "metrics.jsonl").open("a") as file:
        file.write((run / "metrics.jsonl").read_text().replace('"step": 1', '"step": 2'))
    (run / "trajectories/training/step=2").mkdir()
    shutil.copy(
        run / "trajectories/training/step=1/lineage-0000-part-0000.parquet",
        run / "trajectories/training/step=2/lineage-0000-part-0000.parquet",
    )
    state()
    identity = json.loads((run / "run.json").read_text()) | {"lineage": 1}
    (run / "run.json").write_text(json.dumps(identity))
    export(run / "model", b"a" * 300)
    state()
    export(run / "model", b"b" * 300)  # a run of more steps: other content of the same size
    (run / "summary.json").write_text('{"minutes": 1.0}')
    state()
    return states


def becomes(run: Path, state: Path) -> None:
    """Makes the folder of a run that one of its states."""
    for path in run.iterdir() if run.is_dir() else ():
        if not path.name.startswith("."):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(state, run, dirs_exist_ok=True)


def live(run: Path, states: list[Path], store: Store) -> int:
    """Uploads one state after the other; returns how many were uploaded before the store died."""
    upload, done = None, 0
    try:
        for state in states:
            becomes(run, state)
            if upload is None:
                upload = Upload(run, store, threads=1)  # in one order
                upload.attach()
            upload.run()
            done += 1
    except Dead:
        pass
    if upload is not None:
        upload.detach()
    return done


def there(url: str, folder: Path) -> dict[str, bytes] | None:
    """What another machine gets of the run; None where none has begun."""
    if read_index(Store(url)) is None:
        return None
    return contents(working_copy(url, [f"work_folder={folder}"], lambda line: None)[0])


def test_a_kill_at_any_operation_leaves_a_state_of_the_run_and_the_next_session_loses_nothing(lives, tmp_path):
    known = [contents(state) for state in lives]
    without_model = {name: content for name, content in known[3].items() if not name.startswith("model/")}
    seen, at = set(), 0
    while True:
        here = tmp_path / str(at)
        url, run = f"file://{here}/store/run", here / "run"
        done = live(run, lives, Dying(url, at))
        found = there(url, here / "elsewhere")
        if found is None:
            assert done == 0
        elif done == 4 and found == without_model:  # the old model is gone, and the new one is not whole
            seen.add("between models")
        else:
            assert found in known[max(done - 1, 0) : done + 1], f"killed at operation {at}"
            seen.add(known.index(found))
            assert done < 2 or latest_checkpoint(here / "elsewhere" / "run" / "checkpoints") is not None
        if done == len(lives):
            break
        assert live(run, lives[max(done, 0) :], Store(url)) == len(lives) - done, "it goes on on its own machine"
        assert there(url, here / "after") == known[-1]
        objects = {name for name in Store(url).listed() if not name.startswith(f"{OWN}/")}
        assert objects == known[-1].keys(), "what the kill left is removed"
        shutil.rmtree(here)
        at += 1
    assert seen >= {0, 1, 2, 3, 4}
    assert at >= 25, "operations of one life"


def test_a_run_that_was_brought_elsewhere_goes_on_there_and_the_first_machine_is_behind(lives, tmp_path):
    url, run, lines = f"file://{tmp_path}/store/run", tmp_path / "run", []
    assert live(run, lives[:3], Store(url)) == 3
    other, overrides = working_copy(url, [f"work_folder={tmp_path / 'b'}", "steps=7"], lines.append)
    assert overrides[1:] == ["steps=7", f"runs_folder=file://{tmp_path}/store"]
    assert lines[0].startswith(f"copying {url} to {other}")
    twin = read_twin(other)
    assert twin is not None
    assert twin.written_at is not None, "what was just brought is whole in the store"
    assert working_copy(url, [f"work_folder={tmp_path / 'b'}"], lines.append)[0] == other
    assert len(lines) == 1, "what is in step is not copied again"
    assert live(other, lives[2:], Store(url)) == 3
    with pytest.raises(WrittenElsewhere, match=f"another machine, and {run} is behind it; go on with.*--resume {url}"):
        Upload(run, Store(url)).attach()
    (run / "trajectories" / "training" / "mine.parquet").write_bytes(b"of an abandoned history")
    shutil.copytree(run, tmp_path / "a" / "run")
    back, _ = working_copy(url, [f"work_folder={tmp_path / 'a'}"], lines.append)
    assert "is behind" in lines[-1]
    assert contents(back) == contents(lives[-1])
    assert live(back, lives[-1:], Store(url)) == 1


def test_a_folder_that_is_another_run_is_left_alone(lives, tmp_path):
    url = f"file://{tmp_path}/store/run"
    live(tmp_path / "run", lives[:1], Store(url))
    shutil.copytree(lives[1], tmp_path / "b" / "run")
    with pytest.raises(ConfigError, match=r"holds something else than .*give another work_folder"):
        working_copy(url, [f"work_folder={tmp_path / 'b'}"], print)
    with pytest.raises(WrittenElsewhere, match=r"holds a run already.* is another one; give another run_name"):
        Upload(tmp_path / "b" / "run", Store(url)).attach()


def test_a_folder_of_other_files_is_not_made_a_copy(lives, tmp_path):
    url, notes = f"file://{tmp_path}/store/run", tmp_path / "b" / "run" / "notes.txt"
    live(tmp_path / "run", lives[:1], Store(url))
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    with pytest.raises(ConfigError, match=f"{notes.parent} holds something else than {url}"):
        working_copy(url, [f"work_folder={tmp_path / 'b'}"], print)
    assert notes.read_text() == "mine"


def test_of_two_that_bring_a_run_to_one_folder_the_second_changes_nothing(lives, tmp_path):
    url, here, lines = f"file://{tmp_path}/store/run", tmp_path / "b" / "run", []
    live(tmp_path / "run", lives[:1], Store(url))
    here.mkdir(parents=True)
    with run_lock(here), pytest.raises(FolderInUse, match="locked by process"):
        working_copy(url, [f"work_folder={tmp_path / 'b'}"], lines.append)
    brought_up_to_date(Store(url), here, lines.append)
    (here / "trajectories" / "new.parquet").write_bytes(b"of the run that has begun since")
    brought_up_to_date(Store(url), here, lines.append)  # it had looked before the first one was done
    assert (here / "trajectories" / "new.parquet").is_file()
    assert len(lines) == 1


def test_objects_of_others_are_left_alone_and_those_of_an_upload_that_was_killed_are_not(lives, tmp_path):
    store, run = Store(f"file://{tmp_path}/store/run"), tmp_path / "run"
    becomes(run, lives[0])
    store.write("data/theirs.bin", io.BytesIO(b"x"), 1)
    with pytest.raises(WrittenElsewhere, match=r"holds data/theirs.bin and no run: .* Give another run_name"):
        Upload(run, store).attach()
    assert store.listed().keys() == {"data/theirs.bin"}, "and no lease is left"
    store.write(BEGUN, io.BytesIO(), 0)  # as the first upload of any machine writes it, before the first file
    assert live(run, lives[:1], store) == 1
    assert "data/theirs.bin" not in store.listed()


def test_a_copy_for_readers_has_only_the_parts_that_they_need_and_follows_the_run(lives, tmp_path):
    url, run = f"file://{tmp_path}/store/run", tmp_path / "run"
    live(run, lives[:2], Store(url))
    copy = local_copy(url, ["trajectories"], tmp_path / "cache")
    assert (copy / "metrics.jsonl").is_file()
    assert not (copy / "checkpoints").is_dir() or not list(copy.glob("checkpoints/*/*"))
    live(run, lives[1:], Store(url))
    assert local_copy(url, ["trajectories"], tmp_path / "cache") == copy
    assert (copy / "metrics.jsonl").read_bytes() == (lives[-1] / "metrics.jsonl").read_bytes()
    model = local_copy(f"{url}/model", (), tmp_path / "cache")
    assert (model / "model.safetensors").read_bytes() == b"b" * 300
    assert contents(local_copy(url, None, tmp_path / "cache")) == contents(lives[-1])
    assert remote_runs(f"file://{tmp_path}/store") == [url]
    with pytest.raises(ConfigError, match="no run has begun there"):
        local_copy(f"{url}-2", (), tmp_path / "cache")
    with pytest.raises(ConfigError, match="has no nothing"):
        local_copy(f"{url}/nothing", (), tmp_path / "cache")
    assert model_copy("owner/name") == "owner/name"


def test_a_damaged_object_is_never_taken_for_the_run(lives, tmp_path):
    url = f"file://{tmp_path}/store/run"
    live(tmp_path / "run", lives, Store(url))
    model = tmp_path / "store/run/model/model.safetensors"
    model.write_bytes(b"c" * 300)
    with pytest.raises(StorageError, match="lacks a file of its index"):
        local_copy(url, None, tmp_path / "cache")
    index = tmp_path / "store/run" / INDEX
    index.write_bytes(index.read_bytes()[:-20])
    with pytest.raises(StorageError, match="not the index of a run, or damaged"):
        read_index(Store(url))


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "model/../../outside", ".remote.json", ".lock", ""])
def test_an_index_of_somebody_else_writes_nowhere_but_into_the_copy(lives, tmp_path, name):
    store = Store(f"file://{tmp_path}/store/run")
    live(tmp_path / "run", lives[:1], store)
    body = json.loads(store.read(INDEX))
    body["texts"][name] = "x"
    del body["checksum"]
    content = json.dumps(body | {"checksum": checksum(body)}).encode()
    store.write(INDEX, io.BytesIO(content), len(content))
    with pytest.raises(StorageError, match="which is no file of a run"):
        local_copy(store.url, None, tmp_path / "cache")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"texts": {"config.json": "{}"}}, "'run.json'"),
        ({"texts": {"config.json": "[]", "run.json": "{}"}}, "its config.json is no mapping"),
        ({"texts": {"config.json": "{", "run.json": "{}"}}, "Expecting"),
        ({"files": {"model/a": [-1, "x"]}}, "it gives a file -1 bytes"),
        ({"files": {"model/a": ["1", "x"]}}, "it gives a file '1' bytes"),
        ({"files": {"model/a": [1]}}, "index out of range"),
        ({"files": None}, "NoneType"),
        ({"format": 2}, "its index has format 2, this program reads 1"),
    ],
)
def test_an_index_that_is_no_runs_is_one_line(lives, tmp_path, change, said):
    store = Store(f"file://{tmp_path}/store/run")
    live(tmp_path / "run", lives[:1], store)
    body = json.loads(store.read(INDEX)) | change
    del body["checksum"]
    content = json.dumps(body | {"checksum": checksum(body)}).encode()
    store.write(INDEX, io.BytesIO(content), len(content))
    with pytest.raises(StorageError, match=said):
        working_copy(store.url, [f"work_folder={tmp_path / 'b'}"], print)
    assert not (tmp_path / "b").exists()


# --- one writer ------------------------------------------------------------------------------------------------------


def test_of_two_drivers_on_one_remote_run_the_second_is_refused(lives, tmp_path):
    store, first, second = Store(f"file://{tmp_path}/run"), tmp_path / "a", tmp_path / "b"
    becomes(first, lives[0])
    becomes(second, lives[0])
    upload = Upload(first, store, Lease(store, first, seconds=6.0, look_every_s=0.1))
    upload.attach()
    upload.run()
    assert "writes into" in (held_by(store) or "")
    with pytest.raises(WrittenElsewhere, match=r"is written by process \d+ on .*Wait for it to end, or stop it"):
        Upload(second, store, Lease(store, second, seconds=6.0, look_every_s=0.1)).attach()
    upload.run()
    upload.detach()
    assert held_by(store) is None


class Meeting(Store):
    """A store of two users, neither of whom lists for the first time before both have written."""

    def __init__(self, url: str, barrier: threading.Barrier):
        super().__init__(url)
        self._barrier = barrier

    def listed(self, folder=""):
        barrier, self._barrier = self._barrier, None
        if barrier is not None:
            barrier.wait(60)
        return super().listed(folder)


def test_two_that_begin_at_the_same_moment_never_both_go_on(tmp_path):
    barrier, taken = threading.Barrier(2), []
    stores = [Meeting(f"file://{tmp_path}/run", barrier) for _ in range(2)]
    leases = [Lease(store, tmp_path / str(i), seconds=6.0, look_every_s=0.05) for i, store in enumerate(stores)]

    def begins(lease: Lease) -> None:
        try:
            lease.take()
        except WrittenElsewhere:
            return
        taken.append(lease)

    threads = [threading.Thread(target=begins, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) < 2
    for lease in leases:
        lease.release()


def test_the_lease_of_a_machine_that_is_gone_runs_out_and_it_writes_nothing_more(lives, tmp_path):
    store, first, second = Store(f"file://{tmp_path}/run"), tmp_path / "a", tmp_path / "b"
    becomes(first, lives[0])
    gone = Upload(first, store, Lease(Dying(store.url, 2), first, seconds=1.0, look_every_s=0.05))
    gone.attach()  # and cannot renew
    lease = Lease(store, second, seconds=1.0, look_every_s=0.05)
    lease.take()
    with pytest.raises(StorageError):
        gone.run()
    lease.release()
    assert read_index(store) is None


def test_whoever_could_not_look_for_others_has_no_lease(tmp_path):
    store = Dying(f"file://{tmp_path}/run", 1)
    lease = Lease(store, tmp_path / "a")
    with pytest.raises(Dead):
        lease.take()  # it is written, and the list fails
    assert not lease.valid


class Watched(Store):
    """A store that calls `before` with the name of what is done, and the object, before it does it."""

    before = staticmethod(lambda operation, name: None)

    def write(self, name, source, size):
        self.before("write", name)
        return super().write(name, source, size)

    def listed(self, folder=""):
        self.before("list", folder)
        return super().listed(folder)


@pytest.mark.parametrize("moment", ["checkpoints/00001-step-000002/MANIFEST.json", INDEX])
def test_nothing_is_sent_or_removed_after_the_lease_has_run_out(lives, tmp_path, moment):
    run, store = tmp_path / "run", Watched(f"file://{tmp_path}/store/run")
    lease = Lease(store, run)
    becomes(run, lives[1])
    upload = Upload(run, store, lease, threads=1)
    upload.attach()
    upload.run()
    becomes(run, lives[2])  # the checkpoint before is removed
    after = []

    def runs_out(operation: str, name: str) -> None:
        if after or (operation, name) == ("write", moment):  # what has begun is not broken off
            after.append(name)
            lease.release()

    store.before = runs_out
    with pytest.raises(StorageError, match="the lease has run out"):
        upload.run()
    assert after == [moment]
    assert any(name.startswith("checkpoints/00000-step-000001/") for name in store.listed()), "nothing is removed"


def test_an_upload_that_is_given_up_while_it_takes_the_lease_does_not_have_it(lives, tmp_path):
    run, store = tmp_path / "run", Watched(f"file://{tmp_path}/store/run")
    becomes(run, lives[0])
    upload = Upload(run, store)
    store.before = lambda operation, name: upload.detach() if operation == "list" else None
    with pytest.raises(StorageError, match="the upload was given up"):
        upload.attach()
    store.before = lambda operation, name: None
    assert held_by(store) is None


def test_a_lease_is_given_back_without_waiting_for_a_store_that_does_not_answer(tmp_path):
    store, asked, answers = Watched(f"file://{tmp_path}/run"), threading.Event(), threading.Event()
    lease = Lease(store, tmp_path / "a", seconds=2.0)
    lease.take()

    def waits(operation: str, name: str) -> None:
        if operation == "write":
            asked.set()
            answers.wait(60)

    store.before = waits
    assert asked.wait(60)
    lease.release(wait_s=0.01)
    assert not lease.valid
    answers.set()
    lease.release(wait_s=60.0)
    assert not lease.valid, "a renewal that ended later gives no right"
    assert held_by(store) is None


# --- the thread ------------------------------------------------------------------------------------------------------


class Failing(Store):
    """A store that fails while `why` says so."""

    why: str | None = None

    def write(self, name, source, size):
        if self.why is not None and not name.startswith(f"{OWN}/writers"):
            raise StorageError(f"{self.url}: {self.why}")
        return super().write(name, source, size)


def test_a_failing_upload_is_told_once_and_goes_on_when_it_can(lives, tmp_path):
    run, lines = tmp_path / "run", []
    becomes(run, lives[0])
    store = Failing(f"file://{tmp_path}/store/run")
    upload = Upload(run, store)
    upload.attach()
    store.why = "the credentials have expired"
    uploader = Uploader(upload, store.url, run, lines.append, every_s=0.01, first_retry_s=0.01)
    uploader.begin()
    wait_for(lambda: lines)
    store.why = None
    wait_for(lambda: len(lines) == 2)
    assert "failed and is tried again, while the run goes on" in lines[0]
    assert "the credentials have expired" in lines[0]
    assert "goes on" in lines[1]
    becomes(run, lives[2])
    (run / "notes").mkdir()
    (run / "notes" / "a.txt").write_text("of a sink")
    assert uploader.end(30.0) is None
    assert there(store.url, tmp_path / "b") == contents(lives[2]) | {"notes/a.txt": b"of a sink"}


def test_what_is_not_there_at_the_end_is_said_and_can_be_pushed(lives, tmp_path):
    run, lines = tmp_path / "run", []
    becomes(run, lives[0])
    store = Failing(f"file://{tmp_path}/store/run")
    upload = Upload(run, store)
    upload.attach()
    upload.run()
    store.why = "access is denied"
    becomes(run, lives[2])
    uploader = Uploader(upload, store.url, run, lines.append, every_s=0.01, first_retry_s=0.01)
    uploader.begin()
    missing = uploader.end(0.3)
    assert missing is not None
    assert missing.startswith(f"{store.url} has not all of the run")
    assert f"latent-grpo push {run}" in missing
    assert there(store.url, tmp_path / "b") == contents(lives[0])
    with run_lock(run), pytest.raises(FolderInUse):
        push(run, lines.append)
    began = time.time()
    assert push(run, lines.append) == store.url
    assert there(store.url, tmp_path / "c") == contents(lives[2])
    twin = read_twin(run)
    assert twin is not None
    assert twin.url == store.url
    assert began <= (twin.written_at or 0.0) <= time.time()


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Ambiguous(Store):
    """A store of which the writes of an index fail: one that it made first, and then those that it did not."""

    failures: tuple[bool, ...] = ()

    def write(self, name, source, size):
        if name != INDEX or not self.failures:
            return super().write(name, source, size)
        made, *self.failures = self.failures
        if made:
            super().write(name, source, size)
        raise StorageError("the answer did not come")


def test_an_index_whose_write_failed_though_the_store_has_it_is_still_this_folders(lives, tmp_path):
    run, store = tmp_path / "run", Ambiguous(f"file://{tmp_path}/store/run")
    becomes(run, lives[0])
    upload = Upload(run, store)
    upload.attach()
    upload.run()
    for state, made in ((lives[1], True), (lives[2], False), (lives[3], False)):
        becomes(run, state)
        store.failures = (made,)
        with pytest.raises(StorageError, match="did not come"):
            upload.run()
    upload.detach()
    assert there(store.url, tmp_path / "b") == contents(lives[1])
    assert live(run, lives[3:], Store(store.url)) == 2, "nobody else has continued it"


def test_shards_that_a_new_export_does_not_have_are_removed_in_the_same_pass(lives, tmp_path):
    run, store = tmp_path / "run", Store(f"file://{tmp_path}/store/run")
    becomes(run, lives[3])
    (run / "model" / "model-2.safetensors").write_bytes(b"a" * 100)
    upload = Upload(run, store)
    upload.attach()
    upload.run()
    becomes(run, lives[4])
    upload.run()
    upload.detach()
    assert {name for name in store.listed() if not name.startswith(f"{OWN}/")} == contents(lives[4]).keys()


def test_what_a_failed_pass_has_sent_is_removed_if_the_run_has_dropped_it_by_the_next(lives, tmp_path):
    run, store = tmp_path / "run", Ambiguous(f"file://{tmp_path}/store/run")
    becomes(run, lives[0])
    upload = Upload(run, store)
    upload.attach()
    upload.run()
    becomes(run, lives[1])
    store.failures = (False,)
    with pytest.raises(StorageError):
        upload.run()
    becomes(run, lives[2])  # without the checkpoint that was sent
    upload.run()
    upload.detach()
    assert {name for name in store.listed() if not name.startswith(f"{OWN}/")} == contents(lives[2]).keys()


class Broken(Failing):
    """A store with a fault of its library."""

    def write(self, name, source, size):
        if self.why is not None:
            raise RuntimeError(self.why)
        return super().write(name, source, size)


def test_an_unexpected_error_is_told_and_tried_again(lives, tmp_path):
    run, lines, store = tmp_path / "run", [], Broken(f"file://{tmp_path}/store/run")
    becomes(run, lives[0])
    upload = Upload(run, store)
    upload.attach()
    store.why = "a fault"
    uploader = Uploader(upload, store.url, run, lines.append, every_s=0.01, first_retry_s=0.01)
    uploader.begin()
    wait_for(lambda: lines)
    assert "the upload failed and is tried again, while the run goes on: RuntimeError('a fault')" in lines[0]
    store.why = None
    assert uploader.end(30.0) is None
    assert there(store.url, tmp_path / "b") == contents(lives[0])


def test_a_link_out_of_the_runs_own_parts_ends_the_upload_at_once(lives, tmp_path):
    run, lines, store = tmp_path / "run", [], Store(f"file://{tmp_path}/store/run")
    becomes(run, lives[0])
    (tmp_path / "key").write_text("secret")
    (run / "extra.jsonl").symlink_to(tmp_path / "key")
    upload = Upload(run, store, whose="it is another user's")
    upload.attach()
    uploader = Uploader(upload, store.url, run, lines.append, first_retry_s=600.0)
    uploader.begin()
    wait_for(lambda: lines)
    assert "nothing more is uploaded: not uploaded: it is another user's, and " in lines[0]
    assert "extra.jsonl leads out of" in uploader.end(600.0)
    assert held_by(store) is None


# --- a run's own block -----------------------------------------------------------------------------------------------


def run_of(tmp_path, **changes):
    folder = RunFolder(tmp_path / "run")
    config = fake_config(runs_folder=f"file://{tmp_path}/store", **changes)
    folder.path.mkdir()
    write_identity(folder, config, 0, "train")
    return folder, config, Store(f"file://{tmp_path}/store/run")


def test_a_run_on_a_disk_is_not_uploaded(tmp_path):
    lines = []
    with uploading(RunFolder(tmp_path), fake_config(), lines.append, made=True) as begin:
        begin()
    assert lines == []
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_whole_in_the_store_once_its_block_has_ended(tmp_path):
    folder, config, store = run_of(tmp_path)
    lines = []
    with uploading(folder, config, lines.append, made=True) as begin:
        begin()
        folder.write_json("summary.json", {"minutes": 1.0})
    assert lines[-1] == f"uploaded: {store.url}"
    assert there(store.url, tmp_path / "b") == contents(folder.path)
    assert held_by(store) is None


def test_of_a_run_that_cannot_begin_nothing_is_in_the_store(tmp_path):
    folder, config, store = run_of(tmp_path)
    with pytest.raises(ConfigError, match="Ray cannot start"), uploading(folder, config, print, made=True):
        raise ConfigError("Ray cannot start")
    assert store.listed() == {}


EARLY_ENDS = (Interrupted(signal.SIGTERM, time.monotonic()), KeyboardInterrupt(), RuntimeError("x"))


@pytest.mark.parametrize("error", EARLY_ENDS, ids=lambda error: type(error).__name__)
def test_a_run_that_ends_early_is_uploaded_too(tmp_path, error):
    folder, config, store = run_of(tmp_path)

    def run() -> None:
        with uploading(folder, config, print, made=True) as begin:
            begin()
            folder.write_json("summary.json", {"sessions": [1.0]})
            raise error

    with pytest.raises(type(error)):
        run()
    assert there(store.url, tmp_path / "b") == contents(folder.path)


def test_a_run_that_is_not_whole_in_the_store_does_not_end_as_if_it_were(tmp_path):
    folder, config, store = run_of(tmp_path, deadlines={"upload_s": 0.2})
    lines, place = [], tmp_path / "store" / "run"

    def run() -> None:
        with uploading(folder, config, lines.append, made=True) as begin:
            place.rename(tmp_path / "elsewhere")
            place.write_text("no folder any more")
            begin()

    with pytest.raises(StorageError, match=rf"has not all of the run .*latent-grpo push {folder.path}"):
        run()
    assert any("the upload failed and is tried again" in line for line in lines)
    place.unlink()
    assert push(folder.path, lines.append) == store.url
    assert there(store.url, tmp_path / "b") == contents(folder.path)


def test_a_run_that_recovers_goes_on_though_its_store_is_gone_and_a_new_one_does_not(tmp_path):
    folder, config, store = run_of(tmp_path)
    lines, place = [], tmp_path / "store"
    place.write_text("no folder yet")
    with pytest.raises(StorageError), uploading(folder, config, lines.append, made=True):
        pytest.fail("it begins")
    assert lines == []
    with uploading(folder, config, lines.append, made=True, recovering=True) as begin:
        place.unlink()
        begin()
    assert "the run goes on, and the upload with it when it can" in lines[0]
    assert there(store.url, tmp_path / "b") == contents(folder.path)


def test_every_snapshot_of_a_run_that_goes_on_has_its_last_checkpoint_whole(tmp_path):
    run, over, store = (
        fake_run(tmp_path / "run", steps=1, groups=1).path,
        threading.Event(),
        Store(f"file://{tmp_path}/s/run"),
    )
    checkpoint(run, 0)

    def steps() -> None:
        step = 1
        while not over.is_set():
            with (run / "metrics.jsonl").open("a") as file:  # what a checkpoint has behind it is there before it is
                file.write(json.dumps({"step": step}) + "\n" + "torn")
                file.flush()
                file.truncate(file.tell() - 4)
            checkpoint(run, step)  # and the one before is removed
            step += 1

    thread = threading.Thread(target=steps)
    thread.start()
    upload, seen = Upload(run, store), set()
    upload.attach()
    try:
        for number in range(20):
            upload.run()
            copy = local_copy(store.url, None, tmp_path / f"cache-{number}")
            found = latest_checkpoint(copy / "checkpoints")
            assert found is not None
            assert found.skipped == ()
            last = json.loads((copy / "metrics.jsonl").read_text().splitlines()[-1])["step"]
            assert last >= found.step
            seen.add(found.step)
    finally:
        over.set()
        thread.join()
        upload.detach()
    assert len(seen) > 1


def test_a_run_without_a_copy_is_pushed_where_the_command_says(tmp_path):
    run = fake_run(tmp_path / "run", steps=1, groups=1)
    with pytest.raises(ConfigError, match=r"push .*none: it has no config\.json; give a run folder"):
        push(tmp_path / "none", print)
    with pytest.raises(ConfigError, match="the run has no copy in an object store; say where to: --to s3://BUCKET"):
        push(run.path, print)
    url = push(run.path, print, f"file://{tmp_path}/store")
    assert url == f"file://{tmp_path}/store/run"
    assert there(url, tmp_path / "b") == contents(run.path)


def test_what_a_run_refuses_is_refused_before_it_is_copied(tmp_path):
    run = fake_run(tmp_path / "run", steps=1, groups=1)
    stored = json.loads((run.path / "config.json").read_text())
    (run.path / "config.json").write_text(json.dumps(stored | {"metrics": {"sinks": ["foreign_trap:Sink"]}}))
    url, work = push(run.path, print, f"file://{tmp_path}/store"), f"work_folder={tmp_path / 'work'}"
    with pytest.raises(ConfigError, match=f"{url} cannot be resumed with other settings: group_size: 4 -> 8"):
        working_copy(url, [work, "group_size=8"], print, ["foreign_trap"])
    with pytest.raises(ConfigError, match=rf"{url} may be written by others, and its config.json names .*foreign_trap"):
        working_copy(url, [work], print)
    assert not (tmp_path / "work").exists()
    assert working_copy(url, [work], print, ["foreign_trap"])[0] == tmp_path / "work" / "run"
    with pytest.raises(ConfigError, match=rf"was copied from {url}, where others may write"):
        check_origin(tmp_path / "work" / "run", RunFolder(tmp_path / "work" / "run").config())


@pytest.mark.parametrize("name", ["model", "extra.json", "extra.jsonl", "trajectories/x.parquet"])
def test_what_somebody_elses_run_folder_links_to_elsewhere_is_not_uploaded(tmp_path, name):
    run = fake_run(tmp_path / "run", steps=1).path
    run.chmod(0o777)
    elsewhere = tmp_path / "private"
    elsewhere.mkdir()
    (elsewhere / "key").write_text("secret")
    (run / name).symlink_to(elsewhere if name == "model" else elsewhere / "key")
    with pytest.raises(StorageError, match=r"another user's, or may be .* leads out of .*private") as refused:
        push(run, lambda text: None, (tmp_path / "store").as_uri())
    assert refused.value.exit_code == 2
    assert b"secret" not in b"".join(p.read_bytes() for p in (tmp_path / "store").rglob("*") if p.is_file())


@pytest.mark.parametrize("name", ["checkpoints", "learner_records", "trajectories"])
def test_a_linked_folder_of_somebody_elses_run_is_not_uploaded(lives, tmp_path, name):
    run = tmp_path / "run"
    becomes(run, lives[1])
    run.chmod(0o777)
    (tmp_path / "private").mkdir()
    if (run / name).is_dir():
        shutil.copytree(run / name, tmp_path / "private", dirs_exist_ok=True)
        shutil.rmtree(run / name)
    (run / name).symlink_to(tmp_path / "private")
    with pytest.raises(StorageError, match=r"another user's, or may be .* leads out of .*private"):
        push(run, print, (tmp_path / "store").as_uri())


def test_the_users_own_parts_of_a_run_may_lie_on_another_disk(lives, tmp_path):
    run, disk, store = tmp_path / "run", tmp_path / "disk", Store(f"file://{tmp_path}/store/run")
    becomes(run, lives[1])
    whole = contents(run)
    disk.mkdir()
    dump = min(run.glob("trajectories/**/*.parquet"))
    dump.rename(disk / dump.name)
    dump.symlink_to(disk / dump.name)
    for name in ("checkpoints", "trajectories", "metrics.jsonl"):
        (run / name).rename(disk / name)
        (run / name).symlink_to(disk / name)
    upload = Upload(run, store)
    upload.attach()
    upload.run()
    upload.detach()
    assert there(store.url, tmp_path / "b") == whole
    assert push(run, print, (tmp_path / "store").as_uri()) == store.url


def test_a_run_that_this_process_made_may_link_out_whatever_its_folders_rights_are(tmp_path):
    folder, config, store = run_of(tmp_path)
    folder.path.chmod(0o777)  # as with umask 0
    (tmp_path / "disk").mkdir()
    folder.model.symlink_to(tmp_path / "disk")
    export(folder.model, b"a")
    with uploading(folder, config, print, made=True) as begin:
        begin()
    assert "model/model.safetensors" in store.listed()
    with pytest.raises(StorageError, match="leads out of"), uploading(folder, config, print, made=False) as begin:
        begin()


def test_links_of_other_programs_to_elsewhere_are_left_out_and_said_once(tmp_path):
    """wandb links its log in the user's cache (`wandb/run-*/logs/debug-core.log`)."""
    folder, config, store = run_of(tmp_path)
    (tmp_path / "core.log").write_text("secret")
    logs = folder.path / "wandb" / "run-1" / "logs"
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to(tmp_path / "core.log")
    (folder.path / "wandb" / "other.log").symlink_to(tmp_path / "core.log")
    (folder.path / "wandb" / "run-1" / "own.log").write_text("a line")
    lines = []
    with uploading(folder, config, lines.append, made=True) as begin:
        begin()
        folder.write_json("summary.json", {"minutes": 1.0})
    assert lines[-1] == f"uploaded: {store.url}"
    assert [line for line in lines if line.startswith("link")] == [
        f"link out of the run's folder, not uploaded: {folder.path}/wandb/other.log and 1 more"
    ]
    assert push(folder.path, print) == store.url
    assert {name for name in there(store.url, tmp_path / "b") if "/" in name} == {"wandb/run-1/own.log"}


def test_a_link_within_a_runs_folder_is_uploaded(tmp_path):
    run = fake_run(tmp_path / "run", steps=1).path
    (run / "notes.txt").symlink_to("config.json")
    push(run, lambda text: None, (tmp_path / "store").as_uri())
    assert (tmp_path / "store" / "run" / "notes.txt").read_bytes() == (run / "config.json").read_bytes()

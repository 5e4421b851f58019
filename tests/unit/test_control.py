"""`latent-grpo scale`: the run answers each request once, with a reason, or nothing is changed."""

import threading
import time

import pytest

from latent_grpo.common.config import ConfigError, load_config
from latent_grpo.deploy.run.control import FOLDER, Control, Scaling, request_scale
from latent_grpo.deploy.run.folder import create_run, reopen_run, run_lock

ROOM = 3


class FakePool:
    def __init__(self):
        self.wanted = self.size = 2
        self.resized, self.busy_s, self.weights_s = [], 0.0, 0.25

    def resize(self, workers, *, at_once=False):
        self.wanted = self.size = workers
        self.resized.append((workers, at_once))


class Live:
    """A run that goes on: its folder is locked, and it looks at requests until the block ends."""

    def __init__(self, path, *overrides, grows=False):
        config = load_config("quickstart", ["rollout.workers=2", "rollout.min_workers=2", *overrides])
        self.folder = create_run(config, "run", path)
        self.pool, self.said, self._over = FakePool(), [], threading.Event()
        self._control = Control(self.folder, config, self.said.append, room=lambda: ROOM, grows=grows)
        self._thread = threading.Thread(target=self._serve)

    def _serve(self):
        while not self._over.wait(0.05):
            self._control.serve(self.pool)

    def __enter__(self):
        self._lock = run_lock(self.folder.path)
        self._lock.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._over.set()
        self._thread.join()
        self._lock.__exit__(None, None, None)


def test_a_number_that_fits_is_accepted_kept_and_said(tmp_path):
    with Live(tmp_path) as run:
        reply = request_scale(tmp_path, 3)
        assert reply.accepted
        assert reply.sentence == "2 -> 3 workers; the new ones load the current weights first"
        assert request_scale(tmp_path, 2, at_once=True).sentence == "3 -> 2 workers; their groups go to others"
        assert request_scale(tmp_path, 2).sentence == "the run has 2 worker(s) already"
    assert run.pool.resized == [(3, False), (2, True)]
    assert [line.partition(" (")[0] for line in run.said] == ["workers: 2 -> 3", "workers: 3 -> 2"]
    assert run.folder.config().rollout.workers == 2
    assert not list((tmp_path / FOLDER).iterdir())  # every request and reply is gone


@pytest.mark.parametrize(
    ("workers", "why"),
    [(1, "1 is below rollout.min_workers (2)"), (9, "this machine has room for 3 worker(s) beside the learner, got 9")],
)
def test_a_number_that_cannot_be_is_refused_with_the_reason(tmp_path, workers, why):
    with Live(tmp_path) as run:
        reply = request_scale(tmp_path, workers)
    assert (reply.accepted, reply.sentence) == (False, why)
    assert run.pool.resized == []


def test_a_number_above_that_of_autoscaling_is_refused(tmp_path):
    with Live(tmp_path, "rollout.max_workers=2") as run:
        reply = request_scale(tmp_path, 3)
    assert reply.sentence == "3 is above rollout.max_workers (2), up to which the run scales itself"
    assert run.folder.config().rollout.workers == 2


def test_a_request_that_a_session_took_and_never_answered_is_no_endless_wait(tmp_path):
    folder = Live(tmp_path).folder

    def take():
        while not (found := list((tmp_path / FOLDER).glob("*.request.json"))):
            time.sleep(0.05)
        found[0].unlink()

    thread = threading.Thread(target=take)
    thread.start()
    with run_lock(folder.path), pytest.raises(ConfigError, match="has taken the request and did not answer"):
        request_scale(tmp_path, 3, answer_s=1.0)
    thread.join()


def test_a_scaled_number_survives_a_job_that_starts_again_unless_it_sets_another(tmp_path):
    with Live(tmp_path) as run:
        assert request_scale(tmp_path, 3).accepted
    same, other = (load_config("quickstart", [f"rollout.workers={n}", "rollout.min_workers=2"]) for n in (2, 4))
    assert reopen_run(run.folder.path, [], "train", same)[1].rollout.workers == 3
    assert reopen_run(run.folder.path, [], "train", other)[1].rollout.workers == 4


def test_a_cluster_may_grow(tmp_path):
    with Live(tmp_path, grows=True):
        reply = request_scale(tmp_path, 9)
    assert reply.accepted
    assert reply.sentence.endswith("; 6 of them start when the cluster has room")


def test_a_run_that_does_not_answer_changes_nothing_later(tmp_path):
    run = Live(tmp_path)
    with run_lock(tmp_path), pytest.raises(ConfigError, match=r"did not answer within 0\.3 s, and nothing was changed"):
        request_scale(tmp_path, 3, answer_s=0.3)
    with run:
        time.sleep(1.0)
    assert run.pool.resized == []


def test_a_run_that_has_stopped_or_ended_and_a_folder_without_one_are_refused(tmp_path):
    folder = Live(tmp_path / "run").folder
    with pytest.raises(ConfigError, match=r"the run has stopped; `latent-grpo train --resume \S+ rollout.workers=3`"):
        request_scale(folder.path, 3)
    folder.model.mkdir()
    (folder.model / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="the run has ended; there is nothing to scale"):
        request_scale(folder.path, 3)
    with pytest.raises(ConfigError, match=r"it has no config\.json; give the folder of a run"):
        request_scale(tmp_path, 3)


def test_what_is_no_request_is_answered_too(tmp_path):
    with Live(tmp_path) as run:
        requests = tmp_path / FOLDER
        (requests / "1-x.request.json").write_text('{"workers": 2.5, "at_once": false, "by": "x"}')
        end = time.monotonic() + 20
        while not (reply := requests / "1-x.reply.json").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        assert '"accepted": false' in reply.read_text()
    assert run.pool.resized == []


def test_a_run_scales_itself_between_its_bounds_and_says_so():
    given = ["rollout.workers=2", "rollout.min_workers=2", "rollout.max_workers=4", "max_staleness=1"]
    pool, said = FakePool(), []
    scaling = Scaling(load_config("quickstart", given), pool, said.append)
    for _ in range(12):
        pool.busy_s += 10.0 * pool.wanted  # all of them work all the time, and the learner waits
        metrics = scaling.after(10.0, 8.0)
    assert metrics == {"rollout/workers": 4.0, "rollout/busy_share": 1.0, "rollout/weights_s": 0.25}
    assert said[0] == "workers: 2 -> 3 (the learner waits 80% of a step for rollouts)"
    assert pool.resized == [(3, False), (4, False)]


def test_a_run_that_scales_itself_gives_back_workers_that_find_no_place():
    pool, said = FakePool(), []
    scaling = Scaling(load_config("quickstart", ["rollout.workers=2", "rollout.max_workers=4"]), pool, said.append)
    pool.wanted = 4  # two of them wait for room
    for _ in range(20):
        scaling.after(1.0, 0.5)
    assert pool.resized == [(2, False)]
    assert said == ["workers: 4 -> 2 (the others have found no place for 20 steps)"]


def test_without_an_upper_bound_the_number_stays():
    pool, said = FakePool(), []
    scaling = Scaling(load_config("quickstart", ["rollout.workers=2"]), pool, said.append)
    for _ in range(12):
        pool.busy_s += 10.0
        metrics = scaling.after(10.0, 8.0)
        assert metrics == {"rollout/workers": 2.0, "rollout/busy_share": 0.5, "rollout/weights_s": 0.25}
    assert not said
    assert not pool.resized

"""A training run in an S3 bucket: it goes on from there on a machine that has nothing of it, bit for bit."""

import shutil
import signal
import threading

import psutil
import pytest
import torch
import yaml
from s3_server import s3_server
from test_command import command_line, family, start, steps_done, wait_for
from training import COMMON, PROFILE, tiny

from latent_grpo import open_run
from latent_grpo.common.config import ConfigError
from latent_grpo.common.metrics import read_metrics
from latent_grpo.common.models import load_model
from latent_grpo.common.store import TrajectoryStore
from latent_grpo.deploy.evaluation.evaluate import evaluation_config
from latent_grpo.deploy.export.export import export
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.storage.index import read_index
from latent_grpo.deploy.run.storage.store import Store
from latent_grpo.deploy.train import resume, train
from latent_grpo.deploy.view.run_view import open_run as open_view
from latent_grpo.deploy.view.status import status_of

pytestmark = pytest.mark.integration
QUIET = ("evaluation.at_start=false", "evaluation.at_end=false", "checkpoint.every=0")


@pytest.fixture(scope="module")
def server():
    with s3_server("tests") as running:
        yield running


@pytest.fixture
def bucket(server):
    return server.url


def weights_of(model):
    return dict(load_model(model).named_parameters())


@pytest.mark.slow  # test_train.py resumes a run that is uploaded; test_storage.py brings one to another machine
def test_a_run_goes_on_from_its_url_on_another_machine_bit_for_bit(whole, bucket, tmp_path):
    here, there, url = tmp_path / "here", tmp_path / "there", f"{bucket}/runs/half"
    places = (f"runs_folder={bucket}/runs", f"work_folder={here}", "run_name=half")
    half = train(tiny(*COMMON, *QUIET, *places, "steps=3"), "half")
    assert half.path == here / "half"
    shutil.rmtree(here)  # the machine is gone
    assert status_of(open_view(url)).state == "finished"
    with pytest.raises(ConfigError, match=rf"{url} may be written by others, .*--allow-plugins training"):
        resume(url, ["steps=6", f"work_folder={there}"])
    assert not there.exists(), "nothing was copied for it"
    resumed = resume(url, ["steps=6", f"work_folder={there}"], allowed=["training"])
    assert resumed.path == there / "half"

    expected, found = weights_of(whole.model), weights_of(resumed.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [(row["step"], row["lineage"]) for row in read_metrics(resumed.path)] == [
        (1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1),
    ]  # fmt: skip

    run = open_run(url)
    assert run.metrics()["step"].to_pylist() == [1, 2, 3, 4, 5, 6]
    assert run.trajectories(columns=["group_uid"]).num_rows == sum(
        TrajectoryStore(resumed.trajectories).read(step).num_rows for step in range(1, 7)
    )
    exported = export(url, str(tmp_path / "exported"))
    assert all(torch.equal(weights_of(exported)[name], expected[name]) for name in expected)
    plan = evaluation_config(f"{url}/model", [], allowed=["training"])
    assert plan.config.model.path is not None
    assert plan.config.model.path.endswith("half/model")
    with pytest.raises(ConfigError, match="was copied from"):
        evaluation_config(f"{url}/model", [])
    with pytest.raises(ConfigError, match=f"this is a run; give its trained model, {url}/model"):
        evaluation_config(url, [])


@pytest.mark.slow  # it starts the command twice; test_storage.py kills an upload at every operation
def test_a_machine_that_is_lost_in_mid_run_loses_only_the_steps_since_the_last_upload(
    whole, bucket, environment, tmp_path
):
    profile, work, log, url = tmp_path / "tiny.yaml", tmp_path / "work", tmp_path / "log", f"{bucket}/runs/lost"
    profile.write_text(yaml.safe_dump(PROFILE))
    settings = (*COMMON, "evaluation.at_start=false", "evaluation.at_end=false", "checkpoint.every=1", "steps=6")
    settings += (f"runs_folder={bucket}/runs", f"work_folder={work}", "run_name=lost")
    process = start(environment, log, "--profile", str(profile), *settings)
    wait_for(lambda: steps_done(work / "lost") >= 3, "three steps", process, log)
    (worker,) = [p for p in family(process) if "WorkerActor" in command_line(p)]
    worker.send_signal(signal.SIGSTOP)  # the run waits for it; the upload goes on

    def uploaded():
        index = read_index(Store(url))
        return index is not None and any(name.startswith("checkpoints/") for name in index.files)

    wait_for(uploaded, "a checkpoint in the bucket", process, log)
    for one in (psutil.Process(process.pid), *family(process)):
        one.kill()
    process.wait(60)
    shutil.rmtree(work)

    process = start(environment, log, "--profile", str(profile), *settings)
    assert process.wait(600) == 0, log.read_text()
    said = log.read_text()
    assert f"copying {url} to {work / 'lost'}" in said
    assert "resuming from" in said
    assert f"uploaded: {url}" in said
    expected, found = weights_of(whole.model), weights_of(work / "lost" / "model")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert "AKIATESTS" not in said


class Saying(Reporter):
    """Keeps the lines, and calls `at` for each."""

    def __init__(self, at):
        super().__init__()
        self.lines, self._at = [], at

    def say(self, text):
        self.lines.append(text)
        self._at(text)


@pytest.mark.slow  # it waits for retries; test_storage.py has them with a store that fails at once
def test_a_store_that_is_gone_for_a_while_does_not_stop_the_run(ray_session, server, tmp_path):
    failed = threading.Event()

    def at(line):
        if line.startswith("uploading to"):
            server.stop()
        if "the upload failed" in line:
            failed.set()
            server.start()

    reporter, url = Saying(at), f"{server.url}/runs/gone"
    settings = (f"runs_folder={server.url}/runs", f"work_folder={tmp_path}", "run_name=gone", "steps=2", *QUIET)
    train(tiny(*COMMON, *settings), "p", reporter)
    assert failed.is_set()
    assert any("it cannot be reached" in line for line in reporter.lines)
    assert reporter.lines[-1] != f"uploaded: {url}"
    assert f"uploaded: {url}" in reporter.lines
    assert status_of(open_view(url)).state == "finished"

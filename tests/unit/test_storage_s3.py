"""Runs on a real S3 server, what is said where one refuses, and that no credentials are shown."""

from __future__ import annotations

import io
import os
import shutil

import pytest
from fake_run import fake_run
from s3_server import SECRET, refusing_server, s3_server

from latent_grpo import open_run
from latent_grpo.common.config import ConfigError, load_config
from latent_grpo.common.remote_url import checked_url
from latent_grpo.deploy.export.export import EXPORTED
from latent_grpo.deploy.run.storage.copy import local_copy, remote_runs
from latent_grpo.deploy.run.storage.lease import Lease
from latent_grpo.deploy.run.storage.store import StorageError, Store
from latent_grpo.deploy.run.storage.upload import Upload
from latent_grpo.deploy.view.run_view import open_run as open_view
from latent_grpo.deploy.view.status import all_statuses, status_of


@pytest.fixture(scope="module")
def bucket():
    with s3_server("tests") as server:
        yield server.url


def uploaded(run, url):
    upload = Upload(run, Store(url))
    upload.attach()
    upload.run()
    return upload


def test_a_run_in_a_bucket_is_read_as_one_on_a_disk(bucket, tmp_path):
    folder = fake_run(tmp_path / "run")
    folder.model.mkdir()
    large = os.urandom(12 * 2**20)  # more than one part of a multipart upload
    (folder.model / "model.safetensors").write_bytes(large)
    (folder.model / "config.json").write_text("{}")
    url = f"{bucket}/runs/run"
    upload = uploaded(folder.path, url)
    assert status_of(open_view(url)).state == "running", "its lease is held"
    upload.detach()
    status = status_of(open_view(url))
    assert (status.state, status.folder, status.step) == ("finished", url, 3)
    assert remote_runs(f"{bucket}/runs") == [url]
    assert [one.run for one in all_statuses(f"{bucket}/runs")] == ["run"]
    here, there = open_run(folder.path), open_run(url)
    assert there.metrics().equals(here.metrics())
    assert there.trajectories().equals(here.trajectories())
    assert there.learner_records(steps=[2]).equals(here.learner_records(steps=[2]))
    cache = tmp_path / "cache"
    assert not (local_copy(url, ["trajectories"], cache) / "model").exists()
    assert (local_copy(url, EXPORTED, cache) / "model" / "model.safetensors").read_bytes() == large


def test_what_retention_removes_here_is_removed_there(bucket, tmp_path):
    folder = fake_run(tmp_path / "run")
    url = f"{bucket}/retention/run"
    upload = uploaded(folder.path, url)
    assert [name for name in Store(url).listed() if "step=1/" in name]
    for store in (folder.trajectories, folder.learner_records):
        shutil.rmtree(store / "training" / "step=1")
    assert "step=1" in Store(f"{url}/trajectories/training").folders()
    upload.run()
    upload.detach()
    assert not [name for name in Store(url).listed() if "step=1/" in name]
    assert Store(f"{url}/trajectories/training").folders() == ["step=2", "step=3"], "no empty folder stays"


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("NoSuchBucket", 404, "there is no such bucket; create it, or correct the URL"),
        ("AccessDenied", 403, "access is denied: the credentials of the environment are missing, wrong or expired"),
        ("InvalidAccessKeyId", 403, "access is denied"),
        ("ExpiredToken", 400, "the credentials have expired; renew them: every try reads them again"),
    ],
)
def test_a_refusal_is_one_clear_line_without_a_secret(code, status, said, tmp_path):
    folder = fake_run(tmp_path / "run", steps=1, groups=1)
    with refusing_server(code, status):
        with pytest.raises(StorageError) as raised:
            Upload(folder.path, Store("s3://bucket/runs/run")).attach()
        assert str(raised.value).startswith(f"s3://bucket/runs/run: {said}")
        assert SECRET not in str(raised.value)
        if code != "NoSuchBucket":  # a list of nothing, as `pyarrow.fs` has it
            with pytest.raises(StorageError, match="s3://bucket/runs"):
                remote_runs("s3://bucket/runs")
    assert not (folder.path / ".remote.json").exists(), "nothing is left that a second try would stumble over"


def test_credentials_that_are_renewed_in_mid_run_are_used_at_the_next_try():
    with refusing_server("ExpiredToken", 400, accepts="AKIANEW"):
        store = Store("s3://bucket/runs/run")
        with pytest.raises(StorageError, match="the credentials have expired"):
            store.write("a", io.BytesIO(b"a"), 1)
        os.environ["AWS_ACCESS_KEY_ID"] = "AKIANEW"
        assert store.write("a", io.BytesIO(b"a"), 1).size == 1


def test_a_bucket_that_does_not_exist_and_a_server_that_is_gone(bucket, tmp_path):
    folder = fake_run(tmp_path / "run", steps=1, groups=1)
    with pytest.raises(StorageError, match="no such bucket"):
        Upload(folder.path, Store("s3://another/run")).attach()
    before = os.environ["AWS_ENDPOINT_URL"]
    os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
    try:
        with pytest.raises(StorageError, match="it cannot be reached; is the network up, and the endpoint right"):
            Lease(Store("s3://tests/gone"), folder.path).take()
    finally:
        os.environ["AWS_ENDPOINT_URL"] = before


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"s3://AKIA:{SECRET}@bucket/runs", "a URL with credentials"),
        ("s3://AKIA@bucket/runs", "a URL with credentials"),
        (f"s3://bucket/runs?secret_key={SECRET}", "a URL with options"),
        ("s3:/bucket/runs", "a URL has two slashes"),
        ("s3://", r"expected s3://BUCKET/PREFIX"),
        ("hdfs://name/runs", "expected s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, file:///FOLDER or a path"),
        ("file://runs", "three slashes"),
        ("s3://bucket/a/../b", "no parts"),
    ],
)
def test_a_url_that_cannot_be_one_is_refused_and_a_secret_in_it_is_never_repeated(url, said):
    with pytest.raises(ConfigError, match=said) as raised:
        load_config("quickstart", [f"runs_folder={url}"])
    assert SECRET not in str(raised.value)
    with pytest.raises(ConfigError, match=said):
        checked_url(url)


def test_urls_and_paths_stay_what_they_are():
    assert checked_url("s3://bucket/runs/") == "s3://bucket/runs"
    assert checked_url("gs://bucket") == "gs://bucket"
    assert checked_url("file:///shared/runs") == "file:///shared/runs"
    assert load_config("quickstart", ["runs_folder=/shared/runs"]).runs_folder == "/shared/runs"


def test_no_credentials_stand_in_what_a_run_leaves(bucket, tmp_path):
    folder = fake_run(tmp_path / "run", steps=1, groups=1)
    url = f"{bucket}/secrets/run"
    uploaded(folder.path, url).detach()
    objects = [Store(url).read(name) for name in Store(url).listed()]
    files = [path.read_bytes() for path in folder.path.rglob("*") if path.is_file()]
    assert not [content for content in (*objects, *files) if SECRET.encode() in content or b"AKIATESTS" in content]


def test_a_bucket_that_is_gone_is_not_taken_for_an_empty_one(bucket):
    for read in (remote_runs, local_copy):
        with pytest.raises(StorageError, match="there is no such bucket; create it, or correct the URL"):
            read("s3://another/runs")
    assert remote_runs(f"{bucket}/empty") == []
    with pytest.raises(ConfigError, match="no run has begun there"):
        local_copy(f"{bucket}/empty")

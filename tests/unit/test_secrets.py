"""Secrets stand in no text that is shown or stored, in no setting, and in no file that others read."""

from __future__ import annotations

import io
import os
import re
import stat

import pytest
from rich.console import Console

from latent_grpo.common.config import ConfigError, load_config
from latent_grpo.common.secrets import literal_secrets, redacted
from latent_grpo.deploy.cluster.staging import SubmitError
from latent_grpo.deploy.cluster.submit import passed_variables, secrets_in, submit
from latent_grpo.deploy.run.machine import keep_local, private_token
from latent_grpo.deploy.run.preparation import check
from latent_grpo.deploy.run.progress import Reporter

ENVIRONMENT = {"HF_TOKEN": "hf_abcdefgh", "MY_KEY": "sesame-open", "HF_HOME": "/data/hub", "PATH": "/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("asked with hf_abcdefgh and sesame-open", "asked with [redacted] and [redacted]"),
        ("train verifiers.judge.options.api_key=abc", "train verifiers.judge.options.api_key=[redacted]"),
        ("--judge.api_key abc --steps 3", "--judge.api_key [redacted] --steps 3"),
        ('{"api_key": "abc", "sort_key": "b"}', '{"api_key": "[redacted]", "sort_key": "b"}'),
        ("WANDB_API_KEY=abc", "WANDB_API_KEY=[redacted]"),
        ("at https://me:pass@host/x?token=abc", "at https://[redacted]@host/x?token=[redacted]"),
        ("https://host:8265/a@b in /data/hub", "https://host:8265/a@b in /data/hub"),
        ("first_token=true, latent-end token: 9", "first_token=true, latent-end token: 9"),
        ("learner.tokens_per_microbatch=4096", "learner.tokens_per_microbatch=4096"),
    ],
)
def test_a_secret_is_redacted_and_nothing_else(text, shown):
    assert redacted(text, ENVIRONMENT) == shown


def test_what_a_run_says_holds_no_secret():
    shown = io.StringIO()
    Reporter(Console(file=shown, width=200)).say("[yellow]reading s3://user:password@host/data[/]")
    assert shown.getvalue() == "reading s3://[redacted]@host/data\n"


def test_a_setting_that_holds_a_secret_is_refused_by_its_key_and_not_shown():
    judge = {"kind": "number", "options": {"api_key": "abcd1234", "api_key_variable": "JUDGE_KEY"}}
    task = {"name": "t", "path": "builtin:chain_arithmetic", "verifier": "judge"}
    config = load_config({"model": {"path": "x"}, "tasks": [task], "verifiers": {"judge": judge}})
    with pytest.raises(ConfigError, match=r"verifiers.judge.options.api_key: a secret .* submit --env NAME") as refused:
        check(config)
    assert "abcd1234" not in str(refused.value)
    assert literal_secrets({"tasks": [{"path": "https://me:pass@host/x"}]}) == ["tasks.0.path"]
    assert literal_secrets({"first_token": "a", "tokenizer": "b", "path": "https://host/x"}) == []
    assert literal_secrets({"password": 12345678, "token": 9, "api_key": None, "secret": False}) == ["password"]
    several = {"api_keys": ["abcd1234", "<pad>"], "hub": {"api_key": ["x1"]}, "token": [1, 2], "sort_keys": ["a"]}
    assert literal_secrets(several) == ["api_keys.0", "api_keys.1", "hub.api_key.0"]


def test_submit_takes_the_names_of_variables_and_never_shows_a_value():
    assert passed_variables(["MY_KEY"], ENVIRONMENT) == {"MY_KEY": "sesame-open"}
    with pytest.raises(SubmitError, match="--env OTHER: there is no such variable"):
        passed_variables(["OTHER"], ENVIRONMENT)
    with pytest.raises(SubmitError, match="takes the name of a variable alone, got 'MY_KEY' with more") as refused:
        passed_variables(["MY_KEY=sesame-open"], ENVIRONMENT)
    assert "sesame" not in str(refused.value)


JUDGE = "verifiers.judge.options.api_key"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "tasks.0.path=https://me:sesame@h/x", "--judge.api_key=sesame"], "tasks.0.path, judge.api_key"),
        (["train", f"--{JUDGE}", "sesame99"], JUDGE),
        (["train", f"{JUDGE}=12345678"], JUDGE),
        (["train", "verifiers={judge: {options: {api_key: sesame99}}}"], JUDGE),
        (["train", "judge.api_key=sesame", "judge.api_key=null"], "judge.api_key"),
        (["train", "judge.token=sesame"], "judge.token"),
        (["push", "r", "--to", "https://me:sesame@h/x"], "to"),
        (["push", "r", "--to", "https://me:sesame@h/x?token=sesame"], "to"),
        (["runs", "s3://AKIA:sesame@bucket/x"], "argument 2"),
        (["runs", "--json", "s3://AKIA:sesame@bucket/x?a=b"], "json"),
        (["runs", "s3://AKIA:sesame@bucket/x?a=b"], "argument 2"),
        (["train", "--files", "judge.api_key=sesame"], "judge.api_key"),
    ],
)
def test_submit_refuses_a_secret_in_any_form_of_an_argument_before_it_asks_the_cluster(arguments, named):
    with pytest.raises(SubmitError, match=rf"^{re.escape(named)}: a secret does not .*docs/cluster.md") as refused:
        submit(arguments, "http://127.0.0.1:1")
    assert "sesame" not in str(refused.value)
    assert "12345678" not in str(refused.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", f"{JUDGE}=null"],
        ["train", "tasks.0.options.token=<eos>"],
        ["train", "--tasks.0.options.token", "</s>"],
        ["generate", "--prompt=What is ssh://x:y@z ?"],
        ["generate", "--prompt", "What is ssh://x:y@z: {"],
        ["inspect", "token", "run"],
    ],
)
def test_submit_takes_what_is_no_secret(arguments):
    assert secrets_in(arguments) == []


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_only_its_owner_reads_rays_token(tmp_path):
    home, token = {"HOME": str(tmp_path)}, tmp_path / ".ray" / "auth_token"
    private_token(home, make=False)
    assert not token.exists(), "a cluster's token is the cluster's to give"
    private_token(home)
    assert (mode(token), mode(token.parent), len(token.read_text())) == (0o600, 0o700, 64)
    made = token.read_text()
    token.chmod(0o644)  # as Ray writes it
    private_token(home, make=False)
    assert (mode(token), token.read_text()) == (0o600, made)
    private_token({"HOME": str(tmp_path / "other"), "RAY_AUTH_TOKEN": "a" * 64})
    assert not (tmp_path / "other").exists()


def test_a_ray_of_this_machine_stays_on_it_and_a_cluster_is_left_as_it_is():
    alone, cluster = {}, {"RAY_ADDRESS": "10.0.0.1:6379"}
    keep_local(alone)
    keep_local(cluster)
    assert alone == {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    assert cluster == {"RAY_ADDRESS": "10.0.0.1:6379"}

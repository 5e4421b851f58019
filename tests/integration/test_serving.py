"""vLLM's own server with latent steps, over HTTP: it answers as `LatentModel` does, and refuses what it cannot."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from latent_grpo import LatentModel

pytestmark = [pytest.mark.integration, pytest.mark.vllm]
QUESTION = "9+0*1-7+7-2-2?"
START_S = 300


@pytest.fixture(scope="module")
def server(trained_folder, tmp_path_factory):
    """`ask(route, **fields)`: status and JSON of a request to a server of the model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "latent_grpo.deploy", "serve", "--model", str(trained_folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", "8", "--served-model-name", "m"]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)

    def ask(route, **fields):
        body = json.dumps({"model": "m", **fields}).encode() if fields else None
        headers = {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(address + route, body, headers), timeout=60) as found:
                text = found.read().decode()
                return found.status, json.loads(text) if text and not fields.get("stream") else text
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    try:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(OSError):
                if ask("/health")[0] == 200:
                    break
            time.sleep(0.5)
        else:
            pytest.fail(log.read_text()[-3000:])
        yield ask
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # a session of its own: its processes alone
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


@pytest.fixture(scope="module")
def expected(trained_folder):
    """`expected(**settings)`: what the model in this process answers."""
    model = LatentModel(trained_folder)
    return lambda **settings: model.generate(QUESTION, **settings)[0]


def visible(text):
    """A text without the special tokens, which a server leaves out."""
    for token in ("<pad>", "<eos>"):
        text = text.replace(token, "")
    return text


CHAT = [{"role": "user", "content": QUESTION}]


def test_a_chat_is_answered_as_in_python(server, expected):
    for seed, noise in ((0, 0.0), (3, 1.0)):
        extra = {"vllm_xargs": {"noise": noise}} if noise else {}
        status, found = server("/v1/chat/completions", messages=CHAT, seed=seed, max_tokens=18, **extra)
        here = expected(seed=seed, noise=noise, max_tokens=18)
        assert status == 200, found
        (choice,) = found["choices"]
        assert choice["message"]["content"] == visible(here.text)
        assert choice["finish_reason"] == here.finish_reason
        assert found["usage"]["completion_tokens"] == here.steps
        assert found["usage"]["prompt_tokens"] == here.prompt_tokens


def test_settings_of_a_request_are_its_own_and_those_left_open_the_model_s(server, expected):
    settings = {"temperature": 1.5, "top_p": 0.9, "top_k": 5, "seed": 7, "max_tokens": 12}
    _, found = server("/v1/completions", prompt=f"{QUESTION}<think>", **settings)
    assert found["choices"][0]["text"] == visible(expected(**settings).text)
    _, greedy = server("/v1/completions", prompt=f"{QUESTION}<think>", temperature=0, max_tokens=18)
    assert greedy["choices"][0]["text"] == visible(expected(top_k=1, max_tokens=18).text)


def test_several_samples_and_requests_at_a_time_have_draws_of_their_own(server, expected):
    fields = {"messages": CHAT, "seed": 3, "n": 4, "max_tokens": 18, "vllm_xargs": {"noise": 1.0}}
    _, found = server("/v1/chat/completions", **fields)
    texts = [choice["message"]["content"] for choice in found["choices"]]
    assert texts == [visible(expected(seed=3 + n, noise=1.0, max_tokens=18).text) for n in range(4)]
    answers = [server("/v1/chat/completions", **{**fields, "seed": None, "n": 1})[1] for _ in range(4)]
    unseeded = {answer["choices"][0]["message"]["content"] for answer in answers}
    assert len(unseeded) > 1
    for _ in range(3):  # more than the server has slots
        status, _ = server("/v1/chat/completions", **{**fields, "n": 8})
        assert status == 200


def test_a_stream_says_the_same(server, expected):
    fields = {"messages": CHAT, "seed": 0, "max_tokens": 18, "stream": True}
    _, events = server("/v1/chat/completions", **fields)
    pieces = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    text = "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces if piece["choices"])
    assert text == visible(expected(seed=0, max_tokens=18).text)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"logprobs": True, "top_logprobs": 2}, "logprobs: this model thinks in latent steps"),
        ({"presence_penalty": 0.5}, "presence_penalty: this model thinks"),
        ({"logit_bias": {"3": 5}}, "logit_bias: this model thinks"),
        ({"min_tokens": 3}, "min_tokens: this model thinks"),
        ({"vllm_xargs": {"k": 3}}, "vllm_xargs: unknown k; the only key is noise"),
        ({"vllm_xargs": {"noise": -1}}, "vllm_xargs.noise must be a number of 0 (off) or more, got -1"),
        ({"vllm_xargs": {"noise": "much"}}, "vllm_xargs.noise must be a number"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_and_the_server_goes_on(server, fields, said):
    status, found = server("/v1/chat/completions", messages=CHAT, **fields)
    assert (status, said in found["error"]["message"]) == (400, True), found
    assert server("/v1/chat/completions", messages=CHAT, max_tokens=3)[0] == 200

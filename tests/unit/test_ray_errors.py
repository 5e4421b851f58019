"""Ray's errors as one sentence."""

import pytest
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from latent_grpo.common.ray_errors import in_short, made_badly

KILLED = """The actor died unexpectedly before finishing this task.
\tclass_name: WorkerActor
\tactor_id: 1234
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed
by the OOM killer due to high memory usage, (2) ray stop --force was called"""

MADE = """The actor died because of an error raised in its creation task, ray::WorkerActor.__init__() (pid=1, repr=<x>)
  File "x.py", line 4, in _boom
RuntimeError: The actor with name WorkerActor failed to import on the worker. Traceback:
ImportError: libfoo.so: cannot open shared object file
"""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RayActorError(error_msg=KILLED), "its process ended: killed from outside (SIGKILL, out of memory) or crashed"),
        (RayActorError(error_msg="The actor died because its node has died. Node Id: ab"), "its node is gone"),
        (
            ActorUnavailableError("RpcError: Socket closed", b"a" * 16),
            "its process or its node does not answer",
        ),
        (RayActorError(error_msg=MADE), "ImportError: libfoo.so: cannot open shared object file"),
        (RayTaskError("start", "trace\nback", ValueError("no such file x")), "ValueError: no such file x"),
        (GetTimeoutError("Get timed out"), "an answer of Ray did not come in time"),
        (KeyError(), "KeyError"),
    ],
)
def test_an_error_is_one_short_sentence(error, said):
    assert in_short(error) == said


def test_an_actor_that_cannot_be_made_is_told_from_one_that_was_lost():
    assert made_badly(RayActorError(error_msg=MADE))
    assert not made_badly(RayActorError(error_msg=KILLED))
    assert not made_badly(RayTaskError("start", MADE, ValueError("x")))


def test_a_long_text_of_ray_is_cut():
    assert len(in_short(RayActorError(error_msg="x" * 2000))) < 400

"""Ray's errors as one sentence."""

import pytest
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from latent_grpo.common.ray_errors import in_short

KILLED = """The actor died unexpectedly before finishing this task.
\tclass_name: WorkerActor
\tactor_id: 1234
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed
by the OOM killer due to high memory usage, (2) ray stop --force was called"""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RayActorError(error_msg=KILLED), "its process ended: killed from outside (SIGKILL, out of memory) or crashed"),
        (RayActorError(error_msg="The actor died because its node has died. Node Id: ab"), "its node is gone"),
        (RayTaskError("start", "trace\nback", ValueError("no such file x")), "ValueError: no such file x"),
        (GetTimeoutError("Get timed out"), "an answer of Ray did not come in time"),
        (KeyError(), "KeyError"),
    ],
)
def test_an_error_is_one_short_sentence(error, said):
    assert in_short(error) == said


def test_a_long_text_of_ray_is_cut():
    assert len(in_short(RayActorError(error_msg="x" * 2000))) < 400

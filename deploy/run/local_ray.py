"""The Ray of a run that has this machine alone.

Ray gives its own processes 30 s to come up, which no setting changes, and leaves those of an attempt that failed. On a
busy machine they need longer, so the start is tried again.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial

import psutil

from latent_grpo.common.config import ConfigError
from latent_grpo.common.interrupts import check_interrupt
from latent_grpo.deploy.run.leftovers import end_processes, processes_of
from latent_grpo.deploy.run.object_store import Store

SLOW_S = 20.0  # an attempt that fails sooner does not fail because the machine is busy
GCS_GONE_S = 10  # after which Ray's processes take their local head for dead; Ray's own 60 s suit a cluster's network


def start(store: Store, folder: str, limit_s: float, say: Callable[[str], None]) -> None:
    """Starts a local Ray in `folder`, within `limit_s` (`deadlines.start_s`). Raises what Ray raises, or TimeoutError.

    Raises ConfigError where the machine has no room for the object store.
    """
    # with every start it warns that authentication is on, as it should be
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    started_within(limit_s, partial(_start, store, folder), partial(given_up, folder), say)


def started_within(
    limit_s: float,
    start: Callable[[], None],
    given_up: Callable[[], bool],
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Calls `start` until it returns. Raises what it raises where that came at once, and TimeoutError after `limit_s`.

    `given_up` ends what an attempt has left, and says whether all of that lived. Where something had died there is one
    more attempt. An attempt that has begun within `limit_s` may end later.
    """
    began, attempts, died = clock(), 0, 0
    while True:
        attempt_at = clock()
        try:
            start()
            return
        except ConfigError:
            raise
        except Exception as error:  # Ray has no class of its own for it
            attempts, died = attempts + 1, died + (not given_up())
            over = clock() - began
            if clock() - attempt_at < SLOW_S or died > 1:
                raise
            if over >= limit_s:
                raise TimeoutError(
                    f"its processes did not come up within {over:.0f} s, in {attempts} attempt(s) (deadlines.start_s = "
                    f"{limit_s:g}): this machine is too busy, or its disk too slow"
                ) from error
            say(
                f"[yellow]Ray has not come up within {over:.0f} s, as on a busy machine; it is started again, for at "
                f"most {limit_s - over:.0f} s more (deadlines.start_s)[/]"
            )
        check_interrupt()


def _start(store: Store, folder: str) -> None:
    import ray

    try:
        ray.init(
            address="local",  # never a Ray that another program has left on this machine
            include_dashboard=False,
            object_store_memory=store.size,
            logging_level=logging.WARNING,
            _temp_dir=folder,
            _system_config={
                "gcs_rpc_server_reconnect_timeout_s": GCS_GONE_S,
                "worker_niceness": 0,  # with Ray's own 15 any other program takes the cores from a run
            },
        )
    except ValueError as error:  # more than the machine's memory, or than it has shared memory
        raise ConfigError(f"{store.sentence}: {error}; lower ray.object_store_bytes") from error


def given_up(folder: str) -> bool:
    """Ends what an attempt has left; returns whether its raylet and GCS lived, and were only slow.

    Its files stay: the next attempt has a session of its own beside them, and a process may still write into them.
    """
    import ray

    alive = set()
    for process in processes_of(folder):
        with contextlib.suppress(psutil.Error):  # it ends now
            alive.add(process.name())
    ray.shutdown()
    end_processes(folder, end_s=0.0)
    return {"gcs_server", "raylet"} <= alive

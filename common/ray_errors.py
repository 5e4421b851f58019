"""What Ray's errors say, in a sentence. Ray's own texts run to a thousand characters, most of them about Ray."""

from __future__ import annotations

from ray.exceptions import (
    ActorUnavailableError,
    ActorUnschedulableError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

NODE_GONE = "its node is gone"
UNAVAILABLE = "its process or its node does not answer"
NO_PROCESS = "if there is room, their processes end before they begin: Ray's logs (worker-*.err) say why"
SHOWN = 300  # characters of a text that is not known


def in_short(error: BaseException) -> str:
    """Returns what happened, in one line without a full stop."""
    if isinstance(error, RayTaskError):
        return in_short(error.cause) if error.cause is not None else _first_line(str(error))
    text = str(error)
    if isinstance(error, NodeDiedError) or "node has died" in text:
        return NODE_GONE
    if isinstance(error, OutOfMemoryError) or "memory on the node" in text:
        return "Ray ended its process because the node's memory was full"
    if isinstance(error, ActorUnschedulableError):
        return "the cluster has no room for it any more"
    if isinstance(error, ActorUnavailableError):
        return UNAVAILABLE
    if isinstance(error, RayActorError):
        if made_badly(error):
            return _last_line(text)
        if "ray.kill" in text:
            return "it was ended by this program"
        if "process has died" in text or "died unexpectedly" in text:
            return "its process ended: killed from outside (SIGKILL, out of memory) or crashed"
        return _first_line(text)
    if isinstance(error, ObjectLostError):
        return "an object that it needs is gone with the process or node that held it"
    if isinstance(error, GetTimeoutError):
        return "an answer of Ray did not come in time"
    if isinstance(error, RayError):
        return _first_line(text)
    return f"{type(error).__name__}: {_first_line(text)}" if text else type(error).__name__


def made_badly(error: BaseException) -> bool:
    """Whether an actor could not be made: its class, its arguments or its constructor raised, as they would again."""
    return isinstance(error, RayActorError) and "raised in its creation task" in str(error)


def _last_line(text: str) -> str:
    """The end of a traceback, which is the error itself."""
    return _first_line(next((line for line in reversed(text.splitlines()) if line.strip()), ""))


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[0] if lines else "no further details"
    return (line if len(line) <= SHOWN else line[:SHOWN] + "…").rstrip(".")

"""The program of one grader process: reads cases from a pipe, answers each, and ends when the pipe does.

It imports neither torch nor Ray, so it starts in tens of milliseconds and fits under an address-space limit.
Messages from the pool (see `reward.framing`):

    {"op": "load", "kind": ..., "import_path": ..., "options": {...}} -> {"loaded": kind} or {"load_error": text}
    {"op": "grade", "cases": [[kind, text, gold], ...]} -> each {"grade": [reward, reason, parsed]} or {"error": text}

A case that runs out of memory is answered and the process ends: its heap is not to be trusted with the next case.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from typing import Any

from latent_grpo.reward.framing import FrameReader, encode
from latent_grpo.reward.verifier import UnknownVerifierError, Verifier, judged, load_verifier, settled

_READ_BYTES = 1 << 16
_ORPHAN_GRACE_S = 10.0


def main(argv: list[str]) -> None:
    """Serve on standard input and output until end of file. `argv`: memory limit in bytes, time limit in seconds."""
    memory_limit_bytes, time_limit_s = int(argv[0]), float(argv[1])
    requests, replies = _private_pipes()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business; it closes the pipe
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _Grader(replies, time_limit_s).serve(requests)


class _Grader:
    def __init__(self, replies: int, time_limit_s: float) -> None:
        self._replies = replies
        self._time_limit_s = time_limit_s
        self._verifiers: dict[str, Verifier] = {}

    def serve(self, requests: int) -> None:
        reader = FrameReader()
        while data := os.read(requests, _READ_BYTES):
            for message in reader.feed(data):
                if message["op"] == "load":
                    self._load(message["kind"], message["import_path"], message["options"])
                else:
                    for kind, response_text, gold in message["cases"]:
                        self._grade(kind, response_text, gold)

    def _load(self, kind: str, import_path: str, options: dict[str, Any]) -> None:
        try:
            verifier = load_verifier(import_path, **options)
            warm_up = getattr(verifier, "warm_up", None)
            if warm_up is not None:
                warm_up()
        except UnknownVerifierError as error:
            self._reply({"load_error": str(error)})
        except MemoryError:
            self._reply(
                {"load_error": f"Verifier {kind!r} does not fit in the memory limit; raise memory_limit_bytes."}
            )
        except (Exception, SystemExit) as error:  # the constructor of a user's verifier may do anything
            self._reply({"load_error": f"Verifier {kind!r} cannot be built: {type(error).__name__}: {error}"})
        else:
            self._verifiers[kind] = verifier
            self._reply({"loaded": kind})

    def _grade(self, kind: str, response_text: str, gold: str) -> None:
        # If the pool dies while this case hangs, nobody is left to end the process: the kernel then does, even where
        # Python no longer runs. With a living pool the alarm never rings.
        signal.setitimer(signal.ITIMER_REAL, 2 * self._time_limit_s + _ORPHAN_GRACE_S)
        exhausted = False
        try:
            verifier = self._verifiers[kind]
            verdict = judged(lambda one: settled(verifier.grade(response_text, one)), gold)
            reply: dict[str, Any] = {"grade": [verdict.reward, verdict.reason, verdict.parsed]}
        except MemoryError:
            exhausted = True
            reply = {"grade": [0.0, "out_of_memory", None]}
        except Exception as error:  # a user's verifier may raise anything
            reply = {"error": f"{type(error).__name__}: {str(error)[:1000]}"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._reply(reply)
        if exhausted:
            os._exit(0)

    def _reply(self, message: dict[str, Any]) -> None:
        data = memoryview(encode(message))
        while data:
            data = data[os.write(self._replies, data) :]


def _private_pipes() -> tuple[int, int]:
    """Move the pipes off descriptors 0 and 1: what a verifier prints or reads must not mix with the messages."""
    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    return requests, replies


if __name__ == "__main__":
    main(sys.argv[1:])

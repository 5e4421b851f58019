"""The pool's handle of one grader process: its pipes, what it was asked, and until when it must answer."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable
from typing import Any

import psutil

from latent_grpo.reward.framing import FrameReader, encode

# The child takes over this process's import path, so that a user's verifier is found there too. An own program text
# instead of `-m` keeps the working directory and the module search of the parent.
_PROGRAM = (
    "import sys, json; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from latent_grpo.reward.grader_process import main; main(sys.argv[1:])"
)
_READ_BYTES = 1 << 16


class Grader:
    """One process. All methods return at once; the dispatcher's thread alone calls them."""

    def __init__(self, *, time_limit_s: float, memory_limit_bytes: int) -> None:
        # `Popen` executes a new program: nothing of a process with threads is forked and kept. An own session keeps
        # Ctrl-C on the terminal from ending graders before their pool.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), str(memory_limit_bytes), str(time_limit_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            # One OpenBLAS arena per core would fill the address space before a verifier has begun.
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.requests_fd = self._process.stdin.fileno()
        self.replies_fd = self._process.stdout.fileno()
        os.set_blocking(self.requests_fd, False)
        os.set_blocking(self.replies_fd, False)
        self._reader = FrameReader()
        self._unsent = bytearray()
        self.loaded: set[str] = set()
        self.loading: str | None = None
        self.cases: deque[Any] = deque()
        self.deadline: float | None = None
        self.graded = 0

    @property
    def pid(self) -> int:
        """The operating system's id of the process."""
        return self._process.pid

    @property
    def idle(self) -> bool:
        """Whether it waits for work."""
        return not self.cases and self.loading is None

    @property
    def sending(self) -> bool:
        """Whether a request has not wholly left."""
        return bool(self._unsent)

    @property
    def stopped(self) -> bool:
        """Whether it was stopped from outside (SIGSTOP): that no verdict comes is then no fault of its case."""
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:  # it has ended meanwhile
            return False

    def load(self, kind: str, import_path: str, options: dict[str, Any], deadline: float) -> None:
        """Ask for a verifier to be imported and built. Names known here are unknown there: the path travels."""
        self.loading, self.deadline = kind, deadline
        self._send({"op": "load", "kind": kind, "import_path": import_path, "options": options})

    def grade(self, cases: Iterable[Any], deadline: float) -> None:
        """Ask for verdicts, one after another; `deadline` is that of the first."""
        self.cases.extend(cases)
        self.deadline = deadline
        self._send({"op": "grade", "cases": [case.key for case in self.cases]})

    def flush(self) -> None:
        """Send what the pipe takes. A broken pipe is not an error here: the end of the replies will tell."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._unsent:
                sent = os.write(self.requests_fd, self._unsent)
                del self._unsent[:sent]

    def receive(self) -> list[dict[str, Any]] | None:
        """The replies that have arrived; None when the process has ended. Raises FrameError on anything else."""
        try:
            data = os.read(self.replies_fd, _READ_BYTES)
        except BlockingIOError:
            return []
        return self._reader.feed(data) if data else None

    def kill(self) -> None:
        """End the process and close the pipes; `reap` completes it."""
        self._process.kill()
        self._close_pipes()

    def finish(self) -> None:
        """Let an idle process end by itself, by closing the pipes."""
        self._close_pipes()

    def reap(self, timeout_s: float = 0.0) -> bool:
        """Whether the process has ended and left the process table, after waiting at most `timeout_s`."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def exit_status(self) -> int | None:
        """Exit code, or minus the signal's number; None while it runs."""
        return self._process.returncode

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _send(self, message: dict[str, Any]) -> None:
        self._unsent += encode(message)
        self.flush()

"""Work in a thread: a piece at a time, as a checkpoint that is written beside the next step, or a watch over a run."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from latent_grpo.common import main_loop

LOOK_EVERY_S = 0.2  # so that a signal is not kept waiting
LEAVE_S = 5.0  # for a watch to end, of the 30 s in which a run leaves

log = logging.getLogger(__name__)


class BackgroundWork:
    """Runs pieces of work, one after another. What one raises is raised by the next `wait`, in the caller's thread."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def running(self) -> bool:
        """Whether the work goes on."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], None]) -> None:
        """Starts a piece of work once the one before has ended."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:  # for the thread that waits
                self._failure = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits for the work to end, however long it has deadlines for, and raises what it raised."""
        self._join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Waits for the work to end. A failure that nobody has asked for is logged."""
        self._join()
        if self._failure is not None:
            log.warning("work in the background failed: %s", self._failure)

    def _join(self) -> None:
        while self._thread is not None and self._thread.is_alive():
            main_loop.passed()
            self._thread.join(LOOK_EVERY_S)


@contextlib.contextmanager
def watching(name: str, look: Callable[[threading.Event], None]) -> Iterator[None]:
    """Calls `look` in a thread while the block runs; it has to return soon after the event that it gets is set.

    What it raises is logged, unless the block has ended.
    """
    ended = threading.Event()

    def watch() -> None:
        try:
            look(ended)
        except Exception as error:  # what it looks at may end meanwhile, which is the run's to report
            if not ended.is_set():
                log.warning("%s has ended: %s: %s", name, type(error).__name__, error)

    thread = threading.Thread(target=watch, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=LEAVE_S)

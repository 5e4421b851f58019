"""Signs that this process's main thread goes on: it counts the waits that it passes.

A thread that beats beside the main one shows that the process lives, and not that its work goes on. Every wait of a
run's loop calls :func:`passed` again and again, and `deploy.run.link` compares the counts.
"""

from __future__ import annotations

import threading

_main = threading.main_thread().ident
_count = 0


def passed() -> None:
    """Counts a look of a wait, in the main thread; what other threads wait for shows nothing of it."""
    global _count
    if threading.get_ident() == _main:
        _count += 1


def count() -> int:
    """Returns how many looks were counted so far."""
    return _count

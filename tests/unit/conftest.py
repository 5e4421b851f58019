"""What several unit tests need of the world outside of the program."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest


@pytest.fixture
def before_fsync(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """`before_fsync(act)`: `act` happens each time before bytes go to the disk; what it raises, the disk says."""

    def install(act: Callable[[], object]) -> None:
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda handle: (act(), fsync(handle)))

    return install

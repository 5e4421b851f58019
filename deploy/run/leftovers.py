"""What a local Ray leaves on this machine where the run that started it died, or where it did not come up."""

from __future__ import annotations

import contextlib
import shutil
import time

import psutil

END_S = 5.0  # for it to end by itself


def clear(folder: str) -> None:
    """Ends the processes of the Ray in a folder, and removes the folder."""
    end_processes(folder, END_S)
    shutil.rmtree(folder, ignore_errors=True)


def end_processes(folder: str, end_s: float) -> None:
    """Ends the processes of the Ray in a folder, after `end_s` with SIGKILL."""
    end = time.monotonic() + end_s
    while (left := processes_of(folder)) and time.monotonic() < end:
        time.sleep(0.5)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=END_S)  # one that is ending still writes


def processes_of(folder: str) -> list[psutil.Process]:
    """Returns the processes whose command lines name the folder; one that has died has no command line any more."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(folder in argument for argument in process.cmdline()):
                found.append(process)
    return found

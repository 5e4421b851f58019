"""Verifiers that misbehave in the ways a pool has to survive. The response text says how."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

from latent_grpo.reward.verifier import Grade


class Misbehaving:
    """Does what the response says, else grades by equality."""

    def grade(self, response_text: str, gold: str) -> Grade:
        action, _, argument = response_text.partition(" ")
        if action == "hang":
            while True:
                pass
        elif action == "hang-in-c":
            pow(7, 10**9, 10**500_000_000)
        elif action == "sleep":
            time.sleep(float(argument))
        elif action == "eat":
            bytearray(1 << 40)
        elif action == "keep":
            self._kept = [*getattr(self, "_kept", []), bytearray(int(argument.split()[0]))]
        elif action == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "die-once":
            if not Path(argument).exists():
                Path(argument).touch()
                os._exit(3)
        elif action == "raise":
            raise RuntimeError("a verifier's own fault")
        elif action == "print":
            print("noise on standard output" * 1_000)
        elif action == "nonsense":
            return "correct"
        elif action == "pid":
            return Grade(1.0, "correct", str(os.getpid()))
        return Grade(1.0, "correct", response_text) if argument == gold else Grade(0.0, "wrong", response_text)


class Asynchronous:
    """An `async` verifier with an option."""

    def __init__(self, bonus: float = 0.0) -> None:
        self._bonus = bonus

    async def grade(self, response_text: str, gold: str) -> Grade:
        await asyncio.sleep(3600 if response_text == "hang" else 0)
        if response_text == "eat":
            bytearray(1 << 40)
        return Grade(1.0 + self._bonus, "correct", response_text) if response_text == gold else Grade(0.0, "wrong")


class NoGrade:
    """Not a verifier."""


class Slow:
    """Takes longer to build than a pool with a short start limit waits."""

    def __init__(self) -> None:
        time.sleep(30)

    def grade(self, response_text: str, gold: str) -> Grade:
        return Grade(0.0, "wrong")

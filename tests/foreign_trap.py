"""Code that somebody else's settings name. A test sees in `sys.modules` whether a command has imported it."""

from latent_grpo.common.tasks.arithmetic import ChainArithmetic
from latent_grpo.reward.verifier import Grade


class Verifier:
    def grade(self, response_text, gold):
        return Grade(1.0, "correct")


class Task(ChainArithmetic):
    """The quickstart's problems, under a path of its own."""


class Sink:
    def __init__(self, folder):
        pass

    def write(self, step, values):
        pass

    def close(self):
        pass

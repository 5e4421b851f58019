"""math-verify alone, with its own extraction and the settings that training libraries use: what audits compare with.

Not registered and not for training: the reasons are in `reward.answers`. As a kind it is written
`reward.plain_math_verify:PlainMathVerify`.
"""

from __future__ import annotations

import logging

import math_verify

from latent_grpo.reward.verifier import Grade

# math-verify warns once that its time limits are off; the pool has its own.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_GOLD = (math_verify.LatexExtractionConfig(),)
_RESPONSE = (math_verify.ExprExtractionConfig(), math_verify.LatexExtractionConfig())


class PlainMathVerify:
    """The gold is read as `\\boxed{gold}`, the response anywhere in its text."""

    def grade(self, response_text: str, gold: str) -> Grade:
        """`no_answer` where math-verify finds nothing in the response."""
        wanted = math_verify.parse(rf"\boxed{{{gold}}}", extraction_config=_GOLD, parsing_timeout=None)
        given = math_verify.parse(response_text, extraction_config=_RESPONSE, parsing_timeout=None)
        if not given:
            return Grade(0.0, "no_answer")
        correct = math_verify.verify(wanted, given, timeout_seconds=None)
        return Grade(float(correct), "correct" if correct else "wrong", str(given[-1]))

    def warm_up(self) -> None:
        """Builds math-verify's parser before a time limit counts."""
        self.grade(r"\boxed{\frac{1}{2}}", "0.5")

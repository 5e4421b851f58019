"""The generated task of the quickstart: left-to-right arithmetic modulo 11, and its tokenizer of one token per number.

A problem is `3+4*2-5*...?`; its explicit chain of thought is `3+4=7;7*2=3;...` (six tokens per operation), its answer
the last result. A problem is a function of (seed, split, index), so training never runs out and nothing is stored.

Options make it harder in ways that a study needs: `shortest` gives chains of different length, `rechecks` chains whose
length the problem does not tell, `modulus` other numbers, and `named` a name before the expression (`Rosuki: 3+4*2?`)
that means nothing but fills a BPE vocabulary of thousands. With `visible` a share of the chains stops early and the
visible text goes on with it (`2*5=10;\\boxed{10}`), so that a policy may choose where it leaves latent mode.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from latent_grpo.common.types import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Split = Literal["training", "evaluation"]

MODULUS = 11
OPERATORS = ("+", "-", "*")
TOKENS = (
    "<pad>",
    "<eos>",
    *(str(n) for n in range(MODULUS)),
    *OPERATORS,
    "=",
    ";",
    "?",
    "<think>",
    "</think>",
    "\\boxed{",
    "}",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
)
MOST_RECHECKS = 4
EVALUATION_SHARE = 8  # one expression in eight is held out
SYLLABLES = tuple(
    c + v for c in ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z") for v in "aeiou"
)


def solve(numbers: list[int], operators: list[str], modulus: int = MODULUS) -> tuple[str, int]:
    """The explicit chain of thought and the answer of an expression read from left to right."""
    value, chain = numbers[0], []
    for operator, number in zip(operators, numbers[1:], strict=True):
        result = {"+": value + number, "-": value - number, "*": value * number}[operator] % modulus
        chain.append(f"{value}{operator}{number}={result};")
        value = result
    return "".join(chain), value


def split_of(expression: str) -> Split:
    """Returns the split of an expression, whatever the seed, so that no problem is ever in both."""
    digest = hashlib.blake2b(expression.encode(), digest_size=4).digest()
    return "evaluation" if int.from_bytes(digest, "big") % EVALUATION_SHARE == 0 else "training"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainArithmetic:
    """`source.problem(index)` for any index; the same (seed, split, index) is the same problem on every machine."""

    name: str
    operations: int = 6
    shortest: int = 0  # operations are drawn from shortest to `operations`; 0: always `operations`
    rechecks: float = 0.0  # probability that the last operation is written once more, and again, up to MOST_RECHECKS
    modulus: int = MODULUS  # 10: every number is one digit, one token of a BPE tokenizer
    named: bool = False
    visible: float = 0.0  # probability that the chain stops early, after an operation drawn from 1 to the last but one
    seed: int = 0
    split: Split = "training"

    def __post_init__(self) -> None:
        if self.operations < 1:
            raise ValueError(f"task {self.name}: operations must be at least 1, got {self.operations}")
        if not 0 <= self.shortest <= self.operations:
            raise ValueError(
                f"task {self.name}: shortest must be between 1 and operations ({self.operations}), or 0 (one length), "
                f"got {self.shortest}"
            )
        if not 0 <= self.rechecks <= 1:
            raise ValueError(f"task {self.name}: rechecks is a probability, between 0 and 1; got {self.rechecks}")
        if not 0 <= self.visible <= 1:
            raise ValueError(f"task {self.name}: visible is a probability, between 0 and 1; got {self.visible}")
        if not 2 <= self.modulus <= MODULUS:
            raise ValueError(f"task {self.name}: modulus must be between 2 and {MODULUS}, got {self.modulus}")
        if self.split not in ("training", "evaluation"):
            raise ValueError(f"task {self.name}: split must be training or evaluation, got {self.split!r}")

    def problem(self, index: int) -> Problem:
        """Returns the problem of this index, from 0; a function of the index and the settings alone."""
        draw = random.Random(self._identity(index))
        count = draw.randint(self.shortest, self.operations) if self.shortest else self.operations
        while True:
            numbers = [draw.randrange(self.modulus) for _ in range(count + 1)]
            operators = [draw.choice(OPERATORS) for _ in range(count)]
            expression = str(numbers[0]) + "".join(o + str(n) for o, n in zip(operators, numbers[1:], strict=True))
            if split_of(expression) == self.split:
                break
        chain, answer = solve(numbers, operators, self.modulus)
        last = chain[chain[:-1].rfind(";") + 1 :]
        for _ in range(MOST_RECHECKS if self.rechecks else 0):
            if draw.random() >= self.rechecks:
                break
            chain += last
        solution = ""
        if self.visible and count > 1 and draw.random() < self.visible:
            steps = chain.split(";")[:-1]
            kept = draw.randint(1, count - 1)
            chain = "".join(f"{step};" for step in steps[:kept])
            solution = "".join(f"{step};" for step in steps[kept:]) + f"\\boxed{{{answer}}}"
        name = "".join(draw.choice(SYLLABLES) for _ in range(3)).capitalize() + ": " if self.named else ""
        return Problem(
            uid=f"{self.name}/{index}",
            task=self.name,
            messages=(("user", name + expression + "?"),),
            answer=str(answer),
            cot=chain,
            solution=solution,
        )

    def _identity(self, index: int) -> str:
        """Returns the text that seeds a problem's draw; an option at its default does not change it."""
        parts = ["chain_arithmetic", self.seed, self.split, self.operations, index]
        parts += [f"from {self.shortest}"] if self.shortest else []
        parts += [f"rechecks {self.rechecks}"] if self.rechecks else []
        parts += [f"visible {self.visible}"] if self.visible else []
        parts += [f"modulo {self.modulus}"] if self.modulus != MODULUS else []
        return "/".join(map(str, parts))


def make_arithmetic_tokenizer() -> PreTrainedTokenizerFast:
    """One token per number, operator and mark; decoding puts no spaces between them (`\\boxed{7}`).

    There is no unknown token: a text outside the vocabulary is an error of the tokenizer, not silently another text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}))
    pieces = Regex(r"</?think>|\\boxed\{|10|[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )

"""The benchmark `latent-grpo bench logprobs`: log-probs of selected ids beside the plain way that has [T, V] logits.

Forward and backward pass, each way in a process of its own, in turns, on one thread and in float32:

* plain: logits of all positions, `log_softmax`, `gather`, and what autograd makes of them;
* ours: :func:`learner.logprobs.selected_log_probs`, some positions at a time.

The output layer is trained in the first half of the rows. In the second it is frozen, as tied embeddings are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from latent_grpo.common.head import Float32Head
from latent_grpo.common.terminal_text import TextConsole
from latent_grpo.deploy.bench.own_process import alone, peak_mib
from latent_grpo.learner.logprobs import selected_log_probs

PLAIN = 0  # in the place of the positions that are computed at a time
POSITIONS_AT_ONCE = (2048, 220, 128)  # 220: the default at this vocabulary (`chunk_size`)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    positions: int = 4096
    vocabulary: int = 151_936
    hidden: int = 256
    selected: int = 10  # ids of a position


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Medians over the turns; what the process had before the pass is no part of `mib`."""

    trained: bool  # the output layer
    at_once: int  # positions; PLAIN: the plain way
    cpu_s: float
    mib: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProbsBench:
    sizes: Sizes
    gap: float  # largest relative L2 difference of a gradient from the plain way's in float64, on fewer positions
    ways: list[Way]


def measure(sizes: Sizes | None = None, turns: int = 3, at_once: Sequence[int] = POSITIONS_AT_ONCE) -> LogProbsBench:
    sizes = sizes or Sizes()
    found: dict[tuple[bool, int], list[tuple[float, float]]] = {
        (trained, size): [] for trained in (True, False) for size in (PLAIN, *at_once)
    }
    for _ in range(turns):
        for (trained, size), costs in found.items():
            costs.append(alone(_pass, sizes, trained, size))
    ways = [
        Way(
            trained=trained,
            at_once=size,
            cpu_s=statistics.median(seconds for seconds, _ in costs),
            mib=statistics.median(mib for _, mib in costs),
        )
        for (trained, size), costs in found.items()
    ]
    return LogProbsBench(sizes=sizes, gap=alone(_gap, sizes), ways=ways)


def _pass(sizes: Sizes, trained: bool, at_once: int) -> tuple[float, float]:
    """CPU seconds of a forward and backward pass, and the MiB that it adds to the process."""
    torch.set_num_threads(1)
    _computed(replace(sizes, positions=2, vocabulary=64), trained, at_once)()  # torch's own modules load at first use
    compute = _computed(sizes, trained, at_once)
    before, began = peak_mib(), time.process_time()
    compute()
    return time.process_time() - began, peak_mib() - before


def _computed(
    sizes: Sizes, trained: bool, at_once: int, dtype: torch.dtype = torch.float32
) -> Callable[[], list[torch.Tensor]]:
    """Returns the pass, which returns the gradients: of the hidden states, and of the layer where it is trained."""
    torch.manual_seed(0)
    layer = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False)
    head = Float32Head(layer.requires_grad_(trained))
    hidden = torch.randn(sizes.positions, sizes.hidden)
    ids = torch.randint(sizes.vocabulary, (sizes.positions, sizes.selected))
    direction, temperatures = torch.randn(ids.shape), torch.full((sizes.positions,), 0.6)
    if dtype == torch.float64:
        head = head.double()
        hidden, direction, temperatures = (each.double() for each in (hidden, direction, temperatures))
    inputs = [hidden.requires_grad_(), *(p for p in head.parameters() if trained)]

    def plain() -> torch.Tensor:
        logits = nn.functional.linear(hidden, head.weight) / temperatures.unsqueeze(-1)
        return torch.log_softmax(logits, -1).gather(-1, ids)

    def ours() -> torch.Tensor:
        return selected_log_probs(head, hidden, ids, temperatures, -(-sizes.positions // at_once))

    return lambda: list(torch.autograd.grad(plain() if at_once == PLAIN else ours(), inputs, direction))


def _gap(sizes: Sizes) -> float:
    torch.set_num_threads(1)
    few, largest = replace(sizes, positions=64), 0.0
    for trained in (True, False):
        exact = _computed(few, trained, PLAIN, torch.float64)()
        for found, expected in zip(_computed(few, trained, 24)(), exact, strict=True):
            largest = max(largest, float((found.double() - expected).norm() / expected.norm()))
    return largest


def show(found: LogProbsBench, console: Console | None = None) -> None:
    sizes = found.sizes
    title = (
        f"log-probs, forward and backward: T = {sizes.positions:,}, V = {sizes.vocabulary:,}, D = {sizes.hidden}, "
        f"{sizes.selected} ids a position, float32, one thread"
    )
    table = Table(
        "output layer", "positions at once", "CPU s", "of the plain way's", "MiB", "of the plain way's", title=title
    )
    for way in found.ways:
        plain = next(w for w in found.ways if w.trained == way.trained and w.at_once == PLAIN)
        table.add_row(
            "trained" if way.trained else "frozen",
            "all (plain)" if way.at_once == PLAIN else f"{way.at_once:,}",
            f"{way.cpu_s:.2f}",
            f"{way.cpu_s / plain.cpu_s:.2f}",
            f"{way.mib:,.0f}",
            f"{way.mib / plain.mib:.3f}",
        )
    console = console or TextConsole()
    console.print(table)
    console.print(f"gradients differ from float64 by at most {found.gap:.1e} (L2, 64 positions)")

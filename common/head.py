"""The output layer with float32 logits, whatever the model's dtype (METHOD §5).

In bfloat16 a product is rounded to 8 bits of mantissa: logits of a trained model reach 24 to 36, where neighbouring
bfloat16 numbers are 0.125 to 0.25 nats apart, and engine and learner, which multiply in different shapes, would round
to different neighbours. The product's inputs stay as the model has them; its sum is kept in float32.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from latent_grpo.common.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROVEN_ON_CUDA = False
"""Whether the tests of `tests/gpu` have passed with torch's bfloat16 products with a float32 result (docs/gpu.md). Only
then does a model's output layer use them; until then float32 copies are multiplied."""
COPY_BYTES = 64 * 2**20
"""Bytes of the largest float32 copy of the layer's rows at a time; the whole layer of a large model has gigabytes."""
PROBE = (16, 64, 128)  # rows, inputs and outputs of the product that a device is tried with
PROBE_TOLERANCE = 1e-4  # relative to the largest; a product that is rounded to bfloat16 differs by 4e-3
log = logging.getLogger(__name__)


def install_float32_head(model: PreTrainedModel) -> nn.Module:
    """Makes the model's output layer give float32 logits and returns it; parameters and their names stay.

    A float32 model computes what it computed before. A layer that is not exactly `nn.Linear` is left as it is:
    :func:`float32_logits` refuses what it computes in another dtype.
    """
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        raise ConfigError(f"model {type(model).__name__} has no output layer; use a causal language model")
    if type(head) is not nn.Linear:
        return head
    replaced = Float32Head(head)
    model.set_output_embeddings(replaced)
    return replaced


def float32_logits(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Returns the logits of hidden states [..., D]: [..., V] float32, with gradients of both.

    `head` is what :func:`install_float32_head` returned. It is called as a module, since with ZeRO-3 a layer's
    parameters exist only within its call. Raises ConfigError where the layer rounds its logits.
    """
    logits: torch.Tensor = head(hidden)
    if logits.dtype != torch.float32:
        raise ConfigError(
            f"the model's output layer is {type(head).__name__} and gives {str(logits.dtype).removeprefix('torch.')} "
            "logits, which are too coarse to train on; set model.dtype to float32, or use a model whose output layer "
            "is torch.nn.Linear"
        )
    return logits


class Float32Head(nn.Linear):
    """A linear output layer whose logits are float32. It shares the parameters of the layer that it replaces.

    `native` lets it use the device's product where :func:`float32_product_is_native`.
    """

    def __init__(self, layer: nn.Linear, *, native: bool = PROVEN_ON_CUDA):
        bias = layer.bias is not None
        super().__init__(layer.in_features, layer.out_features, bias=bias, device="meta", dtype=layer.weight.dtype)
        self.weight = layer.weight
        if bias:
            self.bias = layer.bias
        self.native = native
        self.train(layer.training)

    def forward(
        self, hidden: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Returns float32 logits [..., V] of hidden states [..., D] of any dtype, or what `compute` makes of them.

        `compute` may use the layer's weights and :meth:`logits`: with ZeRO-3 they are whole within a call, and again
        while its gradient is computed, and nowhere else.
        """
        return self.logits(hidden) if compute is None else compute(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns float32 logits [..., V] of hidden states [..., D] of any dtype. The weights must be at hand."""
        if hidden.dtype == torch.float32 and self.weight.dtype == torch.float32:
            return nn.functional.linear(hidden, self.weight, self.bias)
        states = hidden if hidden.ndim == 2 else hidden.reshape(-1, hidden.shape[-1])
        native = self.native and float32_product_is_native(states, self.weight)
        logits: torch.Tensor = _Float32Product.apply(states, self.weight, native)  # type: ignore[no-untyped-call]  # torch
        if self.bias is not None:
            logits = logits + self.bias.float()
        return logits if hidden.ndim == 2 else logits.view(*hidden.shape[:-1], len(self.weight))

    def times_rows(self, factors: torch.Tensor) -> torch.Tensor:
        """Returns factors [N, V] float32 times the layer's rows: [N, D] float32, without a gradient."""
        return _times_rows(factors, self.weight.detach(), self._is_native(factors.device))

    def add_weight_gradient(self, total: torch.Tensor, of_logits: torch.Tensor, hidden: torch.Tensor) -> None:
        """Adds the gradient of the weights by that of the logits [N, V] float32 of states [N, D] to `total` [V, D]."""
        _add_weight_gradient(total, of_logits, hidden.detach(), self._is_native(hidden.device))

    def _is_native(self, device: torch.device) -> bool:
        return self.native and float32_product_is_native(self.weight.new_empty(0, device=device), self.weight)


class _Float32Product(torch.autograd.Function):
    """hidden [N, D] x weight [V, D] -> [N, V] float32; gradients have the dtypes of their tensors.

    The layer's float32 copy is made some rows at a time and never kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, native: bool) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.native = native
        if native:
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        logits = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
        states = hidden.float()
        for rows in _pieces(weight):
            torch.mm(states, weight[rows].float().t(), out=logits[:, rows])
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        for_hidden, for_weight, _ = ctx.needs_input_grad
        states_gradient = rows_gradient = None
        if for_hidden:
            states_gradient = _times_rows(gradient, weight, ctx.native).to(hidden.dtype)
        if for_weight:
            rows_gradient = torch.zeros_like(weight)
            _add_weight_gradient(rows_gradient, gradient, hidden, ctx.native)
        return states_gradient, rows_gradient, None


def _times_rows(factors: torch.Tensor, weight: torch.Tensor, native: bool) -> torch.Tensor:
    """Returns factors [N, V] float32 times the rows of the layer: [N, D] float32."""
    if native:  # factors as precise as what they are multiplied with
        return torch.mm(factors.to(weight.dtype), weight, out_dtype=torch.float32)
    if weight.dtype == torch.float32:
        return factors @ weight
    total = torch.zeros(len(factors), weight.shape[1], dtype=torch.float32, device=factors.device)
    for rows in _pieces(weight):
        total.addmm_(factors[:, rows], weight[rows].float())
    return total


def _add_weight_gradient(total: torch.Tensor, of_logits: torch.Tensor, hidden: torch.Tensor, native: bool) -> None:
    """Adds of_logits^T hidden, a float32 product, to `total` [V, D] of any dtype."""
    if native:
        total.add_(torch.mm(of_logits.to(hidden.dtype).t(), hidden, out_dtype=torch.float32))
    elif total.dtype == torch.float32:
        total.addmm_(of_logits.t(), hidden.float())
    else:
        states = hidden.float()
        for rows in _pieces(total):
            total[rows].add_(torch.mm(of_logits[:, rows].t(), states))


def _pieces(weight: torch.Tensor) -> list[slice]:
    """Returns slices of the layer's rows whose float32 copy takes at most `COPY_BYTES`."""
    size = max(COPY_BYTES // (4 * max(weight.shape[1], 1)), 1)
    return [slice(start, min(start + size, len(weight))) for start in range(0, len(weight), size)]


def float32_product_is_native(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the device multiplies these tensors with a float32 result, without a float32 copy of either."""
    if hidden.device.type != "cuda" or hidden.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return False
    return _proven(hidden.device)


@functools.cache
def _proven(device: torch.device) -> bool:
    """Tries torch's product with a float32 output on the device, in the three shapes of a pass, once per process.

    It is used only where it equals the product of float32 copies. Elsewhere those are multiplied, with a warning.
    """
    generator = torch.Generator().manual_seed(0)
    rows, inputs, outputs = PROBE
    hidden, weight, gradient = (
        torch.randn(*shape, generator=generator).to(device, torch.bfloat16)
        for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
    )
    for left, right in ((hidden, weight.t()), (gradient, weight), (gradient.t(), hidden)):
        expected = left.float() @ right.float()
        try:
            found = torch.mm(left, right, out_dtype=torch.float32)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            log.warning("float32 logits by float32 copies of the output layer on %s: %s", device, error)
            return False
        gap = float((found - expected).abs().max() / expected.abs().max())
        if found.dtype != torch.float32 or not gap <= PROBE_TOLERANCE:
            log.warning(
                "float32 logits by float32 copies of the output layer on %s: torch's product with a float32 output "
                "differs by %.1e of the largest", device, gap,
            )  # fmt: skip
            return False
    return True

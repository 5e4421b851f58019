"""The cache of keys and values of running samples, with one row per sample and rows of different length.

Row r of every layer holds its sample's past at columns 0 .. length_r - 1, so a prompt's length shifts nothing and no
padding is ever inside a sample. A decode step writes one column per row, each at its own place, and attends to a view
up to the longest row; columns beyond a row's own length are masked. Rows 0 .. n - 1 are the running ones; when samples
finish, the last rows move into the free places.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from latent_grpo.rollout_workers.engine import EngineError

GROW_LENGTH = 64  # columns by which the cache grows, so that slightly longer requests do not reallocate


class SlotCache(Cache):
    """Keys and values [rows, heads, capacity, head_dim] of each layer in one tensor, which grows as requests need."""

    def __init__(self, layers: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers=[])
        self._kv = torch.zeros(layers, 2, 0, heads, 0, head_dim, dtype=dtype, device=device)
        self._heads_at = torch.empty(0, heads, dtype=torch.int64, device=device)  # [rows, heads]: column 0 of each
        self._places = torch.empty(0, dtype=torch.int64, device=device)  # [n * heads]: of this step's column in each
        self._rows = self._extent = 0
        self.layout = object()  # another one whenever the memory has moved

    @classmethod
    def of(cls, model: PreTrainedModel) -> SlotCache:
        """The empty cache of a model, in the shape that a pass over one step keeps: configurations spell it variously.

        Raises EngineError for a model whose layers keep anything else than keys and values of one shape.
        """
        width = model.get_input_embeddings().get_parameter("weight")
        step = torch.zeros(1, 1, width.shape[-1], dtype=width.dtype, device=width.device)
        kept = model.base_model(inputs_embeds=step, use_cache=True).past_key_values
        layers: list[Any] = getattr(kept, "layers", [])
        shapes = {
            tuple(part.shape) for layer in layers for part in (getattr(layer, n, None) for n in ("keys", "values"))
            if part is not None
        }  # fmt: skip
        if len(shapes) != 1 or any(getattr(layer, "keys", None) is None for layer in layers):
            raise EngineError(
                f"this {type(model).__name__} keeps no keys and values of one shape in its layers (found "
                f"{sorted(shapes) or 'none'}); the engine cannot decode it"
            )
        _, heads, _, head_dim = shapes.pop()
        return cls(len(layers), heads, head_dim, model.dtype, width.device)

    @property
    def nbytes(self) -> int:
        """The size of keys and values of all slots, in bytes."""
        return self._kv.numel() * self._kv.element_size()

    def reserve(self, rows: int, length: int, keep: int) -> None:
        """Makes room for `rows` samples of `length` steps; the content of the first `keep` rows stays."""
        have_rows, have_length = self._kv.shape[2], self._kv.shape[4]
        if rows <= have_rows and length <= have_length:
            return
        if length > have_length:
            length = -(-length // GROW_LENGTH) * GROW_LENGTH
        if rows > have_rows:
            rows = max(rows, min(2 * have_rows, 64))
        self._allocate(max(rows, have_rows), max(length, have_length), keep)

    def fit(self, rows: int, length: int) -> None:
        """Makes exactly this room, empty, so that memory layout depends on the group alone (deterministic engines)."""
        self._allocate(rows, length, 0)

    def _allocate(self, rows: int, length: int, keep: int) -> None:
        # zeros, not empty: masked columns get weight 0, and 0 * NaN would still be NaN
        old, shape = self._kv, list(self._kv.shape)
        shape[2], shape[4] = rows, length
        if keep == 0:
            self._kv = old = old.new_zeros(0)  # free before allocating: the cache may be most of the device's memory
        self._kv = old.new_zeros(shape)
        if keep:
            self._kv[:, :, :keep, :, : old.shape[4]] = old[:, :, :keep]
        heads = shape[3]
        self._heads_at = torch.arange(rows * heads, device=self._kv.device).view(rows, heads) * length
        self.layout = object()

    def clear(self) -> None:
        """Zeroes everything, so that NaNs of a diverged model cannot reach the next one through masked columns."""
        self._kv.zero_()

    def insert(self, prefill: DynamicCache, owners: torch.Tensor, first: int) -> None:
        """Copies prompts into rows `first`...: row first + i gets prompt `owners[i]` of the prefill's batch.

        Prompts are right-padded to the longest; the padding's keys land beyond the row's length and are overwritten.
        """
        prompts: list[Any] = prefill.layers  # their type has room for layers without keys, which full attention has not
        for layer, prompt in enumerate(prompts):
            self.fill(layer, prompt.keys, prompt.values, owners, first)

    def fill(self, layer: int, keys: torch.Tensor, values: torch.Tensor, owners: torch.Tensor, first: int) -> None:
        """Does so for one layer: `keys` and `values` [prompts, heads, T, head_dim]."""
        for part, prompts in zip(self._kv[layer], (keys, values)):
            part[first : first + owners.shape[0], :, : prompts.shape[2]] = prompts[owners]

    def move(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """Copies row sources[i] to row targets[i], up to column `length`."""
        self._kv[:, :, targets, :, :length] = self._kv[:, :, sources, :, :length]

    def begin_step(self, positions: torch.Tensor, extent: int) -> None:
        """Makes the next forward pass write row r (0 .. n - 1) at column positions[r] [n] and see `extent` columns."""
        self._places = (self._heads_at[: len(positions)] + positions.unsqueeze(-1)).flatten()
        self._rows, self._extent = len(positions), extent

    @property
    def capacity(self) -> int:
        """Number of columns that there is memory for."""
        return self._kv.shape[4]

    @property
    def extent(self) -> int:
        """Number of columns that the running step sees."""
        return self._extent

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the step's keys and values [n, heads, head_dim]; returns views [n, heads, extent, head_dim]."""
        cached, size = self._kv[layer], keys.shape[-1]
        for part, new in zip(cached.view(2, -1, size), (keys, values)):
            part.index_copy_(0, self._places, new.reshape(-1, size))
        seen = cached[:, : self._rows, :, : self._extent]
        return seen[0], seen[1]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by each attention layer with [n, heads, 1, head_dim]; returns views [n, heads, extent, head_dim]."""
        return self.write(layer_idx, key_states[:, :, 0], value_states[:, :, 0])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of positions that the pass looks at; transformers' interface."""
        return self._extent

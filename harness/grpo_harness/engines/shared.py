"""Attention over prompts that rows share, as a cache and an attention function of transformers.

The rows of a group have one prompt, whose keys and values are kept once. While rows draw, the
queries of a group are one block against its prompt; what a row has drawn is its own. All keys and
values lie in buffers that are written in place.

It serves every decoder-only model that calls attention through transformers' interface and keeps
keys and values in its cache classes: such a model runs with the attention `ATTENTION` and a
`SharedCache`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

ATTENTION = "grpo_harness_shared"
"""The name of the attention function in transformers."""

_FIRST = 32
"""The buffers of drawn tokens have this many places at first, and are doubled when full."""


class SharedCache(Cache):
    """Keys and values: of each prompt once, and of the tokens that each row has drawn.

    There are ``slots`` for prompts of at most ``width`` tokens, and ``rows``, which draw at most
    ``most`` tokens. The first `used_slots` and `used_rows` are in use. The slot of a row's prompt
    is ``slot[row]``. The model's forward calls write: those inside `prefilling` prompts, those
    inside `drawing` one token of each row.
    """

    def __init__(
        self, layers: int, *, slots: int, width: int, rows: int, most: int, device: torch.device
    ) -> None:
        self.own_layers = [_Layer(self) for _ in range(layers)]
        super().__init__(layers=[*self.own_layers])
        self.slots, self.width, self.rows, self.most = slots, width, rows, most
        self.places = min(_FIRST, most)
        self.used_slots = self.used_rows = 0
        self.slot = torch.zeros(rows, dtype=torch.long, device=device)
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)
        self.drawn = torch.zeros(rows, dtype=torch.long, device=device)
        self.shared = 0  # tokens at the beginning of all prompts, kept once while prompts are read
        self._step: _Prefix | _Prompts | _Rows | None = None

    @contextmanager
    def prefilling(self, slots: torch.Tensor | None) -> Iterator[None]:
        """Write the next forward call's tokens into slots, behind what all prompts share.

        Without ``slots`` the tokens are what all prompts share.
        """
        step = _Prefix() if slots is None else _Prompts(slots, self.shared)
        with self._doing(step):
            yield

    @contextmanager
    def drawing(self) -> Iterator[torch.Tensor]:
        """Write the next forward call's token of each row; yields the tokens' positions."""
        rows, slots = self.used_rows, self.used_slots
        drawn, slot = self.drawn[:rows], self.slot[:rows]
        reach, width = int(drawn.max()) + 1, int(self.lengths[:slots].max())
        if reach > self.places:
            self.places = min(max(2 * self.places, reach), self.most)
            for layer in self.own_layers:
                layer.widen(self.places)
        lengths = self.lengths[slot]
        device = drawn.device
        seen = torch.arange(width, device=device) < lengths[:, None]
        own = torch.arange(reach, device=device) <= drawn[:, None]
        step = _Rows(
            slots, drawn, torch.cat([seen, own], -1)[:, None, None], width, *_grid(slot, slots)
        )
        with self._doing(step):
            yield (lengths + drawn)[:, None]

    @contextmanager
    def _doing(self, step: "_Prefix | _Prompts | _Rows") -> Iterator[None]:
        self._step = step
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)
            self._step = None

    def move_rows(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Move rows, to places where no row is needed any more."""
        self._move(source, target, (self.slot, self.drawn), ("own_keys", "own_values"))

    def move_slots(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Move prompts, to slots whose prompt is not needed any more."""
        self._move(source, target, (self.lengths,), ("keys", "values"))
        for old, new in zip(source, target, strict=True):
            self.slot[: self.used_rows][self.slot[: self.used_rows] == old] = new

    def _move(
        self,
        source: Sequence[int],
        target: Sequence[int],
        own: Sequence[torch.Tensor],
        names: Sequence[str],
    ) -> None:
        if not source:
            return
        device = self.drawn.device
        old, new = (torch.tensor(places, device=device) for places in (source, target))
        for buffer in (
            *own,
            *(getattr(layer, name) for layer in self.own_layers for name in names),
        ):
            buffer[new] = buffer[old]


class _Layer(CacheLayerMixin):  # type: ignore[misc, unused-ignore]
    """One layer: ``keys`` and ``values`` of prompts, shape (slots, heads, width, dimension)."""

    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor
    own_keys: torch.Tensor
    own_values: torch.Tensor

    def __init__(self, cache: SharedCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache
        self.prefix: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the prompts' buffers for heads such as these."""
        cache = self.cache
        self.keys, self.values = (
            states.new_zeros(cache.slots, states.shape[1], cache.width, states.shape[-1])
            for states in (key_states, value_states)
        )
        self.own_keys, self.own_values = (
            states.new_zeros(cache.rows, states.shape[1], cache.places, states.shape[-1])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values, shape (batch, heads, tokens, dimension)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.cache._step is not None
        self.cache._step.write(self, key_states, value_states)
        return key_states, value_states

    def widen(self, places: int) -> None:
        """Make room for that many drawn tokens."""
        for name in ("own_keys", "own_values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], places, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tell the sizes of a mask, which the attention here does not use."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return 0: positions are always given."""
        return 0

    def get_max_length(self) -> int:
        """Return -1: the buffers grow."""
        return -1


class _Prefix:
    """Reads what all prompts begin with."""

    def write(self, layer: _Layer, keys: torch.Tensor, values: torch.Tensor) -> None:
        layer.prefix = keys, values

    def attend(
        self, _: _Layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )


class _Prompts:
    """Reads prompts into slots, behind ``start`` tokens that all have in common."""

    def __init__(self, slots: torch.Tensor, start: int) -> None:
        self.slots, self.start = slots, start

    def write(self, layer: _Layer, keys: torch.Tensor, values: torch.Tensor) -> None:
        end = self.start + keys.shape[2]
        for buffer, read in ((layer.keys, keys), (layer.values, values)):
            buffer[self.slots, :, self.start : end] = read
        if layer.prefix is not None:
            layer.keys[self.slots, :, : self.start] = layer.prefix[0]
            layer.values[self.slots, :, : self.start] = layer.prefix[1]

    def attend(
        self,
        layer: _Layer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        if layer.prefix is None:
            return _Prefix().attend(layer, query, key, value, scale)
        n, tokens = query.shape[0], query.shape[2]
        keys, values = (
            torch.cat([before.expand(n, -1, -1, -1), own], 2)
            for before, own in zip(layer.prefix, (key, value), strict=True)
        )
        mask = torch.ones(tokens, self.start + tokens, dtype=torch.bool, device=query.device)
        return scaled_dot_product_attention(
            query, keys, values, attn_mask=mask.tril(self.start), scale=scale, enable_gqa=True
        )


class _Rows:
    """Reads one token of each row.

    ``seen`` tells which places of a row's prompt and of its drawn tokens hold something, shape
    (rows, 1, 1, width + reach). Rows lie in a grid of slots × ``deep``, at ``places`` of it.
    """

    def __init__(
        self,
        slots: int,
        drawn: torch.Tensor,
        seen: torch.Tensor,
        width: int,
        places: torch.Tensor,
        deep: int,
    ) -> None:
        self.slots, self.drawn, self.width = slots, drawn, width
        self.reach = seen.shape[-1] - width
        self.unseen = ~seen
        self.every = torch.arange(len(drawn), device=drawn.device)
        self.places, self.deep = places, deep
        self.regular = bool((len(drawn) == slots * deep) and places.equal(self.every))

    def write(self, layer: _Layer, keys: torch.Tensor, values: torch.Tensor) -> None:
        layer.own_keys[self.every, :, self.drawn] = keys[:, :, 0]
        layer.own_values[self.every, :, self.drawn] = values[:, :, 0]

    def attend(
        self, layer: _Layer, query: torch.Tensor, _: Any, __: Any, scale: float
    ) -> torch.Tensor:
        rows, heads = query.shape[:2]
        key_heads = layer.keys.shape[1]
        queries = query.view(rows, key_heads, heads // key_heads, -1)
        own = slice(rows), slice(None), slice(self.reach)
        shared = slice(self.slots), slice(None), slice(self.width)
        scores = torch.cat(
            [
                self._rows(self._blocks(queries) @ layer.keys[shared].transpose(-1, -2), rows),
                queries @ layer.own_keys[own].transpose(-1, -2),
            ],
            -1,
        )
        scores = scores.mul_(scale).masked_fill_(self.unseen, -torch.inf)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        of_prompt, of_own = weights.split([self.width, self.reach], -1)
        found: torch.Tensor = self._rows(self._blocks(of_prompt) @ layer.values[shared], rows)
        found = found + of_own @ layer.own_values[own]
        return found.reshape(rows, heads, 1, -1)

    def _blocks(self, rows: torch.Tensor) -> torch.Tensor:
        """Gather what belongs to a slot: (rows, heads, n, d) as (slots, heads, deep · n, d)."""
        if not self.regular:
            grid = rows.new_zeros(self.slots * self.deep, *rows.shape[1:])
            grid[self.places] = rows
            rows = grid
        _, heads, n, d = rows.shape
        grid = rows.view(self.slots, self.deep, heads, n, d).transpose(1, 2)
        return grid.reshape(self.slots, heads, self.deep * n, d)

    def _rows(self, blocks: torch.Tensor, rows: int) -> torch.Tensor:
        """Undo `_blocks`."""
        slots, heads, _, d = blocks.shape
        grid = blocks.view(slots, heads, self.deep, -1, d).transpose(1, 2)
        found = grid.reshape(slots * self.deep, heads, -1, d)
        return found if self.regular else found[self.places]


def _grid(slot: torch.Tensor, slots: int) -> tuple[torch.Tensor, int]:
    """Give each row a place in a grid of slots × deep, and return the places and deep."""
    order = slot.argsort(stable=True)
    counts = torch.bincount(slot, minlength=slots)
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(slot)
    rank[order] = torch.arange(len(slot), device=slot.device) - first[slot[order]]
    deep = int(counts.max())
    return slot * deep + rank, deep


_current: ContextVar[SharedCache] = ContextVar("the cache that a forward call works with")


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with the current cache; shapes are (batch, heads, tokens, dimension)."""
    cache = _current.get()
    assert cache._step is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    found = cache._step.attend(cache.own_layers[module.layer_idx], query, key, value, scale)
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attend)

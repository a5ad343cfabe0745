"""Draw many rows at once: prompts are read once a group, and ended rows leave for new ones.

Groups wait, the longest prompts first. Where rows have ended, their places are filled with the next
groups, whose prompts are read in chunks; when no group waits, the rows that are left move together.
So a step computes little that nobody needs, however different the lengths are.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from grpo_harness.engines.draw import DecodingError, NotFiniteError, draw, penalize
from grpo_harness.engines.engine import Sampling
from grpo_harness.engines.shared import ATTENTION, SharedCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK_PROMPTS, _CHUNK_TOKENS = 8, 1024
"""Prompts are read in chunks of at most so many, with at most so many tokens (or one prompt)."""

_SHARED = 8
"""A beginning that all prompts have is read once if it has this many tokens."""

_ENDED = 8
"""Ended rows leave when they are an eighth of the rows."""


@dataclass
class Row:
    """One completion while it is drawn: the number of its request, and its random numbers."""

    number: int
    random: random.Random
    prompt: Sequence[int]
    tokens: list[int] = field(default_factory=list)
    ended: bool = False


Ended = Callable[[Sequence[int]], bool]
"""Tells whether the last of the drawn tokens ends a completion."""

Done = Callable[[int, list[int]], object]
"""Called with the number of a request and its tokens, the last of which ended it."""


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    groups: Sequence[tuple[Sequence[int], Sequence[tuple[int, int]]]],
    sampling: Sampling,
    ended: Ended,
    rows: int,
    done: Done,
) -> None:
    """Draw from prompts, at most ``rows`` rows at a time.

    A group is a prompt's tokens, and the number and seed of each of its rows. Raises
    ``DecodingError`` with the tokens before logits that are not finite, and what torch raises if
    there is not enough memory; what was done before stays done.
    """
    with _attention(model):
        _Decoder(model, groups, sampling, ended, rows, done).run()


def forced_logits(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], steps: int
) -> list[torch.Tensor]:
    """Return the logits of the last ``steps`` tokens of each prompt, shape (2 · steps, vocabulary).

    The tokens before are read as a prompt, and the last ones as if two rows had drawn them.
    """
    found: dict[int, list[torch.Tensor]] = {}

    class Forced(_Decoder):
        def _choose(self, rows: Sequence[Row], logits: torch.Tensor) -> list[int]:
            for row, of in zip(rows, logits, strict=True):
                found.setdefault(row.number, []).append(of)
            return [prompts[row.number // 2][len(row.prompt) + len(row.tokens)] for row in rows]

    groups = [(prompt[:-steps], [(2 * i, 0), (2 * i + 1, 0)]) for i, prompt in enumerate(prompts)]
    sampling = Sampling(greedy=True, max_new_tokens=steps)
    with torch.inference_mode(), _attention(model):
        Forced(model, groups, sampling, lambda _: False, 2 * len(groups), lambda *_: None).run()
    return [torch.stack([*found[2 * i], *found[2 * i + 1]]) for i in range(len(prompts))]


class _Decoder:
    def __init__(
        self,
        model: PreTrainedModel,
        groups: Sequence[tuple[Sequence[int], Sequence[tuple[int, int]]]],
        sampling: Sampling,
        ended: Ended,
        rows: int,
        done: Done,
    ) -> None:
        self.model, self.device = model, model.device
        self.sampling, self.ended, self.done = sampling, ended, done
        self.most_rows = rows
        parts = [
            (prompt, part[i : i + rows])
            for prompt, part in groups
            for i in range(0, len(part), rows)
        ]
        self.waiting = deque(sorted(parts, key=lambda group: -len(group[0])))
        self.rows: list[Row] = []
        self.slots: list[Sequence[int]] = []
        self.slot: list[int] = []  # of each row
        total = sum(len(part) for _, part in parts)
        self.cache = SharedCache(
            int(model.config.get_text_config(decoder=True).num_hidden_layers),
            slots=min(len(parts), rows),
            width=len(self.waiting[0][0]),
            rows=min(total, rows),
            most=sampling.max_new_tokens,
            device=self.device,
        )

    def run(self) -> None:
        """Draw all rows."""
        self._read_shared()
        while self._admit():
            self._step()

    def _read_shared(self) -> None:
        """Read the tokens with which all prompts begin, but for their last one."""
        prompts = [list(prompt) for prompt, _ in self.waiting]
        first, last = min(prompts), max(prompts)
        most = min(map(len, prompts)) - 1
        n = next((i for i in range(most) if first[i] != last[i]), most)
        if n >= _SHARED and len(prompts) > 1:
            self._forward([first[:n]], 0, None)
            self.cache.shared = n

    def _admit(self) -> bool:
        """Let ended rows leave and groups enter, if it is time; tell whether rows are left."""
        while self.rows or self.waiting:
            if sum(row.ended for row in self.rows) * _ENDED < len(self.rows):
                return True
            self._leave()
            self._enter()
        return False

    def _enter(self) -> None:
        """Read the prompts of the next groups, as many as have room."""
        entering: list[tuple[int, list[Row]]] = []
        free = self.cache.rows - len(self.rows)
        while self.waiting and len(self.waiting[0][1]) <= free:
            prompt, part = self.waiting.popleft()
            free -= len(part)
            rows = [Row(number, random.Random(seed), prompt) for number, seed in part]
            entering.append((len(self.slots), rows))
            self.slots.append(prompt)
        for chunk in _chunks(entering, self.cache.shared):
            self._read(chunk)

    def _leave(self) -> None:
        """Close the gaps of ended rows, and of prompts that no row has any more."""
        kept = [i for i, row in enumerate(self.rows) if not row.ended]
        source, target = _moves(kept)
        self.cache.move_rows(source, target)
        for old, new in zip(source, target, strict=True):
            self.rows[new], self.slot[new] = self.rows[old], self.slot[old]
        del self.rows[len(kept) :], self.slot[len(kept) :]
        self.cache.used_rows = len(kept)
        used = sorted(set(self.slot))
        source, target = _moves(used)
        self.cache.move_slots(source, target)
        to = dict(zip(source, target, strict=True))
        for old, new in to.items():
            self.slots[new] = self.slots[old]
        self.slot = [to.get(slot, slot) for slot in self.slot]
        del self.slots[len(used) :]
        self.cache.used_slots = len(used)

    def _read(self, chunk: Sequence[tuple[int, list[Row]]]) -> None:
        """Read the prompts of groups, and draw the first token of each of their rows."""
        cache, start = self.cache, self.cache.shared
        slots = torch.tensor([slot for slot, _ in chunk], device=self.device)
        prompts = [rows[0].prompt for _, rows in chunk]
        logits = self._forward([prompt[start:] for prompt in prompts], start, slots)
        cache.lengths[slots] = torch.tensor([len(p) for p in prompts], device=self.device)
        first = len(self.rows)
        for slot, rows in chunk:
            self.rows += rows
            self.slot += [slot] * len(rows)
        cache.used_rows, cache.used_slots = len(self.rows), len(self.slots)
        new = self.rows[first:]
        cache.slot[first : cache.used_rows] = torch.tensor(self.slot[first:], device=self.device)
        cache.drawn[first : cache.used_rows] = 0
        of = [i for i, (_, rows) in enumerate(chunk) for _ in rows]
        self._draw(new, logits[torch.tensor(of, device=self.device)])

    def _step(self) -> None:
        """Draw a token of each row."""
        cache = self.cache
        last = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self.device)
        with cache.drawing() as positions:
            logits = self.model(
                input_ids=last, position_ids=positions, past_key_values=cache, use_cache=True
            ).logits[:, -1]
        going = torch.tensor([not row.ended for row in self.rows], device=self.device)
        cache.drawn[: cache.used_rows] += going
        self._draw(self.rows, logits)

    def _forward(
        self, prompts: Sequence[Sequence[int]], start: int, slots: torch.Tensor | None
    ) -> torch.Tensor:
        """Read prompts from ``start`` on; return the logits behind each, (prompts, vocabulary)."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        width = int(lengths.max())
        # Padded on the right, behind what causal attention looks at.
        ids = torch.tensor(
            [[*prompt, *[prompt[-1]] * (width - len(prompt))] for prompt in prompts],
            device=self.device,
        )
        positions = torch.arange(start, start + width, device=self.device)[None]
        with self.cache.prefilling(slots), _last_only(self.model, lengths - 1):
            logits = self.model(
                input_ids=ids,
                position_ids=positions.expand(len(prompts), -1),
                past_key_values=self.cache,
                use_cache=True,
            ).logits
        found: torch.Tensor = logits[:, 0]
        return found

    def _draw(self, rows: Sequence[Row], logits: torch.Tensor) -> None:
        logits = logits.float()
        if self.sampling.repetition_penalty != 1:
            seen = [[*row.prompt, *row.tokens] for row in rows]
            width = max(map(len, seen))
            there = [[*tokens, *[tokens[0]] * (width - len(tokens))] for tokens in seen]
            there_ids = torch.tensor(there, device=self.device)
            logits = penalize(logits, there_ids, self.sampling.repetition_penalty)
        for row, token in zip(rows, self._choose(rows, logits), strict=True):
            if row.ended:
                continue
            row.tokens.append(token)
            if len(row.tokens) == self.sampling.max_new_tokens or self.ended(row.tokens):
                row.ended = True
                self.done(row.number, row.tokens)

    def _choose(self, rows: Sequence[Row], logits: torch.Tensor) -> list[int]:
        """Draw a token of each row."""
        numbers = [row.random.random() for row in rows]
        uniform = torch.tensor(numbers, dtype=torch.float32, device=self.device)
        try:
            drawn: list[int] = draw(logits, uniform, self.sampling).tolist()
        except NotFiniteError as error:
            row = rows[error.row]
            raise DecodingError([*row.prompt, *row.tokens]) from None
        return drawn


def _chunks(
    groups: Sequence[tuple[int, list[Row]]], start: int
) -> Iterator[Sequence[tuple[int, list[Row]]]]:
    """Divide groups, the longest prompts first, into chunks that are read at once."""
    at = 0
    while at < len(groups):
        width = max(len(groups[at][1][0].prompt) - start, 1)
        n = max(1, min(_CHUNK_PROMPTS, _CHUNK_TOKENS // width))
        yield groups[at : at + n]
        at += n


def _moves(kept: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return which places move where, so that those kept are the first: the least moves."""
    n = len(kept)
    target = sorted(set(range(n)) - set(kept))
    return [place for place in kept if place >= n], target


@contextmanager
def _attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model use the attention over shared prompts."""
    own = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


@contextmanager
def _last_only(model: PreTrainedModel, last: torch.Tensor) -> Iterator[None]:
    """Give the output layer only the hidden states at the places ``last``, one a row."""

    def only(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *more = given
        return (hidden[torch.arange(len(hidden), device=hidden.device), last][:, None], *more)

    hook = model.get_output_embeddings().register_forward_pre_hook(only)
    try:
        yield
    finally:
        hook.remove()

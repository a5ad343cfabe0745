"""Draw the next token of each row from its logits, by one uniform number a row.

Nearly always the tokens that may be drawn are among the few dozen most likely ones. Those are found
by the greatest probability of each block of the vocabulary, without sorting or copying it whole.
"""

from collections.abc import Sequence

import torch

from grpo_harness.engines.engine import Sampling

_SEARCHED = (64, 256, 1024)
"""How many of the most likely tokens are searched, before the whole vocabulary is."""

_BLOCK = 32

_AT_ONCE = 1 << 20
"""Probabilities that a CPU draws from at once: so many lie in its caches."""


class NotFiniteError(Exception):
    """Logits without a finite maximum, in the row of this number."""

    def __init__(self, row: int) -> None:
        super().__init__()
        self.row = row


class DecodingError(Exception):
    """Logits are not finite; ``tokens`` are those before them, of the prompt and drawn."""

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__()
        self.tokens = tokens


def draw(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return one token a row, shape (rows,), drawn as `Sampling` says from logits in float32.

    ``logits`` have the shape (rows, vocabulary) and may be overwritten; ``uniform`` has a number
    from 0 to below 1 for each row. A row's token depends on nothing of another row. Raises
    ``NotFiniteError``.
    """
    if sampling.greedy:
        greatest, tokens = logits.max(-1)
        _check_finite(greatest)
        return tokens
    if logits.device.type != "cpu" or logits.numel() <= _AT_ONCE:
        return _drawn(logits, uniform, sampling)
    first, most = 0, max(1, _AT_ONCE // logits.shape[-1])
    found = torch.empty(len(logits), dtype=torch.long)
    while first < len(logits):
        part = slice(first, first + most)
        try:
            found[part] = _drawn(logits[part], uniform[part], sampling)
        except NotFiniteError as error:
            raise NotFiniteError(first + error.row) from None
        first += most
    return found


def _drawn(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """`draw` from a distribution."""
    spread = distribution(logits, sampling)
    if sampling.top_p == 1 and not sampling.min_p:
        return _any(spread, uniform)
    drawn = torch.empty(len(spread), dtype=torch.long, device=spread.device)
    rows = torch.arange(len(spread), device=spread.device)
    for searched in (*_SEARCHED, spread.shape[-1]):
        tokens, cumulative, kept, enough = likeliest(spread, searched, sampling)
        # The draw is uniform over the kept mass.
        mass = cumulative.gather(-1, kept - 1)
        place = torch.searchsorted(cumulative, uniform[rows, None] * mass, right=True)
        drawn[rows] = tokens.gather(-1, torch.minimum(place, kept - 1))[:, 0]
        if bool(enough.all()):
            break
        rows, spread = rows[~enough], spread[~enough]
    return drawn


def distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the probabilities of the vocabulary, by temperature and top_k."""
    if sampling.temperature != 1:
        logits = logits.div_(sampling.temperature)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill_(logits < least, -torch.inf)
    return logits.softmax(-1)


def likeliest(
    spread: torch.Tensor, searched: int, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Search so many of the most likely tokens for those that top_p and min_p keep.

    Returns the tokens, the most likely first, the sums of the probabilities up to each (both of
    shape (rows, tokens)), how many of them are kept, shape (rows, 1), and whether these are all
    that are kept, shape (rows,). Raises ``NotFiniteError``.
    """
    probabilities, tokens = _top(spread, min(searched, spread.shape[-1]))
    _check_finite(probabilities[:, 0])
    # At least the smallest normal number, because a token without probability is never kept.
    least = (probabilities[:, :1] * (sampling.min_p or 0)).clamp_min(torch.finfo(spread.dtype).tiny)
    cumulative = probabilities.cumsum(-1)
    # A token is kept if the more likely ones together are below top_p, so the first always is.
    kept = (cumulative - probabilities < sampling.top_p) & (probabilities >= least)
    enough = (cumulative[:, -1] >= sampling.top_p) | (probabilities[:, -1:] < least)[:, 0]
    return tokens, cumulative, kept.sum(-1, keepdim=True), enough


def _any(spread: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw from the whole distribution, for which it needs no order."""
    _check_finite(spread.sum(-1))
    cumulative = spread.cumsum(-1)
    mass = cumulative[:, -1:]
    last = torch.searchsorted(cumulative, mass.contiguous())  # behind it no token has a probability
    return torch.minimum(torch.searchsorted(cumulative, uniform[:, None] * mass, right=True), last)[
        :, 0
    ]


def penalize(logits: torch.Tensor, there: torch.Tensor, penalty: float) -> torch.Tensor:
    """Apply a repetition penalty for the tokens that are there, shape (rows, any)."""
    found = logits.gather(-1, there)
    return logits.scatter_(-1, there, torch.where(found < 0, found * penalty, found / penalty))


def _top(spread: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ``n`` greatest probabilities of each row and their tokens, as ``topk`` does."""
    rows, size = spread.shape
    blocks = size // _BLOCK
    if blocks < 2 * n:
        return torch.topk(spread, n)
    # The greatest n lie in the n blocks with the greatest maxima, or behind the last whole block.
    whole = spread[:, : blocks * _BLOCK].view(rows, blocks, _BLOCK)
    best = whole.amax(-1).topk(n, sorted=False).indices
    within = whole.gather(1, best[..., None].expand(rows, n, _BLOCK)).flatten(1)
    values, places = torch.cat([within, spread[:, blocks * _BLOCK :]], -1).topk(n)
    ends = n * _BLOCK
    inside = places.clamp_max(ends - 1)
    tokens = best.gather(-1, inside // _BLOCK) * _BLOCK + inside % _BLOCK
    return values, torch.where(places < ends, tokens, places - ends + blocks * _BLOCK)


def _check_finite(greatest: torch.Tensor) -> None:
    finite = greatest.isfinite()
    if not bool(finite.all()):
        raise NotFiniteError(int((~finite).nonzero()[0]))

"""Where a completion ends, and the sample that its tokens are."""

from bisect import bisect_left
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from grpo_harness.engines.engine import Sample, first_end


class Completions:
    """Makes samples of drawn tokens: a completion ends with an end token or a stop string.

    The text decides whether a stop string is there. `stopped` only spares the steps after it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], stop: Sequence[str]
    ) -> None:
        self._tokenizer, self._ends, self._stop = tokenizer, frozenset(ends), stop
        # A token has a byte at least. One more, because some tokenizers trim the first.
        self._reach = max((len(string.encode()) for string in stop), default=0) + 1

    def ended(self, tokens: Sequence[int]) -> bool:
        """Tell whether the last of the drawn tokens is an end token or completes a stop string."""
        return tokens[-1] in self._ends or self.stopped(tokens)

    def stopped(self, tokens: Sequence[int]) -> bool:
        """Tell whether the last tokens have a stop string."""
        return bool(self._stop) and first_end(self._text(tokens[-self._reach :]), self._stop) > 0

    def sample(self, tokens: Sequence[int]) -> Sample:
        """Return the sample of all tokens that were drawn; those behind its end are left out."""
        end = next((i for i, token in enumerate(tokens) if token in self._ends), None)
        text, ids = self._text(tokens[:end]), tokens if end is None else tokens[: end + 1]
        if stop := first_end(text, self._stop):
            text = text[:stop]
            last = bisect_left(
                range(len(ids)),
                True,
                key=lambda i: first_end(self._text(ids[: i + 1]), self._stop) > 0,
            )
            ids = ids[: last + 1]
        return Sample(text, len(ids), truncated=end is None and not stop, ids=tuple(ids))

    def _text(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

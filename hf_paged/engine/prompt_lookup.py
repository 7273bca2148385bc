"""Drafts from what was said before: the tokens that followed the last ones where they occurred last.

The idea is prompt lookup decoding (A. Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding). Of the n-grams up
to a size that end a sequence, the longest that occurred before counts, and of its occurrences the latest. A match which
overlaps the end goes on into its own draft, as in Lempel and Ziv's compression of 1977: a text with a period of three
tokens is drafted as far as wanted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_paged.engine.request import Sequence

_LONGER = (4, 8, 16)


@dataclass
class NGramIndex:
    """Where each n-gram of a growing list of tokens last ended."""

    max_ngram: int
    _ends: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram -> place after its last token
    _filled: int = 0  # n-grams that end at this place or before are known

    def draft(self, tokens: list[int], count: int) -> tuple[list[int], int]:
        """What may follow `tokens`, of which earlier calls have seen a beginning.

        Returns:
            Up to `count` tokens, and how many at the end agree with those before the occurrence, as far as is looked:
            the size of the n-gram, or one of `_LONGER`.
        """
        ends, length = self._ends, len(tokens)
        self._learn(tokens, length - 1)
        for size in range(min(self.max_ngram, length - 1), 0, -1):
            start = ends.get(tuple(tokens[-size:]))
            if start is not None:
                break
        else:
            return [], 0
        found = tokens[start : start + count]
        while len(found) < count:  # it overlaps the end
            found += found[start - length :][: count - len(found)]
        for longer in _LONGER:
            if longer > size:
                if start < longer or tokens[start - longer : start] != tokens[-longer:]:
                    break
                size = longer
        return found, size

    def _learn(self, tokens: list[int], last: int) -> None:
        """Takes in the n-grams that end up to place `last`."""
        ends, first = self._ends, self._filled + 1
        self._filled = max(self._filled, last)
        if last - first > 8:
            for size in range(1, self.max_ngram + 1):
                begin = max(first, size)
                columns = [tokens[begin - size + i : last + 1 - size + i] for i in range(size)]
                ends.update(zip(zip(*columns, strict=True), range(begin, last + 1), strict=False))
            return
        for end in range(first, last + 1):
            for size in range(1, min(self.max_ngram, end) + 1):
                ends[tuple(tokens[end - size : end])] = end


class PromptLookup:
    """Drafts for the sequences of one call.

    Args:
        num_tokens: most tokens drafted at a time.
        max_ngram: longest n-gram that is looked for.
        eos_token_ids: nothing is drafted from an end of sequence on.
    """

    def __init__(self, num_tokens: int, max_ngram: int, eos_token_ids: frozenset[int] = frozenset()) -> None:
        self._num_tokens = num_tokens
        self._max_ngram = max_ngram
        self._eos = eos_token_ids

    #: Looking up costs next to nothing.
    seconds_a_depth = 0.0

    def offer(self, sequence: Sequence, most: int) -> int:
        """How many tokens, at most `most`, can be drafted for `sequence` now; they are in its draft."""
        record = sequence.drafting
        if record.state is None:
            record.state = NGramIndex(self._max_ngram)
        draft, match = record.state.draft(sequence.token_ids, min(most, self._num_tokens))
        # A long match is right more often than a short one: each is learned by itself.
        record.kind = match.bit_length()
        if not self._eos.isdisjoint(draft):
            draft = draft[: next(i for i, token in enumerate(draft) if token in self._eos)]
        sequence.draft = draft
        return len(draft)

    def draft(self, wanted: list[tuple[Sequence, int]]) -> dict[Sequence, BaseException]:
        for sequence, count in wanted:
            sequence.draft = sequence.draft[:count]
        return {}

    def verified(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        pass

    def forget(self, sequence: Sequence) -> None:
        pass

"""How each kind of upstream's logits processors runs on rows of many calls, lengths and steps.

A kind is what a processor reads besides the scores: nothing (`Rule`), the length (`LengthRule`), the history
or its end (`HistoryRule`), or what it holds for each row of its batch (`BatchRule`). The arithmetic is always
that of upstream's objects; a rule only decides which rows one of them may be given together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_paged.engine.host_copy import to_device

#: No token id: matches nothing in a history. Upstream clamps ids beyond the vocabulary.
_FILLER = 2**62
_INF = float("inf")
#: A row is sorted whole if more than one in so many of its scores is left.
_SORTED_SHARE = 8


@dataclass(frozen=True, eq=False)
class Line:
    """One row of logits and where it stands."""

    processors: Sequence[Callable[[Tensor, Tensor], Tensor]]  # upstream's, of its call
    row: int
    num_rows: int  # of its call
    length: int  # padded prompt + generated
    history: Callable[[], np.ndarray]  # -> [length] int64, not to be written to; without `newest`
    #: [1] int64 on the device of the scores: the last token of the history where the host does not know it yet. Only
    #: what `needs_history` says no to meets such a row.
    newest: Tensor | None = None

    def last(self, width: int) -> np.ndarray:  # [width]
        return self.history()[self.length - width :]


@dataclass(frozen=True)
class Rule:
    """Reads the scores only. `key` holds the parameters that must agree."""

    key: Callable[[Any], Hashable]

    def prepare(self, processor: Any) -> Any:
        return processor

    #: Whether it reads tokens of the history on the host, the newest too.
    needs_history: ClassVar[bool] = False

    def apply(self, stage: int, lines: list[Line], scores: Tensor) -> Tensor:
        """Scores [n, vocab] of `lines` after processor number `stage`, whose keys agree in all lines."""
        return lines[0].processors[stage](_no_ids(len(lines), 0, scores), scores)


@dataclass(frozen=True)
class SortRule(Rule):
    """Sorts the scores, which takes longer than all the rest: after a top-k only what that left is sorted.

    Which of equal scores upstream keeps is up to its sort, which is not stable: where the cut falls between
    equals, it gets the whole row. Sums over fewer zeros may round differently, by one part in 10**7.
    """

    def apply(self, stage: int, lines: list[Line], scores: Tensor) -> Tensor:
        processor: Any = lines[0].processors[stage]
        # Elsewhere the sort is quick, and counting would wait for the device.
        if scores.device.type != "cpu" or processor.filter_value != -_INF:
            return super().apply(stage, lines, scores)
        left = scores != -_INF
        num_left = left.sum(dim=1)
        width = int(num_left.max())
        if width == 0 or width * _SORTED_SHARE > scores.shape[1]:
            return super().apply(stage, lines, scores)
        row, column = left.nonzero(as_tuple=True)
        place = torch.arange(len(row)) - (num_left.cumsum(0) - num_left)[row]
        dense = scores.new_full((len(lines), width), -_INF)
        dense[row, place] = scores[row, column]
        cut = processor(_no_ids(len(lines), 0, scores), dense)
        result = torch.full_like(scores, -_INF)
        result[row, column] = cut[row, place]
        lowest_kept = cut.masked_fill(cut == -_INF, _INF).amin(dim=1)
        highest_cut = dense.masked_fill(cut != -_INF, -_INF).amax(dim=1)
        if (between_equals := (lowest_kept == highest_cut).nonzero().flatten()).numel():
            whole = processor(_no_ids(len(between_equals), 0, scores), scores[between_equals])
            result[between_equals] = whole
        return result


@dataclass(frozen=True)
class LengthRule(Rule):
    """Reads the length only. `variant` of (processor, length): what it does there; None where it does
    nothing.
    """

    variant: Callable[[Any, int], Hashable]

    def apply(self, stage: int, lines: list[Line], scores: Tensor) -> Tensor:
        def run(indices: list[int], scores: Tensor) -> Tensor:
            first = lines[indices[0]]
            return first.processors[stage](_no_ids(len(indices), first.length, scores), scores)

        return _in_groups([self.variant(line.processors[stage], line.length) for line in lines], scores, run)


@dataclass(frozen=True)
class HistoryRule(Rule):
    """Reads the last `window` tokens of the history, or what there is; all of it if `window` gives None."""

    window: Callable[[Any], int | None]
    needs_history: ClassVar[bool] = True

    def apply(self, stage: int, lines: list[Line], scores: Tensor) -> Tensor:
        window = self.window(lines[0].processors[stage])
        widths = [line.length if window is None else min(line.length, window) for line in lines]

        def run(indices: list[int], scores: Tensor) -> Tensor:
            ids = _ids([lines[i].last(widths[i]) for i in indices], scores)
            return self.processor(stage, [lines[i] for i in indices])(ids, scores)

        return _in_groups(widths, scores, run)

    def processor(self, stage: int, lines: list[Line]) -> Callable[[Tensor, Tensor], Tensor]:
        return lines[0].processors[stage]


@dataclass(frozen=True)
class NGramRule(HistoryRule):
    """`NoRepeatNGram`: histories of unequal length are filled on the left with what no n-gram contains."""

    def apply(self, stage: int, lines: list[Line], scores: Tensor) -> Tensor:
        processor: Any = lines[0].processors[stage]
        size = processor.ngram_size
        # With n = 1 the filler itself would be banned. Below n tokens no n-gram is complete: none is banned.
        if size == 1 or len({line.length for line in lines}) == 1:
            return super().apply(stage, lines, scores)

        def run(indices: list[int], scores: Tensor) -> Tensor:
            ids = np.full((len(indices), max(lines[i].length for i in indices)), _FILLER, dtype=np.int64)
            for out, i in zip(ids, indices, strict=True):
                out[-lines[i].length :] = lines[i].history()
            return processor(torch.from_numpy(ids).to(scores.device), scores)

        return _in_groups([True if line.length >= size else None for line in lines], scores, run)


@dataclass(frozen=True)
class RepetitionRule(Rule):
    """`RepetitionPenalty`: only the set of tokens counts, so a short history repeats a token it has."""

    def prepare(self, processor: Any) -> Any:
        if not isinstance(processor.prompt_ignore_length, Tensor):
            return processor
        processor = copy.copy(processor)
        processor.prompt_ignore_length = processor.prompt_ignore_length.cpu()  # read row by row each step
        return processor

    def apply(self, stage: int, lines: list[Line], scores: Tensor) -> Tensor:
        processor: Any = copy.copy(lines[0].processors[stage])
        processor.prompt_ignore_length = None
        ignored = [self._num_ignored(line.processors[stage], line, scores) for line in lines]
        penalised = [line.history()[count:] for line, count in zip(lines, ignored, strict=True)]

        def run(indices: list[int], scores: Tensor) -> Tensor:
            ids = np.empty((len(indices), max(len(penalised[i]) for i in indices)), dtype=np.int64)
            for out, i in zip(ids, indices, strict=True):
                out[: len(penalised[i])] = penalised[i]
                out[len(penalised[i]) :] = penalised[i][-1:]
            return processor(_with_newest(ids, [lines[i] for i in indices], scores), scores)

        # Those of which only the newest token counts go apart: there is no known one to fill up with.
        labels = [
            None if count == line.length else len(tokens) > 0
            for tokens, line, count in zip(penalised, lines, ignored, strict=True)
        ]
        return _in_groups(labels, scores, run)

    @staticmethod
    def _num_ignored(processor: Any, line: Line, scores: Tensor) -> int:
        ignored = processor.prompt_ignore_length
        if not isinstance(ignored, Tensor):
            return min(ignored or 0, line.length)
        if len(ignored) != line.num_rows:
            # Raises upstream's own error.
            no_scores = torch.zeros((line.num_rows, 1))
            processor(no_scores.long(), no_scores)
        return min(int(ignored[line.row]), line.length)


@dataclass(frozen=True)
class BatchRule(HistoryRule):
    """Processors holding something for each row of their batch.

    `num_held` of a processor: for how many rows. `select` of [(processor, row)]: one for these rows.
    """

    num_held: Callable[[Any], int]
    select: Callable[[list[tuple[Any, int]]], Callable[[Tensor, Tensor], Tensor]]

    def apply(self, stage: int, lines: list[Line], scores: Tensor) -> Tensor:
        if all(self.num_held(line.processors[stage]) == line.num_rows for line in lines):
            return super().apply(stage, lines, scores)
        # How upstream spreads fewer held rows over its batch differs by version: let it see the whole batch.
        return _in_groups(
            [(id(line.processors[stage]), line.length) for line in lines],
            scores,
            lambda indices, scores: self._whole_batch(stage, [lines[i] for i in indices], scores),
        )

    def processor(self, stage: int, lines: list[Line]) -> Callable[[Tensor, Tensor], Tensor]:
        return self.select([(line.processors[stage], line.row) for line in lines])

    def _whole_batch(self, stage: int, lines: list[Line], scores: Tensor) -> Tensor:
        rows = [line.row for line in lines]
        all_scores = scores.new_zeros((lines[0].num_rows, scores.shape[1]))
        all_scores[rows] = scores
        ids = torch.zeros((lines[0].num_rows, lines[0].length), dtype=torch.int64, device=scores.device)
        ids[rows] = _ids([line.history() for line in lines], scores)
        return lines[0].processors[stage](ids, all_scores)[rows]


def _in_groups(
    labels: Sequence[Hashable], scores: Tensor, run: Callable[[list[int], Tensor], Tensor]
) -> Tensor:
    """`run(indices, scores[indices])` for each group of rows with equal labels; rows labelled None stay."""
    groups: dict[Hashable, list[int]] = {}
    for i, label in enumerate(labels):
        groups.setdefault(label, []).append(i)
    left_alone = groups.pop(None, None)
    if not groups:
        return scores
    if len(groups) == 1 and not left_alone:
        return run(list(range(len(labels))), scores)
    result = scores.clone(memory_format=torch.contiguous_format)
    for indices in groups.values():
        index = to_device(torch.tensor(indices), scores.device)  # a list would be copied, and waited for
        result[index] = run(indices, scores[index])
    return result


def _with_newest(ids: np.ndarray, lines: list[Line], like: Tensor) -> Tensor:
    """`ids` [n, width] on the device, and a column of the newest tokens where any of `lines` has its there only."""
    known = to_device(torch.from_numpy(ids), like.device)
    if all(line.newest is None for line in lines):
        return known
    last = [known[i, -1:] if line.newest is None else line.newest for i, line in enumerate(lines)]
    return torch.cat((known, torch.stack(last)), dim=1)


def _ids(rows: list[np.ndarray], like: Tensor) -> Tensor:  # [len(rows), width]
    return torch.from_numpy(np.stack(rows)).to(like.device)


def _no_ids(num_rows: int, length: int, like: Tensor) -> Tensor:
    """Token ids [num_rows, length] for processors that look at nothing but their shape."""
    return torch.zeros((1, 1), dtype=torch.int64, device=like.device).expand(num_rows, length)

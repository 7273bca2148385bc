"""Next tokens of the rows of a step, whichever calls they belong to: just what upstream's loop would choose.

Rows that only want the most probable token never leave the dtype of the model. The others are cast to
float32, put through the processors of their call together with all rows of equal parameters, and drawn from
the call's `Draws`. What goes wrong for a call (a processor that raises, probabilities that are not numbers)
is the result of its rows, and of no others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hf_paged.engine import processors as rules
from hf_paged.engine import stopping
from hf_paged.engine.draws import SeededDraws, multinomial_error, seeded_exponential
from hf_paged.engine.host_copy import to_host
from hf_paged.engine.processor_rules import Line
from hf_paged.engine.request import Call, FinishReason, Sequence
from hf_paged.engine.sampling import SamplingSpec, TokenLogprobs

#: Float32 scores processed at once: keeps the temporaries of the warpers (about ten times this) small.
_CHUNK_BYTES = 32 << 20
_NONE: Mapping[Sequence, Tensor] = {}


class Sampler:
    """Turns logits into tokens and tokens into finish reasons.

    Args:
        argmax_rows: [rows, vocab] of any float dtype -> [rows] int64; the first of equals, as `torch.argmax`.
        apart: compute each row by itself, so that no other has a part in its rounding.
    """

    def __init__(
        self,
        argmax_rows: Callable[[Tensor], Tensor] = lambda rows: torch.argmax(rows, dim=-1),
        *,
        apart: bool = False,
    ) -> None:
        self.argmax_rows = argmax_rows
        self._apart = apart

    def sample(self, logits: Tensor, sequences: list[Sequence]) -> list[int | BaseException]:
        """The next token of each sequence, or the exception its call fails with.

        Args:
            logits: [R, vocab], row i for `sequences[i]`, any float dtype. Not written to.
            sequences: distinct; `num_generated` of each is the step of its row.

        Returns:
            R tokens. A finished sequence of a call that runs on gets what upstream gives it: the pad token if
            the call knows an end of sequence.
        """
        if logits.dtype is torch.float64:
            logits = logits.float()  # as upstream does; any narrower dtype has the same argmax as in float32
        special = [i for i, sequence in enumerate(sequences) if not sequence.call.sampling.plain]
        if not special:
            tokens: list[int | BaseException] = to_host(self.argmax_rows(logits))
        else:
            tokens = [0] * len(sequences)
            plain = sorted(set(range(len(sequences))).difference(special))
            if plain:
                for i, token in zip(plain, to_host(self.argmax_rows(logits[plain])), strict=True):
                    tokens[i] = token
            self._sample_special(logits, sequences, special, tokens)
        for i, sequence in enumerate(sequences):
            if sequence.finish_reason is not None and not isinstance(tokens[i], BaseException):
                spec: SamplingSpec = sequence.call.sampling
                if spec.has_eos and spec.pad_token_id is not None:
                    tokens[i] = spec.pad_token_id
        return tokens

    def most_probable(self, logits: Tensor) -> list[int]:
        """The first of the highest logits of each row of [R, vocab]: the next tokens of `plain` calls."""
        return to_host(self.argmax_rows(logits.float() if logits.dtype is torch.float64 else logits))

    def stops(self, sequences: list[Sequence]) -> list[FinishReason | None]:
        """Why each sequence, whose newest token was just appended, finishes; None if it goes on."""
        reasons = stopping.stops(sequences)
        for sequence, reason in zip(sequences, reasons, strict=True):
            if reason is not None and not sequence.call.run_on:
                sequence.call.sampling.release(sequence.row)
        return reasons

    def _sample_special(
        self, logits: Tensor, sequences: list[Sequence], special: list[int], tokens: list[int | BaseException]
    ) -> None:
        """Fills `tokens` at `special`; rows of equal signature go together."""
        groups: dict[object, list[int]] = {}
        for i in special:
            groups.setdefault(sequences[i].call.sampling.signature, []).append(i)
        chunk = 1 if self._apart else most_rows(logits.shape[1])
        errors: dict[Call, BaseException] = {}
        for indices in groups.values():
            for start in range(0, len(indices), chunk):
                part = indices[start : start + chunk]
                own = logits if len(part) == len(sequences) else logits[part]
                chosen = self._sample_group(own.float(), [sequences[i] for i in part], errors)
                for i, token in zip(part, chosen, strict=True):
                    tokens[i] = token
        if errors:
            for i in special:
                tokens[i] = errors.get(sequences[i].call, tokens[i])

    def _sample_group(
        self, logits: Tensor, sequences: list[Sequence], errors: dict[Call, BaseException]
    ) -> list[int]:
        """Tokens of rows of equal signature, arbitrary for those of calls in `errors`, to which it may add.

        `logits` [n, vocab] float32 are not written to.
        """
        scores = process(_edited(logits, sequences, errors), sequences, errors)
        if sequences[0].call.sampling.do_sample:
            tokens = to_host(self.argmax_rows(_divided_by_draws(scores, sequences, errors)))
        else:
            tokens = to_host(self.argmax_rows(scores.contiguous()))
        recording: dict[bool, list[int]] = {}
        for i, sequence in enumerate(sequences):
            spec: SamplingSpec = sequence.call.sampling
            if spec.output_scores:
                spec.scores[sequence.row].append(scores[i].clone())
            if spec.output_logits:
                spec.logits[sequence.row].append(logits[i].clone())
            if spec.logprobs is not None:
                recording.setdefault(spec.raw_logprobs, []).append(i)
        for raw, rows in recording.items():
            _record_logprobs(
                (logits if raw else scores)[rows], [sequences[i] for i in rows], [tokens[i] for i in rows]
            )
        return tokens


def most_rows(vocab: int) -> int:
    """Rows of float32 scores that are processed at once."""
    return max(1, _CHUNK_BYTES // (4 * vocab))


def _edited(logits: Tensor, sequences: list[Sequence], errors: dict[Call, BaseException]) -> Tensor:
    """`logits` [n, vocab] after the edits that requests have of their own; `errors` gets what these raised."""
    editing = [i for i, sequence in enumerate(sequences) if sequence.call.sampling.edit is not None]
    if not editing:
        return logits
    logits = logits.clone()
    for i in editing:
        sequence = sequences[i]
        try:
            sequence.call.sampling.edit(sequence.generated_ids, logits[i])
        except Exception as error:
            errors.setdefault(sequence.call, error)
    return logits


def process(
    logits: Tensor,
    sequences: list[Sequence],
    errors: dict[Call, BaseException],
    newest: Mapping[Sequence, Tensor] = _NONE,
) -> Tensor:
    """Scores [n, vocab] after the processors; `errors` gets what they raised, by call.

    Args:
        newest: [1] int64 on the device: the newest token of a sequence which has it there only.
    """
    if not sequences[0].call.sampling.processors:  # nor have the others any: their signatures are equal
        return logits
    try:
        return rules.run([_line(sequence, newest) for sequence in sequences], logits)
    except Exception as error:
        by_call: dict[Call, list[int]] = {}
        for i, sequence in enumerate(sequences):
            by_call.setdefault(sequence.call, []).append(i)
        if len(by_call) == 1:
            errors.setdefault(sequences[0].call, error)
            return logits
    # Rows of several calls went together: each call on its own shows whose fault it was.
    scores = logits.clone()
    for part in by_call.values():
        scores[part] = process(logits[part], [sequences[i] for i in part], errors, newest)
    return scores


def _divided_by_draws(scores: Tensor, sequences: list[Sequence], errors: dict[Call, BaseException]) -> Tensor:
    """What `torch.multinomial(softmax(scores), 1)` takes the argmax of, [n, vocab].

    `errors` gets what it would have raised, by call.
    """
    probs = torch.softmax(scores, dim=-1)
    # A row with a nan, with +inf or with nothing but -inf among its scores is nan throughout; no other is.
    for i, bad in enumerate(to_host(torch.isnan(probs[:, 0]))):
        if bad:
            errors.setdefault(sequences[i].call, multinomial_error(probs[i]))
    seeded = divide_seeded(probs, sequences, errors)
    asking: dict[tuple[Call, int], list[int]] = {}
    for i, sequence in enumerate(sequences):
        if i in seeded:
            continue
        asking.setdefault((sequence.call, sequence.num_generated), []).append(i)
    for (call, t), indices in asking.items():
        if call in errors:
            continue
        rows = [sequences[i].row for i in indices]
        variates = call.sampling.draws.exponential(rows, t, probs.shape[1], probs.dtype, probs.device)
        if len(indices) == len(sequences):
            return probs.div_(variates)
        for i, row in zip(indices, variates, strict=True):
            probs[i] /= row
    return probs


def divide_seeded(probs: Tensor, sequences: list[Sequence], errors: dict[Call, BaseException]) -> set[int]:
    """Divides the rows of seeded calls by their variates, of all calls at once; which rows these are."""
    rows = [
        i
        for i, s in enumerate(sequences)
        if isinstance(s.call.sampling.draws, SeededDraws) and s.call not in errors
    ]
    if rows:
        places = [(sequences[i].call.sampling.draws, sequences[i].row, sequences[i].num_chosen) for i in rows]
        variates = seeded_exponential(places, probs.shape[1], probs.dtype, probs.device)
        if len(rows) == len(sequences):
            probs.div_(variates)
        else:
            probs[rows] /= variates
    return set(rows)


def _line(sequence: Sequence, newest: Mapping[Sequence, Tensor]) -> Line:
    spec: SamplingSpec = sequence.call.sampling
    return Line(
        processors=spec.processors,
        row=sequence.row,
        num_rows=spec.num_rows,
        length=spec.prompt_width + sequence.num_chosen,
        history=lambda: spec.history(sequence),
        newest=newest.get(sequence),
    )


def _record_logprobs(scores: Tensor, sequences: list[Sequence], tokens: list[int]) -> None:
    chosen = torch.tensor(tokens, device=scores.device)
    found = logprobs_of(scores, chosen, most_logprobs(sequences))
    for sequence, token, *numbers in zip(sequences, tokens, *map(to_host, found), strict=True):
        note_logprobs(sequence, token, *numbers)


def most_logprobs(sequences: list[Sequence]) -> int:
    return max(sequence.call.sampling.logprobs for sequence in sequences)


def logprobs_of(scores: Tensor, tokens: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of `tokens` [n] by `scores` [n, vocab], then of the most probable ones, and which these are.

    Returns:
        [n], [n, width] and [n, width], fewer of a smaller vocabulary.
    """
    logprobs = torch.log_softmax(scores, dim=-1)
    values, ids = logprobs.topk(min(scores.shape[1], width), dim=-1)
    return logprobs.gather(1, tokens[:, None])[:, 0], values, ids


def note_logprobs(sequence: Sequence, token: int, chosen: float, values: list[float], ids: list[int]) -> None:
    """Records a row of `logprobs_of` for the next token of `sequence`."""
    spec: SamplingSpec = sequence.call.sampling
    top = list(zip(ids, values, strict=True))[: spec.logprobs]
    spec.token_logprobs[sequence.row].append(TokenLogprobs(token, chosen, top))

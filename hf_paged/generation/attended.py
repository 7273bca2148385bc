"""Calls whose own thread has something to do while they run: code that users made, and streamers.

The thread never holds the engine meanwhile. So user code runs where its caller is, with its context variables and
locks, one thing after another as in upstream's loop; other requests do not wait for it, and what it raises is
its caller's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria

from hf_paged.engine.request import Call, FinishReason
from hf_paged.generation.caller_lists import ends_nothing, processing
from hf_paged.generation.outputs import Records, num_steps
from hf_paged.generation.prepared import Prepared
from hf_paged.generation.requests import has_eos, pad_token_id

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine


def run_in_lockstep(engine: PagedEngine, prepared: Prepared, call: Call) -> Records:
    """Runs a lockstep call: upstream's loop, in this thread, with the engine in place of the forward.

    Processors, criteria and the streamer of the user are called as upstream calls them: once a step each, with all
    rows in their order, finished ones included.

    Raises:
        Exception: what the user's code raised, or what went wrong in the engine.
    """
    config = prepared.config
    ids: Any = prepared.input_ids  # [rows, length]
    pad = pad_token_id(prepared)
    recorded = config.return_dict_in_generate
    scores: tuple[Tensor, ...] | None = () if recorded and config.output_scores else None
    logits: tuple[Tensor, ...] | None = () if recorded and config.output_logits else None
    unfinished = torch.ones(len(ids), dtype=torch.long, device=ids.device)
    all_go_on = True
    process = processing(prepared.processors)
    with engine.attend([call]) as until:
        for step in range(prepared.max_new_tokens):
            until(lambda: call.lockstep.is_complete or call.done.is_set())
            _raise_error(call)
            row_logits = call.lockstep.take().to(ids.device)  # [rows, vocab]
            row_scores = process(ids, row_logits)
            if scores is not None:
                scores += (row_scores,)
            if logits is not None:
                logits += (row_logits,)
            tokens = _choose(call, row_scores, step)
            if not all_go_on and has_eos(prepared):
                tokens = tokens * unfinished + (pad or 0) * (1 - unfinished)
            ids = torch.cat([ids, tokens[:, None]], dim=-1)
            numbers, ended = tokens.tolist(), False
            reasons: list[FinishReason | None] = [None] * len(numbers)
            if not ends_nothing(prepared.criteria, numbers, ids.shape[1]):
                unfinished = unfinished & ~prepared.criteria(ids, scores)
                ended = bool(unfinished.max() == 0)
                reasons = _finish_reasons(prepared, tokens, unfinished, step, ended)
                all_go_on = False
            engine.answer(call, numbers, reasons)
            if prepared.streamer is not None:
                prepared.streamer.put(tokens.cpu())
            if ended:
                break
        until(call.done.is_set)
        _raise_error(call)
    return Records(scores, logits)


def run_streamed(engine: PagedEngine, prepared: Prepared, call: Call) -> None:
    """Runs a call and puts the tokens of each step, [rows] int64 on the CPU, once all rows have theirs.

    Raises:
        Exception: what the streamer raised, or what went wrong in the engine.
    """
    steps = _Steps(call, pad_token_id(prepared))
    call.on_token = lambda sequence, token: call.look()
    with engine.attend([call]) as until:
        while True:
            until(lambda: call.done.is_set() or steps.num_complete > steps.num_given)
            ended = call.done.is_set()
            whole = ended and call.error is None
            for _ in range(steps.num_given, num_steps(call) if whole else steps.num_complete):
                prepared.streamer.put(steps.give())
            _raise_error(call)
            if ended:
                return


#: Rows that were to go on when their call ended.
_CUT_OFF = (FinishReason.ERROR, FinishReason.CANCELLED)


@contextmanager
def ended_on_error(streamer: Any) -> Iterator[None]:
    """Ends `streamer` (None: there is none) when what runs inside raises: whoever reads from it would wait for ever."""
    try:
        yield
    except BaseException as error:
        if streamer is not None and not _raised_by_end(error, streamer):
            with suppress(Exception):  # the first error is the one to tell
                streamer.end()
        raise


class _Steps:
    """The tokens of a running call, step by step as upstream's loop would make them."""

    def __init__(self, call: Call, pad_token_id: int | None) -> None:
        self._sequences = call.sequences
        self._pad = pad_token_id
        self.num_given = 0

    @property
    def num_complete(self) -> int:
        """Steps in which every row has its token. Rows that have ended get pads, if there are any to give."""
        going = [
            s
            for s in self._sequences
            if s.num_kept is None or self._pad is None or s.finish_reason in _CUT_OFF
        ]
        if going:
            return min(s.num_generated for s in going)
        return max(s.num_kept or 0 for s in self._sequences)

    def give(self) -> Tensor:
        """The tokens of the next step, [rows] int64."""
        step, row_tokens = self.num_given, []
        self.num_given += 1
        for sequence in self._sequences:
            ended = sequence.num_kept is not None and step >= sequence.num_kept and self._pad is not None
            row_tokens.append(self._pad if ended else sequence.token_ids[sequence.prompt_len + step])
        return torch.tensor(row_tokens)


def _choose(call: Call, scores: Tensor, step: int) -> Tensor:  # [rows] int64
    """The next tokens by `scores` [rows, vocab]."""
    if not call.sampling.do_sample:
        return torch.argmax(scores, dim=-1)
    probs = torch.softmax(scores, dim=-1)
    if probs.device.type != "cpu" and bool(torch.isnan(probs).any()):
        probs = probs.cpu()  # there multinomial raises an error; elsewhere it may end the process
    return torch.multinomial(probs, num_samples=1).squeeze(1)


def _finish_reasons(
    prepared: Prepared, tokens: Tensor, unfinished: Tensor, step: int, ended: bool
) -> list[FinishReason | None]:
    """Why each row ends with its token; None for those that go on."""
    if ended:
        finished = [True] * len(tokens)
    elif unfinished.shape == tokens.shape:
        finished = (unfinished == 0).tolist()
    else:  # a criterion answered in another shape: upstream goes on until all it says is true
        finished = [False] * len(tokens)
    eos = {
        t for c in prepared.criteria if type(c) is EosTokenCriteria for t in c.eos_token_id.flatten().tolist()
    }
    at_limit = step + 1 >= prepared.max_new_tokens
    return [
        None if not end else FinishReason.LENGTH if at_limit and token not in eos else FinishReason.STOP
        for token, end in zip(tokens.tolist(), finished, strict=True)
    ]


def _raise_error(call: Call) -> None:
    if call.error is not None:
        raise call.error


def _raised_by_end(error: BaseException, streamer: Any) -> bool:
    frame = error.__traceback__
    while frame is not None:
        code = frame.tb_frame
        if code.f_code.co_name == "end" and code.f_locals.get("self") is streamer:
            return True
        frame = frame.tb_next
    return False

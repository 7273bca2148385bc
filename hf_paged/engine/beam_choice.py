"""One choice of beams: upstream's own scoring on the rows of a step.

The decisions of transformers' `_beam_search` are made by methods of `GenerationMixin`, which are called here as they
are, on tensors as upstream has them: [prompts, beams, ...]. Only generated tokens are kept (`running` [n, beams, t]),
so that prompts of several lengths can go through together.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.generation.stopping_criteria import StoppingCriteriaList

from hf_paged.engine import processors as rules
from hf_paged.engine.beam_state import BeamOptions, BeamState, most_tokens
from hf_paged.engine.draws import multinomial_error
from hf_paged.engine.processor_rules import Line
from hf_paged.engine.request import SequenceGroup

#: Scores below it mark places that no finished beam has taken (upstream starts with -1e9).
_UNTAKEN = -1e8
_RUNNING = ("running", "running_scores", "running_beams")

#: Upstream's methods need no model.
_upstream: Any = object.__new__(GenerationMixin)


class EntangledBeams(Exception):
    """A prompt came to its end in a way in which upstream's result depends on the other prompts of the batch."""


@dataclass(frozen=True)
class Choice:
    """What the beams of a group become: number i goes on from number `sources[i]` with `tokens[i]`."""

    sources: list[int]
    tokens: list[int]
    ended: bool


class Choosing:
    """One step of n prompts: upstream's loop from its logits to its stopping condition.

    Nothing of the groups changes before all of it went well.
    """

    def __init__(self, logits: Tensor, groups: list[SequenceGroup]) -> None:
        self._groups = groups
        self._spec = groups[0].call.sampling
        self._options: BeamOptions = self._spec.beams
        self._t = groups[0].num_steps
        self._logits = logits.float()
        self._num_prompts = [len(g.prompts) for g in groups]
        self._states: list[BeamState] = [
            g.state or BeamState.start(len(g.prompts), g.num_beams, logits.device) for g in groups
        ]
        self._n = sum(self._num_prompts)

    def choices(self) -> dict[SequenceGroup, Choice | BaseException]:
        options, t, n = self._options, self._t, self._n
        log_probs = nn.functional.log_softmax(self._logits, dim=-1)
        logits = self._logits
        if not t:  # the beams of a prompt are still one row
            log_probs = log_probs.repeat_interleave(options.num_beams, dim=0)
            logits = logits.repeat_interleave(options.num_beams, dim=0)
        log_probs = self._processed(log_probs)
        old = self._stacked()
        vocab = log_probs.shape[1]
        accumulated = log_probs.view(n, options.num_beams, vocab) + old["running_scores"][:, :, None]
        scores, tokens, beams = self._candidates(accumulated.view(n, -1), old, vocab)
        if self._is_plain(scores, tokens):
            chosen = (tokens, scores, beams)
            best: dict[str, Any] = dict(
                zip(_RUNNING, [part[:, : options.num_beams] for part in chosen], strict=True)
            )
            best |= self._untaken(scores, tokens, beams)
            return self._taken(best, None, log_probs, logits)
        old |= self._stacked_finished()
        hits = self._hits(tokens)
        new = dict(zip(
            _RUNNING,
            _upstream._get_running_beams_for_next_iteration(
                topk_log_probs=scores,
                topk_running_sequences=tokens,
                topk_running_beam_indices=beams,
                next_token_hits_stopping_criteria=hits,
                num_beams=options.num_beams,
            ),
            strict=True,
        ))  # fmt: skip
        new |= self._finished(old, scores, tokens, beams, hits)
        new["may_improve"] = _upstream._check_early_stop_heuristic(
            is_early_stop_heuristic_unsatisfied=old["may_improve"],
            running_beam_scores=new["running_scores"],
            beam_scores=new["finished_scores"],
            is_sent_finished=new["is_finished"],
            cur_len=t + 1,
            max_length=options.max_steps,
            decoder_prompt_len=0,
            early_stopping=options.early_stopping,
            length_penalty=options.length_penalty,
        )
        return self._taken(new, hits, log_probs, logits)

    # --- scores -----------------------------------------------------------------------------------------------------

    def _processed(self, log_probs: Tensor) -> Tensor:
        if not self._spec.processors:
            return log_probs
        lines = []
        for group, state in zip(self._groups, self._states, strict=True):
            spec = group.call.sampling
            generated = state.running.flatten(0, 1).cpu().numpy()
            # Also the first time row by row: some processors tell the rows of a prompt apart.
            for sequence, ids in zip(group.sequences, generated, strict=True):
                lines.append(_line(spec, sequence.row, ids))
        return rules.run(lines, log_probs)

    def _stacked(self) -> dict[str, Tensor]:
        """What runs, with a column for the token of this step."""
        running = self._in_a_row("running", self._options.fill_token)
        beams = self._in_a_row("running_beams", -1)
        return {
            "running": running,
            "running_scores": self._in_a_row("running_scores"),
            "running_beams": beams,
        }

    def _stacked_finished(self) -> dict[str, Tensor]:
        """What has finished, filled up to the column of this step."""
        for state in self._states:
            state.settle(self._options.fill_token)
        fills = {"finished": self._options.fill_token, "finished_beams": -1}
        names = ("finished", "finished_scores", "finished_beams", "is_finished", "may_improve")
        return {name: self._in_a_row(name, fills.get(name)) for name in names}

    def _in_a_row(self, name: str, fill: int | None = None) -> Tensor:
        """One tensor of all states, those with a `fill` as wide as the history with this step."""
        parts = [getattr(state, name) for state in self._states]
        if fill is not None:
            width = self._t + 1
            parts = [nn.functional.pad(part, (0, width - part.shape[-1]), value=fill) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _candidates(
        self, accumulated: Tensor, old: dict[str, Tensor], vocab: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best continuations of each prompt: scores [n, K], tokens and beams [n, K, t + 1]."""
        options = self._options
        ranked = accumulated
        if options.do_sample:
            # Without replacement, `torch.multinomial` takes the highest of probability / exponential variate.
            ranked = self._raced(nn.functional.softmax(accumulated, dim=-1))
        scores, tokens, beams = _upstream._get_top_k_continuations(
            accumulated_log_probs=ranked,
            running_sequences=old["running"],
            running_beam_indices=old["running_beams"],
            cur_len=self._t,
            decoder_prompt_len=0,
            do_sample=False,
            beams_to_keep=options.num_candidates,
            num_beams=options.num_beams,
            vocab_size=vocab,
            batch_size=self._n,
        )
        # Upstream counts beams through the batch; here the batch is whatever happens to be stacked.
        if self._n > 1:
            firsts = torch.arange(self._n, device=beams.device, dtype=beams.dtype)
            beams[:, :, -1] -= firsts[:, None] * options.num_beams
        if options.do_sample:
            scores = accumulated.gather(1, beams[:, :, -1].long() * vocab + tokens[:, :, -1])
        return scores, tokens, beams

    def _raced(self, probs: Tensor) -> Tensor:
        """`probs` [n, beams * vocab], each divided by its random number."""
        # A row with a nan, with +inf or with nothing but -inf among its scores is nan throughout; no other is.
        for i, bad in enumerate(torch.isnan(probs[:, 0]).tolist()):
            if bad:
                raise multinomial_error(probs[i])
        start = 0
        for group in self._groups:
            draws = group.call.sampling.draws
            own = slice(start, start + len(group.prompts))
            probs[own] /= draws.exponential(group.prompts, self._t, probs.shape[1], probs.dtype, probs.device)
            start = own.stop
        return probs

    # --- ends -------------------------------------------------------------------------------------------------------

    def _is_plain(self, scores: Tensor, tokens: Tensor) -> bool:
        """Whether the best candidates of [n, K] go on and none has finished so far: they are the beams, as upstream's
        methods would find. Where scores are equal the choice is up to its `topk`.
        """
        if self._options.do_sample or not self._spec.stop_rules.simple:  # drawn ones are not in order
            return False
        if not all(state.nothing_finished for state in self._states):
            return False
        if any(self._t + 1 >= most_tokens(group.sequences[0]) for group in self._groups):
            return False
        eos, count = self._spec.eos_token_ids, self._options.num_beams
        # Below it upstream takes beams that go on for worse than none.
        least = _UNTAKEN * (self._t + 1) ** min(0.0, self._options.length_penalty)
        if eos and any(not eos.isdisjoint(row) for row in tokens[:, :count, -1].tolist()):
            return False
        return all(
            row[0] > least and row[count - 1] > _UNTAKEN and all(a > b for a, b in pairwise(row[: count + 1]))
            for row in scores.tolist()
        )

    def _untaken(self, scores: Tensor, tokens: Tensor, beams: Tensor) -> dict[str, Any]:
        """What upstream puts where no beam has finished: beams that go on, whose scores are rounded off to equal ones.

        It is returned where beams come to no end, as those do that are left without a token to go on with.
        """
        count = self._options.num_beams
        lowered = scores / ((self._t + 1) ** self._options.length_penalty) - 1e9
        merged = torch.cat((self._in_a_row("finished_scores"), lowered), dim=1)
        best, picks = torch.topk(merged, k=count)
        before = [row for state in self._states for row in state.places()]
        places = [
            [row[pick] if pick < count else (tokens, beams, i, pick - count) for pick in picked]
            for i, (row, picked) in enumerate(zip(before, picks.tolist(), strict=True))
        ]
        return {"finished_scores": best, "untaken": places}

    def _hits(self, tokens: Tensor) -> Tensor:
        """Which candidates [n, K, t + 1] end with their last token, [n, K] bool."""
        if not self._spec.stop_rules.simple:
            own = [prompt for group in self._groups for prompt in group.prompts]
            prompts = self._spec.prompt_ids[:: self._options.num_beams][own].to(tokens.device)
            ids = torch.cat([prompts[:, None].expand(-1, tokens.shape[1], -1), tokens], dim=-1).flatten(0, 1)
            return StoppingCriteriaList(self._spec.criteria)(ids, None).view(tokens.shape[:2])
        eos = sorted(self._spec.eos_token_ids)
        last = tokens[:, :, -1]
        hits = (
            torch.isin(last, torch.tensor(eos, device=last.device)) if eos else torch.zeros_like(last).bool()
        )
        full = []
        for group, count in zip(self._groups, self._num_prompts, strict=True):
            full += [[self._t + 1 >= most_tokens(group.sequences[0])]] * count
        return hits | torch.tensor(full, device=hits.device)

    def _finished(
        self, old: dict[str, Tensor], scores: Tensor, tokens: Tensor, beams: Tensor, hits: Tensor
    ) -> dict[str, Tensor]:
        options = self._options
        best = torch.zeros(options.num_candidates, dtype=torch.bool, device=scores.device)
        best[: options.num_beams] = True
        updated = _upstream._update_finished_beams(
            sequences=old["finished"],
            topk_running_sequences=tokens,
            beam_scores=old["finished_scores"],
            topk_log_probs=scores,
            beam_indices=old["finished_beams"],
            topk_running_beam_indices=beams,
            is_early_stop_heuristic_unsatisfied=old["may_improve"],
            is_sent_finished=old["is_finished"],
            next_token_hits_stopping_criteria=hits,
            top_num_beam_mask=best,
            num_beams=options.num_beams,
            cur_len=self._t,
            decoder_prompt_len=0,
            length_penalty=options.length_penalty,
            early_stopping=options.early_stopping,
        )
        return dict(
            zip(("finished", "finished_scores", "finished_beams", "is_finished"), updated, strict=True)
        )

    def _taken(
        self, new: dict[str, Any], hits: Tensor | None, log_probs: Tensor, logits: Tensor
    ) -> dict[SequenceGroup, Choice | BaseException]:
        """Writes the step into the states; `hits` None: nothing ends or has finished."""
        beams, last = new["running_beams"][:, :, -1].tolist(), new["running"][:, :, -1].tolist()
        choices: dict[SequenceGroup, Choice | BaseException] = {}
        start = 0
        for group, state, count in zip(self._groups, self._states, self._num_prompts, strict=True):
            own = slice(start, start + count)
            for name, values in new.items():
                setattr(state, name, values[own])
            group.state = state
            rows = slice(start * group.num_beams, (start + count) * group.num_beams)
            spec = group.call.sampling
            if spec.output_scores:
                state.scores.append(log_probs[rows].clone())
            if spec.output_logits:
                state.logits.append(logits[rows].clone())
            ended = hits is not None and self._has_ended(state, hits[own])
            sources = [i * group.num_beams + beam for i in range(count) for beam in beams[start + i]]
            tokens = [token for i in range(count) for token in last[start + i]]
            choices[group] = Choice(sources, tokens, ended)
            if ended and self._is_entangled(group, state):
                choices[group] = EntangledBeams()
            start += count
        return choices

    def _has_ended(self, state: BeamState, hits: Tensor) -> bool:
        state.nothing_finished = not bool(state.is_finished.any()) and bool(state.may_improve.all())
        goes_on = _upstream._beam_search_has_unfinished_sequences(
            state.may_improve, state.is_finished, hits, self._options.early_stopping
        )
        return not bool(goes_on)

    def _is_entangled(self, group: SequenceGroup, state: BeamState) -> bool:
        """Whether upstream's result could still change while other prompts of the batch go on."""
        if len(group.sequences) == len(group.call.sequences) or self._t + 1 >= group.sequences[0].ends_at:
            return False
        settled = bool(state.is_finished.all()) and float(state.finished_scores.min()) > _UNTAKEN
        return not (settled and (self._options.early_stopping is True or not bool(state.may_improve.any())))


def _line(spec: Any, row: int, generated: np.ndarray) -> Line:
    prompt = spec.prompt_ids[row].numpy()
    return Line(
        processors=spec.processors,
        row=row,
        num_rows=spec.num_rows,
        length=spec.prompt_width + len(generated),
        history=lambda: np.concatenate([prompt, generated]),
    )

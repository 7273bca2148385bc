"""Runs the arms of a comparison: calibrate, warm up, then rounds in which every arm runs once.

Each round starts with another arm, so that a machine that slows down or speeds up does so to all. An arm that
fails is reported as failed and the others go on. After every run the report is handed out, so that nothing is
lost if the process ends early.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_paged.comparison.arm_budget import TokenBudgetArm
from hf_paged.comparison.arm_continuous import ContinuousBatchingArm
from hf_paged.comparison.arm_generate import LoopArm, PaddedArm, PagedLoopArm
from hf_paged.comparison.arms import Arm, ArmContext
from hf_paged.comparison.equality import compare_outputs
from hf_paged.comparison.measure import PeakMemory
from hf_paged.comparison.options import Options
from hf_paged.comparison.rates import ServedRates
from hf_paged.comparison.report import ArmReport, CompareReport, RunRow

#: Called with (what is running, requests done, requests in all).
OnProgress = Callable[[str, int, int], None]

_logger = logging.getLogger(__name__)


@dataclass
class Runner:
    """One comparison under way."""

    context: ArmContext
    options: Options
    report: CompareReport
    paged_config: Any = None
    on_progress: OnProgress | None = None
    on_update: Callable[[CompareReport], None] | None = None
    outputs: dict[str, dict[int, list[int]]] = field(default_factory=dict)

    def run(self) -> None:
        """Fills the report."""
        arms: dict[str, Arm] = {}
        entries = {name: ArmReport(name, name) for name in self.options.arms}
        for name, entry in entries.items():
            self.report.arms.append(entry)
            with self._failing_alone(entry):
                arms[name] = self._prepare(entry)
            self._updated()
        for repeat in range(self.options.repeats):
            names = list(arms)
            shift = repeat % max(len(names), 1)
            for name in names[shift:] + names[:shift]:
                entry = entries[name]
                if entry.error is None:
                    with self._failing_alone(entry):
                        self._run_once(entry, arms[name], repeat)
                    self._updated()
        self._compare_outputs()
        ServedRates(self.context, self.options, self.report, self._progress, self._updated).run(arms)
        self.report.complete = all(a.error is None for a in self.report.arms)
        self._updated()

    def _prepare(self, entry: ArmReport) -> Arm:
        """The arm with its best settings, warmed up."""
        candidates = self._candidates(entry.name)
        entry.title = candidates[0].title
        if len(candidates) > 1:
            rates = [self._calibrate(entry, make) for make in candidates]
            best = max(range(len(rates)), key=rates.__getitem__)
        else:
            best = 0
        arm = candidates[best].final()
        entry.settings = arm.settings
        arm.warm_up()
        return arm

    def _calibrate(self, entry: ArmReport, candidate: Candidate) -> float:
        arm = candidate.trial()
        arm.warm_up()
        run = arm.run(self._progress(f"{entry.name} calibration", arm))
        entry.calibration.append(
            {
                "settings": arm.settings,
                "tokens_per_second": run.tokens_per_second,
                "relative_error": run.relative_error,
            }
        )
        self._updated()
        return run.tokens_per_second

    def _candidates(self, name: str) -> list[Candidate]:
        context, options = self.context, self.options
        if name == "loop":
            return [Candidate(LoopArm, context, subset=options.loop_subset)]
        if name == "hf_paged_loop":
            return [Candidate(PagedLoopArm, context, subset=options.loop_subset)]
        if name == "padded":
            sizes = _distinct(min(s, len(context.requests)) for s in options.padded_sizes)
            return [
                Candidate(
                    PaddedArm,
                    context,
                    subset=options.padded_subset,
                    trial_subset=options.calibration_subset,
                    batch_size=size,
                    order=order,
                )
                for size in sizes
                for order in options.padded_orders
            ]
        if name == "padded_budget":
            sizes = _distinct(min(s, len(context.requests)) for s in options.padded_sizes)
            return [
                Candidate(
                    TokenBudgetArm,
                    context,
                    subset=options.padded_subset,
                    trial_subset=options.calibration_subset,
                    batch_size=size,
                )
                for size in sizes
            ]
        if name == "generate_batch":
            rows = _distinct(min(r, len(context.requests)) for r in options.pool_rows)
            # A small sample would not fill a large pool, so trials take enough requests to fill the largest.
            trial = None if options.calibration_subset is None else max(options.calibration_subset, *rows)
            return [Candidate(ContinuousBatchingArm, context, trial_subset=trial, pool_rows=r) for r in rows]
        # Imported here: the arms of transformers alone must work where hf_paged cannot.
        from hf_paged.comparison.arm_paged import PagedArm

        return [Candidate(PagedArm, context, config=self.paged_config)]

    def _run_once(self, entry: ArmReport, arm: Arm, repeat: int) -> None:
        label = f"{entry.name} {repeat + 1}/{self.options.repeats}"
        with PeakMemory(self.context.model.device) as memory:
            run = arm.run(self._progress(label, arm))
        entry.runs.append(RunRow.of(repeat, run, memory.peak_bytes, memory.method, self.options.limits))
        if entry.timeline is None and run.timeline is not None:
            entry.timeline = run.timeline.to_dict()
        first = self.outputs.setdefault(entry.name, run.outputs)
        entry.repeats_equal &= first == run.outputs

    def _compare_outputs(self) -> None:
        """Each arm against the first one; hf_paged also against whichever other arm ran most requests."""
        names = list(self.outputs)
        for name in names[1:]:
            references = names[:1]
            widest = max(names[:-1], key=lambda n: len(self.outputs[n]))
            if (
                name == "hf_paged"
                and len(self.outputs[widest]) > len(self.outputs[names[0]])
                and widest != name
            ):
                references.append(widest)
            for reference in references:
                self.report.equality.append(
                    compare_outputs(
                        self.context, name, self.outputs[name], reference, self.outputs[reference]
                    )
                )

    @contextlib.contextmanager
    def _failing_alone(self, entry: ArmReport) -> Iterator[None]:
        """An arm may fail in any way; it is reported, and the others are still worth having."""
        try:
            yield
        except Exception as error:
            entry.error = f"{type(error).__name__}: {error}"
            _logger.debug("the arm %s failed", entry.name, exc_info=True)

    def _progress(self, label: str, arm: Arm) -> Callable[[int], None]:
        done, total = 0, arm.num_requests

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if self.on_progress is not None:
                self.on_progress(label, done, total)

        advance(0)
        return advance

    def _updated(self) -> None:
        if self.on_update is not None:
            self.on_update(self.report)


class Candidate:
    """An arm still to be made: small for a trial, or as it will be measured."""

    def __init__(
        self,
        kind: type[Arm],
        context: ArmContext,
        *,
        subset: int | None = None,
        trial_subset: int | None = None,
        **arguments: Any,
    ) -> None:
        self.title = kind.title
        self._kind, self._context, self._arguments = kind, context, arguments
        self._subset, self._trial_subset = subset, trial_subset

    def trial(self) -> Arm:
        return self._make(self._trial_subset)

    def final(self) -> Arm:
        return self._make(self._subset)

    def _make(self, subset: int | None) -> Arm:
        extra = {} if subset is None else {"subset": subset}
        return self._kind(self._context, **self._arguments, **extra)


def _distinct(values: Any) -> Sequence[int]:
    return sorted(set(values))

"""Fixtures of several files here."""

from __future__ import annotations

import pytest

from hf_paged.engine.draft_policy import DraftPolicy


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that can be drafted is drafted: what is worth it depends on times, which no test should."""
    monkeypatch.setattr(
        DraftPolicy, "share", lambda self, num_tokens, acceptances, offers, **rest: list(offers)
    )

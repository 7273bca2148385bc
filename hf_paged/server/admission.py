"""Who is let in: bounds on what runs and waits at once, so that overload is a quick 429 and not a slow failure."""

from __future__ import annotations

from hf_paged.server.config import ServerConfig
from hf_paged.server.errors import overloaded


class Ticket:
    """The room one request takes, until `release`."""

    def __init__(self, admission: Admission, sequences: int, tokens: int) -> None:
        self._admission = admission
        self._sequences = sequences
        self._tokens = tokens

    def release(self) -> None:
        """Gives the room back; again: no effect."""
        self._admission.sequences -= self._sequences
        self._admission.tokens -= self._tokens
        self._sequences = self._tokens = 0


class Admission:
    """Counts sequences and prompt tokens of the requests that are in. One event loop's own: no lock."""

    def __init__(self, config: ServerConfig) -> None:
        self._max_sequences = config.max_sequences
        self._max_tokens = config.max_prompt_tokens
        self.sequences = 0
        self.tokens = 0
        self.refused = 0

    def check(self, sequences: int = 1, tokens: int = 0) -> None:
        """Raises APIError (429) if there is no room. An empty server takes any one request."""
        full = self.sequences + sequences > self._max_sequences or self.tokens + tokens > self._max_tokens
        if full and self.sequences:
            self.refused += 1
            raise overloaded(f"{self.sequences} sequences are running or waiting already; try again later")

    def enter(self, sequences: int, tokens: int) -> Ticket:
        """Takes room.

        Args:
            sequences: of the request, all of its choices.
            tokens: of all their prompts.

        Raises:
            APIError: 429.
        """
        self.check(sequences, tokens)
        self.sequences += sequences
        self.tokens += tokens
        return Ticket(self, sequences, tokens)

"""Counters for whoever watches the server."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tidaldecode.server.answer import Answer, Delta

if TYPE_CHECKING:
    from tidaldecode.server.service import Service


class Metrics:
    """What has happened since the start."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def hear(self, answer: Answer, delta: Delta) -> None:
        """Counts what has come of an answer."""
        if delta.token_ids and not answer.first_token_at:
            answer.first_token_at = time.monotonic()

    def rejected(self, reason: str) -> None:
        """Counts a request that was not let in."""

    def client_gone(self) -> None:
        """Counts a client that left before its answer was whole."""

    def slow_clients(self, count: int) -> None:
        """Counts clients that were dropped because they did not read."""

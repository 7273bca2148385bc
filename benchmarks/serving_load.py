"""A locust file: sends the requests of a plan, each at its own time whatever became of those before it.

An open loop, as strangers on a network are: a server that falls behind gets no rest. Every request is a stream, timed
from when the plan wanted it sent, so that a late load generator counts against the server and never for it.

    SERVING_PLAN=plan.json SERVING_RECORDS=records.json locust -f benchmarks/serving_load.py --headless -u 1 --host URL

The plan: {"grace": seconds after the last arrival, "requests": [{"arrival": seconds, "body": {...}}, ...]}.
The records, one a request: {"arrival", "first", "end": seconds from the start, null where it did not come, "status",
"body": what came}.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Group
from locust import FastHttpUser, task


class Arrivals(FastHttpUser):
    """The only user: every request of the plan in a greenlet and on a connection of its own."""

    fixed_count = 1
    concurrency = 8192
    connection_timeout = network_timeout = 600.0

    @task
    def follow_the_plan(self) -> None:
        plan = json.loads(Path(os.environ["SERVING_PLAN"]).read_text())
        records: list[dict[str, Any]] = []
        sending = Group()
        began = time.perf_counter()
        for request in plan["requests"]:
            gevent.sleep(max(0.0, began + request["arrival"] - time.perf_counter()))
            record = {"arrival": request["arrival"], "first": None, "end": None, "status": None, "body": ""}
            records.append(record)
            sending.spawn(self.ask, request["body"], record, began)
        sending.join(timeout=plan["grace"])
        sending.kill(timeout=10)
        Path(os.environ["SERVING_RECORDS"]).write_text(json.dumps(records))
        self.environment.runner.quit()
        gevent.sleep(60)  # until it has

    def ask(self, body: dict[str, Any], record: dict[str, Any], began: float) -> None:
        """Sends one request and reads its stream; what came, and when, is left in `record`."""
        received = []
        try:
            response = self.client.post("/v1/completions", json=body, stream=True)
            record["status"] = response.status_code
            if response.status_code != 200:
                received.append(response.content or b"")
                return
            received.append(response.stream.read(1))
            record["first"] = time.perf_counter() - began
            self._tell("first token", record["first"] - record["arrival"])
            received.append(response.stream.read())
            record["end"] = time.perf_counter() - began
            self._tell("whole answer", record["end"] - record["arrival"])
        finally:
            record["body"] = b"".join(received).decode(errors="replace")

    def _tell(self, name: str, seconds: float) -> None:
        """Adds a time to locust's own statistics."""
        self.environment.events.request.fire(
            request_type="SSE",
            name=name,
            response_time=seconds * 1000,
            response_length=0,
            exception=None,
            context={},
        )

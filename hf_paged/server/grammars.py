"""Grammars that texts follow: asked for by requests, compiled within limits, kept, and turned into masks of logits."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from hf_paged.server.config import ServerConfig
from hf_paged.server.errors import APIError, bad_request
from hf_paged.server.grammar_request import GrammarRequest
from hf_paged.server.served_model import ServedModel

#: Seconds for the compiling process to start: it imports torch.
_START_TIMEOUT = 240.0


class Grammars:
    """Compiles and keeps grammars for one model. The compiling process starts with the first that is asked for."""

    def __init__(self, served: ServedModel, config: ServerConfig) -> None:
        self._served = served
        self._config = config
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hf_paged-grammars")
        self._process: subprocess.Popen[str] | None = None
        self._info: Any = None
        self._kept: OrderedDict[GrammarRequest, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, request: GrammarRequest) -> CompiledGrammar | None:
        """A grammar that is kept."""
        with self._lock:
            if request in self._kept:
                self._kept.move_to_end(request)
            return self._kept.get(request)

    def compile(self, request: GrammarRequest) -> CompiledGrammar:
        """The grammar of `request`; blocks, so not for event loops.

        Raises:
            APIError: 400: it is wrong, too large, or takes too long to compile.
        """
        return self._thread.submit(self._compile, request).result()

    def _compile(self, request: GrammarRequest) -> CompiledGrammar:
        kept = self.get(request)  # somebody may have asked for the same meanwhile
        if kept is not None:
            return kept
        import xgrammar

        if not self._served.eos_token_ids:
            raise bad_request(
                f"{request.param}: this model has no end-of-sequence token to end the text with",
                request.param,
            )
        if self._info is None:
            self._info = xgrammar.TokenizerInfo.from_huggingface(
                self._served.tokenizer,
                vocab_size=self._served.vocab_size,
                stop_token_ids=list(self._served.eos_token_ids),
            )
        answer = self._ask(request)
        if "error" in answer:
            raise bad_request(f"{request.param}: {answer['error']}", request.param)
        compiled = xgrammar.CompiledGrammar.deserialize_json(answer["compiled"], self._info)
        grammar = CompiledGrammar(compiled, self._config.grammar_timeout, request.param)
        with self._lock:
            self._kept[request] = grammar
            while len(self._kept) > 1 and self._held_bytes() > self._config.grammar_cache_bytes:
                self._kept.popitem(last=False)
        return grammar

    def _held_bytes(self) -> int:
        return sum(grammar.num_bytes for grammar in self._kept.values())

    # --- the compiling process ----------------------------------------------------------------------------------------

    def _ask(self, request: GrammarRequest) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self._start()
        answer = self._exchange({"kind": request.kind, "text": request.text}, self._config.grammar_timeout)
        if answer is None:
            seconds = self._config.grammar_timeout
            raise bad_request(
                f"{request.param}: it does not compile within {seconds:g} s and the memory for it",
                request.param,
            )
        return answer

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hf_paged.server.grammar_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._exchange({"tokenizer": self._info.serialize_json()}, _START_TIMEOUT) is None:
            raise APIError(503, "grammars cannot be compiled now; try again later")

    def _exchange(self, message: dict[str, Any], timeout: float) -> dict[str, Any] | None:
        """The process's answer; None if it gave none in time, and then it is no more."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        if line.endswith("\n"):
            return json.loads(line)
        self._stop()
        return None

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def close(self) -> None:
        """Ends the process and its thread."""
        process = self._process
        if process is not None:
            process.kill()  # the thread may be waiting for it
        self._thread.submit(self._stop).result()
        self._thread.shutdown()


class CompiledGrammar:
    """A grammar for any number of texts.

    Args:
        compiled: xgrammar's.
        seconds: that masks of one text may take in all; they hold up every other request.
        param: the field it came in.
    """

    def __init__(self, compiled: Any, seconds: float, param: str) -> None:
        self._compiled = compiled
        self._seconds = seconds
        self._param = param
        self.num_bytes: int = compiled.memory_size_bytes

    def follow(self) -> GrammarMask:
        """A mask for one text."""
        return GrammarMask(self._compiled, self._seconds, self._param)


class GrammarMask:
    """Follows one text through a grammar."""

    def __init__(self, compiled: Any, seconds: float, param: str) -> None:
        import xgrammar

        self._apply = xgrammar.apply_token_bitmask_inplace
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._bitmask: Tensor = xgrammar.allocate_token_bitmask(1, compiled.tokenizer_info.vocab_size)
        self._num_followed = 0
        self._left = seconds
        self._param = param

    def apply(self, generated: list[int], logits: Tensor) -> None:
        """Sets the logits [vocab] of tokens that may not come next to -inf, in place."""
        began = time.perf_counter()
        for token in generated[self._num_followed :]:
            if not self._matcher.accept_token(token):
                raise APIError(500, "a token came that the grammar does not allow", code="internal_error")
        self._num_followed = len(generated)
        if self._matcher.fill_next_token_bitmask(self._bitmask):
            self._apply(logits[None], self._bitmask.to(logits.device))
        if not bool((logits > -torch.inf).any()):
            raise bad_request(f"{self._param}: no token that is allowed goes on with the text", self._param)
        self._left -= time.perf_counter() - began
        if self._left < 0:
            raise bad_request(f"{self._param}: the grammar takes too long to follow", self._param)

"""The one thread that owns the decoding engine, and the answers that it hands out.

Any thread may submit and cancel. What becomes of a request is told to it as `Delta`s, from the worker's thread and in
order: an empty one when the engine has taken the request, then its text as it becomes certain, and one with a finish
or an error as the last.
"""

import dataclasses
import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import logging

from moe_vlm_jax.decoding import engine as engine_lib
from moe_vlm_jax.decoding import text as text_lib


class UnavailableError(Exception):
    """The worker ended, or ends, before the answer is whole."""


class Delta(NamedTuple):
    """News of a request.

    Attributes:
      text: what is to be added to the answer.
      num_tokens: of the answer so far.
      kept_tokens: of the prompt, whose keys and values an earlier request about the same image left.
      finish: 'stop' (an end token or a stop string) or 'length'; None: more comes.
      error: why there is no more: ValueError (the request was refused) or UnavailableError.
    """

    text: str = ""
    num_tokens: int = 0
    finish: str | None = None
    error: Exception | None = None
    kept_tokens: int = 0


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request on its way; only the worker's thread looks inside.

    Attributes:
      request: what is asked.
      deliver: called with each Delta; must not block.
      text: the answer so far.
      id: the engine's number, once it has one.
      num_tokens, kept_tokens: as Delta's.
      cancelled: nobody waits for it any more.
    """

    request: engine_lib.Request
    deliver: Callable[[Delta], Any]
    text: text_lib.AnswerStream
    id: int | None = None
    num_tokens: int = 0
    kept_tokens: int = 0
    cancelled: bool = False


class Worker:
    """Runs an engine in a thread of its own."""

    def __init__(self, make_engine: Callable[[], Any], tokenizer: Any):
        """Starts the thread.

        Args:
          make_engine: returns the engine; called once, in the worker's thread.
          tokenizer: turns ids into text.
        """
        self._make_engine, self._tokenizer = make_engine, tokenizer
        # (ticket, True) submits, (ticket, False) cancels, None ends.
        self._commands: queue.SimpleQueue[tuple[Ticket, bool] | None] = queue.SimpleQueue()
        self._running: dict[int, Ticket] = {}
        self._ended = threading.Event()
        self.failure: Exception | None = None  # why the worker ended by itself
        self._thread = threading.Thread(target=self._live, name="decoding", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether nothing is decoded any more."""
        return self._ended.is_set()

    def submit(self, request: engine_lib.Request, deliver: Callable[[Delta], Any]) -> Ticket:
        """Hands a request to the engine; returns at once.

        Args:
          request: what is asked; generation.stop is heeded here, the engine does not know of text.
          deliver: called from the worker's thread with each Delta; must not block.
        """
        ticket = Ticket(request, deliver, text_lib.AnswerStream(self._tokenizer, request.generation.stop))
        self._commands.put((ticket, True))
        if self._ended.is_set():  # perhaps after the thread took its last command
            self._refuse_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Gives a request up; nothing more is delivered for it, but for what is on its way. Any number of times."""
        ticket.cancelled = True
        self._commands.put((ticket, False))

    def stop(self) -> None:
        """Ends the thread; what still runs gets an UnavailableError."""
        self._commands.put(None)
        self._thread.join()

    def _live(self) -> None:
        try:
            engine = self._make_engine()
            while self._take_commands(engine):
                for progress in engine.run():
                    self._progress(engine, progress)
        except Exception as error:  # whatever it is, those who wait must hear of it
            logging.exception("decoding failed")
            self.failure = error
        finally:
            self._ended.set()
            for ticket in self._running.values():
                self._fail(ticket)
            self._refuse_all()

    def _take_commands(self, engine: Any) -> bool:
        """Carries out what was asked for; waits for something when the engine is idle. False: end."""
        while True:
            try:
                command = self._commands.get(block=not self._running)
            except queue.Empty:
                return True
            if command is None:
                return False
            ticket, submits = command
            if submits:
                self._submit(engine, ticket)
            elif ticket.id is not None and self._running.pop(ticket.id, None):
                engine.cancel(ticket.id)

    def _submit(self, engine: Any, ticket: Ticket) -> None:
        if ticket.cancelled:
            return
        try:
            number = ticket.id = engine.submit(ticket.request)
        except ValueError as error:
            ticket.deliver(Delta(error=error))
            return
        self._running[number] = ticket
        ticket.deliver(Delta())

    def _progress(self, engine: Any, progress: engine_lib.Progress) -> None:
        ticket, finish = self._running.get(progress.request_id), progress.finish
        if ticket is None:  # a stop string came in an earlier piece of the same call
            return
        ticket.num_tokens += len(progress.tokens)
        ticket.kept_tokens += progress.kept_tokens
        text = ticket.text.push(progress.tokens)
        if finish:
            text += ticket.text.flush()
        if ticket.text.finished:
            if not finish:
                engine.cancel(progress.request_id)
            finish = "stop"
        if finish:
            del self._running[progress.request_id]
        if text or finish:
            ticket.deliver(Delta(text, ticket.num_tokens, finish, kept_tokens=ticket.kept_tokens))

    def _fail(self, ticket: Ticket) -> None:
        why = "decoding failed" if self.failure else "the server stops"
        ticket.deliver(Delta(num_tokens=ticket.num_tokens, error=UnavailableError(why)))

    def _refuse_all(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if command and command[1]:
                self._fail(command[0])

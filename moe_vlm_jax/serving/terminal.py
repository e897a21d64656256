"""A conversation in the terminal, or of lines from anywhere.

    /image PATH   shows an image with the next message; several times for several images
    /reset        forgets the conversation
    /help         says this
    /quit         ends, as the end of the input does

Every other line is a message. Answers go to `out` as they come, all else to `notes`.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.decoding import engine as engine_lib
from moe_vlm_jax.serving import engines
from moe_vlm_jax.serving import prompts as prompts_lib

HELP = "/image PATH shows an image with the next message, /reset forgets the conversation, /quit ends"


class Chat:
    """One conversation.

    Attributes:
      turns, images: what was said and shown; a turn whose answer failed is not among them.
    """

    def __init__(
        self,
        engine: Callable[[], Any],
        prompts: prompts_lib.Prompts,
        generation: config_lib.GenerationConfig,
        *,
        cache_length: int,
        out: TextIO,
        notes: TextIO,
    ):
        """Begins an empty conversation.

        Args:
          engine: returns the engine; called for each message, so it may read the weights at the first.
          prompts: makes prompts.
          generation: how to choose tokens; max_new_tokens is cut to what fits.
          cache_length: positions of the whole conversation.
          out: where answers go.
          notes: where all else goes.
        """
        self._engine, self._prompts, self._generation = engine, prompts, generation
        self._cache_length, self._out, self._notes = cache_length, out, notes
        self.turns: list[prompts_lib.Turn] = []
        self.images: list[str] = []
        self._shown: list[str] = []  # with the next message

    def run(self, lines: Iterable[str]) -> int:
        """Answers line after line; returns how many could not be answered or understood."""
        failed = 0
        for line in lines:
            line = line.rstrip("\r\n")
            if line.strip() in ("/quit", "/exit"):
                break
            try:
                self.answer(line)
            except ValueError as error:
                failed += 1
                self._note(f"error: {error}")
        return failed

    def answer(self, line: str) -> None:
        """Carries out one line.

        Raises:
          ValueError: it cannot be carried out; the conversation is as before.
        """
        command, _, argument = line.strip().partition(" ")
        if not command:
            return
        if command == "/image":
            self._show(argument.strip())
        elif command == "/reset":
            self.turns, self.images, self._shown = [], [], []
            self._note("(a new conversation)")
        elif command == "/help":
            self._note(HELP)
        elif command.startswith("/"):
            raise ValueError(f"{command!r} is no command; {HELP}.")
        else:
            self._say(line)

    def _show(self, path: str) -> None:
        path = os.path.expanduser(path)
        if not path:
            raise ValueError("/image needs the path of a file.")
        self._prompts.transform.check(path)
        self._shown.append(path)
        self._note(f"(image {len(self._shown)} of the next message: {path})")

    def _say(self, line: str) -> None:
        turns = [*self.turns, prompts_lib.question_turn(line, len(self._shown))]
        images = [*self.images, *self._shown]
        tokens = self._prompts.encode(turns, images)
        room = self._prompts.room(tokens, self._cache_length)
        if room < 1:
            raise ValueError(
                f"the conversation has {self._prompts.length(tokens)} tokens, of {self._cache_length} that fit; begin "
                "a new one with /reset."
            )
        prompt = self._prompts.with_pixels(tokens, images)
        most = min(self._generation.max_new_tokens, room)
        request = engine_lib.Request(
            prompt=prompt, generation=dataclasses.replace(self._generation, max_new_tokens=most)
        )
        said, finish = "", None
        pieces = engines.answer(self._engine(), self._prompts.tokenizer, request)
        try:
            for delta in pieces:
                said, finish = said + delta.text, delta.finish
                self._out.write(delta.text)
                self._out.flush()
        except KeyboardInterrupt:
            pieces.close()
            self._note("\n(stopped; this message is forgotten)")
            return
        self._out.write("\n")
        self._out.flush()
        if finish == "length":
            self._note(f"(cut off after {most} tokens)")
        if not said:  # no template writes an empty answer that training knows
            self._note("(the model said nothing; this message is forgotten)")
            return
        self.turns, self.images, self._shown = [*turns, prompts_lib.Turn("gpt", said)], images, []

    def _note(self, text: str) -> None:
        self._notes.write(text + "\n")
        self._notes.flush()

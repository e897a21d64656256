"""Conversations to prompts, for everything that asks: one question, a chat, a file of questions, the server.

A prompt is what training wrote for the same turns, up to the answer that is asked for (`data/templates.py`).
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import images as images_lib
from moe_vlm_jax.data import records, templates, tokenize
from moe_vlm_jax.decoding import batching
from moe_vlm_jax.decoding import prompts as prompts_lib

Turn = records.Turn


class Prompts:
    """Makes prompts for one model. Safe for threads."""

    def __init__(self, config: config_lib.RunConfig, tokenizer: Any, transform: images_lib.ImageTransform):
        """Keeps what prompts are made with.

        Args:
          config: model and data (template, answer_prompt) are read.
          tokenizer: see `tokenize.load_tokenizer`.
          transform: of the model's vision tower.
        """
        self.tokenizer, self.transform = tokenizer, transform
        self._data, self._model = config.data, config.model
        self._template = templates.choose(config.data.template)
        self._lock = threading.Lock()  # a fast tokenizer does not say that it may be shared

    def encode(
        self, turns: Sequence[Turn], images: Sequence[images_lib.ImageRef], *, system: str | None = None
    ) -> np.ndarray:
        """Returns int32[T] ids with a mark for each image; finds what is wrong with text and images, cheaply.

        Args:
          turns: human, gpt, human, ..., with '<image>' where images stand; the last one is the question.
          images: a path or the bytes of an encoded file for each mark.
          system: replaces the template's text of the system; None keeps it.

        Raises:
          ValueError: turns, marks, words or images that cannot be asked (`SampleError` where it is a fault of data).
        """
        for turn in turns:
            _check_text(turn)
        template = self._template if system is None else self._template.with_system(system)
        record = records.Record(id="", images=tuple(images), turns=tuple(turns))
        with self._lock:
            tokens = tokenize.encode_prompt(record, self.tokenizer, template, answer_prompt=self._data.answer_prompt)
            self._check_words(tokens, turns, system)
        for image in images:
            self.transform.check(image)
        return tokens

    def length(self, tokens: np.ndarray) -> int:
        """Returns how many positions a prompt takes, its images included."""
        return prompts_lib.expanded_length(tokens, self._model.vision.num_tokens)

    def slots(self, tokens: np.ndarray) -> int:
        """Returns how many slots of a cache a prompt takes."""
        split = not self._model.routes_by_question
        return sum(batching.slots(tokens, self._model.vision.num_tokens, split=split))

    def room(self, tokens: np.ndarray, cache_length: int) -> int:
        """Returns how many tokens an answer may have; less than 1: the prompt does not fit.

        Args:
          tokens: int32[T] prompt.
          cache_length: slots of a row of the engine's cache.
        """
        positions = self._model.decoder.max_positions - self.length(tokens)
        return min(cache_length - self.slots(tokens), positions)

    def with_pixels(self, tokens: np.ndarray, images: Sequence[images_lib.ImageRef]) -> prompts_lib.Prompt:
        """Returns the prompt with its images decoded; SampleError for one that breaks only then."""
        return prompts_lib.Prompt(tokens, tuple(self.transform(image) for image in images))

    def end_tokens(self) -> tuple[int, ...]:
        """Returns the ids that end an answer."""
        return tokenize.end_tokens(self.tokenizer, self._template)

    def _check_words(self, tokens: np.ndarray, turns: Sequence[Turn], system: str | None) -> None:
        unknown = self.tokenizer.unk_token_id
        if unknown is None or unknown not in tokens:
            return
        text = " ".join([system or "", *(turn.text.replace(templates.IMAGE_MARK, " ") for turn in turns)])
        words = [word for word in dict.fromkeys(text.split()) if unknown in self.tokenizer(word).input_ids]
        what = ", ".join(map(repr, words[:10])) or f"words of the template {self._data.template!r}"
        raise ValueError(f"the tokenizer does not know {what}; use words (or a template) that it was made for.")


def question_turn(question: str, num_images: int) -> Turn:
    """Returns a human turn whose images stand in front of its text, as in LLaVA's data."""
    return Turn("human", "<image>\n" * num_images + question)


def _check_text(turn: Turn) -> None:
    """Raises ValueError for a turn that says nothing, or nothing that can be written as UTF-8."""
    if not turn.text.replace(templates.IMAGE_MARK, "").strip():
        what = "the question" if turn.role == "human" else "an earlier answer"
        raise ValueError(f"{what} is empty; every turn needs a text.")
    try:
        turn.text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has half a surrogate pair ({error.reason}); send whole characters.") from error

"""The closed vocabulary of the `mini` set: every word it can produce is one token, numbers included."""

import functools
from typing import Any

from moe_vlm_jax.data import fast_tokenizers
from moe_vlm_jax.data.infographics import mini

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
_QUESTION_WORDS = (
    "? , what is the value of which item has largest smallest second color are two items above larger smaller or how "
    "many shown difference between and sum sort from small to large describe chart"
)


@functools.cache
def words() -> tuple[str, ...]:
    """All words in the order of their ids, special tokens first."""
    numbers = [str(number) for number in range(2 * mini.MAX_VALUE)]  # up to the sum of two different values
    listed = [PAD, END, UNKNOWN, *_QUESTION_WORDS.split(), *numbers, *mini.COLORS, *mini.LABELS]
    return tuple(dict.fromkeys(listed))


def closed_tokenizer() -> Any:
    """Returns a word-level tokenizer of these words."""
    return fast_tokenizers.word_level(list(words()), pad=PAD, end=END, unknown=UNKNOWN)

"""The closed vocabulary of the `mini` set: every word it can produce is one token, numbers included."""

import functools

import tokenizers
import transformers

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


def closed_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Returns a word-level tokenizer; decoding gives back the set's own spelling ('fog, sun')."""
    ids = {word: index for index, word in enumerate(words())}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=UNKNOWN))
    # Splits 'fog,' into 'fog' and ','; any white space, newlines included, only separates.
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    # Joins with spaces, none before punctuation; there are no continued word pieces.
    backend.decoder = tokenizers.decoders.WordPiece(prefix="##", cleanup=True)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, unk_token=UNKNOWN
    )

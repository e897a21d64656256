"""Fast tokenizers of transformers, and the package's only import of transformers.

That import takes seconds, so it happens when a tokenizer is made: a mistake on the command line is reported before.
"""

import os
import pathlib
from typing import Any

import tokenizers


def word_level(words: list[str], *, pad: str, end: str, unknown: str) -> Any:
    """Returns a tokenizer whose ids are the words' places; decoding gives back the text's own spelling ('fog, sun').

    Args:
      words: all different, special tokens included.
      pad, end, unknown: the special tokens among them.
    """
    ids = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=unknown))
    # Splits 'fog,' into 'fog' and ','; any white space, newlines included, only separates.
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    # Joins with spaces, none before punctuation; there are no continued word pieces.
    backend.decoder = tokenizers.decoders.WordPiece(prefix="##", cleanup=True)
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, eos_token=end, unk_token=unknown
    )


def from_folder(folder: pathlib.Path) -> Any:
    """Returns the tokenizer of a folder with tokenizer.json."""
    # The generic class takes tokenizer.json as it is; classes named in tokenizer_config.json may need remote code.
    return _transformers().PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _transformers() -> Any:
    # Without torch, importing transformers advises to install it; its models are not what is used here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers

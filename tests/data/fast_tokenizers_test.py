"""Tokenizers made through transformers: what the others rely on, and what importing it says."""

import os
import subprocess
import sys

import pytest

from moe_vlm_jax.data import fast_tokenizers


def test_a_word_level_tokenizer_has_the_words_as_ids_and_gives_back_the_spelling():
    words = ["<none>", "<stop>", "<other>", "sun", ",", "fog"]
    tokenizer = fast_tokenizers.word_level(words, pad="<none>", end="<stop>", unknown="<other>")
    ids = tokenizer("fog, sun\nrain")["input_ids"]
    assert ids == [5, 4, 3, 2]
    assert tokenizer.decode(ids[:3]) == "fog, sun"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


@pytest.mark.parametrize("spec", ["closed", "easy_vqa"])
def test_making_a_tokenizer_says_nothing_where_torch_is_not_installed(spec):
    # None in sys.modules hides an installed torch from `import` and from find_spec.
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from moe_vlm_jax.data import tokenize\n"
        f"tokenize.load_tokenizer({spec!r})\n"
        "import transformers\n"
        "assert not transformers.utils.is_torch_available()\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

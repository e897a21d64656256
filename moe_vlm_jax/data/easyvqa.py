"""The published easy-VQA set (PyPI package easy-vqa): 64 px pictures of one shape, 13 possible answers.

Its test split serves as 'val' and as 'test'. 74 % of the questions are yes/no, half and half.
"""

import re
from typing import Any

import easy_vqa

from moe_vlm_jax.data import fast_tokenizers, records

_SHAPES = ("circle", "rectangle", "triangle")
_SPECIAL = ("<pad>", "</s>", "<unk>")


def load_records(split: str) -> list[records.Record]:
    """Returns the questions of a split; answer types are yes/no, shape and color."""
    texts, answers, image_ids = _questions(split)
    paths = easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()
    return [
        records.Record(
            id=f"easy-vqa-{split}-{i}",
            images=(paths[image_id],),
            turns=(records.Turn("human", f"<image>\n{text}"), records.Turn("gpt", answer)),
            answers=(answer,),
            answer_type=_answer_type(answer),
        )
        for i, (text, answer, image_id) in enumerate(zip(texts, answers, image_ids, strict=True))
    ]


def tokenizer() -> Any:
    """Returns a word-level tokenizer of the set's own words, for models trained on it from nothing."""
    texts, answers, _ = _questions("train")
    words = sorted({word for text in [*texts, *answers] for word in re.findall(r"\w+|[^\w\s]+", text)})
    pad, end, unknown = _SPECIAL
    return fast_tokenizers.word_level([*_SPECIAL, *words], pad=pad, end=end, unknown=unknown)


def _questions(split: str) -> tuple[list[str], list[str], list[int]]:
    if split not in ("train", "val", "test"):
        raise ValueError(f"easy_vqa has no split {split!r}; use train, val or test (the last two are the same).")
    return easy_vqa.get_train_questions() if split == "train" else easy_vqa.get_test_questions()


def _answer_type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in _SHAPES else "color"

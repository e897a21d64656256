"""Streamed text is the whole text: for tokenizers of every kind, any split into pieces, and stop strings."""

import functools

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from moe_vlm_jax.data import tokenize
from moe_vlm_jax.decoding import text
from tests.conftest import goldens_folder

WORDS = ["a", "b", "bc", "ab", "é", "日本", "😀", ".", ",", "'", "s", "n't", "'ve", "!", "�", "END", " "]


def fast(backend: tokenizers.Tokenizer, **kwargs):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", additional_special_tokens=["<tag>"], **kwargs
    )


def ids_of(words) -> dict[str, int]:
    return {word: i for i, word in enumerate(dict.fromkeys(["<unk>", "</s>", "<tag>", *words]))}


@functools.cache
def byte_level():
    """Every byte is a token, and some words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(ids_of([*alphabet, "Ġa", "ab", "Ġ."]), [], unk_token="<unk>"))
    backend.decoder = decoders.ByteLevel()
    return fast(backend)


@functools.cache
def sentencepiece():
    """Llama's decoder: pieces with a mark for the space before them, single bytes where there is no piece."""
    pieces = [f"▁{word}" for word in WORDS if word != " "] + [*WORDS, "▁"]
    bytes_ = [f"<0x{byte:02X}>" for byte in (*"日é😀a".encode(), 0xFF, 0xC3, 0x0A)]
    vocabulary = ids_of([*pieces, *bytes_])
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return fast(backend)


@functools.cache
def unigram():
    vocabulary = [(word, 0.0) for word in ids_of([f"▁{word}" for word in WORDS] + WORDS)]
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    backend.decoder = decoders.Metaspace()
    return fast(backend)


@functools.cache
def tidying():
    """Words joined by spaces, some of which transformers takes away again when it sees what follows."""
    backend = tokenizers.Tokenizer(models.WordLevel(ids_of([*WORDS, "'m", "'s", "n't", "'re"]), unk_token="<unk>"))
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return fast(backend, clean_up_tokenization_spaces=True)


TOKENIZERS = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "unigram": unigram,
    "tidying": tidying,
    "closed": lambda: tokenize.load_tokenizer("closed"),
    "gpt2": lambda: tokenize.load_tokenizer(str(goldens_folder() / "preprocess" / "tokenizer_gpt2")),
}


def cut_by_hand(whole: str, stop: list[str]) -> str:
    """Reads character by character, as somebody would who waits for a stop string."""
    for end in range(len(whole) + 1):
        starts = [end - len(word) for word in stop if whole[:end].endswith(word)]
        if starts:
            return whole[: min(starts)]
    return whole


def pieces_of(ids: list[int], generator: np.random.Generator) -> list[list[int]]:
    cuts = np.flatnonzero(generator.random(len(ids)) < generator.choice([0.2, 0.8])) + 1
    return [piece.tolist() for piece in np.split(np.asarray(ids, int), cuts)]


def streamed(stream, pieces) -> tuple[str, list[str]]:
    handed = [stream.push(piece) for piece in pieces]
    return "".join(handed) + stream.flush(), handed


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("seed", range(3))
def test_pieces_joined_are_the_whole_text_up_to_the_first_stop_string(name, seed):
    tokenizer = TOKENIZERS[name]()
    generator = np.random.default_rng(seed)
    for trial in range(60):
        few = generator.integers(0, len(tokenizer), generator.integers(1, 8))  # so that things repeat
        ids = generator.choice(few, generator.integers(0, 300 if trial % 10 == 0 else 40)).tolist()
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        stop = []
        for _ in range(generator.integers(0, 4)):
            start, length = generator.integers(0, len(whole) + 1), generator.integers(1, 6)
            stop += [whole[start : start + length]] if whole[start : start + length] else ["END"]
        stream = text.TextStream(tokenizer, stop)
        joined, _ = streamed(stream, pieces_of(ids, generator))
        expected = cut_by_hand(whole, stop)
        assert joined == expected, (ids, stop)
        assert stream.finished == any(word in whole for word in stop)
        answer, _ = streamed(text.AnswerStream(tokenizer, stop), pieces_of(ids, generator))
        assert answer == expected.strip()


def test_a_character_of_several_tokens_appears_whole():
    tokenizer = byte_level()
    stream = text.TextStream(tokenizer)
    marks = [tokenizer.convert_tokens_to_ids(mark) for mark in "ðŁĺĢ"]  # the four bytes of one smiling face
    assert [stream.push([mark]) for mark in marks] == ["", "", "", "😀"]
    assert stream.push(marks[:2]) == ""
    assert stream.flush() == "�"


def test_a_run_of_bytes_waits_for_its_end_because_a_wrong_byte_changes_all_of_it():
    tokenizer = sentencepiece()
    good = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "日".encode()]
    wrong, word = (tokenizer.convert_tokens_to_ids(token) for token in ("<0xFF>", "▁a"))
    for ids in ([*good, wrong, word], [*good, word]):
        joined, handed = streamed(text.TextStream(tokenizer), [[index] for index in ids])
        assert joined == tokenizer.decode(ids)
        assert handed[:-1] == [""] * (len(ids) - 1)


def test_text_is_handed_out_as_soon_as_it_is_certain():
    tokenizer = byte_level()
    stream = text.TextStream(tokenizer, ["abc", "x"])
    said = [stream.push([tokenizer.convert_tokens_to_ids(token)]) for token in ("b", "ab", "ab", "b", "ab", "c", "b")]
    assert said == ["b", "", "ab", "abb", "", "", ""]
    assert stream.finished
    assert stream.flush() == ""


def test_the_stop_string_that_is_complete_first_counts_however_many_tokens_come_at_once():
    tokenizer = byte_level()
    ids = [tokenizer.convert_tokens_to_ids(token) for token in "ccabd"]
    for pieces in ([ids], [[index] for index in ids], [ids[:4], ids[4:]]):
        assert streamed(text.TextStream(tokenizer, ["cabd", "ab"]), pieces)[0] == "cc"
        assert streamed(text.TextStream(tokenizer, ["b", "cab"]), pieces)[0] == "c"


def test_long_answers_are_not_decoded_from_their_beginning_every_time(monkeypatch):
    tokenizer = byte_level()
    stream = text.TextStream(tokenizer)
    lengths = []
    decode = stream._decode
    monkeypatch.setattr(stream, "_decode", lambda ids: (lengths.append(len(ids)), decode(ids))[1])
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ["ab", "Ġa", "c"] * 200]
    assert streamed(stream, [[index] for index in ids])[0] == tokenizer.decode(ids)
    assert max(lengths) <= 65


def test_an_answer_has_no_white_space_around_it_but_all_of_that_inside():
    tokenizer = byte_level()
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ["Ġ", "Ċ", "Ġa", "Ġ", "Ċ", "b", "Ġ", "Ċ"]]
    joined, handed = streamed(text.AnswerStream(tokenizer), [[index] for index in ids])
    assert joined == "a \nb"
    assert handed == ["", "", "a", "", "", " \nb", "", ""]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty text"):
        text.TextStream(byte_level(), ["a", ""])

"""Candidates, marks and pictures for the tests of preferences."""

import io
import pathlib

from PIL import Image

from moe_vlm_jax.data import records
from moe_vlm_jax.preferences import candidates, marks

Candidate = candidates.Candidate
NASTY = "<script>document.title = 'gone'</script> & <b>\"x\"</b>"


def encoded(kind: str = "PNG", size: tuple[int, int] = (64, 48), color: int = 200) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (color, 30, 30)).save(buffer, kind)
    return buffer.getvalue()


def candidate(name: str = "q0", first: str = "red", second: str = "It is red.", answers=("red",), images=(), **kwargs):
    turns = (records.Turn("human", "<image>\n" * len(images) + f"What is {name}?"),)
    return Candidate(name, images, turns, (first, second), answers, **kwargs)


def write_candidates(folder: pathlib.Path, count: int, **kwargs) -> pathlib.Path:
    """Writes c.jsonl with items q0, q1, ..., each about an image of its own."""
    path = folder / "c.jsonl"
    with candidates.CandidateWriter(path) as writer:
        for i in range(count):
            image = folder / f"{i}.png"
            image.write_bytes(encoded(color=10 * i))
            writer.append(candidate(f"q{i}", f"first {i}", f"second {i}", images=(str(image),), **kwargs))
    return path


def mark(of: Candidate, annotator: str, word: str, seconds: float = 1.0) -> marks.Mark:
    return marks.Mark(of.id, annotator, word, "first", seconds, "2026-11-03T10:00:00+00:00", of.digest())


def held(*made: marks.Mark) -> dict[str, dict[str, marks.Mark]]:
    ledger = marks.Ledger()
    for one in made:
        ledger.add(one)
    return {name: ledger.held(name) for name in ledger.annotators()}

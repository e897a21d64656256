"""How processes share the reading of images."""

import threading

from moe_vlm_jax.data import bad_samples, host
from moe_vlm_jax.data.records import Record, Turn


class Together:
    """Exchanges values between threads that stand for processes."""

    def __init__(self, count: int):
        self._values: dict[int, object] = {}
        self._all_there = threading.Barrier(count, timeout=30)

    def gather(self, index: int, value: object) -> list:
        self._values[index] = value
        self._all_there.wait()
        return [self._values[i] for i in range(len(self._values))]


def record(name: str, *images: str) -> Record:
    turns = (Turn("human", "<image>\n" * len(images) + "q"), Turn("gpt", "a"))
    return Record(id=name, images=images, turns=turns, answers=("a",), answer_type="")


RECORDS = [record("1", "a", "b"), record("2", "b"), record("3", "bad 1"), record("4", "c", "bad 2"), record("5", "d")]


def check(image: str) -> None:
    if image.startswith("bad"):
        raise bad_samples.SampleError("", "unreadable_image", f"{image} cannot be read; replace it.")


def verdicts(checker) -> dict[str, str]:
    found = {}
    for image in ("a", "b", "bad 1", "c", "bad 2", "d"):
        try:
            checker(image)
        except bad_samples.SampleError as error:
            found[image] = f"{error.kind}: {error.fault}"
    return found


def test_each_image_is_looked_at_by_one_process_and_its_verdict_counts_for_all():
    together, seen, results = Together(3), [[], [], []], {}

    def run(index: int) -> None:
        def looked_at(image: str) -> None:
            seen[index].append(image)
            check(image)

        own = host.Host((index,), index, 3, lambda value: together.gather(index, value))
        checker = host.shared_check(looked_at, RECORDS, own)
        results[index] = verdicts(checker)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(image for images in seen for image in images) == ["a", "b", "bad 1", "bad 2", "c", "d"]
    expected = {image: f"unreadable_image: {image} cannot be read; replace it." for image in ("bad 1", "bad 2")}
    assert results == {0: expected, 1: expected, 2: expected}


def test_a_process_alone_looks_at_an_image_when_it_is_asked():
    own = host.alone(4)
    assert own.rows == (0, 1, 2, 3) and own.gather("x") == ["x"]
    assert host.shared_check(check, RECORDS, own) is check

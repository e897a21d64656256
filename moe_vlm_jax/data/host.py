"""One process among those that train together: what it builds of every batch, and which files it looks at.

Every process reads the table of samples and tokenises it, as any sample may come to any process later and all must
plan the same batches. Images are the bulk of the bytes: a process decodes those of its own rows, and in the length pass
each image is looked at by one process only, whose verdict counts for all.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from moe_vlm_jax.data import bad_samples
from moe_vlm_jax.data.records import Record


class Host(NamedTuple):
    """A process and its share.

    Attributes:
      rows: which rows of a micro-batch it builds.
      index, count: its number, and how many there are.
      gather: JSON value -> the values of all processes, in their order; all call it together.
    """

    rows: tuple[int, ...]
    index: int
    count: int
    gather: Callable[[Any], list[Any]]


def alone(batch_size: int) -> Host:
    """Returns the host of a run in one process."""
    return Host(rows=tuple(range(batch_size)), index=0, count=1, gather=lambda value: [value])


def shared_check(check_image: Callable[[Any], None], records: Iterable[Record], host: Host) -> Callable[[Any], None]:
    """Returns a check that gives the verdict of one process on every process.

    Args:
      check_image: raises SampleError for an image that cannot be used.
      records: all, on every process in the same order; their images are checked now.
      host: this one; alone, check_image itself is returned.
    """
    if host.count == 1:
        return check_image
    images = list(dict.fromkeys(image for record in records for image in record.images))
    mine: dict[int, tuple[str, str]] = {}
    for i in range(host.index, len(images), host.count):
        try:
            check_image(images[i])
        except bad_samples.SampleError as error:
            mine[i] = (error.kind, error.fault)
    faults = {images[int(i)]: tuple(fault) for part in host.gather(mine) for i, fault in part.items()}

    def check(image: Any) -> None:
        if image in faults:
            kind, fault = faults[image]
            raise bad_samples.SampleError("", kind, fault)

    return check

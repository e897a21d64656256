"""The stream of batches: the plan of all epochs as one list, built by Grain in the background.

The stream is endless and random access, so its whole state is the number of the next step: a run continues exactly,
also with another number of worker processes or hosts.

Worker processes are spawned, so a script that uses them needs `if __name__ == "__main__":`. Each holds the token ids
of the whole source (8 bytes a token).
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax.batch import Batch
from moe_vlm_jax.data import planning, trees
from moe_vlm_jax.data.records import Example

ENDLESS = 2**40  # steps: the trainer decides when to stop
PREFETCH = 2  # batches that wait ready for the trainer, in each worker


class HostBatch(NamedTuple):
    """What this host feeds to one step.

    Attributes:
      batch: Batch of numpy arrays [A, B of this host, T], images [A, I, S, S, 3] or None. image_slot counts the images
        of the whole micro-batch, over all hosts.
      sample_ids: of the samples in it, in order of their rows.
    """

    batch: Batch
    sample_ids: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchBuilder:
    """Builds this host's share of a step; what the worker processes carry with them.

    Attributes:
      examples: all samples.
      members: indices of the examples of each tree.
      layout: rows and steps.
      num_patches: slots of an image (P).
      image_size: pixels along a side (S).
      load_image: reference -> float32[S, S, 3].
      accumulation: micro-batches of a step (A).
      rows: which rows of a micro-batch this host builds.
      share_prefix: whether examples of one tree share their prefix.
      reference: float32[N, 2] log-probs of both answers of each tree, where trees are pairs and they are known.
    """

    examples: Sequence[Example]
    members: Sequence[tuple[int, ...]]
    layout: planning.Layout
    num_patches: int
    image_size: int
    load_image: trees.LoadImage
    accumulation: int
    rows: tuple[int, ...]
    share_prefix: bool = True
    reference: np.ndarray | None = None

    def __call__(self, step: planning.Step) -> HostBatch:
        micro_batches = planning.host_rows(step, accumulation=self.accumulation, rows=self.rows)
        rows = [[[self._tree(t) for t in row] for row in micro_batch] for micro_batch in micro_batches]
        batches = [
            trees.collate(
                micro_batch,
                row_length=step.row_length,
                images_per_row=images_per_row(self.layout.images_per_row, step.row_length, self.num_patches),
                num_patches=self.num_patches,
                image_size=self.image_size,
                load_image=self.load_image,
                row_numbers=self.rows,
            )
            for micro_batch in rows
        ]
        if self.reference is not None:
            known = [self._reference(micro_batch, step.row_length) for micro_batch in micro_batches]
            batches = [batch._replace(reference_log_probs=a) for batch, a in zip(batches, known, strict=True)]
        stacked = [None if arrays[0] is None else np.stack(arrays) for arrays in zip(*batches, strict=True)]
        ids = tuple(name for micro_batch in rows for row in micro_batch for tree in row for name in tree.ids)
        return HostBatch(Batch(*stacked), ids)

    def _tree(self, tree: int) -> trees.Tree:
        members, examples = self.members[tree], self.examples
        return planning.build_tree(members, examples, self.num_patches, share_prefix=self.share_prefix)

    def _reference(self, micro_batch: Sequence[Sequence[int]], row_length: int) -> np.ndarray:
        """Returns float32[B, N, 2] of the pairs in these rows."""
        assert self.reference is not None
        found = np.zeros((len(micro_batch), batch_lib.max_pairs(row_length), 2), np.float32)
        for r, row in enumerate(micro_batch):
            found[r, : len(row)] = self.reference[list(row)]
        return found


def images_per_row(most: int, row_length: int, num_patches: int) -> int:
    """Returns the room for images in a row: at most `most`, and no more than the slots of a row can hold."""
    return min(most, row_length // num_patches)


class StepSource:
    """The plan of all epochs as one numbered list; Grain reads it by index.

    Attributes:
      lengths, images: int[N] of each tree.
      layout: rows and steps.
      first: number of the step that has index 0 here.
    """

    def __init__(self, lengths: np.ndarray, images: np.ndarray, layout: planning.Layout, first: int = 0):
        self.lengths, self.images, self.layout, self.first = lengths, images, layout, first
        self._starts = [0]  # number of the first step of each epoch planned so far
        self._epoch: tuple[int, list[planning.Step]] = (-1, [])  # the epoch planned last

    def __len__(self) -> int:
        return ENDLESS - self.first

    def __getitem__(self, index: int) -> planning.Step:
        number = self.first + index
        epoch = self.epoch_of(number)
        return self._plan(epoch)[number - self._starts[epoch]]

    def start(self, epoch: int) -> int:
        """Returns the number of the first step of an epoch."""
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + len(self._plan(len(self._starts) - 1)))
        return self._starts[epoch]

    def epoch_of(self, number: int) -> int:
        """Returns the epoch that a step belongs to."""
        while self._starts[-1] <= number:
            self.start(len(self._starts))
        return int(np.searchsorted(self._starts, number, side="right")) - 1

    def _plan(self, epoch: int) -> list[planning.Step]:
        planned, steps = self._epoch
        if planned != epoch:
            steps = planning.plan_epoch(self.lengths, self.images, self.layout, epoch=epoch)
            self._epoch = (epoch, steps)
        return steps


class TrainIterator:
    """Endless iterator over HostBatch that can stop and go on anywhere.

    Attributes:
      wait_seconds: time that the caller has spent waiting in __next__, in all.
    """

    def __init__(self, source: StepSource, builder: BatchBuilder, num_workers: int, fingerprint: str, first: int):
        self.wait_seconds = 0.0
        self._source, self._builder, self._num_workers = source, builder, num_workers
        self._fingerprint = fingerprint
        self._next = first
        self._iterator: Any = None

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> HostBatch:
        self.start()
        begin = time.perf_counter()
        batch = next(self._iterator)
        self.wait_seconds += time.perf_counter() - begin
        self._next += 1
        return batch

    def start(self) -> None:
        """Begins to build batches in the background, e.g. while the step compiles."""
        if self._iterator is not None:
            return
        source = StepSource(self._source.lengths, self._source.images, self._source.layout, self._next)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)
        dataset = grain.MapDataset.source(source).map(self._builder).to_iter_dataset(options)
        if self._num_workers:
            if not flags.FLAGS.is_parsed():  # Grain reads its flags; without absl.app nobody has parsed them
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(self._num_workers, PREFETCH))
        self._iterator = iter(dataset)
        self._iterator.start_prefetch()

    def get_state(self) -> dict[str, Any]:
        """Returns the position, to be kept in a checkpoint (plain JSON values)."""
        return {"next_step": self._next, "data": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a position; the number of workers and hosts may have changed since, the data may not."""
        if state["data"] != self._fingerprint:
            raise ValueError(
                f"the checkpoint was trained on data {state['data']}, this run reads data {self._fingerprint}: a run "
                "continues only on the same samples, seed and batch settings; restore them or use another workdir."
            )
        self.close()
        self._next = int(state["next_step"])

    def close(self) -> None:
        """Ends the background work; the next __next__ starts it again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

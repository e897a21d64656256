"""The error that one unusable sample raises, and the count of those left out.

Every fault of a sample (its text, its images, its labels) is a `SampleError`. The policy of the run says whether it
stops the run (`error`) or is left out, counted and reported (`drop`). Nothing is left out silently.
"""

import collections
import dataclasses

from absl import logging

POLICIES = ("error", "drop")


class SampleError(ValueError):
    """One sample that cannot be used.

    Attributes:
      sample_id: the record's id; '' where only the image is known, which the fault then names.
      kind: groups equal faults in a report, e.g. 'missing_image'.
      fault: value, rule and remedy, without the id.
    """

    def __init__(self, sample_id: str, kind: str, fault: str):
        super().__init__(f"sample {sample_id!r}: {fault}" if sample_id else fault)
        self.sample_id = sample_id
        self.kind = kind
        self.fault = fault

    def __reduce__(self):
        # Worker processes hand their errors over pickled; the default would call __init__ with one argument.
        return type(self), (self.sample_id, self.kind, self.fault)


@dataclasses.dataclass
class BadSamples:
    """What a run does with unusable samples, and how many it has met.

    >>> bad = BadSamples("drop")
    >>> bad.handle(SampleError("a", "empty_answer", "turn 1 is empty; give an answer."))
    >>> bad.counts
    Counter({'empty_answer': 1})
    """

    policy: str
    setting: str = "data.on_bad_sample"  # the field of the config that says so, for messages
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    first: dict[str, str] = dataclasses.field(default_factory=dict)  # the first message of each kind

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise ValueError(f"{self.setting}={self.policy!r} is not one of {POLICIES}; use one of them.")

    def handle(self, error: SampleError) -> None:
        """Raises the error, or counts it when the policy is 'drop'."""
        if self.policy == "error":
            remedy = f"{error.fault} ({self.setting}='drop' leaves such samples out and counts them.)"
            raise SampleError(error.sample_id, error.kind, remedy) from error
        self.counts[error.kind] += 1
        self.first.setdefault(error.kind, str(error))

    def report(self, *, kept: int, what: str) -> None:
        """Logs one line for each kind of fault, and refuses a source of which nothing is left."""
        dropped = sum(self.counts.values())
        for kind, count in sorted(self.counts.items()):
            logging.warning("%s: left out %d samples (%s), e.g. %s", what, count, kind, self.first[kind])
        if dropped and not kept:
            kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.counts.items()))
            raise ValueError(
                f"{what}: all {dropped} samples are unusable ({kinds}); a run needs at least one; "
                f"mend them. First: {next(iter(self.first.values()))}"
            )

"""Puts a run's training questions into clusters, for routers that go by them.

    python -m moe_vlm_jax.cluster_questions --config configs/stage3.py:phi2-4e --target runs/clusters.npz
    python -m moe_vlm_jax.train --config configs/stage3.py:phi2-4e --config.model.moe.router=cluster \\
        --config.model.moe.clusters=runs/clusters.npz --config.data.share_prefix=False

K-means over the questions' embeddings: the mean, over a question's tokens, of the word embeddings of the checkpoint
that the config starts from. docs/routers.md says what the router makes of it. Prints each cluster with the questions
nearest to its centroid: whether they mean something is for a person to see.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from moe_vlm_jax import command_line
from moe_vlm_jax.training import clustering

_CONFIG = command_line.define_config("configs/stage3.py")
_TARGET = flags.DEFINE_string("target", None, "File to write.", required=True)
_NUM_CLUSTERS = flags.DEFINE_integer("num_clusters", None, "K; default: as many as experts.", lower_bound=1)
_NUM_QUESTIONS = flags.DEFINE_integer("num_questions", 20_000, "Questions to look at, evenly spaced.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of k-means.", lower_bound=0)


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    command_line.use_compilation_cache()
    with command_line.user_errors():
        target = pathlib.Path(_TARGET.value)
        settings = {
            "num_clusters": _NUM_CLUSTERS.value,
            "num_questions": _NUM_QUESTIONS.value,
            "seed": _SEED.value,
        }
        print(clustering.make(_CONFIG.value, target, **settings))
    print(f"clusters: {target}")


if __name__ == "__main__":
    command_line.run(main)

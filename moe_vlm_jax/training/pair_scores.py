"""Log-probs of all pairs of a data set, outside of training: what held-out pairs say, and references beforehand.

Files of references are JSON: {"made_from": {part: fingerprint}, "log_probs": {pair's id: [chosen, rejected]}}.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
from absl import logging
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import distributed, validation
from moe_vlm_jax.data import pipeline
from moe_vlm_jax.training import checkpoint, preference_step

Scores = np.ndarray  # float32[N, 2] log-probs of the chosen and the rejected answer of each pair


class Scorer:
    """Computes the log-probs of the pairs of a data set under any parameters, with one compilation for each shape."""

    def __init__(self, data: pipeline.TrainData, graphdef: nnx.GraphDef, config: config_lib.RunConfig, to_devices):
        """Takes what it needs of a run.

        Args:
          data: of pairs.
          graphdef: of the model.
          config: the run's.
          to_devices: host batch -> the batch on the devices (`setup.to_devices`).
        """
        self._data, self._to_devices = data, to_devices
        self._program = jax.jit(functools.partial(preference_step.log_probs, graphdef, config=config))

    def __call__(self, params: nnx.State) -> Scores:
        """Returns the log-probs of all pairs, in their order; every process gets all of them."""
        data = self._data
        found = np.full((len(data.source.lengths), 2), np.nan, np.float32)
        iterator = data.iterator()
        for step in range(data.steps_per_epoch):
            values = distributed.to_host(self._program(params, batch=self._to_devices(next(iterator).batch)))
            rows = data.source[step].rows
            for row, of_row in zip(rows, values.reshape(len(rows), *values.shape[2:]), strict=True):
                found[list(row)] = of_row[: len(row)]
        iterator.close()
        if np.isnan(found).any():
            raise ArithmeticError(f"{int(np.isnan(found).any(axis=1).sum())} of {len(found)} pairs have no log-prob.")
        return found


def reference_scores(path: pathlib.Path, data: pipeline.TrainData, made_from: Mapping[str, str], compute) -> Scores:
    """Returns the reference's log-probs from a file, which is written first if it does not exist.

    Args:
      path: the file.
      data: the pairs.
      made_from: of `fingerprints`.
      compute: () -> Scores; called on all processes together.

    Raises:
      ValueError: the file was made from something else; says which part.
    """
    ids = data.pair_ids()
    if distributed.from_leader(path.is_file()):
        found = distributed.from_leader(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None)
        differing = [
            f"  {part}: {found['made_from'].get(part, '(absent)')} in the file, {mine} now"
            for part, mine in made_from.items()
            if found["made_from"].get(part) != mine
        ]
        if differing:
            raise ValueError(
                f"preference.precomputed={str(path)!r} holds a reference's log-probs that were made from something "
                "else; restore these, or name a file that does not exist:\n" + "\n".join(differing)
            )
        return np.array([found["log_probs"][name] for name in ids], np.float32)
    logging.info("computing the reference's log-probs of %d pairs", len(ids))
    scores = compute()
    if jax.process_index() == 0:
        rows = {name: [float(x) for x in row] for name, row in zip(ids, scores, strict=True)}
        partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"made_from": dict(made_from), "log_probs": rows}) + "\n", encoding="utf-8")
        partial.replace(path)
    distributed.barrier("the reference's log-probs are written")
    return scores


def fingerprints(
    data: pipeline.TrainData, frozen: nnx.State, reference: nnx.State, config: config_lib.RunConfig
) -> dict[str, str]:
    """Returns a fingerprint of each part that a reference's log-probs depend on."""
    fields = validation.flatten(config)

    def of(*sections: str) -> str:
        kept = {name: value for name, value in fields.items() if name.startswith(sections)}
        return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]

    return {
        "pairs": data.content(),
        "template": of("data.template", "data.answer_prompt", "data.max_text_tokens"),
        "image transform": of("data.image_aspect", "model.vision.image_size", "model.vision.patch_size"),
        "model": of("model.vision", "model.decoder", "model.moe", "model.projector", "model.compute_dtype"),
        "quantiser": of("model.quant"),
        "adapters": f"{of('model.lora')} {checkpoint.fingerprint(reference)}",
        "base": checkpoint.fingerprint(frozen),
    }


class HeldOut:
    """Pairs that nobody trains on, and what the reference makes of them."""

    def __init__(self, scorer: Scorer, reference: Scores | None, beta: float):
        self._scorer, self._reference, self._beta = scorer, reference, beta

    def measure(self, params: nnx.State) -> dict[str, float]:
        """Returns accuracies, margins and log-probs of a policy, means over pairs.

        reward_accuracy counts pairs whose chosen answer has gained more over the reference than the rejected one;
        before training nothing has been gained, and such ties count one half. log_prob_accuracy asks the policy alone.
        """
        policy, reference = self._scorer(params), self._reference
        margin = policy[:, 0] - policy[:, 1]
        found = {
            "pairs": float(len(policy)),
            "log_prob_accuracy": _share_above_zero(margin),
            "chosen_log_prob": float(policy[:, 0].mean()),
            "rejected_log_prob": float(policy[:, 1].mean()),
        }
        if reference is not None:
            gain = self._beta * (margin - (reference[:, 0] - reference[:, 1]))
            found |= {"reward_accuracy": _share_above_zero(gain), "reward_margin": float(gain.mean())}
        return found


def _share_above_zero(values: np.ndarray) -> float:
    return float(np.mean(0.5 + 0.5 * np.sign(values)))

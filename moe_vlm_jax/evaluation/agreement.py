"""How far two models, or two ways to store one, are apart: their logits on the same prompts."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import images as images_lib
from moe_vlm_jax.data import records as records_lib
from moe_vlm_jax.data import tokenize
from moe_vlm_jax.decoding import generate
from moe_vlm_jax.decoding import prompts as prompts_lib


class Difference(NamedTuple):
    """Of the logits of two models at the same tokens.

    Attributes:
      rms, largest: of the differences of logits.
      argmax: share of the tokens at which both prefer the same next token.
      kl: mean over the tokens of KL(first || second), in nats.
    """

    rms: float
    largest: float
    argmax: float
    kl: float


# Of the size of the logits: float32 sums in another order, through a deep model. Relative, of the RMS.
FLOAT32_NOISE = 1e-4
# How much worse a merged kernel may be to quantise than the base's was.
WORSE = 1.5


class Merge(NamedTuple):
    """A merge, measured on the same prompts.

    Attributes:
      size: RMS of the logits of base + adapter.
      tune: base against base + adapter: what the fine-tune changed.
      quantiser: float base against quantised base; None where the base is not quantised or not at hand.
      exact: base + adapter against the merged kernels in float32.
      stored: the merged kernels in float32 against the same, rounded or quantised as the target holds them.
      written: base + adapter against the target, loaded again.
    """

    size: float
    tune: Difference
    quantiser: Difference | None
    exact: Difference
    stored: Difference
    written: Difference

    def table(self) -> str:
        """Returns all of it as text."""
        rows = {
            "fine-tune: base, base + adapter": self.tune,
            "quantiser: float base, base": self.quantiser,
            "merging: base + adapter, merged in float32": self.exact,
            "storing: merged in float32, as the target holds it": self.stored,
            "in all: base + adapter, the target loaded again": self.written,
        }
        lines = [f"{'logits of':52}{'RMS':>11}{'largest':>11}{'same argmax':>13}{'KL':>11}"]
        for name, found in rows.items():
            if found is not None:
                numbers = f"{found.rms:11.2e}{found.largest:11.2e}{found.argmax:13.4f}{found.kl:11.2e}"
                lines.append(f"{name:52}{numbers}")
        return "\n".join(lines)

    def refusals(self, *, requantised: bool) -> list[str]:
        """Returns why the target must not be used; empty where base + adapter and target agree.

        They may differ by what storing explains, and never by as much as the fine-tune changed. Storing in a float
        dtype explains its rounding; quantising again may be at most WORSE times as bad as it was for the base.
        """
        noise = FLOAT32_NOISE * self.size
        mistakes = []
        if self.exact.rms > noise:
            mistakes.append(
                f"the merged kernels in float32 are {self.exact.rms:.2e} from base + adapter, beyond float32's own "
                f"{noise:.2e}: the merge is wrong; please report it."
            )
        if self.written.rms > 1.1 * self.stored.rms + noise:
            mistakes.append(
                f"the target is {self.written.rms:.2e} from base + adapter, but storing it explains only "
                f"{self.stored.rms:.2e}: what was written is not what was merged; check the disk, or report it."
            )
        if self.written.rms > noise and self.written.rms >= self.tune.rms:
            mistakes.append(
                f"the target is {self.written.rms:.2e} from base + adapter, and the whole fine-tune is only "
                f"{self.tune.rms:.2e}: it would be lost in the storing; choose a wider dtype, or keep the adapter "
                "apart (--adapter-only)."
            )
        if requantised and self.quantiser is not None and self.stored.rms > WORSE * self.quantiser.rms + noise:
            mistakes.append(
                f"quantising the merged kernels costs {self.stored.rms:.2e}, more than {WORSE} times the "
                f"{self.quantiser.rms:.2e} that quantising the base cost; merge into a float dtype instead."
            )
        return mistakes


def prompt_batches(
    records: Sequence[records_lib.Record],
    config: config_lib.RunConfig,
    tokenizer: Any,
    transform: images_lib.ImageTransform,
) -> list[batch_lib.Batch]:
    """Returns the prompts of the records as batches of equal shape, evaluation.batch_size rows each.

    Args:
      records: what is asked; their answers are not used.
      config: of the run.
      tokenizer: as `tokenize.load_tokenizer` gives it.
      transform: of the model's vision tower.
    """
    data, vision = config.data, config.model.vision
    prompts = []
    for record in records:
        tokens = tokenize.encode_prompt(record, tokenizer, data.template, answer_prompt=data.answer_prompt)
        prompts.append(prompts_lib.Prompt(tokens, tuple(transform(image) for image in record.images)))
    length = max(prompts_lib.expanded_length(prompt.tokens, vision.num_tokens) for prompt in prompts)
    prompts_lib.check_length(length, 0, config.model)
    rows = min(config.evaluation.batch_size, len(prompts))
    groups = [prompts[i : i + rows] for i in range(0, len(prompts), rows)]
    room = max(sum(len(prompt.images) for prompt in group) for group in groups)
    return [
        prompts_lib.prompt_batch(
            group, tokens_per_image=vision.num_tokens, row_length=length, num_images=room, image_size=vision.image_size
        )
        for group in groups
    ]


def logits(graphdef: nnx.GraphDef, params: nnx.State, batches: Iterable[batch_lib.Batch]) -> np.ndarray:
    """Returns float32[N, V]: the logits at every text token of the batches.

    Experts are chosen without capacity, and matmuls are exact, so that only the weights make a difference. (How the
    model computes is the graphdef's matter: give one with compute_dtype float32.)
    """
    graphdef = generate.dropless_graphdef(graphdef, params)
    found = []
    with jax.default_matmul_precision("highest"):
        for batch in batches:
            text = np.asarray(batch.valid) & (np.asarray(batch.image_slot) < 0)
            found.append(np.asarray(_forward(graphdef, params, batch), np.float32)[text])
    return np.concatenate(found)


def compare(first: np.ndarray, second: np.ndarray) -> Difference:
    """Returns how far two models are apart.

    Args:
      first, second: float32[N, V].
    """
    gap = first.astype(np.float64) - second
    log_p, log_q = _log_softmax(first), _log_softmax(second)
    return Difference(
        rms=float(np.sqrt(np.mean(gap**2))),
        largest=float(np.abs(gap).max()),
        argmax=float(np.mean(first.argmax(axis=-1) == second.argmax(axis=-1))),
        kl=float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1))),
    )


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef: nnx.GraphDef, params: nnx.State, batch: batch_lib.Batch) -> jax.Array:
    model = nnx.merge(graphdef, params)
    return model.logits(model(batch, train=False).hidden)


def _log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values.astype(np.float64) - values.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

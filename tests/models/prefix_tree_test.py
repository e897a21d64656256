"""Packed, image-sharing batches train exactly what the separate sequences train."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree as tree_lib
from moe_vlm_jax.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Batch
from moe_vlm_jax.data import planning, trees
from moe_vlm_jax.data.records import Example
from moe_vlm_jax.models import vlm

VISION = config_lib.VisionConfig(
    image_size=6, patch_size=3, embed_dim=9, mlp_dim=14, num_layers=2, num_heads=3, position_init_std=0.5
)
PATCHES = VISION.num_tokens
CONFIG = config_lib.ModelConfig(
    vision=VISION,
    decoder=config_lib.DecoderConfig(
        vocab_size=31,
        embed_dim=16,
        mlp_dim=22,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        rotary_dim=4,
        rope_theta=50.0,  # turns fast: a wrong position shows
        max_positions=64,
        embed_init_std=0.5,
    ),
    moe=config_lib.MoEConfig(num_experts=(4,), top_k=2, dispatch="dropless", block_rows=8),
    compute_dtype="float32",
    remat="none",
)
# Text of each kind of sample ('#' is an image, the last two tokens are the answer), and an image for each sample.
KINDS = {
    "left and right": ("ttt#tttt", ["x", "y", "x"]),
    "image first": ("#ttttttt", ["y", "y", "z"]),
    "text": ("ttttttttt", ["", "", ""]),
    "two images": ("t#tt#ttt", ["xz"]),
}
ROWS = {"row_length": 40, "num_rows": 3}


class Probed(vlm.VLM):
    """The model with a differentiable zero added to the input of every slot."""

    def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.probe = nnx.Param(jnp.zeros((ROWS["num_rows"], ROWS["row_length"], config.decoder.embed_dim)))

    def embed(self, batch: Batch, *, own_images: bool = False, key: jax.Array | None = None) -> jax.Array:
        return super().embed(batch, own_images=own_images, key=key) + self.probe[...]


def make_examples() -> list[Example]:
    rng = np.random.default_rng(3)
    shared = rng.integers(3, 31, 16).astype(np.int32)  # texts begin alike
    examples = []
    for kind, (text, references) in KINDS.items():
        for i, images in enumerate(references):
            tokens = shared[: len(text)].copy()
            tokens[-3 - i :] = rng.integers(3, 31, 3 + i)
            tokens[[j for j, letter in enumerate(text) if letter == "#"]] = IMAGE_TOKEN_INDEX
            labels = np.where(np.arange(len(text)) >= len(text) - 2, tokens, IGNORE_INDEX).astype(np.int32)
            examples.append(Example(f"{kind} {i}", tokens, labels, tuple(images)))
    return examples


def pixels(reference: str) -> np.ndarray:
    return np.random.default_rng(ord(reference)).normal(size=(6, 6, 3)).astype(np.float32)


def pack(examples: list[Example], *, row_length: int, num_rows: int) -> Batch:
    """Returns the samples as one batch of shared, packed rows."""
    forest = planning.form_trees(
        examples, num_patches=PATCHES, share_prefix=True, max_branches=8, max_length=row_length
    )
    layout = planning.Layout(row_lengths=(row_length,), images_per_row=3, rows_per_step=num_rows, pack=True, seed=1)
    (step,) = planning.plan_epoch(forest.lengths, forest.images, layout, epoch=0)
    return trees.collate(
        [[planning.build_tree(forest.members[t], examples, PATCHES) for t in row] for row in step.rows],
        row_length=row_length,
        images_per_row=3,
        num_patches=PATCHES,
        image_size=VISION.image_size,
        load_image=pixels,
    )


def alone(example: Example) -> Batch:
    """Returns a batch of this one sequence in the usual way; one shape for all, as compiling takes longest here."""
    sequence = trees.join([trees.expand(example, PATCHES)], PATCHES)
    return trees.collate(
        [[sequence]],
        row_length=14,
        images_per_row=2,
        num_patches=PATCHES,
        image_size=VISION.image_size,
        load_image=pixels,
    )


def random_parameters(model_class) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns a model with all parameters random, norms and biases too; drawn by numpy, as that compiles nothing."""
    rng = np.random.default_rng(7)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: model_class(CONFIG, rngs=nnx.Rngs(0))))

    def draw(path, leaf):
        name = path.rsplit("/", 1)[-1]
        if name == "probe":
            return jnp.zeros(leaf.shape)
        values = rng.normal(size=leaf.shape)
        if name == "kernel":
            values /= np.sqrt(leaf.shape[-2])
        elif name in ("scale", "bias"):
            values = 0.2 * values + (name == "scale")
        return jnp.asarray(values, leaf.dtype)

    flat = [(path, v.replace(draw("/".join(map(str, path)), v.get_value()))) for path, v in nnx.to_flat_state(state)]
    return graphdef, nnx.from_flat_state(flat)


@pytest.fixture(scope="module")
def model():
    return random_parameters(vlm.VLM)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(graphdef, params, batch):
    """Returns (sum of the cross-entropy over trained tokens, router balance losses) and the gradients of the sum."""

    def loss(params):
        model = nnx.merge(graphdef, params)
        output = model(batch, train=True)
        log_probs = jax.nn.log_softmax(model.logits(output.hidden))
        trained = batch.labels != IGNORE_INDEX
        target = jnp.where(trained, batch.labels, 0)
        picked = jnp.take_along_axis(log_probs, target[..., None], axis=-1)[..., 0]
        balance = jnp.stack([layer.balance_loss for layer in output.router])
        return -jnp.sum(jnp.where(trained, picked, 0.0)), balance

    return jax.value_and_grad(loss, has_aux=True)(params)


def assert_same_gradients(actual, expected, *, scale: float):
    """Compares every leaf at 1e-5 of a gradient of the mean over tokens."""
    actual, expected = tree_lib.leaves(actual), tree_lib.leaves(expected)
    assert actual.keys() == expected.keys()
    for path, gradient in expected.items():
        np.testing.assert_allclose(actual[path][...] / scale, gradient[...] / scale, atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_packed_and_shared_trains_the_token_weighted_sum_of_separate_sequences(model):
    graphdef, params = model
    examples = make_examples()
    packed = pack(examples, **ROWS)
    (total, _), gradients = loss_and_gradients(graphdef, params, packed)
    separate = [loss_and_gradients(graphdef, params, alone(example)) for example in examples]
    count = int((packed.labels != IGNORE_INDEX).sum())
    assert count == sum(int((alone(e).labels != IGNORE_INDEX).sum()) for e in examples) == 2 * len(examples)
    np.testing.assert_allclose(total / count, sum(loss for (loss, _), _ in separate) / count, rtol=1e-5)
    expected = jax.tree.map(lambda *parts: sum(parts), *(gradient for _, gradient in separate))
    assert_same_gradients(gradients, expected, scale=count)

    # What the batch is made of: shared images, several trees in a row, text-only trees, padding.
    assert packed.valid.sum() < sum(alone(e).valid.sum() for e in examples)
    assert (packed.branch == 2).any() and packed.tree.max() > 1 and not packed.valid.all()
    # Every parameter has a gradient, but those behind the vision layer that is handed on, and the vision tower's
    # key bias, which softmax does not see (in the decoder, rotary positions make it visible).
    for path, gradient in tree_lib.leaves(expected).items():
        if not path.startswith("vision/post_norm") and path != "vision/blocks/attention/k/bias":
            assert float(jnp.abs(gradient[...]).max()) / count > 1e-4, path


@pytest.mark.slow
def test_a_padded_batch_equals_the_unpadded_one(model):
    """14 slots and 2 images without any padding; the same among 120 slots and 9 images."""
    graphdef, params = model
    example = make_examples()[-1]
    assert alone(example).valid.all() and len(example.images) == 2
    (loss, balance), gradients = loss_and_gradients(graphdef, params, alone(example))
    (padded_loss, padded_balance), padded_gradients = loss_and_gradients(graphdef, params, pack([example], **ROWS))
    np.testing.assert_allclose(padded_loss, loss, rtol=1e-5)
    np.testing.assert_allclose(padded_balance, balance, rtol=1e-5)
    assert_same_gradients(padded_gradients, gradients, scale=2)


@pytest.mark.slow
def test_no_slot_sees_another_branch_another_tree_or_a_later_slot():
    batch = pack(make_examples(), **ROWS)
    graphdef, params = random_parameters(Probed)
    probe, rest = tree_lib.partition(params, {"probe": ["probe"], "rest": ["(?!probe).*"]}).values()

    @jax.jit
    def gradient_of(weight):
        def score(probe):
            model = nnx.merge(graphdef, probe, rest)
            return jnp.sum(model.logits(model(batch, train=True).hidden) * weight)

        return jax.grad(score)(probe)["probe"][...]

    weight = np.random.default_rng(1).normal(size=(*batch.tokens.shape, CONFIG.decoder.vocab_size))
    groups = {(r, t, b) for (r, s), t in np.ndenumerate(batch.tree) if t for b in [batch.branch[r, s]]}
    assert len(groups) > 10
    for row, tree, branch in sorted(groups):
        slots = np.flatnonzero((batch.tree[row] == tree) & (batch.branch[row] == branch))
        asked = slots[: len(slots) // 2 + 1]  # the first half, so that later slots exist
        weight_here = np.zeros(weight.shape, np.float32)
        weight_here[row, asked] = weight[row, asked]
        touched = np.asarray(jnp.any(gradient_of(weight_here) != 0, axis=-1))
        seen = np.zeros(touched.shape, bool)
        seen[row] = (batch.tree[row] == tree) & np.isin(batch.branch[row], (0, branch))
        seen[row, asked[-1] + 1 :] = False
        np.testing.assert_array_equal(touched, seen, err_msg=f"row {row}, tree {tree}, branch {branch}")

"""Generation against a full forward pass at every step, and against itself in other batches."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.decoding import generate as generate_lib
from moe_vlm_jax.decoding import prompts as prompts_lib
from moe_vlm_jax.models import vlm

IMAGE = batch_lib.IMAGE_TOKEN_INDEX
NEW = 6
VOCAB = 61
T = 20
NEVER = VOCAB  # an end token that no row can produce

CONFIG = config_lib.ModelConfig(
    vision=config_lib.VisionConfig(
        image_size=16, patch_size=8, embed_dim=12, mlp_dim=20, num_layers=2, num_heads=2, position_init_std=0.5
    ),
    decoder=config_lib.DecoderConfig(
        vocab_size=VOCAB,
        embed_dim=24,
        mlp_dim=36,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        rotary_dim=4,
        max_positions=T + NEW,
        embed_init_std=0.7,
    ),
    moe=config_lib.MoEConfig(num_experts=(4,), block_rows=8),
    compute_dtype="float32",
    remat="none",
)
GREEDY = config_lib.GenerationConfig(max_new_tokens=NEW)
SAMPLED = config_lib.GenerationConfig(max_new_tokens=NEW, temperature=1.2, top_p=0.95, seed=4)


@functools.cache
def model(config: config_lib.ModelConfig = CONFIG) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(vlm.VLM(config, rngs=nnx.Rngs(2)))


@functools.cache
def prompts() -> list[prompts_lib.Prompt]:
    """Text only; an image in front, in the middle; two images; the first image again. Lengths 3 to 15."""
    rng = np.random.default_rng(1)
    pictures = [rng.normal(size=(16, 16, 3)).astype(np.float32) for _ in range(3)]

    def prompt(*parts, images=()):
        return prompts_lib.Prompt(np.array(parts, np.int32), tuple(pictures[i] for i in images))

    return [
        prompt(5, 9, 17),
        prompt(IMAGE, 8, 33, 2, images=[0]),
        prompt(40, 41, IMAGE, 7, images=[1]),
        prompt(3, IMAGE, 11, IMAGE, 12, 13, 14, 15, images=[1, 2]),
        prompt(IMAGE, 50, images=[0]),
    ]


def batch_of(chosen: list[prompts_lib.Prompt], side: str = "right", row_length: int = T) -> batch_lib.Batch:
    return prompts_lib.prompt_batch(
        chosen, tokens_per_image=4, row_length=row_length, num_images=3, image_size=16, padding_side=side
    )


def run(
    batch, generation=GREEDY, end_tokens=(NEVER,), row_ids=None, config=CONFIG, graphdef=None
) -> generate_lib.Generated:
    own, params = model(config)
    out = generate_lib.generate(
        graphdef or own,
        params,
        batch,
        config=config,
        generation=generation,
        end_tokens=end_tokens,
        row_ids=row_ids,
    )
    return generate_lib.Generated(*(np.asarray(a) for a in out))


@functools.cache
def greedy() -> generate_lib.Generated:
    return run(batch_of(prompts()))


def test_cached_tokens_equal_those_of_a_full_forward_pass_at_every_step():
    graphdef, params = model()
    batch = batch_of(prompts(), row_length=T)
    lengths = batch.valid.sum(axis=1)
    rows = np.arange(len(lengths))

    @jax.jit
    def next_token(batch, last):
        net = nnx.merge(graphdef, params)
        return net.logits(net(batch, train=False).hidden[rows, last]).argmax(-1)

    found = []
    for step in range(NEW):
        token = np.asarray(next_token(batch, lengths + step - 1))
        found.append(token)
        at = lengths + step
        for array, value in ((batch.tokens, token), (batch.position, at), (batch.valid, True)):
            array[rows, at] = value
        batch.tree[rows, at], batch.branch[rows, at] = 1, 1
    expected = np.stack(found, axis=1)
    np.testing.assert_array_equal(greedy().tokens, expected)
    assert len(np.unique(expected)) > 5  # a model that repeats itself would prove little


@pytest.mark.parametrize("generation", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_of_uneven_prompts_gives_each_row_what_it_gets_alone(generation):
    together = run(batch_of(prompts()), generation)
    for i, prompt in enumerate(prompts()):
        alone = run(batch_of([prompt], row_length=T - 4), generation, row_ids=[i])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])


def test_left_and_right_padding_give_the_same_tokens():
    np.testing.assert_array_equal(run(batch_of(prompts(), "left")).tokens, greedy().tokens)


def test_a_row_reads_its_own_images():
    chosen = list(prompts())
    chosen[1] = dataclasses.replace(chosen[1], images=prompts()[2].images)
    changed = (run(batch_of(chosen)).tokens != greedy().tokens).any(axis=1)
    assert changed.tolist() == [False, True, False, False, False]


def test_an_end_token_stops_its_row_and_the_others_go_on():
    full = greedy().tokens
    end = int(full[1, 2])
    out = run(batch_of(prompts()), end_tokens=[end])
    for row in range(len(full)):
        hits = np.flatnonzero(full[row] == end)
        length = hits[0] if len(hits) else NEW
        assert (out.length[row], out.stopped[row]) == (length, bool(len(hits)))
        np.testing.assert_array_equal(out.tokens[row, : length + 1], full[row, : length + 1])
        assert not out.tokens[row, length + 1 :].any()
    assert out.length[1] <= 2
    assert (out.length == NEW).any()


def test_the_loop_ends_when_every_row_has(monkeypatch):
    steps = []
    decode = vlm.VLM.decode_step

    def counted(self, tokens, cache, *, active):
        jax.debug.callback(lambda: steps.append(1))
        return decode(self, tokens, cache, active=active)

    monkeypatch.setattr(vlm.VLM, "decode_step", counted)
    pair = prompts()[:2]
    ends = [int(t) for t in greedy().tokens[:2, 1]]
    out = run(batch_of(pair, row_length=T - 1), end_tokens=ends)  # a shape of its own, so it is traced here
    jax.effects_barrier()
    assert out.stopped.all()
    assert len(steps) == out.length.max() < NEW - 1


def test_sampling_repeats_for_a_seed_and_differs_for_another():
    first = run(batch_of(prompts()), SAMPLED).tokens
    np.testing.assert_array_equal(first, run(batch_of(prompts()), SAMPLED).tokens)
    other = run(batch_of(prompts()), dataclasses.replace(SAMPLED, seed=5)).tokens
    assert (first != other).any()
    assert (first != greedy().tokens).any()


def test_every_step_of_a_row_draws_afresh():
    flat = dataclasses.replace(SAMPLED, temperature=1e6, top_p=1.0)  # all tokens alike: only the draw decides
    tokens = run(batch_of(prompts()), flat).tokens
    assert min(len(set(row)) for row in tokens.tolist()) >= NEW - 2


def test_one_compilation_serves_all_weights_contents_seeds_and_temperatures():
    run(batch_of(prompts()))
    before = generate_lib._generate._cache_size()
    graphdef, params = model()
    double = jax.tree.map(lambda a: a * 2, params)
    for weights, generation in ((params, SAMPLED), (double, GREEDY), (params, dataclasses.replace(SAMPLED, seed=9))):
        generate_lib.generate(
            graphdef,
            weights,
            batch_of(prompts()[::-1], "left"),
            config=CONFIG,
            generation=generation,
            end_tokens=(NEVER,),
        )
    assert generate_lib._generate._cache_size() == before


def test_without_capacity_the_answer_does_not_depend_on_the_batch_whatever_the_training_dispatch():
    moe = dataclasses.replace(CONFIG.moe, dispatch="capacity", eval_capacity_factor=0.5, padding_takes_capacity=True)
    tight = dataclasses.replace(CONFIG, moe=moe)
    graphdef, params = model(tight)
    dropless = generate_lib.dropless_graphdef(graphdef, params)
    assert (run(batch_of(prompts()), config=tight).tokens != greedy().tokens).any()
    np.testing.assert_array_equal(run(batch_of(prompts()), config=tight, graphdef=dropless).tokens, greedy().tokens)
    assert nnx.merge(graphdef, params).decoder.groups[0].blocks[0].moe.config == moe  # the original is untouched


@pytest.mark.parametrize("generation", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_prompts_that_share_their_beginning_get_the_tokens_that_they_get_whole(generation, side):
    first, second = prompts()[1], prompts()[3]
    picture = first.images[0]
    chosen = [
        *prompts(),  # text alone has an empty beginning; the last one shares that of the second
        prompts_lib.Prompt(np.array([IMAGE, 17, 4, 4, 20], np.int32), (picture,)),
        prompts_lib.Prompt(np.array([3, IMAGE, 11, IMAGE, 9], np.int32), second.images),
    ]
    split = prompts_lib.split(chosen)
    assert split.prefix_of.tolist() == [0, 1, 2, 3, 1, 1, 3]
    shape = {"tokens_per_image": 4, "image_size": 16, "padding_side": side}
    fronts = prompts_lib.prompt_batch(split.prefixes, row_length=11, num_images=3, **shape)
    lengths = [prompts_lib.expanded_length(front.tokens, 4) for front in split.prefixes]
    rest = prompts_lib.prompt_batch(
        split.suffixes, row_length=8, num_images=0, first_positions=[lengths[i] for i in split.prefix_of], **shape
    )
    graphdef, params = model()
    shared = generate_lib.generate(
        graphdef,
        params,
        rest,
        config=CONFIG,
        generation=dataclasses.replace(generation, repetition_penalty=1.3),
        end_tokens=(NEVER,),
        prefixes=generate_lib.Prefixes(fronts, split.prefix_of),
    )
    whole = run(batch_of(chosen, side), dataclasses.replace(generation, repetition_penalty=1.3))
    np.testing.assert_array_equal(shared.tokens, whole.tokens)


def test_a_prompt_that_ends_with_its_image_cannot_be_split():
    with pytest.raises(ValueError, match="prompt 1 ends with an image"):
        prompts_lib.split([prompts()[0], prompts_lib.Prompt(np.array([4, IMAGE], np.int32), prompts()[1].images)])


def test_image_marks_expand_to_slots_of_the_right_image():
    first, second = (np.zeros((16, 16, 3), np.float32) for _ in range(2))
    prompt = prompts_lib.Prompt(np.array([3, IMAGE, 7, IMAGE], np.int32), (first, second))
    shared = prompts_lib.Prompt(np.array([IMAGE, 9], np.int32), (second,))
    batch = prompts_lib.prompt_batch(
        [prompt, shared], tokens_per_image=2, row_length=8, num_images=2, image_size=16, padding_side="left"
    )
    assert batch.tokens.tolist() == [[0, 0, 3, 0, 0, 7, 0, 0], [0, 0, 0, 0, 0, 0, 0, 9]]
    assert batch.image_slot.tolist() == [[-1, -1, -1, 0, 1, -1, 2, 3], [-1, -1, -1, -1, -1, 2, 3, -1]]
    assert batch.position.tolist() == [[0, 0, 0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0, 1, 2]]
    assert batch.valid.sum(axis=1).tolist() == [6, 3]
    assert prompts_lib.expanded_length(prompt.tokens, 2) == 6


def test_prompts_that_do_not_fit_are_refused_with_the_number_and_the_remedy():
    long = prompts_lib.Prompt(np.arange(1, T + 2, dtype=np.int32))
    with pytest.raises(ValueError, match=f"has {T + 1} tokens, the row has {T}"):
        batch_of([long])
    with pytest.raises(ValueError, match=f"prompt of {T + 1} tokens .* max_positions={T + NEW}"):
        run(batch_of([long], row_length=T + 1))
    with pytest.raises(ValueError, match="2 image marks and 1 images"):
        batch_of([prompts_lib.Prompt(np.array([IMAGE, IMAGE, 4]), prompts()[1].images)])
    with pytest.raises(ValueError, match="3 different images, the batch has room for 1"):
        prompts_lib.prompt_batch(prompts(), tokens_per_image=4, row_length=T, num_images=1, image_size=16)
    with pytest.raises(ValueError, match="row 0 of the prompts is empty"):
        run(batch_of([prompts_lib.Prompt(np.zeros(0, np.int32))]))

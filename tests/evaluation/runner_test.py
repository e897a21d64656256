"""Evaluation of a tiny untrained model: every question gets exactly the answer it gets alone."""

import dataclasses

import numpy as np
import pytest
import tokenizers
import transformers
from flax import nnx
from PIL import Image

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import bad_samples
from moe_vlm_jax.data import images as images_lib
from moe_vlm_jax.data import records as records_lib
from moe_vlm_jax.decoding import generate as generate_lib
from moe_vlm_jax.decoding import prompts as prompts_lib
from moe_vlm_jax.evaluation import blind, runner
from moe_vlm_jax.models import vlm

WORDS = ["<pad>", "</s>", "<unk>", "what", "is", "it", "how", "many", "bars", "red", "blue", "4", "7", "?"]

CONFIG = config_lib.RunConfig(
    model=config_lib.ModelConfig(
        vision=config_lib.VisionConfig(
            image_size=16, patch_size=8, embed_dim=12, mlp_dim=20, num_layers=2, num_heads=2, position_init_std=0.5
        ),
        decoder=config_lib.DecoderConfig(
            vocab_size=len(WORDS),
            embed_dim=24,
            mlp_dim=36,
            num_layers=2,
            num_heads=2,
            num_kv_heads=2,
            head_dim=12,
            rotary_dim=12,
            max_positions=48,
            embed_init_std=0.7,
        ),
        moe=config_lib.MoEConfig(num_experts=(3,), dispatch="capacity", eval_capacity_factor=0.5, block_rows=8),
        compute_dtype="float32",
        remat="none",
    ),
    data=config_lib.DataConfig(image_aspect="pad"),
    generation=config_lib.GenerationConfig(max_new_tokens=3),
    evaluation=config_lib.EvaluationConfig(batch_size=4, max_questions=0),
)
TRANSFORM = images_lib.transform_for(CONFIG.model.vision, CONFIG.data)


@pytest.fixture(scope="module")
def model():
    return nnx.split(vlm.VLM(CONFIG.model, rngs=nnx.Rngs(3)))


@pytest.fixture(scope="module")
def tokenizer():
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Nine questions about three pictures, one without, one about two; prompts of two lengths of row."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 16, 3), dtype=np.uint8)
        paths.append(str(folder / f"{i}.png"))
        Image.fromarray(pixels).save(paths[-1])

    def ask(i, question, answer, *pictures):
        marks = "<image>\n" * len(pictures)
        turns = (records_lib.Turn("human", marks + question), records_lib.Turn("gpt", answer))
        chosen = tuple(paths[p] for p in pictures)
        kind = "non-extractive" if answer.isdigit() else "image-span"
        return records_lib.Record(id=f"r{i}", images=chosen, turns=turns, answers=(answer, "?"), answer_type=kind)

    short, long = "what is it ?", "how many red bars is it ? how many blue bars is it ?"
    return [
        ask(0, short, "red", 0),
        ask(1, long, "4", 0),
        ask(2, short, "blue", 1),
        ask(3, "what is red ?", "7", 1),
        ask(4, short, "red", 2),
        ask(5, long, "7", 2),
        ask(6, short, "blue"),
        ask(7, "is it red ?", "4", 2),
        ask(8, long, "red", 1),
        dataclasses.replace(ask(9, short, "red", 0), answers=()),
    ]


def evaluate(model, tokenizer, records, config=CONFIG, **kwargs):
    questions = runner.prepare_questions(records, config, tokenizer, TRANSFORM)
    return runner.ask(*model, config, questions, tokenizer, TRANSFORM, **kwargs)


def texts(result) -> list[str]:
    return [row["prediction"] for row in result.predictions]


@pytest.fixture(scope="module")
def result(model, tokenizer, records):
    return evaluate(model, tokenizer, records)


def test_every_question_gets_the_answer_it_gets_alone_without_capacity(model, tokenizer, records, result):
    graphdef = generate_lib.dropless_graphdef(*model)
    for record, row in zip(records[:9], result.predictions, strict=True):
        tokens = [-200] * len(record.images) + tokenizer(blind.question_of(record)).input_ids
        pictures = tuple(TRANSFORM(image) for image in record.images)
        batch = prompts_lib.prompt_batch(
            [prompts_lib.Prompt(np.array(tokens, np.int32), pictures)],
            tokens_per_image=4,
            row_length=24,
            num_images=1,
            image_size=16,
        )
        out = generate_lib.generate(
            graphdef,
            model[1],
            batch,
            config=CONFIG.model,
            generation=CONFIG.generation,
            end_tokens=[1],
        )
        ids = np.asarray(out.tokens[0, : int(out.length[0])])
        assert (row["id"], row["prediction"]) == (record.id, " ".join(WORDS[i] for i in ids if i > 2))
        assert row["truncated"] == (not out.stopped[0])
    assert len(set(texts(result))) > 2  # a model that always says the same would prove little


def test_predictions_carry_the_question_the_answers_and_the_scores(records, result):
    row = result.predictions[1]
    assert row["question"] == "how many red bars is it ? how many blue bars is it ?"
    assert (row["answers"], row["answer_type"]) == (["4", "?"], "non-extractive")
    assert result.asked == records[:9]
    assert result.scores.count == 9
    assert {k: s.count for k, s in result.scores.per_type.items()} == {"image-span": 5, "non-extractive": 4}
    assert result.scores.anls == pytest.approx(np.mean([row["anls"] for row in result.predictions]))
    assert result.skipped == {"no_answers": 1}


def test_shuffled_images_ask_the_same_questions_about_other_pictures(model, tokenizer, records, result):
    shuffled = evaluate(model, tokenizer, records, shuffle_images=True)
    by_hand = evaluate(model, tokenizer, blind.shuffle_images(records[:9], seed=0))
    assert texts(shuffled) == texts(by_hand)
    assert texts(shuffled) != texts(result)
    assert shuffled.asked == result.asked
    assert texts(shuffled)[6] == texts(result)[6]  # no image to lose


def test_an_unreadable_image_stops_the_run_or_is_left_out_and_counted(model, tokenizer, records, result):
    broken = [*records, dataclasses.replace(records[0], id="broken", images=("/nowhere/x.png",))]
    with pytest.raises(bad_samples.SampleError, match=r"broken.*x\.png"):
        evaluate(model, tokenizer, broken)
    drop = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, on_bad_sample="drop"))
    rest = evaluate(model, tokenizer, broken, drop)
    assert rest.skipped == {"missing_image": 1, "no_answers": 1}
    assert texts(rest) == texts(result)


def test_a_limit_draws_from_the_whole_split_by_seed_and_drawing_again_changes_nothing(records):
    many = [dataclasses.replace(records[0], id=str(i)) for i in range(300)]
    drawn = runner.select_questions(many, limit=50, seed=1)
    numbers = [int(record.id) for record in drawn]
    assert len(drawn) == 50
    assert numbers == sorted(set(numbers))
    assert numbers[-1] > 250
    assert runner.select_questions(drawn, limit=50, seed=1) == drawn
    assert runner.select_questions(many, limit=50, seed=2) != drawn
    assert runner.select_questions(records, limit=0, seed=0) == records[:9]


def test_nothing_to_ask_is_an_error(model, tokenizer, records):
    with pytest.raises(ValueError, match="0 records have answers"):
        evaluate(model, tokenizer, records[9:])

"""Bad input as the main job meets it: one error with value, rule and remedy, nothing compiled, the workdir unspent."""

import io
import json
import pathlib
import re
import struct
import zlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from moe_vlm_jax import train, tree
from moe_vlm_jax.data import pipeline
from moe_vlm_jax.hf import readers, writers
from moe_vlm_jax.training import checkpoint
from tests.training import examples

COMPILED = "/jax/core/compile/backend_compile_duration"


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


QUESTION = "<image>\nwhich item has largest value ?"
GOOD = {"image": "good.png", "conversations": turns(QUESTION, "sun")}
TWICE_ASKED = [{"from": "human", "value": QUESTION}, *turns("which ?", "sun")]
# What is wrong -> (row beside good ones, what the message must say: value, rule, remedy).
ROWS = {
    "missing image": (GOOD | {"image": "none.png"}, r"none\.png' does not exist; every '<image>' needs its file; add"),
    "truncated image": (GOOD | {"image": "cut.png"}, r"cut\.png' cannot be decoded .*fetch it again or remove"),
    "no image": (GOOD | {"image": "page.png"}, r"page\.png' .* must be a whole JPEG, PNG"),
    "huge image": (GOOD | {"image": "huge.png"}, r"400000000 pixels\) exceeds limit of \d+ pixels.*; resize the file"),
    "turns": (
        GOOD | {"conversations": TWICE_ASKED},
        r"'human', 'gpt'\]; human and gpt must alternate; merge",
    ),
    "more marks": (
        GOOD | {"conversations": turns(f"<image>{QUESTION}", "sun")},
        "2 <image> marks and it has 1 images; each image needs one mark where it stands; add or remove",
    ),
    "fewer marks": (
        GOOD | {"image": ["good.png", "good.png"]},
        "1 <image> marks and it has 2 images; each image needs one mark where it stands; add or remove",
    ),
    "empty answer": (GOOD | {"conversations": turns(QUESTION, " ")}, "is an empty answer; an answer needs text; write"),
}
# A held-out question without an answer is left out and counted.
CASES = [(case, split) for split in ("train", "val") for case in ROWS if (case, split) != ("empty answer", "val")]


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(5).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def huge_png() -> bytes:
    """Returns a PNG whose header announces 20,000 x 20,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    chunks = [header, b"IEND"]
    packed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.fixture
def folder(tmp_path):
    """Good rows of both splits, and pictures of every kind."""
    for split, count in (("train", 8), ("val", 3)):
        (tmp_path / f"{split}.json").write_text(json.dumps([GOOD] * count))
    pictures = {"good": png(70, 50), "cut": png(40, 30)[:-200], "page": b"<html>not found</html>", "huge": huge_png()}
    for name, content in pictures.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    return tmp_path


@pytest.fixture
def compiled():
    """The programs compiled during the test."""
    found = []

    def listen(event: str, *_, **__) -> None:
        if event == COMPILED:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def config(folder, **changes):
    made = examples.run_config()
    made.data.source, made.data.path, made.data.image_folder = "llava", str(folder / "{split}.json"), str(folder)
    made.data.template, made.data.num_images = "plain_qa", 0
    for path, value in changes.items():
        section, name = path.split("__")
        setattr(getattr(made, section), name, value)
    return made


def refused(run_config, folder, compiled, capsys) -> str:
    """Returns the one error that the job ends with."""
    with pytest.raises(SystemExit) as error:
        train.train(run_config, folder / "run")
    assert error.value.code == 2
    assert not compiled
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    return said


def test_the_listener_sees_a_compilation(compiled):
    jax.block_until_ready(jax.jit(lambda x: x * 3.25)(np.arange(11.0)))
    assert compiled


@pytest.mark.parametrize(("case", "split"), CASES)
def test_a_bad_row_ends_the_job_before_anything_is_compiled(case, split, folder, compiled, capsys):
    row, message = ROWS[case]
    file = folder / f"{split}.json"
    file.write_text(json.dumps([*json.loads(file.read_text()), row]))
    said = refused(config(folder), folder, compiled, capsys)
    assert re.search(rf"sample '{split}\.json\[\d\]': .*{message}", said), said
    assert not (folder / "run").exists()


def test_bad_rows_may_be_left_out_and_are_counted(folder):
    rows = [GOOD, *(row for row, _ in ROWS.values())]
    (folder / "train.json").write_text(json.dumps(rows))
    data = pipeline.make_train_data(config(folder, data__on_bad_sample="drop"))
    assert data.report["samples"] == 1
    assert data.report["dropped"] == {
        "missing_image": 1,
        "unreadable_image": 2,
        "too_large_image": 1,
        "turns": 1,
        "image_marks": 2,
        "empty_answer": 1,
    }


@pytest.mark.parametrize("split", ["train", "val"])
def test_malformed_json_is_named_with_its_line(split, folder, compiled, capsys):
    (folder / f"{split}.json").write_text('[{"id": 1},\n {"id" 2}]\n')
    said = refused(config(folder), folder, compiled, capsys)
    assert re.search(rf"{split}\.json, line 2, column 8: .*; mend that", said), said
    assert not (folder / "run").exists()


def test_a_workdir_of_another_config_is_refused(folder, compiled, capsys):
    checkpoint.claim_workdir(folder / "run", config(folder))
    said = refused(config(folder, optimizer__learning_rate=0.125), folder, compiled, capsys)
    assert "optimizer.learning_rate: 0.003 in the workdir, 0.125 now" in said and "use another --workdir" in said


def corrupt(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def lose_reshape_and_add(path: pathlib.Path) -> None:
    tensors = {name: np.array(tensor.read()) for name, tensor in readers.open_checkpoint(path).items()}
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.gate_proj.weight"] = np.zeros((3, 16), np.float32)
    tensors["model.surprise"] = np.zeros(2, np.float32)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (corrupt, r"model\.safetensors is damaged: .*; download or copy it again"),
        (
            lose_reshape_and_add,
            r"(?s)1 missing tensor.*layers\.0\.mlp\.up_proj.*1 unused tensor.*surprise.*"
            r"gate_proj\.weight: the file has \(3, 16\), the model needs \(24, 16\).*complete the checkpoint",
        ),
    ],
)
def test_a_base_that_does_not_fit_is_refused_and_spends_no_workdir(spoil, message, folder, compiled, capsys):
    run_config = config(folder, training__base=str(folder / "base"))
    run_config.model.decoder.rotary_dim = 8  # as the checkpoint's family has it
    leaves = tree.leaves(examples.random_model(run_config.model, seed=1)[1])
    params = {path: np.asarray(variable[...]) for path, variable in leaves.items()}
    writers.write(folder / "base", params, run_config.model, layout="moe_llava")
    spoil(folder / "base" / "model.safetensors")
    compiled.clear()
    said = refused(run_config, folder, compiled, capsys)
    assert re.search(message, said), said
    assert not (folder / "run").exists()

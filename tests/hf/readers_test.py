"""Files of every kind, whole and damaged; safetensors' own library and torch are the judges."""

import json
import os
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

from moe_vlm_jax.hf import readers, writers

ARRAYS = {
    "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.half": np.arange(5, dtype=np.float16),
    "a.brain": np.arange(4).astype(ml_dtypes.bfloat16),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(2.5, np.float32),
    "ids": np.arange(3, dtype=np.int64),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(ARRAYS, path, metadata={"format": "pt"})
    return path


def assert_holds_arrays(tensors):
    assert set(tensors) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert tensors[name].shape == array.shape and tensors[name].dtype == array.dtype
        read = tensors[name].read()
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)


def test_safetensors_file_is_read_like_its_library_wrote_it(file):
    assert_holds_arrays(readers.open_checkpoint(file))
    assert_holds_arrays(readers.open_checkpoint(file.parent))


def test_safetensors_file_is_written_byte_for_byte_like_the_library(file, tmp_path):
    specs = {name: (array.shape, array.dtype) for name, array in ARRAYS.items()}
    writers.write_safetensors(tmp_path / "ours.safetensors", specs, ARRAYS.__getitem__)
    assert (tmp_path / "ours.safetensors").read_bytes() == file.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-torch-1.6"])
def test_torch_file_is_read_with_bfloat16(zipped, tmp_path):
    state = {
        name: torch.tensor(a.astype(np.float32) if a.dtype == ml_dtypes.bfloat16 else a) for name, a in ARRAYS.items()
    }
    state["a.brain"] = state["a.brain"].to(torch.bfloat16)
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_holds_arrays(readers.open_checkpoint(tmp_path))


def test_torch_file_that_would_run_code_is_refused_and_nothing_runs(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"weight": Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is damaged: torch.load\(weights_only=True\) refuses it"):
        readers.open_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_torch_file_without_torch_says_what_to_install(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"needs PyTorch to read; `pip install torch` or use a safetensors copy"):
        readers.open_checkpoint(tmp_path)


def test_torch_file_that_is_no_state_dict_is_refused(tmp_path):
    torch.save({"epoch": 3, "w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is no state dict: epoch hold"):
        readers.open_checkpoint(tmp_path)


def header_of(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header, rest) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def damage(kind, path) -> bytes:
    data = path.read_bytes()
    header, rest = header_of(path)
    match kind:
        case "truncated":
            return data[:-3]
        case "cut in the header":
            return data[:40]
        case "empty":
            return b""
        case "trailing bytes":
            return data + b"1234"
        case "an error page":
            return b"<!DOCTYPE html><html>404</html>"
        case "header is no JSON":
            return data[:8] + b"\xff" + data[9:]
        case "shape disagrees with bytes":
            header["b.weight"]["shape"] = [2, 4]
            return with_header(header, rest)
        case "tensor beyond the end":
            header["ids"]["data_offsets"] = [10_000, 10_024]
            return with_header(header, rest)
        case "negative offset":
            header["ids"]["data_offsets"] = [-24, 0]
            return with_header(header, rest)
    raise AssertionError(kind)


DAMAGES = (
    "truncated",
    "cut in the header",
    "empty",
    "trailing bytes",
    "an error page",
    "header is no JSON",
    "shape disagrees with bytes",
    "tensor beyond the end",
    "negative offset",
)


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_safetensors_file_is_one_error_naming_file_and_remedy(kind, file):
    file.write_bytes(damage(kind, file))
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: .*; download or copy it again\.") as error:
        readers.open_checkpoint(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [3, 200])
def test_truncated_torch_file_is_one_error_naming_it(cut, tmp_path):
    torch.save({"w": torch.ones(50)}, tmp_path / "pytorch_model.bin")
    data = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(data[:-cut])
    with pytest.raises(ValueError, match=r"pytorch_model.bin is damaged: .*; download or copy it again\."):
        readers.open_checkpoint(tmp_path)


def test_index_and_shards_that_disagree_are_reported_together(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(2), "twice": np.ones(3)}, tmp_path / "one.safetensors")
    safetensors.numpy.save_file({"b": np.ones(2), "twice": np.ones(3)}, tmp_path / "two.safetensors")
    places = {"a": "one", "lost": "one", "b": "two", "twice": "two", "c": "three"}
    index = {"weight_map": {name: f"{file}.safetensors" for name, file in places.items()}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError) as error:
        readers.open_checkpoint(tmp_path)
    message = str(error.value)
    assert "places tensor 'lost' in one.safetensors, which does not hold it" in message
    assert "tensor 'twice' is in both one.safetensors and two.safetensors" in message
    assert "three.safetensors is named by model.safetensors.index.json but does not exist" in message


def test_torch_shards_without_an_index_are_read(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.ones(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    assert {n: t.shape for n, t in readers.open_checkpoint(tmp_path).items()} == {"a": (2,), "b": (3,)}


def test_folder_without_weights_and_missing_folder_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"holds none of model.safetensors.index.json, .*; give a folder with one"):
        readers.open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"does not exist; give a local folder \(nothing is downloaded\)"):
        readers.open_checkpoint(tmp_path / "nowhere")


def test_json_error_names_the_line(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1,\n "b": }')
    with pytest.raises(ValueError, match=r"config.json is not valid JSON \(.*line 2"):
        readers.read_json(tmp_path / "config.json")


def test_opening_reads_no_weights(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"big": np.zeros(2_000_000, np.float32)}, path)
    tracemalloc.start()
    tensors = readers.open_checkpoint(path)
    assert float(tensors["big"].read()[5]) == 0
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()

"""Safetensors files as a mapping: what is read, and what is refused with everything that is wrong in one message."""

import json
import math
import struct

import ml_dtypes
import numpy as np
import pytest

from glmjax.model.shards import CheckpointError, Shards

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
}


def raw_file(file, header, data=b"", *, length=None):
    """A file of the format, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def file_of(file, tensors):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in tensors.items():
        kind = next(kind for kind, dtype in DTYPES.items() if array.dtype == dtype)
        end = len(data) + array.nbytes
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [len(data), end]}
        data += array.tobytes()
    raw_file(file, header, data)


def index_of(directory, where):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def numbers(*shape, dtype=np.float32):
    return np.arange(math.prod(shape)).reshape(shape).astype(dtype)


@pytest.mark.parametrize("kind", DTYPES)
def test_every_dtype_is_read_bit_by_bit(tmp_path, kind):
    # three bytes first: the second tensor is not aligned
    stored = {"odd": numbers(3, dtype=np.uint8), "matrix": numbers(3, 5, dtype=DTYPES[kind])}
    file_of(tmp_path / "model.safetensors", stored)
    shards = Shards.open(tmp_path)
    assert set(shards) == set(stored)
    assert shards["matrix"].dtype == DTYPES[kind]
    assert shards["matrix"].shape == (3, 5)
    assert shards["matrix"].read().tobytes() == stored["matrix"].tobytes()


def test_a_tensor_without_elements(tmp_path):
    file_of(tmp_path / "model.safetensors", {"none": numbers(0, 4), "some": numbers(2)})
    assert Shards.open(tmp_path)["none"].read().shape == (0, 4)


def test_a_tensor_is_mapped_not_copied(tmp_path):
    file_of(tmp_path / "model.safetensors", {"a": numbers(4, 4)})
    array = Shards.open(tmp_path)["a"].read()
    assert isinstance(array, np.memmap)
    assert not array.flags.writeable


def test_without_an_index_all_files_are_read(tmp_path):
    file_of(tmp_path / "model-1.safetensors", {"a": numbers(2)})
    file_of(tmp_path / "model-2.safetensors", {"b": numbers(3)})
    assert {name: tensor.shape for name, tensor in Shards.open(tmp_path).items()} == {"a": (2,), "b": (3,)}


def test_with_an_index_only_what_it_names_is_read(tmp_path):
    file_of(tmp_path / "one.safetensors", {"a": numbers(2), "unnamed": numbers(1)})
    raw_file(tmp_path / "other.safetensors", b"not for us")
    index_of(tmp_path, {"a": "one.safetensors"})
    assert set(Shards.open(tmp_path)) == {"a"}


def test_a_tensor_in_two_files_is_read_from_the_one_the_index_names(tmp_path):
    file_of(tmp_path / "1.safetensors", {"a": numbers(2) + 1, "b": numbers(1)})
    file_of(tmp_path / "2.safetensors", {"a": numbers(2) + 2, "c": numbers(1)})
    index_of(tmp_path, {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"})
    np.testing.assert_array_equal(Shards.open(tmp_path)["a"].read(), numbers(2) + 1)


def test_several_indices_are_joined(tmp_path):
    file_of(tmp_path / "model.safetensors", {"a": numbers(2)})
    file_of(tmp_path / "mtp.safetensors", {"b": numbers(2)})
    for name, tensor in (("model", "a"), ("mtp", "b")):
        weight_map = {"weight_map": {tensor: f"{name}.safetensors"}}
        (tmp_path / f"{name}.safetensors.index.json").write_text(json.dumps(weight_map))
    assert set(Shards.open(tmp_path)) == {"a", "b"}


# Refusals.


def refusal(directory, error=CheckpointError):
    with pytest.raises(error) as caught:
        Shards.open(directory)
    return str(caught.value)


def test_a_directory_without_files(tmp_path):
    assert "give a checkpoint's directory" in refusal(tmp_path, FileNotFoundError)


def test_all_files_that_are_absent_are_named(tmp_path):
    file_of(tmp_path / "1.safetensors", {"a": numbers(2)})
    index_of(tmp_path, {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"})
    message = refusal(tmp_path, FileNotFoundError)
    assert "2.safetensors, 3.safetensors" in message
    assert "1.safetensors" not in message


def test_all_tensors_that_the_files_lack_are_named_with_their_files(tmp_path):
    file_of(tmp_path / "1.safetensors", {"a": numbers(2)})
    file_of(tmp_path / "2.safetensors", {"d": numbers(2)})
    where = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors", "d": "1.safetensors"}
    index_of(tmp_path, where)  # d is in a file, but not in the one named
    assert "b in 1.safetensors, c in 2.safetensors, d in 1.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json is no index" in refusal(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_an_empty_file(tmp_path, size):
    (tmp_path / "model.safetensors").write_bytes(b"\0" * size)
    message = refusal(tmp_path)
    assert "model.safetensors is truncated or no safetensors file" in message
    assert f"{size} bytes" in message


def test_a_header_cut_off(tmp_path):
    raw_file(tmp_path / "model.safetensors", b'{"a', length=200)
    assert "is truncated or no safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("header", [b"not json", b"\xff\xfe{}", b'{"a": '])
def test_a_header_that_is_not_json(tmp_path, header):
    raw_file(tmp_path / "model.safetensors", header)
    assert "its header is not JSON" in refusal(tmp_path)


@pytest.mark.parametrize(
    "header", [[], {"a": 1}, {"a": {}}, {"a": {"dtype": "F32", "shape": [1]}}, {"a": {"dtype": "F32", "shape": 1}}]
)
def test_a_header_that_describes_no_tensors(tmp_path, header):
    raw_file(tmp_path / "model.safetensors", header)
    assert "its header describes no tensors" in refusal(tmp_path)


def test_data_cut_off(tmp_path):
    file = tmp_path / "model.safetensors"
    file_of(file, {"a": numbers(4), "b": numbers(4), "c": numbers(4)})
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-20])
    message = refusal(tmp_path)
    assert "model.safetensors is truncated" in message
    assert f"has {size - 20} bytes, but b ends at byte {size - 16}, c ends at byte {size}" in message
    assert "download it again" in message
    assert "a ends" not in message


def test_bytes_that_do_not_fit_the_shape(tmp_path):
    entries = {
        name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, end]} for name, end in (("a", 20), ("b", 24))
    }
    raw_file(tmp_path / "model.safetensors", entries, b"\0" * 24)
    message = refusal(tmp_path)
    assert "a [2, 3] has 20 bytes" in message
    assert "b [" not in message


def test_unsupported_dtypes_are_all_named_with_those_that_can_be_read(tmp_path):
    names = {"a": "F8_E8M0", "b": "F4", "c": "F32"}
    entries = {n: {"dtype": kind, "shape": [1], "data_offsets": [0, 4]} for n, kind in names.items()}
    raw_file(tmp_path / "model.safetensors", entries, b"\0" * 4)
    message = refusal(tmp_path)
    assert "a is F8_E8M0, b is F4" in message
    assert "BF16" in message
    assert "c is" not in message


def test_every_bad_file_is_named_in_one_message(tmp_path):
    file_of(tmp_path / "good.safetensors", {"a": numbers(1)})
    (tmp_path / "empty.safetensors").touch()
    raw_file(tmp_path / "page.safetensors", b"<html>")
    file_of(tmp_path / "short.safetensors", {"b": numbers(8)})
    (tmp_path / "short.safetensors").write_bytes((tmp_path / "short.safetensors").read_bytes()[:-1])
    message = refusal(tmp_path)
    for name in ("empty", "page", "short"):
        assert f"{name}.safetensors" in message
    assert "good.safetensors" not in message


def test_long_lists_are_cut_and_counted(tmp_path):
    file_of(tmp_path / "1.safetensors", {"a": numbers(1)})
    index_of(tmp_path, {f"t{n:02}": "1.safetensors" for n in range(20)})
    assert refusal(tmp_path).endswith("t07 in 1.safetensors and 12 more")

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from swaft.errors import StateError
from swaft.storage.hashing import hash_file
from swaft.storage.tensor_file import DTYPES, Spec, TensorFile, write_tensors

pytestmark = pytest.mark.unit


def some_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bytes as a tensor, whatever the dtype."""
    count = int(np.prod(shape)) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def every_dtype() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(3, 5), (), (0, 4), (7,), (2, 1, 3)]
    return {
        f"{code} {shape}": some_tensor(dtype, shape) for code, dtype in DTYPES.items() for shape in shapes
    }


def write(path, tensors, metadata=None):
    specs = {name: Spec.of(tensor) for name, tensor in tensors.items()}
    return write_tensors(path, specs, lambda name: [tensors[name]], metadata=metadata)


def test_the_safetensors_library_reads_what_is_written(tmp_path):
    tensors = every_dtype()
    write(tmp_path / "x.safetensors", tensors, metadata={"format": "pt", "ключ": '\u0001 " \\'})
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(loaded[name]) == bits(tensor), name
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "ключ": '\u0001 " \\'}


def test_what_the_safetensors_library_writes_is_read(tmp_path):
    tensors = every_dtype()
    save_file(tensors, tmp_path / "x.safetensors", metadata={"a": "b"})
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert file.specs == {name: Spec.of(tensor) for name, tensor in tensors.items()}
        assert file.metadata == {"a": "b"}
        for name, tensor in tensors.items():
            assert bits(file.read(name)) == bits(tensor), name


def test_names_keep_the_order_in_which_they_were_written(tmp_path):
    tensors = {name: torch.ones(2) for name in "cab"}
    write(tmp_path / "x.safetensors", tensors)
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert list(file.specs) == ["c", "a", "b"]


def test_tensors_without_elements_have_one_order_however_often_the_file_is_opened(tmp_path):
    names = [f"{number}" for number in range(9)]
    write(tmp_path / "x.safetensors", {name: torch.ones(0) for name in names})
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert list(file.specs) == names


def test_a_file_without_tensors_is_a_file(tmp_path):
    write(tmp_path / "x.safetensors", {})
    assert load_file(tmp_path / "x.safetensors") == {}
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert file.specs == {}


def test_any_slice_of_a_tensor_is_read(tmp_path):
    values = torch.randn(11, 7)
    write(tmp_path / "x.safetensors", {"before": torch.ones(3), "w": values})
    with TensorFile(tmp_path / "x.safetensors") as file:
        for start, end in [(0, 77), (0, 0), (77, 77), (5, 6), (13, 70)]:
            assert torch.equal(file.read("w", start, end), values.flatten()[start:end])
        out = torch.empty(10)
        assert file.read("w", 20, 30, out=out) is out
        assert torch.equal(out, values.flatten()[20:30])


def test_bytes_may_come_in_any_pieces(tmp_path):
    values = torch.arange(1000, dtype=torch.float32)
    specs = {"a": Spec(torch.float32, (400,)), "b": Spec(torch.float32, (600,))}
    pieces = {"a": values[:400].split(399), "b": (values[400:700], values[700:])}
    write_tensors(tmp_path / "x", specs, pieces.__getitem__)
    loaded = load_file(tmp_path / "x")
    assert torch.equal(torch.cat([loaded["a"], loaded["b"]]), values)


def test_the_record_is_the_size_and_digest_of_the_file(tmp_path):
    record = write(tmp_path / "x", {"w": torch.randn(3000, 1000)})
    assert record == hash_file(tmp_path / "x")
    assert record.bytes == (tmp_path / "x").stat().st_size


def test_the_header_is_padded_to_eight_bytes(tmp_path):
    for name in ("a", "ab", "abc", "é"):
        write(tmp_path / name, {name: torch.ones(1)})
        raw = (tmp_path / name).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        assert length % 8 == 0
        assert json.loads(raw[8 : 8 + length])


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path):
    kinds = {"a": torch.uint8, "b": torch.float32, "c": torch.bfloat16, "d": torch.float64}
    write(tmp_path / "x", {name: torch.ones(3, dtype=dtype) for name, dtype in kinds.items()})
    raw = (tmp_path / "x").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header.keys() == kinds.keys()
    assert not any(entry["data_offsets"][0] % kinds[name].itemsize for name, entry in header.items())


def write_pieces(path, pieces, then=lambda: None):
    def values(name):
        for piece in pieces:
            yield torch.zeros(piece)
        then()

    write_tensors(path, {"w": Spec(torch.float32, (100,))}, values)


@pytest.mark.parametrize("pieces", [[99], [101], [50, 51], []])
def test_bytes_that_were_not_announced_or_did_not_come_leave_no_file(tmp_path, pieces):
    with pytest.raises(StateError, match="bytes of tensors were written; expected the 400"):
        write_pieces(tmp_path / "x", pieces)
    assert not any(tmp_path.iterdir())


def test_an_exception_while_writing_leaves_no_file(tmp_path):
    with pytest.raises(KeyError):
        write_pieces(tmp_path / "x", [100], lambda: {}["something else"])
    assert not any(tmp_path.iterdir())


def test_nothing_has_the_name_until_the_file_is_whole(tmp_path):
    found = []
    write_pieces(tmp_path / "x", [100], lambda: found.extend(file.name for file in tmp_path.iterdir()))
    assert found == ["x.tmp"]
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_what_a_crash_left_beside_the_name_is_replaced(tmp_path):
    (tmp_path / "x.tmp").write_bytes(b"half a file")
    write(tmp_path / "x", {"w": torch.ones(3)})
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_a_link_that_somebody_put_beside_the_name_is_not_followed(tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "x.tmp").symlink_to(tmp_path / "precious")
    write(tmp_path / "x", {"w": torch.ones(3)})
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_an_existing_file_is_refused_and_kept(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(StateError, match="exists already; nothing was changed"):
        write(tmp_path / "x", {})
    assert (tmp_path / "x").read_bytes() == b"old"


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(StateError, match="exists already"):
        write_pieces(tmp_path / "x", [100], lambda: (tmp_path / "x").write_bytes(b"of somebody else"))
    assert (tmp_path / "x").read_bytes() == b"of somebody else"
    assert not (tmp_path / "x.tmp").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StateError, match=r"nowhere/x.tmp could not be created: No such file"):
        write(tmp_path / "nowhere" / "x", {})


def test_elements_and_tensors_that_do_not_exist_are_refused(tmp_path):
    write(tmp_path / "x", {"w": torch.ones(3)})
    with TensorFile(tmp_path / "x") as file:
        for start, end in [(0, 4), (-1, 2), (2, 1), (4, None)]:
            with pytest.raises(StateError, match="of 'w' were asked for, which has 3"):
                file.read("w", start, end)
        with pytest.raises(StateError, match="has no tensor 'v'"):
            file.read("v")
        with pytest.raises(ValueError, match=r"expected torch.float32 of"):
            file.read("w", out=torch.empty(2))
        with pytest.raises(ValueError, match=r"expected torch.float32 of"):
            file.read("w", out=torch.empty(3, dtype=torch.float64))


def test_what_the_format_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="complex128, which a file of tensors cannot hold"):
        write(tmp_path / "x", {"w": torch.ones(1, dtype=torch.complex128)})
    with pytest.raises(ValueError, match="cannot be called"):
        write(tmp_path / "x", {"__metadata__": torch.ones(1)})
    assert not any(tmp_path.iterdir())


def test_values_that_are_not_contiguous_are_refused(tmp_path):
    with pytest.raises(ValueError, match="contiguous"):
        write(tmp_path / "x", {"w": torch.ones(2, 4).T})
    assert not any(tmp_path.iterdir())

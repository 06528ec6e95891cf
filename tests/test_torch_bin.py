"""The reader of torch's .bin files: what torch wrote comes back, anything else is refused."""

import io
import json
import struct
import zipfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxprompt.t5.torch_bin import read_torch_bin
from jaxprompt.typing import UserError

GOLDEN = Path(__file__).parent / "golden"
FILES = ("torch_zip.bin", "torch_stream.bin")


def _expected() -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with np.load(GOLDEN / "torch_bin.npz") as arrays:
        values = dict(arrays)
    return values, json.loads(str(values.pop("dtypes")))


@pytest.mark.parametrize("name", FILES)
def test_values_shapes_and_dtypes_are_those_torch_wrote(name: str):
    values, dtypes = _expected()
    tensors = read_torch_bin(GOLDEN / name)
    assert list(tensors) == list(dtypes)
    for key, tensor in tensors.items():
        array = tensor.read()
        assert (tensor.shape, str(tensor.dtype)) == (values[key].shape, dtypes[key])
        np.testing.assert_array_equal(array.astype(np.float32), values[key], strict=True)


@pytest.mark.parametrize("name", FILES)
def test_tensors_are_views_of_the_file(name: str):
    tensors = read_torch_bin(GOLDEN / name)
    for key in ("float", "transposed", "part", "strided"):
        array = tensors[key].read()
        assert not array.flags.owndata and not array.flags.writeable
        assert np.shares_memory(array, tensors["shared"].read())


# a pickle by hand: `_dict` holds one tensor "w" of two floats in storage "0"
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQK%bK\x02\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
)
W = b"X\x01\x00\x00\x00w"


def _dict(items: bytes) -> bytes:
    return b"\x80\x02}(" + items + b"u."


def _tensor(offset: int = 0) -> bytes:
    return TENSOR.replace(b"%b", bytes([offset]))


def _archive(
    path: Path,
    pickled: bytes,
    storage: bytes = struct.pack("<2f", 1.0, 2.0),
    compression: int = zipfile.ZIP_STORED,
    extra: dict[str, bytes] | None = None,
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in {"data.pkl": pickled, "data/0": storage, **(extra or {})}.items():
            archive.writestr(f"model/{name}", content)
    return path


def test_a_hand_made_archive_is_read(tmp_path: Path):
    tensors = read_torch_bin(_archive(tmp_path / "a.bin", _dict(W + _tensor())))
    np.testing.assert_array_equal(tensors["w"].read(), np.float32([1, 2]), strict=True)


REFUSED = {
    "a call of os.system": (
        b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00echo\x85R.",
        "refused to load os.system",
    ),
    "builtins.eval by stack": (
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
        "refused to load builtins.eval",
    ),
    "another function of torch": (
        b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n.",
        "refused to load torch._utils._rebuild_sparse_tensor",
    ),
    "numpy's reconstruct": (
        _dict(W + b"cnumpy.core.multiarray\n_reconstruct\n)R"),
        "refused to load numpy.core.multiarray._reconstruct",
    ),
    "an object made by NEWOBJ": (
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        "the pickle opcode NEWOBJ",
    ),
    "a call of a string": (b"\x80\x02X\x01\x00\x00\x00a)R.", "a call of str"),
    "state for a list": (b"\x80\x02]}b.", "a state for list"),
    "a number among tensors": (_dict(W + b"K\x01"), "'w', which is int and no tensor"),
    "a list": (b"\x80\x02].", "list where a dict of tensors belongs"),
    "a module": (b"\x80\x02(X\x06\x00\x00\x00moduleK\x01K\x01K\x01K\x01tQ.", "a persistent id"),
    "a tensor without storage": (
        _dict(W + b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00K\x02\x85K\x01\x85tR"),
        "a tensor with metadata or without a storage",
    ),
    "a key set twice": (_dict(W + _tensor() + W + _tensor()), "'w' is set twice"),
    "a tensor past its storage": (_dict(W + _tensor(offset=1)), "damaged: "),
    "an unknown storage": (_dict(W + _tensor().replace(b"\x000X", b"\x009X")), "data/9"),
    "a pickle cut short": (b"\x80\x02}(", "damaged: "),
    "a pickle that takes what is not there": (b"\x80\x02\x86.", "takes more than it has put"),
    "no pickle": (b"hello", "damaged: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_everything_else_is_refused_and_named(case: str, tmp_path: Path):
    pickled, message = REFUSED[case]
    path = _archive(tmp_path / "evil.bin", pickled)
    with pytest.raises(UserError) as caught:
        for tensor in read_torch_bin(path).values():
            tensor.read()
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_the_stream_format_refuses_the_same(tmp_path: Path):
    content = (GOLDEN / "torch_stream.bin").read_bytes()
    path = tmp_path / "evil.bin"
    path.write_bytes(content.replace(b"ctorch\nHalfStorage", b"ctorch\nHalfStorags"))
    with pytest.raises(UserError, match=r"refused to load torch\.HalfStorags"):
        read_torch_bin(path)
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match="cut short"):
        read_torch_bin(path)


def test_compressed_and_big_endian_archives_are_refused(tmp_path: Path):
    pickled = _dict(W + _tensor())
    compressed = _archive(tmp_path / "a.bin", pickled, b"\0" * 800, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="data/0 is compressed"):
        read_torch_bin(compressed)
    big = _archive(tmp_path / "b.bin", pickled, extra={"byteorder": b"big"})
    with pytest.raises(UserError, match="big-endian"):
        read_torch_bin(big)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a pickle", b"\x80\x02K\x01."])
def test_other_files_are_no_torch_weights(content: bytes, tmp_path: Path):
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.bin"):
        read_torch_bin(path)


def test_a_pointer_of_git_lfs_is_told_from_weights(tmp_path: Path):
    path = tmp_path / "pytorch_model.bin"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        read_torch_bin(path)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # pickletools about garbage names
@pytest.mark.parametrize("name", FILES)
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=100)
def test_damage_never_does_more_than_raise(name: str, data: st.DataObject, tmp_path_factory):
    content = bytearray((GOLDEN / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    path = tmp_path_factory.mktemp("damaged") / "x.bin"
    path.write_bytes(content[:cut] if data.draw(st.booleans()) else content)
    try:
        for tensor in read_torch_bin(path).values():
            assert tensor.read().shape == tensor.shape
    except UserError:
        pass


def test_live_every_protocol_of_torch(tmp_path: Path):
    torch = pytest.importorskip("torch")
    values, _ = _expected()
    for protocol in (2, 3, 4, 5):
        path = tmp_path / f"{protocol}.bin"
        torch.save(
            {name: torch.from_numpy(value) for name, value in values.items()},
            path,
            pickle_protocol=protocol,
        )
        tensors = read_torch_bin(path)
        for name, value in values.items():
            np.testing.assert_array_equal(tensors[name].read(), value, strict=True)
    stream = io.BytesIO()
    torch.save({"weird": torch.nn.Linear(1, 1)}, stream)
    (tmp_path / "module.bin").write_bytes(stream.getvalue())
    with pytest.raises(UserError, match=r"refused to load torch\.nn\.modules\.linear\.Linear"):
        read_torch_bin(tmp_path / "module.bin")

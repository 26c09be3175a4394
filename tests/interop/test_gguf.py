"""GGUF files that lie, lack or surprise: refused by name, in bounded memory."""

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from models import config, make_run

from gemma_jax.errors import UserError
from gemma_jax.exchange import export_model, import_model
from gemma_jax.interop.blocks import pack_q4_0, pack_q8_0
from gemma_jax.interop.gguf import read_config, write_model
from gemma_jax.interop.gguf_file import GgufFile, TensorInfo, write_gguf
from gemma_jax.interop.names import weight_table

Q = GGMLQuantizationType
NORM = "blk.2.attn_norm.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run = make_run(folder / "run", config(embed_dim=32, mlp_dim=32, head_dim=8))
    export_model(run, folder / "a.gguf", format="gguf", dtype="f32")
    return folder / "a.gguf"


def refused(path: Path, match: str) -> None:
    """In memory of no more than a few times the file, and without a trace."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=match):
            import_model(path, path.parent / "again")
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()
    assert not list(path.parent.glob("again*"))


def rewritten(
    whole: Path,
    path: Path,
    *,
    fields: dict | None = None,
    tensors: Callable[[dict[str, np.ndarray]], object] | None = None,
) -> Path:
    """The file with other metadata (None takes a key away) or other tensors."""
    file = GgufFile(whole)
    metadata = {k: v for k, v in (file.fields | (fields or {})).items() if v is not None}
    metadata = {
        k: v.tolist() if isinstance(v, np.ndarray) and v.dtype == bool else v
        for k, v in metadata.items()
    }
    arrays = {name: file.read(name, 0, shape[0]) for name, shape in file.shapes.items()}
    if tensors is not None:
        tensors(arrays)
    infos = [TensorInfo(name, value.shape, Q.F32) for name, value in arrays.items()]
    data = ((name, [np.ascontiguousarray(value).tobytes()]) for name, value in arrays.items())
    write_gguf(path, metadata, infos, data)
    return path


def test_missing_surplus_and_misshaped_tensors(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    rewritten(whole, path, tensors=lambda t: t.pop(NORM))
    refused(path, f"has no tensor {NORM}, which its settings promise")
    rewritten(whole, path, tensors=lambda t: t.update(odd=np.zeros(3, np.float32)))
    refused(path, "has a tensor odd that Gemma 3")
    rewritten(whole, path, tensors=lambda t: t.update({NORM: np.zeros(31, np.float32)}))
    refused(path, rf"tensor {NORM} of .* has shape \(31,\), and its settings make it \(32,\)")


def test_bad_numbers(whole: Path, tmp_path: Path) -> None:
    for bad in (np.nan, np.inf):
        path = rewritten(whole, tmp_path / "a.gguf", tensors=lambda t, b=bad: t[NORM].fill(b))
        refused(path, f"tensor {NORM} of .* holds NaN or infinity")


@pytest.mark.parametrize("part", [0, 3, 20, 100, 0.01, 0.2, 0.5, 0.9, -32])
def test_truncated_files(whole: Path, tmp_path: Path, part: float) -> None:
    content = whole.read_bytes()
    end = int(part * len(content)) if isinstance(part, float) else part
    (tmp_path / "a.gguf").write_bytes(content[:end])
    refused(tmp_path / "a.gguf", "is no whole GGUF file")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"general.architecture": "llama"}, "'llama'; only 'gemma3'"),
        ({"general.architecture": None}, "None; only 'gemma3'"),
        ({"gemma3.block_count": None}, "lacks the key gemma3.block_count"),
        ({"gemma3.block_count": 2**31}, "2147483648 layers"),
        ({"gemma3.block_count": 0}, "0 layers"),
        ({"gemma3.block_count": "many"}, "does not describe a Gemma 3 model"),
        ({"gemma3.attention.head_count": 0}, "num_heads=0 must be positive"),
        ({"gemma3.attention.head_count_kv": 3}, "num_heads=4 must be a multiple"),
        ({"gemma3.attention.sliding_window_pattern": 0}, "does not describe a Gemma 3 model"),
        ({"gemma3.attention.sliding_window_pattern": [True]}, "pattern of 1 layers for 3"),
        ({"gemma3.rope.freq_base": float("nan")}, "global_rope_base=nan"),
        ({"gemma3.context_length": float("inf")}, "does not describe a Gemma 3 model"),
        ({"gemma3.rope.scaling.type": "yarn"}, "RoPE scaling 'yarn'"),
        ({"gemma3.embedding_length": 64}, "token_embd.weight of .* has shape"),
        ({"general.alignment": 7}, "general.alignment is 7"),
        ({"tokenizer.ggml.tokens": ["a"]}, "tokenizer"),
    ],
)
def test_bad_metadata(whole: Path, tmp_path: Path, fields: dict, match: str) -> None:
    refused(rewritten(whole, tmp_path / "a.gguf", fields=fields), match)


def header(*, tensors: int = 0, fields: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + body


def tensor(
    name: str = "t", shape: tuple = (4,), kind: int = 0, offset: int = 0, dims: int | None = None
) -> bytes:
    text = struct.pack("<Q", len(name)) + name.encode()
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    count = struct.pack("<I", len(shape) if dims is None else dims)
    return text + count + sizes + struct.pack("<IQ", kind, offset)


def field(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


LONG = struct.pack("<Q", 2**60)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"GGML", "does not begin with the mark GGUF"),
        (header(version=1), "version 1"),
        (header(tensors=2**60), "claims 1152921504606846976 tensors"),
        (header(fields=2**60), "claims 1152921504606846976 metadata fields"),
        (header(fields=1, body=LONG + bytes(20)), "claims 1152921504606846976 bytes in a meta"),
        (header(fields=1, body=field("k", 8, LONG + bytes(9))), "bytes in k"),
        (header(fields=1, body=field("k", 9, struct.pack("<I", 8) + LONG)), "strings in k"),
        (header(fields=1, body=field("k", 9, struct.pack("<I", 6) + LONG)), "numbers in k"),
        (header(fields=1, body=field("k", 9, struct.pack("<I", 9) + LONG)), "type 9 in an array"),
        (header(fields=1, body=field("k", 77, bytes(9))), "k is of the unknown type 77"),
        (header(fields=2, body=field("k", 0, b"1") * 2), "metadata k comes twice"),
        (header(fields=1, body=struct.pack("<Q", 2) + b"\xff\xfe" + bytes(9)), "decode"),
        (header(tensors=1, body=tensor(dims=2**31)), "tensor t has 2147483648 dimensions"),
        (header(tensors=1, body=tensor(shape=())), "tensor t has 0 dimensions"),
        (header(tensors=1, body=tensor(shape=(0,))), r"tensor t of shape \(0,\)"),
        (header(tensors=1, body=tensor(shape=(33,), kind=2)), r"t of shape \(33,\) does not fit"),
        (header(tensors=1, body=tensor(kind=999)), "tensor t is of the unknown type 999"),
        (header(tensors=1, body=tensor(offset=2**63)), "tensor t of 16 bytes at .* outside"),
        (header(tensors=1, body=tensor(offset=1) + bytes(99)), "tensor t of 16 bytes"),
        (header(tensors=1, body=tensor(shape=(2**62, 2**62))), "tensor t of .* outside"),
        (header(tensors=2, body=tensor() * 2 + bytes(99)), "tensor t comes twice"),
    ],
)
def test_hostile_headers(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    refused(tmp_path / "a.gguf", match)


def test_other_spellings_of_the_pattern(whole: Path, tmp_path: Path) -> None:
    """A number n makes every n-th layer global; without a window all of them are."""
    key = "gemma3.attention.sliding_window"
    path = tmp_path / "a.gguf"
    rewritten(whole, path, fields={key + "_pattern": 2})
    assert read_config(GgufFile(path)).layer_letters == "LGL"
    rewritten(whole, path, fields={key + "_pattern": None})
    assert read_config(GgufFile(path)).layer_letters == "LLL"
    rewritten(whole, path, fields={key: None})
    assert read_config(GgufFile(path)).layer_letters == "GGG"


def test_damaged_exact_norms_are_passed_over(whole: Path, tmp_path: Path) -> None:
    """They are a key of our own: a file without, or with others, still holds 1 + w."""
    for value in (None, "text", np.zeros(5, np.float32), ["a", "b"]):
        path = tmp_path / "a.gguf"
        rewritten(whole, path, fields={"gemma_jax.norms": value})
        import_model(path, tmp_path / f"again {type(value).__name__}")


def test_blocks_by_hand() -> None:
    """The first value of the largest magnitude sets Q4_0's scale and sign."""
    row = np.zeros((1, 32), np.float32)
    row[0, :3] = [4, -4, 2]
    packed = pack_q4_0(row)
    assert packed.shape == (1, 18)
    assert packed[0, :2].view("<f2")[0] == -0.5
    assert (packed[0, 2:5] & 15).tolist() == [0, 15, 4]
    row[0, :4] = [127, -126.5, 63.5, -0.4]
    packed = pack_q8_0(row)
    assert packed.shape == (1, 34)
    assert packed[0, :2].view("<f2")[0] == 1
    assert packed[0, 2:6].view(np.int8).tolist() == [127, -127, 64, 0]
    assert not pack_q8_0(np.zeros((1, 32), np.float32)).any()
    assert np.isfinite(pack_q4_0(np.full((1, 32), 1e-42, np.float32))).all()


@pytest.mark.parametrize("dtype", ["f16", "q8_0", "q4_0"])
def test_what_a_half_cannot_hold_is_refused(tmp_path: Path, dtype: str) -> None:
    table = {weight.gguf: weight for weight in weight_table(config())}
    norm, up = table[NORM], table["blk.1.ffn_up.weight"]
    rows = {NORM: np.zeros(norm.shape, np.float32), up.gguf: np.ones(up.foreign_shape, np.float32)}
    rows[up.gguf][5, 7] = -1e8
    with pytest.raises(UserError, match=rf"{up.gguf} .* 1e\+08, too large for {dtype}"):
        write_model(
            tmp_path / "x.gguf", {}, [up, norm], lambda weight: iter([rows[weight.gguf]]), dtype
        )

"""Random small models of every kind, exported and run by others; logits must agree.

Ours and transformers differ by rounding alone. llama.cpp looks GELU up in a float16 table.
"""

from pathlib import Path

import numpy as np
import pytest
from clients import clients
from models import VOCAB, config, logits_of, make_run

from gemma_jax.data.tokenizer import BOS
from gemma_jax.errors import UserError
from gemma_jax.exchange import export_model, import_model
from gemma_jax.interop.blocks import pack_q4_0, pack_q8_0

pytestmark = pytest.mark.clients

CASES = {
    "global": config(attn_pattern="G", num_kv_heads=1, sliding_window=512),
    "local": config(attn_pattern="L", num_kv_heads=4, sliding_window=8),
    "window_of_one": config(attn_pattern="L", sliding_window=1),
    "one_to_one": config(attn_pattern="LG", num_layers=5, head_dim=128, tied_embedding=False),
    "rope_scaled": config(
        embed_dim=96,
        num_layers=7,
        num_heads=6,
        num_kv_heads=3,
        global_rope_scale=8.0,
        max_seq_len=1024,
    ),
    "gemma": config(
        attn_pattern="LLLLLG", num_layers=8, num_kv_heads=1, head_dim=256, global_rope_scale=8.0
    ),
    "softcap": config(attn_pattern="LLLLLG", num_layers=13, final_softcap=3.0, sliding_window=32),
    "everything": config(
        attn_pattern="GLL",
        num_layers=5,
        num_kv_heads=4,
        head_dim=96,
        sliding_window=300,
        local_rope_base=500.0,
        global_rope_base=20_000.0,
        global_rope_scale=2.5,
        final_softcap=5.0,
        tied_embedding=False,
        norm_eps=1e-5,
    ),
    "padded": config(vocab_size=VOCAB + 24),
    "narrow": config(embed_dim=36, mlp_dim=56, head_dim=24, num_heads=3, num_kv_heads=1),
    # llama.cpp takes 62 layers for the 27B, whose query scale is another.
    "deep": config(
        num_layers=62, num_heads=2, num_kv_heads=1, query_scale=32**-0.5, attn_pattern="LLLLLG"
    ),
    "hf_only": config(query_scale=10**-0.5, local_rope_scale=2.0),
}
REFUSED = {
    "query_scale": config(query_scale=11**-0.5),
    "local_rope_scale": config(local_rope_scale=2.0),
    "attn_softcap": config(attn_softcap=5.0),
    "qk_norm": config(qk_norm=False),
    "post_norms": config(post_norms=False),
}
TOKENS = [
    [BOS, *np.random.default_rng(seed).integers(107, VOCAB, 70).tolist()] for seed in range(2)
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for seed, (name, case) in enumerate(CASES.items()):
        make_run(folder / name, case, seed=seed)
    return folder


@pytest.fixture(scope="module")
def ours(runs: Path) -> dict[str, list[np.ndarray]]:
    return {name: logits_of(runs / name, TOKENS) for name in CASES}


def check(ours: dict, outs: Path, atol: float) -> None:
    """`atol` for a few layers; rounding adds up over many."""
    worst, wrong = {}, {}
    for name in sorted(path.name for path in outs.iterdir() if path.is_dir()):
        pairs = list(zip(ours[name], clients.logits(outs / name, len(TOKENS)), strict=True))
        worst[name] = max(float(np.abs(a - b).max()) for a, b in pairs)
        spread = max(float(a.std()) for a, _ in pairs)
        assert spread > 0.5, f"{name} has nothing to compare"
        if not worst[name] <= atol * max(1, CASES[name].num_layers / 15):
            wrong[name] = worst[name]
    print({name: f"{value:.1e}" for name, value in worst.items()})
    assert worst
    assert not wrong


def test_transformers(runs: Path, ours: dict, tmp_path: Path) -> None:
    jobs = []
    for name in CASES:
        export_model(runs / name, tmp_path / "hf" / name, format="hf", dtype="f32")
        out = tmp_path / "out" / name
        jobs.append({"model": str(tmp_path / "hf" / name), "tokens": TOKENS, "out": str(out)})
    clients.run("transformers", jobs, tmp_path)
    check(ours, tmp_path / "out", 5e-5)


def test_llama_cpp(runs: Path, ours: dict, tmp_path: Path) -> None:
    jobs = []
    for name in CASES:
        if name == "hf_only":
            continue
        export_model(runs / name, tmp_path / f"{name}.gguf", format="gguf", dtype="f32")
        out = tmp_path / "out" / name
        jobs.append({"model": str(tmp_path / f"{name}.gguf"), "tokens": TOKENS, "out": str(out)})
    clients.run("llama_cpp", jobs, tmp_path)
    check(ours, tmp_path / "out", 1e-2)


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "bf16", "f16"])
def test_llama_cpp_reads_every_type(runs: Path, tmp_path: Path, name: str) -> None:
    """Against the same file imported again: what the file holds, without what packing costs."""
    path = tmp_path / "a.gguf"
    export_model(runs / "gemma", path, format="gguf", dtype=name)
    import_model(path, tmp_path / "again")
    jobs = [{"model": str(path), "tokens": TOKENS, "out": str(tmp_path / "out" / "gemma")}]
    clients.run("llama_cpp", jobs, tmp_path)
    # What is multiplied is rounded to the same type (0.1 to 0.2 here); a wrong layout moves > 2.
    check({"gemma": logits_of(tmp_path / "again", TOKENS)}, tmp_path / "out", 0.4)


def test_mlx(runs: Path, ours: dict, tmp_path: Path) -> None:
    """mlx-lm knows one global layer in each sliding_window_pattern, in the last place."""
    jobs = []
    for name in ("global", "one_to_one", "rope_scaled", "gemma"):
        export_model(runs / name, tmp_path / "hf" / name, format="hf", dtype="f32")
        out = tmp_path / "out" / name
        jobs.append({"model": str(tmp_path / "hf" / name), "tokens": TOKENS, "out": str(out)})
    clients.run("mlx", jobs, tmp_path)
    check(ours, tmp_path / "out", 0.1)


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_blocks_are_llama_cpps(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4096, 256)).astype(np.float32)
    rows *= np.exp(rng.standard_normal((4096, 1)) * 4).astype(np.float32)
    rows[0] = 0
    rows[1, ::2] = 0
    rows[2] = 1e-30
    rows[3] = np.where(np.arange(256) % 3, 1, -1)  # equal magnitudes of both signs
    rows[4] = np.arange(256) / 2  # halves
    rows[5] = -rows[4]
    np.save(tmp_path / "rows.npy", rows)
    out = tmp_path / "out"
    job = {"quantize": kind, "rows": str(tmp_path / "rows.npy"), "out": str(out)}
    clients.run("llama_cpp", [job], tmp_path)
    assert not (out / "error.txt").exists(), (out / "error.txt").read_text()
    pack = {"q4_0": pack_q4_0, "q8_0": pack_q8_0}[kind]
    ours, theirs = pack(rows), np.load(out / "blocks.npy")
    different = np.flatnonzero((ours != theirs).any(axis=1))
    assert not different.size, different


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_be_told_is_refused(tmp_path: Path, name: str) -> None:
    make_run(tmp_path / "run", REFUSED[name])
    with pytest.raises(UserError, match=f"cannot be told model.{name}="):
        export_model(tmp_path / "run", tmp_path / "a.gguf", format="gguf", dtype="f32")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

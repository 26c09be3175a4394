"""The architecture as data: one dataclass, and the published Gemma 3 sizes as presets.

Sources: Gemma 3 technical report (arXiv 2503.19786), Table 1 and section 2;
google-deepmind/gemma `gemma/gm/nn/_gemma.py`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from gemma_jax.errors import UserError, require_positive
from gemma_jax.ops.attention import Backend
from gemma_jax.ops.vocab_loss import HeadBackend, LogitsDtype

LOCAL, GLOBAL = "L", "G"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Gemma 3, and the neighbours of it that an ablation may want.

    `attn_pattern` says what each layer attends to: "L" a sliding window, "G" everything before
    it. The pattern repeats and is cut at `num_layers`; window, RoPE base and cache shape follow
    from the letter.
    """

    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int = 32_768
    attn_pattern: str = "LLLLLG"
    sliding_window: int = 512  # tokens, the current one included
    local_rope_base: float = 10_000.0
    global_rope_base: float = 1_000_000.0
    local_rope_scale: float = 1.0
    global_rope_scale: float = 1.0  # positions are divided by it (linear scaling)
    query_scale: float | None = None  # None: head_dim ** -0.5
    qk_norm: bool = True
    attn_softcap: float | None = None  # Gemma 2: 50
    final_softcap: float | None = None  # Gemma 2: 30
    post_norms: bool = True
    tied_embedding: bool = True
    norm_eps: float = 1e-6
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # parameters are always float32
    remat: Literal["none", "dots", "full"] = "none"  # what backward computes anew: see transformer
    attn_backend: Backend = "auto"
    head_backend: HeadBackend = "auto"
    head_logits_dtype: LogitsDtype = "compute"  # of the matmul that makes a training loss's logits
    unroll: bool | None = None  # no scan over periods; None: see transformer

    def __post_init__(self) -> None:
        letters = set(self.attn_pattern)
        if not letters or letters - {LOCAL, GLOBAL}:
            raise UserError(
                f"model.attn_pattern={self.attn_pattern!r} must be made of the letters L (local) "
                "and G (global), such as 'LLLLLG'."
            )
        require_positive(self, "vocab_size", "embed_dim", "mlp_dim", "num_layers", "num_heads")
        require_positive(self, "num_kv_heads", "head_dim", "max_seq_len", "sliding_window")
        require_positive(self, "local_rope_base", "global_rope_base", "local_rope_scale")
        require_positive(self, "global_rope_scale", "norm_eps")
        require_positive(self, "query_scale", "attn_softcap", "final_softcap")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads={self.num_heads} must be a multiple of "
                f"model.num_kv_heads={self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} must be even: RoPE rotates pairs.")

    @property
    def q_scale(self) -> float:
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    @property
    def num_periods(self) -> int:
        """Whole repetitions of the pattern; they run as one scan."""
        return self.num_layers // len(self.attn_pattern)

    @property
    def remainder(self) -> str:
        """The letters of the layers behind the last whole period; they run unrolled."""
        return self.attn_pattern[: self.num_layers % len(self.attn_pattern)]

    @property
    def layer_letters(self) -> str:
        """One letter a layer, from the first to the last."""
        return self.attn_pattern * self.num_periods + self.remainder

    def window(self, letter: str) -> int | None:
        return self.sliding_window if letter == LOCAL else None

    def rope(self, letter: str) -> tuple[float, float]:
        """(base, scale) of a layer of this letter."""
        if letter == LOCAL:
            return self.local_rope_base, self.local_rope_scale
        return self.global_rope_base, self.global_rope_scale

    def attended(self, letter: str, seq_len: int) -> float:
        """Mean number of keys that a query of a full sequence sees."""
        window = min(self.window(letter) or seq_len, seq_len)
        return window - window * (window - 1) / 2 / seq_len


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    embedding: int
    other: int

    @property
    def total(self) -> int:
        return self.embedding + self.other


def parameter_table(config: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """(what, parameters in one, how many of them), the whole model in reading order."""
    c = config
    yield "embedding", c.vocab_size * c.embed_dim, 1
    yield "query", c.embed_dim * c.num_heads * c.head_dim, c.num_layers
    yield "key, value", 2 * c.embed_dim * c.num_kv_heads * c.head_dim, c.num_layers
    yield "attention output", c.num_heads * c.head_dim * c.embed_dim, c.num_layers
    if c.qk_norm:
        yield "query and key norm", 2 * c.head_dim, c.num_layers
    yield "gate, up, down", 3 * c.embed_dim * c.mlp_dim, c.num_layers
    yield "block norms", (4 if c.post_norms else 2) * c.embed_dim, c.num_layers
    yield "final norm", c.embed_dim, 1
    if not c.tied_embedding:
        yield "output embedding", c.vocab_size * c.embed_dim, 1


def count_parameters(config: ModelConfig) -> ParameterCount:
    rows = list(parameter_table(config))
    embedding = sum(size * times for what, size, times in rows if what.endswith("embedding"))
    return ParameterCount(embedding, sum(size * times for _, size, times in rows) - embedding)


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Floating-point operations of one training step for each token, forward and backward.

    2 a parameter of every matrix forward (the embedding lookup is free, the head counts once),
    plus 4 * heads * head_dim a key that the mean query sees, window and causality counted; the
    backward pass costs twice the forward. Recomputation (remat) is not counted: the number is for
    model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B).
    """
    c = config
    matrices = sum(
        size * times
        for what, size, times in parameter_table(c)
        if "norm" not in what and "embedding" not in what
    )
    head = c.vocab_size * c.embed_dim
    keys = sum(c.attended(letter, seq_len) for letter in c.layer_letters)
    return round(3 * (2 * (matrices + head) + 4 * c.num_heads * c.head_dim * keys))


def gemma3_270m() -> ModelConfig:
    return ModelConfig(
        vocab_size=262_144,
        embed_dim=640,
        mlp_dim=2048,
        num_layers=18,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
    )


def gemma3_1b() -> ModelConfig:
    return dataclasses.replace(gemma3_270m(), embed_dim=1152, mlp_dim=6912, num_layers=26)


def gemma3_4b() -> ModelConfig:
    return ModelConfig(
        vocab_size=262_144,
        embed_dim=2560,
        mlp_dim=10_240,
        num_layers=34,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        max_seq_len=131_072,
        sliding_window=1024,
        global_rope_scale=8.0,
    )


def gemma3_12b() -> ModelConfig:
    return dataclasses.replace(
        gemma3_4b(), embed_dim=3840, mlp_dim=15_360, num_layers=48, num_heads=16, num_kv_heads=8
    )


def gemma3_27b() -> ModelConfig:
    return dataclasses.replace(
        gemma3_4b(),
        embed_dim=5376,
        mlp_dim=21_504,
        num_layers=62,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        query_scale=168**-0.5,
    )


def tiny() -> ModelConfig:
    """A model for tests: every kind of layer, a remainder, grouped heads; compiles in a second."""
    return ModelConfig(
        vocab_size=128,
        embed_dim=32,
        mlp_dim=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_seq_len=64,
        attn_pattern="LLG",
        sliding_window=8,
        compute_dtype="float32",
    )


def small() -> ModelConfig:
    """About one million parameters beside the embedding: real training on a laptop."""
    return ModelConfig(
        vocab_size=4096,
        embed_dim=128,
        mlp_dim=512,
        num_layers=4,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        max_seq_len=2048,
        attn_pattern="LLLG",
        sliding_window=128,
        compute_dtype="float32",
    )


PRESETS = {
    preset.__name__: preset
    for preset in (gemma3_270m, gemma3_1b, gemma3_4b, gemma3_12b, gemma3_27b, small, tiny)
}

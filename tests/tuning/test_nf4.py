"""NF4 bit for bit against an oracle that looks at every level, and as a matrix of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.tuning.nf4 import LEVELS, SCALE_LEVELS, dequantise, pack, quantise

PUBLISHED = [  # QLoRA, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def nearest(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return np.abs(x[:, None] - levels[None]).argmin(axis=1)


def oracle(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes one a value, codes of the scales, float32 values read back), block by block."""
    levels = np.array(PUBLISHED, np.float32)
    blocks = [values[i : i + 64] for i in range(0, len(values), 64)]
    magnitudes = np.array([np.abs(block).max() for block in blocks], np.float32)
    codes = [
        nearest(block * np.float32(1 / m if m else 0), levels)
        for block, m in zip(blocks, magnitudes, strict=True)
    ]
    offset = np.float32(np.mean(magnitudes, dtype=np.float64))
    scales, read = [], []
    for i in range(0, len(magnitudes), 256):
        part = magnitudes[i : i + 256] - offset
        largest = np.abs(part).max()
        scales.append(nearest(part * np.float32(1 / largest if largest else 0), SCALE_LEVELS))
        read.append(SCALE_LEVELS[scales[-1]] * largest + offset)
    back = [levels[c] * s for c, s in zip(codes, np.concatenate(read), strict=True)]
    return np.concatenate(codes), np.concatenate(scales), np.concatenate(back)


def cases() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(64 * 600).astype(np.float32) * 0.02
    wild = normal * np.repeat(np.exp(rng.standard_normal(600) * 3), 64).astype(np.float32)
    ties = np.tile((np.array(PUBLISHED[:-1]) + np.array(PUBLISHED[1:])) / 2, 64)[: 15 * 64]
    ties = np.concatenate([np.r_[ties[i : i + 15], 1.0, np.zeros(48)] for i in range(0, 60, 15)])
    return {
        "normal": normal,
        "wild": wild,
        "zeros": np.zeros(256, np.float32),
        "ties": ties.astype(np.float32),
        "partial": normal[:1001],
        "one": normal[:1],
    }


@pytest.mark.parametrize("name", cases())
def test_bits_are_those_of_the_oracle(name: str) -> None:
    values = cases()[name]
    codes, scales, back = oracle(values)
    packed = quantise(values)
    unpacked = np.stack([packed.codes >> 4, packed.codes & 15], axis=-1).ravel()
    np.testing.assert_array_equal(unpacked[: len(values)], codes)
    np.testing.assert_array_equal(packed.scales, scales)
    for read in (dequantise, jax.jit(dequantise)):
        ours = np.asarray(read(packed))
        np.testing.assert_array_equal(ours[: len(values)], back)
        assert not ours[len(values) :].any()


def test_levels_are_the_published_ones() -> None:
    np.testing.assert_array_equal(LEVELS, np.array(PUBLISHED, np.float32))
    middles = [
        10.0 ** (decade - 6) * (0.1 + 0.9 * (i + 0.5) / 2**decade)
        for decade in range(7)
        for i in range(2**decade)
    ]
    wanted = np.sort([*middles, *(-x for x in middles), 0.0, 1.0])
    np.testing.assert_allclose(SCALE_LEVELS, wanted, rtol=3e-7)


def test_a_parameter_takes_a_quarter_of_bfloat16() -> None:
    value = np.random.default_rng(0).standard_normal((3, 640, 2048)).astype(np.float32)
    size = sum(x.nbytes for x in jax.tree.leaves(pack(value, 1, stacked=True)))
    assert size / (2 * value.size) < 0.26


@pytest.mark.parametrize(
    ("shape", "inputs"), [((64, 4, 24), 1), ((4, 24, 64), 2), ((48, 40), 1), ((64, 7), 1)]
)
def test_a_packed_matrix_multiplies_as_its_array(shape: tuple[int, ...], inputs: int) -> None:
    """Blocks run over [out, in]; the gradient of x needs the matrix again."""
    value = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    matrix = pack(value, inputs, stacked=False)
    foreign = value.reshape(int(np.prod(shape[:inputs])), -1).T
    wanted = oracle(foreign.ravel())[2].reshape(foreign.shape).T.reshape(shape)
    np.testing.assert_array_equal(matrix.array(), wanted)
    x = jax.random.normal(jax.random.key(0), (2, 3, *shape[:inputs]))

    def product(x):
        return jnp.sin(matrix.multiply(x, inputs)).sum()

    def dense(x):
        return jnp.sin(jnp.tensordot(x, jnp.asarray(wanted), inputs)).sum()

    ours, theirs = (jax.value_and_grad(f)(x) for f in (product, dense))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=2e-4)


@pytest.mark.parametrize("width", [128, 40])
def test_rows_of_a_packed_table(width: int) -> None:
    value = np.random.default_rng(0).standard_normal((300, width)).astype(np.float32)
    table = pack(value, 0, stacked=False)
    ids = jnp.array([[0, 299, 7], [130, 131, 7]])
    np.testing.assert_array_equal(table.lookup(ids), table.array()[ids])
    x = jax.random.normal(jax.random.key(0), (2, width))
    np.testing.assert_allclose(table.scores(x), x @ table.array().T, rtol=0, atol=1e-4)

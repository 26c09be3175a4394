"""ggml's Q4_0 and Q8_0, packed as its C reference packs them, bit for bit.

Source: ggml `quantize_row_q4_0_ref` and `quantize_row_q8_0_ref`. Each block is 32 contiguous values
of a row with one float16 scale d. All arithmetic is float32 without fused multiply-add.
"""

import numpy as np

BLOCK = 32


def pack_q4_0(rows: np.ndarray) -> np.ndarray:
    """[n, k] float32 -> uint8 [n, k / 32 * 18].

    d = m / -8 with m the value of the largest magnitude, sign kept, the first of equals;
    q = min(15, trunc(x / d + 8.5)); byte j holds q[j] and, above it, q[j + 16].
    """
    blocks = rows.astype(np.float32).reshape(-1, BLOCK)
    first = np.abs(blocks).argmax(axis=1)[:, None]
    d = np.take_along_axis(blocks, first, axis=1) / np.float32(-8)
    q = blocks * _inverse(d) + np.float32(8.5)
    q = np.minimum(q.astype(np.int8), 15).astype(np.uint8)
    packed = q[:, :16] | q[:, 16:] << 4
    return _joined(d, packed, rows.shape)


def pack_q8_0(rows: np.ndarray) -> np.ndarray:
    """[n, k] float32 -> uint8 [n, k / 32 * 34]; d = max |x| / 127, q = x / d rounded half away."""
    blocks = rows.astype(np.float32).reshape(-1, BLOCK)
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(d)
    whole = np.trunc(scaled)
    q = whole + np.sign(scaled) * (np.abs(scaled - whole) >= np.float32(0.5))
    return _joined(d, q.astype(np.int8).view(np.uint8), rows.shape)


def _inverse(d: np.ndarray) -> np.ndarray:
    """1 / d; 0 where that would overflow, far below the smallest float16 scale."""
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=np.abs(d) > 2.0**-127)


def _joined(d: np.ndarray, quants: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    with np.errstate(over="ignore"):  # to infinity, as in ggml; whoever writes a file refuses it
        scales = d.astype("<f2").view(np.uint8).reshape(-1, 2)
    return np.concatenate([scales, quants], axis=1).reshape(shape[0], -1)

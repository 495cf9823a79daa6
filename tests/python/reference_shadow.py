"""Keys in 4 bits in plain numpy, from their definition (docs/algorithm.md): for reference_llama.py.

The rounding of codes and scales is the engine's; all else is float64.
"""

from __future__ import annotations

import numpy as np

NUM_TOKENS = 256  # that the balance is measured on


def random_tokens(count: int, vocab_size: int) -> list[int]:
    """The first words of Philox4x32-10 (Salmon et al., SC 2011), key 1, counters (i, 0, 0, 0)."""
    mask = 0xFFFFFFFF
    tokens = []
    for i in range(count):
        x0, x1, x2, x3, k0, k1 = i, 0, 0, 0, 1, 0
        for _ in range(10):
            p0, p1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
            x0, x1, x2, x3 = (p1 >> 32) ^ x1 ^ k0, p1 & mask, (p0 >> 32) ^ x3 ^ k1, p0 & mask
            k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
        tokens.append(x0 % vocab_size)
    return tokens


def rotation(head_dim: int) -> np.ndarray:
    """Walsh-Hadamard of signed dims: [head_dim, head_dim], in blocks of a power of two."""
    block = head_dim & -head_dim
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    signs = []
    for dim in range(head_dim):
        hashed = dim * 0x9E3779B1 & 0xFFFFFFFF
        hashed = (hashed ^ hashed >> 15) * 0x85EBCA77 & 0xFFFFFFFF
        signs.append(1.0 if hashed >> 13 & 1 else -1.0)
    return np.kron(np.eye(head_dim // block), matrix / np.sqrt(block)) * np.array(signs)


def balance_of(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """sqrt(rms k / rms q), rounded: [num_kv_heads, head_dim].

    Args:
        keys: [num_tokens, num_kv_heads, head_dim].
        queries: [num_tokens, num_q_heads, head_dim].
    """
    num_kv_heads, head_dim = keys.shape[1:]
    grouped = queries.reshape(len(queries), num_kv_heads, -1, head_dim)
    ratio = (keys**2).mean(axis=0) / (grouped**2).mean(axis=(0, 2))
    octaves = np.round(8 * np.log2(ratio) / 4) / 8  # rounded to an eighth of one
    return np.exp2(octaves).astype(np.float32).astype(np.float64)


def shadow_scores(q: np.ndarray, keys: np.ndarray, balance: np.ndarray) -> np.ndarray:
    """q.k of every head with keys in 4 bits and queries in 8, without the softmax scale.

    Args:
        q: [num_q_heads, head_dim].
        keys: [n, num_kv_heads, head_dim].
        balance: [num_kv_heads, head_dim].

    Returns: [num_q_heads, n].
    """
    num_kv_heads, head_dim = balance.shape
    turn = rotation(head_dim)
    rotated = (keys / balance) @ turn.T
    scales = (np.abs(rotated).max(-1) / 7).astype(np.float16).astype(np.float64)
    codes = np.clip(np.rint(rotated / scales[..., None]), -7, 7)
    group_size = len(q) // num_kv_heads
    scores = []
    for head, query in enumerate(q):
        kv_head = head // group_size
        balanced = turn @ (query * balance[kv_head])
        factor = np.abs(balanced).max() / 127
        products = codes[:, kv_head] @ np.clip(np.rint(balanced / factor), -127, 127)
        scores.append(products * scales[:, kv_head] * factor)
    return np.stack(scores)

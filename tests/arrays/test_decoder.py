"""One token through a decoder block: against float64, other functions of the core, and threads."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

import ptqkit._core as _core
from ptqkit.arrays import decoder
from ptqkit.arrays.matmul import pack_int8
from ptqkit.arrays.packed import PackedMatrix
from ptqkit.reference import decoder as reference
from ptqkit.reference.decoder import Linear, bfloat16

EPS = 1e-5


def bits(x):
    """bfloat16 numbers, which are exact in float32, as their bits."""
    return (np.asarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def values_of(a):
    return (a.astype(np.uint32) << 16).view(np.float32) if a.dtype == np.uint16 else a


class Case:
    """A block of random weights, as the core takes it and in float64."""

    def __init__(
        self,
        dtype="float32",
        hidden=72,
        inner=88,
        heads=6,
        kv_heads=2,
        head_dim=20,
        *,
        width=4,
        mode="float",
        bias=False,
        head_norms=False,
        permuted=False,
        seed=0,
    ):
        self.draw = np.random.default_rng(seed)
        self.bf16, self.mode, self.width, self.permuted = dtype == "bfloat16", mode, width, permuted
        self.sizes = decoder.BlockSizes(
            dtype, hidden, inner, heads, kv_heads, head_dim, EPS, EPS if head_norms else 0.0
        )
        q, kv = heads * head_dim, kv_heads * head_dim
        shapes = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)]
        shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
        made = [self.layer(*shape, bias) for shape in shapes]
        self.core, self.exact = [m[0] for m in made], [m[1] for m in made]
        self.x = self.numbers(hidden, size=2)
        angles = self.draw.uniform(0, 6, head_dim // 2)
        self.angles = [self.rounded(np.tile(f(angles), 2)) for f in (np.cos, np.sin)]
        self.norms = [self.rounded(self.draw.uniform(0.5, 2, hidden)) for _ in range(2)]
        self.head_norms = [None, None]
        if head_norms:
            self.head_norms = [self.rounded(self.draw.uniform(0.5, 2, head_dim)) for _ in range(2)]

    def rounded(self, x):
        return bfloat16(x) if self.bf16 else np.asarray(x, np.float32).astype(np.float64)

    def array(self, x):
        if x is None:
            return None
        return bits(x) if self.bf16 else np.asarray(x, np.float32)

    def numbers(self, *shape, size=1.0):
        return self.rounded(self.draw.normal(size=shape) * size)

    def layer(self, out, inputs, bias):
        added = self.numbers(out) if bias else None
        top, groups = 1 << self.width, 1 if self.mode == "simulated" else -(-inputs // 16)
        codes = self.draw.integers(0, top, (out, inputs), dtype=np.uint8)
        zeros = self.draw.integers(0, top, (out, groups), dtype=np.uint8)
        scales = self.draw.uniform(0.5, 1.5, (out, groups)).astype(np.float32)
        scales *= np.float32(2.0 / top / np.sqrt(inputs))
        g_idx = np.arange(inputs) // (inputs if groups == 1 else 16)
        if self.permuted:
            g_idx = self.draw.permutation(g_idx)
        weight = (codes - zeros[:, g_idx].astype(float)) * scales.astype(float)[:, g_idx]
        exact = Linear(weight, added)
        if self.mode == "simulated":
            words, sums = pack_int8(codes)
            column = (scales[:, 0].copy(), zeros[:, 0].astype(np.float32))
            arithmetic = "bfloat16" if self.bf16 else "float32"
            self.simulated = getattr(self, "simulated", [])
            self.simulated.append((words, *column, sums, arithmetic))
            core = decoder.simulated_layer(
                words, *column, sums, bits=8, symmetric=False, arithmetic=arithmetic,
                bias=self.array(added),
            )  # fmt: skip
            return core, exact
        matrix = PackedMatrix.pack(codes, scales, zeros, bits=self.width, g_idx=g_idx)
        return matrix.layer(self.mode, self.array(added)), exact

    def begin(self, threads=1):
        s = self.sizes
        query = np.empty((s.heads, s.head_dim), np.float32)
        kind = np.uint16 if self.bf16 else np.float32
        key, value = (np.empty((s.kv_heads, s.head_dim), kind) for _ in range(2))
        norms = [self.array(n) for n in (self.norms[0], *self.head_norms)]
        angles = tuple(self.array(a) for a in self.angles)
        decoder.begin(
            s, self.array(self.x), angles, tuple(norms), tuple(self.core[:3]), query, key, value,
            threads,
        )  # fmt: skip
        return query, key, value

    def cached(self, tokens):
        s = self.sizes
        return [self.numbers(s.kv_heads, tokens, s.head_dim) for _ in range(2)]

    def end(self, query, keys, values, allowed=None, threads=1):
        s = self.sizes
        y = np.empty(s.hidden, np.uint16 if self.bf16 else np.float32)
        decoder.end(
            s, query, self.array(keys), self.array(values), allowed, s.head_dim**-0.5,
            self.array(self.x), self.array(self.norms[1]), tuple(self.core[3:]), y, threads,
        )  # fmt: skip
        return y

    def part(self, keys, values):
        """The block as one of several, with keys and values of earlier tokens."""
        norms = (self.norms[0], *self.head_norms, self.norms[1])
        cached = (self.array(keys), self.array(values))
        return (*map(self.array, norms), self.sizes.head_dim**-0.5, *self.core, *cached)


def close(found, expected, limit):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(values_of(found), expected, rtol=0, atol=limit * scale)


CASES = [
    {},
    {"width": 3, "bias": True},
    {"width": 2, "permuted": True},
    {"width": 8, "head_norms": True, "heads": 2, "head_dim": 64},
    {"heads": 3, "kv_heads": 3, "head_dim": 6, "hidden": 33, "inner": 17, "bias": True},
    {"head_dim": 128, "heads": 4, "kv_heads": 1},
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", CASES)
def test_float64_is_near(dtype, options):
    case = Case(dtype, **options)
    limit = 3e-6 if dtype == "float32" else 2e-2
    rounded = case.rounded if dtype == "bfloat16" else np.asarray
    want = reference.block_begin(
        case.x, tuple(case.angles), (case.norms[0], *case.head_norms), tuple(case.exact[:3]),
        case.sizes.head_dim, EPS, rounded,
    )  # fmt: skip
    found = case.begin()
    for f, w in zip(found, want, strict=True):
        close(f, w, limit)
    for tokens in (1, 37):
        keys, values = case.cached(tokens)
        allowed = (np.arange(tokens) % 3 != 1).astype(np.uint8)
        for seen in (None, allowed):
            want = reference.block_end(
                found[0].astype(float), keys, values, None if seen is None else seen.astype(bool),
                case.sizes.head_dim**-0.5, case.x, case.norms[1], tuple(case.exact[3:]), EPS,
                rounded,
            )  # fmt: skip
            close(case.end(found[0], keys, values, seen), want, limit)


def test_integer_inputs_are_near_float64():
    for mode, width in (("int8", 4), ("simulated", 8)):
        case = Case("float32", mode=mode, width=width, hidden=128)
        query, key, value = case.begin()
        want = reference.block_begin(
            case.x, tuple(case.angles), (case.norms[0], None, None), tuple(case.exact[:3]), 20, EPS
        )
        for f, w in zip((query, key, value), want, strict=True):
            assert np.linalg.norm(f - w) < 0.02 * np.linalg.norm(w)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("mode", "width"), [("float", 4), ("int8", 3), ("simulated", 8)])
def test_products_are_those_of_the_other_functions(dtype, mode, width):
    """With angles of 0 and a norm of 1, the key is the product of the layer, bit for bit."""
    case = Case(dtype, mode=mode, width=width, hidden=128, heads=4, kv_heads=4, head_dim=36)
    case.angles = [np.ones(36), np.zeros(36)]
    case.x = case.rounded(np.sign(case.x) * 1.0)
    case.norms[0] = case.numbers(128)
    _, key, value = case.begin(threads=2)
    x = case.rounded(case.norms[0] * case.rounded(case.x / np.sqrt(1 + EPS)))[None]
    for number, found in ((1, key), (2, value)):
        want = np.empty((1, 144), np.float32)
        if mode == "simulated":
            bf16 = dtype == "bfloat16"
            words, scales, zeros, sums, _ = case.simulated[number]
            _core.int8_linear(
                case.array(x), 2 if bf16 else 0, (8, 0, 0, int(bf16)), None, None, words, sums,
                scales, zeros, None, want, 0,
            )  # fmt: skip
        else:
            matrix = PackedMatrix(
                case.core[number][2], case.core[number][5], case.core[number][6], bits=width,
                shape=(144, 128),
            )  # fmt: skip
            matrix.matmul(x.astype(np.float32), activations=mode, out=want)
        np.testing.assert_array_equal(
            values_of(found).reshape(-1), case.rounded(want[0]).astype(np.float32)
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [0, 1, 30])
def test_several_blocks_are_one_after_the_other(dtype, tokens):
    first, *others = [Case(dtype, head_norms=True, seed=i) for i in range(3)]
    cases, s = [first, *others], first.sizes
    cached = [case.cached(tokens) for case in cases]
    kind = np.uint16 if first.bf16 else np.float32
    width = s.kv_heads * s.head_dim
    hidden = [(np.arange(tokens + 1) % 4 != 1).astype(np.uint8), None]
    for allowed in hidden:
        y, new = np.empty((3, s.hidden), kind), np.empty((3, 2, width), kind)
        angles = tuple(first.array(a) for a in first.angles)
        parts = tuple(case.part(*kv) for case, kv in zip(cases, cached, strict=True))
        decoder.blocks(s, first.array(first.x), angles, parts, allowed, new, y)
        x = first.x
        for i, case in enumerate(cases):
            case.x, case.angles = x, first.angles
            query, key, value = case.begin()
            np.testing.assert_array_equal(new[i], [key.reshape(-1), value.reshape(-1)])
            joined = [
                np.concatenate([old, values_of(own)[:, None]], axis=1)
                for old, own in zip(cached[i], (key, value), strict=True)
            ]
            want = values_of(case.end(query, *joined, allowed))
            close(y[i], want, 1e-6 if dtype == "float32" else 8e-3)
            x = values_of(y[i]).astype(float)
        again = y.copy()
        for threads in (2, 5):
            first.x = values_of(first.array(first.x)).astype(float)
            decoder.blocks(s, first.array(first.x), angles, parts, allowed, new, again, threads)
            np.testing.assert_array_equal(again, y)


@pytest.mark.parametrize("mode", ["float", "int8"])
def test_threads_change_no_bit(mode):
    case = Case("bfloat16", mode=mode, hidden=512, inner=1500, heads=8, head_dim=64)
    keys, values = case.cached(300)
    one = case.begin(1)
    y = case.end(one[0], keys, values, threads=1)
    for threads in (2, 3, 8):
        for a, b in zip(one, case.begin(threads), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(y, case.end(one[0], keys, values, threads=threads))


def test_calls_at_once_give_their_own_results():
    cases = [Case("float32", hidden=256, inner=700, head_dim=64, seed=i) for i in range(4)]
    cached = [case.cached(50) for case in cases]
    want = [c.end(c.begin()[0], *kv) for c, kv in zip(cases, cached, strict=True)]
    wrong = []

    def work(i):
        for threads in (2, 1, 3) * 10:
            y = cases[i].end(cases[i].begin(threads)[0], *cached[i], threads=threads)
            if not np.array_equal(y, want[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_keys_may_be_strided():
    case = Case()
    query = case.begin()[0]
    keys, values = case.cached(9)
    want = case.end(query, keys, values)
    room = np.zeros((2, 30, 20), np.float32)
    room[:, 4:13] = keys
    s, y = case.sizes, np.empty(72, np.float32)
    decoder.end(
        s, query, room[:, 4:13], np.asarray(values, np.float32), None, 20**-0.5,
        case.array(case.x), case.array(case.norms[1]), tuple(case.core[3:]), y,
    )  # fmt: skip
    np.testing.assert_array_equal(y, want)


def test_nan_is_refused_where_inputs_are_rounded_and_kept_elsewhere():
    case = Case()
    case.x[3] = np.nan
    assert np.isnan(case.begin()[0]).all()
    for mode, width in (("int8", 4), ("simulated", 8)):
        case = Case(mode=mode, width=width)
        case.x[3] = np.nan
        with pytest.raises(FloatingPointError):
            case.begin()
        query = np.full((6, 20), np.inf, np.float32)
        with pytest.raises(FloatingPointError):
            case.end(query, *case.cached(4))


def test_what_does_not_belong_together_is_refused():
    case = Case()
    query = case.begin()[0]
    keys, values = case.cached(5)
    with pytest.raises(ValueError, match="hides every key"):
        case.end(query, keys, values, np.zeros(5, np.uint8))
    with pytest.raises(ValueError, match="as many tokens"):
        case.end(query, keys[:, :4], values)
    with pytest.raises(ValueError, match="keys has size 1"):
        case.end(query, keys[:1], values)
    with pytest.raises(ValueError, match="allowed has size 4"):
        case.end(query, keys, values, np.ones(4, np.uint8))
    for change, message in (
        ({"heads": 5}, "multiple"),
        ({"head_dim": 19}, "even"),
        ({"hidden": 71}, "x has size 72"),
        ({"inner": 89}, "words|out of range|scales"),
        ({"inner": 2**28}, "words|scales"),
    ):
        changed = Case()
        changed.core = case.core
        changed.sizes = replace(case.sizes, **change)
        with pytest.raises(ValueError, match=message):
            changed.begin()
            changed.end(query, keys, values)

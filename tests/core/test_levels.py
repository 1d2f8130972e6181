"""CPU levels and BLAS, each in a process of its own: integers exact, floats within bounds."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from helpers.core_cases import EPS, assert_codes, assert_grid, layer, max_code, search_rtol

import ptqkit
import ptqkit.reference as reference

LEVELS = [
    "base",
    "avx2",
    "avx512",
    "avx512_bf16",
    "avx512_vnni",
    "avx512_vnni_bf16_amx",
    "neon",
    "neon_dotprod",
]
BLAS = ["builtin", "scipy"]
SHAPES = [(30, 48, 16), (49, 97, None), (20, 132, 12)]

COMPUTE = """
import sys
import numpy as np
import ptqkit
inputs, out = np.load(sys.argv[1]), {}
config = ptqkit.show_config()
out["config"] = np.array([config["cpu_level"], config["blas"]])
for i in range(int(inputs["count"])):
    W, X, H = (inputs[f"{name}{i}"] for name in "WXH")
    size = int(inputs[f"size{i}"]) or None
    for kind, data in (("f32", X), ("f16", X.astype(np.float16)), ("bf16", None)):
        h = ptqkit.Hessian(X.shape[1])
        if data is None:  # bits of bfloat16, as a tensor would bring them
            import ptqkit._core as _core
            bits = (X.view(np.uint32) >> 16).astype(np.uint16)
            _core.hessian_update(h._sum, bits, 2, None, 0)
            h.tokens = len(X)
        else:
            h.update(data)
        out[f"hessian-{kind}{i}"] = h.matrix
    for order in ("natural", "act", "group-act"):
        F = ptqkit.factorize(H, order=order, group_size=size)
        out[f"R-{order}{i}"] = np.triu(F.R)
        for grid in ("minmax", "mse", "hessian"):
            q = ptqkit.gptq(W, F, bits=3, group_size=size, grid=grid, refine_passes=0)
            swept = ptqkit.gptq(W, F, bits=3, group_size=size, grid=grid, refine_passes=2)
            for name in ("codes", "scales", "zero_points", "g_idx"):
                out[f"gptq-{order}-{grid}-{name}{i}"] = getattr(q, name)
            out[f"swept-{order}-{grid}{i}"] = swept.row_objectives
    beam = ptqkit.gptq(W, H, bits=3, group_size=size, refine_passes=1, beam_width=16)
    out[f"beam{i}"] = beam.row_objectives
    for bits in (2, 3, 4, 8, "ternary"):
        for symmetric in (False, True):
            for scale_dtype in ("float32", "float16", "bfloat16"):
                q = ptqkit.rtn(W, bits=bits, group_size=size, symmetric=symmetric,
                               scale_dtype=scale_dtype)
                key = f"rtn-{bits}-{symmetric}-{scale_dtype}"
                for name in ("codes", "scales", "zero_points"):
                    out[f"{key}-{name}{i}"] = getattr(q, name)
    for grid in ("mse", "hessian"):
        q = ptqkit.rtn(W, bits=3, group_size=size, grid=grid, H=H)
        for name in ("codes", "scales", "zero_points"):
            out[f"search-{grid}-{name}{i}"] = getattr(q, name)
    for bits in (2, 3, 4, 8):
        q = ptqkit.rtn(W, bits=bits, group_size=size)
        grids = q.scales, q.zero_points
        packed = ptqkit.PackedMatrix.pack(q.codes, *grids, bits=bits, g_idx=q.g_idx)
        for tokens in (1, 2, 15, 100):
            for activations in ("float", "int8"):
                y = packed.matmul(X[:tokens], activations=activations)
                out[f"packed-{activations}-{bits}-{tokens}-{i}"] = y
    out[f"objective{i}"] = ptqkit.objective(W, 0, H)
    out[f"obq{i}"] = ptqkit.obq(W[:4], H, bits=3).codes
    for bits in range(1, 9):
        codes = inputs[f"codes{i}"] & ((1 << bits) - 1)
        out[f"pack-{bits}-{i}"] = ptqkit.pack_rows(codes, bits)
        back = ptqkit.unpack_rows(out[f"pack-{bits}-{i}"], bits, codes.shape[1])
        out[f"unpack-{bits}-{i}"] = back
np.savez(sys.argv[2], **out)
"""


@lru_cache
def _problems():
    found = []
    for rows, n, size in SHAPES:
        rng = np.random.default_rng(n)
        W, H = layer(rows, n, "outlier")
        X = rng.normal(size=(301, n)).astype(np.float32)
        codes = rng.integers(0, 256, (rows, n), dtype=np.uint8)
        found.append({"W": W, "X": X, "H": H, "size": size or 0, "codes": codes})
    return found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    path = tmp_path_factory.mktemp("levels") / "inputs.npz"
    arrays = {f"{k}{i}": v for i, p in enumerate(_problems()) for k, v in p.items()}
    np.savez(path, count=len(SHAPES), **arrays)
    return path


_results: dict[tuple[str, str], dict[str, np.ndarray]] = {}


@pytest.fixture
def result(request, inputs, script, tmp_path):
    """Everything computed at one level with one BLAS."""
    level, blas = request.param
    if level not in ptqkit.show_config()["cpu_levels"]:
        pytest.skip(f"this CPU does not run {level}")
    if request.param not in _results:
        out = tmp_path / "out.npz"
        script(COMPUTE, str(inputs), str(out), PTQKIT_CPU=level, PTQKIT_BLAS=blas)
        _results[request.param] = dict(np.load(out))
    assert list(_results[request.param]["config"]) == [level, blas]
    return _results[request.param]


EVERY = pytest.mark.parametrize(
    "result",
    [(level, blas) for level in LEVELS for blas in BLAS],
    indirect=True,
    ids=lambda p: "-".join(p),
)


@EVERY
def test_integers_are_exact(result):
    for i, p in enumerate(_problems()):
        for bits in range(1, 9):
            codes = p["codes"] & ((1 << bits) - 1)
            np.testing.assert_array_equal(
                result[f"pack-{bits}-{i}"], reference.pack_rows(codes, bits)
            )
            np.testing.assert_array_equal(result[f"unpack-{bits}-{i}"], codes)
        want = ptqkit.obq(p["W"][:4], p["H"], bits=3).codes  # in double: one result everywhere
        np.testing.assert_array_equal(result[f"obq{i}"], want)


@EVERY
def test_beams(result):
    for i, p in enumerate(_problems()):
        size = p["size"] or None
        before = ptqkit.gptq(p["W"], p["H"], bits=3, group_size=size, refine_passes=1)
        found = ptqkit.gptq(p["W"], p["H"], bits=3, group_size=size, refine_passes=1, beam_width=16)
        here = result[f"beam{i}"]
        assert (np.diff(here, axis=0) <= 0).all()
        assert here[-1].sum() < before.objective
        # Paths that cost the same to float32's last bits may change places.
        np.testing.assert_allclose(here[-1].sum(), found.objective, rtol=5e-3)


@EVERY
def test_products_of_packed_weights(result):
    for i, p in enumerate(_problems()):
        for bits in (2, 3, 4, 8):
            q = ptqkit.rtn(p["W"], bits=bits, group_size=p["size"] or None)
            m = (q.codes, q.scales, q.zero_points, q.g_idx)
            for tokens in (1, 2, 15, 100):
                x = p["X"][:tokens]
                want = reference.packed_matmul_int8(*m, x)
                np.testing.assert_array_equal(result[f"packed-int8-{bits}-{tokens}-{i}"], want)
                reach = np.abs(x).astype(float) @ q.scales.astype(float)[:, q.g_idx].T * 2**bits
                places = x.shape[1] + 32 * q.scales.shape[1]
                error = result[f"packed-float-{bits}-{tokens}-{i}"] - reference.packed_matmul(*m, x)
                assert np.all(np.abs(error) <= 2 * (places + 8) * 2.0**-24 * reach)


@EVERY
def test_rtn_is_the_same_bit_for_bit(result):
    for i, p in enumerate(_problems()):
        for bits in (2, 3, 4, 8, "ternary"):
            for symmetric in (False, True):
                for scale_dtype in ("float32", "float16", "bfloat16"):
                    q = ptqkit.rtn(
                        p["W"],
                        bits=bits,
                        group_size=p["size"] or None,
                        symmetric=symmetric,
                        scale_dtype=scale_dtype,
                    )
                    key = f"rtn-{bits}-{symmetric}-{scale_dtype}"
                    for name in ("codes", "scales", "zero_points"):
                        np.testing.assert_array_equal(result[f"{key}-{name}{i}"], getattr(q, name))


@EVERY
def test_searches_are_as_good_as_the_twins(result):
    for i, p in enumerate(_problems()):
        n = p["W"].shape[1]
        size = p["size"] or n
        for grid in ("mse", "hessian"):
            for g in range(n // size):
                part = slice(g * size, (g + 1) * size)
                assert_grid(
                    p["W"][:, part].astype(float),
                    p["H"][part, part].astype(float),
                    result[f"search-{grid}-scales{i}"][:, g],
                    result[f"search-{grid}-zero_points{i}"][:, g],
                    bits=3,
                    method=grid,
                    symmetric=False,
                    rtol=search_rtol(3),
                )


@EVERY
def test_hessian_factor_and_objective_are_within_bounds(result):
    for i, p in enumerate(_problems()):
        X = p["X"]
        bf16 = (X.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        for kind, exact in (("f32", X), ("f16", X.astype(np.float16)), ("bf16", bf16)):
            exact = exact.astype(np.float64)
            bound = EPS * (len(X) + 2) * reference.hessian(np.abs(exact))
            error = np.abs(result[f"hessian-{kind}{i}"] - reference.hessian(exact))
            assert np.all(error <= bound), kind
        damped, _ = reference.dampen(p["H"], 0.01)
        for order in ("natural", "act", "group-act"):
            perm = reference.make_order(np.diag(p["H"]), order, p["size"] or None)
            A, R = damped[np.ix_(perm, perm)], result[f"R-{order}{i}"].astype(np.float64)
            scale = np.sqrt(np.outer(np.diag(A), np.diag(A)))
            assert np.all(np.abs(R @ R.T - A) <= (len(A) + 3) * EPS * scale)
        W, H = p["W"].astype(float), p["H"].astype(float)
        bound = H.shape[0] * EPS * np.einsum("rj,jk,rk->r", abs(W), abs(H), abs(W))
        assert np.all(np.abs(result[f"objective{i}"] - reference.objective(W, H)) <= bound)


@EVERY
def test_codes_by_replay(result, tie_distance):
    tie = tie_distance(str(result["config"][0]))
    for i, p in enumerate(_problems()):
        for order in ("natural", "act", "group-act"):
            F = ptqkit.factorize(p["H"], order=order, group_size=p["size"] or None)
            for grid in ("minmax", "mse", "hessian"):
                key = f"gptq-{order}-{grid}"
                q = ptqkit.QuantizedMatrix(
                    *(result[f"{key}-{n}{i}"] for n in ("codes", "scales", "zero_points", "g_idx")),
                    ptqkit.WeightGrid(3, p["size"] or None),
                    damping=0.01,
                )
                assert q.max_code == max_code(3)
                assert_codes(p["W"], p["H"], q, F, tie)
                swept = result[f"swept-{order}-{grid}{i}"]
                assert np.all(np.diff(swept, axis=0) <= 0)


BAD = {
    "PTQKIT_CPU": ["sse", "AVX2", "avx512_bf17", "best"],
    "PTQKIT_BLAS": ["mkl", "SciPy", "openblas"],
}


@pytest.mark.parametrize(("variable", "value"), [(k, v) for k, vs in BAD.items() for v in vs])
def test_bad_values_are_import_errors_that_name_the_variable(variable, value, script):
    done = script("import ptqkit", check=False, **{variable: value})
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and variable in last and value in last


def test_an_empty_variable_is_the_default(script):
    code = "import ptqkit; print(ptqkit.show_config())"
    assert script(code).stdout == script(code, PTQKIT_CPU="", PTQKIT_BLAS="").stdout

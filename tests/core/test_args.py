"""Bad input: each a clear error that names the argument or the layer; inputs are never modified."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from helpers.core_cases import layer, same_result

import ptqkit

W, H = layer(4, 8)
BAD_H = np.array(H)
BAD_H[2, 5] += 1
NAN_W, NAN_H = np.array(W), np.array(H)
NAN_W[1, 3] = np.nan
NAN_H[0, 0] = np.inf
INDEFINITE = np.eye(8)
INDEFINITE[3, 3] = -100


def _gptq(**changes):
    call = {"W": W, "H": H, "group_size": 4} | changes
    return ptqkit.gptq(call.pop("W"), call.pop("H"), **call)


def _rtn(**changes):
    call = {"W": W, "group_size": 4} | changes
    return ptqkit.rtn(call.pop("W"), **call)


def _obq(**changes):
    call = {"W": W, "H": H, "group_size": 4} | changes
    return ptqkit.obq(call.pop("W"), call.pop("H"), **call)


def _factorize(**changes):
    call = {"H": H, "group_size": 4} | changes
    return ptqkit.factorize(call.pop("H"), **call)


def _objective(**changes):
    call = {"W": W, "W_hat": 0, "H": H} | changes
    return ptqkit.objective(call.pop("W"), call.pop("W_hat"), call.pop("H"), **call)


SOLVERS = {"gptq": _gptq, "rtn": _rtn, "obq": _obq}
V, T = ValueError, TypeError

MATRIX = {  # what every solver checks of its weights
    "integers": ({"W": np.ones((4, 8), int)}, T, "W must be floating point, not int64"),
    "complex": ({"W": np.ones((4, 8), complex)}, T, "W must be floating point"),
    "text": ({"W": "weights"}, T, "W must be floating point"),
    "None": ({"W": None}, T, "W must be floating point"),
    "ragged": ({"W": [[1.0, 2.0], [3.0]]}, V, "W must be an array"),
    "1-D": ({"W": np.ones(8)}, V, r"W must be a non-empty matrix, but has shape \(8,\)"),
    "3-D": ({"W": np.ones((2, 2, 8))}, V, "W must be a non-empty matrix"),
    "no rows": ({"W": np.ones((0, 8))}, V, "W must be a non-empty matrix"),
    "no inputs": ({"W": np.ones((4, 0))}, V, "W must be a non-empty matrix"),
    "NaN": ({"W": NAN_W}, V, "W holds NaN or Inf"),
    "beyond float32": ({"W": np.full((4, 8), 1e300)}, V, r"W holds NaN or Inf \(or values beyond"),
    "group": ({"group_size": 3}, V, r"group_size 3 does not divide 8 inputs; use None .* or 8"),
    "group 0": ({"group_size": 0}, V, "group_size 0"),
    "group -8": ({"group_size": -8}, V, "group_size -8"),
    "group 16": ({"group_size": 16}, V, "group_size 16 does not divide"),
    "group 4.0": ({"group_size": 4.0}, T, "group_size must be an integer or None"),
    "group True": ({"group_size": True}, T, "group_size must be an integer or None"),
    "group text": ({"group_size": "4"}, T, "group_size must be an integer or None"),
    **{
        f"bits {b!r}": ({"bits": b}, V, "bits must be an integer from 2 to 8 or 'ternary'")
        for b in (0, 1, 9, -4, 4.0, True, "4", "binary", None, [4])
    },
    "grid": ({"grid": "best"}, V, "grid must be one of 'minmax', 'mse', 'hessian', 'feed"),
    "scale_dtype": ({"scale_dtype": "float64"}, V, "scale_dtype must be one of"),
    "zero 99": ({"min_zero_point": 99}, V, r"min_zero_point must lie in \[0, 15\]"),
    "zero -1": ({"min_zero_point": -1}, V, "min_zero_point must lie in"),
    "zero 1.5": ({"min_zero_point": 1.5}, T, "min_zero_point must be an integer"),
    "zero text": ({"min_zero_point": "1"}, T, "min_zero_point must be an integer"),
    "threads -1": ({"threads": -1}, V, "threads must lie in"),
    "threads 9999": ({"threads": 9999}, V, "threads must lie in"),
    "threads 1.0": ({"threads": 1.0}, T, "threads must be an integer"),
    "threads True": ({"threads": True}, T, "threads must be an integer"),
    "threads None": ({"threads": None}, T, "threads must be an integer"),
}
HESSIAN = {  # what everything that takes H checks
    "asymmetric": ({"H": BAD_H}, V, "H must be symmetric"),
    "NaN": ({"H": NAN_H}, V, "H holds NaN or Inf"),
    "not square": ({"H": np.ones((8, 4))}, V, r"H must be square, but has shape \(8, 4\)"),
    "1-D": ({"H": np.ones(8)}, V, "H must be a non-empty matrix"),
    "integers": ({"H": np.eye(8, dtype=int)}, T, "H must be floating point"),
    "text": ({"H": "hessian"}, T, "H must be floating point"),
    "no tokens": ({"H": ptqkit.Hessian(8)}, ptqkit.CalibrationError, "seen no token"),
}
SIZE = {"size": ({"H": np.eye(6)}, V, r"H has 6 inputs, but W has 8 \(W is \(out, in\)")}
SEARCH = {
    "steps 0": ({"grid_steps": 0}, V, r"grid_steps must lie in \[1, 256\]"),
    "steps 257": ({"grid_steps": 257}, V, "grid_steps must lie in"),
    "steps 4.0": ({"grid_steps": 4.0}, T, "grid_steps must be an integer"),
    "candidates": ({"grid_candidates": 0}, V, "grid_candidates must lie in"),
    "shrink 0": ({"grid_min_shrink": 0}, V, "grid_min_shrink must lie in"),
    "shrink 2": ({"grid_min_shrink": 2.0}, V, "grid_min_shrink must lie in"),
    "shrink NaN": ({"grid_min_shrink": np.nan}, V, "grid_min_shrink must lie in"),
    "shrink text": ({"grid_min_shrink": "a"}, T, "grid_min_shrink must be a number"),
    "norm 0": ({"grid_norm": 0}, V, "grid_norm must lie in"),
    "norm inf": ({"grid_norm": np.inf}, V, "grid_norm must lie in"),
}
DAMPING = {
    "negative": ({"damping": -0.1}, V, "damping must be a fraction"),
    "NaN": ({"damping": np.nan}, V, "damping must be a fraction"),
    "text": ({"damping": "a"}, T, "damping must be a number"),
    "None": ({"damping": None}, T, "damping must be a number"),
}
MAX_DAMPING = {
    "maximum": ({"damping": 0.1, "max_damping": 0.01}, V, "damping <= max_damping"),
    "infinite": ({"max_damping": np.inf}, V, "damping must be a fraction"),
    "max text": ({"max_damping": "a"}, T, "max_damping must be a number"),
    "order": ({"order": "random"}, V, "order must be one of 'natural', 'act', 'group-act'"),
    "order None": ({"order": None}, V, "order must be one of"),
    "indefinite": ({"H": INDEFINITE}, ptqkit.NotPositiveDefiniteError, "pivot of input 3 failed"),
}
SOLVE = {
    "refine_passes -1": ({"refine_passes": -1}, V, "refine_passes must lie in"),
    "refine_passes 0.5": ({"refine_passes": 0.5}, T, "refine_passes must be an integer"),
    "block 0": ({"block_size": 0}, V, "block_size must lie in"),
    "block None": ({"block_size": None}, T, "block_size must be an integer"),
    "other group": (
        {"H": ptqkit.factorize(H, order="group-act", group_size=2)},
        V,
        "for another group_size",
    ),
}
FACTOR = {
    "group": ({"order": "group-act", "group_size": 3}, V, "group_size 3 does not divide"),
    "group 0": ({"order": "group-act", "group_size": 0}, V, "group_size must lie in"),
    "group 1.5": ({"order": "group-act", "group_size": 1.5}, T, "group_size must be an integer"),
    "threads": ({"threads": -1}, V, "threads must lie in"),
}
OBJECTIVE = {
    "W_hat rows": ({"W_hat": np.zeros((3, 8))}, V, r"W_hat must have the shape \(4, 8\) of W"),
    "W_hat row": ({"W_hat": np.zeros((1, 8))}, V, "W_hat must have the shape"),
    "W_hat type": ({"W_hat": np.zeros((4, 8), int)}, T, "W_hat must be floating point"),
    "W_hat scalar": ({"W_hat": 1.0}, V, "W_hat must be a non-empty matrix"),
    "W_hat NaN": ({"W_hat": NAN_W}, V, "W_hat holds NaN or Inf"),
    "threads": ({"threads": "2"}, T, "threads must be an integer"),
}
NO_H = {"grid needs H": ({"grid": "hessian"}, V, "grid='hessian' needs H")}

TABLE = [
    *((f, MATRIX) for f in (_gptq, _rtn, _obq)),
    *((f, HESSIAN | SIZE) for f in (_gptq, _rtn, _obq, _objective)),
    (_factorize, HESSIAN | DAMPING | MAX_DAMPING | FACTOR),
    *((f, SEARCH) for f in (_gptq, _rtn)),
    (_gptq, DAMPING | MAX_DAMPING | SOLVE),
    (_obq, DAMPING),
    (_objective, OBJECTIVE),
    (_rtn, NO_H),
]
CASES = [
    pytest.param(function, *case, id=f"{function.__name__[1:]}-{name}")
    for function, table in TABLE
    for name, case in table.items()
]
NAMED = {_gptq, _rtn, _obq, _factorize}  # these take name=
OPTION = (
    "bits",
    "grid",
    "scale_dtype",
    "threads",
    "damping",
    "order must",
    "min_zero",
    "refine_passes",
    "block_size",
    "max_damping",
    "group_size must be an",
    "seen no token",
)


@pytest.mark.parametrize(("function", "changes", "error", "message"), CASES)
def test_bad_input(function, changes, error, message):
    arrays = {k: np.array(v, copy=True) for k, v in changes.items() if isinstance(v, np.ndarray)}
    before = W.copy(), H.copy()
    with pytest.raises(error, match=message):
        function(**changes)
    if function in NAMED and not message.startswith(OPTION):  # options are not of one layer
        with pytest.raises(error, match=r"^blocks\.7\.up: "):
            function(name="blocks.7.up", **changes)
    for key, value in arrays.items():
        np.testing.assert_array_equal(changes[key], value)
    np.testing.assert_array_equal(W, before[0])
    np.testing.assert_array_equal(H, before[1])


def _update(X, mask=None):
    hessian = ptqkit.Hessian(8)
    hessian.update(X, mask)


X = np.ones((6, 8), np.float32)
HESSIAN_CASES = {
    "in_features 0": (lambda: ptqkit.Hessian(0), V, "in_features must lie in"),
    "in_features 2.5": (lambda: ptqkit.Hessian(2.5), T, "in_features must be an integer"),
    "in_features True": (lambda: ptqkit.Hessian(True), T, "in_features must be an integer"),
    "threads": (lambda: ptqkit.Hessian(4, threads=-2), V, "threads must lie in"),
    "X width": (lambda: _update(X[:, :5]), V, r"X must have shape \(\.\.\., 8\).*shape \(6, 5\)"),
    "X scalar": (lambda: _update(np.float32(1)), V, r"X must have shape"),
    "X None": (lambda: _update(None), V, "X must have shape"),
    "X integers": (lambda: _update(np.ones((6, 8), int)), T, "X must be floating point"),
    "X uint16": (lambda: _update(np.ones((6, 8), np.uint16)), T, "X must be floating point"),
    "X complex": (lambda: _update(np.ones((6, 8), complex)), T, "X must be floating point"),
    "X NaN": (lambda: _update(X * np.nan), V, "X holds NaN or Inf; the batch was not added"),
    "X beyond": (lambda: _update(np.full((6, 8), 1e300)), V, "X holds NaN or Inf"),
    "mask size": (lambda: _update(X, np.ones(5, bool)), V, "mask must have the shape"),
    "mask shape": (
        lambda: _update(X.reshape(2, 3, 8), np.ones((3, 2), bool)),
        V,
        "mask must have the shape",
    ),
    "mask float": (lambda: _update(X, np.ones(6)), T, "mask must be boolean or integer"),
    "merge": (lambda: ptqkit.Hessian(4).merge(np.eye(4)), T, "other must be a Hessian"),
    "merge size": (lambda: ptqkit.Hessian(4).merge(ptqkit.Hessian(5)), V, "cannot merge 5 inputs"),
    "empty": (lambda: ptqkit.Hessian(4).matrix, ptqkit.CalibrationError, "seen no token"),
    "matrix": (lambda: ptqkit.Hessian.from_matrix(np.ones((3, 2)), 1), V, "matrix must be square"),
    "matrix NaN": (lambda: ptqkit.Hessian.from_matrix(NAN_H, 1), V, "matrix holds NaN"),
    "asymmetric": (lambda: ptqkit.Hessian.from_matrix(BAD_H, 1), V, "matrix must be symmetric"),
    "tokens 0": (lambda: ptqkit.Hessian.from_matrix(H, 0), V, "tokens must lie in"),
    "tokens 1.5": (lambda: ptqkit.Hessian.from_matrix(H, 1.5), T, "tokens must be an integer"),
}


@pytest.mark.parametrize("case", HESSIAN_CASES)
def test_bad_input_of_the_hessian(case):
    call, error, message = HESSIAN_CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=message):
            call()


def test_errors_are_also_of_the_package():
    for error in (ptqkit.CalibrationError, ptqkit.NotPositiveDefiniteError):
        assert issubclass(error, ptqkit.PtqkitError) and issubclass(error, ValueError)


@pytest.mark.parametrize("solver", SOLVERS)
def test_layouts_are_accepted_and_equal(solver):
    call = SOLVERS[solver]
    want = call(H=H)
    wide = np.zeros((4, 16), np.float32)
    wide[:, ::2] = W
    for other in (
        np.asfortranarray(W),
        wide[:, ::2],
        W.astype(">f4"),
        W.astype(np.float64),
        W[::-1].copy()[::-1],
        W.tolist(),
    ):
        assert same_result(call(W=other, H=H), want)
    for other in (np.asfortranarray(H), H.astype(">f8"), H.tolist()):
        assert same_result(call(H=other), want)
    assert same_result(call(H=ptqkit.Hessian.from_matrix(H, 2)), want)
    slightly = H.copy()
    slightly[0, 1] *= 1 + 1e-6
    call(H=slightly)  # rounding noise is not asymmetry

"""The compiled module called directly with garbage: an exception, never a crash."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import numpy as np
import pytest
from helpers.softmax_core_calls import SOFTMAX_OPTIONAL, SOFTMAX_OUTPUTS, softmax_calls

import ptqkit._core as _core

GRID = (15, 0, 0, 40, 4, 0, 0, 0.3, 2.4)
OPTIONS = (4, 128, 0, 0, 1, 0, 0, 0.01)


def _f32(*shape):
    return np.ones(shape, np.float32)


def _packed_layer(outputs, inputs):
    """Words of 4 bits, one group, and what goes with them."""
    panels = -(-outputs // 16)
    return (
        np.zeros((panels, inputs // 8, 16), np.uint32),
        np.arange(inputs, dtype=np.int32),
        4,
        _f32(panels, 1, 16),
        np.zeros((panels, 1, 16), np.uint8),
        np.array([0, inputs], np.int32),
    )


def _whole_block(wide, narrow, square):
    norms = (_f32(8), None, _f32(4), _f32(8))
    layers = (wide, narrow, narrow, square, wide, wide, square)
    return (*norms, 0.5, *layers, _f32(2, 3, 4), _f32(2, 3, 4))


def _calls():
    """A valid call of every function: name -> list of arguments."""
    eye, order = np.eye(8, dtype=np.float32), np.arange(8)
    codes, scales, zeros = np.zeros((3, 8), np.uint8), _f32(3, 2), np.zeros((3, 2), np.uint8)
    int8, one = np.ones((3, 8), np.int8), np.ones(1, np.int8)
    signed = (8, 1, 0, 0)
    many, places = np.zeros((16, 8), np.uint8), np.arange(8, dtype=np.int32)
    packed = [
        np.zeros((1, 1, 16), np.uint32),
        places,
        4,
        _f32(1, 1, 16),
        np.zeros((1, 1, 16), np.uint8),
        np.array([0, 8], np.int32),
        1,
    ]
    block = (0, 8, 16, 4, 2, 4, 1e-5, 1e-5)
    wide, square, narrow = (
        (0, None, *_packed_layer(outputs, inputs)) for outputs, inputs in ((16, 8), (8, 16), (8, 8))
    )
    simulated = (2, _f32(8), np.zeros((1, 2, 16), np.uint32), _f32(8), _f32(8))
    simulated += (np.zeros(8, np.int32), signed, 0.5, 128)
    return {
        "decoder_begin": [
            block,
            _f32(8),
            _f32(4),
            _f32(4),
            _f32(8),
            _f32(4),
            _f32(4),
            wide,
            narrow,
            simulated,
            _f32(4, 4),
            _f32(2, 4),
            _f32(2, 4),
            1,
        ],
        "decoder_end": [
            block,
            _f32(4, 4),
            _f32(2, 3, 4),
            _f32(2, 3, 4),
            np.ones(3, np.uint8),
            0.5,
            _f32(8),
            _f32(8),
            square,
            wide,
            wide,
            square,
            _f32(8),
            1,
        ],
        "decoder_blocks": [
            block,
            _f32(8),
            _f32(4),
            _f32(4),
            (_whole_block(wide, narrow, square), _whole_block(wide, simulated, square)),
            np.ones(4, np.uint8),
            _f32(2, 2, 8),
            _f32(2, 8),
            1,
        ],
        "codes_on_grid": [_f32(3, 8), _f32(3), np.zeros(3, np.uint8), 15, codes, 1],
        "signed_grid": [-1.0, 2.0, signed],
        "activation_range": [_f32(5, 8), 0, np.zeros(8, bool), 1],
        "activations_quantize": [
            _f32(5, 8),
            0,
            np.zeros(8, bool),
            signed,
            1,
            np.zeros((5, 8), np.int8),
            _f32(5),
            np.zeros(5, np.int16),
            1,
        ],
        "outlier_columns": [_f32(5, 8), 0, 6.0, np.zeros(8, bool), 1],
        "bias_correction": [_f32(3, 8), _f32(3, 8), np.ones(8), np.zeros(3), 1],
        "int8_matmul": [
            int8,
            _f32(3),
            one.repeat(3),
            np.ones((5, 8), np.int8),
            _f32(1),
            one,
            _f32(3, 2),
            _f32(2, 5),
            _f32(3, 5),
            1,
        ],
        "int8_pack": [int8, np.zeros((1, 2, 16), np.uint32), np.zeros(3, np.int32), 1],
        "int8_linear": [
            _f32(4, 8),
            0,
            signed,
            _f32(1),
            one,
            np.zeros((1, 2, 16), np.uint32),
            np.zeros(3, np.int32),
            _f32(3),
            _f32(3),
            _f32(3),
            _f32(4, 3),
            1,
        ],
        "hessian_update": [_f32(8, 8), _f32(5, 8), 0, np.arange(3), 1],
        "hessian_finish": [_f32(8, 8), _f32(8, 8), 0.5, 1],
        "cross_update": [_f32(3, 8), _f32(5, 3), _f32(5, 3), _f32(5, 8), 0, np.arange(3), 1],
        "moved_outputs": [_f32(5, 8), _f32(5, 8), _f32(3, 8), _f32(5, 3), 1],
        "target_correction": [
            _f32(8, 8),
            np.ones((8, 8)),
            np.ones((8, 8)),
            eye,
            np.zeros(8),
            0,
            np.zeros((8, 8)),
            1,
        ],
        "activation_statistics": [
            _f32(5, 8),
            0,
            np.arange(3),
            8,
            6.0,
            0.0,
            np.ones(6),
            _f32(8),
            np.zeros(8, np.int64),
            np.zeros(8192, np.int64),
            _f32(3),
            np.zeros((3, 2), np.int64),
            1,
        ],
        "channel_ranges": [_f32(5, 8), 0, np.arange(3), _f32(8), _f32(8), np.ones(8), 1],
        "equalization_scales": [np.ones(8), np.ones(8), 0.5, 0.1, 10.0, _f32(8)],
        "equalization_errors": [
            _f32(5, 8),
            (_f32(3, 8), _f32(2, 8)),
            _f32(2, 8),
            (4, 0, 255, 1, 0),
            GRID,
            _f32(8),
            _f32(8),
            np.ones(2),
            1,
        ],
        "symmetric_check": [eye, 0.0, 1],
        "finite_check": [eye, 1],
        "factor": [eye, order, np.zeros(8), _f32(8, 8), 1],
        "gptq": [
            _f32(3, 8),
            eye,
            eye,
            order,
            OPTIONS,
            GRID,
            codes,
            scales,
            zeros,
            np.zeros(8, np.int32),
            np.zeros((1, 3)),
            1,
        ],
        "rtn": [_f32(3, 8), 4, GRID, eye, codes, scales, zeros, 1],
        "obq": [np.ones((3, 8)), np.eye(8), np.ones((3, 8)), np.ones((3, 8)), 15, codes, 1],
        "best_paths": [
            _f32(3, 8),
            eye,
            eye,
            order,
            np.zeros(8, np.int32),
            scales,
            zeros,
            np.arange(3),
            (15, 4),
            codes,
            np.zeros(3),
            1,
        ],
        "couple_block": [
            _f32(16, 3),
            _f32(6, 3),
            eye,
            _f32(16, 3),
            15,
            np.ones((16, 3), np.uint8),
            _f32(16, 3),
            1,
        ],
        "couple_rows": [
            _f32(3, 8),
            eye,
            np.eye(3),
            order,
            np.zeros(8, np.int32),
            scales,
            zeros,
            (15, 1),
            codes,
            np.zeros(3),
            1,
        ],
        "objective": [_f32(3, 8), eye, np.zeros(3), 1],
        "pack": [codes, 4, np.zeros((3, 1), np.uint32), 1],
        "unpack": [codes, 4, np.zeros((3, 1), np.uint32), 1],
        "words_pack": [many, *packed[:3], 1],
        "words_unpack": [many, *packed[:3], 1],
        "packed_dequantize": [_f32(16, 8), *packed],
        "packed_matmul": [_f32(5, 8), 0, 0, _f32(5, 16), *packed],
        **softmax_calls(),
    }


NAMES = sorted(_calls())
OUTPUTS = {  # positions that are written
    "hessian_update": [0],
    "hessian_finish": [1],
    "cross_update": [0],
    "moved_outputs": [3],
    "target_correction": [6],
    "factor": [3],
    "gptq": [6, 7, 8, 9, 10],
    "rtn": [4, 5, 6],
    "obq": [5],
    "best_paths": [9, 10],
    "couple_block": [5, 6],
    "couple_rows": [8, 9],
    "objective": [2],
    "pack": [2],
    "unpack": [0],
    "words_pack": [1],
    "words_unpack": [0],
    "packed_dequantize": [0],
    "packed_matmul": [3],
    "decoder_begin": [10, 11, 12],
    "decoder_end": [12],
    "decoder_blocks": [6, 7],
    "symmetric_check": [],
    "finite_check": [],
    "signed_grid": [],
    "activation_range": [],
    "codes_on_grid": [4],
    "activations_quantize": [5, 6, 7],
    "outlier_columns": [3],
    "bias_correction": [3],
    "int8_matmul": [8],
    "int8_pack": [1, 2],
    "int8_linear": [10],
    "activation_statistics": [6, 7, 8, 9, 10, 11],
    "channel_ranges": [3, 4, 5],
    "equalization_scales": [5],
    "equalization_errors": [7],
    **SOFTMAX_OUTPUTS,
}
OPTIONAL = {  # None is allowed
    ("hessian_update", 3),
    ("cross_update", 5),
    ("target_correction", 2),
    ("couple_block", 1),
    ("rtn", 3),
    ("activation_range", 2),
    ("activations_quantize", 2),
    ("activation_statistics", 2),
    ("channel_ranges", 2),
    ("int8_linear", 6),
    ("int8_linear", 9),
    ("words_pack", 2),
    ("words_unpack", 2),
    ("packed_dequantize", 2),
    ("packed_matmul", 5),
    ("decoder_begin", 5),
    ("decoder_begin", 6),
    ("decoder_end", 4),
    ("decoder_blocks", 5),
    *SOFTMAX_OPTIONAL,
}
INT8 = {
    ("activations_quantize", 5),
    ("int8_pack", 0),
    ("int8_linear", 4),
    *(("int8_matmul", at) for at in (0, 2, 3, 5)),
}
BAD = (TypeError, ValueError, OverflowError, IndexError, BufferError)


def _fails(name, arguments, errors=BAD):
    with pytest.raises(errors):
        getattr(_core, name)(*arguments)


FUNCTIONS = sorted(n for n in dir(_core) if not n.startswith("_"))
SWITCHES = {"use_scipy_blas", "use_builtin_blas", "set_cpu_level", "cpu_supports", "config"}


def _stub():
    """Names of the positional-only parameters of every function in the stub."""
    stub = Path(_core.__file__).with_name("_core.pyi").read_text(encoding="utf-8")
    functions = [node for node in ast.parse(stub).body if isinstance(node, ast.FunctionDef)]
    for node in functions:
        others = node.args.args, node.args.vararg, node.args.kwonlyargs, node.args.kwarg
        assert not any(others), f"{node.name}: all parameters are positional-only"
    return {node.name: [a.arg for a in node.args.posonlyargs] for node in functions}


def test_every_function_is_covered():
    assert set(FUNCTIONS) - SWITCHES == set(NAMES)
    assert set(FUNCTIONS) == set(_stub())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_text_signatures_are_those_of_the_stub(name):
    function = getattr(_core, name)
    parameters = inspect.signature(function).parameters
    assert all(p.kind is p.POSITIONAL_ONLY for p in parameters.values())
    assert list(parameters) == _stub()[name]
    if name in NAMES:
        assert len(parameters) == len(_calls()[name])
    summary = function.__doc__.split("\n\n")[0]
    assert summary[0].isupper() and summary.endswith("."), summary
    for parameter in parameters:  # numbers of the usual meaning need no word
        assert parameter in function.__doc__ or parameter in ("threads", "causal"), parameter


@pytest.mark.parametrize("name", NAMES)
def test_the_valid_call_works(name):
    getattr(_core, name)(*_calls()[name])


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arity_and_keywords(name):
    arguments = _calls()[name]
    for wrong in ([], arguments[:-1], [*arguments, 1], [*arguments, None, None]):
        _fails(name, wrong, TypeError)
    with pytest.raises(TypeError):
        getattr(_core, name)(*arguments[:-1], threads=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("junk", [None, "x", 1.5, object(), [], {}, b"bytes", np.float32(1), -7])
def test_junk_in_every_position(name, junk):
    for at, valid in enumerate(_calls()[name]):
        if (junk is None and (name, at) in OPTIONAL) or isinstance(valid, float):
            continue
        arguments = _calls()[name]
        arguments[at] = junk
        _fails(name, arguments)


def _wrong_arrays(a):
    """The same array with one property wrong at a time."""
    yield "dtype", a.astype(np.complex128)
    yield "narrow", a.astype(np.int8)
    yield "swapped", a.astype(a.dtype.newbyteorder()) if a.itemsize > 1 else a.astype(">i2")
    yield "dimensions", a[None]
    yield "flat", a.reshape(-1) if a.ndim > 1 else a.reshape(1, -1)
    yield "0-D", np.array(a.flat[0])
    yield "longer", np.concatenate([a, a])
    yield "shorter", a[:0]
    if a.ndim == 2:
        yield "wider", np.concatenate([a, a], axis=1)
        yield "narrower", a[:, :0].copy()
        yield "fortran", np.asfortranarray(a) if min(a.shape) > 1 else a[:, :0].copy()
        yield "strided", np.repeat(a, 2, axis=1)[:, ::2] if a.shape[1] > 1 else a[:0]
    if a.itemsize > 1:
        buffer = np.zeros(a.nbytes + 1, np.uint8)
        odd = buffer[1:].view(a.dtype).reshape(a.shape)
        odd[...] = a
        yield "unaligned", odd


def _legal(name, at, kind):
    """Changes that a function rightly accepts: any number of tokens, rows or indices."""
    if name == "hessian_update":
        return (at == 1 and kind in ("longer", "strided")) or (
            at == 3 and kind in ("longer", "shorter")
        )
    if (name, at, kind) == ("int8_linear", 0, "strided"):
        return True
    if name == "cross_update":
        return (at in (1, 2, 3) and kind == "strided") or (
            at == 5 and kind in ("longer", "shorter")
        )
    if name == "moved_outputs":
        return at in (0, 1) and kind == "strided"
    if kind == "narrow" and (name, at) in INT8:
        return True
    if name in ("activation_range", "outlier_columns") and at == 0:
        return kind in ("longer", "shorter")
    if name in ("channel_ranges", "activation_statistics"):
        return (at == 0 and kind in ("longer", "strided")) or (at == 2 and kind == "longer")
    if name == "equalization_errors":
        return at == 0 and kind == "longer"
    if name == "packed_matmul":
        return at == 0 and kind == "strided"
    if name == "best_paths" and at == 7:
        return kind == "shorter"
    return name == "finite_check" and kind in ("longer", "shorter", "wider", "narrower")


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arrays_in_every_position(name):
    for at, valid in enumerate(_calls()[name]):
        if not isinstance(valid, np.ndarray):
            continue
        for kind, wrong in _wrong_arrays(valid):
            if _legal(name, at, kind):
                continue
            arguments = _calls()[name]
            arguments[at] = wrong
            with pytest.raises(BAD):
                getattr(_core, name)(*arguments)
                pytest.fail(f"{name}: argument {at} with wrong {kind} was accepted")


@pytest.mark.parametrize("name", [n for n in NAMES if OUTPUTS[n]])
def test_outputs_must_be_writable(name):
    for at in OUTPUTS[name]:
        arguments = _calls()[name]
        arguments[at].flags.writeable = False
        before = arguments[at].copy()
        _fails(name, arguments, ValueError)
        np.testing.assert_array_equal(arguments[at], before)


BAD_GRIDS = [
    (),
    GRID[:-1],
    (*GRID, 1),
    list(GRID),
    (0, *GRID[1:]),
    (256, *GRID[1:]),
    (-1, *GRID[1:]),
    (15, 0, 4, *GRID[3:]),
    (15, 0, -1, *GRID[3:]),
    (15, 0, 1, 0, *GRID[4:]),
    (15, 0, 1, 257, *GRID[4:]),
    (15, 0, 1, 40, 0, *GRID[5:]),
    (*GRID[:5], 3, *GRID[6:]),
    (*GRID[:6], 16, *GRID[7:]),
    (*GRID[:6], -1, *GRID[7:]),
    (*GRID[:7], 0.0, 2.4),
    (*GRID[:7], 1.5, 2.4),
    (*GRID[:7], np.nan, 2.4),
    (*GRID[:8], 0.0),
    (*GRID[:8], np.nan),
    (*GRID[:8], 1e9),
    (2**40, *GRID[1:]),
    ("a", *GRID[1:]),
    (15.0, *GRID[1:]),
]


@pytest.mark.parametrize("grid", BAD_GRIDS, ids=range(len(BAD_GRIDS)))
def test_bad_grids(grid):
    for name, at in (("rtn", 2), ("gptq", 5)):
        arguments = _calls()[name]
        arguments[at] = grid
        _fails(name, arguments)


BAD_OPTIONS = [
    (),
    OPTIONS[:-1],
    list(OPTIONS),
    (0, *OPTIONS[1:]),
    (3, *OPTIONS[1:]),
    (-4, *OPTIONS[1:]),
    (16, *OPTIONS[1:]),
    (4, 0, *OPTIONS[2:]),
    (4, -128, *OPTIONS[2:]),
    (*OPTIONS[:5], -1, 0, 0.01),
    (*OPTIONS[:5], 1001, 0, 0.01),
    (*OPTIONS[:5], 1, 0, 0.01),
    (*OPTIONS[:6], -1, 0.01),
    (*OPTIONS[:6], 1001, 0.01),
    (*OPTIONS[:6], 1, 0.01),
    (2**70, *OPTIONS[1:]),
    (4.0, *OPTIONS[1:]),
]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=range(len(BAD_OPTIONS)))
def test_bad_options(options):
    arguments = _calls()["gptq"]
    arguments[4] = options
    _fails("gptq", arguments)


@pytest.mark.parametrize(
    "order", [[0] * 8, [-1, *range(1, 8)], [*range(7), 8], [*range(7), 2**62], [*range(7), 0]]
)
def test_the_order_must_be_a_permutation(order):
    for name, at in (("gptq", 3), ("factor", 1)):
        arguments = _calls()[name]
        arguments[at] = np.array(order)
        with pytest.raises(ValueError, match="order must be a permutation"):
            getattr(_core, name)(*arguments)


@pytest.mark.parametrize("rows", [[-1], [5], [0, 2**62]])
def test_row_indices_must_lie_in_x(rows):
    arguments = _calls()["hessian_update"]
    arguments[3] = np.array(rows)
    _fails("hessian_update", arguments, IndexError)
    np.testing.assert_array_equal(arguments[0], 1)


def test_hessian_grids_need_h():
    arguments = _calls()["rtn"]
    arguments[2], arguments[3] = (15, 0, 2, *GRID[3:]), None
    _fails("rtn", arguments, ValueError)


def test_numbers_out_of_range():
    for name, arguments in _calls().items():
        if name == "equalization_scales":  # has none
            continue
        for threads in (-1, 1025, 2**40, 2**80):
            _fails(name, [*arguments[:-1], threads])
    for name, at, values in [
        ("hessian_update", 2, (-1, 3)),
        ("rtn", 1, (0, 3, 16, -8)),
        ("obq", 4, (0, 256)),
        ("pack", 1, (0, 9)),
        ("unpack", 1, (0, 9)),
        ("words_pack", 3, (0, 1, 5, 9)),
        ("packed_matmul", 2, (-1, 2)),
        ("packed_matmul", 6, (1, 5, 6, 7)),
    ]:
        for value in values:
            arguments = _calls()[name]
            arguments[at] = value
            _fails(name, arguments, ValueError)


BAD_SIGNED_GRIDS = [
    None,
    (),
    (8, 1, 0),
    (8, 1, 0, 0, 0),
    [8, 1, 0, 0],
    (1, 1, 0, 0),
    (17, 1, 0, 0),
    (-8, 1, 0, 0),
    (8, 0, 1, 0),
    (8, 1, 1, 1),
    (9, 1, 0, 1),
    (8, 1, 0, 2),
    (2**40, 1, 0, 0),
    (8.0, 1, 0, 0),
    ("8", 1, 0, 0),
]


@pytest.mark.parametrize("grid", BAD_SIGNED_GRIDS, ids=range(len(BAD_SIGNED_GRIDS)))
def test_bad_signed_grids(grid):
    for name, at in (("signed_grid", 2), ("activations_quantize", 3), ("int8_linear", 2)):
        arguments = _calls()[name]
        arguments[at] = grid
        _fails(name, arguments)


def test_activation_arguments_that_do_not_belong_together():
    for at, value in [
        (3, (9, 1, 0, 0)),  # codes must be int16
        (4, 0),  # one grid, but as many scales as tokens
        (4, 2),
        (0, np.ones((5, 0), np.float32)),
    ]:
        arguments = _calls()["activations_quantize"]
        arguments[at] = value
        _fails("activations_quantize", arguments)
    for scale in (0.0, -1.0, np.nan):
        arguments = _calls()["activations_quantize"]
        arguments[4], arguments[6] = 0, np.full(1, scale, np.float32)
        arguments[7] = np.zeros(1, np.int16)
        _fails("activations_quantize", arguments, ValueError)
    for at in (6, 7):
        arguments = _calls()["int8_matmul"]
        arguments[at] = None
        _fails("int8_matmul", arguments, TypeError)
    arguments = _calls()["bias_correction"]
    arguments[0] = np.ones((3, 8))  # float64 beside float32
    _fails("bias_correction", arguments, TypeError)


def test_packed_groups_are_whole_steps_and_cover_all_places():
    for starts in ([0, 4], [0, 16], [8, 8], [1, 8], [0, -8], [-8, 8], [0, 2**31 - 1]):
        for name in ("packed_matmul", "packed_dequantize"):
            arguments = _calls()[name]
            arguments[-2] = np.array(starts, np.int32)
            _fails(name, arguments, ValueError)
    arguments = _calls()["packed_matmul"]  # three groups, of which one goes back
    arguments[7], arguments[8] = _f32(1, 3, 16), np.zeros((1, 3, 16), np.uint8)
    arguments[9] = np.array([0, 16, 0, 8], np.int32)
    _fails("packed_matmul", arguments, ValueError)


LAYERS = [("decoder_begin", 7), ("decoder_begin", 9), ("decoder_end", 8), ("decoder_end", 11)]


@pytest.mark.parametrize(("name", "at"), LAYERS)
def test_bad_layers_of_blocks(name, at):
    layer = _calls()[name][at]
    bad = [(), layer[:-1], (*layer, 1), (*layer[:-1], None, None), list(layer), (3, *layer[1:])]
    bad += [(-1, *layer[1:]), ("0", *layer[1:]), (layer[0], _f32(3), *layer[2:])]
    for part, value in enumerate(layer):
        if part == 0 or value is None:
            continue
        number = isinstance(value, float)
        for junk in (-1.0, "x", np.nan) if number else (object(), "x", [], np.float32(1)):
            bad.append((*layer[:part], junk, *layer[part + 1 :]))
        if isinstance(value, np.ndarray):
            for wrong in (
                value[None],
                value[:0],
                np.concatenate([value, value]),
                value.astype("c8"),
            ):
                bad.append((*layer[:part], wrong, *layer[part + 1 :]))
    for wrong in bad:
        arguments = _calls()[name]
        arguments[at] = wrong
        with pytest.raises(BAD):
            getattr(_core, name)(*arguments)
            pytest.fail(f"{wrong!r} was accepted")


def test_bad_tuples_of_blocks():
    blocks = _calls()["decoder_blocks"][4]
    bad = [(), list(blocks), (blocks[0],), (blocks[0], blocks[0][:-1]), (blocks[0], None)]
    for part, value in enumerate(blocks[0]):
        junk = [object(), "x", [], (), np.ones(3, np.complex64)]
        if isinstance(value, np.ndarray):
            junk += [value[None], value[:0], np.concatenate([value, value]), value.astype(np.int8)]
        bad += [((*blocks[0][:part], wrong, *blocks[0][part + 1 :]), blocks[1]) for wrong in junk]
        bad += [(blocks[0], (*blocks[1][:part], wrong, *blocks[1][part + 1 :])) for wrong in junk]
    for wrong in bad:
        arguments = _calls()["decoder_blocks"]
        arguments[4] = wrong
        with pytest.raises(BAD):
            _core.decoder_blocks(*arguments)
            pytest.fail(f"{wrong!r} was accepted")


BLOCK = (0, 8, 16, 4, 2, 4, 1e-5, 0.0)
BAD_BLOCKS = [
    (),
    BLOCK[:-1],
    list(BLOCK),
    (1, *BLOCK[1:]),
    (3, *BLOCK[1:]),
    (0, 0, *BLOCK[2:]),
    (0, 2**40, *BLOCK[2:]),
    (0, 8, 16, 3, 2, 4, 1e-5, 0.0),
    (0, 8, 16, 4, 0, 4, 1e-5, 0.0),
    (0, 8, 16, 4, 2, 3, 1e-5, 0.0),
    (0, 8, 16, 2**28, 2**28, 2**28, 1e-5, 0.0),
    (0, 8, 16, 4, 2, 4, np.nan, 0.0),
    (0.0, *BLOCK[1:]),
]


@pytest.mark.parametrize("block", BAD_BLOCKS, ids=range(len(BAD_BLOCKS)))
def test_bad_blocks(block):
    for name in ("decoder_begin", "decoder_end", "decoder_blocks"):
        arguments = _calls()[name]
        arguments[0] = block
        _fails(name, arguments)


def test_the_inner_size_of_a_block():
    arguments = _calls()["decoder_end"]
    for inner in (17, 40, 2**28):
        arguments[0] = (0, 8, inner, *BLOCK[3:])
        _fails("decoder_end", arguments)


def test_numbers_that_are_no_inputs_are_padding():
    order = np.array([0, 1, 2, 3, 4, 5, 8, -(2**31)], np.int32)
    for int8 in (0, 1):
        arguments = _calls()["packed_matmul"]
        arguments[0], arguments[2], arguments[5] = np.arange(40.0, dtype=np.float32), int8, order
        arguments[0] = arguments[0].reshape(5, 8)
        arguments[4][:] = 0x11111111
        _core.packed_matmul(*arguments)
        want = arguments[0][:, :6].sum(axis=1)
        np.testing.assert_allclose(arguments[3], np.tile(want, (16, 1)).T, rtol=0.01)
    codes = np.full((16, 8), 7, np.uint8)
    _core.words_unpack(codes, arguments[4], order, 4, 1)
    np.testing.assert_array_equal(codes, [[1] * 6 + [7] * 2] * 16)


def test_hopeless_values_do_not_crash():
    # NaN and infinity in what Python checks beforehand
    for value in (np.nan, np.inf, -np.inf, 3e38):
        for name, at in [
            ("gptq", 0),
            ("gptq", 1),
            ("gptq", 2),
            ("rtn", 0),
            ("rtn", 3),
            ("obq", 0),
            ("obq", 1),
            ("obq", 2),
            ("best_paths", 0),
            ("best_paths", 1),
            ("best_paths", 2),
            ("best_paths", 5),
            ("couple_block", 0),
            ("couple_block", 1),
            ("couple_block", 2),
            ("couple_block", 3),
            ("couple_rows", 0),
            ("couple_rows", 1),
            ("couple_rows", 2),
            ("couple_rows", 5),
            ("objective", 0),
            ("factor", 0),
        ]:
            for method in (0, 1, 2):
                arguments = _calls()[name]
                arguments[at] = np.full_like(arguments[at], value)
                if name in ("gptq", "rtn"):
                    spot = 5 if name == "gptq" else 2
                    arguments[spot] = (15, 0, method, *GRID[3:])
                try:
                    getattr(_core, name)(*arguments)
                except (FloatingPointError, ArithmeticError):
                    pass
        for name, spots in [
            ("codes_on_grid", (0, 1)),
            ("activation_range", (0,)),
            ("activations_quantize", (0,)),
            ("outlier_columns", (0,)),
            ("bias_correction", (0, 1, 2)),
            ("int8_matmul", (1, 4, 6, 7)),
            ("packed_matmul", (0, 7)),
        ]:
            for at in spots:
                arguments = _calls()[name]
                arguments[at] = np.full_like(arguments[at], value)
                try:
                    getattr(_core, name)(*arguments)
                except FloatingPointError:
                    pass
        _core.signed_grid(value, -value, (8, 1, 0, 0))
        _core.signed_grid(-value, value, (8, 0, 0, 0))


def test_cpu_levels():
    level = _core.config()[0]
    for name in ("AVX2", "sse", "avx512_bf16 "):
        with pytest.raises(ValueError):
            _core.set_cpu_level(name)
        assert _core.cpu_supports(name) is False
    for junk in (None, 5, b"base"):
        with pytest.raises(TypeError):
            _core.set_cpu_level(junk)
        with pytest.raises(TypeError):
            _core.cpu_supports(junk)
    assert _core.config()[0] == level


@pytest.mark.parametrize(
    ("name", "at", "value", "error", "message"),
    [
        ("pack", 1, 9, ValueError, r"^bits must lie in \[1, 8\], not 9$"),
        ("pack", 3, 2**80, ValueError, r"^threads must lie in \[0, 1024\], not 12089"),
        ("pack", 3, "2", TypeError, "^threads must be an integer, not str$"),
        ("hessian_finish", 2, "2", TypeError, "^factor must be a number, not str$"),
        ("hessian_finish", 0, [[1.0]], TypeError, "^S must be a NumPy array, not list$"),
        ("hessian_finish", 0, np.eye(8), TypeError, "^S must have dtype .*32, not float64: con"),
        ("hessian_finish", 0, _f32(8, 16)[:, ::2], ValueError, r"^S must be C-cont.*array\(S"),
        ("hessian_update", 1, np.ones((5, 8)), TypeError, "^X must have dtype float32, not"),
        ("hessian_update", 1, _f32(5, 7), ValueError, "^S has size 8 along axis 0, .* need 7$"),
        ("hessian_update", 3, np.array([0, 5]), IndexError, r"^rows\[1\] is 5, but X has 5 tokens"),
        ("factor", 1, np.zeros(8, int), ValueError, r"^order must be a perm.*order\[1\] is 0"),
        ("rtn", 1, 3, ValueError, "^group_size 3 must divide the 8 inputs$"),
        ("rtn", 2, 15, TypeError, r"^grid must be the tuple \(max_code, .*, norm\), not int$"),
        ("rtn", 2, GRID[:3], TypeError, "^grid must be the tuple .*, not one of 3 items$"),
        ("rtn", 2, (*GRID[:8], 101.0), ValueError, r"^grid\.norm .* in \(0, 100\], not 101\.0$"),
        ("rtn", 2, (3, *GRID[1:6], 4, *GRID[7:]), ValueError, "min_zero 4 must not exceed .* 3$"),
        ("gptq", 4, (*OPTIONS[:5], -1, 0, 0.01), ValueError, r"^options\.refine_passes .* 1000"),
        ("equalization_errors", 1, (_f32(3, 8), 1), TypeError, r"^weights\[1\] must be a NumPy"),
        ("int8_matmul", 4, _f32(2), ValueError, "^w_zeros has size 1 along axis 0"),
    ],
)  # fmt: skip
def test_messages_name_the_argument(name, at, value, error, message):
    arguments = _calls()[name]
    arguments[at] = value
    with pytest.raises(error, match=message):
        getattr(_core, name)(*arguments)
    with pytest.raises(TypeError, match=rf"^{name}\(.*threads\) takes {len(arguments)} arguments"):
        getattr(_core, name)(*arguments, 1)


class _Number:
    """Runs code of the caller's when it is converted."""

    def __index__(self):
        raise AssertionError("converted")

    __float__ = __int__ = __bool__ = __index__


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_numbers(name):
    for at, valid in enumerate(_calls()[name]):
        arguments = _calls()[name]
        if isinstance(valid, (int, float)):
            arguments[at] = np.int64(valid) if isinstance(valid, int) else np.float32(valid)
            getattr(_core, name)(*arguments)
            arguments[at] = _Number()
        elif isinstance(valid, tuple):
            arguments[at] = (*valid[:-1], _Number())
        else:
            continue
        with pytest.raises(TypeError, match="must be"):
            getattr(_core, name)(*arguments)


def test_order_and_g_idx_may_share_memory():
    rng = np.random.default_rng(0)
    order = np.array([6, 4, 7, 5, 1, 0, 3, 2])
    A = rng.normal(size=(8, 8)).astype(np.float32)
    W, H = rng.normal(size=(3, 8)).astype(np.float32), A @ A.T + np.eye(8, dtype=np.float32)
    R = np.zeros((8, 8), np.float32)
    assert _core.factor(H, order, np.zeros(8), R, 1) == -1
    found = []
    for options in (OPTIONS, (4, 128, 0, 1, 1, 3, 1, 0.01), (4, 128, 1, 0, 1, 3, 1, 0.01)):
        for shared in (False, True):
            given = order.copy()
            g_idx = given.view(np.int32)[:8] if shared else np.zeros(8, np.int32)
            arguments = _calls()["gptq"]
            arguments[:5], arguments[9] = [W, H, R, given, options], g_idx
            arguments[10] = np.zeros((1 + options[5] + 2 * options[6], 3))
            _core.gptq(*arguments)
            found.append([arguments[at].copy() for at in OUTPUTS["gptq"]])
            if shared:
                assert sorted(g_idx) == [0] * 4 + [1] * 4
                assert not np.array_equal(given, order)
        for apart, together in zip(*found[-2:], strict=True):
            np.testing.assert_array_equal(apart, together)


def test_the_order_must_keep_groups_together_that_get_grids_on_the_way():
    arguments = _calls()["gptq"]
    arguments[3] = np.array([6, 4, 7, 1, 5, 0, 3, 2])
    _fails("gptq", arguments, ValueError)
    for options in ((4, 128, 0, 1, 1, 0, 0, 0.01), (4, 128, 1, 0, 1, 0, 0, 0.01)):
        arguments[4] = options
        _core.gptq(*arguments)


@pytest.mark.parametrize("name", [n for n in NAMES if OUTPUTS[n]])
def test_arrays_that_share_all_their_memory_do_not_crash(name):
    arguments = _calls()[name]
    arrays = [a for a in arguments if isinstance(a, np.ndarray)]
    memory = np.zeros(max(a.nbytes for a in arrays), np.uint8)
    for at, valid in enumerate(arguments):
        if isinstance(valid, np.ndarray):
            arguments[at] = memory[: valid.nbytes].view(valid.dtype).reshape(valid.shape)
    for last in reversed(arrays):  # one of them starts with what it should hold
        memory[: last.nbytes] = last.reshape(-1).view(np.uint8)
        try:
            getattr(_core, name)(*arguments)
        except (ValueError, IndexError, ArithmeticError):
            pass


@pytest.mark.parametrize("name", [n for n in NAMES if isinstance(_calls()[n][-1], int)])
def test_arrays_are_not_resized_during_a_call(name):
    tried = []

    class Threads(int):
        def __repr__(self):  # runs within the call, for its message
            for a in arrays:
                tried.append(a)
                with pytest.raises(ValueError, match="cannot resize"):
                    a.resize(1000, refcheck=False)
            return "too many"

    arguments = [a.copy() if isinstance(a, np.ndarray) else a for a in _calls()[name]]
    arrays = [a for a in arguments if isinstance(a, np.ndarray)]
    for items in (a for a in arguments if isinstance(a, tuple)):
        arrays += [a for a in items if isinstance(a, np.ndarray)]
    with pytest.raises(ValueError, match="^threads must lie in .* not too many$"):
        getattr(_core, name)(*arguments[:-1], Threads(2000))
    assert len(tried) == len(arrays) > 0
    for a in arrays:
        a.resize(1000, refcheck=False)

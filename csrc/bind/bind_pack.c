/* bind_pack.c - pack, unpack. */
#include "bind.h"

/* Arguments of either direction. */
typedef struct {
    PyArrayObject *codes, *words;
    int bits, threads;
    npy_intp rows, columns;
} stream;

/* (codes, bits, words, threads) */
static int stream_parse(PyObject *const *args, stream *s) {
    if (args_array(&s->codes, args[0], "codes", NPY_UINT8, 2)) return -1;
    s->bits = (int)args_int(args[1], "bits", 1, 8);
    if (s->bits < 0 || args_array(&s->words, args[2], "words", NPY_UINT32, 2) ||
        args_threads(args[3], &s->threads))
        return -1;
    s->rows = PyArray_DIM(s->codes, 0);
    s->columns = PyArray_DIM(s->codes, 1);
    return args_shape(s->words, "words", s->rows, (s->columns * s->bits + 31) / 32);
}

PTQ_BIND(pack, 4, "codes, bits, words, threads",
         "Pack the codes of each row into a dense little-endian stream of 32-bit words.\n\n"
         "codes (rows, columns) uint8, below 2**bits; bits from 1 to 8; words\n"
         "(rows, ceil(columns * bits / 32)) uint32, written.") {
    stream s;
    if (stream_parse(args, &s) || PyArray_FailUnlessWriteable(s.words, "words") < 0) return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_pack(PyArray_DATA(s.codes), s.rows, s.columns, s.bits,
                                     PyArray_DATA(s.words), s.threads));
    return args_result(status);
}

PTQ_BIND(unpack, 4, "codes, bits, words, threads",
         "Unpack what pack() wrote.\n\n"
         "codes (rows, columns) uint8, written; bits from 1 to 8; words\n"
         "(rows, ceil(columns * bits / 32)) uint32.") {
    stream s;
    if (stream_parse(args, &s) || PyArray_FailUnlessWriteable(s.codes, "codes") < 0) return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_unpack(PyArray_DATA(s.words), s.rows, s.columns, s.bits,
                                       PyArray_DATA(s.codes), s.threads));
    return args_result(status);
}

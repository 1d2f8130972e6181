/* bind_pack.c - pack, unpack. */
#include "bind.h"

typedef struct {
    PyArrayObject *codes, *words;
    int bits, threads;
    npy_intp rows, columns;
} packing;

/* (codes, bits, words, threads); `to_words` says which side is written. */
static int packing_parse(const char *name, PyObject *const *args, Py_ssize_t nargs, int to_words,
                         packing *p) {
    if (args_count(name, nargs, 4)) return -1;
    p->codes = args_array(args[0], "codes", NPY_UINT8, 2, !to_words);
    p->bits = p->codes ? (int)args_int(args[1], "bits", 1, 8) : -1;
    p->words = p->bits > 0 ? args_array(args[2], "words", NPY_UINT32, 2, to_words) : NULL;
    p->threads = p->words ? (int)args_int(args[3], "threads", 0, 1024) : -1;
    if (p->threads < 0) return -1;
    p->rows = PyArray_DIM(p->codes, 0);
    p->columns = PyArray_DIM(p->codes, 1);
    return args_dim(p->words, "words", 0, p->rows) ||
           args_dim(p->words, "words", 1, (p->columns * p->bits + 31) / 32);
}

/* pack(codes, bits, words, threads): codes must be below 2^bits */
PTQ_BIND(bind_pack) {
    (void)self;
    packing p;
    if (packing_parse("pack", args, nargs, 1, &p)) return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_pack(PyArray_DATA(p.codes), p.rows, p.columns, p.bits,
                                     PyArray_DATA(p.words), p.threads));
    return args_result(status);
}

/* unpack(codes, bits, words, threads): fills codes */
PTQ_BIND(bind_unpack) {
    (void)self;
    packing p;
    if (packing_parse("unpack", args, nargs, 0, &p)) return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_unpack(PyArray_DATA(p.words), p.rows, p.columns, p.bits,
                                       PyArray_DATA(p.codes), p.threads));
    return args_result(status);
}

/* row_product.h - one token times packed weights in two steps, for those who do several such
 * products in one parallel region: what is made of the token, then any panels of the outputs.
 * The numbers are those of ptq_packed_matmul and ptq_int8_matmul. */
#ifndef PTQ_ROW_PRODUCT_H
#define PTQ_ROW_PRODUCT_H

#include "internal.h"

typedef struct {
    const ptq_kernels *k;
    const ptq_row_layer *layer;
    int fixed;    /* floats as digits */
    float *y;     /* (outputs), written */
    float *row;   /* (places) the token in the order of the weights */
    float *spare; /* (inputs) */
    float *values, *sums, *code_scales;
    int8_t *codes;
    int32_t *code_sums;
    ptq_int8_row simulated;
} ptq_row_product;

/* Whether a product of this layer can be made. */
int ptq_row_valid(const ptq_row_layer *layer, ptq_dtype dtype);
/* Bytes of memory that it works in, a multiple of 64. */
int64_t ptq_row_memory(const ptq_kernels *k, const ptq_row_layer *layer);
/* Takes its memory from *memory. */
void ptq_row_make(ptq_row_product *p, const ptq_kernels *k, const ptq_row_layer *layer,
                  char **memory);
/* Whether what is made of a token serves the other as well. */
int ptq_row_same(const ptq_row_product *p, const ptq_row_product *other);
void ptq_row_share(ptq_row_product *p, const ptq_row_product *other);
/* x (inputs) of values of the dtype; 0 if the layer rounds them and one is not finite. */
int ptq_row_prepare(ptq_row_product *p, const float *x);
/* Outputs of some panels into y, without the bias. */
void ptq_row_multiply(const ptq_row_product *p, int64_t panel, int64_t panels);

#endif

/* The interface of the expert kernels: one layer's chosen experts on a few tokens, weights read where they lie.

   Knows extents (moedge/runtime/formats.py says what is in one) and tokens; no files, no models. Errors are the
   caller's to prevent: moedge/runtime/kernels.py checks every shape before it calls. */

#ifndef MOEDGE_H
#define MOEDGE_H

#include <stddef.h>
#include <stdint.h>

enum { MOEDGE_F32, MOEDGE_BF16, MOEDGE_F16, MOEDGE_INT8, MOEDGE_INT4, MOEDGE_MXFP4 };

enum {
    MOEDGE_SILU,
    MOEDGE_GELU,
    MOEDGE_GELU_TANH,
    MOEDGE_RELU,
    MOEDGE_RELU_SQUARED,
    MOEDGE_CLAMPED_SWIGLU, /* gpt-oss: (up + 1) * gate * sigmoid(alpha * gate), both clamped to the limit */
};

/* One matrix [rows, columns] of an expert. Row r is stored row `first + r * step`: gate and up may be halves of one
   stored matrix, or alternate in it. Offsets are bytes from the start of the extent, -1 for what is not there. */
typedef struct {
    int64_t values, scales, factors, zeros, bias;
    int32_t code, bias_code;
    int32_t rows, columns, group;
    int32_t first, step;
} moedge_matrix;

/* How an expert computes: down(act(gate) * up), or down(act(up)) where gate.rows is 0. */
typedef struct {
    moedge_matrix gate, up, down;
    int32_t activation;
    float alpha, limit; /* of MOEDGE_CLAMPED_SWIGLU */
} moedge_expert;

/* One call. Expert e takes the routed rows starts[e] to starts[e + 1]; routed row i is token tokens[i] with router
   weight weights[i]. */
typedef struct {
    int32_t experts, tokens_count;
    const uint8_t *const *extents; /* [experts], each at a multiple of 64 bytes */
    const int32_t *starts;         /* [experts + 1] */
    const int32_t *tokens;
    const float *weights;
    const float *x; /* [tokens_count, hidden] */
    float *out;     /* [tokens_count, hidden], added to in the order of the experts; or NULL */
    float *terms;   /* [routed rows, hidden], each row's weighted output; or NULL */
    uint8_t *workspace;
} moedge_call;

/* Rows of inputs times one matrix: out[i] = matrix * x[i]. x and out are contiguous, of the dtypes that the codes say. */
typedef struct {
    int32_t count, x_code, out_code;
    const void *x; /* [count, columns] */
    void *out;     /* [count, rows] */
    uint8_t *workspace;
} moedge_rows;

/* Each row of x over its root mean square, rounded to the dtype of x, times offset + weight: out is of that dtype too. */
typedef struct {
    int32_t count, columns, code, weight_code; /* fp32 or bf16 */
    float epsilon, offset;
    const void *x, *weight;
    void *out;
} moedge_norm;

/* One of an attention's four matrices, at the start of `memory`; bias [rows] or NULL. */
typedef struct {
    moedge_matrix matrix;
    const uint8_t *memory;
    const void *bias;
} moedge_projection;

/* Root mean square norm of queries or keys: of each head where columns is the head's size, of all heads at once where it
   is theirs together, none where it is 0. */
typedef struct {
    const void *weight; /* [columns] */
    int32_t columns;
    float epsilon, offset;
} moedge_head_norm;

/* Attention as Llama and its kin have it: o(softmax(scale * q(x) K) V), q and k normed, then their first `rotated`
   numbers of a head rotated by halves; heads / kv_heads queries share a head of keys. Where a head has a sink, that is
   one more score of its softmax, without a value (gpt-oss). Everything but the matrices is of the dtype `code`, fp32 or
   bf16. q, k and v are stored in one format. */
typedef struct {
    moedge_projection q, k, v, o;
    moedge_head_norm q_norm, k_norm;
    const void *sinks;                           /* [heads], or NULL */
    int32_t heads, kv_heads, head_size, rotated; /* head_size: a multiple of 8 */
    int32_t angles;                              /* cosines and sines: `rotated`, or half as many for both halves */
    int32_t code;
    float scale;
} moedge_attention;

/* One more token. Head h of the keys begins at h * head_stride numbers, its token t at t * head_size from there; so do
   values. The token's own are written behind those of `past` tokens. */
typedef struct {
    const void *x, *cos, *sin; /* [hidden], [angles], [angles] */
    void *keys, *values;
    int64_t head_stride;
    int32_t past;
    void *out; /* [hidden] */
    uint8_t *workspace;
} moedge_attention_call;

/* What a decoder layer does with a token before its experts: a norm, attention, its sum with the token, another norm,
   and the router's choice: the top_k largest of softmax(router * normed), scaled to a sum of 1 where `normalised`. The
   router's matrix is stored as it is. */
typedef struct {
    moedge_attention attention;
    moedge_head_norm before, after;
    moedge_projection router;
    int32_t top_k, normalised;
} moedge_decoder_layer;

typedef struct {
    moedge_attention_call attention; /* x: the token; out: its sum with what attention gives */
    float *normed;                   /* [hidden]: what the experts are to see */
    int32_t *experts;                /* [top_k], the likeliest first */
    float *weights;                  /* [top_k] */
} moedge_decoder_call;

/* Rows of numbers to int8 or int4 groups, as runtime/formats.py defines it: number c of row r is at r * row_step +
   c * column_step. zeros is NULL for symmetric formats. */
typedef struct {
    int32_t rows, columns, code, x_code, group;
    int64_t row_step, column_step;
    const void *x;
    void *values;
    uint16_t *scales;
    float *factors;
    int8_t *zeros;
} moedge_rounding;

/* One row of bf16 numbers, x [columns], times a matrix [rows, columns] of bf16 -> out [rows]; columns a multiple of 32.
   The matrix is at `matrix`, or begins at number `first` of the `count` that lie at `shortened` in fewer bits each. */
typedef struct {
    const uint16_t *matrix;
    const uint8_t *shortened; /* or NULL */
    int64_t count, first;
    const uint16_t *x;
    uint16_t *out;
    uint8_t *workspace;
    int32_t rows, columns, order, step;
} moedge_product;

/* Where bytes of a file are to go. */
typedef struct {
    int64_t offset, nbytes;
    uint8_t *to;
} moedge_piece;

enum { MOEDGE_PAGE = 4096 };

const char *moedge_sources(void);        /* hash of the sources that this library was built from */
int moedge_variants(void);               /* how many variants were compiled in, best last */
const char *moedge_variant_name(int variant);
int moedge_variant_runs(int variant);    /* whether this processor has its instructions */
size_t moedge_workspace(const moedge_expert *expert, int tokens_count, int routed_rows);
void moedge_layer(int variant, const moedge_expert *expert, const moedge_call *call, int threads);
size_t moedge_linear_workspace(const moedge_matrix *matrix, int count);
void moedge_linear(int variant, const moedge_matrix *matrix, const uint8_t *extent, const moedge_rows *call, int threads);
size_t moedge_attention_workspace(const moedge_attention *attention, int tokens, int threads);
void moedge_attend(int variant, const moedge_attention *attention, const moedge_attention_call *call, int threads);
size_t moedge_route_workspace(const moedge_decoder_layer *layer, int tokens, int threads);
void moedge_attend_and_route(int variant, const moedge_decoder_layer *layer, const moedge_decoder_call *call, int threads);
int moedge_quantise(int variant, const moedge_rounding *call); /* 0; 1 where a number is not finite; 2 without memory */
void moedge_rms_norm(const moedge_norm *call);
/* Rows begin to end of a matrix as fp32, or rounded to bf16, into out [end - begin, columns]. */
void moedge_dequantise(int variant, const moedge_matrix *matrix, const uint8_t *extent, int begin, int end, int bf16,
                       void *out);
/* bf16 numbers, a multiple of 32 of them and fewer than 2^32, in 12 bits each and back, bit for bit. */
size_t moedge_short_bytes(int64_t count);
int moedge_shorten(const uint16_t *x, int64_t count, uint8_t *out); /* 1; 0 where their exponents differ too much */
/* As moedge_shorten, but smaller by as much as their exponents allow: the bytes written, or 0 where that is more than
   `room`, or this processor cannot. */
size_t moedge_compact(const uint16_t *x, int64_t count, uint8_t *out, size_t room);
void moedge_restore(int variant, const uint8_t *from, int64_t count, uint16_t *x);
/* Numbers begin to end of them, both multiples of 32. */
void moedge_restore_some(int variant, const uint8_t *from, int64_t count, int64_t begin, int64_t end, uint16_t *x);
int moedge_orders(void); /* in which moedge_one_row can add: how many were compiled in */
const char *moedge_order_name(int order);
int moedge_order_runs(int order); /* whether this processor has its instructions */
size_t moedge_product_workspace(const moedge_product *call, int threads);
void moedge_one_row(int variant, const moedge_product *call, int threads);
/* Pieces of a file from `begin`, a multiple of MOEDGE_PAGE, to `end`, read in pages through `block` of `size` bytes: the
   bytes read, or -1 where that failed or the file ends before. */
int64_t moedge_read(int file, const moedge_piece *pieces, int count, int64_t begin, int64_t end, uint8_t *block,
                    int64_t size);
uint64_t moedge_read_sum(int variant, const uint8_t *memory, size_t nbytes, int threads); /* reads it all, once */

#endif

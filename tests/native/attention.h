/* Checks of a token's attention, and of what a decoder layer does around it up to the choice of experts. */

#ifndef ATTENTION_H
#define ATTENTION_H

#include "backbone.h"

typedef struct {
    extent_bytes extents[5]; /* q, k, v, o, router */
    moedge_decoder_layer layer;
    moedge_decoder_call call;
    int hidden, room, past;
    void *x, *cos, *sin, *keys, *values, *sinks, *out;
} decoder;

static void *random_numbers(int count, int code, float size) {
    void *x = allocate((size_t)count * (code == MOEDGE_F32 ? 4 : 2));
    for (int i = 0; i < count; i++) put_number(x, code, i, size * normal());
    return x;
}

/* `zeros`: whether the matrix is to have zero points; -1 for either. */
static moedge_projection random_projection(extent_bytes *extent, int code, int rows, int columns, int dtype, int zeros) {
    moedge_projection p = {put_matrix(extent, code, rows, columns, 1, 0), NULL, NULL};
    while (zeros >= 0 && (p.matrix.zeros >= 0) != zeros) {
        free(extent->bytes);
        *extent = (extent_bytes){NULL, 0};
        p.matrix = put_matrix(extent, code, rows, columns, 1, 0);
    }
    p.matrix.bias = -1;
    p.memory = extent->bytes;
    if (below(2)) p.bias = random_numbers(rows, dtype, 0.5f);
    return p;
}

static moedge_head_norm random_norm(int columns, int code) {
    moedge_head_norm norm = {NULL, columns, 1e-5f, below(2) ? 1.0f : 0.0f};
    if (columns) norm.weight = random_numbers(columns, code, 1);
    return norm;
}

static decoder random_decoder(int code, int dtype) {
    decoder d = {.hidden = 8 + below(90), .past = below(below(3) ? 12 : 90)};
    int kv_heads = 1 + below(4), heads = kv_heads * (1 + below(3)), size = 8 * (1 + below(6));
    d.room = d.past + 1 + below(3);
    moedge_attention *a = &d.layer.attention;
    *a = (moedge_attention){.heads = heads, .kv_heads = kv_heads, .head_size = size, .rotated = 2 * below(size / 2 + 1),
                            .code = dtype, .scale = 0.3f / (float)size};
    a->angles = below(2) ? a->rotated : a->rotated / 2;
    if (below(2)) a->sinks = d.sinks = random_numbers(heads, dtype, 2);
    a->q = random_projection(&d.extents[0], code, heads * size, d.hidden, dtype, -1);
    int zeros = a->q.matrix.zeros >= 0; /* queries, keys and values are stored in one format */
    a->k = random_projection(&d.extents[1], code, kv_heads * size, d.hidden, dtype, zeros);
    a->v = random_projection(&d.extents[2], code, kv_heads * size, d.hidden, dtype, zeros);
    a->o = random_projection(&d.extents[3], code, d.hidden, heads * size, dtype, -1);
    int normed = below(3);
    a->q_norm = random_norm(normed == 2 ? heads * size : normed * size, dtype);
    a->k_norm = random_norm(normed == 2 ? kv_heads * size : normed * size, dtype);
    d.layer.before = random_norm(d.hidden, dtype), d.layer.after = random_norm(d.hidden, dtype);
    d.layer.router = random_projection(&d.extents[4], dtype, 2 + below(40), d.hidden, dtype, -1);
    d.layer.top_k = 1 + below(d.layer.router.matrix.rows < 8 ? d.layer.router.matrix.rows : 8);
    d.layer.normalised = below(2);
    d.x = random_numbers(d.hidden, dtype, 0.3f), d.out = random_numbers(d.hidden, dtype, 1);
    d.cos = random_numbers(size, dtype, 1), d.sin = random_numbers(size, dtype, 1);
    d.keys = random_numbers(kv_heads * d.room * size, dtype, 1);
    d.values = random_numbers(kv_heads * d.room * size, dtype, 1);
    d.call.attention = (moedge_attention_call){d.x, d.cos, d.sin, d.keys, d.values, (int64_t)d.room * size, d.past, d.out, NULL};
    d.call.normed = allocate((size_t)d.hidden * 4);
    d.call.experts = allocate((size_t)d.layer.top_k * 4), d.call.weights = allocate((size_t)d.layer.top_k * 4);
    return d;
}

static void forget(decoder *d) {
    moedge_projection *projections[] = {&d->layer.attention.q, &d->layer.attention.k, &d->layer.attention.v,
                                        &d->layer.attention.o, &d->layer.router};
    moedge_head_norm *norms[] = {&d->layer.attention.q_norm, &d->layer.attention.k_norm, &d->layer.before, &d->layer.after};
    for (int i = 0; i < 5; i++) free(d->extents[i].bytes), free((void *)projections[i]->bias);
    for (int i = 0; i < 4; i++) free((void *)norms[i]->weight);
    free(d->x), free(d->cos), free(d->sin), free(d->keys), free(d->values), free(d->sinks), free(d->out);
    free(d->call.normed), free(d->call.experts), free(d->call.weights);
}

/* ---- by definition ---- */

static double *projected(const moedge_projection *p, const double *x, int dtype) {
    double *y = allocate((size_t)p->matrix.rows * 8), size;
    for (int r = 0; r < p->matrix.rows; r++)
        y[r] = reference(&p->matrix, p->memory, r, x, &size) + (p->bias ? number(p->bias, dtype, r) : 0);
    return y;
}

static void apply_norm(const moedge_head_norm *norm, double *x, int count, int dtype) {
    for (int start = 0; norm->columns && start < count; start += norm->columns) {
        double sum = 0;
        for (int i = 0; i < norm->columns; i++) sum += x[start + i] * x[start + i];
        double scale = 1 / sqrt(sum / norm->columns + (double)norm->epsilon);
        for (int i = 0; i < norm->columns; i++)
            x[start + i] *= scale * ((double)norm->offset + number(norm->weight, dtype, i));
    }
}

static void rotate(const decoder *d, double *x, int count) {
    int size = d->layer.attention.head_size, half = d->layer.attention.rotated / 2, dtype = d->layer.attention.code;
    int other = half ? half % d->layer.attention.angles : 0;
    for (int start = 0; start < count; start += size)
        for (int i = 0; i < half; i++) {
            double low = x[start + i], high = x[start + i + half];
            x[start + i] = low * number(d->cos, dtype, i) - high * number(d->sin, dtype, i);
            x[start + i + half] = high * number(d->cos, dtype, i + other) + low * number(d->sin, dtype, i + other);
        }
}

static double largest_of(const double *x, int count) {
    double most = 0;
    for (int i = 0; i < count; i++) most = fmax(most, fabs(x[i]));
    return most;
}

/* The numbers at `found` are as expected, to a share of the largest. */
static void compare(const char *what, int v, const decoder *d, const void *found, int dtype, const double *expected,
                    int count) {
    const moedge_matrix *q = &d->layer.attention.q.matrix;
    double share = (q->code > MOEDGE_INT8 ? 0.05 : 0.002) + (d->layer.attention.code == MOEDGE_F32 ? 0 : 0.02);
    double allowed = share * largest_of(expected, count) + 1e-30;
    for (int i = 0; i < count; i++) {
        double error = fabs(number(found, dtype, i) - expected[i]);
        if (!(error <= allowed)) fail(what, v, q, d->past, error, allowed);
    }
}

/* What attention gives for x; its own key and value are taken from the cache, after these were compared. */
static double *attended(int v, const decoder *d, const double *x) {
    const moedge_attention *a = &d->layer.attention;
    int size = a->head_size, width = a->code == MOEDGE_F32 ? 4 : 2;
    double *q = projected(&a->q, x, a->code), *k = projected(&a->k, x, a->code), *own = projected(&a->v, x, a->code);
    double *mixed = calloc((size_t)(a->heads * size), 8), *scores = allocate((size_t)(d->past + 1) * 8);
    apply_norm(&a->q_norm, q, a->heads * size, a->code), apply_norm(&a->k_norm, k, a->kv_heads * size, a->code);
    rotate(d, q, a->heads * size), rotate(d, k, a->kv_heads * size);
    for (int h = 0; h < a->kv_heads; h++) {
        int64_t at = ((int64_t)h * d->room + d->past) * size * width;
        compare("key", v, d, (const uint8_t *)d->keys + at, a->code, k + h * size, size);
        compare("value", v, d, (const uint8_t *)d->values + at, a->code, own + h * size, size);
    }
    for (int h = 0; h < a->heads; h++) {
        int first = h / (a->heads / a->kv_heads) * d->room * size;
        double sum = a->sinks ? exp(number(a->sinks, a->code, h)) : 0;
        for (int t = 0; t <= d->past; t++) {
            double score = 0;
            for (int i = 0; i < size; i++) score += q[h * size + i] * number(d->keys, a->code, first + t * size + i);
            sum += scores[t] = exp(score * (double)a->scale);
        }
        for (int t = 0; t <= d->past; t++)
            for (int i = 0; i < size; i++)
                mixed[h * size + i] += scores[t] / sum * number(d->values, a->code, first + t * size + i);
    }
    double *out = projected(&a->o, mixed, a->code);
    free(q), free(k), free(own), free(mixed), free(scores);
    return out;
}

static double *as_doubles(const void *x, int dtype, int count) {
    double *out = allocate((size_t)count * 8);
    for (int i = 0; i < count; i++) out[i] = number(x, dtype, i);
    return out;
}

/* ---- checks ---- */

/* Every weight is its expert's, no expert is there twice, and none that is not there is likelier. */
static void check_choice(int v, const decoder *d, const double *normed) {
    const moedge_decoder_layer *layer = &d->layer;
    int experts = layer->router.matrix.rows, dtype = layer->attention.code;
    double *logits = projected(&layer->router, normed, dtype), sum = 0, chosen = 0, least = 1;
    double share = 0.002 + (dtype == MOEDGE_F32 ? 0 : largest_of(logits, experts) * 0x1p-7);
    for (int e = 0; e < experts; e++) sum += exp(logits[e]);
    for (int k = 0; k < layer->top_k; k++) chosen += exp(logits[d->call.experts[k]]) / sum;
    for (int k = 0; k < layer->top_k; k++) {
        int e = d->call.experts[k];
        double expected = exp(logits[e]) / sum;
        least = fmin(least, expected);
        if (layer->normalised) expected /= chosen;
        double error = fabs(d->call.weights[k] - expected);
        if (!(error <= 2 * share * expected)) fail("weight", v, &layer->router.matrix, k, error, 2 * share * expected);
        logits[e] = NAN;
    }
    for (int e = 0, there = 0; e < experts; e++) {
        there += isnan(logits[e]);
        if (exp(logits[e]) / sum > least * (1 + 2 * share)) fail("choice", v, &layer->router.matrix, e, logits[e], least);
        if (e == experts - 1 && there != layer->top_k) fail("number of experts", v, &layer->router.matrix, 0, there, 0);
    }
    free(logits);
}

static void check_decoder(int v, int code) {
    int dtype = below(2) ? MOEDGE_F32 : MOEDGE_BF16;
    decoder d = random_decoder(code == MOEDGE_BF16 ? dtype : code, dtype);
    size_t each = dtype == MOEDGE_F32 ? 4 : 2;
    void *alone = allocate((size_t)d.hidden * each);
    double *x = as_doubles(d.x, dtype, d.hidden);

    d.call.attention.workspace = allocate(moedge_attention_workspace(&d.layer.attention, d.past + 1, 3));
    moedge_attend(v, &d.layer.attention, &d.call.attention, 1 + below(3));
    double *expected = attended(v, &d, x);
    compare("attention", v, &d, d.out, dtype, expected, d.hidden);
    memcpy(alone, d.out, (size_t)d.hidden * each);
    moedge_attend(v, &d.layer.attention, &d.call.attention, 1);
    if (memcmp(alone, d.out, (size_t)d.hidden * each)) fail("attention by threads", v, &d.layer.attention.q.matrix, d.past, 1, 0);
    free(d.call.attention.workspace), free(expected);

    d.call.attention.workspace = allocate(moedge_route_workspace(&d.layer, d.past + 1, 3));
    moedge_attend_and_route(v, &d.layer, &d.call, 1 + below(3));
    double *normed = as_doubles(d.x, dtype, d.hidden);
    apply_norm(&d.layer.before, normed, d.hidden, dtype);
    double *sum = attended(v, &d, normed);
    for (int i = 0; i < d.hidden; i++) sum[i] += x[i];
    compare("sum", v, &d, d.out, dtype, sum, d.hidden);
    double *after = as_doubles(d.out, dtype, d.hidden);
    apply_norm(&d.layer.after, after, d.hidden, dtype);
    compare("norm of the sum", v, &d, d.call.normed, MOEDGE_F32, after, d.hidden);
    free(after), after = as_doubles(d.call.normed, MOEDGE_F32, d.hidden);
    check_choice(v, &d, after);
    memcpy(alone, d.out, (size_t)d.hidden * each);
    moedge_attend_and_route(v, &d.layer, &d.call, 1);
    if (memcmp(alone, d.out, (size_t)d.hidden * each)) fail("sum by threads", v, &d.layer.attention.q.matrix, d.past, 1, 0);
    free(d.call.attention.workspace), free(alone), free(x), free(normed), free(sum), free(after);
    forget(&d);
}

#endif

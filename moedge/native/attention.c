/* Attention of one more token over its cache, in one call; and with what stands around it in a decoder layer, up to the
   router's choice of experts.

   Threads take rows of the matrices, then heads of keys with the queries that share them. No thread adds to another's
   number, so their number changes no bit. */

#include <math.h>

#include "moedge.h"
#include "pool.h"
#include "product.h"

enum { CHUNK = 32 }; /* weight rows that are computed at once */

typedef struct {
    const variant *variant;
    const moedge_attention *attention;
    const moedge_attention_call *call;
    prepared input, mixed_input;
    float *x, *q, *k, *v; /* [hidden], and the rows of each matrix */
    float *ready, *ready_key; /* queries and the token's keys, normed and rotated */
    float *mixed;             /* [heads * head_size], what the heads give */
    float *scores;            /* [threads, tokens] */
} attention_job;

static float *take_floats(uint8_t *workspace, size_t *end, int64_t count) {
    float *at = (float *)(void *)(workspace + *end);
    *end += ((size_t)count * sizeof *at + 63) / 64 * 64;
    return at;
}

static attention_job lay_out(const moedge_attention *a, int tokens, int threads, uint8_t *workspace, size_t *end) {
    attention_job job = {.attention = a};
    job.input = moedge_take_prepared(&a->q.matrix, 1, workspace, end);
    job.mixed_input = moedge_take_prepared(&a->o.matrix, 1, workspace, end);
    job.x = take_floats(workspace, end, a->q.matrix.columns);
    job.q = take_floats(workspace, end, a->q.matrix.rows);
    job.k = take_floats(workspace, end, a->k.matrix.rows);
    job.v = take_floats(workspace, end, a->v.matrix.rows);
    job.ready = take_floats(workspace, end, a->q.matrix.rows);
    job.ready_key = take_floats(workspace, end, a->k.matrix.rows);
    job.mixed = take_floats(workspace, end, a->q.matrix.rows);
    job.scores = take_floats(workspace, end, (int64_t)threads * tokens);
    return job;
}

size_t moedge_attention_workspace(const moedge_attention *attention, int tokens, int threads) {
    static uint8_t nowhere[1];
    size_t nbytes = 0;
    lay_out(attention, tokens, threads, nowhere, &nbytes);
    return nbytes;
}

static void store(void *to, int code, int64_t at, float value) {
    if (code == MOEDGE_F32) ((float *)to)[at] = value;
    else ((uint16_t *)to)[at] = to_bf16(value);
}

/* This thread's share of the rows of a matrix times the prepared input, with the bias: as floats, or into `stored`. */
static void project(const attention_job *job, const moedge_projection *p, const prepared *input, int thread,
                    int threads, float *out, void *stored) {
    static const int32_t first_input[1] = {0};
    int rows = p->matrix.rows, code = job->attention->code;
    int begin = (int)((int64_t)rows * thread / threads), end = (int)((int64_t)rows * (thread + 1) / threads);
    float sums[CHUNK];
    for (int r = begin; r < end; r += CHUNK) {
        int stop = r + CHUNK < end ? r + CHUNK : end;
        job->variant->product(&p->matrix, p->memory, input, first_input, 1, r, stop, sums, CHUNK);
        for (int k = r; k < stop; k++) {
            float value = sums[k - r] + (p->bias ? load_number(p->bias, code, k) : 0.0f);
            if (out) out[k] = value;
            else store(stored, code, k, value);
        }
    }
}

static float norm_scale(const float *x, int count, float epsilon) {
    float sums[8] = {0}, sum = 0;
    for (int i = 0; i < count; i++) sums[i % 8] += x[i] * x[i];
    for (int i = 0; i < 8; i++) sum += sums[i];
    return 1.0f / sqrtf(sum / (float)count + epsilon);
}

/* Head h of `row`, which holds all of them, normed and rotated into `out`. `whole`: the norm's scale where it is one for
   all heads. */
static void make_ready(const attention_job *job, const moedge_head_norm *norm, float whole, const float *row, int h,
                       float *out) {
    const moedge_attention *a = job->attention;
    int size = a->head_size, half = a->rotated / 2, other = a->angles == a->rotated ? half : 0; /* half's first angle */
    row += (int64_t)h * size;
    float scale = norm->columns == size ? norm_scale(row, size, norm->epsilon) : whole;
    int64_t first = norm->columns == size ? 0 : (int64_t)h * size; /* of the norm's weights */
    for (int i = 0; i < size; i++) {
        float weight = norm->columns ? norm->offset + load_number(norm->weight, a->code, first + i) : 1.0f;
        out[i] = row[i] * scale * weight;
    }
    for (int i = 0; i < half; i++) {
        float low = out[i], high = out[i + half];
        const void *cos = job->call->cos, *sin = job->call->sin;
        out[i] = low * load_number(cos, a->code, i) - high * load_number(sin, a->code, i);
        out[i + half] = high * load_number(cos, a->code, i + other) + low * load_number(sin, a->code, i + other);
    }
}

static float whole_scale(const moedge_head_norm *norm, int size, const float *row) {
    return norm->columns > size ? norm_scale(row, norm->columns, norm->epsilon) : 1.0f;
}

/* Of scale * scores, and of `sink`, which is -INFINITY where there is none. */
static void softmax(float *scores, int count, float scale, float sink) {
    float top = sink, sum = 0;
    for (int t = 0; t < count; t++) {
        scores[t] *= scale;
        top = scores[t] > top ? scores[t] : top;
    }
    for (int t = 0; t < count; t++) {
        scores[t] = expf(scores[t] - top);
        sum += scores[t];
    }
    sum += expf(sink - top);
    for (int t = 0; t < count; t++) scores[t] /= sum;
}

/* A head of keys and values: the token's own put behind the others, then every query that looks at it. */
static void attend_head(const attention_job *job, int head, float q_scale, float k_scale, float *scores) {
    const moedge_attention *a = job->attention;
    const moedge_attention_call *call = job->call;
    int size = a->head_size, shared = a->heads / a->kv_heads, width = a->code == MOEDGE_F32 ? 4 : 2;
    uint8_t *keys = (uint8_t *)call->keys + head * call->head_stride * width;
    uint8_t *values = (uint8_t *)call->values + head * call->head_stride * width;
    float *own_key = job->ready_key + (int64_t)head * size;
    make_ready(job, &a->k_norm, k_scale, job->k, head, own_key);
    for (int i = 0; i < size; i++) {
        store(keys, a->code, (int64_t)call->past * size + i, own_key[i]);
        store(values, a->code, (int64_t)call->past * size + i, job->v[(int64_t)head * size + i]);
    }
    for (int h = head * shared; h < (head + 1) * shared; h++) {
        float *query = job->ready + (int64_t)h * size;
        make_ready(job, &a->q_norm, q_scale, job->q, h, query);
        job->variant->scores(a->code, query, keys, size, call->past + 1, scores);
        softmax(scores, call->past + 1, a->scale, a->sinks ? load_number(a->sinks, a->code, h) : -INFINITY);
        job->variant->weighted(a->code, scores, values, size, call->past + 1, job->mixed + (int64_t)h * size);
    }
}

/* All of it from job->x on, which every thread sees: the rows of o are this thread's share of `out`, or `stored`. */
static void attend(const attention_job *job, int thread, int threads, pool_barrier *barrier, float *out, void *stored) {
    const moedge_attention *a = job->attention;
    if (thread == 0) job->variant->prepare(&job->input, 0, job->x);
    pool_wait(barrier, threads);
    project(job, &a->q, &job->input, thread, threads, job->q, NULL);
    project(job, &a->k, &job->input, thread, threads, job->k, NULL);
    project(job, &a->v, &job->input, thread, threads, job->v, NULL);
    pool_wait(barrier, threads);
    float q_scale = whole_scale(&a->q_norm, a->head_size, job->q), k_scale = whole_scale(&a->k_norm, a->head_size, job->k);
    int begin = a->kv_heads * thread / threads, end = a->kv_heads * (thread + 1) / threads;
    for (int head = begin; head < end; head++)
        attend_head(job, head, q_scale, k_scale, job->scores + (int64_t)thread * (job->call->past + 1));
    pool_wait(barrier, threads);
    if (thread == 0) job->variant->prepare(&job->mixed_input, 0, job->mixed);
    pool_wait(barrier, threads);
    project(job, &a->o, &job->mixed_input, thread, threads, out, stored);
}

static void widen(const void *x, int code, int count, float *out) {
    for (int i = 0; i < count; i++) out[i] = load_number(x, code, i);
}

static void run_attention(void *context, int thread, int threads, pool_barrier *barrier) {
    const attention_job *job = context;
    if (thread == 0) widen(job->call->x, job->attention->code, job->attention->q.matrix.columns, job->x);
    attend(job, thread, threads, barrier, NULL, job->call->out);
}

void moedge_attend(int v, const moedge_attention *attention, const moedge_attention_call *call, int threads) {
    size_t nbytes = 0;
    attention_job job = lay_out(attention, call->past + 1, threads, call->workspace, &nbytes);
    job.variant = moedge_variant(v), job.call = call;
    pool_run(threads, run_attention, &job);
}

/* ---- a decoder layer up to its experts ---- */

typedef struct {
    attention_job attention;
    const moedge_decoder_layer *layer;
    const moedge_decoder_call *call;
    prepared router_input;
    float *attended, *logits; /* [hidden], [experts] */
    void *normed;             /* [hidden], in the model's dtype */
} decoder_job;

static decoder_job lay_out_layer(const moedge_decoder_layer *layer, int tokens, int threads, uint8_t *workspace,
                                 size_t *end) {
    decoder_job job = {.layer = layer};
    job.attention = lay_out(&layer->attention, tokens, threads, workspace, end);
    job.router_input = moedge_take_prepared(&layer->router.matrix, 1, workspace, end);
    job.attended = take_floats(workspace, end, layer->before.columns);
    job.logits = take_floats(workspace, end, layer->router.matrix.rows);
    job.normed = take_floats(workspace, end, layer->before.columns);
    return job;
}

size_t moedge_route_workspace(const moedge_decoder_layer *layer, int tokens, int threads) {
    static uint8_t nowhere[1];
    size_t nbytes = 0;
    lay_out_layer(layer, tokens, threads, nowhere, &nbytes);
    return nbytes;
}

/* x [hidden] normed, as numbers of its dtype, into floats. */
static void norm(const decoder_job *job, const moedge_head_norm *how, const void *x, float *out) {
    int code = job->layer->attention.code;
    moedge_norm call = {1, how->columns, code, code, how->epsilon, how->offset, x, how->weight, job->normed};
    moedge_rms_norm(&call);
    widen(job->normed, code, how->columns, out);
}

static float rounded(float value, int code) {
    return code == MOEDGE_F32 ? value : from_bits((uint32_t)to_bf16(value) << 16);
}

/* The token plus what attention gives. */
static void add(const decoder_job *job) {
    const moedge_attention_call *call = &job->call->attention;
    int code = job->layer->attention.code;
    for (int i = 0; i < job->layer->before.columns; i++)
        store(call->out, code, i, load_number(call->x, code, i) + rounded(job->attended[i], code));
}

static void choose(const decoder_job *job) {
    const moedge_decoder_layer *layer = job->layer;
    int experts = layer->router.matrix.rows, code = layer->attention.code;
    float top = -INFINITY, sum = 0, chosen = 0;
    for (int e = 0; e < experts; e++) {
        job->logits[e] = rounded(job->logits[e], code);
        top = job->logits[e] > top ? job->logits[e] : top;
    }
    for (int e = 0; e < experts; e++) sum += job->logits[e] = expf(job->logits[e] - top);
    for (int k = 0; k < layer->top_k; k++) {
        int best = -1; /* chosen ones are negative; NaN is not, so that no expert is chosen twice */
        for (int e = 0; e < experts; e++)
            if (!(job->logits[e] < 0) && (best < 0 || job->logits[e] > job->logits[best])) best = e;
        job->call->experts[k] = best;
        chosen += job->call->weights[k] = job->logits[best] / sum;
        job->logits[best] = -1;
    }
    for (int k = 0; k < layer->top_k && layer->normalised; k++) job->call->weights[k] /= chosen;
}

static void run_layer(void *context, int thread, int threads, pool_barrier *barrier) {
    const decoder_job *job = context;
    const moedge_decoder_layer *layer = job->layer;
    if (thread == 0) norm(job, &layer->before, job->call->attention.x, job->attention.x);
    attend(&job->attention, thread, threads, barrier, job->attended, NULL);
    pool_wait(barrier, threads);
    if (thread == 0) {
        add(job);
        norm(job, &layer->after, job->call->attention.out, job->call->normed);
        job->attention.variant->prepare(&job->router_input, 0, job->call->normed);
    }
    pool_wait(barrier, threads);
    project(&job->attention, &layer->router, &job->router_input, thread, threads, job->logits, NULL);
    pool_wait(barrier, threads);
    if (thread == 0) choose(job);
}

void moedge_attend_and_route(int v, const moedge_decoder_layer *layer, const moedge_decoder_call *call, int threads) {
    size_t nbytes = 0;
    decoder_job job = lay_out_layer(layer, call->attention.past + 1, threads, call->attention.workspace, &nbytes);
    job.attention.variant = moedge_variant(v), job.attention.call = &call->attention, job.call = call;
    pool_run(threads, run_layer, &job);
}

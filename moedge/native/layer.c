/* One layer's chosen experts: three phases over all of them, each split over rows among the threads.

   1. gate and up rows of every expert -> activation -> middle      2. middle as input of down      3. down rows, added

   A thread computes whole rows, and adds the experts' outputs to its own columns of `out` in the order of the experts,
   so the number of threads changes no bit. */

#include <math.h>
#include <string.h>

#include "moedge.h"
#include "pool.h"
#include "product.h"

#ifndef MOEDGE_SOURCES
#define MOEDGE_SOURCES "unknown"
#endif

static const variant *const variants[] = {
    &moedge_scalar,
#ifdef MOEDGE_AVX2
    &moedge_avx2,
#endif
#ifdef MOEDGE_AVX512
    &moedge_avx512,
#endif
#ifdef MOEDGE_NEON
    &moedge_neon,
#endif
};

enum { CHUNK = 32, MOST_ROWS = 64 }; /* weight rows and inputs that are computed at once, on the stack */

const variant *moedge_variant(int v) { return variants[v]; }
const char *moedge_sources(void) { return MOEDGE_SOURCES; }
int moedge_variants(void) { return (int)(sizeof variants / sizeof *variants); }
const char *moedge_variant_name(int v) { return variants[v]->name; }
int moedge_variant_runs(int v) { return variants[v]->runs(); }

/* ---- memory of a call ---- */

typedef struct {
    prepared input, middle_input;
    float *middle; /* [routed rows, columns of down] */
    size_t nbytes;
} scratch;

static void *take(uint8_t *workspace, size_t *end, size_t nbytes) {
    void *at = workspace + *end;
    *end += (nbytes + 63) / 64 * 64;
    return at;
}

prepared moedge_take_prepared(const moedge_matrix *m, int count, uint8_t *workspace, size_t *end) {
    prepared p = {.columns = m->columns, .blocks = (m->columns + 8 * BLOCK - 1) / (8 * BLOCK) * 8, .code = m->code};
    size_t blocks = (size_t)p.blocks * (size_t)count;
    if (m->code < MOEDGE_INT8) {
        p.plain = take(workspace, end, blocks * BLOCK * sizeof *p.plain);
        return p;
    }
    p.unit = m->zeros >= 0 ? 1 : m->code == MOEDGE_INT4 ? 8 : m->code == MOEDGE_MXFP4 ? 12 : 0;
    if (m->code == MOEDGE_INT8) p.q = take(workspace, end, blocks * BLOCK * sizeof *p.q);
    else p.q8 = take(workspace, end, blocks * BLOCK * sizeof *p.q8);
    p.scales = take(workspace, end, blocks * sizeof *p.scales);
    p.sums = p.unit ? take(workspace, end, blocks * sizeof *p.sums) : NULL;
    return p;
}

static scratch lay_out(const moedge_expert *expert, int tokens_count, int routed_rows, uint8_t *workspace) {
    scratch s = {.nbytes = 0};
    s.input = moedge_take_prepared(&expert->up, tokens_count, workspace, &s.nbytes);
    s.middle_input = moedge_take_prepared(&expert->down, routed_rows, workspace, &s.nbytes);
    s.middle = take(workspace, &s.nbytes, (size_t)routed_rows * (size_t)expert->down.columns * sizeof *s.middle);
    return s;
}

size_t moedge_workspace(const moedge_expert *expert, int tokens_count, int routed_rows) {
    static uint8_t nowhere[1];
    return lay_out(expert, tokens_count, routed_rows, nowhere).nbytes;
}

/* ---- phases ---- */

typedef struct {
    const variant *variant;
    const moedge_expert *expert;
    const moedge_call *call;
    scratch scratch;
} layer_job;

static float activate(const moedge_expert *e, float gate, float up, int gated) {
    float a = gated ? gate : up;
    switch (e->activation) {
        case MOEDGE_SILU: a = a / (1.0f + expf(-a)); break;
        case MOEDGE_GELU: a = 0.5f * a * (1.0f + erff(a * 0.70710678f)); break;
        case MOEDGE_GELU_TANH: a = 0.5f * a * (1.0f + tanhf(0.79788456f * (a + 0.044715f * a * a * a))); break;
        case MOEDGE_RELU: a = a < 0 ? 0 : a; break;
        case MOEDGE_RELU_SQUARED: a = a < 0 ? 0 : a * a; break;
        case MOEDGE_CLAMPED_SWIGLU:
            a = a > e->limit ? e->limit : a;
            up = up > e->limit ? e->limit : up < -e->limit ? -e->limit : up;
            return (up + 1.0f) * (a / (1.0f + expf(-e->alpha * a)));
    }
    return gated ? a * up : a;
}

static float bias_of(const moedge_matrix *m, const uint8_t *extent, int row) {
    return m->bias < 0 ? 0.0f : load_number(extent + m->bias, m->bias_code, m->first + (int64_t)row * m->step);
}

/* Rows begin to end of the expert's activated middle, for its inputs from routed row `start`, `n` of them. */
static void middle_rows(const layer_job *job, const uint8_t *extent, int start, int n, int begin, int end) {
    const moedge_expert *e = job->expert;
    const int32_t *inputs = job->call->tokens + start;
    int gated = e->gate.rows > 0, width = e->down.columns;
    float gate[MOST_ROWS * CHUNK], up[MOST_ROWS * CHUNK];
    for (int r = begin; r < end; r += CHUNK) {
        int stop = r + CHUNK < end ? r + CHUNK : end;
        if (gated) job->variant->product(&e->gate, extent, &job->scratch.input, inputs, n, r, stop, gate, CHUNK);
        job->variant->product(&e->up, extent, &job->scratch.input, inputs, n, r, stop, up, CHUNK);
        for (int k = r; k < stop; k++) {
            float gate_bias = gated ? bias_of(&e->gate, extent, k) : 0, up_bias = bias_of(&e->up, extent, k);
            for (int i = 0; i < n; i++) {
                float g = gated ? gate[i * CHUNK + k - r] + gate_bias : 0, u = up[i * CHUNK + k - r] + up_bias;
                job->scratch.middle[(int64_t)(start + i) * width + k] = activate(e, g, u, gated);
            }
        }
    }
}

static void down_rows(const layer_job *job, const uint8_t *extent, int start, int n, int begin, int end) {
    const moedge_call *call = job->call;
    const moedge_matrix *down = &job->expert->down;
    int32_t inputs[MOST_ROWS];
    float sums[MOST_ROWS * CHUNK];
    for (int i = 0; i < n; i++) inputs[i] = start + i;
    for (int r = begin; r < end; r += CHUNK) {
        int stop = r + CHUNK < end ? r + CHUNK : end;
        job->variant->product(down, extent, &job->scratch.middle_input, inputs, n, r, stop, sums, CHUNK);
        for (int k = r; k < stop; k++) {
            float bias = bias_of(down, extent, k);
            for (int i = 0; i < n; i++) {
                float term = (sums[i * CHUNK + k - r] + bias) * call->weights[start + i];
                if (call->terms) call->terms[(int64_t)(start + i) * down->rows + k] = term;
                if (call->out) call->out[(int64_t)call->tokens[start + i] * down->rows + k] += term;
            }
        }
    }
}

typedef void (*phase)(const layer_job *job, const uint8_t *extent, int start, int n, int begin, int end);

static void each_expert(const layer_job *job, phase run, int rows, int thread, int threads) {
    int begin = (int)((int64_t)rows * thread / threads), end = (int)((int64_t)rows * (thread + 1) / threads);
    for (int e = 0; e < job->call->experts; e++) {
        int last = job->call->starts[e + 1];
        for (int start = job->call->starts[e]; start < last; start += MOST_ROWS) {
            int n = last - start < MOST_ROWS ? last - start : MOST_ROWS;
            run(job, job->call->extents[e], start, n, begin, end);
        }
    }
}

static void run_layer(void *context, int thread, int threads, pool_barrier *barrier) {
    const layer_job *job = context;
    const moedge_expert *e = job->expert;
    int hidden = e->up.columns, width = e->down.columns, routed = job->call->starts[job->call->experts];
    for (int t = thread; t < job->call->tokens_count; t += threads)
        job->variant->prepare(&job->scratch.input, t, job->call->x + (int64_t)t * hidden);
    pool_wait(barrier, threads);
    each_expert(job, middle_rows, width, thread, threads);
    pool_wait(barrier, threads);
    for (int i = thread; i < routed; i += threads)
        job->variant->prepare(&job->scratch.middle_input, i, job->scratch.middle + (int64_t)i * width);
    pool_wait(barrier, threads);
    each_expert(job, down_rows, e->down.rows, thread, threads);
}

void moedge_layer(int v, const moedge_expert *expert, const moedge_call *call, int threads) {
    layer_job job = {variants[v], expert, call, {.nbytes = 0}};
    job.scratch = lay_out(expert, call->tokens_count, call->starts[call->experts], call->workspace);
    pool_run(threads, run_layer, &job);
}

/* ---- the rest ---- */

void moedge_dequantise(int v, const moedge_matrix *matrix, const uint8_t *extent, int begin, int end, int bf16,
                       void *out) {
    variants[v]->dequantise(matrix, extent, begin, end, bf16, out);
}

typedef struct {
    const variant *variant;
    const uint8_t *memory;
    size_t nbytes;
    uint64_t sums[64];
} read_job;

static void run_read(void *context, int thread, int threads, pool_barrier *barrier) {
    read_job *job = context;
    size_t begin = job->nbytes / 64 * (size_t)thread / (size_t)threads * 64;
    size_t end = thread + 1 == threads ? job->nbytes : job->nbytes / 64 * (size_t)(thread + 1) / (size_t)threads * 64;
    (void)barrier;
    job->sums[thread] = job->variant->read_sum(job->memory + begin, end - begin);
}

uint64_t moedge_read_sum(int v, const uint8_t *memory, size_t nbytes, int threads) {
    read_job job = {variants[v], memory, nbytes, {0}};
    uint64_t sum = 0;
    pool_run(threads, run_read, &job);
    for (int i = 0; i < 64; i++) sum += job.sums[i];
    return sum;
}

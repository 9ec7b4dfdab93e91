/* What the backbone does with a few tokens: one matrix times them, and the root mean square norm. Threads take rows of
   the matrix, so their number changes no bit. */

#include <math.h>

#include "moedge.h"
#include "pool.h"
#include "product.h"

enum { CHUNK = 32, MOST_INPUTS = 64 }; /* weight rows and inputs that are computed at once, on the stack */

typedef struct {
    const variant *variant;
    const moedge_matrix *matrix;
    const uint8_t *extent;
    const moedge_rows *call;
    prepared input;
    float *wide; /* [count, columns], where x is not fp32 */
} linear_job;

static linear_job lay_out(const moedge_matrix *matrix, int count, uint8_t *workspace, size_t *nbytes) {
    linear_job job = {.matrix = matrix, .input = moedge_take_prepared(matrix, count, workspace, nbytes)};
    job.wide = (float *)(void *)(workspace + *nbytes);
    *nbytes += (size_t)count * (size_t)matrix->columns * sizeof *job.wide;
    return job;
}

size_t moedge_linear_workspace(const moedge_matrix *matrix, int count) {
    static uint8_t nowhere[1];
    size_t nbytes = 0;
    lay_out(matrix, count, nowhere, &nbytes);
    return nbytes;
}

static void prepare_row(const linear_job *job, int i) {
    int columns = job->matrix->columns;
    int64_t start = (int64_t)i * columns;
    const float *x = (const float *)job->call->x + start;
    if (job->call->x_code != MOEDGE_F32) {
        float *wide = job->wide + start;
        for (int c = 0; c < columns; c++) wide[c] = load_number(job->call->x, job->call->x_code, start + c);
        x = wide;
    }
    job->variant->prepare(&job->input, i, x);
}

static void store(const linear_job *job, int i, int r, float value) {
    int64_t at = (int64_t)i * job->matrix->rows + r;
    if (job->call->out_code == MOEDGE_F32) ((float *)job->call->out)[at] = value;
    else ((uint16_t *)job->call->out)[at] = to_bf16(value);
}

static void run_linear(void *context, int thread, int threads, pool_barrier *barrier) {
    const linear_job *job = context;
    int rows = job->matrix->rows, count = job->call->count, inputs[MOST_INPUTS];
    int begin = (int)((int64_t)rows * thread / threads), end = (int)((int64_t)rows * (thread + 1) / threads);
    float sums[MOST_INPUTS * CHUNK];
    for (int i = thread; i < count; i += threads) prepare_row(job, i);
    pool_wait(barrier, threads);
    for (int first = 0; first < count; first += MOST_INPUTS) {
        int n = count - first < MOST_INPUTS ? count - first : MOST_INPUTS;
        for (int i = 0; i < n; i++) inputs[i] = first + i;
        for (int r = begin; r < end; r += CHUNK) {
            int stop = r + CHUNK < end ? r + CHUNK : end;
            job->variant->product(job->matrix, job->extent, &job->input, inputs, n, r, stop, sums, CHUNK);
            for (int i = 0; i < n; i++)
                for (int k = r; k < stop; k++) store(job, first + i, k, sums[i * CHUNK + k - r]);
        }
    }
}

void moedge_linear(int v, const moedge_matrix *matrix, const uint8_t *extent, const moedge_rows *call, int threads) {
    size_t nbytes = 0;
    linear_job job = lay_out(matrix, call->count, call->workspace, &nbytes);
    job.variant = moedge_variant(v), job.extent = extent, job.call = call;
    pool_run(threads, run_linear, &job);
}

static void norm_row(const moedge_norm *call, int64_t start) {
    float sums[8] = {0}, sum = 0;
    for (int c = 0; c < call->columns; c++) {
        float x = load_number(call->x, call->code, start + c);
        sums[c % 8] += x * x;
    }
    for (int i = 0; i < 8; i++) sum += sums[i];
    float scale = 1.0f / sqrtf(sum / (float)call->columns + call->epsilon);
    for (int c = 0; c < call->columns; c++) {
        float x = load_number(call->x, call->code, start + c) * scale;
        float weight = call->offset + load_number(call->weight, call->weight_code, c);
        if (call->code == MOEDGE_F32) ((float *)call->out)[start + c] = x * weight;
        else ((uint16_t *)call->out)[start + c] = to_bf16(from_bits((uint32_t)to_bf16(x) << 16) * weight);
    }
}

void moedge_rms_norm(const moedge_norm *call) {
    for (int i = 0; i < call->count; i++) norm_row(call, (int64_t)i * call->columns);
}

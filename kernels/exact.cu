// Linears and attention in f32, by plain multiply-adds: slow, and the oracle of the other kernels on the GPU. Row-major, no folding into layouts.
//
// linear_exact     as linear.cu, of f32 values: A [tokens, inputs], W [outputs, inputs], C and residual [tokens, outputs], row-major. Tiles of 64 x 64, 256 threads; grid
//                  (outputs / 64, tokens / 64, both rounded up). -DACTIVATION=n for linear_exact_activated.
// attention_exact  context [tokens, hidden] of qkv [tokens, 3 hidden]: softmax(q k^T / sqrt(head size) + by_distance) v of each row; window < 0 for none.
//                  by_distance f32 [heads][2 reach + 1], or null. One block of 128 threads a token and head, grid (tokens, heads); dynamic shared memory: 4 bytes a token of the longest
//                  row. Tokens of no row are left alone.

#ifndef ACTIVATION
#define ACTIVATION IDENTITY
#endif

template <int WHICH>
DEVICE void linear_f32(const float* a, const float* w, const float* bias, const float* sums, const float2* statistics, const float* residual,
                       const float2* residual_statistics, const float* gamma, const float* beta, float* out, int tokens, int outputs, int inputs) {
    __shared__ float tile_a[16][64 + 4];
    __shared__ float tile_w[16][64 + 4];
    const int m0 = blockIdx.y * 64;
    const int n0 = blockIdx.x * 64;
    const int x = threadIdx.x % 16;
    const int y = threadIdx.x / 16;
    float acc[4][4] = {};
    let_next_kernel_start();
    wait_for_previous_kernel();
    for (int k0 = 0; k0 < inputs; k0 += 16) {
        for (int i = threadIdx.x; i < 1024; i += 256) {
            const int r = i / 16;
            const int k = i % 16;
            tile_a[k][r] = m0 + r < tokens && k0 + k < inputs ? a[(size_t)(m0 + r) * inputs + k0 + k] : 0.f;
            tile_w[k][r] = n0 + r < outputs && k0 + k < inputs ? w[(size_t)(n0 + r) * inputs + k0 + k] : 0.f;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < 16; k++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) acc[i][j] = fmaf(tile_a[k][y * 4 + i], tile_w[k][x * 4 + j], acc[i][j]);
        __syncthreads();
    }
    for (int i = 0; i < 4; i++) {
        const int t = m0 + y * 4 + i;
        if (t >= tokens) continue;
        for (int j = 0; j < 4; j++) {
            const int n = n0 + x * 4 + j;
            if (n >= outputs) continue;
            float value = acc[i][j];
            if (sums != nullptr) value = statistics[t].y * (value - statistics[t].x * sums[n]);
            value += bias[n];
            if (WHICH == GELU) {
                value = 0.5f * value * (1.f + erff(value * 0.70710678118654752f));
            } else if (WHICH == GELU_TANH) {
                value = 0.5f * value * (1.f + tanhf(0.7978845608028654f * (value + 0.044715f * value * value * value)));
            } else if (WHICH == SILU) {
                value = value / (1.f + expf(-value));
            } else {
                value = activate<WHICH>(value);
            }
            if (residual != nullptr) {
                float view = residual[(size_t)t * outputs + n];
                if (gamma != nullptr) view = fmaf((view - residual_statistics[t].x) * residual_statistics[t].y, gamma[n], beta == nullptr ? 0.f : beta[n]);
                value += view;
            }
            out[(size_t)t * outputs + n] = value;
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) linear_exact(const float* a, const float* w, const float* bias, const float* sums, const float2* statistics,
    const float* residual, const float2* residual_statistics, const float* gamma, const float* beta, float* out, int tokens, int outputs, int inputs) {
    linear_f32<IDENTITY>(a, w, bias, sums, statistics, residual, residual_statistics, gamma, beta, out, tokens, outputs, inputs);
}

extern "C" __global__ void __launch_bounds__(256) linear_exact_activated(const float* a, const float* w, const float* bias, const float* sums,
    const float2* statistics, const float* residual, const float2* residual_statistics, const float* gamma, const float* beta, float* out, int tokens,
    int outputs, int inputs) {
    linear_f32<ACTIVATION>(a, w, bias, sums, statistics, residual, residual_statistics, gamma, beta, out, tokens, outputs, inputs);
}

// The sum, or the largest, of a value of each of 128 threads.
template <bool LARGEST> DEVICE float of_block(float value, float* parts) {
    for (int lane = 16; lane > 0; lane /= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, value, lane);
        value = LARGEST ? fmaxf(value, other) : value + other;
    }
    __syncthreads(); // the parts of the call before have been read
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    return LARGEST ? fmaxf(fmaxf(parts[0], parts[1]), fmaxf(parts[2], parts[3])) : (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

extern "C" __global__ void __launch_bounds__(128) attention_exact(const float* qkv, float* context, const int* starts,
    const int* lengths, int rows, int heads, int head_size, const float* by_distance, int reach, int window) {
    extern __shared__ float scores[];
    __shared__ float parts[4];
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int t = blockIdx.x;
    const int head = blockIdx.y;
    const int hidden = heads * head_size;
    const int row = row_before(t, starts, rows);
    if (row < 0) return;
    const int start = starts[row];
    const int length = lengths[row];
    const int query = t - start;
    if (query >= length) return;

    const float* q = qkv + (size_t)t * 3 * hidden + head * head_size;
    const float scale = rsqrtf((float)head_size);
    float most = NEGATIVE_INFINITY;
    for (int key = threadIdx.x; key < length; key += 128) {
        const float* k = qkv + (size_t)(start + key) * 3 * hidden + hidden + head * head_size;
        float score = 0.f;
        for (int i = 0; i < head_size; i++) score = fmaf(q[i], k[i], score);
        score *= scale;
        const int distance = key - query;
        if (by_distance != nullptr) score += by_distance[(size_t)head * (2 * reach + 1) + distance + reach];
        if (window >= 0 && (distance > window || -distance > window)) score = NEGATIVE_INFINITY;
        scores[key] = score;
        most = fmaxf(most, score);
    }
    most = of_block<true>(most, parts);
    float sum = 0.f;
    for (int key = threadIdx.x; key < length; key += 128) {
        const float weight = expf(scores[key] - most);
        scores[key] = weight;
        sum += weight;
    }
    sum = of_block<false>(sum, parts); // and all scores are written
    for (int i = threadIdx.x; i < head_size; i += 128) {
        float value = 0.f;
        for (int key = 0; key < length; key++) value = fmaf(scores[key], qkv[(size_t)(start + key) * 3 * hidden + 2 * hidden + head * head_size + i], value);
        context[(size_t)t * hidden + head * head_size + i] = value / sum;
    }
}

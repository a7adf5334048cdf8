// Linears for every GPU from sm_80 on: C = epilogue(A W^T), by mma.sync and cp.async.
//
//   acc[t, n] = sum over k of A[t, k] W[n, k], f32
//   view      = residual ? (residual[t, n] - mean) rs gamma[n] + beta[n] of residual_statistics[t]; the residual as it is where gamma is null : 0
//   C[t, n]   = activation(sums ? rs (acc - mean sums[n]) + bias[n] of statistics[t] : acc + bias[n]) + view
//
// A [capacity, inputs], C and residual [capacity, outputs] and W [outputs, inputs] are chunked; statistics are (mean, rs) of each token; bias, sums, gamma,
// beta f32 [outputs]; sums, residual, gamma and beta may be null. C may be the residual itself. inputs and outputs are multiples of 64. Tokens up to the next multiple of
// the tile are computed; nothing depends on those behind the real ones, each row of A making its own row of C.
//
// Options   -DACTIVATION=n (prelude.cuh) of linear_*_activated; linear_* have none.
// Launch    linear_128: tiles of 128 tokens x 128 outputs, 256 threads, 98304 bytes of shared memory; grid (outputs / 128 rounded up, tokens / 128 rounded up).
//           linear_64: 64 x 64, 128 threads, 65536 bytes; grid likewise.
//           linear_few: at most 64 tokens: 8 outputs a block, 256 threads, grid (outputs / 8). For a linear with sums it takes the statistics of A itself (the stream),
//           with epsilon and rms as stream.cu has them, and block 0 writes them to `statistics`, for the residual view that follows. fault, stage: as stream.cu.
//           The order of sums depends on inputs alone in each of the three, and is another in each.

#ifndef ACTIVATION
#define ACTIVATION IDENTITY
#endif

struct Epilogue {
    const float* bias;
    const float* sums;
    const float2* statistics;
    const Value* residual;
    const float2* residual_statistics;
    const float* gamma;
    const float* beta;
    Value* out;
    int capacity;
    int outputs;
};

// Two neighbouring outputs of a token; statistics of the token and of its residual are (mean, rs).
template <int WHICH> DEVICE float2 finish2(const Epilogue& e, float2 acc, int t, int n, float2 of, float2 residual_of) {
    const float2 bias = __ldg((const float2*)(e.bias + n));
    float2 value = acc;
    if (e.sums != nullptr) {
        const float2 sums = __ldg((const float2*)(e.sums + n));
        value.x = of.y * (acc.x - of.x * sums.x);
        value.y = of.y * (acc.y - of.x * sums.y);
    }
    value.x = activate<WHICH>(value.x + bias.x);
    value.y = activate<WHICH>(value.y + bias.y);
    if (e.residual != nullptr) {
        float2 view = unpack2(*(const u32*)(e.residual + chunked((size_t)t, (u32)(n / 8), (size_t)e.capacity) + n % 8));
        if (e.gamma != nullptr) {
            const float2 gamma = __ldg((const float2*)(e.gamma + n));
            const float2 beta = e.beta == nullptr ? make_float2(0.f, 0.f) : __ldg((const float2*)(e.beta + n));
            view.x = fmaf((view.x - residual_of.x) * residual_of.y, gamma.x, beta.x);
            view.y = fmaf((view.y - residual_of.x) * residual_of.y, gamma.y, beta.y);
        }
        value.x += view.x;
        value.y += view.y;
    }
    return value;
}

DEVICE void copy_async16_or_zero(u32 to_shared, const void* from, bool there) {
    const int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to_shared), "l"(from), "r"(bytes) : "memory");
}

// A tile of TILE_M tokens x TILE_N outputs by WARPS_M x WARPS_N warps, a ring of STAGES chunks of 64 inputs.
template <int TILE_M, int TILE_N, int WARPS_M, int WARPS_N, int STAGES, int WHICH>
DEVICE void tiled_linear(const Value* a, const Value* w, const Epilogue& e, int inputs) {
    constexpr int THREADS = WARPS_M * WARPS_N * 32;
    constexpr int WARP_M = TILE_M / WARPS_M;
    constexpr int WARP_N = TILE_N / WARPS_N;
    constexpr int M = WARP_M / 16;
    constexpr int N = WARP_N / 8;
    constexpr int A_BYTES = TILE_M * 128;
    constexpr int STAGE = A_BYTES + TILE_N * 128;
    extern __shared__ __align__(128) unsigned char shared[];
    const u32 base = shared_address(shared);
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const int m0 = blockIdx.y * TILE_M;
    const int n0 = blockIdx.x * TILE_N;
    const int chunks = inputs / 64;

    auto load_weights = [&](int chunk) {
        const u32 to = base + (chunk % STAGES) * STAGE + A_BYTES;
        const Value* from = w + ((size_t)chunk * e.outputs + n0) * 64;
#pragma unroll
        for (int i = threadIdx.x; i < TILE_N * 8; i += THREADS) copy_async16_or_zero(to + i * 16, from + i * 8, n0 + i / 8 < e.outputs);
    };
    auto load_activations = [&](int chunk) {
        const u32 to = base + (chunk % STAGES) * STAGE;
        const Value* from = a + ((size_t)chunk * e.capacity + m0) * 64;
#pragma unroll
        for (int i = threadIdx.x; i < TILE_M * 8; i += THREADS) copy_async16(to + i * 16, from + i * 8);
    };

    // The first weights do not depend on the kernel before.
    let_next_kernel_start();
#pragma unroll
    for (int chunk = 0; chunk < STAGES - 1; chunk++)
        if (chunk < chunks) load_weights(chunk);
    wait_for_previous_kernel();
#pragma unroll
    for (int chunk = 0; chunk < STAGES - 1; chunk++) {
        if (chunk < chunks) load_activations(chunk);
        copy_commit();
    }

    float acc[M][N][4];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++) acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0.f;

    const int row_m = (warp / WARPS_N) * WARP_M;
    const int row_n = (warp % WARPS_N) * WARP_N;
    const int a_row = row_m + (lane & 15);
    const int b_row = row_n + (lane & 7) + ((lane >> 4) << 3);
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk++) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        if (chunk + STAGES - 1 < chunks) {
            load_weights(chunk + STAGES - 1);
            load_activations(chunk + STAGES - 1);
        }
        copy_commit();
        const u32 stage_a = base + (chunk % STAGES) * STAGE;
        const u32 stage_w = stage_a + A_BYTES;
#pragma unroll
        for (int step = 0; step < 4; step++) {
            u32 fa[M][4];
            u32 fb[N / 2][4];
#pragma unroll
            for (int m = 0; m < M; m++) load_matrix4(stage_a + (a_row + m * 16) * 128 + (((2 * step + (lane >> 4)) ^ (a_row & 7)) << 4), fa[m]);
#pragma unroll
            for (int n = 0; n < N / 2; n++)
                load_matrix4(stage_w + (b_row + n * 16) * 128 + (((2 * step + ((lane >> 3) & 1)) ^ (b_row & 7)) << 4), fb[n]);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N; n++)
                    multiply16x8x16(acc[m][n], fa[m][0], fa[m][1], fa[m][2], fa[m][3], fb[n / 2][(n & 1) * 2], fb[n / 2][(n & 1) * 2 + 1]);
        }
    }
    copy_wait<0>();

    const int quad = lane & 3;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int t = m0 + row_m + m * 16 + half * 8 + (lane >> 2);
            const float2 of = e.sums == nullptr ? make_float2(0.f, 1.f) : e.statistics[t];
            const float2 residual_of = e.gamma == nullptr ? make_float2(0.f, 1.f) : e.residual_statistics[t];
#pragma unroll
            for (int four = 0; four < N / 4; four++) {
                u32 words[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int n = n0 + row_n + (four * 4 + i) * 8 + 2 * quad;
                    const float* c = acc[m][four * 4 + i];
                    const float2 value = n < e.outputs ? finish2<WHICH>(e, make_float2(c[2 * half], c[2 * half + 1]), t, n, of, residual_of) : make_float2(0.f, 0.f);
                    words[i] = pack2(value.x, value.y);
                }
                // Four lanes hold a word each of four pieces: each is given all words of one piece.
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    const u32 other = __shfl_xor_sync(0xffffffffu, (quad & 1) ? words[i] : words[i + 1], 1);
                    if (quad & 1) words[i] = other;
                    else words[i + 1] = other;
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const u32 other = __shfl_xor_sync(0xffffffffu, (quad & 2) ? words[i] : words[i + 2], 2);
                    if (quad & 2) words[i] = other;
                    else words[i + 2] = other;
                }
                const int n = n0 + row_n + (four * 4 + quad) * 8;
                if (n < e.outputs) store16(e.out + chunked((size_t)t, (u32)(n / 8), (size_t)e.capacity), words[0], words[1], words[2], words[3]);
            }
        }
}

// Few tokens: 8 outputs a block, whose 8 warps share the inputs; operands go from memory to registers. The order of k within 32 inputs is another than
// in memory, but the same for both operands: a lane takes 8 neighbouring inputs of a row as parts of two products.
template <int WHICH>
DEVICE void linear_of_few(const Value* a, const Value* w, const Epilogue& e, float2* statistics, int tokens, int inputs,
                          float epsilon, int rms, const int* starts, const int* lengths, int rows, int stage, int* fault) {
    constexpr int WARPS = 8;
    constexpr int AHEAD = 6; // of 32 inputs each
    __shared__ float products[WARPS][16][8 + 1];
    __shared__ float2 moments[WARPS][16];
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const int row = lane >> 2;
    const int quad = lane & 3;
    const int n0 = blockIdx.x * 8;
    const int steps = inputs / 32;
    const bool normed = e.sums != nullptr;

    uint4 weights[AHEAD];
    let_next_kernel_start();
    // Warp i takes the steps i, i + 8, ...
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (warp + i * WARPS < steps) weights[i] = load16_once(w + chunked((size_t)(n0 + row), (u32)((warp + i * WARPS) * 4 + quad), (size_t)e.outputs));
    wait_for_previous_kernel();

    for (int m0 = 0; m0 < tokens; m0 += 16) {
        float acc[4] = {0.f, 0.f, 0.f, 0.f};
        float2 moment[2] = {make_float2(0.f, 0.f), make_float2(0.f, 0.f)};
        for (int first = 0; first * WARPS < steps; first += AHEAD) {
            uint4 low[AHEAD];
            uint4 high[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const int step = warp + (first + i) * WARPS;
                if (step >= steps) continue;
                if (first > 0 || m0 > 0) weights[i] = load16_once(w + chunked((size_t)(n0 + row), (u32)(step * 4 + quad), (size_t)e.outputs));
                low[i] = load16(a + chunked((size_t)(m0 + row), (u32)(step * 4 + quad), (size_t)e.capacity));
                high[i] = load16(a + chunked((size_t)(m0 + row + 8), (u32)(step * 4 + quad), (size_t)e.capacity));
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                if (warp + (first + i) * WARPS >= steps) continue;
                multiply16x8x16(acc, low[i].x, high[i].x, low[i].y, high[i].y, weights[i].x, weights[i].y);
                multiply16x8x16(acc, low[i].z, high[i].z, low[i].w, high[i].w, weights[i].z, weights[i].w);
                if (!normed) continue;
                const u32 words[2][4] = {{low[i].x, low[i].y, low[i].z, low[i].w}, {high[i].x, high[i].y, high[i].z, high[i].w}};
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int pair = 0; pair < 4; pair++) {
                        const float2 two = unpack2(words[half][pair]);
                        moment[half].x += two.x + two.y;
                        moment[half].y = fmaf(two.x, two.x, fmaf(two.y, two.y, moment[half].y));
                    }
            }
        }
        __syncthreads(); // the products of the tokens before have been read
        products[warp][row][2 * quad] = acc[0];
        products[warp][row][2 * quad + 1] = acc[1];
        products[warp][row + 8][2 * quad] = acc[2];
        products[warp][row + 8][2 * quad + 1] = acc[3];
        if (normed) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int other = 1; other < 4; other *= 2) {
                    moment[half].x += __shfl_xor_sync(0xffffffffu, moment[half].x, other);
                    moment[half].y += __shfl_xor_sync(0xffffffffu, moment[half].y, other);
                }
                if (quad == 0) moments[warp][row + 8 * half] = moment[half];
            }
        }
        __syncthreads();
        if (threadIdx.x >= 64) continue;
        // A thread finishes two outputs of a token.
        const int place = threadIdx.x / 4;
        const int t = m0 + place;
        if (t >= tokens) continue;
        float2 sum = make_float2(0.f, 0.f);
        float2 total = make_float2(0.f, 0.f);
#pragma unroll
        for (int i = 0; i < WARPS; i++) {
            sum.x += products[i][place][2 * quad];
            sum.y += products[i][place][2 * quad + 1];
            if (normed) {
                total.x += moments[i][place].x;
                total.y += moments[i][place].y;
            }
        }
        float2 of = make_float2(0.f, 1.f);
        if (normed) {
            const float mean = rms ? 0.f : total.x / (float)inputs;
            of = make_float2(mean, rsqrtf(fmaxf(total.y / (float)inputs - mean * mean, 0.f) + epsilon));
            if (blockIdx.x == 0 && quad == 0) {
                statistics[t] = of;
                if (!is_finite(total.y) && t < real_tokens(starts, lengths, rows)) atomicMin(fault, stage);
            }
        }
        const float2 residual_of = e.gamma == nullptr ? make_float2(0.f, 1.f) : e.residual_statistics[t];
        const float2 value = finish2<WHICH>(e, sum, t, n0 + 2 * quad, of, residual_of);
        *(u32*)(e.out + chunked((size_t)t, (u32)(n0 / 8), (size_t)e.capacity) + 2 * quad) = pack2(value.x, value.y);
    }
}

#define TILED(NAME, TILE_M, TILE_N, WARPS_M, WARPS_N, STAGES, WHICH)                                                                              \
    extern "C" __global__ void __launch_bounds__(WARPS_M * WARPS_N * 32) NAME(const Value* a, const Value* w,          \
        const float* bias, const float* sums, const float2* statistics, const Value* residual, const float2* residual_statistics,                 \
        const float* gamma, const float* beta, Value* out, int capacity, int outputs, int inputs) {                                               \
        const Epilogue e = {bias, sums, statistics, residual, residual_statistics, gamma, beta, out, capacity, outputs};                          \
        tiled_linear<TILE_M, TILE_N, WARPS_M, WARPS_N, STAGES, WHICH>(a, w, e, inputs);                                                           \
    }

TILED(linear_128, 128, 128, 2, 4, 3, IDENTITY)
TILED(linear_128_activated, 128, 128, 2, 4, 3, ACTIVATION)
TILED(linear_64, 64, 64, 2, 2, 4, IDENTITY)
TILED(linear_64_activated, 64, 64, 2, 2, 4, ACTIVATION)

#define FEW(NAME, WHICH)                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) NAME(const Value* a, const Value* w, const float* bias,          \
        const float* sums, float2* statistics, const Value* residual, const float2* residual_statistics, const float* gamma, const float* beta,   \
        Value* out, int capacity, int outputs, int inputs, int tokens, float epsilon, int rms, const int* starts, const int* lengths, int rows,   \
        int stage, int* fault) {                                                                                                                  \
        const Epilogue e = {bias, sums, statistics, residual, residual_statistics, gamma, beta, out, capacity, outputs};                          \
        linear_of_few<WHICH>(a, w, e, statistics, tokens, inputs, epsilon, rms, starts, lengths, rows, stage, fault);                             \
    }

FEW(linear_few, IDENTITY)
FEW(linear_few_activated, ACTIVATION)

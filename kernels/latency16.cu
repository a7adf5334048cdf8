// The layers of an encoder for at most 16 tokens, four kernels a layer: products by mma.sync whose operands go from global memory straight to registers.
//
//   latency16_qkv        q, k, v = norm(stream) Wqkv^T + b, turned; weight_sums are null where there is no norm
//   latency16_attention  attended = norm(stream) + attention(q, k, v) Wo^T + b
//   latency16_wide       wide = activation(norm(attended) W1^T + b)
//   latency16_narrow     stream = norm(attended) + wide W2^T + b
//
// Each block's weights are asked for before the wait for the previous kernel, so they stream while that one computes. The order of k is free as long as both
// operands use the same: a lane takes 8 neighbouring k of a row by one 16-byte load and feeds two products with them. The statistics of a norm are summed beside
// the product that the norm is folded into and used at its end; block 0 leaves them for the residual view of the kernel after.
// Where K is split over the four blocks of a cluster, partial sums are pushed into the shared memory of the block that finishes a column.
//
// Buffers    stream, attended: HIDDEN * 16 values; wide: WIDE * 16 values, chunked. qkv: 3 * HIDDEN * 16 values: q and k chunked, then v as [HIDDEN][16].
//            statistics_stream, statistics_attended: float2 [16]. spans: of latency_embed. All 16-byte aligned.
// Launch     as latency_launches below says for each shape, which the host reads from the module; no dynamic shared memory. All but latency_embed with
//            programmatic stream serialization.
//            `trigger`: when the next kernel may start: 0 as soon as the weights are asked for, 1 when the activations are, 2 after the products.
// Numbers    sums f32 in a fixed order; attention weights are rounded to the stored type, as q, k, v and the result of attention are.

static_assert(TOKENS == 16, "the class of 16 tokens");

constexpr int CLUSTER = 4;
constexpr int HEADS_A_BLOCK = HEADS / CLUSTER;

// The warps that share `steps` steps of 32 k: most, up to 8, with equal parts.
DEVICE constexpr int warps_for(int steps) {
    for (int warps = 8; warps > 1; warps--)
        if (steps % warps == 0) return warps;
    return 1;
}

// Tiles of 8 outputs a block of a wide product: the fewest that need no more than 128 blocks.
DEVICE constexpr int tiles_for(int outputs) {
    for (int tiles = 1; tiles < 16; tiles++)
        if (outputs / 8 % tiles == 0 && outputs / 8 / tiles <= 128) return tiles;
    return 16;
}

// Where outputs are finished by twos, half of a block's tiles have the first of them, and the other half the second.
constexpr int QKV_TILES = ROTARY ? 2 * tiles_for(3 * HIDDEN / 2) : tiles_for(3 * HIDDEN);
constexpr int WIDE_TILES = GATED ? 2 * tiles_for(WIDE) : tiles_for(WIDE);
constexpr int WIDE_OUTPUTS = GATED ? 2 * WIDE : WIDE;
constexpr int NARROW_TILES = HIDDEN >= 768 ? 4 : 2;
constexpr int HIDDEN_WARPS = warps_for(HIDDEN / 32);
constexpr int NARROW_WARPS = warps_for(WIDE / 32 / CLUSTER);
static_assert(HIDDEN % (8 * NARROW_TILES) == 0, "whole tiles");

// What the host launches with: blocks, threads, blocks of a cluster and bytes of dynamic shared memory of qkv, attention, wide, narrow.
extern "C" __device__ int latency_launches[4][4] = {
    {3 * HIDDEN / (8 * QKV_TILES), HIDDEN_WARPS * 32, 1, 0},
    {HIDDEN / (8 * NARROW_TILES) * CLUSTER, HEADS_A_BLOCK * 32, CLUSTER, 0},
    {WIDE_OUTPUTS / (8 * WIDE_TILES), HIDDEN_WARPS * 32, 1, 0},
    {HIDDEN / (8 * NARROW_TILES) * CLUSTER, NARROW_WARPS * 32, CLUSTER, 0},
};

// Where each of them lets the next kernel start: the best of all for MPNet-base on an H200 (133 us; 141 with all 0), and for BERT-large (316 us).
extern "C" __device__ int latency_triggers[4] = {1, 0, HIDDEN > 768 ? 0 : 1, 1};

// The fragments of 32 k: of 8 rows of weights, and of 16 tokens.
DEVICE void multiply32(float (&c)[4], uint4 low_rows, uint4 high_rows, uint4 weights) {
    multiply16x8x16(c, low_rows.x, high_rows.x, low_rows.y, high_rows.y, weights.x, weights.y);
    multiply16x8x16(c, low_rows.z, high_rows.z, low_rows.w, high_rows.w, weights.z, weights.w);
}

DEVICE void add_to_sums(float2& sums, uint4 words) {
    float v[8];
    unpack16(v, words);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        sums.x += v[i];
        sums.y += v[i] * v[i];
    }
}

DEVICE float2 add_lanes(float2 sums, int distance) {
    sums.x += __shfl_xor_sync(0xffffffffu, sums.x, distance);
    sums.y += __shfl_xor_sync(0xffffffffu, sums.y, distance);
    return sums;
}

// out = activation(norm(x) W^T + b), the norm folded; no norm where weight_sums is null. QKV: the last third of the outputs goes transposed.
// TURN, GATE: outputs are finished by twos.
template <int TILES, int WARPS, int OUTPUTS, bool QKV, bool TURN, bool GATE, int WHICH>
DEVICE void normed_linear(const Value* x, const Value* weight, const float* bias, const float* weight_sums, Value* out, float2* statistics, float epsilon,
                          const float* turns, const int2* spans, int trigger) {
    constexpr bool TWOS = TURN || GATE;
    constexpr int COLUMN_TILES = TWOS ? TILES / 2 : TILES; // of those that a thread of the end starts from
    constexpr int APART = TURN ? TURNED_APART : GATE ? OUTPUTS / 2 : 0;
    constexpr int STEPS = HIDDEN / 32 / WARPS;
    constexpr int COLUMNS = TILES * 8;
    constexpr int PAIRS = 16 * COLUMN_TILES * 8 / 2;
    constexpr int ROUNDS = (PAIRS + WARPS * 32 - 1) / (WARPS * 32);
    __shared__ float2 sums_of_warps[WARPS][16];
    __shared__ float partial[WARPS][16][COLUMNS + 2];
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const int q = lane % 4;
    const int r = lane / 4;
    const auto output_of = [&](int tile) {
        const int u = blockIdx.x * COLUMN_TILES + tile % COLUMN_TILES;
        return (TURN ? first_of_turned(u) : u * 8) + (tile >= COLUMN_TILES ? APART : 0);
    };

    uint4 w[TILES][STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) w[tile][step] = load16_once(weight + chunked(output_of(tile) + r, (warp * STEPS + step) * 4 + q, OUTPUTS));
    // Of a thread's two columns at the end, and of the two that are finished with them.
    constexpr int FINISHED = TWOS ? 2 : 1;
    float2 b[ROUNDS][FINISHED];
    float2 s[ROUNDS][FINISHED];
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        const int pair = threadIdx.x + round * WARPS * 32;
        const int column = pair % (COLUMN_TILES * 4) * 2;
        const int output = output_of(column / 8) + column % 8;
#pragma unroll
        for (int of = 0; of < FINISHED; of++) {
            b[round][of] = pair < PAIRS ? __ldg((const float2*)(bias + output + of * APART)) : make_float2(0.f, 0.f);
            s[round][of] = pair < PAIRS && weight_sums != nullptr ? __ldg((const float2*)(weight_sums + output + of * APART)) : make_float2(0.f, 0.f);
        }
    }
    if (trigger == 0) let_next_kernel_start();
    wait_for_previous_kernel();

    uint4 a[2][STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        a[0][step] = load16(x + chunked(r, (warp * STEPS + step) * 4 + q, 16));
        a[1][step] = load16(x + chunked(r + 8, (warp * STEPS + step) * 4 + q, 16));
    }
    float4 turns_of[ROUNDS];
    if (TURN) {
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) {
            const int pair = min(threadIdx.x + round * WARPS * 32, PAIRS - 1);
            const int row = pair / (COLUMN_TILES * 4);
            const int column = pair % (COLUMN_TILES * 4) * 2;
            turns_of[round] = load_turns(turns, row - load_span(spans, row).x, blockIdx.x * COLUMN_TILES + column / 8, column % 8);
        }
    }
    if (trigger == 1) let_next_kernel_start();
    float acc[TILES][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) multiply32(acc[tile], a[0][step], a[1][step], w[tile][step]);
    if (trigger == 2) let_next_kernel_start();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float2 sums = make_float2(0.f, 0.f);
#pragma unroll
        for (int step = 0; step < STEPS; step++) add_to_sums(sums, a[half][step]);
        sums = add_lanes(add_lanes(sums, 1), 2);
        if (q == 0) sums_of_warps[warp][r + 8 * half] = sums;
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        *(float2*)&partial[warp][r][tile * 8 + 2 * q] = make_float2(acc[tile][0], acc[tile][1]);
        *(float2*)&partial[warp][r + 8][tile * 8 + 2 * q] = make_float2(acc[tile][2], acc[tile][3]);
    }
    __syncthreads();
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        const int pair = threadIdx.x + round * WARPS * 32;
        if (pair >= PAIRS) break;
        const int row = pair / (COLUMN_TILES * 4);
        const int column = pair % (COLUMN_TILES * 4) * 2;
        float2 value[FINISHED];
#pragma unroll
        for (int of = 0; of < FINISHED; of++) value[of] = make_float2(0.f, 0.f);
        float2 sums = make_float2(0.f, 0.f);
#pragma unroll
        for (int from = 0; from < WARPS; from++) {
#pragma unroll
            for (int of = 0; of < FINISHED; of++) {
                const float2 v = *(const float2*)&partial[from][row][column + of * COLUMN_TILES * 8];
                value[of].x += v.x;
                value[of].y += v.y;
            }
            sums.x += sums_of_warps[from][row].x;
            sums.y += sums_of_warps[from][row].y;
        }
        float mean = sums.x * (1.f / HIDDEN);
        float rs = rsqrtf(fmaxf(sums.y * (1.f / HIDDEN) - mean * mean, 0.f) + epsilon);
        if (blockIdx.x == 0 && column == 0) statistics[row] = make_float2(mean, rs);
        if (weight_sums == nullptr) {
            mean = 0.f;
            rs = 1.f;
        }
#pragma unroll
        for (int of = 0; of < FINISHED; of++) {
            value[of].x = rs * (value[of].x - mean * s[round][of].x) + b[round][of].x;
            value[of].y = rs * (value[of].y - mean * s[round][of].y) + b[round][of].y;
        }
        if constexpr (TURN) {
            turn(value[0].x, value[FINISHED - 1].x, turns_of[round].x, turns_of[round].y);
            turn(value[0].y, value[FINISHED - 1].y, turns_of[round].z, turns_of[round].w);
        } else {
            value[0].x = activate<WHICH>(value[0].x);
            value[0].y = activate<WHICH>(value[0].y);
        }
        if (GATE) {
            value[0].x *= value[FINISHED - 1].x;
            value[0].y *= value[FINISHED - 1].y;
        }
#pragma unroll
        for (int of = 0; of < (GATE ? 1 : FINISHED); of++) {
            const int output = output_of(column / 8) + column % 8 + of * APART;
            if (QKV && output >= 2 * HIDDEN) {
                // out + 2 * HIDDEN * 16 is where v begins, and v of an output is at output - 2 * HIDDEN.
                out[(size_t)output * 16 + row] = narrow(value[of].x);
                out[(size_t)(output + 1) * 16 + row] = narrow(value[of].y);
            } else {
                *(u32*)(out + chunked(row, output / 8, 16) + output % 8) = pack2(value[of].x, value[of].y);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(HIDDEN_WARPS * 32)
latency16_qkv(const Value* stream, const Value* weight, const float* bias, const float* sums,
              Value* qkv, float2* statistics_stream, float epsilon, const float* turns, const int2* spans, int trigger) {
    normed_linear<QKV_TILES, HIDDEN_WARPS, 3 * HIDDEN, true, ROTARY, false, IDENTITY>(stream, weight, bias, sums, qkv, statistics_stream, epsilon, turns, spans,
                                                                                      trigger);
}

extern "C" __global__ void __launch_bounds__(HIDDEN_WARPS * 32)
latency16_wide(const Value* attended, const Value* weight, const float* bias, const float* sums,
               Value* wide, float2* statistics_attended, float epsilon, int trigger) {
    normed_linear<WIDE_TILES, HIDDEN_WARPS, WIDE_OUTPUTS, false, false, GATED, ACTIVATION>(attended, weight, bias, sums, wide, statistics_attended, epsilon,
                                                                                           nullptr, nullptr, trigger);
}

// The block of a cluster that finishes a column, and where the column stands there.
constexpr int FINISHED = NARROW_TILES * 2;

// Pushes a warp's tiles of partial sums to the blocks that finish them; `partial` is its part of their shared memory.
DEVICE void push_tiles(float (&partial)[16][FINISHED], const float (&acc)[NARROW_TILES][4], int r, int q) {
#pragma unroll
    for (int tile = 0; tile < NARROW_TILES; tile++) {
        const int column = tile * 8 + 2 * q;
        const u32 low = address_at_rank(shared_address(&partial[r][column % FINISHED]), column / FINISHED);
        const u32 high = address_at_rank(shared_address(&partial[r + 8][column % FINISHED]), column / FINISHED);
        asm volatile("st.shared::cluster.v2.f32 [%0], {%1,%2};" ::"r"(low), "f"(acc[tile][0]), "f"(acc[tile][1]) : "memory");
        asm volatile("st.shared::cluster.v2.f32 [%0], {%1,%2};" ::"r"(high), "f"(acc[tile][2]), "f"(acc[tile][3]) : "memory");
    }
}

// The end of a product whose K is split over the cluster: adds bias and residual view to the partial sums of `SOURCES` warps, SHARERS threads a pair of columns.
template <int SOURCES, int SHARERS, int THREADS> struct Finish {
    static constexpr int PAIRS = 16 * FINISHED / 2;
    static_assert(SOURCES % SHARERS == 0 && PAIRS * SHARERS <= THREADS, "a thread for each pair's part");
    float2 bias;
    float2 gamma;
    float2 beta;
    float2 of;
    u32 residual;
    int row;
    int pair;
    int column;
    bool active;

    DEVICE void ask_for_weights(int first, const float* biases, const float* gammas, const float* betas) {
        const int place = threadIdx.x / SHARERS;
        active = place < PAIRS;
        row = active ? place / (FINISHED / 2) : 0;
        pair = place % (FINISHED / 2);
        column = first + (int)rank_in_cluster() * FINISHED + pair * 2;
        bias = __ldg((const float2*)(biases + column));
        if (PRENORM) return;
        gamma = __ldg((const float2*)(gammas + column));
        beta = __ldg((const float2*)(betas + column));
    }
    DEVICE void ask_for_residual(const Value* stream, const float2* statistics) {
        asm volatile("ld.global.u32 %0, [%1];" : "=r"(residual) : "l"(stream + chunked(row, column / 8, 16) + column % 8) : "memory");
        if (PRENORM) return;
        asm volatile("ld.global.v2.f32 {%0,%1}, [%2];" : "=f"(of.x), "=f"(of.y) : "l"(statistics + row) : "memory");
    }
    DEVICE void store(const float (&partial)[SOURCES][16][FINISHED], Value* out) const {
        float2 sum = make_float2(0.f, 0.f);
        if (active) {
#pragma unroll
            for (int i = 0; i < SOURCES / SHARERS; i++) {
                const float2 v = *(const float2*)&partial[threadIdx.x % SHARERS * (SOURCES / SHARERS) + i][row][pair * 2];
                sum.x += v.x;
                sum.y += v.y;
            }
        }
#pragma unroll
        for (int distance = 1; distance < SHARERS; distance *= 2) sum = add_lanes(sum, distance);
        if (!active || threadIdx.x % SHARERS != 0) return;
        const float2 view = unpack2(residual);
        sum.x += bias.x + (PRENORM ? view.x : (view.x - of.x) * of.y * gamma.x + beta.x);
        sum.y += bias.y + (PRENORM ? view.y : (view.y - of.x) * of.y * gamma.y + beta.y);
        *(u32*)(out + chunked(row, column / 8, 16) + column % 8) = pack2(sum.x, sum.y);
    }
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(HEADS_A_BLOCK * 32)
latency16_attention(const Value* qkv, const float* by_distance, int reach, const int2* spans, int window,
                    const Value* weight, const float* bias, const Value* stream,
                    const float2* statistics_stream, const float* gamma, const float* beta,
                    Value* attended, int trigger) {
    constexpr int HALVES = HEAD_SIZE / 32;
    __shared__ float partial[HEADS][16][FINISHED];
    const int rank = rank_in_cluster();
    const int first = blockIdx.x / CLUSTER * NARROW_TILES * 8;
    const int lane = threadIdx.x % 32;
    const int q = lane % 4;
    const int r = lane / 4;
    const int head = rank * HEADS_A_BLOCK + threadIdx.x / 32;

    uint4 w[NARROW_TILES][HALVES];
#pragma unroll
    for (int half = 0; half < HALVES; half++)
#pragma unroll
        for (int tile = 0; tile < NARROW_TILES; tile++)
            w[tile][half] = load16_once(weight + chunked(first + tile * 8 + r, head * (HEAD_SIZE / 8) + half * 4 + q, HIDDEN));
    Finish<HEADS, 1, HEADS_A_BLOCK * 32> finish;
    finish.ask_for_weights(first, bias, gamma, beta);
    // Lane q has the scores of keys 4 q .. 4 q + 3: of tile t, keys 4 q + 2 t and the next, which are in turn the keys of its fragment of v.
    float biases[2][4];
#pragma unroll
    for (int tile = 0; tile < 2; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int key = 4 * q + 2 * tile + i % 2;
            const int query = r + i / 2 * 8;
            biases[tile][i] = distance_bias(by_distance, head, key - query, reach);
        }
    // Nobody may write into the shared memory of a block that has not started.
    cluster_arrive_relaxed();
    if (trigger == 0) let_next_kernel_start();
    wait_for_previous_kernel();

    uint4 queries[2][HALVES];
    uint4 keys[2][HALVES];
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        const int piece = head * (HEAD_SIZE / 8) + half * 4 + q;
        queries[0][half] = load16(qkv + chunked(r, piece, 16));
        queries[1][half] = load16(qkv + chunked(r + 8, piece, 16));
#pragma unroll
        for (int tile = 0; tile < 2; tile++) keys[tile][half] = load16(qkv + chunked(4 * (r / 2) + 2 * tile + r % 2, HIDDEN / 8 + piece, 16));
    }
    // Tile t of a half of 32 dimensions has dimension 8 (c / 2) + 2 t + c % 2 as its column c, so that a lane's results are the 8 neighbouring dimensions which
    // its 16 bytes of Wo take.
    uint2 values[HALVES][4];
#pragma unroll
    for (int half = 0; half < HALVES; half++)
#pragma unroll
        for (int tile = 0; tile < 4; tile++) {
            const int dimension = half * 32 + 8 * (r / 2) + 2 * tile + r % 2;
            const Value* at = qkv + (size_t)(2 * HIDDEN + head * HEAD_SIZE + dimension) * 16 + 4 * q;
            asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(values[half][tile].x), "=r"(values[half][tile].y) : "l"(at) : "memory");
        }
    const int2 query_spans[2] = {load_span(spans, r), load_span(spans, r + 8)};
    const int4 key_spans[2] = {load_two_spans(spans, 4 * q), load_two_spans(spans, 4 * q + 2)};
    finish.ask_for_residual(stream, statistics_stream);
    if (trigger == 1) let_next_kernel_start();

    float scores[2][4] = {};
#pragma unroll
    for (int half = 0; half < HALVES; half++)
#pragma unroll
        for (int tile = 0; tile < 2; tile++) multiply32(scores[tile], queries[0][half], queries[1][half], keys[tile][half]);
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float most = NEGATIVE_INFINITY;
#pragma unroll
        for (int tile = 0; tile < 2; tile++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float& score = scores[tile][2 * row + i];
                score = fmaf(score, SCORE_SCALE, biases[tile][2 * row + i]);
                const int key = 4 * q + 2 * tile + i;
                if (!sees(query_spans[row], key, key - (r + row * 8), window)) score = NEGATIVE_INFINITY;
                most = fmaxf(most, score);
            }
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        float sum = 0.f;
#pragma unroll
        for (int tile = 0; tile < 2; tile++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float& score = scores[tile][2 * row + i];
                score = exp2_approximate(score - most);
                sum += score;
            }
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const float inverse = 1.f / sum;
#pragma unroll
        for (int tile = 0; tile < 2; tile++)
#pragma unroll
            for (int i = 0; i < 2; i++) scores[tile][2 * row + i] *= inverse;
    }
    const u32 p0 = pack2(scores[0][0], scores[0][1]);
    const u32 p1 = pack2(scores[0][2], scores[0][3]);
    const u32 p2 = pack2(scores[1][0], scores[1][1]);
    const u32 p3 = pack2(scores[1][2], scores[1][3]);
    const u32 real0 = real_keys(key_spans[0]);
    const u32 real1 = real_keys(key_spans[1]);
    float acc[NARROW_TILES][4] = {};
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        u32 low[4];
        u32 high[4];
#pragma unroll
        for (int tile = 0; tile < 4; tile++) {
            float context[4] = {};
            multiply16x8x16(context, p0, p1, p2, p3, values[half][tile].x & real0, values[half][tile].y & real1);
            low[tile] = pack2(context[0], context[1]);
            high[tile] = pack2(context[2], context[3]);
        }
#pragma unroll
        for (int tile = 0; tile < NARROW_TILES; tile++)
            multiply32(acc[tile], make_uint4(low[0], low[1], low[2], low[3]), make_uint4(high[0], high[1], high[2], high[3]), w[tile][half]);
    }
    if (trigger == 2) let_next_kernel_start();
    cluster_wait();
    push_tiles(partial[head], acc, r, q);
    cluster_arrive();
    cluster_wait();
    finish.store(partial, attended);
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(NARROW_WARPS * 32)
latency16_narrow(const Value* wide, const Value* weight, const float* bias, const Value* attended,
                 const float2* statistics_attended, const float* gamma, const float* beta, Value* stream,
                 int trigger) {
    constexpr int STEPS = WIDE / 32 / CLUSTER / NARROW_WARPS;
    __shared__ float partial[CLUSTER * NARROW_WARPS][16][FINISHED];
    const int rank = rank_in_cluster();
    const int first = blockIdx.x / CLUSTER * NARROW_TILES * 8;
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const int q = lane % 4;
    const int r = lane / 4;
    const int first_step = (rank * NARROW_WARPS + warp) * STEPS;

    uint4 w[NARROW_TILES][STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int tile = 0; tile < NARROW_TILES; tile++) w[tile][step] = load16_once(weight + chunked(first + tile * 8 + r, (first_step + step) * 4 + q, HIDDEN));
    // As many threads a pair as there are, up to four.
    constexpr int THREADS_A_PAIR = NARROW_WARPS * 32 / (16 * FINISHED / 2);
    Finish<CLUSTER * NARROW_WARPS, THREADS_A_PAIR >= 4 ? 4 : THREADS_A_PAIR >= 2 ? 2 : 1, NARROW_WARPS * 32> finish;
    finish.ask_for_weights(first, bias, gamma, beta);
    cluster_arrive_relaxed();
    if (trigger == 0) let_next_kernel_start();
    wait_for_previous_kernel();

    uint4 a[2][STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        a[0][step] = load16(wide + chunked(r, (first_step + step) * 4 + q, 16));
        a[1][step] = load16(wide + chunked(r + 8, (first_step + step) * 4 + q, 16));
    }
    finish.ask_for_residual(attended, statistics_attended);
    if (trigger == 1) let_next_kernel_start();
    float acc[NARROW_TILES][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int tile = 0; tile < NARROW_TILES; tile++) multiply32(acc[tile], a[0][step], a[1][step], w[tile][step]);
    if (trigger == 2) let_next_kernel_start();
    cluster_wait();
    push_tiles(partial[rank * NARROW_WARPS + warp], acc, r, q);
    cluster_arrive();
    cluster_wait();
    finish.store(partial, stream);
}

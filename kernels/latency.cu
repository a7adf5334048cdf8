// Few tokens, weights streamed once: what the classes of 16 (latency16.cu) and of 32, 64 and 128 tokens (latency128.cu) share.
// One encoder call is a chain of small kernels in one CUDA graph, each launched as programmatic dependent of the one before. sm_90.
//
// Options   -DHIDDEN, -DHEADS, -DHEAD_SIZE (32 or 64, HIDDEN = HEADS * HEAD_SIZE), -DWIDE (of the feed-forward part), -DTOKENS (16, 32, 64, 128: the class),
//           -DACTIVATION (prelude.cuh), -DBF16. HIDDEN and WIDE are multiples of 128, HEADS of 4. -DPRENORM, -DGATED, -DROTARY: 1 for layers as below; else 0.
// Compile   prelude.cuh + latency.cu + latency16.cu or latency128.cu as one text.
//
// Layers are post-norm: the residual branch is the normalised view of the stream before; with PRENORM it is the stream as it is. With GATED the feed-forward part is
// activation(gate) * value, of a weight [2 WIDE, HIDDEN] whose first half makes gates. With ROTARY queries and keys are turned by their place in their row, all
// HEAD_SIZE = 64 values of a head, as elementwise.cu has it: turns is (cos, sin) f32 [positions][HEAD_SIZE / 2]. A key counts for a query at most `window` places
// away; for all where window < 0. Activations are chunked with a capacity of TOKENS rows. A token behind the last row (padding) starts as zeros and sees itself alone; what it holds never reaches a row.
// A row's result depends on its own tokens, its length and its start alone, not on what else the pack holds.
//
// latency_embed   stream[t] = words[ids[t]] + positions[place in its row + first_position] + types[0] + added[place in its row], what is null left out.
//                 norm_gamma: null, or f32 [HIDDEN] of a norm that the sum goes through, with norm_beta (or null) and epsilon.
//                 words, positions, types: stored type, row-major [.., HIDDEN]; added: f32 likewise. Rows are not longer than the tables; ids are not read for padding.
//                 spans[t] = first token of its row and the one behind its last; (t, t) for padding.
//                 sums: null, or float2 [TOKENS][parts], the partial sums of latency128.cu: all in part 0, the others 0.
//                 Grid TOKENS, block HIDDEN / 8 rounded up to 32.
// latency_hidden  hidden[t] = (stream[t] - mean) rs gamma + beta (or without, where it is null), f32, row-major, of all TOKENS. seen = 0 where a token of a row is not finite: what is not
//                 finite anywhere in a layer stays so in the stream. Grid TOKENS, block HIDDEN / 8 rounded up to 32.

static_assert(HIDDEN == HEADS * HEAD_SIZE && HIDDEN % 128 == 0 && WIDE % 128 == 0 && HEADS % 4 == 0, "sizes that latency kernels do not serve");
static_assert(HEAD_SIZE == 32 || HEAD_SIZE == 64, "heads of 32 or 64");

#ifndef ACTIVATION
#define ACTIVATION GELU
#endif
#ifndef PRENORM
#define PRENORM 0
#endif
#ifndef GATED
#define GATED 0
#endif
#ifndef ROTARY
#define ROTARY 0
#endif
static_assert(!ROTARY || HEAD_SIZE == 64, "heads whose halves are four pieces each");

// The outputs of two linears that make one value are finished by one thread: value i of a head with value i + 32 where they are turned, gate and value. The first of
// them in pair of tiles u (8 outputs each), and how many outputs behind it the second is.
DEVICE constexpr int first_of_turned(int u) { return u / 4 * 64 + u % 4 * 8; }
constexpr int TURNED_APART = 32;

// (cos, sin) of two neighbouring pairs of values, of pair of tiles u; as they are where u is of values, not of queries or keys.
DEVICE float4 load_turns(const float* turns, int place, int u, int pair) {
    float4 two = make_float4(1.f, 0.f, 1.f, 0.f);
    if (u / 4 < 2 * HEADS) {
        const float* at = turns + (size_t)place * HEAD_SIZE + u % 4 * 16 + pair * 2;
        asm volatile("ld.global.nc.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(two.x), "=f"(two.y), "=f"(two.z), "=f"(two.w) : "l"(at));
    }
    return two;
}

// Turns value `a` with value `b` of the other half.
DEVICE void turn(float& a, float& b, float cosine, float sine) {
    const float turned = a * cosine - b * sine;
    b = b * cosine + a * sine;
    a = turned;
}

// 1 / sqrt(HEAD_SIZE), for a softmax by powers of two.
constexpr float SCORE_SCALE = (HEAD_SIZE == 64 ? 0.125f : 0.17677669529663687f) * LOG2E;

DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// Of a block that has written nothing the others read, barriers aside: it waits for none of its memory accesses.
DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

DEVICE u32 rank_in_cluster() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Where block `rank` of the cluster has what this block has at `address` of its shared memory.
DEVICE u32 address_at_rank(u32 address, u32 rank) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

// The bias of a query for a key `distance` tokens behind it.
DEVICE float distance_bias(const float* by_distance, int head, int distance, int reach) {
    if (by_distance == nullptr) return 0.f;
    const int clamped = max(-reach, min(reach, distance));
    return __ldg(by_distance + (size_t)head * (2 * reach + 1) + clamped + reach) * LOG2E;
}

DEVICE int2 load_span(const int2* spans, int token) {
    int2 span;
    asm volatile("ld.global.v2.s32 {%0,%1}, [%2];" : "=r"(span.x), "=r"(span.y) : "l"(spans + token) : "memory");
    return span;
}

// Whether a query of this span sees the key, which is `distance` tokens behind it. Padding sees itself.
DEVICE bool sees(int2 span, int key, int distance, int window) {
    return key >= span.x && key < max(span.y, span.x + 1) && (window < 0 || (distance <= window && -distance <= window));
}

// All ones in the half of a word whose key is no padding, for the keys key and key + 1; their spans are the words of `two`.
DEVICE u32 real_keys(int4 two) { return (two.y > two.x ? 0x0000ffffu : 0u) | (two.w > two.z ? 0xffff0000u : 0u); }

DEVICE int4 load_two_spans(const int2* spans, int token) {
    int4 two;
    asm volatile("ld.global.v4.s32 {%0,%1,%2,%3}, [%4];" : "=r"(two.x), "=r"(two.y), "=r"(two.z), "=r"(two.w) : "l"(spans + token) : "memory");
    return two;
}

constexpr int ROW_THREADS = (HIDDEN / 8 + 31) / 32 * 32;

// Sums over a block of ROW_THREADS threads; `scratch` is not used again.
DEVICE float2 row_sums(float2 of, float2 (&scratch)[ROW_THREADS / 32]) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
        of.x += __shfl_xor_sync(0xffffffffu, of.x, lane);
        of.y += __shfl_xor_sync(0xffffffffu, of.y, lane);
    }
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = of;
    __syncthreads();
    float2 all = make_float2(0.f, 0.f);
#pragma unroll
    for (int warp = 0; warp < ROW_THREADS / 32; warp++) {
        all.x += scratch[warp].x;
        all.y += scratch[warp].y;
    }
    return all;
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS)
latency_embed(const int* ids, const int* starts, const int* lengths, int rows, const Value* words,
              const Value* positions, const Value* types, const float* added, int first_position,
              Value* stream, float2* sums, int parts, int2* spans, const float* norm_gamma, const float* norm_beta, float epsilon) {
    __shared__ float2 scratch[ROW_THREADS / 32];
    __shared__ float2 scratch_of_norm[2][ROW_THREADS / 32];
    __shared__ int2 shared_span;
    const int t = blockIdx.x;
    const int piece = threadIdx.x;
    if (threadIdx.x == 0) shared_span = make_int2(t, t);
    __syncthreads();
    wait_for_previous_kernel();
    // Not before the wait: the kernels behind may read what is written before this one without waiting for it.
    let_next_kernel_start();
    for (int row = threadIdx.x; row < rows; row += ROW_THREADS) {
        const int start = starts[row];
        const int end = start + lengths[row];
        if (start <= t && t < end) shared_span = make_int2(start, end);
    }
    __syncthreads();
    const int2 span = shared_span;
    float v[8] = {};
    if (span.y > span.x && piece < HIDDEN / 8) {
        const int place = t - span.x;
        unpack16(v, load16(words + (size_t)ids[t] * HIDDEN + piece * 8));
        float more[8];
        if (positions != nullptr) {
            unpack16(more, load16(positions + (size_t)(place + first_position) * HIDDEN + piece * 8));
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] += more[i];
        }
        if (types != nullptr) {
            unpack16(more, load16(types + piece * 8));
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] += more[i];
        }
        if (added != nullptr) {
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] += added[(size_t)place * HIDDEN + piece * 8 + i];
        }
    }
    if (norm_gamma != nullptr) {
        const bool has = span.y > span.x && piece < HIDDEN / 8;
        float2 sum = make_float2(0.f, 0.f);
#pragma unroll
        for (int i = 0; i < 8; i++) sum.x += v[i];
        const float mean = row_sums(sum, scratch_of_norm[0]).x / HIDDEN;
        float2 squares = make_float2(0.f, 0.f);
#pragma unroll
        for (int i = 0; i < 8; i++) squares.x += has ? (v[i] - mean) * (v[i] - mean) : 0.f;
        const float rs = rsqrtf(row_sums(squares, scratch_of_norm[1]).x / HIDDEN + epsilon);
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (has) v[i] = (v[i] - mean) * rs * norm_gamma[piece * 8 + i] + (norm_beta == nullptr ? 0.f : norm_beta[piece * 8 + i]);
    }
    const uint4 stored = make_uint4(pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7]));
    if (piece < HIDDEN / 8) store16(stream + chunked(t, piece, TOKENS), stored.x, stored.y, stored.z, stored.w);
    if (threadIdx.x == 0) spans[t] = span;
    if (sums == nullptr) return;
    unpack16(v, stored);
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        sum.x += v[i];
        sum.y += v[i] * v[i];
    }
    const float2 all = row_sums(sum, scratch);
    for (int part = threadIdx.x; part < parts; part += ROW_THREADS) sums[t * parts + part] = part == 0 ? all : make_float2(0.f, 0.f);
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS)
latency_hidden(const Value* stream, const float* gamma, const float* beta, const int2* spans, float epsilon,
               float* hidden, int* seen) {
    __shared__ float2 scratch[ROW_THREADS / 32];
    __shared__ float2 scratch_of_squares[ROW_THREADS / 32];
    const int t = blockIdx.x;
    const int piece = threadIdx.x;
    const bool has = piece < HIDDEN / 8;
    float g[8];
    float b[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        g[i] = has ? __ldg(gamma + piece * 8 + i) : 0.f;
        b[i] = has && beta != nullptr ? __ldg(beta + piece * 8 + i) : 0.f;
    }
    let_next_kernel_start();
    wait_for_previous_kernel();
    float v[8] = {};
    if (has) unpack16(v, load16(stream + chunked(t, piece, TOKENS)));
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < 8; i++) sum.x += v[i];
    const float mean = row_sums(sum, scratch).x / HIDDEN;
    float2 squares = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < 8; i++) squares.x += has ? (v[i] - mean) * (v[i] - mean) : 0.f;
    const float variance = row_sums(squares, scratch_of_squares).x / HIDDEN;
    const float rs = rsqrtf(variance + epsilon);
    if (has) {
        float out[8];
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = (v[i] - mean) * rs * g[i] + b[i];
        float4* at = (float4*)(hidden + (size_t)t * HIDDEN + piece * 8);
        at[0] = make_float4(out[0], out[1], out[2], out[3]);
        at[1] = make_float4(out[4], out[5], out[6], out[7]);
    }
    if (threadIdx.x == 0) {
        const int2 span = load_span(spans, t);
        if (!is_finite(variance) && span.y > span.x) *seen = 0;
    }
}

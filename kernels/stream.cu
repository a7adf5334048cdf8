// The residual stream: made of embeddings, measured for its norms, and given out as hidden states.
//
// A stream is [tokens, hidden] before its norm: in the stored type and chunked, or (names with _exact) f32 and row-major. statistics: (mean, rs) of each token,
// rs = 1 / sqrt(variance + epsilon) of LayerNorm; of RMSNorm mean 0 and rs = 1 / sqrt(mean of squares + epsilon). hidden is a multiple of 64, at most 2048.
// One warp a token, 8 warps a block, grid: tokens / 8 rounded up; the order of sums is fixed by hidden alone.
//
// embed           stream[t] = words[ids[t]] + added[place of t in its row]. words [vocabulary, hidden] in the stored type (f32 where exact), row-major;
//                 added f32 [positions, hidden], or null. Tokens behind the last row have place 0. ids are below the vocabulary, rows are at most `positions` long.
// statistics      of the values as they are stored. Where a token of a row has values that are not finite, fault takes the least `stage` of those that saw one.
// normalise       stream = (stream - mean) rs gamma + beta, in place, and statistics of nothing: (0, 1). For layers whose input has a norm of its own.
// add_normed      stream = view + (x - mean) rs gamma + beta of another matrix x of the same layout, whose mean and rs are of epsilon and rms and taken here; view: the
//                 stream through its norm (statistics, view_gamma, view_beta), or as it is where view_gamma is null. And statistics of the new stream as it is
//                 stored, with next_epsilon and next_rms, and faults as `statistics` tells them.
// hidden_states   hidden[t] = (stream[t] - mean) rs gamma + beta as f32, row-major; as it is where gamma is null. beta may be null. And seen = fault, which
//                 the host reads.

#define WARPS 8
#define MOST_GROUPS 8 // of 256 columns

// A token's values, 8 a lane and group of 256 columns. Lanes beyond `hidden` have zeros.
struct Token {
    float values[MOST_GROUPS][8];
};

// A piece of a token through its norm; of: (mean, rs).
DEVICE void put_through_norm(float (&v)[8], float2 of, const float* gamma, const float* beta, int piece) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float shift = beta == nullptr ? 0.f : beta[piece * 8 + i];
        v[i] = fmaf((v[i] - of.x) * of.y, gamma[piece * 8 + i], shift);
    }
}

// (mean, rs) of a token's values; rms: of RMSNorm.
DEVICE float2 measure(const Token& token, int hidden, int lane, float epsilon, int rms) {
    float sum = 0.f;
    if (!rms) {
#pragma unroll
        for (int group = 0; group < MOST_GROUPS; group++)
#pragma unroll
            for (int i = 0; i < 8; i++) sum += token.values[group][i];
        sum = warp_sum(sum);
    }
    const float mean = sum / (float)hidden;
    float squares = 0.f;
#pragma unroll
    for (int group = 0; group < MOST_GROUPS; group++) {
        if (group * 256 + lane * 8 >= hidden) break;
#pragma unroll
        for (int i = 0; i < 8; i++) squares = fmaf(token.values[group][i] - mean, token.values[group][i] - mean, squares);
    }
    squares = warp_sum(squares);
    return make_float2(mean, rsqrtf(squares / (float)hidden + epsilon));
}

template <bool EXACT> DEVICE void load_token(Token& token, const void* stream, int t, int hidden, int capacity, int lane) {
#pragma unroll
    for (int group = 0; group < MOST_GROUPS; group++) {
        const int piece = group * 32 + lane;
        if (piece * 8 < hidden) {
            load_piece<EXACT>(token.values[group], stream, t, piece, hidden, capacity);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) token.values[group][i] = 0.f;
        }
    }
}

template <bool EXACT>
DEVICE void embed_token(const int* ids, const int* starts, const int* lengths, int rows, const void* words, const float* added, void* stream,
                        float2* statistics, int tokens, int capacity, int hidden, float epsilon, int rms) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int t = (int)(blockIdx.x * WARPS + threadIdx.x / 32);
    const int lane = threadIdx.x % 32;
    if (t >= tokens) return;
    const size_t id = (size_t)ids[t];
    const int place = added == nullptr ? 0 : place_in_row(t, starts, lengths, rows);
    Token token;
#pragma unroll
    for (int group = 0; group < MOST_GROUPS; group++) {
        const int piece = group * 32 + lane;
        if (piece * 8 >= hidden) {
#pragma unroll
            for (int i = 0; i < 8; i++) token.values[group][i] = 0.f;
            continue;
        }
        float(&v)[8] = token.values[group];
        if constexpr (EXACT) {
            load_piece<true>(v, words, (int)id, piece, hidden, 0);
        } else {
            unpack16(v, load16((const Value*)words + id * hidden + piece * 8));
        }
        if (added != nullptr) {
            const float4* at = (const float4*)(added + (size_t)place * hidden + piece * 8);
            const float4 a = at[0];
            const float4 b = at[1];
            v[0] += a.x, v[1] += a.y, v[2] += a.z, v[3] += a.w, v[4] += b.x, v[5] += b.y, v[6] += b.z, v[7] += b.w;
        }
        store_piece<EXACT>(v, stream, t, piece, hidden, capacity);
    }
    const float2 measured = measure(token, hidden, lane, epsilon, rms);
    if (lane == 0) statistics[t] = measured;
}

// Writes a token's (mean, rs), and the fault where it is of a row and not finite.
DEVICE void leave_statistics(float2 measured, float2* statistics, int t, const int* starts, const int* lengths, int rows, int stage, int* fault) {
    statistics[t] = measured;
    // The sum of squares may overflow where no value does, which is as bad: rs would be 0.
    const bool bad = !is_finite(measured.x) || !is_finite(measured.y) || measured.y == 0.f;
    if (bad && t < real_tokens(starts, lengths, rows)) atomicMin(fault, stage);
}

template <bool EXACT>
DEVICE void measure_token(const void* stream, float2* statistics, const int* starts, const int* lengths, int rows, int tokens, int capacity, int hidden,
                          float epsilon, int rms, int stage, int* fault) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int t = (int)(blockIdx.x * WARPS + threadIdx.x / 32);
    const int lane = threadIdx.x % 32;
    if (t >= tokens) return;
    Token token;
    load_token<EXACT>(token, stream, t, hidden, capacity, lane);
    const float2 measured = measure(token, hidden, lane, epsilon, rms);
    if (lane == 0) leave_statistics(measured, statistics, t, starts, lengths, rows, stage, fault);
}

template <bool EXACT>
DEVICE void normalise_token(void* stream, float2* statistics, const float* gamma, const float* beta, int tokens, int capacity, int hidden) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int t = (int)(blockIdx.x * WARPS + threadIdx.x / 32);
    const int lane = threadIdx.x % 32;
    if (t >= tokens) return;
    const float2 of = statistics[t];
    for (int piece = lane; piece * 8 < hidden; piece += 32) {
        float v[8];
        load_piece<EXACT>(v, stream, t, piece, hidden, capacity);
        put_through_norm(v, of, gamma, beta, piece);
        store_piece<EXACT>(v, stream, t, piece, hidden, capacity);
    }
    __syncwarp();
    if (lane == 0) statistics[t] = make_float2(0.f, 1.f);
}

template <bool EXACT>
DEVICE void add_normed_token(void* stream, float2* statistics, const float* view_gamma, const float* view_beta, const void* x, const float* gamma,
                             const float* beta, const int* starts, const int* lengths, int rows, int tokens, int capacity, int hidden, float epsilon, int rms,
                             float next_epsilon, int next_rms, int stage, int* fault) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int t = (int)(blockIdx.x * WARPS + threadIdx.x / 32);
    const int lane = threadIdx.x % 32;
    if (t >= tokens) return;
    const float2 of = statistics[t];
    Token token;
    load_token<EXACT>(token, x, t, hidden, capacity, lane);
    const float2 of_x = measure(token, hidden, lane, epsilon, rms);
#pragma unroll
    for (int group = 0; group < MOST_GROUPS; group++) {
        const int piece = group * 32 + lane;
        if (piece * 8 >= hidden) continue;
        float(&v)[8] = token.values[group];
        float view[8];
        load_piece<EXACT>(view, stream, t, piece, hidden, capacity);
        if (view_gamma != nullptr) put_through_norm(view, of, view_gamma, view_beta, piece);
        put_through_norm(v, of_x, gamma, beta, piece);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] += view[i];
        store_piece<EXACT>(v, stream, t, piece, hidden, capacity);
    }
    // All lanes have read the old ones: the sums above and here are of all.
    const float2 measured = measure(token, hidden, lane, next_epsilon, next_rms);
    if (lane == 0) leave_statistics(measured, statistics, t, starts, lengths, rows, stage, fault);
}

template <bool EXACT>
DEVICE void give_token(const void* stream, const float2* statistics, const float* gamma, const float* beta, float* hidden_out, int tokens, int capacity,
                       int hidden, const int* fault, int* seen) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    if (blockIdx.x == 0 && threadIdx.x == 0) *seen = *fault;
    const int t = (int)(blockIdx.x * WARPS + threadIdx.x / 32);
    const int lane = threadIdx.x % 32;
    if (t >= tokens) return;
    const float2 of = statistics[t];
    for (int piece = lane; piece * 8 < hidden; piece += 32) {
        float v[8];
        load_piece<EXACT>(v, stream, t, piece, hidden, capacity);
        if (gamma != nullptr) put_through_norm(v, of, gamma, beta, piece);
        float4* at = (float4*)(hidden_out + (size_t)t * hidden + piece * 8);
        at[0] = make_float4(v[0], v[1], v[2], v[3]);
        at[1] = make_float4(v[4], v[5], v[6], v[7]);
    }
}

#define EXPORT(SUFFIX, EXACT)                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) embed##SUFFIX(const int* ids, const int* starts,                   \
        const int* lengths, int rows, const void* words, const float* added, void* stream,     \
        float2* statistics, int tokens, int capacity, int hidden, float epsilon, int rms) {                                           \
        embed_token<EXACT>(ids, starts, lengths, rows, words, added, stream, statistics, tokens, capacity, hidden, epsilon, rms);                  \
    }                                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(256) statistics##SUFFIX(const void* stream, float2* statistics,         \
        const int* starts, const int* lengths, int rows, int tokens, int capacity, int hidden, float epsilon, int rms,   \
        int stage, int* fault) {                                                                                                      \
        measure_token<EXACT>(stream, statistics, starts, lengths, rows, tokens, capacity, hidden, epsilon, rms, stage, fault);                     \
    }                                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(256) normalise##SUFFIX(void* stream, float2* statistics,                \
        const float* gamma, const float* beta, int tokens, int capacity, int hidden) {                                   \
        normalise_token<EXACT>(stream, statistics, gamma, beta, tokens, capacity, hidden);                                                         \
    }                                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(256) add_normed##SUFFIX(void* stream, float2* statistics, const float* view_gamma,               \
        const float* view_beta, const void* x, const float* gamma, const float* beta, const int* starts, const int* lengths, int rows, int tokens, \
        int capacity, int hidden, float epsilon, int rms, float next_epsilon, int next_rms, int stage, int* fault) {                              \
        add_normed_token<EXACT>(stream, statistics, view_gamma, view_beta, x, gamma, beta, starts, lengths, rows, tokens, capacity, hidden,       \
                                epsilon, rms, next_epsilon, next_rms, stage, fault);                                                              \
    }                                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(256) hidden_states##SUFFIX(const void* stream,                                       \
        const float2* statistics, const float* gamma, const float* beta, float* hidden_out,    \
        int tokens, int capacity, int hidden, const int* fault, int* seen) {                                             \
        give_token<EXACT>(stream, statistics, gamma, beta, hidden_out, tokens, capacity, hidden, fault, seen);                                                  \
    }

EXPORT(, false)
EXPORT(_exact, true)

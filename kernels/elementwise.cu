// What some families have between linears and attention: norms of queries and keys, rotary positions, and gates.
//
// Matrices are in the stored type and chunked, or (names with _exact) f32 and row-major, [capacity, columns].
//
// queries_keys  Queries and keys of qkv [3 hidden] in place, hidden = heads head_size, first through their norms, then turned by their positions.
//          A norm is over all queries (keys) of a token: (x - mean) rs gamma + beta, mean and rs as stream.cu has them; none where gamma is null, beta may be null.
//          Turned are of each head the first `size` values, value i with value i + size / 2 (RoPE in NeoX's order, Su et al. 2021):
//            (a, b) -> (a cos - b sin, b cos + a sin), the angle being the token's place in its row times a frequency. Nothing where size is 0.
//          turns: (cos, sin) f32 [positions][size / 2] of rows of up to `trained` tokens; frequencies: f32 [size / 2], of which a longer row of L tokens takes
//          each times (factor L / trained - (factor - 1))^(-2 i / (size - 2)) (dynamic NTK). No row is longer than `positions`, nor than `trained` where frequencies
//          is null. Tokens behind the rows stay as they are. size is even; a multiple of 16, and at most HEAD_SIZE, where values are of two bytes.
//          Launch: a warp a token, blocks of 256, grid: tokens / 8 rounded up.
// gate          out [wide] = activation(expanded[t, n]) * expanded[t, wide + n] of expanded [2 wide], the product rounded once. wide is a multiple of 8.
//          Options: -DACTIVATION=n (prelude.cuh). Launch: a thread a piece of 8 values, any one-dimensional grid.

#ifndef ACTIVATION
#define ACTIVATION IDENTITY
#endif

#define WARPS 8

// (cos, sin) of value `pair` of a token at `place` of a row of `length` tokens.
DEVICE float2 turn_of(const float2* turns, const float* frequencies, int place, int length, int pair, int pairs, int trained, float factor) {
    if (frequencies == nullptr || length <= trained) return turns[(size_t)place * pairs + pair];
    const float stretch = factor * (float)length / (float)trained - (factor - 1.f);
    const float exponent = -2.f * (float)pair / (float)max(2 * pairs - 2, 1);
    const float angle = (float)place * (frequencies[pair] * powf(stretch, exponent));
    float2 turn;
    sincosf(angle, &turn.y, &turn.x);
    return turn;
}

// Puts `pieces` pieces of a token, from `first` on, through a norm; a warp.
template <bool EXACT>
DEVICE void normalise_pieces(void* qkv, int t, int first, int pieces, int columns, int capacity, const float* gamma, const float* beta, float epsilon, int rms) {
    const int lane = threadIdx.x % 32;
    const float count = (float)(pieces * 8);
    float v[8];
    float mean = 0.f;
    if (!rms) {
        for (int piece = lane; piece < pieces; piece += 32) {
            load_piece<EXACT>(v, qkv, t, first + piece, columns, capacity);
#pragma unroll
            for (int i = 0; i < 8; i++) mean += v[i];
        }
        mean = warp_sum(mean) / count;
    }
    float squares = 0.f;
    for (int piece = lane; piece < pieces; piece += 32) {
        load_piece<EXACT>(v, qkv, t, first + piece, columns, capacity);
#pragma unroll
        for (int i = 0; i < 8; i++) squares = fmaf(v[i] - mean, v[i] - mean, squares);
    }
    const float rs = rsqrtf(warp_sum(squares) / count + epsilon);
    for (int piece = lane; piece < pieces; piece += 32) {
        load_piece<EXACT>(v, qkv, t, first + piece, columns, capacity);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = fmaf((v[i] - mean) * rs, gamma[piece * 8 + i], beta == nullptr ? 0.f : beta[piece * 8 + i]);
        store_piece<EXACT>(v, qkv, t, first + piece, columns, capacity);
    }
}

template <bool EXACT>
DEVICE void prepare_token(void* qkv, const int* starts, const int* lengths, int rows, const float* query_gamma, const float* query_beta, const float* key_gamma,
                          const float* key_beta, const float2* turns, const float* frequencies, int tokens, int capacity, int heads, int head_size, int size,
                          int trained, float factor, float query_epsilon, int query_rms, float key_epsilon, int key_rms) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int t = (int)(blockIdx.x * WARPS + threadIdx.x / 32);
    const int lane = threadIdx.x % 32;
    if (t >= tokens) return;
    const int row = row_before(t, starts, rows);
    if (row < 0 || t - starts[row] >= lengths[row]) return;
    const int place = t - starts[row];
    const int length = lengths[row];
    const int hidden = heads * head_size;
    if (query_gamma != nullptr) normalise_pieces<EXACT>(qkv, t, 0, hidden / 8, 3 * hidden, capacity, query_gamma, query_beta, query_epsilon, query_rms);
    if (key_gamma != nullptr) normalise_pieces<EXACT>(qkv, t, hidden / 8, hidden / 8, 3 * hidden, capacity, key_gamma, key_beta, key_epsilon, key_rms);
    __syncwarp(); // what other lanes have stored is turned below
    const int pairs = size / 2;
    if constexpr (EXACT) {
        float* values = (float*)qkv + (size_t)t * 3 * heads * head_size;
        for (int i = lane; i < 2 * heads * pairs; i += 32) {
            float* at = values + (i / pairs) * head_size + i % pairs;
            const float2 turn = turn_of(turns, frequencies, place, length, i % pairs, pairs, trained, factor);
            const float a = at[0];
            const float b = at[pairs];
            at[0] = a * turn.x - b * turn.y;
            at[pairs] = b * turn.x + a * turn.y;
        }
    } else {
        const int pieces = pairs / 8; // of a head's first half
        for (int i = lane; i < 2 * heads * pieces; i += 32) {
            const int first = (i / pieces) * (head_size / 8) + i % pieces;
            float a[8];
            float b[8];
            load_piece<false>(a, qkv, t, first, 0, capacity);
            load_piece<false>(b, qkv, t, first + pieces, 0, capacity);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const float2 turn = turn_of(turns, frequencies, place, length, (i % pieces) * 8 + k, pairs, trained, factor);
                const float turned = a[k] * turn.x - b[k] * turn.y;
                b[k] = b[k] * turn.x + a[k] * turn.y;
                a[k] = turned;
            }
            store_piece<false>(a, qkv, t, first, 0, capacity);
            store_piece<false>(b, qkv, t, first + pieces, 0, capacity);
        }
    }
}

template <bool EXACT> DEVICE void gate_pieces(const void* expanded, void* out, int tokens, int capacity, int wide) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int pieces = wide / 8;
    const long long all = (long long)tokens * pieces;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += (long long)gridDim.x * blockDim.x) {
        // Neighbouring threads take the pieces of a chunk's row.
        const int piece = EXACT ? (int)(i % pieces) : (int)(i / 8 / tokens * 8 + i % 8);
        const int t = EXACT ? (int)(i / pieces) : (int)(i / 8 % tokens);
        float gate[8];
        float value[8];
        load_piece<EXACT>(gate, expanded, t, piece, 2 * wide, capacity);
        load_piece<EXACT>(value, expanded, t, pieces + piece, 2 * wide, capacity);
#pragma unroll
        for (int k = 0; k < 8; k++) gate[k] = activate<ACTIVATION>(gate[k]) * value[k];
        store_piece<EXACT>(gate, out, t, piece, wide, capacity);
    }
}

#define EXPORT(SUFFIX, EXACT)                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) queries_keys##SUFFIX(void* qkv, const int* starts, const int* lengths, int rows,         \
        const float* query_gamma, const float* query_beta, const float* key_gamma, const float* key_beta, const float2* turns,                 \
        const float* frequencies, int tokens, int capacity, int heads, int head_size, int size, int trained, float factor,                     \
        float query_epsilon, int query_rms, float key_epsilon, int key_rms) {                                                                  \
        prepare_token<EXACT>(qkv, starts, lengths, rows, query_gamma, query_beta, key_gamma, key_beta, turns, frequencies, tokens, capacity,   \
                             heads, head_size, size, trained, factor, query_epsilon, query_rms, key_epsilon, key_rms);                         \
    }                                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) gate##SUFFIX(const void* expanded, void* out, int tokens, int capacity, int wide) {      \
        gate_pieces<EXACT>(expanded, out, tokens, capacity, wide);                                                                             \
    }

EXPORT(, false)
EXPORT(_exact, true)

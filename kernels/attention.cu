// Attention of packed rows: context = softmax(q k^T / sqrt(head size) + bias by distance) v, of each row and head, in both directions.
//
// prepare_bias      The bias as `attention` takes it: table [HEADS][2 reach + 192] of by_distance f32 [HEADS][2 reach + 1], whose middle is distance 0
//                   (place of the key less place of the query). Once a model. ALiBi is such a bias too. Grid: (any, HEADS); any block.
// plan_attention    The list of work for a pack of `rows` rows, once for all layers: row r holds tokens starts[r] .. starts[r] + lengths[r], rows lie in any order
//                   and have 0 to 8192 tokens. list: int2 [entries][4]; all entries are written, those that are not needed as zeros.
//                   wide_from: blocks of 128 queries, over all heads, from which such blocks are made instead of smaller ones; twice the number of processors.
//                   It counts lengths before its wait: they are to be complete when the kernel in front of it starts.
//                   Grid: 1 block, any multiple of 32 threads; 1024, or `rows` and `entries` rounded up where both are less.
// attention         context [HIDDEN] of qkv [3 HIDDEN] (heads of q, then of k, then of v), both chunked with `capacity` rows. table: null without BIAS; no row is
//                   longer than reach + 1. list_ready: nonzero if the list was complete before this kernel could start, that is, if a kernel
//                   behind plan_attention was launched without programmatic dependence; then the list is read before the wait.
// attention_window  The same where a key counts only if |place of the key - place of the query| <= window.
//                   Both: block: 128. Dynamic shared memory: 2 stages of 64 keys: 2 (256 HEAD_SIZE + 3072 BIAS) bytes.
//                   Grid: HEADS entries; a block has one entry and head.
// attention_split   As `attention`, for a list without wide blocks: 4 teams of 4 warps share out the keys of a longer row, and join what they found. For few long
//                   rows. Block: 512. Dynamic shared memory: 8 stages. Grid: HEADS entries. Its sums have an order of their own.
//
// Entries   enough for R rows of T tokens of which the longest has L, divisions rounded down: (R + 3) / 4 where L <= 32; else, with B = min(R, T / 33) rows that can
//           be longer, F = max(wide_from, 1) - 1 and N = min(B, F / HEADS) of them where blocks are not wide, max(wide, narrow) + 1:
//           wide   = min((T + 127 B) / 128, B ((L + 127) / 128)) + (R - B + 3) / 4
//           narrow = min(min((T + 63 N) / 64, N ((L + 63) / 64)) + (R - N + 3) / 4, 2 (F / HEADS) + (R + 3) / 4)
// Work      One warp has a row of up to 32 tokens (and head) in its registers. Longer rows: 4 warps of 16 or 32 queries each go over the keys, 64 a stage.
// Numbers   Scores, their bias, and sums are f32; weights of the softmax are rounded to the stored type before they meet v. A row's result is the same bits
//           in any pack: its steps depend on its length and on the places in it alone, and only its own tokens are read.
//           Tokens of no row are neither read nor written.
// Options   -DHEAD_SIZE=32|64 -DHEADS=n -DBIAS=0|1, and the prelude's -DBF16. HEADS HEAD_SIZE is a multiple of 64.
// Compile   NVRTC, no includes, behind prelude.cuh: --gpu-architecture=sm_XY --std=c++17, sm_80 and newer

#ifndef BIAS
#define BIAS 0
#endif
#ifndef RESIDENT
#define RESIDENT (HEAD_SIZE == 64 ? 3 : 4) // blocks a processor, which bounds the registers
#endif

#define HIDDEN (HEADS * HEAD_SIZE)
#define THREADS 128 // of a team; a block has one, or TEAMS
#define TEAMS 4
#define STAGES 2 // of a team
#define STAGE_KEYS 64
#define STEP_KEYS 32                            // the keys of one turn of the softmax; part of what a row's bits depend on
#define PIECES (HEAD_SIZE / 8)                  // of 16 bytes, in a head's part of a token
#define LANE_PIECES (HEAD_SIZE / 32)            // pieces of a token that one lane holds: `quad`, and `quad + 4`
#define KEY_BYTES (HEAD_SIZE * 2)
#define HALF_STAGE (STAGE_KEYS * KEY_BYTES)     // keys, then values of the same size, then the bias
#define STAGE_BYTES (2 * HALF_STAGE + BIAS * 192 * 16)
#define BIAS_BEFORE 128                         // entries of the table below distance -reach, and
#define BIAS_BEHIND 63                          // above reach: blocks of queries and stages of keys may reach beyond a row

#define SHORT 32                                // tokens of the longest row that one warp takes
#define MOST_TILES 128                          // of 64 keys, in the longest row

#if HEAD_SIZE == 64
#define ROOT 8.f
#define SCALE (0.125f * LOG2E)
#else
#define ROOT 5.656854249492381f
#define SCALE (0.17677669529663689f * LOG2E)
#endif

// The maximum that weights are relative to may lag behind the true one by a factor of 2^8, so that sums are seldom rescaled.
#define LAG (8.f / SCALE)

// Entries of the list: {first token, length | first query / 64 << 14 | kind << 28}, one for each warp. Kinds:
#define NOTHING 0
#define NARROW 1      // 64 queries of a row, in all four warps' places
#define WIDE 2        // 128 queries of a row, likewise
#define SHORT_ROWS 3  // up to four whole rows, the last ones with length 0

// The thread's number in its team, read anew: what is made of it is made anew too, and holds no register through a step.
DEVICE u32 thread_again() {
    u32 thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread % THREADS;
}

DEVICE u32 transpose8x8(u32 matrix) {
    u32 transposed;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(matrix));
    return transposed;
}

DEVICE uint4 load_shared16(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}

DEVICE float4 load_shared_quad(u32 address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
    return v;
}

// Copies 16 bytes, or writes zeros where `exists` is false: then `from` is not read.
DEVICE void copy_async16_if(u32 to_shared, const void* from, bool exists) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to_shared), "l"(from), "r"(exists ? 16 : 0) : "memory");
}

// d = a b + c, of a 16x16 tile a and a 16x8 tile b. Not volatile, so that the compiler may move it.
DEVICE void product(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, float c0, float c1, float c2, float c3) {
#if BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
#endif
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}

DEVICE void add_product(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    product(c, a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]);
}

// c = start + q k^T over one piece of each lane. The order of columns in a product is free if both sides have the same, so a lane's 8 consecutive values serve as
// the fragments of two products.
DEVICE void score_piece(float (&c)[4], const uint4& upper, const uint4& lower, const uint4& key, float4 start) {
    product(c, upper.x, lower.x, upper.y, lower.y, key.x, key.y, start.x, start.y, start.z, start.w);
    add_product(c, upper.z, lower.z, upper.w, lower.w, key.z, key.w);
}

// One row and head. Places are 32 bits, as registers are scarce: in 16-byte pieces, which is enough for 64 GB.
struct Head {
    const uint4* qkv;
    uint4* context;
    const float4* table;
    u32 chunk;       // where the head's chunk of q begins in qkv, which is also where its chunk of the context begins
    u32 apart;       // from q to k, and from k to v
    u32 bias;        // where distance 0 stands in the table
    int first_piece; // 4 for the second head of a chunk
    int start;       // the row's first token
    int length;
    int window;
};

// Where piece `piece` of the head stands, of the token at `place` of the row.
DEVICE u32 place_of(const Head& head, int place, int piece) {
    const int token = head.start + place;
    return head.chunk + token * 8 + ((head.first_piece + piece) ^ (token & 7));
}

// ---- rows of up to 16 TILES tokens: one warp, no shared memory. Values are transposed in registers, so that all loads and stores are 16 bytes wide.

template <int TILES, bool WINDOWED> DEVICE void attend_short(const Head& head, int lane) {
    constexpr int GROUPS = 2 * TILES;         // of 8 tokens
    constexpr int LOW = 2 * (TILES - 1);      // the bias of key group j and query tile i is that of group j - 2 i, as it goes by distance
    const int row = lane >> 2;
    const int quad = lane & 3;

    float4 bias[GROUPS + LOW];
    if (BIAS) {
#pragma unroll
        for (int i = 0; i < GROUPS + LOW; i++) bias[i] = __ldg(head.table + (head.bias + 2 * quad - row + 8 * (i - LOW)));
    }
    wait_for_previous_kernel();

    uint4 queries[TILES][2][LANE_PIECES];
    uint4 keys[GROUPS][LANE_PIECES];
    uint4 values[GROUPS][LANE_PIECES];
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        const int place = min(group * 8 + row, head.length - 1);
#pragma unroll
        for (int i = 0; i < LANE_PIECES; i++) {
            const uint4* from = head.qkv + place_of(head, place, quad + 4 * i);
            queries[group / 2][group & 1][i] = load16(from);
            keys[group][i] = load16(from + head.apart);
        }
    }
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        const int place = min(group * 8 + row, head.length - 1);
#pragma unroll
        for (int i = 0; i < LANE_PIECES; i++) values[group][i] = load16(head.qkv + (2 * head.apart + place_of(head, place, quad + 4 * i)));
    }

    float scores[TILES][GROUPS][4];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            float(&c)[4] = scores[tile][group];
            const float4 start = BIAS ? bias[group - 2 * tile + LOW] : make_float4(0.f, 0.f, 0.f, 0.f);
            score_piece(c, queries[tile][0][0], queries[tile][1][0], keys[group][0], start);
#pragma unroll
            for (int i = 1; i < LANE_PIECES; i++) {
                score_piece(c, queries[tile][0][i], queries[tile][1][i], keys[group][i], make_float4(c[0], c[1], c[2], c[3]));
            }
        }
    }

    float inverse[TILES][2];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = NEGATIVE_INFINITY;
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int key = group * 8 + 2 * quad + i;
                    bool counts = key < head.length;
                    if (WINDOWED) {
                        const int distance = key - (tile * 16 + half * 8 + row);
                        counts = counts && distance <= head.window && -distance <= head.window;
                    }
                    const float score = counts ? __fmul_rn(scores[tile][group][2 * half + i], SCALE) : NEGATIVE_INFINITY;
                    scores[tile][group][2 * half + i] = score;
                    most = fmaxf(most, score);
                }
            }
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            if (WINDOWED && most == NEGATIVE_INFINITY) most = 0.f; // a query beyond the row may see no key
            float total = 0.f;
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                const float first = exp2_approximate(scores[tile][group][2 * half] - most);
                const float second = exp2_approximate(scores[tile][group][2 * half + 1] - most);
                scores[tile][group][2 * half] = first;
                scores[tile][group][2 * half + 1] = second;
                total += first + second;
            }
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            inverse[tile][half] = 1.f / total;
        }
    }

    u32 weights[TILES][GROUPS][2];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            weights[tile][group][0] = pack2(scores[tile][group][0], scores[tile][group][1]);
            weights[tile][group][1] = pack2(scores[tile][group][2], scores[tile][group][3]);
        }
    }
#pragma unroll
    for (int i = 0; i < LANE_PIECES; i++) {
        float sums[TILES][4][4];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int word = 0; word < 4; word++) {
#pragma unroll
                for (int e = 0; e < 4; e++) sums[tile][word][e] = 0.f;
            }
        }
#pragma unroll
        for (int pair = 0; pair < TILES; pair++) {
#pragma unroll
            for (int word = 0; word < 4; word++) {
                const u32 upper = transpose8x8(((const u32*)&values[2 * pair][i])[word]);
                const u32 lower = transpose8x8(((const u32*)&values[2 * pair + 1][i])[word]);
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    const u32(&left)[2] = weights[tile][2 * pair];
                    const u32(&right)[2] = weights[tile][2 * pair + 1];
                    add_product(sums[tile][word], left[0], left[1], right[0], right[1], upper, lower);
                }
            }
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int place = tile * 16 + half * 8 + row;
                const float by = inverse[tile][half];
                u32 words[4];
#pragma unroll
                for (int word = 0; word < 4; word++) words[word] = pack2(sums[tile][word][2 * half] * by, sums[tile][word][2 * half + 1] * by);
                if (place < head.length) {
                    store16(head.context + place_of(head, place, quad + 4 * i), words[0], words[1], words[2], words[3]);
                }
            }
        }
    }
}

// ---- longer rows: a block has 64 TILES queries, a warp 16 TILES of them

// What a warp keeps of its queries; [tile][half]: of row `lane / 4` and of the row 8 below.
template <int TILES> struct Queries {
    uint4 pieces[TILES][2][LANE_PIECES];
    float sums[TILES][HEAD_SIZE / 8][4]; // weights times values, not divided by `total`
    float most[TILES][2];                // the maximum that weights are relative to
    float total[TILES][2];               // of the lane's own weights
};

// Where a lane finds its parts of a step in shared memory.
struct Places {
    u32 keys;
    u32 values;
    u32 bias;
};

// One turn of the softmax over KEYS keys. MASKED: only `existing` of them exist, and the window may cut; distance: of the lane's first key from its first query.
template <int TILES, bool WINDOWED, bool MASKED, int KEYS>
DEVICE void step(Queries<TILES>& q, const Places& places, int existing, int distance, int window, int quad) {
    constexpr int GROUPS = KEYS / 8;
    constexpr int LOW = 2 * (TILES - 1);
    float scores[TILES][GROUPS][4];
    float4 bias[GROUPS + LOW];
    if (BIAS) {
#pragma unroll
        for (int i = 0; i < LOW; i++) bias[i] = load_shared_quad(places.bias + (i - LOW) * 128);
    }
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        if (BIAS) bias[group + LOW] = load_shared_quad(places.bias + group * 128);
        uint4 keys[LANE_PIECES];
#pragma unroll
        for (int i = 0; i < LANE_PIECES; i++) keys[i] = load_shared16((places.keys ^ (i * 64)) + group * 8 * KEY_BYTES);
        // The sums start as the bias, times sqrt(head size).
#pragma unroll
        for (int i = 0; i < LANE_PIECES; i++) {
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                float(&c)[4] = scores[tile][group];
                float4 start = make_float4(0.f, 0.f, 0.f, 0.f);
                if (BIAS && i == 0) start = bias[group - 2 * tile + LOW];
                if (i > 0) start = make_float4(c[0], c[1], c[2], c[3]);
                score_piece(c, q.pieces[tile][0][i], q.pieces[tile][1][i], keys[i], start);
            }
        }
    }
    if (MASKED) {
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int key = group * 8 + 2 * quad + i;
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        bool out = key >= existing;
                        if (WINDOWED) {
                            const int from_query = key + distance - tile * 16 - half * 8;
                            out = out || from_query > window || -from_query > window;
                        }
                        if (out) scores[tile][group][2 * half + i] = NEGATIVE_INFINITY;
                    }
                }
            }
        }
    }

    float largest[TILES][2];
    bool any_lags = false;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float value = fmaxf(scores[tile][0][2 * half], scores[tile][0][2 * half + 1]);
#pragma unroll
            for (int group = 1; group < GROUPS; group++) {
                value = fmaxf(value, fmaxf(scores[tile][group][2 * half], scores[tile][group][2 * half + 1]));
            }
            largest[tile][half] = value;
            any_lags = any_lags || value > q.most[tile][half] + LAG;
        }
    }
    // Each query decides for itself, so its bits do not depend on the others of the warp.
    if (__any_sync(~0u, any_lags)) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float value = largest[tile][half];
                value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
                value = fmaxf(value, __shfl_xor_sync(~0u, value, 2));
                const float before = q.most[tile][half];
                const float now = value > before + LAG ? value : before;
                const float by = now == before ? 1.f : exp2_approximate(__fmul_rn(before - now, SCALE));
                q.most[tile][half] = now;
                q.total[tile][half] = __fmul_rn(q.total[tile][half], by);
#pragma unroll
                for (int n = 0; n < HEAD_SIZE / 8; n++) {
                    q.sums[tile][n][2 * half] *= by;
                    q.sums[tile][n][2 * half + 1] *= by;
                }
            }
        }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = q.most[tile][half];
            if (WINDOWED && most == NEGATIVE_INFINITY) most = 0.f; // no key yet
            const float less = -__fmul_rn(most, SCALE);
            float total = q.total[tile][half];
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                const float first = exp2_approximate(__fmaf_rn(scores[tile][group][2 * half], SCALE, less));
                const float second = exp2_approximate(__fmaf_rn(scores[tile][group][2 * half + 1], SCALE, less));
                scores[tile][group][2 * half] = first;
                scores[tile][group][2 * half + 1] = second;
                total = __fadd_rn(total, __fadd_rn(first, second));
            }
            q.total[tile][half] = total;
        }
    }
#pragma unroll
    for (int pair = 0; pair < GROUPS / 2; pair++) {
        u32 weights[TILES][4];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const float(&left)[4] = scores[tile][2 * pair];
            const float(&right)[4] = scores[tile][2 * pair + 1];
            weights[tile][0] = pack2(left[0], left[1]);
            weights[tile][1] = pack2(left[2], left[3]);
            weights[tile][2] = pack2(right[0], right[1]);
            weights[tile][3] = pack2(right[2], right[3]);
        }
#pragma unroll
        for (int n = 0; n < HEAD_SIZE / 8; n += 2) {
            u32 values[4];
            load_matrix4_transposed((places.values ^ (n * 16)) + pair * 16 * KEY_BYTES, values);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const u32(&w)[4] = weights[tile];
                add_product(q.sums[tile][n], w[0], w[1], w[2], w[3], values[0], values[1]);
                add_product(q.sums[tile][n + 1], w[0], w[1], w[2], w[3], values[2], values[3]);
            }
        }
    }
}

// Divides, and writes the queries of the warp, the first of which is `first`. Four lanes exchange their words, so that each has 8 consecutive columns.
template <int TILES> DEVICE void finish(const Head& head, const Queries<TILES>& q, int first) {
    const u32 thread = thread_again();
    const int row = (thread & 31) >> 2;
    const int quad = thread & 3;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = q.total[tile][half];
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            const float by = 1.f / total;
            const int place = first + tile * 16 + half * 8 + row;
#pragma unroll
            for (int i = 0; i < LANE_PIECES; i++) {
                u32 words[4];
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    const float(&sums)[4] = q.sums[tile][4 * i + n];
                    words[n] = pack2(__fmul_rn(sums[2 * half], by), __fmul_rn(sums[2 * half + 1], by));
                }
#pragma unroll
                for (int n = 0; n < 4; n += 2) {
                    const u32 other = __shfl_xor_sync(~0u, quad & 1 ? words[n] : words[n + 1], 1);
                    if (quad & 1) {
                        words[n] = other;
                    } else {
                        words[n + 1] = other;
                    }
                }
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const u32 other = __shfl_xor_sync(~0u, quad & 2 ? words[n] : words[n + 2], 2);
                    if (quad & 2) {
                        words[n] = other;
                    } else {
                        words[n + 2] = other;
                    }
                }
                if (place < head.length) {
                    store16(head.context + place_of(head, place, quad + 4 * i), words[0], words[1], words[2], words[3]);
                }
            }
        }
    }
}

// One turn of a softmax that went over some of the keys, joined with what went over others: [value][thread] of a team, in shared memory.
template <int TILES> struct Joined {
    static constexpr int VALUES = TILES * (4 + HEAD_SIZE / 2);

    static DEVICE void leave(const Queries<TILES>& q, u32 shared) {
        u32 to = shared + thread_again() * 4;
        const auto put = [&](float value) {
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
            to += THREADS * 4;
        };
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int half = 0; half < 2; half++) put(q.most[tile][half]), put(q.total[tile][half]);
#pragma unroll
            for (int n = 0; n < HEAD_SIZE / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) put(q.sums[tile][n][i]);
        }
    }

    static DEVICE void take(Queries<TILES>& q, u32 shared) {
        u32 from = shared + thread_again() * 4;
        const auto next = [&]() {
            float value;
            asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(from) : "memory");
            from += THREADS * 4;
            return value;
        };
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            float mine[2];
            float theirs[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float most = next();
                const float total = next();
                // One of the two has seen a key, where the row has any.
                const float now = fmaxf(q.most[tile][half], most);
                mine[half] = exp2_approximate(__fmul_rn(q.most[tile][half] - now, SCALE));
                theirs[half] = exp2_approximate(__fmul_rn(most - now, SCALE));
                q.most[tile][half] = now;
                q.total[tile][half] = __fmaf_rn(total, theirs[half], __fmul_rn(q.total[tile][half], mine[half]));
            }
#pragma unroll
            for (int n = 0; n < HEAD_SIZE / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float& sum = q.sums[tile][n][i];
                    sum = __fmaf_rn(next(), theirs[i / 2], __fmul_rn(sum, mine[i / 2]));
                }
        }
    }
};

DEVICE void meet_team(int team) { asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(THREADS) : "memory"); }

// By one team, or by all those of the block, of which each takes every TEAMS_OF-th stage.
template <int TILES, bool WINDOWED, int TEAMS_OF> DEVICE void attend_long(const Head& head, int first_query, u32 shared_of_block) {
    constexpr int QUERIES = 64 * TILES;
    constexpr int PASS = THREADS / PIECES; // keys that the team copies at once
    const int team = TEAMS_OF == 1 ? 0 : threadIdx.x / THREADS;
    const u32 shared = shared_of_block + team * STAGES * STAGE_BYTES;
    const int warp = threadIdx.x % THREADS >> 5;
    const int lane = threadIdx.x & 31;
    const int row = lane >> 2;
    const int quad = lane & 3;
    const int first = first_query + warp * 16 * TILES;
    const int last = min(first + 16 * TILES, head.length) - 1;
    const bool active = first < head.length;
    const int from_key = WINDOWED ? max(0, first_query - head.window) & ~(STAGE_KEYS - 1) : 0;
    const int to_key = WINDOWED ? min(head.length, first_query + QUERIES + head.window) : head.length;
    const int all_stages = (to_key - from_key + STAGE_KEYS - 1) / STAGE_KEYS;
    const int stages = (all_stages - team + TEAMS_OF - 1) / TEAMS_OF; // of the team
    const auto first_key = [&](int stage) { return from_key + (stage * TEAMS_OF + team) * STAGE_KEYS; };

    const auto copy_bias = [&](int stage) {
        const u32 thread = thread_again();
        const u32 to = shared + (stage % STAGES) * STAGE_BYTES + 2 * HALF_STAGE + thread * 16;
        const float4* from = head.table + (head.bias + first_key(stage) - first_query - QUERIES + thread);
#pragma unroll
        for (int i = 0; i < QUERIES + STAGE_KEYS; i += THREADS) {
            if (i + THREADS <= QUERIES + STAGE_KEYS || thread < (QUERIES + STAGE_KEYS) % THREADS) {
                copy_async16(to + i * 16, from + i);
            }
        }
    };
    const auto copy_keys = [&](int stage) {
        // In shared memory pieces of keys stand so that 8 lanes, 4 pieces of two keys each, and pieces of values so that 8 keys of a piece meet all banks.
        const u32 thread = thread_again();
        const int copied_key = thread / PIECES;
        const int copied_piece = thread % PIECES;
        const int among_keys = HEAD_SIZE == 64 ? copied_piece ^ ((copied_key & 1) << 2) : copied_piece;
        const int among_values = HEAD_SIZE == 64 ? copied_piece ^ (copied_key & 7) : copied_piece ^ ((copied_key >> 1) & 3);
        const u32 to = shared + (stage % STAGES) * STAGE_BYTES + copied_key * KEY_BYTES;
        const u32 to_keys = to + (among_keys << 4);
        const u32 to_values = to + (among_values << 4) + HALF_STAGE;
        // Multiples of 8 keys further, a piece stands at the same place of its token.
        const int key = first_key(stage);
        const u32 copied = place_of(head, key + copied_key, copied_piece) + head.apart;
        const uint4* key_from = head.qkv + copied;
        const uint4* value_from = head.qkv + (copied + head.apart);
        if (key + STAGE_KEYS <= head.length) {
#pragma unroll
            for (int i = 0; i < STAGE_KEYS / PASS; i++) {
                copy_async16(to_keys + i * PASS * KEY_BYTES, key_from + i * PASS * 8);
                copy_async16(to_values + i * PASS * KEY_BYTES, value_from + i * PASS * 8);
            }
        } else {
#pragma unroll
            for (int i = 0; i < STAGE_KEYS / PASS; i++) {
                const bool exists = key + i * PASS + copied_key < head.length;
                copy_async16_if(to_keys + i * PASS * KEY_BYTES, key_from + i * PASS * 8, exists);
                copy_async16_if(to_values + i * PASS * KEY_BYTES, value_from + i * PASS * 8, exists);
            }
        }
    };

#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        if (BIAS && stage < stages) copy_bias(stage);
    }
    wait_for_previous_kernel();
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        if (stage < stages) copy_keys(stage);
        copy_commit();
    }

    Queries<TILES> q;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int place = min(first + tile * 16 + half * 8 + row, head.length - 1);
#pragma unroll
            for (int i = 0; i < LANE_PIECES; i++) q.pieces[tile][half][i] = load16(head.qkv + place_of(head, place, quad + 4 * i));
            q.most[tile][half] = NEGATIVE_INFINITY;
            q.total[tile][half] = 0.f;
#pragma unroll
            for (int n = 0; n < HEAD_SIZE / 8; n++) {
                q.sums[tile][n][2 * half] = 0.f;
                q.sums[tile][n][2 * half + 1] = 0.f;
            }
        }
    }

#pragma unroll 1
    for (int stage = 0; stage < stages; stage++) {
        copy_wait<STAGES - 2>();
        if (TEAMS_OF == 1) {
            __syncthreads();
        } else {
            meet_team(team);
        }
        if (stage + STAGES - 1 < stages) {
            if (BIAS) copy_bias(stage + STAGES - 1);
            copy_keys(stage + STAGES - 1);
        }
        copy_commit();
        if (!active) continue;
        const int key = first_key(stage);
        const int left = to_key - key;
        const u32 thread = thread_again();
        const int row = (thread & 31) >> 2;
        const int quad = thread & 3;
        const int value_key = thread & 15;
        const int value_piece = (thread & 31) >> 4;
        const int value_place = HEAD_SIZE == 64 ? value_piece ^ (value_key & 7) : value_piece ^ ((value_key >> 1) & 3);
        const u32 at = shared + (stage % STAGES) * STAGE_BYTES;
        Places begin;
        begin.keys = at + row * KEY_BYTES + ((HEAD_SIZE == 64 ? quad ^ ((row & 1) << 2) : quad) << 4);
        begin.values = at + HALF_STAGE + value_key * KEY_BYTES + (value_place << 4);
        begin.bias = at + 2 * HALF_STAGE + (QUERIES - (thread >> 5) * 16 * TILES + 2 * quad - row) * 16;
        const auto places = [&](int skipped) {
            Places p;
            p.keys = begin.keys + skipped * KEY_BYTES;
            p.values = begin.values + skipped * KEY_BYTES;
            p.bias = begin.bias + skipped * 16;
            return p;
        };
        const int distance = key - first - row;
        if (WINDOWED) {
#pragma unroll 1
            for (int skipped = 0; skipped < STAGE_KEYS && skipped < left; skipped += STEP_KEYS) {
                const int low = key + skipped;
                const int high = low + STEP_KEYS - 1;
                if (low > last + head.window || high < first - head.window) continue;
                if (low >= last - head.window && high <= first + head.window && skipped + STEP_KEYS <= left) {
                    step<TILES, true, false, STEP_KEYS>(q, places(skipped), STEP_KEYS, distance + skipped, head.window, quad);
                } else {
                    step<TILES, true, true, STEP_KEYS>(q, places(skipped), left - skipped, distance + skipped, head.window, quad);
                }
            }
        } else if (left >= STAGE_KEYS) {
#pragma unroll
            for (int skipped = 0; skipped < STAGE_KEYS; skipped += STEP_KEYS) {
                step<TILES, false, false, STEP_KEYS>(q, places(skipped), STEP_KEYS, 0, 0, quad);
            }
        } else {
            int skipped = 0;
            if (left >= STEP_KEYS) {
                step<TILES, false, false, STEP_KEYS>(q, places(0), STEP_KEYS, 0, 0, quad);
                skipped = STEP_KEYS;
            }
            if (left - skipped > 16) {
                step<TILES, false, true, STEP_KEYS>(q, places(skipped), left - skipped, 0, 0, quad);
            } else if (left > skipped) {
                step<TILES, false, true, 16>(q, places(skipped), left - skipped, 0, 0, quad);
            }
        }
    }
    if constexpr (TEAMS_OF > 1) {
        // Stages that are not read any more take what the teams found.
        static_assert(Joined<TILES>::VALUES * THREADS * 4 <= STAGES * STAGE_BYTES, "a team's stages hold what it found");
        __syncthreads();
        if (team > 0) {
            if (active && stages > 0) Joined<TILES>::leave(q, shared);
        }
        __syncthreads();
        if (team > 0) return;
#pragma unroll 1
        for (int other = 1; other < TEAMS_OF && other < all_stages; other++) {
            if (active) Joined<TILES>::take(q, shared_of_block + other * STAGES * STAGE_BYTES);
        }
    }
    if (active) finish<TILES>(head, q, first);
}

template <bool WINDOWED, int TEAMS_OF>
DEVICE void attend(const Value* qkv, Value* context, const int2* list, int list_ready, const float4* table, int reach, int capacity, int window) {
    extern __shared__ __align__(128) unsigned char stages[];
    const u32 shared = shared_address(stages);
    const int warp = threadIdx.x % THREADS >> 5;
    const int lane = threadIdx.x & 31;
    let_next_kernel_start();
    if (!list_ready) wait_for_previous_kernel();

    const int entry = blockIdx.x / HEADS;
    const int number = blockIdx.x - entry * HEADS;
    const int2 item = list[entry * 4 + warp];
    const u32 kind = (u32)item.y >> 28;
    if (kind == NOTHING) return;

    Head head;
    head.qkv = (const uint4*)qkv;
    head.context = (uint4*)context;
    head.table = table;
    head.chunk = (u32)(number * HEAD_SIZE / 64) * (u32)capacity * 8;
    head.apart = (u32)(HIDDEN / 64) * (u32)capacity * 8;
    head.bias = number * (2 * reach + 1 + BIAS_BEFORE + BIAS_BEHIND) + reach + BIAS_BEFORE;
    head.first_piece = (number * PIECES) & 7;
    head.start = item.x;
    head.length = item.y & 0x3fff;
    head.window = window;
    const int first_query = ((item.y >> 14) & 0xff) * 64;

    if (kind == SHORT_ROWS) {
        if (TEAMS_OF > 1 && threadIdx.x >= THREADS) return;
        if (head.length > 16) {
            attend_short<2, WINDOWED>(head, lane);
        } else if (head.length > 0) {
            attend_short<1, WINDOWED>(head, lane);
        }
    } else if (TEAMS_OF == 1 && kind == WIDE) {
        attend_long<2, WINDOWED, 1>(head, first_query, shared);
    } else {
        attend_long<1, WINDOWED, TEAMS_OF>(head, first_query, shared);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) attention(const Value* qkv, Value* context,
    const int2* list, int list_ready, const float4* table, int reach, int capacity, int window) {
    attend<false, 1>(qkv, context, list, list_ready, table, reach, capacity, window);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) attention_window(const Value* qkv, Value* context,
    const int2* list, int list_ready, const float4* table, int reach, int capacity, int window) {
    attend<true, 1>(qkv, context, list, list_ready, table, reach, capacity, window);
}

extern "C" __global__ void __launch_bounds__(TEAMS * THREADS, 1) attention_split(const Value* qkv, Value* context,
    const int2* list, int list_ready, const float4* table, int reach, int capacity, int window) {
    attend<false, TEAMS>(qkv, context, list, list_ready, table, reach, capacity, window);
}

// ---- preparations

extern "C" __global__ void prepare_bias(const float* by_distance, int reach, float4* table) {
    const int head = blockIdx.y;
    const int size = 2 * reach + 1 + BIAS_BEFORE + BIAS_BEHIND;
    const float* const of_head = by_distance + (size_t)head * (2 * reach + 1);
    let_next_kernel_start();
    wait_for_previous_kernel();
    const auto bias = [&](int place) { return place >= 0 && place <= 2 * reach ? ROOT * of_head[place] : 0.f; };
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x) {
        // What one lane adds to its four scores of a 16x8 tile: two keys for one query, and for the query 8 below.
        const int place = i - BIAS_BEFORE;
        table[(size_t)head * size + i] = make_float4(bias(place), bias(place + 1), bias(place - 8), bias(place - 7));
    }
}

// Classes of rows, in the order of the list: tiles of 64 keys descending, then rows of up to 32 tokens, then of up to 16.
#define CLASSES (MOST_TILES + 2)
#define LONGER_SHORT MOST_TILES
#define SHORTEST (MOST_TILES + 1)

DEVICE int class_of(int length) {
    if (length <= 16) return SHORTEST;
    if (length <= SHORT) return LONGER_SHORT;
    return MOST_TILES - min((length + 63) / 64, MOST_TILES);
}

extern "C" __global__ void plan_attention(const int* starts, const int* lengths, int rows, int2* list, int entries,
    int wide_from) {
    __shared__ int members[CLASSES]; // rows of a class, then where its next one goes: entries of long rows, quarters of entries of short ones
    __shared__ int wide_blocks;
    __shared__ int long_entries;
    let_next_kernel_start();
    for (int i = threadIdx.x; i < CLASSES; i += blockDim.x) members[i] = 0;
    if (threadIdx.x == 0) wide_blocks = 0;
    __syncthreads();

    const int rounds = (rows + blockDim.x - 1) / blockDim.x;
    for (int round = 0; round < rounds; round++) {
        const int row = round * blockDim.x + threadIdx.x;
        const int length = row < rows ? lengths[row] : 0;
        if (length > 0) atomicAdd(&members[class_of(length)], 1);
        if (length > SHORT) atomicAdd(&wide_blocks, (length + 127) / 128);
    }
    __syncthreads();
    const bool wide = wide_blocks * HEADS >= wide_from;

    // The first warp adds up what lies in front of each class, 4 classes of long rows a lane.
    if (threadIdx.x < 32) {
        int sizes[MOST_TILES / 32];
        int sum = 0;
#pragma unroll
        for (int i = 0; i < MOST_TILES / 32; i++) {
            const int which = threadIdx.x * (MOST_TILES / 32) + i;
            const int tiles = MOST_TILES - which;
            sizes[i] = members[which] * (wide ? (tiles + 1) / 2 : tiles);
            sum += sizes[i];
        }
        int before = sum;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int other = __shfl_up_sync(~0u, before, distance);
            if (threadIdx.x >= distance) before += other;
        }
        if (threadIdx.x == 31) long_entries = before;
        before -= sum;
#pragma unroll
        for (int i = 0; i < MOST_TILES / 32; i++) {
            members[threadIdx.x * (MOST_TILES / 32) + i] = before;
            before += sizes[i];
        }
    }
    __syncthreads();
    const int short_rows = members[LONGER_SHORT] + members[SHORTEST];
    const int used = long_entries + (short_rows + 3) / 4;
    __syncthreads();
    if (threadIdx.x == 0) {
        members[SHORTEST] = 4 * long_entries + members[LONGER_SHORT];
        members[LONGER_SHORT] = 4 * long_entries;
    }
    __syncthreads();
    wait_for_previous_kernel();

    // Who of a class comes first is left to chance: it changes no result.
    for (int round = 0; round < rounds; round++) {
        const int row = round * blockDim.x + threadIdx.x;
        const int length = row < rows ? lengths[row] : 0;
        if (length <= 0) continue;
        const int start = starts[row];
        const int which = class_of(length);
        if (which >= LONGER_SHORT) {
            const int place = atomicAdd(&members[which], 1);
            if (place < entries * 4) list[place] = make_int2(start, length | SHORT_ROWS << 28);
            continue;
        }
        const int tiles = MOST_TILES - which;
        int entry = atomicAdd(&members[which], wide ? (tiles + 1) / 2 : tiles);
        for (int tile = 0; tile < tiles; entry++) {
            const bool takes_two = wide && tile + 1 < tiles;
            const int2 item = make_int2(start, length | tile << 14 | (takes_two ? WIDE : NARROW) << 28);
            if (entry < entries) {
                for (int warp = 0; warp < 4; warp++) list[entry * 4 + warp] = item;
            }
            tile += takes_two ? 2 : 1;
        }
    }
    for (int place = 4 * long_entries + short_rows + threadIdx.x; place < 4 * entries; place += blockDim.x) {
        list[place] = make_int2(0, place < 4 * used ? SHORT_ROWS << 28 : 0);
    }
}

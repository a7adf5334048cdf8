// Linears of large packs on Hopper (sm_90a): C = epilogue(A W^T), by wgmma from shared memory that bulk copies fill.
//
//   acc[t, n] = sum over k of A[t, k] W[n, k], f32
//   view      = (residual[t, n] - mean) rs gamma[n] + beta[n] of residual_statistics[t]; the residual as it is where gamma is null
//   C[t, n]   = sums ? rs (acc - mean sums[n]) + bias[n] of statistics[t] : acc + bias[n]                                      *_plain
//             = activation of the same                                                                                         *_activated
//             = acc + bias[n] + view                                                                                           *_residual
//
// A [capacity, inputs], C and residual [capacity, outputs] and W [outputs, inputs] are chunked (prelude.cuh), capacity a multiple of 128 that
// is not below `tokens`; statistics are (mean, rs) of each token, null without sums; bias, sums, gamma, beta are f32 [outputs] and may be
// null. C may be the residual itself. Groups of 16 tokens that begin at or behind `tokens` are neither read nor written, and a token depends on no other.
// *_residual, with partials not null: partials[n / 64][t] = (sum, sum of squares) of the values of C[t] in chunk n / 64, as they are stored.
// The others, with partials not null and statistics: partials are such sums of A, and statistics are made of them here, and written, as join_statistics
// does it: a kernel less between two linears.
//
// linear_sm90_pingpong_*  tiles of 128 tokens x 192 outputs, each by one of two warpgroups in turn: one multiplies while the other finishes its
//                         tile. Two blocks of a cluster take two tiles of tokens and share the weights. For packs of several tiles a block.
// linear_sm90_192_*       tiles of 128 x 192 by two warpgroups together. For packs of at most one tile a multiprocessor.
// linear_sm90_128_*       tiles of 128 x 128, likewise.
// linear_sm90_64_*        tiles of 128 x 64, likewise.
// linear_sm90_split_*     tiles of 128 x 64, whose inputs the blocks of a cluster (of 1, 2, 4 or 8) share out; for few tiles and many inputs.
// join_statistics         (mean, rs) of each token of partials, in the order of the chunks.
//                         epsilon, rms, starts, lengths, rows, stage and fault as in stream.cu, here and where linears join.
//
// Numbers   sums are f32, in ascending order of k in steps of 16, in all but *_split: those give the same bits. *_split adds the sums of its
//           blocks in the order of their inputs, so its bits depend on inputs and on the size of the cluster alone.
// Options   -DACTIVATION=n (prelude.cuh) of *_activated.
// Launch    384 threads, dynamic shared memory (above 48 KB: to be allowed first), programmatic launch welcome:
//             pingpong   cluster 2, grid 2 min(multiprocessors / 2, tiles / 2), tiles = (tokens / 256 rounded up) 2 (outputs / 192 rounded up)
//             192        no cluster, grid min(multiprocessors, tiles), tiles = (tokens / 128 rounded up) (outputs / 192 rounded up)
//             128        no cluster, grid min(multiprocessors, tiles), tiles = (tokens / 128 rounded up) (outputs / 128 rounded up)
//             64         no cluster, grid min(multiprocessors, tiles), tiles = (tokens / 128 rounded up) (outputs / 64)
//             split      cluster c, grid c (tokens / 128 rounded up) (outputs / 64)
//             bytes      230720 (plain and activated: 212192), 214272, 197840, 230656, 197760
//           join_statistics: 128 threads, grid tokens / 128 rounded up, no shared memory.

#ifndef ACTIVATION
#define ACTIVATION IDENTITY
#endif

#define TILE_M 128
#define JOINED_TILES 2 // whose statistics are made ahead, by warps that do nothing else
#define THREADS 384 // a warpgroup that loads and two that multiply

// What becomes of the products.
#define PLAIN 0
#define ACTIVATED 1
#define RESIDUAL 2

struct Linear {
    const Value* a;
    const Value* w;
    const float* bias;
    const float* sums;
    float2* statistics;
    const Value* residual;
    const float2* residual_statistics;
    const float* gamma;
    const float* beta;
    Value* out;
    int capacity;
    int outputs;
    int inputs;
    int tokens;
    float2* partials;
    float epsilon;
    int rms;
    const int* starts;
    const int* lengths;
    int rows;
    int stage;
    int* fault;
};

// ---- barriers of shared memory, which count arrivals and bytes

DEVICE void barrier_make(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void barriers_are_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
// In another block of the cluster. (With .release.cluster the compiler fences the whole GPU at every call.)
DEVICE void barrier_arrive_at(u32 barrier, u32 block) {
    asm volatile("{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\tmbarrier.arrive.shared::cluster.b64 _, [there];\n\t}"
                 ::"r"(barrier), "r"(block) : "memory");
}
// One arrival, and bytes to come.
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile("{\n\t.reg .pred done;\nAGAIN:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t@done bra DONE;\n\tbra AGAIN;\nDONE:\n\t}"
                 ::"r"(barrier), "r"(parity) : "memory");
}

// Named barriers of the block.
DEVICE void meet(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }
DEVICE void arrive(int barrier, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }
#define TURN 1  // and 2: of the first and the second warpgroup to multiply
#define READY 3 // barriers of shared memory are made

DEVICE u32 block_in_cluster() {
    u32 block;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(block));
    return block;
}
DEVICE u32 blocks_of_cluster() {
    u32 blocks;
    asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
    return blocks;
}
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// For what is no memory of this thread's: the compiler fences the whole GPU at a release.
DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// ---- bulk copies

DEVICE void bulk_load(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
// To the same place in all blocks of the mask, whose own barriers count the bytes.
DEVICE void bulk_load_to_all(u32 to, const void* from, u32 bytes, u32 barrier, u16 blocks) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "h"(blocks) : "memory");
}
DEVICE void bulk_store(void* to, u32 from, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
}
DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but the last LEFT groups of stores have been read from shared memory.
template <int LEFT> DEVICE void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory"); }
// Before bulk copies read what this thread wrote.
DEVICE void fence_for_bulk() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- products of a warpgroup

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }

// Of rows of 128 bytes in the 128-byte swizzle, 1024 bytes from eight rows to the next eight. 16 columns further: 2 more.
DEVICE u64 wgmma_operand(u32 address) { return (u64)((address & 0x3ffff) >> 4) | ((u64)1 << 16) | ((u64)64 << 32) | ((u64)1 << 62); }

#if BF16
#define WGMMA_TYPES "f32.bf16.bf16"
#else
#define WGMMA_TYPES "f32.f16.f16"
#endif
#define REGISTERS8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])

// d += a b for 64 rows of a, N rows of b and 16 columns of both.
template <int N> struct Wgmma;
template <> struct Wgmma<64> {
    static DEVICE void add(float (&d)[32], u64 a, u64 b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16." WGMMA_TYPES " {"
                     "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                     "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
                     "}, %32, %33, 1, 1, 1, 0, 0;"
                     : REGISTERS8(d, 0), REGISTERS8(d, 8), REGISTERS8(d, 16), REGISTERS8(d, 24)
                     : "l"(a), "l"(b));
    }
};
template <> struct Wgmma<128> {
    static DEVICE void add(float (&d)[64], u64 a, u64 b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16." WGMMA_TYPES " {"
                     "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                     "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
                     "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
                     "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
                     "}, %64, %65, 1, 1, 1, 0, 0;"
                     : REGISTERS8(d, 0), REGISTERS8(d, 8), REGISTERS8(d, 16), REGISTERS8(d, 24), REGISTERS8(d, 32), REGISTERS8(d, 40),
                       REGISTERS8(d, 48), REGISTERS8(d, 56)
                     : "l"(a), "l"(b));
    }
};
template <> struct Wgmma<192> {
    static DEVICE void add(float (&d)[96], u64 a, u64 b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n192k16." WGMMA_TYPES " {"
                     "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                     "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
                     "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
                     "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
                     "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
                     "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
                     "}, %96, %97, 1, 1, 1, 0, 0;"
                     : REGISTERS8(d, 0), REGISTERS8(d, 8), REGISTERS8(d, 16), REGISTERS8(d, 24), REGISTERS8(d, 32), REGISTERS8(d, 40),
                       REGISTERS8(d, 48), REGISTERS8(d, 56), REGISTERS8(d, 64), REGISTERS8(d, 72), REGISTERS8(d, 80), REGISTERS8(d, 88)
                     : "l"(a), "l"(b));
    }
};

// ---- fragments to and from shared memory

DEVICE void store_matrix4(u32 address, const u32 (&v)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}

// ---- the epilogue's arithmetic

#ifndef GELU_DEGREE
#define GELU_DEGREE 5
#endif

// prelude.cuh's gelu of four values in step: left to itself the compiler does one after the other, and waits at every step. Of degree 5, for every
// operation beside running products costs some percent of a linear: the relative error of Phi is below 8.4e-5, a sixth of half a unit of fp16's last
// place, and the absolute error of the whole below 1.3e-5. Of degree 7 it gives prelude.cuh's bits.
#define IN_STEP(coefficient)                                                                                                                  \
    "fma.rn.f32 p0, a0, p0, " coefficient ";\n\tfma.rn.f32 p1, a1, p1, " coefficient ";\n\t"                                                   \
    "fma.rn.f32 p2, a2, p2, " coefficient ";\n\tfma.rn.f32 p3, a3, p3, " coefficient ";\n\t"
#if GELU_DEGREE == 7
#define GELU_TOP "0fB59CB0FC"
#define GELU_STEPS                                                                                                                            \
    IN_STEP("0f385791BB") IN_STEP("0fBA640FC3") IN_STEP("0f3C0884D4") IN_STEP("0fBD5BF8CD") IN_STEP("0fBEEAD296") IN_STEP("0fBF935ACC")       \
    IN_STEP("0fBF7FFFCD")
#else
#define GELU_TOP "0fB9A80A33"
#define GELU_STEPS IN_STEP("0f3BBEF309") IN_STEP("0fBD4594AD") IN_STEP("0fBEEDA12A") IN_STEP("0fBF931838") IN_STEP("0fBF8003F4")
#endif
DEVICE void gelu4(float& x, float& y, float& z, float& w) {
    asm volatile("{\n\t.reg .f32 a0, a1, a2, a3, p0, p1, p2, p3;\n\t"
                 "abs.f32 a0, %0;\n\tabs.f32 a1, %1;\n\tabs.f32 a2, %2;\n\tabs.f32 a3, %3;\n\t"
                 "mov.f32 p0, " GELU_TOP ";\n\tmov.f32 p1, p0;\n\tmov.f32 p2, p0;\n\tmov.f32 p3, p0;\n\t"
                 GELU_STEPS
                 "ex2.approx.ftz.f32 p0, p0;\n\tex2.approx.ftz.f32 p1, p1;\n\tex2.approx.ftz.f32 p2, p2;\n\tex2.approx.ftz.f32 p3, p3;\n\t"
                 "neg.f32 a0, a0;\n\tneg.f32 a1, a1;\n\tneg.f32 a2, a2;\n\tneg.f32 a3, a3;\n\t"
                 "max.f32 %0, %0, 0f00000000;\n\tmax.f32 %1, %1, 0f00000000;\n\tmax.f32 %2, %2, 0f00000000;\n\tmax.f32 %3, %3, 0f00000000;\n\t"
                 "fma.rn.f32 %0, a0, p0, %0;\n\tfma.rn.f32 %1, a1, p1, %1;\n\tfma.rn.f32 %2, a2, p2, %2;\n\tfma.rn.f32 %3, a3, p3, %3;\n\t}"
                 : "+f"(x), "+f"(y), "+f"(z), "+f"(w));
}

DEVICE void activate4(float& x, float& y, float& z, float& w) {
    if constexpr (ACTIVATION == GELU) {
        gelu4(x, y, z, w);
    } else {
        x = activate<ACTIVATION>(x);
        y = activate<ACTIVATION>(y);
        z = activate<ACTIVATION>(z);
        w = activate<ACTIVATION>(w);
    }
}

// Zeros where it is not wanted. Without a branch: those around the start of sums make the compiler wait at each product.
DEVICE float2 load_pair(const float* vector, int n, bool wanted) {
    float2 pair;
    asm("{\n\t.reg .pred wanted;\n\tsetp.ne.u32 wanted, %3, 0;\n\tmov.f32 %0, 0f00000000;\n\tmov.f32 %1, 0f00000000;\n\t"
        "@wanted ld.global.nc.v2.f32 {%0, %1}, [%2];\n\t}"
        : "=f"(pair.x), "=f"(pair.y) : "l"(vector + n), "r"((u32)wanted));
    return pair;
}
DEVICE float2 load_pair(const float* vector, int n) { return load_pair(vector, n, vector != nullptr); }

// (scale, shift), so that (x - mean) rs = x scale + shift.
DEVICE float2 as_scale_and_shift(float2 statistics) { return make_float2(statistics.y, -statistics.x * statistics.y); }

// Two neighbours of what the previous kernel wrote, or zeros. Without a branch, as load_pair.
DEVICE float2 load_partial(const float2* from, bool wanted) {
    float2 partial;
    asm volatile("{\n\t.reg .pred wanted;\n\tsetp.ne.u32 wanted, %3, 0;\n\tmov.f32 %0, 0f00000000;\n\tmov.f32 %1, 0f00000000;\n\t"
                 "@wanted ld.global.v2.f32 {%0, %1}, [%2];\n\t}"
                 : "=f"(partial.x), "=f"(partial.y) : "l"(from), "r"((u32)wanted) : "memory");
    return partial;
}

// (mean, rs) of (sum, sum of squares) of `width` values.
DEVICE float2 as_statistics(float2 total, int width, float epsilon, int rms) {
    const float mean = rms ? 0.f : total.x / (float)width;
    return make_float2(mean, rsqrtf(fmaxf(total.y / (float)width - mean * mean, 0.f) + epsilon));
}

// Statistics of token t of the input, of its sums. Those that are to leave them write them, and note what is not finite.
DEVICE float2 joined(const Linear& l, float2 total, int t, bool leaves) {
    const float2 statistics = as_statistics(total, l.inputs, l.epsilon, l.rms);
    if (leaves && t < l.tokens) {
        l.statistics[t] = statistics;
        if (!is_finite(total.y) && t < real_tokens(l.starts, l.lengths, l.rows)) atomicMin(l.fault, l.stage);
    }
    return statistics;
}

// A token's and its neighbour eight tokens on: what a thread of a product's fragments has to do with.
struct TwoTokens {
    float2 near;
    float2 far;
};

// Of the tokens that lanes first + lane / 4 and first + lane / 4 + 8 have in `own`.
DEVICE TwoTokens two_tokens(float2 own, int first) {
    const int near = first + threadIdx.x % 32 / 4;
    TwoTokens of;
    of.near = make_float2(__shfl_sync(0xffffffffu, own.x, near), __shfl_sync(0xffffffffu, own.y, near));
    of.far = make_float2(__shfl_sync(0xffffffffu, own.x, near + 8), __shfl_sync(0xffffffffu, own.y, near + 8));
    return of;
}

// Two neighbouring outputs of two tokens: x = (near, near, far, far). KIND's work from the sums on, except for the activation.
// A residual's `words` are the stored values of the two tokens; bias and beta are in the sums already.
DEVICE void unfold(float (&x)[4], const TwoTokens& of, float2 bias, float2 sums) {
    x[0] = fmaf(x[0], of.near.x, fmaf(of.near.y, sums.x, bias.x));
    x[1] = fmaf(x[1], of.near.x, fmaf(of.near.y, sums.y, bias.y));
    x[2] = fmaf(x[2], of.far.x, fmaf(of.far.y, sums.x, bias.x));
    x[3] = fmaf(x[3], of.far.x, fmaf(of.far.y, sums.y, bias.y));
}
DEVICE void scale(float (&x)[4], const TwoTokens& of, float2 bias) {
    x[0] = fmaf(x[0], of.near.x, bias.x);
    x[1] = fmaf(x[1], of.near.x, bias.y);
    x[2] = fmaf(x[2], of.far.x, bias.x);
    x[3] = fmaf(x[3], of.far.x, bias.y);
}
DEVICE void add_view(float (&x)[4], u32 near, u32 far) {
    const float2 first = unpack2(near);
    const float2 second = unpack2(far);
    x[0] += first.x;
    x[1] += first.y;
    x[2] += second.x;
    x[3] += second.y;
}
DEVICE void add_normed_view(float (&x)[4], u32 near, u32 far, const TwoTokens& of, float2 gamma) {
    const float2 first = unpack2(near);
    const float2 second = unpack2(far);
    x[0] = fmaf(fmaf(first.x, of.near.x, of.near.y), gamma.x, x[0]);
    x[1] = fmaf(fmaf(first.y, of.near.x, of.near.y), gamma.y, x[1]);
    x[2] = fmaf(fmaf(second.x, of.far.x, of.far.y), gamma.x, x[2]);
    x[3] = fmaf(fmaf(second.y, of.far.x, of.far.y), gamma.y, x[3]);
}

// (sum, sum of squares) with two stored values more.
DEVICE void count_in(float2& total, u32 word) {
    const float2 pair = unpack2(word);
    total.x += pair.x + pair.y;
    total.y = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, total.y));
}
// Of 32 of the 64 outputs of token lane / 2 in a buffer.
DEVICE float2 count_half_row(u32 buffer, int lane) {
    const u32 row = lane / 2;
    float2 total = make_float2(0.f, 0.f);
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const u32 address = buffer + row * 128 + (((4 * (lane % 2) + i) ^ (row & 7)) << 4);
        u32 words[4];
        asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(address) : "memory");
#pragma unroll
        for (int word = 0; word < 4; word++) count_in(total, words[word]);
    }
    return total;
}
template <int LANES> DEVICE float2 total_of_lanes(float2 total) {
#pragma unroll
    for (int other = 1; other < LANES; other *= 2) {
        total.x += __shfl_xor_sync(0xffffffffu, total.x, other);
        total.y += __shfl_xor_sync(0xffffffffu, total.y, other);
    }
    return total;
}

// ---- tiles with all inputs in one block

template <int TILE_N_, int PARTS_, bool IN_TURN_, int STAGES_, int CLUSTER_, int BUFFERS_, bool COPIED_> struct Shape {
    static constexpr int TILE_N = TILE_N_;     // outputs of a tile
    static constexpr int PARTS = PARTS_;       // of 64 tokens of the tile, a warpgroup
    static constexpr bool IN_TURN = IN_TURN_;  // the warpgroups have tiles of their own
    static constexpr int STAGES = STAGES_;     // of the ring, of 64 inputs each
    static constexpr int CLUSTER = CLUSTER_;   // blocks with the same weights
    static constexpr int BUFFERS = BUFFERS_;   // of 16 tokens x 64 outputs, a warp
    static constexpr bool COPIED = COPIED_;    // bias and sums come to shared memory under the products
    static constexpr int PIECES = PARTS * (TILE_N / 64); // of that size, a warp and tile
    static constexpr bool JOINS_AHEAD = IN_TURN && COPIED; // statistics of a tile are joined by warps of the loading warpgroup
    static constexpr int FEW_REGISTERS = JOINS_AHEAD ? 40 : 24; // of a thread that loads, or joins; the others share out the rest
    static constexpr int MANY_REGISTERS = (3 * 168 - FEW_REGISTERS) / 2;
    static constexpr int A_BYTES = TILE_M * 128;
    static constexpr int W_BYTES = TILE_N * 128;
    static constexpr int PIECE_BYTES = 16 * 128;
    static constexpr int BARRIERS = 2 * STAGES + 8 * BUFFERS + (JOINS_AHEAD ? 2 * JOINED_TILES : 0);
    static constexpr int JOINED_BYTES = JOINS_AHEAD ? JOINED_TILES * TILE_M * 8 : 0;
    static constexpr int VECTOR_BYTES = COPIED ? TILE_N * 4 : 0;
    static constexpr int BYTES = 1024 + STAGES * (A_BYTES + W_BYTES) + 8 * BUFFERS * PIECE_BYTES + 8 * 2 * VECTOR_BYTES + JOINED_BYTES + 8 * BARRIERS; // 1024: the swizzle's alignment
    static_assert(PARTS * (IN_TURN ? 1 : 2) * 64 == TILE_M, "the warpgroups take the tile's tokens");
    static_assert(BYTES <= 232448, "shared memory of a block");
};

// Where the parts of a block's shared memory lie.
template <class S> struct Places {
    u32 a;
    DEVICE Places(u32 base) : a(base) {}
    DEVICE Places(const void* shared) { a = (shared_address(shared) + 1023) & ~1023u; }
    DEVICE u32 w() const { return a + S::STAGES * S::A_BYTES; }
    DEVICE u32 pieces() const { return w() + S::STAGES * S::W_BYTES; }
    DEVICE u32 vectors() const { return pieces() + 8 * S::BUFFERS * S::PIECE_BYTES; } // [8 warps] bias, then sums, of the warp's tile
    DEVICE u32 joined() const { return vectors() + 8 * 2 * S::VECTOR_BYTES; }         // [JOINED_TILES][TILE_M] (scale, shift) of the tile's tokens
    DEVICE u32 full() const { return joined() + S::JOINED_BYTES; }                    // [STAGES] the stage's bytes are there
    DEVICE u32 empty() const { return full() + 8 * S::STAGES; }                    // [STAGES] the stage has been read, by the cluster's blocks
    DEVICE u32 residual() const { return empty() + 8 * S::STAGES; }                // [8 warps][BUFFERS] the residual's bytes are there
    DEVICE u32 joined_full() const { return residual() + 8 * 8 * S::BUFFERS; }     // [JOINED_TILES] the tile's statistics are there
    DEVICE u32 joined_empty() const { return joined_full() + 8 * JOINED_TILES; }   // [JOINED_TILES] they have been read
};

// The tiles of the grid: outputs run fastest, and a cluster takes neighbouring tiles of tokens.
template <class S> struct Tiles {
    int across;
    int all;   // of clusters
    int first; // of this cluster, and from one of its tiles to the next:
    int step;
    DEVICE Tiles(const Linear& l) {
        across = (l.outputs + S::TILE_N - 1) / S::TILE_N;
        all = across * ((l.tokens + TILE_M * S::CLUSTER - 1) / (TILE_M * S::CLUSTER));
        first = blockIdx.x / S::CLUSTER;
        step = gridDim.x / S::CLUSTER;
    }
    DEVICE int at(int count) const { return first + count * step; }
    DEVICE int output(int tile) const { return (tile % across) * S::TILE_N; }
    DEVICE int token(int tile, u32 block) const { return ((tile / across) * S::CLUSTER + (int)block) * TILE_M; }
};

// How many rows of A a tile has: groups of 16 tokens, none for a tile behind the pack.
DEVICE int rows_of_tile(int tokens, int m0) {
    const int rows = (tokens - m0 + 15) & ~15;
    return rows < 0 ? 0 : rows < TILE_M ? rows : TILE_M;
}

// Where the 64 inputs of a tile lie next, in rows of 128 bytes: one register each, for the loading thread has few.
struct Operands {
    u32 a;
    u32 w;
    DEVICE Operands(const Linear& l, int m0, int n0, int chunk) {
        a = (u32)chunk * l.capacity + m0;
        w = (u32)chunk * l.outputs + n0;
    }
    DEVICE const Value* next_a(const Linear& l) {
        const Value* from = l.a + (size_t)a * 64;
        a += l.capacity;
        return from;
    }
    DEVICE const Value* next_w(const Linear& l) {
        const Value* from = l.w + (size_t)w * 64;
        w += l.outputs;
        return from;
    }
};

// The thread that fills the ring. The first stages' weights do not depend on the previous kernel, and come without the neighbour's help,
// which may not have begun.
template <class S> DEVICE void load_first_stages(const Linear& l, const Places<S>& at, const Tiles<S>& tiles, u32 block) {
    const int early = min(l.inputs / 64, S::STAGES);
    const int n0 = tiles.output(tiles.first);
    const int m0 = tiles.token(tiles.first, block);
    const u32 w_bytes = 128 * min(S::TILE_N, l.outputs - n0);
    const u32 a_bytes = 128 * rows_of_tile(l.tokens, m0);
    Operands from(l, m0, n0, 0);
#pragma unroll 1
    for (int chunk = 0; chunk < early; chunk++) {
        barrier_expect(at.full() + 8 * chunk, a_bytes + w_bytes);
        bulk_load(at.w() + chunk * S::W_BYTES, from.next_w(l), w_bytes, at.full() + 8 * chunk);
    }
    wait_for_previous_kernel();
    if (a_bytes == 0) return;
#pragma unroll 1
    for (int chunk = 0; chunk < early; chunk++) {
        bulk_load(at.a + chunk * S::A_BYTES, from.next_a(l), a_bytes, at.full() + 8 * chunk);
    }
}

template <class S> DEVICE void load_stages(const Linear& l, const Places<S>& at, const Tiles<S>& tiles, u32 block) {
    constexpr int SHARE = S::TILE_N / S::CLUSTER; // of the weights' rows, which this block loads for the cluster
    int chunk = min(l.inputs / 64, S::STAGES); // the first ones have been loaded
    u32 stage = chunk == S::STAGES ? 0 : chunk;
    u32 parity = chunk == S::STAGES ? 0 : 1;
#pragma unroll 1
    for (int tile = tiles.first; tile < tiles.all; tile += tiles.step) {
        const int n0 = tiles.output(tile);
        const int m0 = tiles.token(tile, block);
        const int w_rows = min(S::TILE_N, l.outputs - n0);
        const u32 share = 128 * min(SHARE, max(0, w_rows - (int)block * SHARE));
        const u32 a_bytes = 128 * rows_of_tile(l.tokens, m0);
        const u32 bytes = a_bytes + 128 * w_rows;
        Operands from(l, m0, n0 + (int)block * SHARE, chunk);
#pragma unroll 1
        for (int left = l.inputs / 64 - chunk; left > 0; left--) {
            const u32 full = at.full() + 8 * stage;
            const u32 to = at.w() + stage * S::W_BYTES + block * SHARE * 128;
            barrier_wait(at.empty() + 8 * stage, parity);
            barrier_expect(full, bytes);
            if constexpr (S::CLUSTER == 1) {
                bulk_load(to, from.next_w(l), share, full);
            } else if (share > 0) { // or for the whole tile not
                bulk_load_to_all(to, from.next_w(l), share, full, (u16)((1 << S::CLUSTER) - 1));
            }
            if (a_bytes > 0) bulk_load(at.a + stage * S::A_BYTES, from.next_a(l), a_bytes, full);
            if (++stage == S::STAGES) {
                stage = 0;
                parity ^= 1;
            }
        }
        chunk = 0;
    }
}

// A warp's view of its tile: PIECES pieces of 16 tokens x 64 outputs, piece i of part i % PARTS and columns i / PARTS.
template <class S> struct Pieces {
    u32 base; // of the block's shared memory
    int m0; // of the warp's first piece
    int n0;
    DEVICE int token(int piece) const { return m0 + (piece % S::PARTS) * 64; }
    DEVICE int output(int piece) const { return n0 + (piece / S::PARTS) * 64; }
    DEVICE bool wanted(const Linear& l, int piece) const { return token(piece) < l.tokens && output(piece) < l.outputs; }
    DEVICE size_t place(const Linear& l, int piece) const { return ((size_t)(output(piece) / 64) * l.capacity + token(piece)) * 64; }
    DEVICE u32 buffer(int piece) const { return Places<S>(base).pieces() + warp() * S::BUFFERS * S::PIECE_BYTES + (piece % S::BUFFERS) * S::PIECE_BYTES; }
    DEVICE u32 barrier(int piece) const { return Places<S>(base).residual() + 8 * warp() * S::BUFFERS + 8 * (piece % S::BUFFERS); }
    DEVICE u32 vectors() const { return Places<S>(base).vectors() + warp() * 2 * S::VECTOR_BYTES; }
    static DEVICE u32 warp() { return threadIdx.x / 32 - 4; }
};

// A tile's part of bias and sums, by the warp for itself: it has read those of its last tile. Zeros for no bias.
template <class S> DEVICE void copy_vectors(const Linear& l, const Pieces<S>& pieces, int lane) {
#pragma unroll
    for (int i = 0; i < (S::TILE_N / 4 + 31) / 32; i++) {
        const int n = (i * 32 + lane) * 4; // of the tile
        if (n < S::TILE_N && pieces.n0 + n < l.outputs) {
            const u32 exists = l.bias != nullptr ? 16 : 0;
            asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(pieces.vectors() + n * 4), "l"(l.bias + pieces.n0 + n), "r"(exists) : "memory");
            if (l.sums != nullptr) {
                asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(pieces.vectors() + S::VECTOR_BYTES + n * 4), "l"(l.sums + pieces.n0 + n) : "memory");
            }
        }
    }
    copy_commit();
}
DEVICE float2 load_shared_pair(u32 address) {
    float2 pair;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address) : "memory");
    return pair;
}

// By lane 0, whose stores have left the buffer.
template <class S> DEVICE void load_residual(const Linear& l, const Pieces<S>& pieces, int piece) {
    if (!pieces.wanted(l, piece)) return;
    barrier_expect(pieces.barrier(piece), S::PIECE_BYTES);
    bulk_load(pieces.buffer(piece), l.residual + pieces.place(l, piece), S::PIECE_BYTES, pieces.barrier(piece));
}

// Of the input, or of the residual.
template <int KIND> DEVICE const float2* statistics_of(const Linear& l) { return KIND == RESIDUAL ? l.residual_statistics : l.statistics; }

// Which norm there is: of the input, or of the residual.
#define NO_NORM 0
#define SCALED 1 // of an input: its mean does not matter, for W's rows sum to zero or it has none
#define NORMED 2

// From products to stored outputs. Lane i has the statistics of token i % 16 of the warp's part i / 16 in `own`: fetched a piece at a time,
// each piece would wait for them.
template <class S, int KIND, int NORM>
DEVICE void finish_tile(float (&acc)[S::PARTS][S::TILE_N / 2], const Linear& l, const Pieces<S>& pieces, float2 own, u32& parities) {
    const int lane = threadIdx.x % 32;
    const u32 row = lane & 15;
    const u32 half = lane >> 4; // which of two 16-byte pieces this lane addresses for stmatrix
#pragma unroll
    for (int piece = 0; piece < S::PIECES; piece++) {
        const int part = piece % S::PARTS;
        const int column = piece / S::PARTS;
        if constexpr (KIND == RESIDUAL) {
            // The buffer of a piece before is given to a later one: with many buffers not of the last, whose store is still being read.
            constexpr int BEHIND = S::BUFFERS > 3 ? 2 : 1;
            const int later = piece - BEHIND + S::BUFFERS;
            if (piece >= BEHIND && later < S::PIECES && lane == 0) {
                bulk_wait_read<BEHIND - 1>();
                load_residual(l, pieces, later);
            }
        } else if (lane == 0) {
            if (piece == 0 && S::PIECES % S::BUFFERS != 0) {
                bulk_wait_read<0>();
            } else {
                bulk_wait_read<S::BUFFERS - 1>();
            }
        }
        if (!pieces.wanted(l, piece)) {
            if (lane == 0) bulk_commit(); // keeps the count of groups in step with the buffers
            continue;
        }
        if constexpr (KIND == RESIDUAL) {
            barrier_wait(pieces.barrier(piece), (parities >> (piece % S::BUFFERS)) & 1);
            parities ^= 1u << (piece % S::BUFFERS);
        } else {
            __syncwarp();
        }
        TwoTokens of;
        if constexpr (NORM != NO_NORM) of = two_tokens(own, part * 16);
#pragma unroll
        for (int pair = 0; pair < 4; pair++) {
            const u32 address = pieces.buffer(piece) + row * 128 + (((2 * pair + half) ^ (row & 7)) << 4);
            float x[2][4];
            u32 words[4];
            if constexpr (KIND == RESIDUAL) load_matrix4(address, words);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int group = column * 8 + pair * 2 + i;
                const int n = pieces.n0 + group * 8 + 2 * (lane & 3);
#pragma unroll
                for (int e = 0; e < 4; e++) x[i][e] = acc[part][group * 4 + e];
                if constexpr (KIND != RESIDUAL) {
                    const u32 copied = pieces.vectors() + (n - pieces.n0) * 4;
                    if constexpr (NORM != NO_NORM) {
                        float2 bias;
                        if constexpr (S::COPIED) {
                            bias = load_shared_pair(copied);
                        } else {
                            bias = load_pair(l.bias, n);
                        }
                        if constexpr (NORM == SCALED) {
                            scale(x[i], of, bias);
                        } else if constexpr (S::COPIED) {
                            unfold(x[i], of, bias, load_shared_pair(copied + S::VECTOR_BYTES));
                        } else {
                            unfold(x[i], of, bias, __ldg((const float2*)(l.sums + n)));
                        }
                    }
                } else if constexpr (NORM == NORMED) {
                    add_normed_view(x[i], words[2 * i], words[2 * i + 1], of, __ldg((const float2*)(l.gamma + n)));
                } else {
                    add_view(x[i], words[2 * i], words[2 * i + 1]);
                }
                if constexpr (KIND == ACTIVATED) activate4(x[i][0], x[i][1], x[i][2], x[i][3]);
                words[2 * i] = pack2(x[i][0], x[i][1]);
                words[2 * i + 1] = pack2(x[i][2], x[i][3]);
            }
            store_matrix4(address, words);
        }
        fence_for_bulk();
        __syncwarp();
        if (lane == 0) {
            bulk_store(l.out + pieces.place(l, piece), pieces.buffer(piece), S::PIECE_BYTES);
            bulk_commit();
        }
        if constexpr (KIND == RESIDUAL) {
            if (l.partials != nullptr) {
                // Two lanes read a token's stored values back, which takes fewer registers than to count them as they are made.
                const float2 total = total_of_lanes<2>(count_half_row(pieces.buffer(piece), lane));
                float2* to = l.partials + (size_t)(pieces.output(piece) / 64) * l.capacity + pieces.token(piece) + lane / 2;
                if (lane % 2 == 0) *to = total;
            }
        }
    }
}

template <class S, int KIND> DEVICE void multiply(const Linear& l, const Places<S>& at, const Tiles<S>& tiles, u32 block) {
    const int chunks = l.inputs / 64;
    const int group = (int)(threadIdx.x / 128) - 1; // which of the two warpgroups
    const int warp = (threadIdx.x / 32) % 4;
    const int lane = threadIdx.x % 32;
    const int first_row = (S::IN_TURN ? 0 : group * S::PARTS * 64); // of the warpgroup in its tile
    const bool normed = KIND == RESIDUAL ? l.gamma != nullptr : l.statistics != nullptr;
    const bool bias_first = l.bias != nullptr && (KIND == RESIDUAL || !normed);
    const bool beta_first = l.beta != nullptr && normed;
    const bool joins = KIND != RESIDUAL && normed && l.partials != nullptr;
    constexpr bool JOINS = KIND != RESIDUAL && !S::IN_TURN; // under its own products; else join_tiles does it
    const int residual_chunk = chunks > 1 ? 1 : 0; // under whose products the residual's first pieces are fetched
    Pieces<S> pieces;
    pieces.base = at.a;
    u32 parities = 0;
    float acc[S::PARTS][S::TILE_N / 2];

    // All that write, or read what kernels wrote.
    wait_for_previous_kernel();
    if (S::IN_TURN && group == 1 && tiles.first < tiles.all) arrive(TURN, 256);
    constexpr int STRIDE = S::IN_TURN ? 2 : 1;
    int count = S::IN_TURN ? group : 0; // which of the block's tiles
#pragma unroll 1
    for (; tiles.at(count) < tiles.all; count += STRIDE) {
        const int tile = tiles.at(count);
        pieces.n0 = tiles.output(tile);
        pieces.m0 = tiles.token(tile, block) + first_row + warp * 16;
        // The sums start from the bias where nothing scales them.
#pragma unroll
        for (int i = 0; i < S::TILE_N / 8; i++) {
            const int n = pieces.n0 + i * 8 + 2 * (lane & 3);
            float2 start = load_pair(l.bias, n, bias_first && n < l.outputs);
            if (KIND == RESIDUAL) {
                const float2 beta = load_pair(l.beta, n, beta_first && n < l.outputs);
                start.x += beta.x;
                start.y += beta.y;
            }
#pragma unroll
            for (int part = 0; part < S::PARTS; part++) {
                acc[part][4 * i] = acc[part][4 * i + 2] = start.x;
                acc[part][4 * i + 1] = acc[part][4 * i + 3] = start.y;
            }
        }
        float2 own = make_float2(1.f, 0.f);
        const int first_token = pieces.m0 + (lane / 16 % S::PARTS) * 64;
        const int token = first_token + lane % 16; // whose statistics this lane has
        const bool there = normed && first_token < l.tokens;
        if (there && !joins) own = as_scale_and_shift(statistics_of<KIND>(l)[token]);
        float2 total = make_float2(0.f, 0.f);
        float2 partial = make_float2(0.f, 0.f);
        if constexpr (S::COPIED && KIND != RESIDUAL) {
            if (normed) copy_vectors(l, pieces, lane);
        }
        const u32 before = (u32)count * chunks; // chunks that went through the ring
        u32 stage = before % S::STAGES;
        u32 parity = (before / S::STAGES) & 1;
        u32 last_stage = 0;
        if (S::IN_TURN) meet(TURN + group, 256);
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; chunk++) {
            barrier_wait(at.full() + 8 * stage, parity);
            const u64 a = wgmma_operand(at.a + stage * S::A_BYTES + first_row * 128);
            const u64 w = wgmma_operand(at.w() + stage * S::W_BYTES);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < 4 * S::PARTS; i++) {
                const int part = i % S::PARTS;
                const int step = i / S::PARTS;
                Wgmma<S::TILE_N>::add(acc[part], a + part * 512 + step * 2, w + step * 2);
            }
            wgmma_commit();
            if constexpr (JOINS) {
                // As many as there are chunks, each fetched under the products of one and added under those of the next.
                total.x += partial.x;
                total.y += partial.y;
                partial = load_partial(l.partials + (size_t)chunk * l.capacity + token, joins && there);
            }
            if (KIND == RESIDUAL && chunk == residual_chunk && lane == 0) {
                bulk_wait_read<0>();
#pragma unroll
                for (int piece = 0; piece < S::BUFFERS && piece < S::PIECES; piece++) load_residual(l, pieces, piece);
            }
            // The chunk before has been read.
            wgmma_wait<1>();
            if (chunk > 0) {
                if (S::CLUSTER == 1) {
                    if (lane == 0) barrier_arrive(at.empty() + 8 * last_stage);
                } else if (lane < S::CLUSTER) {
                    barrier_arrive_at(at.empty() + 8 * last_stage, lane);
                }
            }
            last_stage = stage;
            if (++stage == S::STAGES) {
                stage = 0;
                parity ^= 1;
            }
        }
        if (S::IN_TURN && tiles.at(count + 1) < tiles.all) arrive(TURN + 1 - group, 256);
        wgmma_wait<0>();
        if (S::CLUSTER == 1) {
            if (lane == 0) barrier_arrive(at.empty() + 8 * last_stage);
        } else if (lane < S::CLUSTER) {
            barrier_arrive_at(at.empty() + 8 * last_stage, lane);
        }
        if constexpr (S::COPIED && KIND != RESIDUAL) {
            copy_wait<0>();
            __syncwarp();
        }
        if constexpr (JOINS) {
            if (joins && there) {
                total.x += partial.x;
                total.y += partial.y;
                own = as_scale_and_shift(joined(l, total, token, pieces.n0 == 0));
            }
        } else if constexpr (S::JOINS_AHEAD && KIND != RESIDUAL) {
            if (joins) {
                const int slot = count % JOINED_TILES;
                barrier_wait(at.joined_full() + 8 * slot, (count / JOINED_TILES) & 1);
                own = load_shared_pair(at.joined() + (slot * TILE_M + warp * 16 + (lane / 16 % S::PARTS) * 64 + lane % 16) * 8);
                __syncwarp();
                if (lane == 0) barrier_arrive(at.joined_empty() + 8 * slot);
            }
        }
        if (!normed) {
            finish_tile<S, KIND, NO_NORM>(acc, l, pieces, own, parities);
        } else if (KIND != RESIDUAL && l.sums == nullptr) {
            finish_tile<S, KIND, SCALED>(acc, l, pieces, own, parities);
        } else {
            finish_tile<S, KIND, NORMED>(acc, l, pieces, own, parities);
        }
    }
    if (lane == 0) bulk_wait_read<0>();
}

// The warps of the loading warpgroup that do not load: (scale, shift) of the tokens of each tile, of the sums of their chunks, ahead of the products.
template <class S> DEVICE void join_tiles(const Linear& l, const Places<S>& at, const Tiles<S>& tiles, u32 block) {
    const int chunks = l.inputs / 64;
    wait_for_previous_kernel();
#pragma unroll 1
    for (int count = 0; tiles.at(count) < tiles.all; count++) {
        const int tile = tiles.at(count);
        const int m0 = tiles.token(tile, block);
        const int slot = count % JOINED_TILES;
        barrier_wait(at.joined_empty() + 8 * slot, ((count / JOINED_TILES) & 1) ^ 1);
#pragma unroll 1
        for (int i = threadIdx.x - 32; i < TILE_M; i += 96) {
            float2 total = make_float2(0.f, 0.f);
            if (m0 + i < l.tokens) {
                const float2* from = l.partials + m0 + i;
#pragma unroll 4
                for (int chunk = 0; chunk < chunks; chunk++) {
                    const float2 partial = *from;
                    from += l.capacity;
                    total.x += partial.x;
                    total.y += partial.y;
                }
            }
            const float2 of = as_scale_and_shift(joined(l, total, m0 + i, tiles.output(tile) == 0));
            asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(at.joined() + (slot * TILE_M + i) * 8), "f"(of.x), "f"(of.y) : "memory");
        }
        barrier_arrive(at.joined_full() + 8 * slot);
    }
}

template <class S, int KIND> DEVICE void linear(const Linear& l) {
    extern __shared__ unsigned char shared[];
    const Places<S> at(shared);
    const Tiles<S> tiles(l);
    const u32 block = S::CLUSTER == 1 ? 0 : block_in_cluster();
    let_next_kernel_start();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(S::FEW_REGISTERS)); // first of all: the others' increase waits for it
        if (threadIdx.x < 32) {
            for (int i = threadIdx.x; i < S::BARRIERS; i += 32) {
                const bool of_empty = i >= S::STAGES && i < 2 * S::STAGES;
                const int joining = i - (2 * S::STAGES + 8 * S::BUFFERS); // of those of joined statistics, which the others are before
                barrier_make(at.full() + 8 * i, of_empty ? (S::IN_TURN ? 4 : 8) * S::CLUSTER : joining < 0 ? 1 : joining < JOINED_TILES ? 96 : 4);
            }
            barriers_are_made();
        }
        __syncwarp();
        if (S::CLUSTER == 1) {
            arrive(READY, THREADS);
        } else {
            cluster_arrive_relaxed(); // barriers_are_made is their release
        }
        if (threadIdx.x == 0 && tiles.first < tiles.all) load_first_stages(l, at, tiles, block);
        __syncwarp();
        if (S::CLUSTER > 1) cluster_wait();
        if (threadIdx.x == 0) load_stages(l, at, tiles, block);
        if constexpr (S::JOINS_AHEAD && KIND != RESIDUAL) {
            if (threadIdx.x >= 32 && l.partials != nullptr && l.statistics != nullptr) join_tiles(l, at, tiles, block);
        }
    } else {
        if (S::CLUSTER > 1) cluster_arrive_relaxed();
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(S::MANY_REGISTERS));
        if (S::CLUSTER == 1) {
            meet(READY, THREADS);
        } else {
            cluster_wait();
        }
        multiply<S, KIND>(l, at, tiles, block);
    }
    __syncwarp();
    if (S::CLUSTER > 1) {
        // No block leaves while another may still write to it.
        cluster_arrive();
        cluster_wait();
    }
}

// ---- tiles whose inputs a cluster shares out

#define SPLIT_STAGES 8
#define SPLIT_PITCH 68 // floats of a row of partial sums: 64, and 4 against bank conflicts

template <int KIND> DEVICE void split_linear(const Linear& l) {
    constexpr int TILE_N = 64;
    constexpr int A_BYTES = TILE_M * 128;
    constexpr int W_BYTES = TILE_N * 128;
    extern __shared__ unsigned char shared[];
    const u32 at_a = (shared_address(shared) + 1023) & ~1023u;
    const u32 at_w = at_a + SPLIT_STAGES * A_BYTES;
    const u32 full = at_w + SPLIT_STAGES * W_BYTES;
    const u32 empty = full + 8 * SPLIT_STAGES;
    const int blocks = (int)blocks_of_cluster();
    const int block = (int)block_in_cluster();
    const int tile = blockIdx.x / blocks;
    const int across = l.outputs / TILE_N;
    const int n0 = (tile % across) * TILE_N;
    const int m0 = (tile / across) * TILE_M;
    const int all_chunks = l.inputs / 64;
    const int first = all_chunks * block / blocks;
    const int chunks = all_chunks * (block + 1) / blocks - first;
    const int lane = threadIdx.x % 32;
    let_next_kernel_start();
    if (threadIdx.x < 128) {
        if (threadIdx.x < 32) {
            if (lane < 2 * SPLIT_STAGES) barrier_make(full + 8 * lane, lane < SPLIT_STAGES ? 1 : 8);
            barriers_are_made();
        }
        __syncwarp();
        arrive(READY, THREADS);
        if (threadIdx.x == 0) {
            const u32 a_bytes = 128 * rows_of_tile(l.tokens, m0);
            const int early = min(chunks, SPLIT_STAGES);
            Operands from(l, m0, n0, first);
            for (int chunk = 0; chunk < early; chunk++) {
                barrier_expect(full + 8 * chunk, a_bytes + W_BYTES);
                bulk_load(at_w + chunk * W_BYTES, from.next_w(l), W_BYTES, full + 8 * chunk);
            }
            wait_for_previous_kernel();
            for (int chunk = 0; chunk < early; chunk++) {
                bulk_load(at_a + chunk * A_BYTES, from.next_a(l), a_bytes, full + 8 * chunk);
            }
            for (int chunk = early; chunk < chunks; chunk++) {
                const int stage = chunk % SPLIT_STAGES;
                barrier_wait(empty + 8 * stage, ((chunk / SPLIT_STAGES) & 1) ^ 1);
                barrier_expect(full + 8 * stage, a_bytes + W_BYTES);
                bulk_load(at_w + stage * W_BYTES, from.next_w(l), W_BYTES, full + 8 * stage);
                bulk_load(at_a + stage * A_BYTES, from.next_a(l), a_bytes, full + 8 * stage);
            }
        }
        __syncwarp();
        cluster_arrive();
        cluster_wait();
    } else {
        const int thread = threadIdx.x - 128;
        const int group = thread / 128;
        const int warp = (thread / 32) % 4;
        float acc[32];
#pragma unroll
        for (int i = 0; i < 32; i++) acc[i] = 0.f;
        meet(READY, THREADS);
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; chunk++) {
            const int stage = chunk % SPLIT_STAGES;
            barrier_wait(full + 8 * stage, (chunk / SPLIT_STAGES) & 1);
            const u64 a = wgmma_operand(at_a + stage * A_BYTES + group * 64 * 128);
            const u64 w = wgmma_operand(at_w + stage * W_BYTES);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; step++) Wgmma<TILE_N>::add(acc, a + step * 2, w + step * 2);
            wgmma_commit();
            wgmma_wait<1>();
            if (chunk > 0 && lane == 0) barrier_arrive(empty + 8 * ((chunk - 1) % SPLIT_STAGES));
        }
        wgmma_wait<0>();
        // Both warpgroups are done with the ring, which now takes this block's sums of the whole tile.
        meet(TURN, 256);
        const u32 mine = at_a + ((group * 64 + warp * 16 + lane / 4) * SPLIT_PITCH + 2 * (lane % 4)) * 4;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(mine + i * 32), "f"(acc[4 * i]), "f"(acc[4 * i + 1]) : "memory");
            asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(mine + 8 * SPLIT_PITCH * 4 + i * 32), "f"(acc[4 * i + 2]), "f"(acc[4 * i + 3]) : "memory");
        }
        // What the end needs, fetched while the others arrive: a thread has 4 outputs of a row.
        const int n = n0 + (thread % 16) * 4;
        const bool normed = KIND == RESIDUAL ? l.gamma != nullptr : l.statistics != nullptr;
        const float2 bias[2] = {load_pair(l.bias, n), load_pair(l.bias, n + 2)};
        const float* scales = KIND == RESIDUAL ? l.gamma : l.sums;
        const float2 scale[2] = {load_pair(scales, n), load_pair(scales, n + 2)};
        const float* shifts = KIND == RESIDUAL && normed ? l.beta : nullptr;
        const float2 shift[2] = {load_pair(shifts, n), load_pair(shifts, n + 2)};
        wait_for_previous_kernel();
        cluster_arrive();
        cluster_wait();
        const int rows = TILE_M / blocks; // of the tile, which this block finishes
        for (int r = thread / 16; r < rows; r += 16) {
            const int row = block * rows + r;
            const int t = m0 + row;
            const bool there = t < l.tokens;
            const size_t place = chunked((size_t)t, (u32)(n / 8), (size_t)l.capacity) + n % 8;
            float2 x[2] = {make_float2(0.f, 0.f), make_float2(0.f, 0.f)};
            float2 of = make_float2(1.f, 0.f);
            if (there && KIND != RESIDUAL && normed && l.partials != nullptr) {
                float2 total = make_float2(0.f, 0.f);
                for (int chunk = 0; chunk < all_chunks; chunk++) {
                    const float2 partial = l.partials[(size_t)chunk * l.capacity + t];
                    total.x += partial.x;
                    total.y += partial.y;
                }
                of = as_scale_and_shift(joined(l, total, t, n0 == 0 && thread % 16 == 0));
            } else if (there && normed) {
                of = as_scale_and_shift(KIND == RESIDUAL ? l.residual_statistics[t] : l.statistics[t]);
            }
            uint2 view = make_uint2(0, 0);
            if (KIND == RESIDUAL && there) view = *(const uint2*)(l.residual + place);
            for (int other = 0; other < blocks; other++) {
                float4 sum;
                asm volatile("{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %4, %5;\n\tld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [there];\n\t}"
                             : "=f"(sum.x), "=f"(sum.y), "=f"(sum.z), "=f"(sum.w)
                             : "r"(at_a + (row * SPLIT_PITCH + (thread % 16) * 4) * 4), "r"(other)
                             : "memory");
                x[0].x += sum.x;
                x[0].y += sum.y;
                x[1].x += sum.z;
                x[1].y += sum.w;
            }
            u32 words[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (KIND == RESIDUAL) {
                    const float2 stored = unpack2(i == 0 ? view.x : view.y);
                    x[i].x += bias[i].x + shift[i].x;
                    x[i].y += bias[i].y + shift[i].y;
                    x[i].x = normed ? fmaf(fmaf(stored.x, of.x, of.y), scale[i].x, x[i].x) : x[i].x + stored.x;
                    x[i].y = normed ? fmaf(fmaf(stored.y, of.x, of.y), scale[i].y, x[i].y) : x[i].y + stored.y;
                } else {
                    x[i].x = fmaf(x[i].x, of.x, fmaf(of.y, scale[i].x, bias[i].x));
                    x[i].y = fmaf(x[i].y, of.x, fmaf(of.y, scale[i].y, bias[i].y));
                }
            }
            if (KIND == ACTIVATED) activate4(x[0].x, x[0].y, x[1].x, x[1].y);
            words[0] = pack2(x[0].x, x[0].y);
            words[1] = pack2(x[1].x, x[1].y);
            if (there) *(uint2*)(l.out + place) = make_uint2(words[0], words[1]);
            if (KIND == RESIDUAL && l.partials != nullptr) {
                float2 total = make_float2(0.f, 0.f);
                count_in(total, words[0]);
                count_in(total, words[1]);
                total = total_of_lanes<16>(total);
                if (there && thread % 16 == 0) l.partials[(size_t)(n0 / 64) * l.capacity + t] = total;
            }
        }
    }
    __syncwarp();
    // No block leaves while another may still read its sums; what was read has come.
    cluster_arrive_relaxed();
    cluster_wait();
}

// ---- exported kernels

#define PARAMETERS                                                                                                                          \
    const Value *a, const Value *w, const float *bias, const float *sums, float2 *statistics, const Value *residual,                           \
        const float2 *residual_statistics, const float *gamma, const float *beta, Value *out, int capacity, int outputs, int inputs,           \
        int tokens, float2 *partials, float epsilon, int rms, const int *starts, const int *lengths, int rows, int stage, int *fault
#define ARGUMENTS                                                                                                                              \
    a, w, bias, sums, statistics, residual, residual_statistics, gamma, beta, out, capacity, outputs, inputs, tokens, partials, epsilon, rms,  \
        starts, lengths, rows, stage, fault

// What is left of the shared memory goes to what the end of a tile would wait for: bias and sums, or pieces of the residual.
typedef Shape<192, 2, true, 4, 2, 2, true> Pingpong;
typedef Shape<192, 2, true, 4, 2, 4, false> PingpongResidual;
typedef Shape<192, 1, false, 4, 1, 3, false> Together192;
typedef Shape<128, 1, false, 5, 1, 2, false> Together128;
typedef Shape<64, 1, false, 8, 1, 2, false> Together64;
static_assert(Pingpong::BYTES == 212192 && PingpongResidual::BYTES == 230720, "what the host asks for");
static_assert(Together192::BYTES == 214272 && Together128::BYTES == 197840 && Together64::BYTES == 230656, "what the host asks for");

#define EXPORT(NAME, SHAPE, KIND)                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(PARAMETERS) {     \
        const Linear l = {ARGUMENTS};                                               \
        linear<SHAPE, KIND>(l);                                                     \
    }
#define EXPORT_SPLIT(NAME, KIND)                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(PARAMETERS) {     \
        const Linear l = {ARGUMENTS};                                               \
        split_linear<KIND>(l);                                                      \
    }

EXPORT(linear_sm90_pingpong_plain, Pingpong, PLAIN)
EXPORT(linear_sm90_pingpong_activated, Pingpong, ACTIVATED)
EXPORT(linear_sm90_pingpong_residual, PingpongResidual, RESIDUAL)
EXPORT(linear_sm90_192_plain, Together192, PLAIN)
EXPORT(linear_sm90_192_activated, Together192, ACTIVATED)
EXPORT(linear_sm90_192_residual, Together192, RESIDUAL)
EXPORT(linear_sm90_128_plain, Together128, PLAIN)
EXPORT(linear_sm90_128_activated, Together128, ACTIVATED)
EXPORT(linear_sm90_128_residual, Together128, RESIDUAL)
EXPORT(linear_sm90_64_plain, Together64, PLAIN)
EXPORT(linear_sm90_64_activated, Together64, ACTIVATED)
EXPORT(linear_sm90_64_residual, Together64, RESIDUAL)
EXPORT_SPLIT(linear_sm90_split_plain, PLAIN)
EXPORT_SPLIT(linear_sm90_split_activated, ACTIVATED)
EXPORT_SPLIT(linear_sm90_split_residual, RESIDUAL)

extern "C" __global__ void __launch_bounds__(128) join_statistics(const float2* partials, float2* statistics,
    const int* starts, const int* lengths, int rows, int tokens, int capacity, int width, float epsilon, int rms, int stage,
    int* fault) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int t = blockIdx.x * 128 + threadIdx.x;
    if (t >= tokens) return;
    float2 total = make_float2(0.f, 0.f);
#pragma unroll 4
    for (int chunk = 0; chunk < width / 64; chunk++) {
        const float2 partial = partials[(size_t)chunk * capacity + t];
        total.x += partial.x;
        total.y += partial.y;
    }
    statistics[t] = as_statistics(total, width, epsilon, rms);
    // A sum of squares beyond f32 counts as a fault too.
    if (!is_finite(total.y) && t < real_tokens(starts, lengths, rows)) atomicMin(fault, stage);
}

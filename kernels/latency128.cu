// The layers of an encoder for 32, 64 or 128 tokens, five kernels a layer: products by wgmma from shared memory that bulk copies fill. sm_90a.
//
//   latency128_qkv        qkv = norm(stream) Wqkv^T + b, turned; weight_sums are null where there is no norm
//   latency128_attention  context = attention(q, k, v)
//   latency128_output     attended = norm(stream) + context Wo^T + b
//   latency128_wide       wide = activation(norm(attended) W1^T + b)
//   latency128_narrow     stream = norm(attended) + wide W2^T + b
//
// A block of a product has a tile of up to 64 tokens and some outputs, and one part of the inputs: the blocks of a cluster share the inputs out, so that nearly
// all activations are on their way at once. A warp asks for the weights before the wait for the previous kernel, so they stream while that one computes, and for
// the activations behind it; both lie in memory as wgmma reads them, and a tile of a chunk is one piece. Four warps multiply, and push their partial
// sums into the shared memory of the block that finishes them, whose barrier counts the bytes. The kernel that makes a row leaves its sums and those of its
// squares, one of each block of outputs, for the two that take its norm.
//
// Buffers    stream, attended, context: HIDDEN * TOKENS values; qkv: 3 * HIDDEN * TOKENS (q, k, v side by side); wide: WIDE * TOKENS; all chunked, on a
//            multiple of 128 bytes. sums_stream, sums_attended: float2 [TOKENS][latency_parts]. spans: of latency_embed, which gets sums_stream as its `sums`.
//            weight: chunked, its capacity the outputs; on a multiple of 128 bytes. bias, weight_sums, gamma, beta: f32.
//            by_distance: f32 [HEADS][2 reach + 1], or null.
// Launch     as latency_launches below says for each shape, which the host reads from the module: with so much dynamic shared memory allowed first, and
//            with a preferred carveout of 100 percent: blocks of two kernels are to share a multiprocessor. With programmatic stream serialization.
//            `trigger`: when the next kernel may start: 0 as soon as the weights (the bias, for attention) are asked for, 1 when the previous kernel is
//            over, 2 when activations are asked for, 3 when the first are there, 4 after the products. The weights of the kernels behind should not
//            meet the activations of this one: a wrong trigger costs 5 to 20 us. With latency_triggers, which a greedy search found on an H200, the 12
//            layers of MPNet-base take 140, 159 and 205 us at 32, 64 and 128 tokens, latency_embed and latency_hidden included.
// Numbers    sums are f32 in a fixed order. q, k, v and the result of attention are rounded to the stored type, and so are attention's weights before
//            they are divided by their sum. Values of padding are taken as zeros, whatever they are.

static_assert(TOKENS == 32 || TOKENS == 64 || TOKENS == 128, "the classes of 32, 64 and 128 tokens");

// ---- which block does what

constexpr int MULTIPROCESSORS = 132;
constexpr int PRODUCT_THREADS = 160; // four warps that multiply and one that loads
constexpr int TILE_ROWS = TOKENS < 64 ? TOKENS : 64;
constexpr int ROW_TILES = TOKENS / TILE_ROWS;
constexpr int WIDE_SPLIT = 2;

// Outputs of a block of qkv and wide: the fewest that need no second wave of blocks. Where outputs are finished by twos, each block of a cluster finishes whole
// tiles of both.
DEVICE constexpr int columns_for(int outputs, bool by_twos) {
    for (int columns = by_twos ? 32 : 16; columns < 128; columns += by_twos ? 32 : 16)
        if (outputs % columns == 0 && outputs / columns * ROW_TILES * WIDE_SPLIT <= MULTIPROCESSORS) return columns;
    return 128;
}
constexpr int WIDE_OUTPUTS = GATED ? 2 * WIDE : WIDE;
static_assert(3 * HIDDEN % columns_for(3 * HIDDEN, ROTARY) == 0 && WIDE_OUTPUTS % columns_for(WIDE_OUTPUTS, GATED) == 0, "whole blocks");

DEVICE constexpr int larger(int a, int b) { return a > b ? a : b; }

// Outputs of a block of output and narrow.
constexpr int NARROW_COLUMNS = TOKENS < 128 && HIDDEN % 192 == 0 ? HIDDEN / 24 : TOKENS < 128 && HIDDEN % 256 == 0 ? HIDDEN / 32 : HIDDEN / 16;
constexpr int PARTS = HIDDEN / NARROW_COLUMNS;
static_assert(PARTS % 8 == 0, "four lanes read a row's partial sums by 16 bytes");

// A product of INPUTS inputs, split over a cluster. Each block finishes its part of the outputs if the norm is folded into the weights, and its part of the
// rows, with the residual, if not.
template <int INPUTS, int COLUMNS_, int SPLIT_, bool NORMED> struct Product {
    static constexpr int COLUMNS = COLUMNS_;
    static constexpr int SPLIT = SPLIT_;
    static constexpr int CHUNKS = INPUTS / 64 / SPLIT; // of 64 inputs, of a block
    static constexpr int TILES = COLUMNS / 8;
    static constexpr int FINISHED_TILES = NORMED ? TILES / SPLIT : TILES;
    static constexpr int FINISHED_GROUPS = NORMED ? TILE_ROWS / 16 : larger(TILE_ROWS / 16 / SPLIT, 1); // of 16 rows
    // The ring of activations: five, so that a block of `narrow` leaves room for one of `wide`.
    static constexpr int MOST_STAGES = TOKENS == 128 ? 5 : 6;
    static constexpr int STAGES = CHUNKS < MOST_STAGES ? CHUNKS : MOST_STAGES;
    static constexpr int STAGE_BYTES = 64 * 128; // wgmma takes 64 rows, however many are loaded
    static constexpr int WEIGHT_BYTES = COLUMNS * 128;
    // [blocks whose sums they are][groups of 16 rows][tiles of 8 outputs][lanes] of float4; a block of a normed product keeps its own.
    static constexpr int PARTIAL_BYTES = (NORMED ? SPLIT - 1 : SPLIT) * FINISHED_GROUPS * FINISHED_TILES * 512;
    // Many chunks take much memory: partial sums lie where the weights of the first chunks were.
    static constexpr bool OVERLAID = CHUNKS >= 6;
    static constexpr int OVERLAID_CHUNKS = (PARTIAL_BYTES + WEIGHT_BYTES - 1) / WEIGHT_BYTES;
    static constexpr int ACTIVATIONS = CHUNKS * WEIGHT_BYTES;
    static constexpr int PARTIAL = OVERLAID ? 0 : ACTIVATIONS + STAGES * STAGE_BYTES;
    static constexpr int ROW_SUMS = ACTIVATIONS + STAGES * STAGE_BYTES + (OVERLAID ? 0 : PARTIAL_BYTES);
    static constexpr int BARRIERS = ROW_SUMS + (NORMED ? 0 : FINISHED_GROUPS * 16 * 8);
    static constexpr int BYTES = BARRIERS + 8 * (2 * STAGES + CHUNKS + 2);
    static_assert(INPUTS % (64 * SPLIT) == 0 && (!OVERLAID || OVERLAID_CHUNKS < CHUNKS) && (!NORMED || SPLIT == 2), "how a product is shared out");
    static_assert(BYTES <= 232448, "shared memory of a block");
};

DEVICE constexpr int split_for(int inputs) { return inputs % 256 == 0 ? 4 : 2; }

typedef Product<HIDDEN, columns_for(3 * HIDDEN, ROTARY), WIDE_SPLIT, true> QkvProduct;
typedef Product<HIDDEN, columns_for(WIDE_OUTPUTS, GATED), WIDE_SPLIT, true> WideProduct;
typedef Product<HIDDEN, NARROW_COLUMNS, split_for(HIDDEN), false> OutputProduct;
typedef Product<WIDE, NARROW_COLUMNS, split_for(WIDE), false> NarrowProduct;

// Of normed products: so much that no two blocks of one share a multiprocessor, while one of `narrow` fits beside it.
constexpr int LONELY_BYTES = 116096;

// Attention of a head and 16 queries, whose keys are shared out among warps.
constexpr int KEY_PARTS = TOKENS / 16 < 4 ? TOKENS / 16 : 4;
constexpr int KEYS = TOKENS / KEY_PARTS; // of a warp
constexpr int CONTEXT_STRIDE = HEAD_SIZE + 8; // floats: eight rows reach all banks
constexpr int SHARED_KEYS = 16 * 128;
constexpr int SHARED_VALUES = SHARED_KEYS + TOKENS * 128;
constexpr int SHARED_CONTEXT = SHARED_VALUES + TOKENS * 128;
constexpr int SHARED_SOFTMAX = SHARED_CONTEXT + KEY_PARTS * 16 * CONTEXT_STRIDE * 4;
constexpr int SHARED_BARRIER = SHARED_SOFTMAX + KEY_PARTS * 16 * 8;
constexpr int ATTENTION_BYTES = SHARED_BARRIER + 8;

// What the host launches with: blocks, threads, blocks of a cluster and bytes of dynamic shared memory of qkv, attention, output, wide, narrow.
extern "C" __device__ int latency_launches[5][4] = {
    {3 * HIDDEN / QkvProduct::COLUMNS * ROW_TILES * WIDE_SPLIT, PRODUCT_THREADS, WIDE_SPLIT, larger(QkvProduct::BYTES, LONELY_BYTES)},
    {HEADS * TOKENS / 16, KEY_PARTS * 32, 1, ATTENTION_BYTES},
    {PARTS * ROW_TILES * OutputProduct::SPLIT, PRODUCT_THREADS, OutputProduct::SPLIT, OutputProduct::BYTES},
    {WIDE_OUTPUTS / WideProduct::COLUMNS * ROW_TILES * WIDE_SPLIT, PRODUCT_THREADS, WIDE_SPLIT, larger(WideProduct::BYTES, LONELY_BYTES)},
    {PARTS * ROW_TILES * NarrowProduct::SPLIT, PRODUCT_THREADS, NarrowProduct::SPLIT, NarrowProduct::BYTES},
};
// Where each of them lets the next kernel start: the best found for MPNet-base and for BERT-large, in the classes of 32, 64 and 128 tokens.
constexpr int BEST_TRIGGERS[2][3][5] = {
    {{1, 1, 1, 0, 3}, {0, 3, 0, 1, 3}, {1, 4, 0, 1, 3}},
    {{3, 2, 1, 1, 0}, {3, 0, 0, 1, 0}, {0, 0, 0, 0, 4}},
};
constexpr auto& TRIGGERS = BEST_TRIGGERS[HIDDEN > 768][TOKENS / 64];
extern "C" __device__ int latency_triggers[5] = {TRIGGERS[0], TRIGGERS[1], TRIGGERS[2], TRIGGERS[3], TRIGGERS[4]};
extern "C" __device__ int latency_parts = PARTS;

// ---- barriers of shared memory, which count arrivals and bytes

DEVICE void barrier_make(u32 barrier, u32 arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory"); }
DEVICE void barriers_are_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
// In another block of the cluster.
DEVICE void barrier_arrive_at(u32 barrier, u32 rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_at_rank(barrier, rank)) : "memory");
}
// One arrival, and bytes to come.
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile("{\n\t.reg .pred done;\nAGAIN:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t@done bra DONE;\n\tbra AGAIN;\nDONE:\n\t}"
                 ::"r"(barrier), "r"(parity) : "memory");
}

DEVICE void bulk_load(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// Stores in the shared memory of a block of the cluster, whose barrier counts the 16 bytes.
DEVICE void push16(u32 to, u32 barrier, float x, float y, float z, float w) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];"
                 ::"r"(to), "f"(x), "f"(y), "f"(z), "f"(w), "r"(barrier) : "memory");
}

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

// The accumulators of 8, 16, .. outputs, as operands and by number.
#define SUMS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS8 SUMS4(0)
#define SUMS16 SUMS8, SUMS4(4)
#define SUMS24 SUMS16, SUMS4(8)
#define SUMS32 SUMS24, SUMS4(12)
#define SUMS40 SUMS32, SUMS4(16)
#define SUMS48 SUMS40, SUMS4(20)
#define SUMS56 SUMS48, SUMS4(24)
#define SUMS64 SUMS56, SUMS4(28)
#define SUMS80 SUMS64, SUMS4(32), SUMS4(36)
#define SUMS96 SUMS80, SUMS4(40), SUMS4(44)
#define SUMS112 SUMS96, SUMS4(48), SUMS4(52)
#define SUMS128 SUMS112, SUMS4(56), SUMS4(60)
#define NUMBERS8 "%0,%1,%2,%3"
#define NUMBERS16 NUMBERS8 ",%4,%5,%6,%7"
#define NUMBERS24 NUMBERS16 ",%8,%9,%10,%11"
#define NUMBERS32 NUMBERS24 ",%12,%13,%14,%15"
#define NUMBERS40 NUMBERS32 ",%16,%17,%18,%19"
#define NUMBERS48 NUMBERS40 ",%20,%21,%22,%23"
#define NUMBERS56 NUMBERS48 ",%24,%25,%26,%27"
#define NUMBERS64 NUMBERS56 ",%28,%29,%30,%31"
#define NUMBERS80 NUMBERS64 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define NUMBERS96 NUMBERS80 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define NUMBERS112 NUMBERS96 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define NUMBERS128 NUMBERS112 ",%56,%57,%58,%59,%60,%61,%62,%63"

// d += a b for 64 rows of a, so many rows of b and 16 columns of both. The last two are the numbers of a and b.
#define WGMMA(COLUMNS, A, B)                                                                                                                  \
    DEVICE void multiply64(float (&d)[COLUMNS / 2], u64 a, u64 b) {                                                                            \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16." WGMMA_TYPES " {" NUMBERS##COLUMNS "}, %" #A ", %" #B ", 1, 1, 1, 0, 0;" \
                     : SUMS##COLUMNS                                                                                                           \
                     : "l"(a), "l"(b));                                                                                                        \
    }
WGMMA(8, 4, 5)
WGMMA(16, 8, 9)
WGMMA(24, 12, 13)
WGMMA(32, 16, 17)
WGMMA(40, 20, 21)
WGMMA(48, 24, 25)
WGMMA(56, 28, 29)
WGMMA(64, 32, 33)
WGMMA(80, 40, 41)
WGMMA(96, 48, 49)
WGMMA(112, 56, 57)
WGMMA(128, 64, 65)

// ---- what the products share

// Of weights that are to come while the previous kernel runs. A load of constants the compiler would put where its value is used, behind the products.
DEVICE float2 load_pair_early(const float* p) {
    float2 pair;
    asm volatile("ld.global.v2.f32 {%0,%1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "l"(p) : "memory");
    return pair;
}

extern __shared__ __align__(1024) unsigned char shared[];

// Which outputs the tiles of a block have, of 8 each: its columns as they lie, or, where outputs are finished by twos, those that a block of the cluster finishes:
// half of its tiles have the first of two, and the other half the second.
struct InOrder {
    static constexpr bool AS_THEY_LIE = true;
};
template <class P, bool TURN, int OUTPUTS> struct ByTwos {
    static constexpr bool AS_THEY_LIE = false;
    static constexpr int APART = TURN ? TURNED_APART : OUTPUTS / 2;
    int column; // the block's first, if they lay in order

    // The pair of tiles that the first tile of two is of.
    DEVICE int pair_of(int tile) const { return column / 16 + tile / P::FINISHED_TILES * (P::FINISHED_TILES / 2) + tile % (P::FINISHED_TILES / 2); }
    DEVICE int operator()(int tile) const {
        const int u = pair_of(tile);
        return (TURN ? first_of_turned(u) : u * 8) + (tile % P::FINISHED_TILES >= P::FINISHED_TILES / 2 ? APART : 0);
    }
};

// A block's part of a product.
template <class P> struct Part {
    u32 base;
    int rank;      // in the cluster: which inputs
    int first_row; // of the tile
    int column;    // the first

    DEVICE Part(int outputs) {
        const int tile = blockIdx.x / P::SPLIT;
        base = shared_address(shared);
        rank = (int)rank_in_cluster();
        column = tile % (outputs / P::COLUMNS) * P::COLUMNS;
        first_row = tile / (outputs / P::COLUMNS) * TILE_ROWS;
    }
    DEVICE u32 weights(int chunk) const { return base + chunk * P::WEIGHT_BYTES; }
    DEVICE u32 activations(int stage) const { return base + P::ACTIVATIONS + stage * P::STAGE_BYTES; }
    DEVICE u32 partial() const { return base + P::PARTIAL; }
    DEVICE u32 full(int stage) const { return base + P::BARRIERS + 8 * stage; }              // the stage's activations are there
    DEVICE u32 empty(int stage) const { return full(P::STAGES + stage); }                    // the stage has been read
    DEVICE u32 weights_are_there(int chunk) const { return full(2 * P::STAGES + chunk); }
    DEVICE u32 partial_is_there() const { return full(2 * P::STAGES + P::CHUNKS); }
    DEVICE u32 may_push() const { return full(2 * P::STAGES + P::CHUNKS + 1); }              // no block of the cluster needs the weights of overlaid chunks any more

    // The work of the warp that loads. output_of(tile): the first output of a tile of the block's weights; null where they are its columns, as they lie.
    template <class OutputOf> DEVICE void load(const Value* x, const Value* weight, int outputs, int trigger, OutputOf output_of) const {
        const bool leader = threadIdx.x % 32 == 0;
        if (leader) {
#pragma unroll
            for (int stage = 0; stage < P::STAGES; stage++) {
                barrier_make(full(stage), 1);
                barrier_make(empty(stage), 4);
            }
#pragma unroll
            for (int chunk = 0; chunk < P::CHUNKS; chunk++) barrier_make(weights_are_there(chunk), 1);
            barrier_make(partial_is_there(), 1);
            barrier_make(may_push(), 4 * P::SPLIT);
            barriers_are_made();
#pragma unroll
            for (int chunk = 0; chunk < P::CHUNKS; chunk++) {
                barrier_expect(weights_are_there(chunk), P::WEIGHT_BYTES);
                if constexpr (OutputOf::AS_THEY_LIE) {
                    bulk_load(weights(chunk), weight + chunked(column, (rank * P::CHUNKS + chunk) * 8, outputs), P::WEIGHT_BYTES, weights_are_there(chunk));
                } else {
#pragma unroll
                    for (int tile = 0; tile < P::TILES; tile++)
                        bulk_load(weights(chunk) + tile * 1024, weight + chunked(output_of(tile), (rank * P::CHUNKS + chunk) * 8, outputs), 1024,
                                  weights_are_there(chunk));
                }
            }
            barrier_expect(partial_is_there(), P::PARTIAL_BYTES);
            if (trigger == 0) let_next_kernel_start();
        }
        __syncwarp();
        cluster_arrive_relaxed();
        if (leader) {
            wait_for_previous_kernel();
            if (trigger == 1) let_next_kernel_start();
#pragma unroll
            for (int chunk = 0; chunk < P::CHUNKS; chunk++) {
                const int stage = chunk % P::STAGES;
                if (chunk >= P::STAGES) barrier_wait(empty(stage), (chunk / P::STAGES - 1) & 1);
                barrier_expect(full(stage), TILE_ROWS * 128);
                bulk_load(activations(stage), x + chunked(first_row, (rank * P::CHUNKS + chunk) * 8, TOKENS), TILE_ROWS * 128, full(stage));
                if (chunk == P::STAGES - 1 && trigger == 2) let_next_kernel_start();
            }
        }
        __syncwarp();
        cluster_wait();
    }

    // Of the other four: the products. Then the sums may be pushed.
    DEVICE void multiply(float (&sums)[P::TILES * 4], int trigger) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < P::TILES * 4; i++) sums[i] = 0.f;
#pragma unroll
        for (int chunk = 0; chunk < P::CHUNKS; chunk++) {
            const int stage = chunk % P::STAGES;
            barrier_wait(weights_are_there(chunk), 0);
            barrier_wait(full(stage), chunk / P::STAGES & 1);
            if (threadIdx.x == 0 && chunk == 0 && trigger == 3) let_next_kernel_start();
            const u64 a = wgmma_operand(activations(stage));
            const u64 b = wgmma_operand(weights(chunk));
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; step++) multiply64(sums, a + 2 * step, b + 2 * step);
            wgmma_commit();
            wgmma_wait<1>();
            if (chunk > 0 && chunk - 1 + P::STAGES < P::CHUNKS && lane == 0) barrier_arrive(empty((chunk - 1) % P::STAGES));
            if (P::OVERLAID && chunk == P::OVERLAID_CHUNKS && lane < P::SPLIT) barrier_arrive_at(may_push(), lane);
        }
        wgmma_wait<0>();
        if (threadIdx.x == 0 && trigger == 4) let_next_kernel_start();
        if (P::OVERLAID) barrier_wait(may_push(), 0);
    }
};

// Partial sums of a row, of which each of four lanes has its share.
struct RowSums {
    float4 two[PARTS / 8];

    DEVICE void ask(const float2* sums, int row, int share) {
#pragma unroll
        for (int i = 0; i < PARTS / 8; i++) {
            const float2* at = sums + row * PARTS + share * 2 + i * 8;
            asm volatile("ld.global.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(two[i].x), "=f"(two[i].y), "=f"(two[i].z), "=f"(two[i].w) : "l"(at) : "memory");
        }
    }
    // (mean, rs), in the four lanes whose numbers differ in the bits of `one` and `other`.
    DEVICE float2 statistics(float epsilon, int one, int other) const {
        float2 all = make_float2(0.f, 0.f);
#pragma unroll
        for (int i = 0; i < PARTS / 8; i++) {
            all.x += two[i].x + two[i].z;
            all.y += two[i].y + two[i].w;
        }
        all = add_lanes(add_lanes(all, one), other);
        const float mean = all.x * (1.f / HIDDEN);
        return make_float2(mean, rsqrtf(fmaxf(all.y * (1.f / HIDDEN) - mean * mean, 0.f) + epsilon));
    }
    static DEVICE float2 add_lanes(float2 sums, int distance) {
        sums.x += __shfl_xor_sync(0xffffffffu, sums.x, distance);
        sums.y += __shfl_xor_sync(0xffffffffu, sums.y, distance);
        return sums;
    }
};

// out = activation(norm(x) W^T + b), the norm folded; no norm where weight_sums is null. TURN, GATE: outputs are finished by twos.
template <class P, int OUTPUTS, bool TURN, bool GATE, int WHICH>
DEVICE void normed_product(const Value* x, const Value* weight, const float* bias, const float* weight_sums, Value* out, const float2* sums, float epsilon,
                           const float* turns, const int2* spans, int trigger) {
    constexpr int TILES = P::FINISHED_TILES;
    constexpr bool TWOS = TURN || GATE;
    static_assert(!TWOS || TILES % 2 == 0, "as many tiles of the first as of the second");
    const Part<P> part(OUTPUTS);
    const ByTwos<P, TURN, OUTPUTS> by_twos = {part.column};
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const int q = lane % 4;
    if (warp == 4) {
        if constexpr (TWOS) {
            part.load(x, weight, OUTPUTS, trigger, by_twos);
        } else {
            part.load(x, weight, OUTPUTS, trigger, InOrder());
        }
        return;
    }
    cluster_arrive_relaxed();
    const auto output_of = [&](int tile) { return TWOS ? by_twos(part.rank * TILES + tile) : part.column + part.rank * (P::COLUMNS / 2) + tile * 8; };
    float2 b[TILES];
    float2 s[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        b[tile] = load_pair_early(bias + output_of(tile) + 2 * q);
        s[tile] = weight_sums == nullptr ? make_float2(0.f, 0.f) : load_pair_early(weight_sums + output_of(tile) + 2 * q);
    }
    cluster_wait(); // nobody may wait at a barrier that is not made, nor push into the shared memory of a block that has not started
    wait_for_previous_kernel();
    const bool has_rows = warp * 16 < TILE_ROWS;
    const int row = part.first_row + (has_rows ? warp * 16 : 0) + lane / 4;
    RowSums of_row;
    RowSums of_next;
    of_row.ask(sums, row, q);
    of_next.ask(sums, row + 8, q);
    float4 turns_of[TILES][2];
    if (TURN) {
        const int place = row - load_span(spans, row).x;
        const int next_place = row + 8 - load_span(spans, row + 8).x;
#pragma unroll
        for (int tile = 0; tile < TILES / 2; tile++) {
            const int u = by_twos.pair_of(part.rank * TILES + tile);
            turns_of[tile][0] = load_turns(turns, place, u, 2 * q);
            turns_of[tile][1] = load_turns(turns, next_place, u, 2 * q);
        }
    }
    float acc[P::TILES * 4];
    part.multiply(acc, trigger);
    if (!has_rows) return;

    const u32 there = address_at_rank(part.partial() + (warp * TILES * 32 + lane) * 16, part.rank ^ 1);
    const u32 barrier_there = address_at_rank(part.partial_is_there(), part.rank ^ 1);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        float theirs[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float& low = acc[4 * tile + i];
            const float high = acc[4 * (TILES + tile) + i];
            theirs[i] = part.rank == 0 ? high : low;
            low = part.rank == 0 ? low : high;
        }
        push16(there + tile * 512, barrier_there, theirs[0], theirs[1], theirs[2], theirs[3]);
    }
    float2 of = of_row.statistics(epsilon, 1, 2);
    float2 next = of_next.statistics(epsilon, 1, 2);
    if (weight_sums == nullptr) of = next = make_float2(0.f, 1.f);
    barrier_wait(part.partial_is_there(), 0);
    const float4* partial = (const float4*)(shared + P::PARTIAL) + warp * TILES * 32 + lane;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const float4 more = partial[tile * 32];
        acc[4 * tile] = of.y * (acc[4 * tile] + more.x - of.x * s[tile].x) + b[tile].x;
        acc[4 * tile + 1] = of.y * (acc[4 * tile + 1] + more.y - of.x * s[tile].y) + b[tile].y;
        acc[4 * tile + 2] = next.y * (acc[4 * tile + 2] + more.z - next.x * s[tile].x) + b[tile].x;
        acc[4 * tile + 3] = next.y * (acc[4 * tile + 3] + more.w - next.x * s[tile].y) + b[tile].y;
    }
    constexpr int SECOND = TWOS ? TILES / 2 : 0; // tiles from the first of two to the second
#pragma unroll
    for (int tile = 0; tile < TILES - SECOND; tile++) {
        if constexpr (TURN) {
            turn(acc[4 * tile], acc[4 * (tile + SECOND)], turns_of[tile][0].x, turns_of[tile][0].y);
            turn(acc[4 * tile + 1], acc[4 * (tile + SECOND) + 1], turns_of[tile][0].z, turns_of[tile][0].w);
            turn(acc[4 * tile + 2], acc[4 * (tile + SECOND) + 2], turns_of[tile][1].x, turns_of[tile][1].y);
            turn(acc[4 * tile + 3], acc[4 * (tile + SECOND) + 3], turns_of[tile][1].z, turns_of[tile][1].w);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                acc[4 * tile + i] = activate<WHICH>(acc[4 * tile + i]);
                if (GATE) acc[4 * tile + i] *= acc[4 * (tile + SECOND) + i];
            }
        }
    }
#pragma unroll
    for (int tile = 0; tile < (GATE ? TILES - SECOND : TILES); tile++) {
        const int piece = output_of(tile) / 8;
        *(u32*)(out + chunked(row, piece, TOKENS) + 2 * q) = pack2(acc[4 * tile], acc[4 * tile + 1]);
        *(u32*)(out + chunked(row + 8, piece, TOKENS) + 2 * q) = pack2(acc[4 * tile + 2], acc[4 * tile + 3]);
    }
}

// out = norm(residual) + x W^T + b, and the partial sums of out; with PRENORM the residual as it is.
template <class P>
DEVICE void residual_product(const Value* x, const Value* weight, const float* bias, const Value* residual, const float2* sums, const float* gamma,
                             const float* beta, Value* out, float2* sums_out, float epsilon, int trigger) {
    constexpr int GROUPS = P::FINISHED_GROUPS;
    // Two neighbouring outputs of a row are a thread's: of the fragments as they were pushed, the float2 of its number and every 128th from there.
    constexpr int PAIRS = (P::TILES + 1) / 2;
    const Part<P> part(HIDDEN);
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (warp == 4) {
        part.load(x, weight, HIDDEN, trigger, InOrder());
        return;
    }
    cluster_arrive_relaxed();
    const int first_tile = threadIdx.x / 64 % 2;
    const int q = threadIdx.x / 2 % 4;
    const int row_of_group = threadIdx.x / 8 % 8 + 8 * (threadIdx.x % 2);
    const int first_row = part.first_row + part.rank * GROUPS * 16 + row_of_group;
    const bool finishes = part.rank * GROUPS * 16 < TILE_ROWS;
    // Where the number of tiles is odd, half of the threads load their last pair in vain: a branch would have them wait for what they have asked for.
    float2 b[PAIRS];
    float2 shift[PAIRS];
    float2 scale[PAIRS];
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++) {
        const int column = part.column + min(first_tile + 2 * pair, P::TILES - 1) * 8 + 2 * q;
        b[pair] = load_pair_early(bias + column);
        if (PRENORM) continue;
        shift[pair] = load_pair_early(beta + column);
        scale[pair] = load_pair_early(gamma + column);
    }
    cluster_wait();
    wait_for_previous_kernel();
    RowSums of_rows[GROUPS];
    u32 view[GROUPS][PAIRS];
    if (finishes) {
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            if (!PRENORM) of_rows[group].ask(sums, first_row + group * 16, q);
#pragma unroll
            for (int pair = 0; pair < PAIRS; pair++) {
                const Value* at = residual + chunked(first_row + group * 16, part.column / 8 + min(first_tile + 2 * pair, P::TILES - 1), TOKENS) + 2 * q;
                asm volatile("ld.global.u32 %0, [%1];" : "=r"(view[group][pair]) : "l"(at) : "memory");
            }
        }
    }
    float acc[P::TILES * 4];
    part.multiply(acc, trigger);
    if (warp * 16 < TILE_ROWS) {
        const int owner = warp / GROUPS;
        const u32 there = address_at_rank(part.partial() + ((part.rank * GROUPS + warp % GROUPS) * P::TILES * 32 + lane) * 16, owner);
        const u32 barrier_there = address_at_rank(part.partial_is_there(), owner);
#pragma unroll
        for (int tile = 0; tile < P::TILES; tile++)
            push16(there + tile * 512, barrier_there, acc[4 * tile], acc[4 * tile + 1], acc[4 * tile + 2], acc[4 * tile + 3]);
    }
    if (!finishes) return;

    float2* const sums_of_half = (float2*)(shared + P::ROW_SUMS);
    float2 row_sums[GROUPS];
    float2 of[GROUPS];
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
        if (!PRENORM) of[group] = of_rows[group].statistics(epsilon, 2, 4);
    barrier_wait(part.partial_is_there(), 0);
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        const float2* partial = (const float2*)(shared + P::PARTIAL) + group * P::TILES * 64 + threadIdx.x;
        float2 sum = make_float2(0.f, 0.f);
#pragma unroll
        for (int pair = 0; pair < PAIRS; pair++) {
            if (first_tile + 2 * pair >= P::TILES) break;
            const float2 stored = unpack2(view[group][pair]);
            const float2 view = PRENORM ? stored : make_float2((stored.x - of[group].x) * of[group].y * scale[pair].x + shift[pair].x,
                                                               (stored.y - of[group].x) * of[group].y * scale[pair].y + shift[pair].y);
            float2 value = make_float2(b[pair].x + view.x, b[pair].y + view.y);
#pragma unroll
            for (int from = 0; from < P::SPLIT; from++) {
                const float2 more = partial[from * GROUPS * P::TILES * 64 + pair * 128];
                value.x += more.x;
                value.y += more.y;
            }
            const u32 word = pack2(value.x, value.y);
            *(u32*)(out + chunked(first_row + group * 16, part.column / 8 + first_tile + 2 * pair, TOKENS) + 2 * q) = word;
            const float2 rounded = unpack2(word);
            sum.x += rounded.x + rounded.y;
            sum.y += rounded.x * rounded.x + rounded.y * rounded.y;
        }
        row_sums[group] = RowSums::add_lanes(RowSums::add_lanes(sum, 2), 4);
        if (first_tile == 1 && q == 0) sums_of_half[group * 16 + row_of_group] = row_sums[group];
    }
    asm volatile("bar.sync 1, 128;" ::: "memory");
    if (first_tile == 1 || q != 0) return;
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        const float2 half = sums_of_half[group * 16 + row_of_group];
        sums_out[(first_row + group * 16) * PARTS + part.column / P::COLUMNS] = make_float2(row_sums[group].x + half.x, row_sums[group].y + half.y);
    }
}

// ---- the kernels. Two blocks a multiprocessor: the next kernel's come early.

extern "C" __global__ void __cluster_dims__(WIDE_SPLIT, 1, 1) __launch_bounds__(PRODUCT_THREADS, 2)
latency128_qkv(const Value* stream, const Value* weight, const float* bias, const float* weight_sums,
               Value* qkv, const float2* sums_stream, float epsilon, const float* turns, const int2* spans, int trigger) {
    normed_product<QkvProduct, 3 * HIDDEN, ROTARY, false, IDENTITY>(stream, weight, bias, weight_sums, qkv, sums_stream, epsilon, turns, spans, trigger);
}

extern "C" __global__ void __cluster_dims__(OutputProduct::SPLIT, 1, 1) __launch_bounds__(PRODUCT_THREADS, 2)
latency128_output(const Value* context, const Value* weight, const float* bias, const Value* stream,
                  const float2* sums_stream, const float* gamma, const float* beta, Value* attended,
                  float2* sums_attended, float epsilon, int trigger) {
    residual_product<OutputProduct>(context, weight, bias, stream, sums_stream, gamma, beta, attended, sums_attended, epsilon, trigger);
}

extern "C" __global__ void __cluster_dims__(WIDE_SPLIT, 1, 1) __launch_bounds__(PRODUCT_THREADS, 2)
latency128_wide(const Value* attended, const Value* weight, const float* bias, const float* weight_sums,
                Value* wide, const float2* sums_attended, float epsilon, int trigger) {
    normed_product<WideProduct, WIDE_OUTPUTS, false, GATED, ACTIVATION>(attended, weight, bias, weight_sums, wide, sums_attended, epsilon, nullptr, nullptr, trigger);
}

extern "C" __global__ void __cluster_dims__(NarrowProduct::SPLIT, 1, 1) __launch_bounds__(PRODUCT_THREADS, 2)
latency128_narrow(const Value* wide, const Value* weight, const float* bias, const Value* attended,
                  const float2* sums_attended, const float* gamma, const float* beta, Value* stream,
                  float2* sums_stream, float epsilon, int trigger) {
    residual_product<NarrowProduct>(wide, weight, bias, attended, sums_attended, gamma, beta, stream, sums_stream, epsilon, trigger);
}

extern "C" __global__ void __launch_bounds__(KEY_PARTS * 32)
latency128_attention(const Value* qkv, const float* by_distance, int reach, const int2* spans, int window,
                     Value* context, int trigger) {
    constexpr int KEY_TILES = KEYS / 8;
    constexpr int STEPS = HEAD_SIZE / 16;
    const u32 base = shared_address(shared);
    const u32 barrier = base + SHARED_BARRIER;
    const int part = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const int q = lane % 4;
    const int r = lane / 4;
    const int head = blockIdx.x / (TOKENS / 16);
    const int first_query = blockIdx.x % (TOKENS / 16) * 16;
    const int first_key = part * KEYS;
    // A head is a chunk or half of one, which is then copied whole.
    const int chunk = head * HEAD_SIZE / 64;
    const int first_piece = head * HEAD_SIZE % 64 / 8;

    float scores[KEY_TILES][4];
    float biases[KEY_TILES][4];
#pragma unroll
    for (int tile = 0; tile < KEY_TILES; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int key = first_key + tile * 8 + 2 * q + i % 2;
            const int query = first_query + r + i / 2 * 8;
            biases[tile][i] = distance_bias(by_distance, head, key - query, reach);
            scores[tile][i] = 0.f;
        }
    if (threadIdx.x == 0) {
        barrier_make(barrier, 1);
        barriers_are_made();
        barrier_expect(barrier, (16 + 2 * TOKENS) * 128);
    }
    if (threadIdx.x == 0 && trigger == 0) let_next_kernel_start();
    __syncthreads();
    wait_for_previous_kernel();
    if (threadIdx.x == 0) {
        if (trigger == 1) let_next_kernel_start();
        const Value* at = qkv + (size_t)chunk * TOKENS * 64;
        bulk_load(base, at + first_query * 64, 16 * 128, barrier);
        bulk_load(base + SHARED_KEYS, at + HIDDEN * TOKENS, TOKENS * 128, barrier);
        bulk_load(base + SHARED_VALUES, at + 2 * HIDDEN * TOKENS, TOKENS * 128, barrier);
        if (trigger == 2) let_next_kernel_start();
    }
    const int2 query_spans[2] = {load_span(spans, first_query + r), load_span(spans, first_query + r + 8)};
    u32 real[KEY_TILES];
#pragma unroll
    for (int tile = 0; tile < KEY_TILES; tile++) real[tile] = real_keys(load_two_spans(spans, first_key + tile * 8 + 2 * q));
    barrier_wait(barrier, 0);
    if (threadIdx.x == 0 && trigger == 3) let_next_kernel_start();

    u32 queries[STEPS][4];
    const int query = lane % 16;
#pragma unroll
    for (int step = 0; step < STEPS; step++) load_matrix4(base + query * 128 + (((first_piece + 2 * step + lane / 16) ^ (query & 7)) << 4), queries[step]);
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int tile = 0; tile < KEY_TILES; tile += 2) {
            u32 keys[4];
            const int key = first_key + tile * 8 + lane % 8 + lane / 16 * 8;
            load_matrix4(base + SHARED_KEYS + key * 128 + (((first_piece + 2 * step + lane / 8 % 2) ^ (key & 7)) << 4), keys);
            multiply16x8x16(scores[tile], queries[step][0], queries[step][1], queries[step][2], queries[step][3], keys[0], keys[1]);
            multiply16x8x16(scores[tile + 1], queries[step][0], queries[step][1], queries[step][2], queries[step][3], keys[2], keys[3]);
        }
    float most[2];
    float sum[2];
#pragma unroll
    for (int row = 0; row < 2; row++) {
        most[row] = NEGATIVE_INFINITY;
        sum[row] = 0.f;
#pragma unroll
        for (int tile = 0; tile < KEY_TILES; tile++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float& score = scores[tile][2 * row + i];
                score = fmaf(score, SCORE_SCALE, biases[tile][2 * row + i]);
                const int key = first_key + tile * 8 + 2 * q + i;
                if (!sees(query_spans[row], key, key - (first_query + r + row * 8), window)) score = NEGATIVE_INFINITY;
                most[row] = fmaxf(most[row], score);
            }
        most[row] = fmaxf(most[row], __shfl_xor_sync(0xffffffffu, most[row], 1));
        most[row] = fmaxf(most[row], __shfl_xor_sync(0xffffffffu, most[row], 2));
        // A query may see none of a warp's keys: zeros, not the NaN of a difference of infinities.
        const float base_of_powers = most[row] == NEGATIVE_INFINITY ? 0.f : most[row];
#pragma unroll
        for (int tile = 0; tile < KEY_TILES; tile++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float& score = scores[tile][2 * row + i];
                score = exp2_approximate(score - base_of_powers);
                sum[row] += score;
            }
        sum[row] += __shfl_xor_sync(0xffffffffu, sum[row], 1);
        sum[row] += __shfl_xor_sync(0xffffffffu, sum[row], 2);
    }
    float result[HEAD_SIZE / 8][4] = {};
#pragma unroll
    for (int step = 0; step < KEY_TILES / 2; step++) {
        const float(&near)[4] = scores[2 * step];
        const float(&far)[4] = scores[2 * step + 1];
        const u32 p0 = pack2(near[0], near[1]);
        const u32 p1 = pack2(near[2], near[3]);
        const u32 p2 = pack2(far[0], far[1]);
        const u32 p3 = pack2(far[2], far[3]);
#pragma unroll
        for (int two = 0; two < HEAD_SIZE / 16; two++) {
            u32 values[4];
            const int key = first_key + step * 16 + lane % 16;
            load_matrix4_transposed(base + SHARED_VALUES + key * 128 + (((first_piece + 2 * two + lane / 16) ^ (key & 7)) << 4), values);
            multiply16x8x16(result[2 * two], p0, p1, p2, p3, values[0] & real[2 * step], values[1] & real[2 * step + 1]);
            multiply16x8x16(result[2 * two + 1], p0, p1, p2, p3, values[2] & real[2 * step], values[3] & real[2 * step + 1]);
        }
    }
    if (threadIdx.x == 0 && trigger == 4) let_next_kernel_start();

    float* const contexts = (float*)(shared + SHARED_CONTEXT);
    float2* const softmax = (float2*)(shared + SHARED_SOFTMAX); // (most, sum) of each part and query
#pragma unroll
    for (int tile = 0; tile < HEAD_SIZE / 8; tile++) {
        float* to = contexts + (part * 16 + r) * CONTEXT_STRIDE + tile * 8 + 2 * q;
        *(float2*)to = make_float2(result[tile][0], result[tile][1]);
        *(float2*)(to + 8 * CONTEXT_STRIDE) = make_float2(result[tile][2], result[tile][3]);
    }
    if (q == 0) {
        softmax[part * 16 + r] = make_float2(most[0], sum[0]);
        softmax[part * 16 + r + 8] = make_float2(most[1], sum[1]);
    }
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < 16 * HEAD_SIZE / 8; i += KEY_PARTS * 32) {
        const int row = i / (HEAD_SIZE / 8);
        const int piece = i % (HEAD_SIZE / 8);
        float highest = NEGATIVE_INFINITY;
#pragma unroll
        for (int from = 0; from < KEY_PARTS; from++) highest = fmaxf(highest, softmax[from * 16 + row].x);
        float factors[KEY_PARTS];
        float all = 0.f;
#pragma unroll
        for (int from = 0; from < KEY_PARTS; from++) {
            const float2 of = softmax[from * 16 + row];
            factors[from] = exp2_approximate(of.x - highest);
            all += of.y * factors[from];
        }
        const float inverse = 1.f / all;
        float v[8] = {};
#pragma unroll
        for (int from = 0; from < KEY_PARTS; from++) {
            const float4* at = (const float4*)(contexts + (from * 16 + row) * CONTEXT_STRIDE + piece * 8);
            const float4 low = at[0];
            const float4 high = at[1];
            const float factor = factors[from] * inverse;
            v[0] = fmaf(low.x, factor, v[0]);
            v[1] = fmaf(low.y, factor, v[1]);
            v[2] = fmaf(low.z, factor, v[2]);
            v[3] = fmaf(low.w, factor, v[3]);
            v[4] = fmaf(high.x, factor, v[4]);
            v[5] = fmaf(high.y, factor, v[5]);
            v[6] = fmaf(high.z, factor, v[6]);
            v[7] = fmaf(high.w, factor, v[7]);
        }
        Value* to = context + chunked(first_query + row, head * (HEAD_SIZE / 8) + piece, TOKENS);
        store16(to, pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7]));
    }
}

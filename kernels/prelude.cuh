// What the native engine's kernels share. NVRTC compiles `prelude.cuh` and a kernel file as one text, without include paths.
//
// Options   -DBF16=1: values are stored as bf16 instead of fp16. Sums and statistics are f32 in both.
//
// Chunked matrices: the one layout of activations and weights. A matrix [rows, columns], columns a multiple of 64, lies as
// [columns / 64][rows][64]: chunk c holds columns 64 c .. 64 c + 63 of all rows, a row's part is 128 bytes, and the eight 16-byte pieces
// of a part stand at piece ^ (row & 7), the 128-byte swizzle of shared memory. So any run of rows of a chunk is one contiguous piece of
// memory that lies as ldmatrix and wgmma want it, if its first row is a multiple of 8. `rows` is the matrix' capacity, a multiple of 8
// (activations: of 128), however many rows are in use.
//
// Norms are folded: norm(x) W^T + b = rs (x W'^T - mean sum(W')) + b' with W' = W diag(gamma), b' = b + W beta. Streams (the residual
// branch) are kept before their norm, with (mean, rs) of each row beside them; rs = 1 / sqrt(variance + epsilon).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
#define DEVICE __device__ __forceinline__

#ifndef BF16
#define BF16 0
#endif

#define LOG2E 1.4426950408889634f
#define NEGATIVE_INFINITY __int_as_float(0xff800000)

// ---- stored values

// One stored value: fp16 or bf16, as bits.
struct Value { u16 bits; };

// Two values in a word, the first in the low half.
DEVICE u32 pack2(float low, float high) {
    u32 word;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#endif
    return word;
}

DEVICE float2 unpack2(u32 word) {
    float2 pair;
#if BF16
    pair.x = __uint_as_float(word << 16);
    pair.y = __uint_as_float(word & 0xffff0000u);
#else
    asm("{\n\t.reg .b16 l, h;\n\tmov.b32 {l, h}, %2;\n\tcvt.f32.f16 %0, l;\n\tcvt.f32.f16 %1, h;\n\t}" : "=f"(pair.x), "=f"(pair.y) : "r"(word));
#endif
    return pair;
}

DEVICE Value narrow(float value) {
    Value narrowed;
    narrowed.bits = (u16)(pack2(value, 0.f) & 0xffffu);
    return narrowed;
}

DEVICE float widen(Value value) { return unpack2(value.bits).x; }

// Where 16-byte piece `piece` (columns 8 piece .. 8 piece + 7) of `row` stands in a chunked matrix of `rows` rows, in values.
DEVICE size_t chunked(size_t row, u32 piece, size_t rows) {
    return (((size_t)(piece >> 3) * rows + row) << 6) + (((piece & 7) ^ (u32)(row & 7)) << 3);
}

// ---- memory

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

DEVICE uint4 load16(const void* p) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}

// Of what no kernel writes while this one runs, and nobody reads again soon: weights.
DEVICE uint4 load16_once(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// A plain uint4 store may be split into four.
DEVICE void store16(void* p, u32 x, u32 y, u32 z, u32 w) {
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

DEVICE void copy_async16(u32 to_shared, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to_shared), "l"(from) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

DEVICE void load_matrix4(u32 address, u32 (&v)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address) : "memory");
}
DEVICE void load_matrix4_transposed(u32 address, u32 (&v)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address) : "memory");
}

// ---- products

// c += a b for a 16x16 tile a (row-major fragment) and a 16x8 tile b (column-major fragment).
DEVICE void multiply16x8x16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- programmatic dependent launch: the next kernel of the stream starts early, and waits here for what this one writes
// No kernel that waits has __restrict__ on its pointers: the compiler then takes what const ones point to for unchanging, and reads it ahead of the wait.

DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- rows, which lie side by side: row r has tokens starts[r] .. starts[r] + lengths[r]

// How many tokens all rows have; those behind are padding.
DEVICE int real_tokens(const int* starts, const int* lengths, int rows) { return rows == 0 ? 0 : starts[rows - 1] + lengths[rows - 1]; }

// The last row that starts at or before token t, which holds it if any does; -1 if none starts there.
DEVICE int row_before(int t, const int* starts, int rows) {
    int low = 0;
    int high = rows;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (starts[middle] <= t) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low - 1;
}

// The place of token t in its row; 0 for one of no row.
DEVICE int place_in_row(int t, const int* starts, const int* lengths, int rows) {
    const int row = row_before(t, starts, rows);
    if (row < 0) return 0;
    const int place = t - starts[row];
    return place < lengths[row] ? place : 0;
}

// ---- functions of one value, and of one in each lane

DEVICE bool is_finite(float value) { return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u; }

// In every lane, and the same bits in each.
DEVICE float warp_sum(float value) {
    for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
    return value;
}

DEVICE float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// x Phi(x) as max(x, 0) - |x| 2^P(|x|), P of degree 7: relative error of Phi below 3.1e-6 where it is above 6e-5, absolute error of the whole
// below 3.5e-7, which is far below half a unit of the last place of fp16. No branch; infinities give NaN.
DEVICE float gelu(float x) {
    const float a = fabsf(x);
    float p = __uint_as_float(0xB59CB0FCu);
    p = fmaf(a, p, __uint_as_float(0x385791BBu));
    p = fmaf(a, p, __uint_as_float(0xBA640FC3u));
    p = fmaf(a, p, __uint_as_float(0x3C0884D4u));
    p = fmaf(a, p, __uint_as_float(0xBD5BF8CDu));
    p = fmaf(a, p, __uint_as_float(0xBEEAD296u));
    p = fmaf(a, p, __uint_as_float(0xBF935ACCu));
    p = fmaf(a, p, __uint_as_float(0xBF7FFFCDu));
    return fmaf(-a, exp2_approximate(p), fmaxf(x, 0.f));
}

// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), as x / (1 + exp(-2 u)).
DEVICE float gelu_tanh(float x) {
    const float u = 0.7978845608028654f * x * fmaf(0.044715f * x, x, 1.f);
    return __fdividef(x, 1.f + exp2_approximate(-2.f * LOG2E * u));
}

DEVICE float silu(float x) { return __fdividef(x, 1.f + exp2_approximate(-LOG2E * x)); }

// As src/native/ numbers them.
#define IDENTITY 0
#define GELU 1
#define GELU_TANH 2
#define RELU 3
#define SILU 4
template <int WHICH> DEVICE float activate(float x) {
    if (WHICH == GELU) return gelu(x);
    if (WHICH == GELU_TANH) return gelu_tanh(x);
    if (WHICH == RELU) return x < 0.f ? 0.f : x; // a NaN stays a NaN
    if (WHICH == SILU) return silu(x);
    return x;
}

// ---- 8 neighbouring values of a token

DEVICE void unpack16(float (&v)[8], uint4 words) {
    const float2 pairs[4] = {unpack2(words.x), unpack2(words.y), unpack2(words.z), unpack2(words.w)};
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
        v[2 * pair] = pairs[pair].x;
        v[2 * pair + 1] = pairs[pair].y;
    }
}

// EXACT: f32 and row-major.
template <bool EXACT> DEVICE void load_piece(float (&v)[8], const void* stream, int t, int piece, int hidden, int capacity) {
    if constexpr (EXACT) {
        const float4* at = (const float4*)((const float*)stream + (size_t)t * hidden + piece * 8);
        const float4 a = at[0];
        const float4 b = at[1];
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else {
        unpack16(v, load16((const Value*)stream + chunked((size_t)t, (u32)piece, (size_t)capacity)));
    }
}

// Writes the piece, and changes `v` to what a reader will see.
template <bool EXACT> DEVICE void store_piece(float (&v)[8], void* stream, int t, int piece, int hidden, int capacity) {
    if constexpr (EXACT) {
        float4* at = (float4*)((float*)stream + (size_t)t * hidden + piece * 8);
        at[0] = make_float4(v[0], v[1], v[2], v[3]);
        at[1] = make_float4(v[4], v[5], v[6], v[7]);
    } else {
        const uint4 words = make_uint4(pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7]));
        store16((Value*)stream + chunked((size_t)t, (u32)piece, (size_t)capacity), words.x, words.y, words.z, words.w);
        unpack16(v, words);
    }
}

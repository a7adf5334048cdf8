// Masked pooling of hidden states, the cut to `columns`, and L2 normalisation where one block or cluster holds the whole row.
//
// Computes, for each row r, whose hidden states begin at token starts[r] of hidden[total, width], over its real tokens t in
// [skip, lengths[r]):
//   mode 0 cls            hidden[starts[r] + first]
//   mode 1 max            max_t hidden[starts[r] + t]                  (a NaN stays a NaN)
//   mode 2 mean           sum_t hidden[starts[r] + t] / n
//   mode 3 mean_sqrt_len  sum_t hidden[starts[r] + t] / sqrt(n)
//   mode 4 weightedmean   sum_t (t + 1) hidden[starts[r] + t] / sum_t (t + 1)   (positions count from the row's start, skipped tokens included)
//   mode 5 lasttoken      hidden[starts[r] + last]
// as sentence-transformers' Pooling.forward does, except that a row without real tokens gives zeros in every mode.
// Padding is never read. Then, if `normalise`, y / max(|y|, 1e-12), as torch.nn.functional.normalize.
//
// Layouts   hidden: *_f16, *_f32: row-major, width a multiple of 8, 16-byte aligned.
//           *_stream_f16, *_stream_bf16: stream[capacity, width] in chunks (prelude.cuh, "Chunked matrices"), through a norm: with gamma,
//           hidden[t] = (stream[t] - mean) rs gamma + beta of statistics[t] = (mean, rs), beta 0 where it is null; as it is without gamma.
//           These also write seen = fault, which the host reads: the native engine's note of values that are not finite. starts: [batch] i32, clamped to [0, total], or null for rows that lie
//           padded, r * seq. lengths: [batch] i32, clamped to [0, seq] and to the end of hidden.
//           skip: one i32, or null for 0. out: f32; row r, column c at out[r * stride + offset + c] for c < columns.
// Numbers   sums, squares and results are f32.
// Launch    block: (threads), threads >= lanes * groups, a multiple of 32, at most 1024. Thread = (group, lane): a lane is
//           16 bytes of a token (8 fp16 or 4 fp32 columns), the groups share out the tokens.
//           grid: (clusters * cluster size, tiles); a tile is `lanes` lanes of columns. Any number of clusters: each takes rows
//           cluster, cluster + clusters, .... The blocks of a cluster (sm_90) share out a row's tokens and add through
//           distributed shared memory; without clusters the cluster size is 1.
//           May be launched as programmatic dependent of what writes hidden, starts, lengths and skip (sm_90).
//           Dynamic shared memory: groups * lanes * (16 / sizeof(T)) floats.
//           `normalise` needs tiles == 1 and columns == all of the output row.
// Compile   NVRTC, no includes: --gpu-architecture=sm_XY --std=c++17

struct Half { unsigned short bits; };
struct Bfloat { unsigned short bits; };

// 16 bytes of one token, widened to f32.
template <typename T> struct Lane;

template <> struct Lane<Bfloat> {
    static constexpr int width = 8;
    static __device__ __forceinline__ void widen(const uint4& raw, float (&v)[8]) {
        const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[2 * i] = __uint_as_float(words[i] << 16);
            v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    }
};

template <> struct Lane<Half> {
    static constexpr int width = 8;
    static __device__ __forceinline__ void widen(const uint4& raw, float (&v)[8]) {
        pair(raw.x, v[0], v[1]);
        pair(raw.y, v[2], v[3]);
        pair(raw.z, v[4], v[5]);
        pair(raw.w, v[6], v[7]);
    }
    static __device__ __forceinline__ void pair(unsigned bits, float& low, float& high) {
        asm("{\n\t.reg .b16 l, h;\n\tmov.b32 {l, h}, %2;\n\tcvt.f32.f16 %0, l;\n\tcvt.f32.f16 %1, h;\n\t}" : "=f"(low), "=f"(high) : "r"(bits));
    }
};

template <> struct Lane<float> {
    static constexpr int width = 4;
    static __device__ __forceinline__ void widen(const uint4& raw, float (&v)[4]) {
        v[0] = __uint_as_float(raw.x);
        v[1] = __uint_as_float(raw.y);
        v[2] = __uint_as_float(raw.z);
        v[3] = __uint_as_float(raw.w);
    }
};

// Hidden states as they lie in memory.
template <typename T> struct RowMajor {
    static constexpr int width = Lane<T>::width;
    static constexpr int in_flight = 4; // loads of a thread before the first use
    typedef uint4 Raw;
    const T* hidden;
    size_t pieces; // of a token
    const uint4* at;

    // This thread's columns from `column` on.
    __device__ __forceinline__ void begin(int column, int row_width) {
        pieces = row_width / width;
        at = reinterpret_cast<const uint4*>(hidden + column);
    }
    __device__ __forceinline__ Raw load(size_t token) const { return at[token * pieces]; }
    __device__ __forceinline__ void widen(const Raw& raw, float (&v)[width]) const { Lane<T>::widen(raw, v); }
    __device__ __forceinline__ void note() const {}
};

// Those that a stream becomes through its norm.
template <typename T> struct Stream {
    static constexpr int width = 8;
    static constexpr int in_flight = 3; // four would spill
    struct Raw {
        uint4 values;
        float2 of;
    };
    const T* values;
    const float2* statistics;
    const float* gamma;
    const float* beta;
    size_t capacity;
    const int* fault;
    int* seen;
    const uint4* at; // of token 0 in the chunk, and which of its pieces
    unsigned piece;
    float scale[8];
    float shift[8];

    __device__ __forceinline__ void begin(int column, int) {
        at = reinterpret_cast<const uint4*>(values + (size_t)(column / 64) * capacity * 64);
        piece = column % 64 / 8;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            scale[i] = gamma == nullptr ? 1.0f : gamma[column + i];
            shift[i] = beta == nullptr ? 0.0f : beta[column + i];
        }
    }
    __device__ __forceinline__ Raw load(size_t token) const {
        Raw raw;
        raw.values = at[token * 8 + (piece ^ (unsigned)(token & 7))];
        raw.of = gamma == nullptr ? make_float2(0.0f, 1.0f) : statistics[token];
        return raw;
    }
    __device__ __forceinline__ void widen(const Raw& raw, float (&v)[8]) const {
        Lane<T>::widen(raw.values, v);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = fmaf((v[i] - raw.of.x) * raw.of.y, scale[i], shift[i]);
    }
    __device__ __forceinline__ void note() const {
        if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *seen = *fault;
    }
};

// The larger one; a NaN wins, as in torch.max.
__device__ __forceinline__ float larger(float a, float b) { return (b > a || b != b) ? b : a; }

template <bool IS_MAX>
__device__ __forceinline__ float combine(float a, float b) { return IS_MAX ? larger(a, b) : a + b; }

// Thread block clusters, and programmatic dependent launch; before sm_90 every block is its own, and starts after what is in front of it has ended.
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ unsigned cluster_rank() {
    unsigned r;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
__device__ __forceinline__ unsigned cluster_size() {
    unsigned n;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
    return n;
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// What block `rank` of the cluster holds at this address of its shared memory.
__device__ __forceinline__ float peer(const float* mine, unsigned rank) {
    unsigned address = (unsigned)__cvta_generic_to_shared(mine);
    float v;
    asm volatile("{\n\t.reg .u32 a;\n\tmapa.shared::cluster.u32 a, %1, %2;\n\tld.shared::cluster.f32 %0, [a];\n\t}"
                 : "=f"(v) : "r"(address), "r"(rank) : "memory");
    return v;
}
#else
__device__ __forceinline__ void wait_for_previous_kernel() {}
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ unsigned cluster_size() { return 1; }
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
__device__ __forceinline__ float peer(const float* mine, unsigned) { return *mine; }
#endif

// The sum over the block, the same in every thread. All threads call it; `scratch` holds 32 floats and may be used again
// after the next __syncthreads.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
    for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    const int warps = blockDim.x / 32;
    v = (int)(threadIdx.x % 32) < warps ? scratch[threadIdx.x % 32] : 0.0f;
    for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
    return v;
}

// max(|y|, 1e-12) for the sum of squares of y; a NaN stays a NaN.
__device__ __forceinline__ float norm_of(float squares) {
    const float norm = sqrtf(squares);
    return norm < 1e-12f ? 1e-12f : norm;
}

enum Mode { CLS = 0, MAX = 1, MEAN = 2, MEAN_SQRT_LEN = 3, WEIGHTED_MEAN = 4, LAST_TOKEN = 5 };

template <bool IS_MAX, typename Hidden>
__device__ __forceinline__ void pool(Hidden hidden, const int* starts, const int* lengths,
                                     const int* skip, float* out, long long total, int batch, int seq,
                                     int width, int columns, int stride, int offset, int mode, int normalise, int lanes, int groups) {
    constexpr int W = Hidden::width;
    constexpr int UNROLL = Hidden::in_flight;
    extern __shared__ float4 dynamic[];
    float* partial = reinterpret_cast<float*>(dynamic);  // [groups, lanes * W]
    __shared__ float scratch[32];
    __shared__ float squares_of_block;

    const int lane = threadIdx.x % lanes;
    const int group = threadIdx.x / lanes;
    const int rank = cluster_rank();
    const int size = cluster_size();
    const int tile = lanes * W;
    const int first_column = blockIdx.y * tile;
    const int tile_columns = min(tile, columns - first_column);
    const bool reads = group < groups && lane * W < tile_columns;

    if (reads) hidden.begin(first_column + lane * W, width);
    wait_for_previous_kernel();
    hidden.note();
    for (int row = blockIdx.x / size; row < batch; row += gridDim.x / size) {
        // Which tokens, and by what their sum is divided.
        const long long origin = starts ? max(0LL, min((long long)starts[row], total)) : (long long)row * seq;
        const int length = max(0, min(lengths[row], (int)min((long long)seq, total - origin)));
        const int start = skip ? max(0, min(*skip, length)) : 0;
        const float n = (float)(length - start);
        int begin = start, end = length;
        float divisor = 1.0f;
        if (mode == CLS) end = min(start + 1, length);
        if (mode == LAST_TOKEN) begin = max(start, length - 1);
        if (mode == MEAN) divisor = n;
        if (mode == MEAN_SQRT_LEN) divisor = sqrtf(n);
        // The sum of start + 1 ..= length; exact in f32 up to 4096 tokens, then rounded once.
        if (mode == WEIGHTED_MEAN) divisor = (float)((long long)(length - start) * (start + 1 + length) / 2);

        float sum[W];
        for (int i = 0; i < W; i++) sum[i] = IS_MAX ? -__int_as_float(0x7f800000) : 0.0f;

        if (reads) {
            const int step = groups * size;
            for (int t = begin + rank * groups + group; t < end; t += UNROLL * step) {
                typename Hidden::Raw raw[UNROLL];
#pragma unroll
                for (int u = 0; u < UNROLL; u++) {
                    if (t + u * step < end) raw[u] = hidden.load((size_t)(origin + t + u * step));
                }
#pragma unroll
                for (int u = 0; u < UNROLL; u++) {
                    if (t + u * step < end) {
                        float v[W];
                        hidden.widen(raw[u], v);
                        const float weight = mode == WEIGHTED_MEAN ? (float)(t + u * step + 1) : 1.0f;
#pragma unroll
                        for (int i = 0; i < W; i++) sum[i] = IS_MAX ? larger(sum[i], v[i]) : fmaf(v[i], weight, sum[i]);
                    }
                }
            }
        }
        if (group < groups) {
            float4* mine = reinterpret_cast<float4*>(partial + (group * lanes + lane) * W);
#pragma unroll
            for (int i = 0; i < W; i += 4) mine[i / 4] = make_float4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
        }
        __syncthreads();

        // A block alone finishes all columns; in a cluster each block adds its groups up, then finishes its share of the columns.
        int low = 0, high = tile_columns, terms = groups;
        if (size > 1) {
            for (int c = threadIdx.x; c < tile_columns; c += blockDim.x) {
                float v = partial[c];
                for (int g = 1; g < groups; g++) v = combine<IS_MAX>(v, partial[g * tile + c]);
                partial[c] = v;
            }
            cluster_sync();
            const int share = (tile_columns + size - 1) / size;
            low = min(rank * share, tile_columns);
            high = min(low + share, tile_columns);
            terms = size;
        }
        float squares = 0.0f;
        for (int c = low + threadIdx.x; c < high; c += blockDim.x) {
            float v = size > 1 ? peer(partial + c, 0) : partial[c];
            for (int i = 1; i < terms; i++) v = combine<IS_MAX>(v, size > 1 ? peer(partial + c, i) : partial[i * tile + c]);
            v = begin < end ? v / divisor : 0.0f;
            squares = fmaf(v, v, squares);
            partial[c] = v;  // read again by this thread alone: peers read the columns of their own shares
        }

        float norm = 1.0f;
        if (normalise) {
            float total = block_sum(squares, scratch);
            if (size > 1) {
                if (threadIdx.x == 0) squares_of_block = total;
                cluster_sync();
                total = peer(&squares_of_block, 0);
                for (int r = 1; r < size; r++) total += peer(&squares_of_block, r);
            }
            norm = norm_of(total);
        }
        float* y = out + (size_t)row * stride + offset + first_column;
        for (int c = low + threadIdx.x; c < high; c += blockDim.x) y[c] = partial[c] / norm;

        // Nobody leaves, or overwrites its shared memory, while another still reads it.
        if (size > 1) cluster_sync();
        else __syncthreads();
    }
}

#define POOL_KERNEL(NAME, T, IS_MAX)                                                                                              \
    extern "C" __global__ void __launch_bounds__(1024)                                                                            \
        NAME(const T* hidden, const int* starts, const int* lengths, const int* skip, float* out, long long total, int batch,     \
             int seq, int width, int columns, int stride, int offset, int mode, int normalise, int lanes, int groups) {           \
        RowMajor<T> states;                                                                                                       \
        states.hidden = hidden;                                                                                                   \
        pool<IS_MAX>(states, starts, lengths, skip, out, total, batch, seq, width, columns, stride, offset, mode, normalise,      \
                     lanes, groups);                                                                                              \
    }

#define POOL_STREAM_KERNEL(NAME, T, IS_MAX)                                                                                       \
    extern "C" __global__ void __launch_bounds__(1024)                                                                            \
        NAME(const T* stream, const int* starts, const int* lengths, const int* skip, float* out, long long total, int batch,     \
             int seq, int width, int columns, int stride, int offset, int mode, int normalise, int lanes, int groups,             \
             const float2* statistics, const float* gamma, const float* beta, long long capacity, const int* fault, int* seen) {  \
        Stream<T> states;                                                                                                         \
        states.values = stream;                                                                                                   \
        states.statistics = statistics;                                                                                           \
        states.gamma = gamma;                                                                                                     \
        states.beta = beta;                                                                                                       \
        states.capacity = (size_t)capacity;                                                                                       \
        states.fault = fault;                                                                                                     \
        states.seen = seen;                                                                                                       \
        pool<IS_MAX>(states, starts, lengths, skip, out, total, batch, seq, width, columns, stride, offset, mode, normalise,      \
                     lanes, groups);                                                                                              \
    }

POOL_KERNEL(pool_sum_f16, Half, false)
POOL_KERNEL(pool_max_f16, Half, true)
POOL_KERNEL(pool_sum_f32, float, false)
POOL_KERNEL(pool_max_f32, float, true)
POOL_STREAM_KERNEL(pool_sum_stream_f16, Half, false)
POOL_STREAM_KERNEL(pool_max_stream_f16, Half, true)
POOL_STREAM_KERNEL(pool_sum_stream_bf16, Bfloat, false)
POOL_STREAM_KERNEL(pool_max_stream_bf16, Bfloat, true)

// L2 normalisation in place: rows[r] / max(|rows[r]|, 1e-12), [batch, dim] f32. One block a row; any number of blocks; any
// block that is a multiple of 32, at most 1024. For rows that several launches of pooling wrote.
extern "C" __global__ void __launch_bounds__(1024) normalise(float* rows, int batch, int dim) {
    __shared__ float scratch[32];
    for (int row = blockIdx.x; row < batch; row += gridDim.x) {
        float* y = rows + (size_t)row * dim;
        float squares = 0.0f;
        for (int c = threadIdx.x; c < dim; c += blockDim.x) squares = fmaf(y[c], y[c], squares);
        const float norm = norm_of(block_sum(squares, scratch));
        for (int c = threadIdx.x; c < dim; c += blockDim.x) y[c] /= norm;
        __syncthreads();
    }
}

// Model inputs made on the device: the attention mask from the row lengths, and int64 ids for graphs that want them.
//
// attention_mask_{i32,i64}: mask[r, t] = t < lengths[r] ? 1 : 0, [batch, seq]; a row of no tokens is all 0.
// widen_i32_i64: out[i] = in[i], sign kept.
// Launch: one dimension, any grid and block; each thread strides over the values.
// Compile: NVRTC, no includes: --gpu-architecture=sm_XY --std=c++17

template <typename T>
__device__ __forceinline__ void attention_mask(const int* __restrict__ lengths, T* __restrict__ mask, int batch, int seq) {
    const long long total = (long long)batch * seq;
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
        mask[i] = (int)(i % seq) < lengths[i / seq] ? 1 : 0;
    }
}

extern "C" __global__ void attention_mask_i32(const int* lengths, int* mask, int batch, int seq) {
    attention_mask(lengths, mask, batch, seq);
}

extern "C" __global__ void attention_mask_i64(const int* lengths, long long* mask, int batch, int seq) {
    attention_mask(lengths, mask, batch, seq);
}

extern "C" __global__ void widen_i32_i64(const int* __restrict__ in, long long* __restrict__ out, long long count) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) out[i] = in[i];
}

// The encoder's inputs, made on the device from what the host staged: token ids, attention mask, row lengths.
//
// staged: [skip, lengths[batch], ids[batch, seq]], int32, in page-locked host memory that the device reads over the bus. Of the ids
// only those of real tokens are read: the host leaves padding as it is.
// skip[0] = staged skip; lengths[r] = staged length, taken into 0..seq;
// ids[r, t] = t < lengths[r] ? staged id : pad; mask[r, t] = t < lengths[r] ? 1 : 0. Either is int32, or int64 where wide; mask may be null.
// Launch: one dimension, any grid and block; each thread strides over the values.
// Compile: NVRTC, no includes: --gpu-architecture=sm_XY --std=c++17

extern "C" __global__ void stage_tokens(const int* __restrict__ staged, int* __restrict__ skip, int* __restrict__ lengths,
                                        void* __restrict__ ids, void* __restrict__ mask, int wide_ids, int wide_mask, int batch,
                                        int seq, int pad) {
    const int* staged_lengths = staged + 1;
    const int* staged_ids = staged_lengths + batch;
    const long long total = (long long)batch * seq;
    const long long step = (long long)gridDim.x * blockDim.x;
    const long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (first == 0) skip[0] = staged[0];
    for (long long r = first; r < batch; r += step) {
        const int length = staged_lengths[r];
        lengths[r] = length < 0 ? 0 : length > seq ? seq : length;
    }
    for (long long i = first; i < total; i += step) {
        const bool token = (int)(i % seq) < staged_lengths[i / seq];
        const int id = token ? staged_ids[i] : pad;
        if (wide_ids) {
            ((long long*)ids)[i] = id;
        } else {
            ((int*)ids)[i] = id;
        }
        if (mask == nullptr) continue;
        if (wide_mask) {
            ((long long*)mask)[i] = token;
        } else {
            ((int*)mask)[i] = token;
        }
    }
}

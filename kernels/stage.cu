// The encoder's inputs, made on the device from what the host staged: token ids, attention mask, where rows begin and how long they are.
//
// staged: [skip, starts[rows + 1], ids[starts[rows]]], int32, in page-locked host memory that the device reads over the bus: the ids of
// all rows side by side, row r's from starts[r] to starts[r + 1]. starts[0] is 0.
// skip[0] = staged skip.
// Padded (seq > 0): row r of the encoder's rectangle [rows, seq] begins at r * seq. lengths[r] = starts[r + 1] - starts[r], taken into 0..seq;
//   ids[r, t] = t < lengths[r] ? staged id : pad; mask[r, t] = t < lengths[r] ? 1 : 0. total is rows * seq.
// Packed (seq == 0): the encoder takes the rows as they lie. starts[r] and lengths[r] as staged, taken into 0..total;
//   ids[i] = i < starts[rows] ? staged id : pad, for i < total.
// ids and mask are int32, or int64 where wide; mask may be null, starts is null where rows are padded. No more than `total` staged ids are
// read, whatever the staged starts say; of packed rows so many always, what stands behind the last row is of no matter.
// Launch: one dimension, any grid and block; each thread strides over the values.
// Compile: NVRTC, no includes: --gpu-architecture=sm_XY --std=c++17

__device__ __forceinline__ int within(int n, int most) { return n < 0 ? 0 : n > most ? most : n; }

extern "C" __global__ void stage_tokens(const int* __restrict__ staged, int* __restrict__ skip, int* __restrict__ starts,
                                        int* __restrict__ lengths, void* __restrict__ ids, void* __restrict__ mask, int wide_ids,
                                        int wide_mask, int rows, int seq, int total, int pad) {
    const int* staged_starts = staged + 1;
    const int* staged_ids = staged_starts + rows + 1;
    const long long step = (long long)gridDim.x * blockDim.x;
    const long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (first == 0) skip[0] = staged[0];
    for (long long r = first; r < rows; r += step) {
        const int begin = within(staged_starts[r], total);
        const int end = within(staged_starts[r + 1], total);
        lengths[r] = within(end - begin, seq > 0 ? seq : total);
        if (starts != nullptr) starts[r] = begin;
    }
    for (long long i = first; i < total; i += step) {
        int id;
        bool token;
        if (seq > 0) {
            const int r = (int)(i / seq);
            const int t = (int)(i % seq);
            const int begin = within(staged_starts[r], total);
            token = t < within(staged_starts[r + 1], total) - begin;
            id = token ? staged_ids[begin + t] : pad;
        } else {
            // Asked for before it is known whether the batch has it: one way over the bus instead of two.
            const int staged_id = staged_ids[i];
            token = i < within(staged_starts[rows], total);
            id = token ? staged_id : pad;
        }
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

// Weights as files store them, made into what the engine's kernels read. Runs once a model.
//
// `type` of a source: 0 f32, 1 fp16, 2 bf16, 3 f64; row-major, aligned to its values.
//
// lay_out_weight  W' = W diag(gamma) of a linear, rows first .. first + rows of `total` rows, into the chunked layout. gamma f32 [inputs], or null.
//                 fault |= 1 where a value of the source is not finite, |= 2 where W' does not fit the stored type.
//                 Launch: one thread a piece of 8 values, any one-dimensional grid.
// fold_norm       bias'[first + r] = bias[r] + sum_k W[r,k] beta[k], sums[first + r] = sum_k W'[r,k] of the stored W'. bias f32 [rows], beta f32 [inputs], or null.
//                 sums may be null. Launch: one warp a row, blocks of 256. The order of sums is fixed: lane by lane, then the lanes.
// narrow_table    rows of an embedding table, row-major, in the stored type; faults as above. One thread a value, any grid.
// lay_out_exact, fold_exact  the same for f32 weights, row-major: W' [total, inputs].

DEVICE float source_value(const void* source, int type, size_t place) {
    if (type == 1) {
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(((const u16*)source)[place]));
        return value;
    }
    if (type == 2) return __uint_as_float((u32)((const u16*)source)[place] << 16);
    if (type == 3) return (float)((const double*)source)[place];
    return ((const float*)source)[place];
}

// What goes wrong when `value` becomes `stored`.
DEVICE int fault_of(float value, float stored) { return !is_finite(value) ? 1 : !is_finite(stored) ? 2 : 0; }

extern "C" __global__ void lay_out_weight(const void* __restrict__ source, int type, const float* __restrict__ gamma, Value* __restrict__ weight,
                                          int rows, int inputs, int first, int total, int* __restrict__ fault) {
    const long long pieces = (long long)rows * (inputs / 8);
    int faults = 0;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < pieces; i += (long long)gridDim.x * blockDim.x) {
        const int row = (int)(i / (inputs / 8));
        const int piece = (int)(i % (inputs / 8));
        u32 words[4];
        for (int pair = 0; pair < 4; pair++) {
            float values[2];
            for (int half = 0; half < 2; half++) {
                const int k = piece * 8 + pair * 2 + half;
                const float value = source_value(source, type, (size_t)row * inputs + k);
                values[half] = gamma == nullptr ? value : value * gamma[k];
                faults |= fault_of(value, widen(narrow(values[half])));
            }
            words[pair] = pack2(values[0], values[1]);
        }
        store16(weight + chunked((size_t)(first + row), (u32)piece, (size_t)total), words[0], words[1], words[2], words[3]);
    }
    if (faults != 0) atomicOr(fault, faults);
}

// `stored(row, k)` is a value of W'.
template <class Stored>
DEVICE void fold(const void* source, int type, const float* bias, const float* beta, float* folded, float* sums, int rows, int inputs, int first,
                 Stored stored) {
    const int row = (int)((blockIdx.x * blockDim.x + threadIdx.x) / 32);
    const int lane = threadIdx.x % 32;
    if (row >= rows) return;
    float shift = 0.f;
    float sum = 0.f;
    for (int k = lane; k < inputs; k += 32) {
        if (beta != nullptr) shift = fmaf(source_value(source, type, (size_t)row * inputs + k), beta[k], shift);
        sum += stored((size_t)(first + row), k);
    }
    shift = warp_sum(shift);
    sum = warp_sum(sum);
    if (lane != 0) return;
    folded[first + row] = (bias == nullptr ? 0.f : bias[row]) + shift;
    if (sums != nullptr) sums[first + row] = sum;
}

extern "C" __global__ void fold_norm(const void* __restrict__ source, int type, const float* __restrict__ bias, const float* __restrict__ beta,
                                     const Value* __restrict__ weight, float* __restrict__ folded, float* __restrict__ sums, int rows, int inputs,
                                     int first, int total) {
    const auto stored = [&](size_t row, int k) { return widen(weight[chunked(row, (u32)(k / 8), (size_t)total) + k % 8]); };
    fold(source, type, bias, beta, folded, sums, rows, inputs, first, stored);
}

extern "C" __global__ void narrow_table(const void* __restrict__ source, int type, Value* __restrict__ table, long long values, int* __restrict__ fault) {
    int faults = 0;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < values; i += (long long)gridDim.x * blockDim.x) {
        const float value = source_value(source, type, (size_t)i);
        const Value stored = narrow(value);
        faults |= fault_of(value, widen(stored));
        table[i] = stored;
    }
    if (faults != 0) atomicOr(fault, faults);
}

extern "C" __global__ void lay_out_exact(const void* __restrict__ source, int type, const float* __restrict__ gamma, float* __restrict__ weight,
                                         int rows, int inputs, int first, int* __restrict__ fault) {
    int faults = 0;
    const long long values = (long long)rows * inputs;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < values; i += (long long)gridDim.x * blockDim.x) {
        const float value = source_value(source, type, (size_t)i);
        const float scaled = gamma == nullptr ? value : value * gamma[i % inputs];
        faults |= fault_of(value, scaled);
        weight[(size_t)first * inputs + i] = scaled;
    }
    if (faults != 0) atomicOr(fault, faults);
}

extern "C" __global__ void fold_exact(const void* __restrict__ source, int type, const float* __restrict__ bias, const float* __restrict__ beta,
                                      const float* __restrict__ weight, float* __restrict__ folded, float* __restrict__ sums, int rows, int inputs,
                                      int first) {
    const auto stored = [&](size_t row, int k) { return weight[row * inputs + k]; };
    fold(source, type, bias, beta, folded, sums, rows, inputs, first, stored);
}

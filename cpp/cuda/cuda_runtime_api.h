// The two CUDA types that TensorRT's headers mention, for machines without the CUDA toolkit.
#pragma once

typedef struct CUstream_st *cudaStream_t;
typedef struct CUevent_st *cudaEvent_t;

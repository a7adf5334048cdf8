// Which TensorRT the headers are, in the one number that the shim decides by.
#pragma once

#include <NvInferVersion.h>

// TensorRT for RTX counts its versions anew: its 1.7 has the classes of TensorRT 11.4, but for timing caches, and can build for GPUs
// that are not there. NV_TENSORRT_VERSION is no macro in 8.6, so preprocessor tests need their own number.
#ifdef TRT_MAJOR_RTX
#define FOR_RTX 1
#define API_VERSION 1104
static_assert(NV_TENSORRT_MAJOR == 1 && NV_TENSORRT_MINOR >= 7,
              "trt-embed knows TensorRT for RTX from 1.7 on; set TENSORRT_INCLUDE_DIR to its headers");
#else
#define FOR_RTX 0
#define API_VERSION (NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR)
static_assert(API_VERSION == 806 || NV_TENSORRT_MAJOR == 10 || NV_TENSORRT_MAJOR == 11,
              "trt-embed knows TensorRT 8.6, 10 and 11, and TensorRT for RTX; set TENSORRT_INCLUDE_DIR to the headers of one of them");
#endif

// Shapes between Rust (64 bits) and TensorRT (32 bits in 8.6, 64 later).
#pragma once

#include <NvInfer.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace trt_embed {

inline nvinfer1::Dims to_dims(std::int64_t const *values, std::size_t rank) {
    nvinfer1::Dims dims{};
    if (rank > static_cast<std::size_t>(nvinfer1::Dims::MAX_DIMS)) {
        throw std::runtime_error("a shape has " + std::to_string(rank) + " dimensions, TensorRT takes "
                                 + std::to_string(nvinfer1::Dims::MAX_DIMS));
    }
    dims.nbDims = static_cast<std::int32_t>(rank);
    for (std::size_t i = 0; i < rank; ++i) {
        dims.d[i] = static_cast<std::remove_reference_t<decltype(dims.d[0])>>(values[i]); // 32 bits in 8.6
        if (dims.d[i] != values[i]) {
            throw std::runtime_error("dimension " + std::to_string(values[i]) + " is too large for this TensorRT");
        }
    }
    return dims;
}

inline std::string to_text(nvinfer1::Dims const &dims) {
    std::string text = "[";
    for (std::int32_t i = 0; i < dims.nbDims; ++i) {
        text += (i == 0 ? "" : ", ") + std::to_string(dims.d[i]);
    }
    return text + "]";
}

} // namespace trt_embed

// Loads TensorRT's libraries, loads engines and runs them. (build.cc builds them.)
//
// Compiled against one set of headers, works with libraries of the same major version. Links nothing from TensorRT: its
// classes are reached through their virtual tables, its factories through dlsym.
#include "trt-embed/cpp/tensorrt.h"

#include "trt-embed/cpp/flavour.h"
#include "trt-embed/cpp/log.h"
#include "trt-embed/cpp/shapes.h"

#include "trt-embed/src/tensorrt/library/ffi.rs.h"

#include <dlfcn.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <utility>

namespace trt_embed {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

void *open(std::string const &path) {
    // Lazily bound: the parser's dependencies bring symbols that no transformer graph uses.
    void *const handle = dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL | RTLD_NODELETE);
    if (handle == nullptr) {
        char const *const reason = dlerror();
        throw std::runtime_error(reason != nullptr ? reason : "dlopen gave no reason");
    }
    return handle;
}

template <class Function> Function symbol(void *library, char const *name) {
    void *const address = dlsym(library, name);
    if (address == nullptr) {
        throw std::runtime_error(std::string("has no symbol ") + name);
    }
    return reinterpret_cast<Function>(address);
}

rust::Vec<std::int64_t> from_dims(Dims const &dims) {
    rust::Vec<std::int64_t> values;
    for (std::int32_t i = 0; i < dims.nbDims; ++i) {
        values.push_back(dims.d[i]);
    }
    return values;
}

Element to_element(DataType type) {
    switch (type) {
    case DataType::kFLOAT: return Element::F32;
    case DataType::kHALF: return Element::F16;
    case DataType::kINT8: return Element::I8;
    case DataType::kINT32: return Element::I32;
    case DataType::kBOOL: return Element::Bool;
    case DataType::kUINT8: return Element::U8;
#if API_VERSION >= 1000
    case DataType::kBF16: return Element::Bf16;
    case DataType::kINT64: return Element::I64;
#endif
    default: return Element::Other;
    }
}

/// Bytes of one element; 0 for types that no input or output of this crate has.
std::size_t element_bytes(Element element) {
    switch (element) {
    case Element::F32:
    case Element::I32: return 4;
    case Element::F16:
    case Element::Bf16: return 2;
    case Element::I64: return 8;
    case Element::I8:
    case Element::U8:
    case Element::Bool: return 1;
    default: return 0;
    }
}

cudaStream_t to_stream(std::size_t stream) {
    return reinterpret_cast<cudaStream_t>(stream);
}

} // namespace

Version header_version() {
    return {FOR_RTX != 0, NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, NV_TENSORRT_PATCH};
}

std::unique_ptr<Library> open_library(rust::Str path) {
    return std::make_unique<Library>(std::string(path));
}

std::unique_ptr<ParserLibrary> open_parser(rust::Str path) {
    return std::make_unique<ParserLibrary>(std::string(path));
}

Library::Library(std::string const &path) {
    void *const handle = open(path);
    auto const get_version = symbol<std::int32_t (*)()>(handle, "getInferLibVersion");
    raw_version_ = get_version();
    Dl_info info{};
    bool const known = dladdr(reinterpret_cast<void *>(get_version), &info) != 0 && info.dli_fname != nullptr;
    path_ = known ? info.dli_fname : path;
    create_builder_ = symbol<Factory>(handle, "createInferBuilder_INTERNAL");
    create_runtime_ = symbol<Factory>(handle, "createInferRuntime_INTERNAL");
}

std::int32_t Library::raw_version() const {
    return raw_version_;
}

rust::String Library::path() const {
    return rust::String::lossy(path_);
}

std::unique_ptr<Runtime> Library::create_runtime() const {
    Capture capture;
    auto runtime = capture.require(static_cast<nvinfer1::IRuntime *>(create_runtime_(&logger(), NV_TENSORRT_VERSION)),
                                   "createInferRuntime");
    return std::make_unique<Runtime>(std::move(runtime));
}

std::unique_ptr<Builder> Library::create_builder() const {
    Capture capture;
    auto builder = capture.require(static_cast<nvinfer1::IBuilder *>(create_builder_(&logger(), NV_TENSORRT_VERSION)),
                                   "createInferBuilder");
    return std::make_unique<Builder>(std::move(builder));
}

ParserLibrary::ParserLibrary(std::string const &path) {
    create_parser_ = symbol<decltype(create_parser_)>(open(path), "createNvOnnxParser_INTERNAL");
}

Runtime::Runtime(std::unique_ptr<nvinfer1::IRuntime> runtime) : runtime_(std::move(runtime)) {}

std::unique_ptr<Engine> Runtime::deserialize(rust::Slice<std::uint8_t const> plan) const {
    Capture capture;
    auto engine = capture.require(runtime_->deserializeCudaEngine(plan.data(), plan.size()), "deserializeCudaEngine");
    return std::make_unique<Engine>(std::move(engine));
}

bool Runtime::is_for_another_gpu(rust::Slice<std::uint8_t const> plan) const {
#if FOR_RTX
    if (plan.size() < static_cast<std::size_t>(std::max<std::int64_t>(runtime_->getEngineHeaderSize(), 0))) {
        return false;
    }
    Expected const refusal;
    std::uint64_t reasons = 0;
    auto const validity = runtime_->getEngineValidity(plan.data(), static_cast<std::int64_t>(plan.size()), &reasons);
    auto const wrong_gpu = static_cast<std::uint64_t>(nvinfer1::EngineInvalidityDiagnostics::kUNSUPPORTED_CC);
    return validity == nvinfer1::EngineValidity::kINVALID && (reasons & wrong_gpu) != 0;
#else
    static_cast<void>(plan);
    return false;
#endif
}

Engine::Engine(std::unique_ptr<nvinfer1::ICudaEngine> engine) : engine_(std::move(engine)) {
#if FOR_RTX
    Capture capture;
    auto const config = capture.require(engine_->createRuntimeConfig(), "createRuntimeConfig");
    compiled_ = std::make_shared<CompiledKernels>();
    compiled_->cache = capture.require(config->createRuntimeCache(), "createRuntimeCache");
#endif
}

rust::Vec<IoTensor> Engine::io() const {
    rust::Vec<IoTensor> tensors;
    for (std::int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
        char const *const name = engine_->getIOTensorName(i);
        char const *const format = engine_->getTensorFormatDesc(name);
        IoTensor tensor;
        tensor.name = rust::String::lossy(name);
        tensor.is_input = engine_->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
        tensor.on_host = engine_->getTensorLocation(name) == nvinfer1::TensorLocation::kHOST;
        tensor.element = to_element(engine_->getTensorDataType(name));
        tensor.shape = from_dims(engine_->getTensorShape(name));
        tensor.linear = engine_->getTensorFormat(name) == nvinfer1::TensorFormat::kLINEAR;
        tensor.format = rust::String::lossy(format != nullptr ? format : "");
        tensors.push_back(std::move(tensor));
    }
    return tensors;
}

rust::Vec<InputRange> Engine::profiles() const {
    using nvinfer1::OptProfileSelector;
    rust::Vec<InputRange> ranges;
    for (std::int32_t profile = 0; profile < engine_->getNbOptimizationProfiles(); ++profile) {
        for (std::int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
            char const *const name = engine_->getIOTensorName(i);
            if (engine_->getTensorIOMode(name) != nvinfer1::TensorIOMode::kINPUT) {
                continue;
            }
            auto const bound = [&](OptProfileSelector which) {
                return from_dims(engine_->getProfileShape(name, profile, which));
            };
            InputRange range;
            range.profile = static_cast<std::uint32_t>(profile);
            range.tensor = rust::String::lossy(name);
            range.min = bound(OptProfileSelector::kMIN);
            range.opt = bound(OptProfileSelector::kOPT);
            range.max = bound(OptProfileSelector::kMAX);
            ranges.push_back(std::move(range));
        }
    }
    return ranges;
}

std::uint32_t Engine::profile_count() const {
    return static_cast<std::uint32_t>(std::max(engine_->getNbOptimizationProfiles(), 0));
}

std::uint32_t Engine::layer_count() const {
    return static_cast<std::uint32_t>(std::max(engine_->getNbLayers(), 0));
}

std::uint64_t Engine::scratch_bytes(std::uint32_t profile) const {
    if (profile >= profile_count()) {
        throw std::runtime_error("profile " + std::to_string(profile) + " of " + std::to_string(profile_count()));
    }
    auto const index = static_cast<std::int32_t>(profile);
#if API_VERSION >= 1001
    return static_cast<std::uint64_t>(std::max<std::int64_t>(engine_->getDeviceMemorySizeForProfileV2(index), 0));
#elif API_VERSION >= 1000
    return engine_->getDeviceMemorySizeForProfile(index);
#else
    static_cast<void>(index);
    return engine_->getDeviceMemorySize(); // the largest profile's
#endif
}

rust::String Engine::layers_json() const {
    Capture capture;
    auto const inspector = capture.require(engine_->createEngineInspector(), "createEngineInspector");
    char const *const json = inspector->getEngineInformation(nvinfer1::LayerInformationFormat::kJSON); // the inspector's
    if (json == nullptr) {
        capture.fail("getEngineInformation");
    }
    return rust::String::lossy(json);
}

std::unique_ptr<Context> Engine::create_context(Scratch scratch) const {
    Capture capture;
    bool const given = scratch == Scratch::Given;
    std::shared_ptr<void const> configuration;
#if API_VERSION >= 1000
    using Strategy = nvinfer1::ExecutionContextAllocationStrategy;
    Strategy const strategy = given ? Strategy::kUSER_MANAGED : Strategy::kSTATIC;
#endif
#if FOR_RTX
    std::shared_ptr<nvinfer1::IRuntimeConfig> const config(capture.require(engine_->createRuntimeConfig(), "createRuntimeConfig"));
    config->setExecutionContextAllocationStrategy(strategy);
    // Kernels of a shape are compiled at its first run, before it is captured or timed, and not in the background, where a later run
    // would compute with others. This crate captures graphs itself.
    config->setDynamicShapesKernelSpecializationStrategy(nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
    std::lock_guard<std::mutex> const guard(compiled_->mutex);
    if (!config->setCudaGraphStrategy(nvinfer1::CudaGraphStrategy::kDISABLED) || !config->setRuntimeCache(*compiled_->cache)) {
        capture.fail("the runtime's configuration was refused");
    }
    auto context = capture.require(engine_->createExecutionContext(config.get()), "createExecutionContext");
    configuration = config;
#elif API_VERSION >= 1000
    auto context = capture.require(engine_->createExecutionContext(strategy), "createExecutionContext");
#else
    auto context = capture.require(
        given ? engine_->createExecutionContextWithoutDeviceMemory() : engine_->createExecutionContext(), "createExecutionContext");
#endif
    return std::make_unique<Context>(*engine_, compiled_, std::move(configuration), std::move(context));
}

bool Engine::load_kernels(rust::Slice<std::uint8_t const> bytes) const {
#if FOR_RTX
    Expected const refusal;
    std::lock_guard<std::mutex> const guard(compiled_->mutex);
    return compiled_->cache->deserialize(bytes.data(), bytes.size());
#else
    static_cast<void>(bytes);
    return false;
#endif
}

rust::Vec<std::uint8_t> Engine::kernels() const {
    rust::Vec<std::uint8_t> bytes;
#if FOR_RTX
    Capture capture;
    std::lock_guard<std::mutex> const guard(compiled_->mutex);
    auto const memory = capture.require(compiled_->cache->serialize(), "serialize the compiled kernels");
    auto const *const first = static_cast<std::uint8_t const *>(memory->data());
    bytes.reserve(memory->size());
    std::copy(first, first + memory->size(), std::back_inserter(bytes));
#endif
    return bytes;
}

void LayerTimes::reportLayerTime(char const *name, float milliseconds) noexcept {
    try {
        times.emplace_back(name, milliseconds);
    } catch (...) {
        // Out of memory: a missing row, not a broken inference.
    }
}

Context::Context(nvinfer1::ICudaEngine &engine, std::shared_ptr<CompiledKernels> compiled,
                 std::shared_ptr<void const> configuration, std::unique_ptr<nvinfer1::IExecutionContext> context)
    : engine_(engine), capacities_(static_cast<std::size_t>(std::max(engine.getNbIOTensors(), 0))), compiled_(std::move(compiled)),
      configuration_(std::move(configuration)), context_(std::move(context)) {}

char const *Context::name(std::uint32_t tensor) const {
    if (tensor >= capacities_.size()) {
        throw std::runtime_error("tensor " + std::to_string(tensor) + " of " + std::to_string(capacities_.size()));
    }
    return engine_.getIOTensorName(static_cast<std::int32_t>(tensor));
}

std::unique_lock<std::mutex> Context::lock_kernels() const {
    return compiled_ != nullptr ? std::unique_lock<std::mutex>(compiled_->mutex) : std::unique_lock<std::mutex>();
}

void Context::set_scratch(std::size_t address, std::size_t bytes) {
    void *const memory = reinterpret_cast<void *>(address);
#if API_VERSION >= 1001
    context_->setDeviceMemoryV2(memory, static_cast<std::int64_t>(bytes));
#else
    static_cast<void>(bytes);
    context_->setDeviceMemory(memory);
#endif
}

void Context::set_profile(std::uint32_t profile, std::size_t stream) {
    Capture capture;
    auto const lock = lock_kernels();
    if (!context_->setOptimizationProfileAsync(static_cast<std::int32_t>(profile), to_stream(stream))) {
        capture.fail("profile " + std::to_string(profile) + " was refused");
    }
}

void Context::set_input_shape(std::uint32_t tensor, rust::Slice<std::int64_t const> shape) {
    Capture capture;
    Dims const dims = to_dims(shape.data(), shape.size());
    auto const lock = lock_kernels();
    if (!context_->setInputShape(name(tensor), dims)) {
        capture.fail(std::string("input ") + name(tensor) + " refused the shape " + to_text(dims));
    }
}

rust::Vec<std::int64_t> Context::shape(std::uint32_t tensor) const {
    return from_dims(context_->getTensorShape(name(tensor)));
}

void Context::set_address(std::uint32_t tensor, std::size_t address, std::size_t bytes) {
    Capture capture;
    char const *const which = name(tensor);
    if (engine_.getTensorLocation(which) == nvinfer1::TensorLocation::kHOST) {
        throw std::runtime_error(std::string("tensor ") + which + " is read on the host; an encoder's tensors are on the device");
    }
    if (!context_->setTensorAddress(which, reinterpret_cast<void *>(address))) {
        capture.fail(std::string("the address of ") + which + " was refused");
    }
    capacities_[tensor] = bytes;
}

void Context::enqueue(std::size_t stream) {
    Capture capture;
    for (std::uint32_t tensor = 0; tensor < capacities_.size(); ++tensor) {
        char const *const which = name(tensor);
        Dims const dims = context_->getTensorShape(which);
        std::size_t needed = element_bytes(to_element(engine_.getTensorDataType(which)));
        bool known = needed > 0 && dims.nbDims >= 0;
        for (std::int32_t i = 0; i < dims.nbDims; ++i) {
            known = known && dims.d[i] >= 0
                && !__builtin_mul_overflow(needed, static_cast<std::size_t>(dims.d[i]), &needed);
        }
        if (!known) {
            capture.fail(std::string("the size of ") + which + " " + to_text(dims) + " is not known: set every input shape first");
        }
        if (needed > capacities_[tensor]) {
            throw std::runtime_error(std::string("tensor ") + which + " " + to_text(dims) + " needs " + std::to_string(needed)
                                     + " bytes, its memory has " + std::to_string(capacities_[tensor]));
        }
    }
    auto const lock = lock_kernels();
    if (!context_->enqueueV3(to_stream(stream))) {
        capture.fail("enqueueV3");
    }
}

rust::Vec<LayerTime> Context::enqueue_profiled(std::size_t stream) {
    // Never detached again: 8.6 refuses a null profiler.
    context_->setProfiler(&times_);
    context_->setEnqueueEmitsProfile(true); // enqueue waits and reports
    times_.times.clear();
    enqueue(stream);
    rust::Vec<LayerTime> rows;
    for (auto const &[layer, milliseconds] : times_.times) {
        rows.push_back(LayerTime{rust::String::lossy(layer), milliseconds});
    }
    return rows;
}

} // namespace trt_embed

// What src/tensorrt/library/ffi.rs may call: TensorRT's builder, parser, runtime, engine and context behind small classes.
//
// Every failure is a std::exception whose text ends with what TensorRT logged; the bridge makes it an `Err`.
// Nothing here outlives what it borrows by itself: the Rust owners keep runtime, engine and context in that order.
#pragma once

#include "rust/cxx.h"
#include "trt-embed/cpp/flavour.h"

#include <NvInfer.h>
#include <NvOnnxParser.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace trt_embed {

// Defined by the bridge.
struct BuildRequest;
struct BuildWatch;
struct Capability;
struct InputRange;
struct IoTensor;
struct LayerTime;
struct Version;
enum class Scratch : std::uint8_t;

class Builder;
class Context;
class Engine;
class ParserLibrary;
class Plan;
class Runtime;

/// A loaded libnvinfer. Never unloaded: TensorRT keeps threads and static objects.
class Library {
public:
    explicit Library(std::string const &path);

    /// What `getInferLibVersion` says.
    std::int32_t raw_version() const;
    /// The file that the loader chose.
    rust::String path() const;
    std::unique_ptr<Runtime> create_runtime() const;
    std::unique_ptr<Builder> create_builder() const;

private:
    using Factory = void *(*)(void *logger, std::int32_t version);

    std::int32_t raw_version_{};
    std::string path_;
    Factory create_builder_{};
    Factory create_runtime_{};
};

/// A loaded libnvonnxparser. Only building needs it.
class ParserLibrary {
public:
    explicit ParserLibrary(std::string const &path);

private:
    friend class Builder;

    void *(*create_parser_)(void *network, void *logger, int version){};
};

/// A built engine, serialised, and the timing cache after its build.
class Plan {
public:
    Plan(std::unique_ptr<nvinfer1::IHostMemory> plan, std::unique_ptr<nvinfer1::IHostMemory> timing_cache);

    rust::Slice<std::uint8_t const> bytes() const;
    rust::Slice<std::uint8_t const> timing_cache() const;

private:
    std::unique_ptr<nvinfer1::IHostMemory> plan_;
    std::unique_ptr<nvinfer1::IHostMemory> timing_cache_;
};

/// Builds one engine after another, on one thread.
class Builder {
public:
    explicit Builder(std::unique_ptr<nvinfer1::IBuilder> builder);

    /// One at a time in a process: concurrent work spoils the timing of tactics.
    std::unique_ptr<Plan> build(ParserLibrary const &parser, BuildRequest const &request, BuildWatch const &watch) const;

private:
    std::unique_ptr<nvinfer1::IBuilder> builder_;
};

class Runtime {
public:
    explicit Runtime(std::unique_ptr<nvinfer1::IRuntime> runtime);

    /// Safe from several threads at once (TensorRT's rule for deserialising).
    std::unique_ptr<Engine> deserialize(rust::Slice<std::uint8_t const> plan) const;
    /// Whether `plan` was built for other GPUs than the one that is here. Only TensorRT for RTX tells; false elsewhere.
    bool is_for_another_gpu(rust::Slice<std::uint8_t const> plan) const;

private:
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
};

/// The kernels that TensorRT for RTX compiles on the GPU for an engine's contexts. It does not say whether threads may share them, so each call that
/// may compile holds the lock.
struct CompiledKernels {
    std::mutex mutex;
#if FOR_RTX
    std::unique_ptr<nvinfer1::IRuntimeCache> cache;
#endif
};

class Engine {
public:
    explicit Engine(std::unique_ptr<nvinfer1::ICudaEngine> engine);

    rust::Vec<IoTensor> io() const;
    /// One entry for each profile and input, profiles first.
    rust::Vec<InputRange> profiles() const;
    std::uint32_t profile_count() const;
    std::uint32_t layer_count() const;
    /// Bytes of scratch that a context at `profile` needs.
    std::uint64_t scratch_bytes(std::uint32_t profile) const;
    /// The engine inspector's JSON.
    rust::String layers_json() const;
    /// Safe from several threads at once (TensorRT's rule for creating contexts).
    std::unique_ptr<Context> create_context(Scratch scratch) const;
    /// Takes the kernels that an earlier process compiled for this plan; false where they are another version's, driver's or GPU's, and
    /// where kernels are not compiled at load at all (all but TensorRT for RTX).
    bool load_kernels(rust::Slice<std::uint8_t const> bytes) const;
    /// The kernels that contexts of this engine have compiled, for `load_kernels`; empty where none are compiled at load.
    rust::Vec<std::uint8_t> kernels() const;

private:
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::shared_ptr<CompiledKernels> compiled_; // with TensorRT for RTX alone
};

/// Collects the time of each layer.
class LayerTimes final : public nvinfer1::IProfiler {
public:
    void reportLayerTime(char const *name, float milliseconds) noexcept override;

    std::vector<std::pair<std::string, float>> times;
};

/// One execution context. Used by one thread at a time, always with the same stream.
class Context {
public:
    /// `compiled` and `configuration` are what the context was made with, where it was, and live as long.
    Context(nvinfer1::ICudaEngine &engine, std::shared_ptr<CompiledKernels> compiled, std::shared_ptr<void const> configuration,
            std::unique_ptr<nvinfer1::IExecutionContext> context);

    /// Device memory for intermediate results, for a context made with `Scratch::Given`.
    void set_scratch(std::size_t address, std::size_t bytes);
    /// Asynchronous on `stream`: synchronise it, then set every input shape again.
    void set_profile(std::uint32_t profile, std::size_t stream);
    void set_input_shape(std::uint32_t tensor, rust::Slice<std::int64_t const> shape);
    /// Shape at the present input shapes; -1 where TensorRT does not know it.
    rust::Vec<std::int64_t> shape(std::uint32_t tensor) const;
    void set_address(std::uint32_t tensor, std::size_t address, std::size_t bytes);
    /// Refuses where a tensor's memory is smaller than its present shape.
    void enqueue(std::size_t stream);
    /// Enqueues once with TensorRT's profiler attached, which stays attached; waits for the result.
    rust::Vec<LayerTime> enqueue_profiled(std::size_t stream);

private:
    char const *name(std::uint32_t tensor) const;
    /// Held by calls that may compile kernels; of nothing where none are compiled.
    std::unique_lock<std::mutex> lock_kernels() const;

    nvinfer1::ICudaEngine &engine_;
    std::vector<std::size_t> capacities_; // bytes behind each tensor's address
    LayerTimes times_;                    // before the context: it must outlive it
    std::shared_ptr<CompiledKernels> compiled_;
    std::shared_ptr<void const> configuration_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
};

/// The version of the headers that this file was compiled with.
Version header_version();
/// Compute capabilities that engines can be built for where no such GPU is there; none with headers that build on the GPU alone.
rust::Vec<Capability> ahead_of_time_capabilities();
std::unique_ptr<Library> open_library(rust::Str path);
std::unique_ptr<ParserLibrary> open_parser(rust::Str path);
/// Ends the process without running what is registered for its end, so that it may be called while other threads build.
[[noreturn]] void end_process(std::int32_t status);

} // namespace trt_embed

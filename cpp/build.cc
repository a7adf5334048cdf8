// Builds engines: an ONNX graph through TensorRT's parser and builder into a serialised plan.
#include "trt-embed/cpp/tensorrt.h"

#include "trt-embed/cpp/flavour.h"
#include "trt-embed/cpp/log.h"
#include "trt-embed/cpp/shapes.h"

#include "trt-embed/src/tensorrt/library/ffi.rs.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <stdexcept>
#include <utility>

namespace trt_embed {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

rust::Slice<std::uint8_t const> to_slice(nvinfer1::IHostMemory const *memory) {
    if (memory == nullptr) {
        return {};
    }
    return {static_cast<std::uint8_t const *>(memory->data()), memory->size()};
}

#if API_VERSION >= 1000
/// Hands a build's phases to Rust. TensorRT calls it from several threads.
class Monitor final : public nvinfer1::IProgressMonitor {
public:
    explicit Monitor(BuildWatch const &watch) : watch_(watch) {}

    void phaseStart(char const *phase, char const *parent, std::int32_t steps) noexcept override {
        watch_.phase_started(rust::String::lossy(phase), rust::String::lossy(parent != nullptr ? parent : ""), steps);
    }
    bool stepComplete(char const *phase, std::int32_t step) noexcept override {
        watch_.step_done(rust::String::lossy(phase), step);
        return !watch_.cancelled();
    }
    void phaseFinish(char const *phase) noexcept override { watch_.phase_finished(rust::String::lossy(phase)); }

private:
    BuildWatch const &watch_;
};
#endif

#if FOR_RTX
struct KnownCapability {
    std::uint32_t major;
    std::uint32_t minor;
    nvinfer1::ComputeCapability value;
};

/// What TensorRT for RTX can build for where no such GPU is there.
constexpr KnownCapability CAPABILITIES[] = {
    {7, 5, nvinfer1::ComputeCapability::kSM75},   {8, 0, nvinfer1::ComputeCapability::kSM80},
    {8, 6, nvinfer1::ComputeCapability::kSM86},   {8, 9, nvinfer1::ComputeCapability::kSM89},
    {12, 0, nvinfer1::ComputeCapability::kSM120}, {12, 1, nvinfer1::ComputeCapability::kSM121},
};
#endif

std::string parser_errors(nvonnxparser::IParser const &parser) {
    std::string text = "the ONNX graph was refused";
    for (std::int32_t i = 0; i < parser.getNbErrors(); ++i) {
        nvonnxparser::IParserError const *const error = parser.getError(i);
        text += "\n  node " + std::to_string(error->node());
#if API_VERSION >= 1000
        auto const add = [&](char const *word) {
            if (word != nullptr && *word != '\0') {
                text += std::string(" ") + word;
            }
        };
        add(error->nodeOperator());
        add(error->nodeName());
#endif
        text += ": " + without_last_cuda_error(error->desc() != nullptr ? error->desc() : "no reason given");
    }
    return text;
}

bool has_half(nvinfer1::INetworkDefinition const &network) {
    for (std::int32_t i = 0; i < network.getNbLayers(); ++i) {
        nvinfer1::ILayer const *const layer = network.getLayer(i);
        for (std::int32_t j = 0; j < layer->getNbOutputs(); ++j) {
            if (layer->getOutput(j)->getType() == DataType::kHALF) {
                return true;
            }
        }
    }
    return false;
}

bool is_quantised(nvinfer1::INetworkDefinition const &network) {
    for (std::int32_t i = 0; i < network.getNbLayers(); ++i) {
        if (network.getLayer(i)->getType() == nvinfer1::LayerType::kQUANTIZE) {
            return true;
        }
    }
    return false;
}

/// fp32 means exact fp32: TF32, which TensorRT allows by itself, keeps 10 bits of mantissa.
void set_arithmetic(nvinfer1::IBuilderConfig &config, nvinfer1::INetworkDefinition &network, Arithmetic arithmetic) {
    config.clearFlag(nvinfer1::BuilderFlag::kTF32);
    bool const wants_int8 = arithmetic == Arithmetic::Int8;
    bool const wants_half = arithmetic == Arithmetic::Fp16 || wants_int8;
    if (is_quantised(network) != wants_int8) {
        throw std::runtime_error(wants_int8 ? "the graph has no QuantizeLinear: int8 wants a graph with Q/DQ pairs"
                                            : "the graph is quantised: build it with --precision int8");
    }
    bool const graph_has_half = has_half(network);
    if (graph_has_half && !wants_half) {
        throw std::runtime_error("the graph holds fp16 tensors: build it with --precision fp16, or export it as fp32");
    }
#if API_VERSION < 1000
    if (wants_half) {
        config.setFlag(nvinfer1::BuilderFlag::kFP16);
        if (wants_int8) {
            config.setFlag(nvinfer1::BuilderFlag::kINT8);
        }
        // Outputs keep the graph's type unless told otherwise, at the price of a conversion after the last layer.
        for (std::int32_t i = 0; i < network.getNbOutputs(); ++i) {
            nvinfer1::ITensor *const output = network.getOutput(i);
            if (output->getType() == DataType::kFLOAT) {
                output->setType(DataType::kHALF);
            }
        }
    }
#else
    // Strongly typed: the types of the graph are the types of the engine.
    if (wants_half && !graph_has_half) {
        throw std::runtime_error("this TensorRT takes precisions from the graph, and this graph is fp32: export it with --precision fp16");
    }
#endif
}

#if API_VERSION < 1000
/// Lets the float layers whose name contains one of `names` compute in fp32, whatever is faster.
void keep_fp32(nvinfer1::IBuilderConfig &config, nvinfer1::INetworkDefinition const &network, rust::Vec<rust::String> const &names) {
    for (rust::String const &wanted : names) {
        std::string const part(wanted);
        bool found = false;
        for (std::int32_t i = 0; i < network.getNbLayers(); ++i) {
            nvinfer1::ILayer *const layer = network.getLayer(i);
            if (std::string(layer->getName()).find(part) == std::string::npos || layer->getNbOutputs() == 0
                || layer->getType() == nvinfer1::LayerType::kCONSTANT || layer->getOutput(0)->getType() != DataType::kFLOAT) {
                continue;
            }
            layer->setPrecision(DataType::kFLOAT);
            found = true;
        }
        if (!found) {
            throw std::runtime_error("no float layer's name contains \"" + part + "\"; `trt-embed profile` shows the names");
        }
    }
    if (!names.empty()) {
        config.setFlag(nvinfer1::BuilderFlag::kOBEY_PRECISION_CONSTRAINTS);
    }
}
#endif

void add_profiles(nvinfer1::IBuilder &builder, nvinfer1::IBuilderConfig &config, nvinfer1::INetworkDefinition const &network,
                  rust::Vec<Range> const &profiles, Capture &capture) {
    using nvinfer1::OptProfileSelector;
    for (Range const &range : profiles) {
        nvinfer1::IOptimizationProfile *const profile = builder.createOptimizationProfile(); // the builder's
        if (profile == nullptr) {
            capture.fail("createOptimizationProfile");
        }
        for (std::int32_t i = 0; i < network.getNbInputs(); ++i) {
            nvinfer1::ITensor const *const input = network.getInput(i);
            Dims const declared = input->getDimensions();
            if (declared.nbDims != 2) {
                throw std::runtime_error(std::string("input ") + input->getName() + " has shape " + to_text(declared)
                                         + ", an encoder's inputs are [batch, seq]");
            }
            std::pair<OptProfileSelector, std::array<std::int64_t, 2> const &> const bounds[] = {
                {OptProfileSelector::kMIN, range.min}, {OptProfileSelector::kOPT, range.opt}, {OptProfileSelector::kMAX, range.max}};
            for (auto const &[selector, shape] : bounds) {
                if (!profile->setDimensions(input->getName(), selector, to_dims(shape.data(), shape.size()))) {
                    capture.fail(std::string("input ") + input->getName() + " " + to_text(declared) + " refused the shape "
                                 + to_text(to_dims(shape.data(), shape.size())));
                }
            }
        }
        if (!profile->isValid() || config.addOptimizationProfile(profile) < 0) {
            capture.fail("the optimisation profile up to " + to_text(to_dims(range.max.data(), 2)) + " was refused");
        }
    }
}

#if FOR_RTX
/// Builds for GPUs of these compute capabilities; where there are none, for all that the library knows and newer ones, which takes a larger plan.
void set_capabilities(nvinfer1::IBuilderConfig &config, rust::Vec<Capability> const &wanted, Capture &capture) {
    if (!config.setNbComputeCapabilities(static_cast<std::int32_t>(wanted.size()))) {
        capture.fail("setNbComputeCapabilities");
    }
    std::int32_t place = 0;
    for (Capability const &one : wanted) {
        std::string const name = std::to_string(one.major) + "." + std::to_string(one.minor);
        auto const found = std::find_if(std::begin(CAPABILITIES), std::end(CAPABILITIES), [&](KnownCapability const &known) {
            return known.major == one.major && known.minor == one.minor;
        });
        if (found == std::end(CAPABILITIES)) {
            throw std::runtime_error("compute capability " + name + " is not known to these headers");
        }
        if (!config.setComputeCapability(found->value, place++)) {
            capture.fail("compute capability " + name + " was refused");
        }
    }
}
#else
/// Attaches the given cache, or an empty one where TensorRT refuses it: one of another version or GPU, and with 8.6 often its own.
std::unique_ptr<nvinfer1::ITimingCache> attach_timing_cache(nvinfer1::IBuilderConfig &config,
                                                            rust::Slice<std::uint8_t const> bytes) {
    Expected const refusal;
    for (std::size_t const size : {bytes.size(), std::size_t{0}}) {
        std::unique_ptr<nvinfer1::ITimingCache> cache(config.createTimingCache(size == 0 ? nullptr : bytes.data(), size));
        if (cache != nullptr && config.setTimingCache(*cache, false)) {
            return cache;
        }
    }
    return nullptr;
}
#endif

} // namespace

rust::Vec<Capability> ahead_of_time_capabilities() {
    rust::Vec<Capability> known;
#if FOR_RTX
    for (KnownCapability const &one : CAPABILITIES) {
        known.push_back(Capability{one.major, one.minor});
    }
#endif
    return known;
}

Plan::Plan(std::unique_ptr<nvinfer1::IHostMemory> plan, std::unique_ptr<nvinfer1::IHostMemory> timing_cache)
    : plan_(std::move(plan)), timing_cache_(std::move(timing_cache)) {}

rust::Slice<std::uint8_t const> Plan::bytes() const {
    return to_slice(plan_.get());
}

rust::Slice<std::uint8_t const> Plan::timing_cache() const {
    return to_slice(timing_cache_.get());
}

/// Destroys a parser. 8.6.1 added virtual functions before IParser's destructor, so that `delete` compiled with its header would call
/// past the end of 8.6.0's table; `destroy`, deprecated but older, has one place in both.
struct DestroyParser {
    void operator()(nvonnxparser::IParser *parser) const {
#if API_VERSION < 1000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
        parser->destroy();
#pragma GCC diagnostic pop
#else
        delete parser;
#endif
    }
};

Builder::Builder(std::unique_ptr<nvinfer1::IBuilder> builder) : builder_(std::move(builder)) {}

std::unique_ptr<Plan> Builder::build(ParserLibrary const &parser_library, BuildRequest const &request, BuildWatch const &watch) const {
    Capture capture(Capture::Reach::kBuild);
#if API_VERSION >= 1000
    Monitor monitor(watch); // the first: it must outlive all that uses it
#else
    static_cast<void>(watch); // TensorRT 8.6 neither reports progress nor can be stopped
#endif
    nvinfer1::NetworkDefinitionCreationFlags flags = 0;
#if API_VERSION < 1000
    flags = 1U << static_cast<std::uint32_t>(nvinfer1::NetworkDefinitionCreationFlag::kEXPLICIT_BATCH);
#elif API_VERSION < 1100
    flags = 1U << static_cast<std::uint32_t>(nvinfer1::NetworkDefinitionCreationFlag::kSTRONGLY_TYPED); // always so in 11
#endif
    // Destroyed in reverse order. The parser owns weights that the network points at, so it lives through the build.
    auto const network = capture.require(builder_->createNetworkV2(flags), "createNetworkV2");
    auto const config = capture.require(builder_->createBuilderConfig(), "createBuilderConfig");
    std::unique_ptr<nvonnxparser::IParser, DestroyParser> const parser(
        capture
            .require(static_cast<nvonnxparser::IParser *>(
                         parser_library.create_parser_(network.get(), &logger(), NV_ONNX_PARSER_VERSION)),
                     "createNvOnnxParser")
            .release());

    std::string const path(request.onnx_path);
    if (!parser->parse(request.onnx.data(), request.onnx.size(), path.empty() ? nullptr : path.c_str())) {
        capture.fail(parser_errors(*parser));
    }
    add_profiles(*builder_, *config, *network, request.profiles, capture);
    set_arithmetic(*config, *network, request.arithmetic);
#if API_VERSION < 1000
    keep_fp32(*config, *network, request.fp32_layers);
#endif
    if (request.workspace_bytes > 0) {
        config->setMemoryPoolLimit(nvinfer1::MemoryPoolType::kWORKSPACE, request.workspace_bytes);
    }
    if (request.optimization_level >= 0) {
        config->setBuilderOptimizationLevel(request.optimization_level);
    }
    if (request.auxiliary_streams >= 0) {
        config->setMaxAuxStreams(request.auxiliary_streams);
    }
    config->setProfilingVerbosity(request.detailed_layers ? nvinfer1::ProfilingVerbosity::kDETAILED
                                                          : nvinfer1::ProfilingVerbosity::kLAYER_NAMES_ONLY);
#if API_VERSION < 1000
    // Without it a profile serves one context at a time. Always on from 10.
    config->setPreviewFeature(nvinfer1::PreviewFeature::kPROFILE_SHARING_0806, true);
#else
    config->setProgressMonitor(&monitor);
#endif
#if FOR_RTX
    // Nothing is timed, so there is no timing cache either.
    set_capabilities(*config, request.capabilities, capture);
#else
    auto const timing_cache = attach_timing_cache(*config, request.timing_cache);
#endif

    // Null also for a build that the monitor stopped.
    auto plan = capture.require(builder_->buildSerializedNetwork(*network, *config), "buildSerializedNetwork");
    std::unique_ptr<nvinfer1::IHostMemory> timings;
#if !FOR_RTX
    if (auto const *const filled = config->getTimingCache()) {
        timings.reset(filled->serialize());
    }
#endif
    return std::make_unique<Plan>(std::move(plan), std::move(timings));
}

void end_process(std::int32_t status) {
    ::_exit(status);
}

} // namespace trt_embed

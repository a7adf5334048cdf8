// The process-wide logger, and who keeps which message.
#include "trt-embed/cpp/log.h"

#include "trt-embed/src/tensorrt/library/ffi.rs.h"

#include <algorithm>
#include <stdexcept>
#include <string_view>

namespace trt_embed {
namespace {

constexpr std::string_view LAST_CUDA_ERROR = "[checkMacros.cpp::catchCudaError";

} // namespace

thread_local Capture *Capture::on_thread = nullptr;
std::mutex Capture::build_mutex;
Capture *Capture::of_build = nullptr;

Capture::Capture(Reach reach) : outer_(on_thread), reach_(reach) {
    on_thread = this;
    if (reach_ == Reach::kBuild) {
        std::lock_guard<std::mutex> guard(build_mutex);
        of_build = this;
    }
}

Capture::~Capture() {
    on_thread = outer_;
    if (reach_ == Reach::kBuild) {
        std::lock_guard<std::mutex> guard(build_mutex);
        of_build = nullptr;
    }
}

void Capture::add(bool is_error, char const *message) {
    if (on_thread != nullptr) {
        on_thread->append(is_error, message);
        return;
    }
    std::lock_guard<std::mutex> guard(build_mutex);
    if (of_build != nullptr) {
        of_build->append(is_error, message);
    }
}

void Capture::fail(std::string what) {
    std::lock_guard<std::mutex> guard(mutex_);
    // Warnings often name the cause where no error was logged.
    std::string const &said = errors_.empty() ? warnings_ : errors_;
    throw std::runtime_error(what + (said.empty() ? "; TensorRT logged no reason" : ":" + said));
}

void Capture::append(bool is_error, char const *message) {
    std::lock_guard<std::mutex> guard(mutex_);
    std::string &said = is_error ? errors_ : warnings_;
    // The first messages name the cause; a build can log thousands.
    if (said.size() < 8192) {
        std::string const line = std::string("\n  ") + message;
        said = said.empty() ? line : without_last_cuda_error(said + line);
    }
}

std::string without_last_cuda_error(std::string const &message) {
    std::string kept;
    std::size_t start = 0;
    while (start < message.size()) {
        std::size_t const end = std::min(message.find('\n', start), message.size() - 1) + 1;
        std::size_t const word = std::min(message.find_first_not_of(' ', start), end);
        if (kept.find_first_not_of('\n') == std::string::npos || message.compare(word, LAST_CUDA_ERROR.size(), LAST_CUDA_ERROR) != 0) {
            kept.append(message, start, end - start);
        }
        start = end;
    }
    return kept;
}

thread_local bool Expected::on_thread = false;

Expected::Expected() {
    on_thread = true;
}

Expected::~Expected() {
    on_thread = false;
}

namespace {

class Logger final : public nvinfer1::ILogger {
public:
    void log(Severity severity, nvinfer1::AsciiChar const *message) noexcept override {
        try {
            if (Expected::on_thread) {
                severity = Severity::kVERBOSE;
            }
            bool const is_error = severity == Severity::kERROR || severity == Severity::kINTERNAL_ERROR;
            if (is_error || severity == Severity::kWARNING) {
                Capture::add(is_error, message);
            }
            trt_embed::Severity const level = is_error ? trt_embed::Severity::Error
                : severity == Severity::kWARNING       ? trt_embed::Severity::Warning
                : severity == Severity::kINFO          ? trt_embed::Severity::Information
                                                       : trt_embed::Severity::Verbose;
            if (is_logged(level)) {
                log_message(level, rust::String::lossy(message));
            }
        } catch (...) {
            // Out of memory: the message is lost, the work goes on.
        }
    }
};

} // namespace

nvinfer1::ILogger &logger() {
    static Logger *const instance = new Logger;
    return *instance;
}

} // namespace trt_embed

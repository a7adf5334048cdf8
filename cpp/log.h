// What TensorRT logs: forwarded to Rust's `log`, and kept for the text of a failure.
#pragma once

#include <NvInfer.h>

#include <memory>
#include <mutex>
#include <string>

namespace trt_embed {

/// What TensorRT said while a value of this type lives: on its thread, and for a build also on TensorRT's own threads.
class Capture {
public:
    enum class Reach { kThread, kBuild };

    explicit Capture(Reach reach = Reach::kThread);
    ~Capture();
    Capture(Capture const &) = delete;
    Capture &operator=(Capture const &) = delete;

    /// Gives a message to whoever captures it.
    static void add(bool is_error, char const *message);

    /// Throws `what` with all that was said.
    [[noreturn]] void fail(std::string what);

    /// Takes ownership of `object`, or fails where it is null.
    template <class T> std::unique_ptr<T> require(T *object, char const *what) {
        if (object == nullptr) {
            fail(what);
        }
        return std::unique_ptr<T>(object);
    }

private:
    void append(bool is_error, char const *message);

    static thread_local Capture *on_thread;
    static std::mutex build_mutex;
    static Capture *of_build;

    Capture *outer_;
    Reach reach_;
    std::mutex mutex_;
    std::string errors_;
    std::string warnings_;
};

/// `message` without the lines by which TensorRT for RTX adds to each refusal that CUDA's last call failed: no cause, and true of every call where
/// there is no driver. The first line stays, whatever it is.
std::string without_last_cuda_error(std::string const &message);

/// While a value of this type lives, errors that TensorRT logs on its thread are no faults: neither captured nor logged as errors.
class Expected {
public:
    Expected();
    ~Expected();
    Expected(Expected const &) = delete;
    Expected &operator=(Expected const &) = delete;

    static thread_local bool on_thread;
};

/// TensorRT keeps the first logger it is given for the life of the process, so there is one and it is never destroyed.
nvinfer1::ILogger &logger();

} // namespace trt_embed

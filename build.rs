//! With the feature `tensorrt`: finds TensorRT's headers and compiles the shim in `cpp/`. With `serve`: Rust of `proto/`. Else nothing.

#[cfg(feature = "tensorrt")]
#[path = "cpp/find_headers.rs"]
mod find_headers;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "tensorrt")]
    if let Err(message) = tensorrt() {
        for line in message.lines() {
            println!("cargo::error={line}");
        }
    }
    #[cfg(feature = "serve")]
    if let Err(error) = grpc() {
        println!("cargo::error=proto/tei.proto: {error}");
    }
}

/// Messages, services and, for reflection, the descriptor of the proto.
#[cfg(feature = "serve")]
fn grpc() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_source_info(true).open_file("tei.proto")?;
    let descriptor = std::path::PathBuf::from(std::env::var("OUT_DIR")?).join("tei.bin");
    std::fs::write(descriptor, compiler.encode_file_descriptor_set())?;
    tonic_prost_build::configure().build_transport(false).compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}

#[cfg(feature = "tensorrt")]
fn tensorrt() -> Result<(), String> {
    use std::env;
    use std::path::PathBuf;

    for variable in ["TENSORRT_INCLUDE_DIR", "TENSORRT_ROOT", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    println!("cargo::rerun-if-changed=cpp");
    println!("cargo::rerun-if-changed=src/tensorrt/library/ffi.rs");

    let folder = |variable: &str| env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let usual: Vec<PathBuf> = find_headers::USUAL_FOLDERS.iter().map(PathBuf::from).collect();
    let headers = find_headers::find(folder("TENSORRT_INCLUDE_DIR").as_deref(), folder("TENSORRT_ROOT").as_deref(), &usual)?;
    println!("cargo::rerun-if-changed={}", headers.join("NvInferVersion.h").display());

    let cuda_roots: Vec<PathBuf> =
        [folder("CUDA_HOME"), folder("CUDA_PATH"), Some("/usr/local/cuda".into())].into_iter().flatten().collect();
    let cuda = find_headers::find_cuda(&cuda_roots).unwrap_or_else(|| "cpp/cuda".into());

    let mut build = cxx_build::bridge("src/tensorrt/library/ffi.rs");
    build.files(["cpp/build.cc", "cpp/log.cc", "cpp/tensorrt.cc"]).std("c++17").flag("-Wall").flag("-Wextra");
    for folder in [&headers, &cuda] {
        if find_headers::must_be_named(folder) {
            // As system headers: TensorRT's own deprecations are not warnings about this crate.
            build.flag("-isystem").flag(folder);
        }
    }
    build.try_compile("trt_embed_tensorrt").map_err(|error| error.to_string())
}

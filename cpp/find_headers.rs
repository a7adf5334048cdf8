//! Finds TensorRT's headers for build.rs, and says what to set when they are not there.

use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Where the build looks when neither variable is set, in this order.
pub const USUAL_FOLDERS: [&str; 6] = [
    "/usr/include",
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/local/tensorrt/include",
    "/opt/tensorrt/include",
    "/usr/local/cuda/include",
];

/// Folders that the C++ compiler searches by itself. Naming them again would break its own headers' `#include_next`.
const COMPILER_FOLDERS: [&str; 3] = ["/usr/include", "/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu"];

/// What both TensorRT archives and packages put side by side.
const NEEDED: [&str; 2] = ["NvInfer.h", "NvOnnxParser.h"];

/// The folder with `NvInfer.h` and `NvOnnxParser.h`.
///
/// A variable that is set must lead there: falling back silently would build against another version than the one asked for.
///
/// # Errors
/// A message for the builder's terminal: every folder tried, what it lacks, and what to set.
pub fn find(include_dir: Option<&Path>, root: Option<&Path>, usual: &[PathBuf]) -> Result<PathBuf, String> {
    let candidates: Vec<(&str, PathBuf)> = match (include_dir, root) {
        (Some(folder), _) => vec![("TENSORRT_INCLUDE_DIR", folder.to_path_buf())],
        (None, Some(root)) => vec![("TENSORRT_ROOT/include", root.join("include"))],
        (None, None) => usual.iter().map(|folder| ("", folder.clone())).collect(),
    };
    let mut tried = String::new();
    for (variable, folder) in &candidates {
        let missing: Vec<&str> = NEEDED.into_iter().filter(|name| !folder.join(name).is_file()).collect();
        if missing.is_empty() {
            return Ok(folder.clone());
        }
        let from = if variable.is_empty() { String::new() } else { format!(" ({variable})") };
        // Writing to a String cannot fail.
        let _ = writeln!(tried, "  {}{from}: no {}", folder.display(), missing.join(", no "));
    }
    Err(format!(
        "TensorRT's headers were not found:\n{tried}\
         Set TENSORRT_INCLUDE_DIR to the folder that holds NvInfer.h and NvOnnxParser.h, or TENSORRT_ROOT to the unpacked \
         TensorRT archive. Without TensorRT on this machine, get the headers alone:\n  \
         export TENSORRT_INCLUDE_DIR=\"$(scripts/tensorrt-headers.sh | tail -n 1)\""
    ))
}

/// Whether the compiler must be told about `folder`.
pub fn must_be_named(folder: &Path) -> bool {
    !COMPILER_FOLDERS.iter().any(|known| folder == Path::new(known))
}

/// The CUDA toolkit's include folder, if one is installed. TensorRT's headers want two typedefs of it; `cpp/cuda` has them else.
pub fn find_cuda(roots: &[PathBuf]) -> Option<PathBuf> {
    roots.iter().map(|root| root.join("include")).find(|folder| folder.join("cuda_runtime_api.h").is_file())
}

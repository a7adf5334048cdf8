//! For which GPU kernels are compiled, and of what texts.

use super::shape::Precision;
use crate::cuda::{CudaError, Device, Result};

const PRELUDE: &str = include_str!("../../kernels/prelude.cuh");

/// For which GPU kernels are compiled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Arch {
    /// As NVRTC takes it: `sm_90a`, or `compute_80` for PTX.
    pub target: String,
    /// Whether Hopper's own instructions are there.
    pub hopper: bool,
    /// Whether kernels may start before the one in front has ended.
    pub dependent: bool,
}

impl Arch {
    /// That of `device`; with `forced` (80, of `TRT_EMBED_CUDA_ARCH`) the older one that it stands in for.
    ///
    /// # Errors
    /// [`CudaError::Argument`] for a device before 8.0, and for a forced architecture that is unknown or newer than the device.
    pub fn of(device: &Device, forced: Option<&str>) -> Result<Self> {
        let (major, minor) = device.properties().compute_capability;
        Self::choose(major * 10 + minor, forced)
    }

    fn choose(own: u32, forced: Option<&str>) -> Result<Self> {
        const OLDEST: u32 = 80;
        let refused = |reason: String| Err(CudaError::Argument { call: "choose kernels", reason });
        if own < OLDEST {
            let reason = format!("the GPU has compute capability {}.{}; 8.0 (A100) or newer is needed", own / 10, own % 10);
            return refused(reason);
        }
        match forced {
            None if own == 90 => Ok(Self { target: "sm_90a".to_owned(), hopper: true, dependent: true }),
            None => Ok(Self { target: format!("sm_{own}"), hopper: false, dependent: own >= 90 }),
            Some(text) => match text.parse::<u32>() {
                Ok(arch) if (OLDEST..=own).contains(&arch) => {
                    Ok(Self { target: format!("compute_{arch}"), hopper: false, dependent: arch >= 90 })
                }
                _ => refused(format!("TRT_EMBED_CUDA_ARCH is \"{text}\"; {OLDEST} to {own} can run on this GPU")),
            },
        }
    }
}

/// The engine's kernel files.
const SOURCES: [(&str, &str); 7] = [
    ("load.cu", include_str!("../../kernels/load.cu")),
    ("stream.cu", include_str!("../../kernels/stream.cu")),
    ("linear.cu", include_str!("../../kernels/linear.cu")),
    ("linear_sm90.cu", include_str!("../../kernels/linear_sm90.cu")),
    ("attention.cu", include_str!("../../kernels/attention.cu")),
    ("elementwise.cu", include_str!("../../kernels/elementwise.cu")),
    ("exact.cu", include_str!("../../kernels/exact.cu")),
];

/// Those of few tokens, which are compiled for a model's sizes: what they share, and each class' own.
const LATENCY: &str = include_str!("../../kernels/latency.cu");
const LATENCY_SOURCES: [(&str, &str); 2] = [
    ("latency16.cu", include_str!("../../kernels/latency16.cu")),
    ("latency128.cu", include_str!("../../kernels/latency128.cu")),
];

/// The text of the kernel file `name`, with what it needs in front; the prelude alone where there is no such file.
pub(super) fn native_source(name: &str) -> String {
    let text_of = |sources: &[(&str, &'static str)]| sources.iter().find_map(|(file, text)| (*file == name).then_some(*text));
    match text_of(&LATENCY_SOURCES) {
        Some(text) => format!("{PRELUDE}\n{LATENCY}\n{text}"),
        None => format!("{PRELUDE}\n{}", text_of(&SOURCES).unwrap_or_default()),
    }
}

/// NVRTC's options for kernels of this precision and activation (as the prelude numbers it).
pub(super) fn options(precision: Precision, activation: i32) -> Vec<String> {
    let bf16 = i32::from(precision == Precision::Bf16);
    ["--std=c++17".to_owned(), "-lineinfo".to_owned(), format!("-DBF16={bf16}"), format!("-DACTIVATION={activation}")].to_vec()
}

/// Those of the kernels of a shape besides.
pub(super) fn shape_options(heads: usize, head_size: usize, biased: bool) -> [String; 3] {
    [format!("-DHEADS={heads}"), format!("-DHEAD_SIZE={head_size}"), format!("-DBIAS={}", i32::from(biased))]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::nvrtc::{NEWEST_MAJOR, compile_with_log};

    /// Kernels that may spill so many bytes: more of their blocks on a multiprocessor are worth more, or they need not be fast (exact.cu).
    const MAY_SPILL: [(&str, u32); 3] = [("linear_sm90_pingpong", 20), ("attention", 100), ("linear_exact", 64)];

    /// The kernels of which the compiler's report says that they spill registers, with the bytes.
    fn spills(log: &str) -> Vec<(String, u32)> {
        let mut kernel = String::new();
        let mut found = Vec::new();
        for line in log.lines() {
            if let Some((_, name)) = line.split_once("Compiling entry function '") {
                kernel = name.split('\'').next().unwrap_or_default().to_owned();
            } else if let Some((before, _)) = line.split_once(" bytes spill stores") {
                let bytes = before.rsplit(' ').next().and_then(|bytes| bytes.parse().ok()).expect("a number of bytes");
                if bytes > 0 {
                    found.push((kernel.clone(), bytes));
                }
            }
        }
        found
    }

    #[test]
    fn spills_are_read_from_the_compilers_report() {
        let log = "ptxas info    : Compiling entry function 'one' for 'sm_80'\nptxas info    : Function properties for one\n\
                   ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
                   ptxas info    : Compiling entry function 'two' for 'sm_80'\n\
                   ptxas         .     16 bytes stack frame, 12 bytes spill stores, 24 bytes spill loads\n";
        assert_eq!(spills(log), [("two".to_owned(), 12)]);
    }

    /// A const pointer with __restrict__ tells the compiler that nothing writes there while the kernel runs, and it reads ahead of the wait for the
    /// kernel in front, which writes there until then.
    #[test]
    fn no_load_may_go_ahead_of_the_wait_for_the_kernel_in_front() {
        let waiting = SOURCES.iter().chain(&LATENCY_SOURCES).filter(|(name, _)| *name != "load.cu");
        let pooling = ("pooling.cu", include_str!("../../kernels/pooling.cu"));
        for (name, text) in waiting.chain([&("prelude.cuh", PRELUDE), &("latency.cu", LATENCY), &pooling]) {
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            assert_eq!(code.filter(|line| line.contains("__restrict__")).collect::<Vec<_>>(), [""; 0], "{name}");
        }
    }

    #[test]
    #[ignore = "needs NVRTC (no GPU)"]
    fn native_kernels_compile_for_every_architecture_without_spills() {
        let mut entries = 0;
        for arch in ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"] {
            for (name, _) in SOURCES.iter().filter(|(name, _)| arch == "sm_90a" || *name != "linear_sm90.cu") {
                for (heads, head_size, biased) in [(12, 64, true), (12, 32, false)] {
                    if *name != "attention.cu" && head_size == 32 {
                        continue;
                    }
                    let precisions: &[Precision] = if arch == "sm_80" || arch == "sm_90a" {
                        &[Precision::Fp16, Precision::Bf16]
                    } else {
                        &[Precision::Fp16]
                    };
                    for &precision in precisions {
                        let mut all = options(precision, 1);
                        all.extend(shape_options(heads, head_size, biased));
                        all.push("--ptxas-options=-v".to_owned());
                        let all: Vec<&str> = all.iter().map(String::as_str).collect();
                        let (image, log) = compile_with_log(NEWEST_MAJOR, name, &native_source(name), arch, &all).unwrap();
                        assert_eq!(image[..4], *b"\x7fELF", "{name} for {arch}");
                        entries += log.matches("Compiling entry function").count();
                        let may =
                            |kernel: &str, bytes| MAY_SPILL.iter().any(|(name, most)| kernel.contains(name) && bytes <= *most);
                        let bad: Vec<_> = spills(&log).into_iter().filter(|(kernel, bytes)| !may(kernel, *bytes)).collect();
                        assert!(bad.is_empty(), "{name} for {arch}, {precision:?}: {bad:?} spill registers");
                    }
                }
            }
        }
        assert!(entries > 100, "the compiler's report names {entries} kernels");
    }

    /// Those of few tokens are for Hopper, and are compiled for each model: all sizes that are served have them.
    #[test]
    #[ignore = "needs NVRTC (no GPU)"]
    fn native_kernels_compile_for_few_tokens_of_every_size_without_spills() {
        use crate::native::latency::{CLASSES, latency_options, source_file};
        use crate::native::shape::Shape;
        let shape = |hidden, heads, wide| Shape::as_bert(hidden, heads, wide, Precision::Fp16);
        let shapes = [
            shape(128, 4, 256),
            shape(256, 4, 768),
            shape(384, 12, 1536),
            shape(512, 8, 2048),
            shape(640, 20, 2560),
            shape(768, 12, 3072),
            shape(896, 28, 3840),
            shape(1024, 16, 3840),
            shape(1024, 16, 4096),
            Shape { precision: Precision::Bf16, ..shape(768, 12, 3072) },
            // ModernBERT-base, NomicBERT, GTE-large and JinaBERT.
            Shape { gated: true, rotary: true, pre_norm: true, ..shape(768, 12, 1152) },
            Shape { gated: true, rotary: true, ..shape(768, 12, 3072) },
            Shape { gated: true, rotary: true, ..shape(1024, 16, 4096) },
            Shape { gated: true, ..shape(768, 12, 3072) },
            Shape { gated: true, rotary: true, pre_norm: true, ..shape(256, 4, 256) },
            Shape { gated: true, ..shape(512, 8, 2048) },
            Shape { gated: true, rotary: true, pre_norm: true, ..shape(1024, 16, 2688) },
            Shape { gated: true, ..shape(896, 28, 2688) },
        ];
        for shape in shapes {
            for tokens in CLASSES {
                let mut all = latency_options(&shape, tokens);
                all.push("--ptxas-options=-v".to_owned());
                let all: Vec<&str> = all.iter().map(String::as_str).collect();
                let name = source_file(tokens);
                let (image, log) = compile_with_log(NEWEST_MAJOR, name, &native_source(name), "sm_90a", &all).unwrap();
                assert_eq!(image[..4], *b"\x7fELF", "{shape:?}, {tokens} tokens");
                assert!(log.contains("Compiling entry function"), "{log}");
                assert_eq!(spills(&log), [], "{shape:?}, {tokens} tokens");
            }
        }
    }

    #[test]
    fn kernels_are_compiled_for_the_device_or_for_what_it_stands_in_for() {
        let arch = |own, forced| Arch::choose(own, forced);
        let made = |target: &str, dependent| Ok(Arch { target: target.to_owned(), hopper: target == "sm_90a", dependent });
        assert_eq!(arch(80, None), made("sm_80", false));
        assert_eq!(arch(90, None), made("sm_90a", true));
        assert_eq!(arch(120, None), made("sm_120", true));
        assert_eq!(arch(90, Some("80")), made("compute_80", false));
        for (own, forced, part) in
            [(75, None, "7.5"), (90, Some("100"), "80 to 90"), (90, Some("75"), "75"), (90, Some("sm_80"), "sm_80")]
        {
            let error = arch(own, forced).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}

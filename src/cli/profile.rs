//! `trt-embed profile`: where the GPU's time of a call goes.

use super::bench::Shape;
#[cfg(feature = "cuda")]
use super::say;
use super::settings::{self, ModelArgs};
use super::{output, progress};
use anyhow::{Result, bail};
use serde::Serialize;
use std::fmt::Write;
use std::num::NonZeroUsize;
use trt_embed::Embedder;
#[cfg(feature = "cuda")]
use trt_embed::{backend::gpu::LayerTime, cuda::CudaError};

/// Shows where the GPU's time of a call goes: staging, encoder, pooling, and the encoder's kernels and layers, slowest first.
///
/// Kernels are those of a bucket's captured graph, timed one by one with an event between them, layers those that TensorRT's profiler
/// tells (TensorRT 8.6 compiles a whole encoder into one), or the steps of the backend `cuda`. Both add to each about a microsecond or more: their sum is above the
/// encoder's own time, which is that of a CUDA graph.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  trt-embed profile -m models/all-MiniLM-L6-v2 --shape 1x128
  trt-embed profile -m models/all-mpnet-base-v2 --engine mpnet.engine --shape 32x128 --top 40 --json")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Texts x tokens of the call.
    #[arg(long, value_name = "BxS", default_value = "1x128")]
    shape: Shape,
    /// Kernels and layers shown.
    #[arg(long, value_name = "N", default_value = "20")]
    top: NonZeroUsize,
    /// Runs of each measurement.
    #[arg(long, value_name = "N", default_value = "50")]
    runs: NonZeroUsize,
    /// Prints one JSON object, with all kernels and layers.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    shape: String,
    /// The engine's shape that serves it.
    run_as: String,
    call_us: f64,
    stage_us: f64,
    encoder_us: f64,
    pool_us: f64,
    /// In the order they run; none where the shape is not a bucket's, or the driver does not tell.
    kernels: Option<Vec<Timed>>,
    /// In the order they run.
    layers: Vec<Timed>,
}

/// A kernel or a layer.
#[derive(Debug, Clone, Serialize)]
struct Timed {
    us: f64,
    name: String,
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    let embedder = settings::open(&args.model, None)?;
    let bar = progress::step("measuring");
    let report = report(&embedder, args.shape, args.runs.get());
    bar.finish_and_clear();
    let report = report?;
    output::print(&if args.json { serde_json::to_string(&report)? + "\n" } else { table(&report, args.top.get()) })
}

#[cfg(feature = "cuda")]
fn report(embedder: &Embedder, shape: Shape, runs: usize) -> Result<Report> {
    let Some(gpu) = embedder.gpu() else {
        bail!("the model runs on the {}; profile is for models on a GPU (--backend cuda or tensorrt)", embedder.info().backend);
    };
    let (run_as, micros) = gpu.gpu_micros(shape.batch, shape.seq, runs)?;
    let timed = |times: Vec<LayerTime>| {
        let one = |time: LayerTime| Timed { us: f64::from(time.milliseconds) * 1e3, name: time.name };
        times.into_iter().map(one).collect::<Vec<_>>()
    };
    let kernels = match gpu.kernel_times(shape.batch, shape.seq, runs) {
        Ok((_, kernels)) => kernels.map(timed),
        // A driver that does not tell names.
        Err(trt_embed::Error::Cuda(error @ CudaError::DriverTooOld { .. })) => {
            say(&format!("no kernels: {error}"));
            None
        }
        Err(error) => return Err(error.into()),
    };
    let (_, layers) = gpu.layer_times(shape.batch, shape.seq, runs)?;
    Ok(Report {
        shape: shape.to_string(),
        run_as: run_as.to_string(),
        call_us: micros.call,
        stage_us: micros.stage,
        encoder_us: micros.encoder,
        pool_us: micros.pool,
        kernels,
        layers: timed(layers),
    })
}

#[cfg(not(feature = "cuda"))]
fn report(_: &Embedder, _: Shape, _: usize) -> Result<Report> {
    bail!("this build has no GPU support; build it with --features cuda")
}

fn table(report: &Report, top: usize) -> String {
    let Report { shape, run_as, call_us, stage_us, encoder_us, pool_us, kernels, layers } = report;
    let mut out = format!("{shape}, run as {run_as}; microseconds of the GPU\n\n");
    // Writing to a String does not fail.
    for (name, us) in [("whole call", call_us), ("  staging", stage_us), ("  encoder", encoder_us), ("  pooling", pool_us)] {
        let _ = writeln!(out, "{us:>9.1}  {name}");
    }
    if let Some(kernels) = kernels {
        let kinds = by_name(kernels);
        let sum = sum(kernels);
        let shown = top.min(kinds.len());
        let _ =
            writeln!(out, "\n{} kernels, {sum:.1} us one by one; of {} kinds the slowest {shown}:", kernels.len(), kinds.len());
        for (count, Timed { us, name }) in kinds.iter().take(top) {
            let _ = writeln!(out, "{us:>9.1}  {:>4.1} %  {count:>4} x  {}", share(*us, sum), shortened(name));
        }
    }
    let sum = sum(layers);
    let mut slowest = layers.clone();
    slowest.sort_by(|a, b| b.us.total_cmp(&a.us));
    let _ = writeln!(out, "\n{} layers, {sum:.1} us one by one; the slowest {}:", layers.len(), top.min(layers.len()));
    for Timed { us, name } in slowest.iter().take(top) {
        let _ = writeln!(out, "{us:>9.1}  {:>4.1} %  {}", share(*us, sum), shortened(name));
    }
    out
}

fn sum(times: &[Timed]) -> f64 {
    times.iter().map(|time| time.us).sum()
}

/// In percent.
fn share(us: f64, sum: f64) -> f64 {
    us / sum.max(f64::MIN_POSITIVE) * 100.0
}

/// Kernels of one name together, and how many they are; the slowest first.
fn by_name(kernels: &[Timed]) -> Vec<(usize, Timed)> {
    let mut kinds: Vec<(usize, Timed)> = Vec::new();
    for kernel in kernels {
        match kinds.iter_mut().find(|(_, kind)| kind.name == kernel.name) {
            Some((count, kind)) => {
                *count += 1;
                kind.us += kernel.us;
            }
            None => kinds.push((1, kernel.clone())),
        }
    }
    kinds.sort_by(|(_, a), (_, b)| b.us.total_cmp(&a.us));
    kinds
}

/// Names of fused layers list all their nodes; the first and the last tell where one is.
fn shortened(name: &str) -> String {
    const MOST: usize = 100;
    const ENDS: usize = 48;
    if name.chars().count() <= MOST {
        return name.to_owned();
    }
    let first: String = name.chars().take(ENDS).collect();
    let last: Vec<char> = name.chars().rev().take(ENDS).collect();
    format!("{first} … {}", last.into_iter().rev().collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_layers_come_first_and_long_names_keep_their_ends() {
        let timed = |us, name: &str| Timed { us, name: name.into() };
        let long = format!("first{}last", "é".repeat(200));
        let report = Report {
            shape: "1x100".into(),
            run_as: "1x128".into(),
            call_us: 20.0,
            stage_us: 2.0,
            encoder_us: 14.0,
            pool_us: 4.0,
            kernels: Some(vec![timed(4.0, "gemm"), timed(6.0, "softmax"), timed(4.0, "gemm")]),
            layers: vec![timed(5.0, "a"), timed(10.0, &long), timed(1.0, "c")],
        };
        let text = table(&report, 2);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "1x100, run as 1x128; microseconds of the GPU");
        assert!(text.contains("3 kernels, 14.0 us one by one; of 2 kinds the slowest 2:"), "{text}");
        assert!(text.contains("8.0  57.1 %     2 x  gemm\n      6.0  42.9 %     1 x  softmax\n"), "{text}");
        assert!(text.contains("3 layers, 16.0 us one by one; the slowest 2:"), "{text}");
        let [.., second, third] = lines[..] else { panic!("{text}") };
        assert!(second.contains("10.0  62.5 %  first") && second.ends_with("last"), "{second}");
        assert_eq!(third.trim(), "5.0  31.2 %  a");
    }
}

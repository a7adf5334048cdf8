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
use trt_embed::{
    backend::gpu::{GpuBackend, LayerTime, Peaks},
    cuda::CudaError,
};

/// Shows where the GPU's time of a call goes: staging, encoder, pooling, and the encoder's kernels and layers, slowest first.
///
/// Kernels are those of a bucket's captured graph, timed one by one with an event between them, layers those that TensorRT's profiler
/// tells (TensorRT 8.6 compiles a whole encoder into one), or the steps of the backend `cuda`. Both add to each about a microsecond or more: their sum is above the
/// encoder's own time, which is that of a CUDA graph.
///
/// Of the backend `cuda` each has the bytes that it must read and write once (MB) and the operations of its products (GFLOP), computed from the shape, the
/// time that the GPU takes for the longer of both at its full speed (floor), and that floor's share of the measured time. What lies in the level 2 cache
/// may come faster than the floor. JSON has the same as bytes, flops, floor_us and floor_share.
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
    /// What the floors are made of; none where the executor does not know its work.
    floors: Option<Floors>,
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
    #[serde(flatten)]
    work: Option<Work>,
}

/// What a piece of work moves and computes at the least.
#[derive(Debug, Clone, Serialize)]
struct Work {
    bytes: u64,
    flops: u64,
    /// None where the GPU's speed is not known.
    floor_us: Option<f64>,
    /// Of the time, 1 where it runs at full speed.
    floor_share: Option<f64>,
}

/// The GPU's full speed, with what it was computed from, and the encoder's floor: the sum of its layers'.
#[derive(Debug, Serialize)]
struct Floors {
    gpu: String,
    bytes_a_second: Option<f64>,
    flops_a_second: Option<f64>,
    memory_clock_mhz: u32,
    memory_bus_bits: u32,
    multiprocessors: u32,
    clock_mhz: u32,
    #[serde(flatten)]
    encoder: Option<Work>,
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
    let peaks = gpu.peaks();
    let timed = |times: Vec<LayerTime>| times.into_iter().map(|time| Timed::of(time, &peaks)).collect::<Vec<_>>();
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
    let layers = timed(layers);
    Ok(Report {
        floors: Floors::of(&gpu, &peaks, &layers, micros.encoder),
        shape: shape.to_string(),
        run_as: run_as.to_string(),
        call_us: micros.call,
        stage_us: micros.stage,
        encoder_us: micros.encoder,
        pool_us: micros.pool,
        kernels,
        layers,
    })
}

#[cfg(feature = "cuda")]
impl Timed {
    fn of(time: LayerTime, peaks: &Peaks) -> Self {
        let us = f64::from(time.milliseconds) * 1e3;
        let work = time.work.map(|work| {
            let floor_us = work.floor_micros(peaks);
            Work { bytes: work.bytes, flops: work.flops, floor_us, floor_share: floor_us.and_then(|floor| ratio(floor, us)) }
        });
        Self { us, name: time.name, work }
    }
}

#[cfg(feature = "cuda")]
impl Floors {
    /// `None` where nothing is known of any layer's work.
    fn of(gpu: &GpuBackend, peaks: &Peaks, layers: &[Timed], encoder_us: f64) -> Option<Self> {
        layers.iter().find_map(|layer| layer.work.as_ref())?;
        let about = gpu.device().properties();
        let encoder = sum_of_work(layers.iter()).map(|work| {
            let floor_share = work.floor_us.and_then(|floor| ratio(floor, encoder_us));
            Work { floor_share, ..work }
        });
        Some(Self {
            gpu: about.name.clone(),
            bytes_a_second: peaks.bytes_a_second,
            flops_a_second: peaks.flops,
            memory_clock_mhz: about.memory_clock_khz / 1000,
            memory_bus_bits: about.memory_bus_bits,
            multiprocessors: about.multiprocessors,
            clock_mhz: about.clock_khz / 1000,
            encoder,
        })
    }
}

#[cfg(not(feature = "cuda"))]
fn report(_: &Embedder, _: Shape, _: usize) -> Result<Report> {
    bail!("this build has no GPU support; build it with --features cuda")
}

fn table(report: &Report, top: usize) -> String {
    let Report { shape, run_as, call_us, stage_us, encoder_us, pool_us, floors, kernels, layers } = report;
    let mut out = format!("{shape}, run as {run_as}; microseconds of the GPU\n\n");
    // Writing to a String does not fail.
    for (name, us) in [("whole call", call_us), ("  staging", stage_us), ("  encoder", encoder_us), ("  pooling", pool_us)] {
        let _ = writeln!(out, "{us:>9.1}  {name}");
    }
    if let Some(floors) = floors {
        out.push_str(&floors.lines());
    }
    if let Some(kernels) = kernels {
        let kinds = by_name(kernels);
        let sum = sum(kernels);
        let shown = top.min(kinds.len());
        let _ =
            writeln!(out, "\n{} kernels, {sum:.1} us one by one; of {} kinds the slowest {shown}:", kernels.len(), kinds.len());
        if floors.is_some() {
            let _ = writeln!(out, "       us  of all  number  {WORK_HEAD}  kernel");
        }
        for (count, Timed { us, name, work }) in kinds.iter().take(top) {
            let work = floors.as_ref().map_or_else(String::new, |_| columns(work.as_ref()) + "  ");
            let _ = writeln!(out, "{us:>9.1}  {:>4.1} %  {count:>4} x  {work}{}", share(*us, sum), shortened(name));
        }
    }
    let sum = sum(layers);
    let mut slowest = layers.clone();
    slowest.sort_by(|a, b| b.us.total_cmp(&a.us));
    let _ = writeln!(out, "\n{} layers, {sum:.1} us one by one; the slowest {}:", layers.len(), top.min(layers.len()));
    if floors.is_some() {
        let _ = writeln!(out, "       us  of all  {WORK_HEAD}  layer");
    }
    for Timed { us, name, work } in slowest.iter().take(top) {
        let work = floors.as_ref().map_or_else(String::new, |_| columns(work.as_ref()) + "  ");
        let _ = writeln!(out, "{us:>9.1}  {:>4.1} %  {work}{}", share(*us, sum), shortened(name));
    }
    out
}

/// Above [`columns`].
const WORK_HEAD: &str = "      MB    GFLOP    floor  floor/us";

/// Bytes, operations, floor and its share of the time; `unknown` for what is not known.
fn columns(work: Option<&Work>) -> String {
    let number = |value: Option<f64>, digits: usize| value.map_or("unknown".to_owned(), |value| format!("{value:.digits$}"));
    let megabytes = number(work.map(|work| work.bytes as f64 / 1e6), 3);
    let gigaflops = number(work.map(|work| work.flops as f64 / 1e9), 3);
    let floor = number(work.and_then(|work| work.floor_us), 2);
    let share = work.and_then(|work| work.floor_share).map_or("unknown".to_owned(), |share| format!("{:.0} %", share * 100.0));
    format!("{megabytes:>8}  {gigaflops:>7}  {floor:>7}  {share:>8}")
}

impl Floors {
    fn lines(&self) -> String {
        let Self { gpu, memory_clock_mhz, memory_bus_bits, multiprocessors, clock_mhz, encoder, .. } = self;
        let speed = |value: Option<f64>, unit: f64, name: &str| {
            value.map_or("unknown".to_owned(), |value| format!("{:.0} {name}", value / unit))
        };
        let memory = speed(self.bytes_a_second, 1e9, "GB/s");
        let products = speed(self.flops_a_second, 1e12, "TFLOP/s");
        let mut out = format!("\nfloors of {gpu}: memory {memory} (2 x {memory_clock_mhz} MHz x {memory_bus_bits} bits), ");
        // Writing to a String does not fail.
        let _ = writeln!(out, "products {products} ({multiprocessors} multiprocessors at {clock_mhz} MHz)");
        if let Some(Work { bytes, flops, floor_us, floor_share }) = encoder {
            let (megabytes, gigaflops) = (*bytes as f64 / 1e6, *flops as f64 / 1e9);
            let _ = write!(out, "the encoder moves {megabytes:.1} MB and computes {gigaflops:.2} GFLOP: its floor is ");
            let _ = match (floor_us, floor_share) {
                (Some(floor), Some(share)) => writeln!(out, "{floor:.1} us, {:.0} % of its time", share * 100.0),
                _ => writeln!(out, "unknown"),
            };
        }
        out
    }
}

/// The work of all of them together; `None` where that of one is not known, or there are none.
fn sum_of_work<'a>(times: impl Iterator<Item = &'a Timed>) -> Option<Work> {
    let mut sum: Option<Work> = None;
    for time in times {
        let work = time.work.as_ref()?;
        sum = Some(match sum {
            None => Work { floor_share: None, ..work.clone() },
            Some(sum) => Work {
                bytes: sum.bytes + work.bytes,
                flops: sum.flops + work.flops,
                floor_us: sum.floor_us.zip(work.floor_us).map(|(a, b)| a + b),
                floor_share: None,
            },
        });
    }
    sum
}

/// `part / whole`, where that is a number.
fn ratio(part: f64, whole: f64) -> Option<f64> {
    (whole > 0.0).then(|| part / whole)
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
                kind.work = sum_of_work([&*kind, kernel].into_iter());
                kind.us += kernel.us;
            }
            None => kinds.push((1, kernel.clone())),
        }
    }
    for (_, kind) in &mut kinds {
        if let Some(work) = &mut kind.work {
            work.floor_share = work.floor_us.and_then(|floor| ratio(floor, kind.us));
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
        let timed = |us, name: &str| Timed { us, name: name.into(), work: None };
        let long = format!("first{}last", "é".repeat(200));
        let report = Report {
            shape: "1x100".into(),
            run_as: "1x128".into(),
            call_us: 20.0,
            stage_us: 2.0,
            encoder_us: 14.0,
            pool_us: 4.0,
            floors: None,
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

    fn floored(us: f64, name: &str, bytes: u64, flops: u64, floor_us: Option<f64>) -> Timed {
        let floor_share = floor_us.and_then(|floor| ratio(floor, us));
        Timed { us, name: name.into(), work: Some(Work { bytes, flops, floor_us, floor_share }) }
    }

    fn report(peak: Option<f64>, floor: impl Fn(f64) -> Option<f64>) -> Report {
        let layers =
            vec![floored(4.0, "Qkv", 3_600_000, 56_000_000, floor(1.0)), floored(2.0, "Attention", 100_000, 800_000, floor(0.5))];
        let unknown = Timed { us: 1.0, name: "plan_attention".into(), work: None };
        Report {
            shape: "1x16".into(),
            run_as: "1x16".into(),
            call_us: 9.0,
            stage_us: 1.0,
            encoder_us: 5.0,
            pool_us: 2.0,
            floors: Some(Floors {
                gpu: "NVIDIA Test".into(),
                bytes_a_second: peak,
                flops_a_second: peak.map(|peak| peak * 250.0),
                memory_clock_mhz: 2619,
                memory_bus_bits: 5120,
                multiprocessors: 132,
                clock_mhz: 1980,
                encoder: sum_of_work(layers.iter())
                    .map(|work| Work { floor_share: work.floor_us.and_then(|floor| ratio(floor, 5.0)), ..work }),
            }),
            kernels: Some(vec![layers[0].clone(), unknown, layers[0].clone()]),
            layers,
        }
    }

    #[test]
    fn floors_stand_beside_the_times() {
        let text = table(&report(Some(3.352e12), Some), 9);
        for line in [
            "floors of NVIDIA Test: memory 3352 GB/s (2 x 2619 MHz x 5120 bits), products 838 TFLOP/s (132 multiprocessors at 1980 MHz)",
            "the encoder moves 3.7 MB and computes 0.06 GFLOP: its floor is 1.5 us, 30 % of its time",
            "       us  of all  number        MB    GFLOP    floor  floor/us  kernel",
            "      8.0  88.9 %     2 x     7.200    0.112     2.00      25 %  Qkv",
            "      1.0  11.1 %     1 x   unknown  unknown  unknown   unknown  plan_attention",
            "      2.0  33.3 %     0.100    0.001     0.50      25 %  Attention",
        ] {
            assert!(text.lines().any(|found| found == line), "no {line:?} in\n{text}");
        }
    }

    #[test]
    fn what_is_not_known_of_a_gpu_is_said_to_be_unknown() {
        let text = table(&report(None, |_| None), 9);
        for line in [
            "floors of NVIDIA Test: memory unknown (2 x 2619 MHz x 5120 bits), products unknown (132 multiprocessors at 1980 MHz)",
            "the encoder moves 3.7 MB and computes 0.06 GFLOP: its floor is unknown",
            "      2.0  33.3 %     0.100    0.001  unknown   unknown  Attention",
        ] {
            assert!(text.lines().any(|found| found == line), "no {line:?} in\n{text}");
        }
    }

    #[test]
    fn json_has_the_work_of_each_layer() {
        let json = serde_json::to_value(report(Some(3e12), Some)).unwrap();
        let layer = &json["layers"][0];
        assert_eq!(
            (&layer["bytes"], &layer["flops"], &layer["floor_us"], &layer["floor_share"]),
            (&3_600_000.into(), &56_000_000.into(), &1.0.into(), &0.25.into())
        );
        assert_eq!((&json["floors"]["floor_us"], &json["floors"]["bytes_a_second"]), (&1.5.into(), &3e12.into()));
        // Of a layer of which nothing is known there is nothing.
        assert!(json["kernels"][1].get("bytes").is_none(), "{json}");
    }
}

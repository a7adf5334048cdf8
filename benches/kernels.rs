//! GPU time of the kernels beside the device's copy bandwidth, and wall time of a graph around them.
//!
//! `cargo bench --features cuda,internals --bench kernels [-- --sweep]`. Kernels are timed inside a captured graph of many launches,
//! so a figure holds one kernel and one boundary between kernels. Inputs rotate among buffers that together are some times the
//! level 2 cache, up to 8; small ones therefore stay in it, as they do behind the engine that has just written them.

use half::f16;
use std::error::Error;
use std::time::Instant;
use trt_embed::backend::gpu::{Hardware, Hidden, Integers, Kernels, PoolJob, PoolPlan, PoolShape, StageJob, StagedRows};
use trt_embed::cuda::{CubinCache, CudaError, Device, DeviceBuffer, DeviceValue, HostMemory, Stream, find_nvrtc};
use trt_embed::pooling::PoolingMode;

type Result<T = (), E = Box<dyn Error>> = std::result::Result<T, E>;

/// Replays of each graph; the median is reported.
const REPLAYS: usize = 30;
/// MPNet-base's.
const HIDDEN: usize = 768;
/// Calls of the wall time measurement.
const CALLS: usize = 10_000;

struct Bench {
    device: Device,
    stream: Stream,
    kernels: Kernels,
    /// Bytes per microsecond, read and written, of a large copy.
    copy_bandwidth: f64,
}

fn main() -> std::process::ExitCode {
    match run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run() -> Result {
    let sweep = std::env::args().any(|argument| argument == "--sweep");
    let device = Device::open(0)?;
    let properties = device.properties().clone();
    let nvrtc = find_nvrtc(properties.driver_cuda.0)?;
    println!("{properties:?}\n{nvrtc:?}");

    let folder = tempfile::tempdir()?;
    let cache = CubinCache::at(folder.path());
    let started = Instant::now();
    drop(Kernels::load(&device, &cache)?);
    let cold = started.elapsed();
    let started = Instant::now();
    let kernels = Kernels::load(&device, &cache)?;
    println!("kernels loaded in {:.1} ms compiled, {:.1} ms from the cache", ms(cold), ms(started.elapsed()));

    let mut stream = device.stream()?;
    let copy_bandwidth = copy_bandwidth(&device, &mut stream)?;
    println!("device copy: {:.2} TB/s (bytes read and written)\n", copy_bandwidth / 1e6);
    let mut bench = Bench { device, stream, kernels, copy_bandwidth };

    println!("| mean + L2, hidden 768 | type | cluster x groups | us | MB read | floor us | % of copy bandwidth |");
    println!("|---|---|---|---|---|---|---|");
    for (batch, seq) in [(1, 16), (1, 128), (1, 512), (8, 128), (32, 128), (32, 512), (128, 128), (128, 512), (200, 512)] {
        bench.pooling(batch, seq, true, PoolingMode::Mean, &[bench.chosen(batch, seq, true, PoolingMode::Mean)])?;
    }
    for (batch, seq) in [(1, 128), (128, 512)] {
        bench.pooling(batch, seq, false, PoolingMode::Mean, &[bench.chosen(batch, seq, false, PoolingMode::Mean)])?;
    }
    for mode in [PoolingMode::Cls, PoolingMode::Max, PoolingMode::WeightedMean] {
        for (batch, seq) in [(1, 128), (128, 512)] {
            bench.pooling(batch, seq, true, mode, &[bench.chosen(batch, seq, true, mode)])?;
        }
    }
    println!();
    bench.others()?;
    println!();
    bench.wall()?;
    if sweep {
        println!("\n| launch shapes tried | type | cluster x groups | us | MB read | floor us | % of copy bandwidth |");
        println!("|---|---|---|---|---|---|---|");
        let hardware = Hardware::of(bench.device.properties());
        for (batch, seq) in [(1, 16), (1, 128), (1, 512), (32, 128), (128, 512)] {
            let mut plans = Vec::new();
            for cluster in if hardware.clusters { &[1, 2, 4, 8][..] } else { &[1] } {
                for groups in [1, 2, 5, 8, 10] {
                    let mut plan = bench.chosen(batch, seq, true, PoolingMode::Mean);
                    (plan.cluster, plan.groups) = (*cluster, groups);
                    plans.push(plan);
                }
            }
            bench.pooling(batch, seq, true, PoolingMode::Mean, &plans)?;
        }
    }
    Ok(())
}

impl Bench {
    /// One row of the table for each plan.
    fn pooling(&mut self, batch: usize, seq: usize, half: bool, mode: PoolingMode, plans: &[PoolPlan]) -> Result {
        let values = batch * seq * HIDDEN;
        let tokens = counted_tokens(mode, seq);
        let bytes = batch * tokens * HIDDEN * if half { 2 } else { 4 };
        let buffers = (4 * self.device.properties().l2_bytes / bytes.max(1)).clamp(1, 8);
        let lengths = self.device.alloc::<i32>(batch)?;
        self.stream.upload(&vec![seq as i32; batch], &lengths)?;
        let out = self.device.alloc::<f32>(batch * HIDDEN)?;
        let shape = PoolShape { batch, seq, tokens: batch * seq, hidden: HIDDEN, dim: HIDDEN, normalise: true };
        let mut halves = Vec::new();
        let mut fulls = Vec::new();
        for _ in 0..buffers {
            if half {
                halves.push(self.noise::<f16>(values, f16::from_f32)?);
            } else {
                fulls.push(self.noise::<f32>(values, |x| x)?);
            }
        }
        let kernels = self.kernels.clone();
        for &plan in plans {
            let us = self.time(if bytes > 1 << 24 { 16 } else { 96 }, |stream, i| {
                let hidden = if half { Hidden::F16(&halves[i % buffers]) } else { Hidden::F32(&fulls[i % buffers]) };
                let job = PoolJob { hidden, starts: None, lengths: &lengths, skip: None, out: &out, modes: &[mode], shape };
                kernels.pool_planned(stream, &job, |_, _| plan)
            })?;
            let floor = bytes as f64 / self.copy_bandwidth;
            println!(
                "| {mode:?} {batch}x{seq} | {} | {} x {} | {us:.2} | {:.3} | {floor:.2} | {:.0} |",
                if half { "fp16" } else { "fp32" },
                plan.cluster,
                plan.groups,
                bytes as f64 / 1e6,
                100.0 * floor / us,
            );
        }
        Ok(())
    }

    /// The plan that the library chooses.
    fn chosen(&self, batch: usize, seq: usize, half: bool, mode: PoolingMode) -> PoolPlan {
        let lane = if half { 8 } else { 4 };
        PoolPlan::choose(Hardware::of(self.device.properties()), batch, counted_tokens(mode, seq), HIDDEN, lane)
    }

    /// A device buffer of `count` values in -1 .. 1, which repeat after a million: filling takes no time to speak of.
    fn noise<T: DeviceValue>(&mut self, count: usize, value: impl Fn(f32) -> T) -> Result<DeviceBuffer<T>> {
        const PERIOD: usize = 1 << 20;
        let some: Vec<T> = (0..PERIOD.min(count) as u64)
            .map(|i| value((i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f32 / (1_u64 << 23) as f32 - 1.0))
            .collect();
        let buffer = self.device.alloc(count)?;
        self.stream.upload(&some, &buffer)?;
        for start in (some.len()..count).step_by(PERIOD) {
            let end = count.min(start + PERIOD);
            self.stream.copy(&buffer, &buffer.slice(start..end)?, end - start)?;
        }
        self.stream.synchronize()?;
        Ok(buffer)
    }

    fn others(&mut self) -> Result {
        let kernels = self.kernels.clone();
        let (rows, lengths) = (self.noise::<f32>(128 * HIDDEN, |x| x)?, self.device.alloc::<i32>(128)?);
        self.stream.upload(&[100; 128], &lengths)?;
        let (mask, ids) = (self.device.alloc::<i32>(128 * 512)?, self.device.alloc::<i64>(128 * 512)?);
        self.stream.fill_bytes(&mask, 1)?;
        // Full rows, of one length at a time.
        let stage_of = |device: &Device, batch: usize, seq: usize| -> Result<DeviceBuffer<i32>> {
            let mut staged = device.pinned::<i32>(2 + batch + batch * seq, HostMemory::WriteCombined)?;
            staged.fill(0, staged.len(), 7)?;
            staged.fill(0, 1, 0)?;
            let starts: Vec<i32> = (0..=batch).map(|row| (row * seq) as i32).collect();
            staged.write(1, &starts)?;
            Ok(staged.mapped()?)
        };
        let device = self.device.clone();
        let skip = self.device.alloc::<i32>(1)?;
        println!("| other kernels | 1 row us | 128 rows us |");
        println!("|---|---|---|");
        let mut line = |name: &str, enqueue: &dyn Fn(&mut Stream, usize) -> Result<(), CudaError>| -> Result {
            let one = self.time(96, |stream, _| enqueue(stream, 1))?;
            let many = self.time(96, |stream, _| enqueue(stream, 128))?;
            println!("| {name} | {one:.2} | {many:.2} |");
            Ok(())
        };
        line("normalise, dim 768", &|stream, batch| kernels.normalise(stream, &rows, batch, 768))?;
        for seq in [16, 512] {
            let staged = [stage_of(&device, 1, seq)?, stage_of(&device, 128, seq)?];
            line(&format!("stage from host memory, seq {seq}"), &|stream, batch| {
                let staged = if batch == 1 { &staged[0] } else { &staged[1] };
                let (lengths, ids, mask) = (&lengths, Integers::I64(&ids), Some(Integers::I32(&mask)));
                kernels.stage(
                    stream,
                    &StageJob { staged, skip: &skip, lengths, ids, mask, batch, rows: StagedRows::Padded(seq), pad: 1 },
                )
            })?;
        }
        line("fill (memset), 1 KiB", &|stream, _| stream.fill_bytes(&mask.slice(0..256)?, 1))?;
        Ok(())
    }

    /// A call as a lane makes it, without the engine: write, one graph, one wait, read.
    fn wall(&mut self) -> Result {
        let shape = PoolShape { batch: 1, seq: 128, tokens: 128, hidden: 768, dim: 768, normalise: true };
        let hidden = self.noise::<f16>(128 * HIDDEN, f16::from_f32)?;
        let mut ids = self.device.pinned::<i32>(129, HostMemory::WriteCombined)?;
        let mut vector = self.device.pinned::<f32>(768, HostMemory::Cached)?;
        let (device_ids, out) = (self.device.alloc::<i32>(129)?, self.device.alloc::<f32>(768)?);
        let device_lengths = device_ids.slice(128..129)?;
        let kernels = self.kernels.clone();
        let pool = |stream: &mut Stream, lengths: &DeviceBuffer<i32>, out: &DeviceBuffer<f32>| {
            let hidden = Hidden::F16(&hidden);
            kernels.pool(stream, &PoolJob { hidden, starts: None, lengths, skip: None, out, modes: &[PoolingMode::Mean], shape })
        };
        let copies = self.stream.capture::<CudaError>(|stream| {
            stream.copy_to_device(&ids, &device_ids, 129)?;
            pool(stream, &device_lengths, &out)?;
            stream.copy_to_host(&out, &mut vector, 768)
        })?;
        let mapped_lengths = ids.mapped()?.slice(128..129)?;
        let mapped_out = vector.mapped()?;
        let output_mapped = self.stream.capture::<CudaError>(|stream| {
            stream.copy_to_device(&ids, &device_ids, 129)?;
            pool(stream, &device_lengths, &mapped_out)
        })?;
        let all_mapped = self.stream.capture::<CudaError>(|stream| pool(stream, &mapped_lengths, &mapped_out))?;
        println!("| wall time of a call 1x128 without an engine | p50 us | p99 us | max us |");
        println!("|---|---|---|---|");
        let mut input = vec![7; 129];
        input[128] = 128;
        let mut result = vec![0.0; 768];
        for (name, graph) in [
            ("copy in, pool, copy out", &copies),
            ("copy in, pool into host memory", &output_mapped),
            ("pool from and into host memory", &all_mapped),
        ] {
            let mut times = Vec::with_capacity(CALLS);
            for call in 0..CALLS + 100 {
                let started = Instant::now();
                input[0] = call as i32;
                ids.write(0, &input)?;
                self.stream.launch(graph)?;
                self.stream.synchronize()?;
                vector.read(0, &mut result)?;
                if call >= 100 {
                    times.push(started.elapsed().as_secs_f64() * 1e6);
                }
            }
            times.sort_by(f64::total_cmp);
            println!("| {name} | {:.1} | {:.1} | {:.1} |", times[CALLS / 2], times[CALLS * 99 / 100], times[CALLS - 1]);
            let norm: f32 = result.iter().map(|v| v * v).sum();
            if (norm - 1.0).abs() > 1e-4 {
                return Err(format!("{name}: |vector|^2 is {norm}").into());
            }
        }
        Ok(())
    }

    /// Microseconds of one of `count` launches in a graph: the median over replays.
    fn time(&mut self, count: usize, enqueue: impl Fn(&mut Stream, usize) -> Result<(), CudaError>) -> Result<f64> {
        let graph = self.stream.capture::<CudaError>(|stream| (0..count).try_for_each(|i| enqueue(stream, i)))?;
        let (start, end) = (self.device.event()?, self.device.event()?);
        let mut times = Vec::with_capacity(REPLAYS);
        for replay in 0..REPLAYS + 5 {
            self.stream.record(&start)?;
            self.stream.launch(&graph)?;
            self.stream.record(&end)?;
            self.stream.synchronize()?;
            if replay >= 5 {
                times.push(f64::from(start.micros_until(&end)?) / count as f64);
            }
        }
        times.sort_by(f64::total_cmp);
        Ok(times[REPLAYS / 2])
    }
}

/// Bytes per microsecond, read and written, of copies of 2 GiB.
fn copy_bandwidth(device: &Device, stream: &mut Stream) -> Result<f64> {
    const BYTES: usize = 2 << 30;
    let (from, to): (DeviceBuffer<u8>, DeviceBuffer<u8>) = (device.alloc(BYTES)?, device.alloc(BYTES)?);
    stream.fill_bytes(&from, 0x5a)?;
    let (start, end) = (device.event()?, device.event()?);
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        stream.record(&start)?;
        stream.copy(&from, &to, BYTES)?;
        stream.record(&end)?;
        stream.synchronize()?;
        best = best.min(f64::from(start.micros_until(&end)?));
    }
    Ok(2.0 * BYTES as f64 / best)
}

/// Tokens of a row that `mode` reads.
fn counted_tokens(mode: PoolingMode, seq: usize) -> usize {
    if matches!(mode, PoolingMode::Cls | PoolingMode::LastToken) { 1 } else { seq }
}

fn ms(time: std::time::Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

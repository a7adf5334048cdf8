//! The kernels, streams, graphs and memory on a GPU, against an f64 oracle.
//!
//! Run on a machine with a GPU: `cargo test --features cuda,internals --test kernels -- --ignored`.

#[path = "common/counting.rs"]
mod counting;

use counting::allocations;
use half::f16;
use trt_embed::backend::gpu::{Hardware, Hidden, Integers, Kernels, PoolJob, PoolPlan, PoolShape, StageJob, StagedRows};
use trt_embed::cuda::{CubinCache, CudaError, Device, DeviceBuffer, DeviceValue, HostMemory, PinnedBuffer, Stream};
use trt_embed::pooling::PoolingMode;

const MODES: [PoolingMode; 6] = [
    PoolingMode::Cls,
    PoolingMode::Max,
    PoolingMode::Mean,
    PoolingMode::MeanSqrtLen,
    PoolingMode::WeightedMean,
    PoolingMode::LastToken,
];

/// Values after the output that no kernel may touch.
const GUARD: usize = 64;

/// SplitMix64 (Steele, Lea, Flood 2014): reproducible inputs from a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From `low` to `high`, both included.
    fn between(&mut self, low: usize, high: usize) -> usize {
        low + (self.next() % (high - low + 1) as u64) as usize
    }

    /// In -3 .. 3.
    fn value(&mut self) -> f32 {
        ((self.next() >> 40) as f32 / (1_u64 << 24) as f32 - 0.5) * 6.0
    }
}

/// Host input of one pooling; padding is NaN, to be noticed if it is read.
struct Case {
    shape: PoolShape,
    modes: Vec<PoolingMode>,
    half: bool,
    skip: i32,
    lengths: Vec<i32>,
    hidden: Vec<f32>,
}

impl Case {
    fn random(random: &mut Random, shape: PoolShape, modes: &[PoolingMode], half: bool) -> Self {
        let PoolShape { batch, seq, hidden: width, .. } = shape;
        let skip = if random.between(0, 2) == 0 { random.between(0, seq.min(9)) as i32 } else { 0 };
        // Mostly ragged; some rows full, some empty, some shorter than what is skipped.
        let lengths: Vec<i32> = (0..batch)
            .map(|_| match random.between(0, 9) {
                0 => 0,
                1 => seq as i32,
                2 => skip,
                _ => random.between(1, seq) as i32,
            })
            .collect();
        let mut hidden = vec![f32::NAN; batch * seq * width];
        for (row, &length) in lengths.iter().enumerate() {
            for value in &mut hidden[row * seq * width..][..length as usize * width] {
                let x = random.value();
                *value = if half { f16::from_f32(x).to_f32() } else { x };
            }
        }
        Self { shape, modes: modes.to_vec(), half, skip, lengths, hidden }
    }

    /// The result of row `row` in f64 and how far f32 may be from it, both `[dim]`.
    fn oracle(&self, row: usize) -> (Vec<f64>, Vec<f64>) {
        let PoolShape { seq, hidden: width, dim, normalise, .. } = self.shape;
        let length = (self.lengths[row].max(0) as usize).min(seq);
        let start = (self.skip.max(0) as usize).min(length);
        let (mut values, mut errors) = (Vec::new(), Vec::new());
        for &mode in &self.modes {
            let tokens = match mode {
                PoolingMode::Cls => start..(start + 1).min(length),
                PoolingMode::LastToken => start.max(length.saturating_sub(1))..length,
                _ => start..length,
            };
            let n = (length - start) as f64;
            let weight = |t: usize| if mode == PoolingMode::WeightedMean { (t + 1) as f64 } else { 1.0 };
            let divisor = match mode {
                PoolingMode::Mean => n,
                PoolingMode::MeanSqrtLen => n.sqrt(),
                PoolingMode::WeightedMean => tokens.clone().map(weight).sum(),
                _ => 1.0,
            };
            for column in 0..width {
                let at = |t: usize| f64::from(self.hidden[(row * seq + t) * width + column]);
                if tokens.is_empty() {
                    values.push(0.0);
                    errors.push(0.0);
                } else if mode == PoolingMode::Max {
                    values.push(tokens.clone().map(at).fold(f64::NEG_INFINITY, f64::max));
                    errors.push(0.0);
                } else {
                    values.push(tokens.clone().map(|t| at(t) * weight(t)).sum::<f64>() / divisor);
                    // A sum of k terms in any order is off by at most (k - 1) u sum|terms| (Higham, Accuracy and Stability,
                    // 4.4), u = 2^-24; the divisor and the division add 3 u. One token, divided by 1, is exact.
                    let k = tokens.len() as f64;
                    let magnitude = tokens.clone().map(|t| (at(t) * weight(t)).abs()).sum::<f64>() / divisor;
                    errors.push(if tokens.len() == 1 && divisor == 1.0 { 0.0 } else { (k + 3.0) * U * magnitude });
                }
            }
        }
        values.truncate(dim);
        errors.truncate(dim);
        if normalise {
            normalise_oracle(&mut values, &mut errors);
        }
        (values, errors)
    }
}

/// Unit roundoff of f32.
const U: f64 = 1.0 / (1 << 24) as f64;

/// `y / max(|y|, 1e-12)`; the error of each component by its own, the norm's (at most that of the vector of errors), that of the
/// sum of squares (dim terms, halved by the root) and three roundings.
fn normalise_oracle(values: &mut [f64], errors: &mut [f64]) {
    let norm = values.iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-12);
    let norm_error = errors.iter().map(|e| e * e).sum::<f64>().sqrt() / norm + (values.len() as f64 / 2.0 + 3.0) * U;
    for (value, error) in values.iter_mut().zip(errors) {
        *value /= norm;
        // Second order terms are covered by the factor.
        *error = 1.01 * (*error / norm + value.abs() * norm_error);
    }
}

struct Gpu {
    device: Device,
    stream: Stream,
    kernels: Kernels,
}

impl Gpu {
    fn open() -> Self {
        let device = Device::open(0).unwrap();
        let stream = device.stream().unwrap();
        let kernels = Kernels::load(&device, &CubinCache::none()).unwrap();
        Self { device, stream, kernels }
    }

    fn buffer<T: DeviceValue>(&mut self, values: &[T]) -> DeviceBuffer<T> {
        let buffer = self.device.alloc(values.len()).unwrap();
        self.stream.upload(values, &buffer).unwrap();
        buffer
    }

    fn read<T: DeviceValue + Default>(&mut self, buffer: &DeviceBuffer<T>) -> Vec<T> {
        let mut values = vec![T::default(); buffer.len()];
        self.stream.download(buffer, &mut values).unwrap();
        values
    }

    /// Pools on the GPU into a poisoned output, checks that nothing beyond it was written, and returns `[batch, dim]`.
    fn pool(&mut self, case: &Case, plan: Option<PoolPlan>) -> Vec<f32> {
        self.pool_from(case, None, plan)
    }

    /// As [`Gpu::pool`], of rows that begin at `starts`.
    fn pool_from(&mut self, case: &Case, starts: Option<&[i32]>, plan: Option<PoolPlan>) -> Vec<f32> {
        let starts = starts.map(|starts| self.buffer(starts));
        let lengths = self.buffer(&case.lengths);
        let skip = self.buffer(&[case.skip]);
        let skip = (case.skip != 0).then_some(&skip);
        let outputs = case.shape.batch * case.shape.dim;
        let out = self.device.alloc::<f32>(outputs + GUARD).unwrap();
        self.stream.fill_bytes(&out, 0xff).unwrap(); // NaN
        let halves: Vec<f16>;
        let (half_buffer, full_buffer);
        let hidden = if case.half {
            halves = case.hidden.iter().copied().map(f16::from_f32).collect();
            half_buffer = self.buffer(&halves);
            Hidden::F16(&half_buffer)
        } else {
            full_buffer = self.buffer(&case.hidden);
            Hidden::F32(&full_buffer)
        };
        let job = PoolJob {
            hidden,
            starts: starts.as_ref(),
            lengths: &lengths,
            skip,
            out: &out,
            modes: &case.modes,
            shape: case.shape,
        };
        match plan {
            None => self.kernels.pool(&mut self.stream, &job),
            Some(plan) => self.kernels.pool_planned(&mut self.stream, &job, |_, _| plan),
        }
        .unwrap();
        let mut values = self.read(&out);
        let guard = values.split_off(outputs);
        assert!(guard.iter().all(|v| v.to_bits() == u32::MAX), "wrote beyond the output: {:?}", case.shape);
        values
    }

    fn check(&mut self, case: &Case, plan: Option<PoolPlan>) {
        let got = self.pool(case, plan);
        for row in 0..case.shape.batch {
            let (values, errors) = case.oracle(row);
            for (column, (value, error)) in values.iter().zip(&errors).enumerate() {
                let found = f64::from(got[row * case.shape.dim + column]);
                assert!(
                    (found - value).abs() <= *error,
                    "row {row} column {column}: {found}, {value} expected, off by {:e}, {error:e} allowed; \
                     {:?} {:?} fp16 {} skip {} length {} plan {plan:?}",
                    (found - value).abs(),
                    case.shape,
                    case.modes,
                    case.half,
                    case.skip,
                    case.lengths[row],
                );
            }
        }
    }
}

fn shape(batch: usize, seq: usize, hidden: usize) -> PoolShape {
    PoolShape { batch, seq, tokens: batch * seq, hidden, dim: hidden, normalise: false }
}

#[test]
#[ignore = "needs an NVIDIA GPU and NVRTC"]
fn every_mode_equals_the_oracle_over_random_shapes() {
    let mut gpu = Gpu::open();
    let mut random = Random(1);
    for hidden in [8, 24, 32, 384, 768, 1024, 4096] {
        for round in 0..6 {
            // At most some million values a case, to keep the f64 oracle quick.
            let tokens = (1 << 20) / hidden;
            let seq = if round == 0 { 1 } else { random.between(1, 512) };
            let batch = if round == 1 { 1 } else { random.between(1, 200.min(tokens / seq).max(1)) };
            for mode in MODES {
                let dim = if round % 2 == 0 { hidden } else { random.between(1, hidden) };
                let sizes = PoolShape { dim, normalise: round % 3 != 0, ..shape(batch, seq, hidden) };
                let half = random.between(0, 1) == 0;
                gpu.check(&Case::random(&mut random, sizes, &[mode], half), None);
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU and NVRTC"]
fn full_batches_fill_the_device() {
    let mut gpu = Gpu::open();
    let mut random = Random(11);
    for (batch, seq, hidden, half) in [(128, 512, 768, true), (200, 512, 8, false), (1, 512, 4096, true), (300, 100, 768, false)]
    {
        let sizes = PoolShape { normalise: true, ..shape(batch, seq, hidden) };
        gpu.check(&Case::random(&mut random, sizes, &[PoolingMode::Mean], half), None);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU and NVRTC"]
fn modes_side_by_side_are_cut_and_normalised_as_one_vector() {
    let mut gpu = Gpu::open();
    let mut random = Random(2);
    for modes in [&MODES[..], &MODES[2..4], &[PoolingMode::Max, PoolingMode::LastToken]] {
        for hidden in [8, 40, 768] {
            for half in [false, true] {
                for dim in [modes.len() * hidden, hidden + 1, hidden, 3] {
                    for normalise in [false, true] {
                        let sizes = PoolShape { dim, normalise, ..shape(5, 37, hidden) };
                        gpu.check(&Case::random(&mut random, sizes, modes, half), None);
                    }
                }
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU and NVRTC"]
fn rows_wider_than_a_block_are_tiled() {
    let mut gpu = Gpu::open();
    let mut random = Random(3);
    for (hidden, half) in [(8200, true), (4104, false), (16_384, true)] {
        for dim in [hidden, hidden - 5, 100] {
            let sizes = PoolShape { dim, normalise: true, ..shape(3, 21, hidden) };
            gpu.check(&Case::random(&mut random, sizes, &[PoolingMode::Mean], half), None);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU and NVRTC"]
fn every_launch_shape_gives_the_same_pooling() {
    let mut gpu = Gpu::open();
    let mut random = Random(4);
    let hardware = Hardware::of(gpu.device.properties());
    let largest = if hardware.clusters { 8 } else { 1 };
    for (hidden, half) in [(768, true), (768, false), (24, true), (4096, true)] {
        for mode in MODES {
            let sizes = PoolShape { normalise: true, ..shape(7, 100, hidden) };
            let case = Case::random(&mut random, sizes, &[mode], half);
            let lane = if half { 8 } else { 4 };
            let mut cluster = 1;
            while cluster <= largest {
                // More groups than tokens, one group; as many clusters as rows, fewer, one, and more than rows.
                for (groups, clusters) in [(1, 7), (2, 3), (5, 1), (1024 / hidden.div_ceil(lane), 9)] {
                    let mut plan = PoolPlan::choose(hardware, 7, 100, hidden, lane);
                    plan.groups = groups.min(1024 / plan.lanes).max(1);
                    plan.cluster = cluster;
                    plan.clusters = clusters;
                    gpu.check(&case, Some(plan));
                }
                cluster *= 2;
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU and NVRTC"]
fn rows_without_tokens_are_zero_and_lengths_are_clamped() {
    let mut gpu = Gpu::open();
    let mut random = Random(5);
    for half in [false, true] {
        for mode in MODES {
            for normalise in [false, true] {
                let sizes = PoolShape { normalise, ..shape(6, 10, 32) };
                let mut case = Case::random(&mut random, sizes, &[mode], half);
                case.skip = 4;
                case.lengths = vec![0, 4, 3, -7, i32::MIN, 1];
                assert!(gpu.pool(&case, None).iter().all(|v| v.to_bits() == 0), "{mode:?} normalise {normalise}");

                // Beyond the row means the whole row.
                case.hidden = (0..6 * 10 * 32).map(|_| f16::from_f32(random.value()).to_f32()).collect();
                case.lengths = vec![11, 10, i32::MAX, 10, 1000, 10];
                gpu.check(&case, None);
                case.skip = -3;
                gpu.check(&case, None);
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU and NVRTC"]
fn a_nan_among_the_tokens_is_seen_in_the_vector() {
    let mut gpu = Gpu::open();
    let mut random = Random(6);
    for half in [false, true] {
        for mode in [PoolingMode::Max, PoolingMode::Mean, PoolingMode::MeanSqrtLen, PoolingMode::WeightedMean] {
            let mut case = Case::random(&mut random, shape(1, 50, 64), &[mode], half);
            case.skip = 0;
            case.lengths = vec![50];
            case.hidden = (0..50 * 64).map(|_| random.value()).collect();
            case.hidden[33 * 64 + 7] = f32::NAN;
            let got = gpu.pool(&case, None);
            let places: Vec<usize> = (0..64).filter(|&c| got[c].is_nan()).collect();
            assert_eq!(places, [7], "{mode:?} fp16 {half}");
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU and NVRTC"]
fn normalise_scales_every_row() {
    let mut gpu = Gpu::open();
    let mut random = Random(7);
    for (batch, dim) in [(1, 1), (3, 7), (200, 768), (5000, 33), (2, 5001)] {
        let rows: Vec<f32> = (0..batch * dim).map(|i| if i / dim == 1 { 0.0 } else { random.value() }).collect();
        let buffer = gpu.buffer(&rows);
        gpu.kernels.normalise(&mut gpu.stream, &buffer, batch, dim).unwrap();
        let got = gpu.read(&buffer);
        for (before, after) in rows.chunks(dim).zip(got.chunks(dim)) {
            let mut values: Vec<f64> = before.iter().copied().map(f64::from).collect();
            let mut errors = vec![0.0; dim];
            normalise_oracle(&mut values, &mut errors);
            for ((found, value), error) in after.iter().zip(&values).zip(&errors) {
                assert!((f64::from(*found) - value).abs() <= *error, "{found} {value} {error:e}");
            }
        }
    }
}

/// Starts of rows of random lengths up to `longest`, and the ids of their tokens, `tokens` at most.
fn ragged(random: &mut Random, rows: usize, longest: usize, tokens: usize) -> (Vec<i32>, Vec<i32>) {
    let mut starts = vec![0];
    for _ in 0..rows {
        let end = starts[starts.len() - 1] as usize;
        starts.push(tokens.min(end + random.between(0, longest)) as i32);
    }
    let ids = (0..starts[rows]).map(|_| random.next() as i32).collect();
    (starts, ids)
}

#[test]
#[ignore = "needs an NVIDIA GPU and NVRTC"]
fn staged_rows_become_ids_masks_and_lengths_of_either_width() {
    const PAD: i32 = 7;
    let mut gpu = Gpu::open();
    let mut random = Random(8);
    for (batch, seq) in [(1, 1), (3, 7), (200, 512), (5000, 301)] {
        let cells = batch * seq;
        let (starts, ids) = ragged(&mut random, batch, seq, cells);
        let mut staged = gpu.device.pinned::<i32>(2 + batch + cells, HostMemory::WriteCombined).unwrap();
        staged.write(0, &[5]).unwrap();
        staged.write(1, &starts).unwrap();
        staged.write(2 + batch, &ids).unwrap();
        // What stands behind the ids is nobody's.
        staged.fill(2 + batch + ids.len(), cells - ids.len(), -3).unwrap();
        let (skip, lengths) = (gpu.buffer(&[-1_i32]), gpu.buffer(&vec![-1_i32; batch + 1]));
        let packed_starts = gpu.buffer(&vec![-1_i32; batch + 1]);
        let narrow = [gpu.buffer(&vec![-2_i32; cells + 1]), gpu.buffer(&vec![-2_i32; cells + 1])];
        let wide = [gpu.buffer(&vec![-2_i64; cells + 1]), gpu.buffer(&vec![-2_i64; cells + 1])];
        let mapped = staged.mapped().unwrap();
        let real: Vec<i32> = starts.windows(2).map(|ends| ends[1] - ends[0]).collect();
        let both = [StagedRows::Padded(seq), StagedRows::Packed { starts: &packed_starts, tokens: cells }];
        for rows in both {
            let job = |ids, mask| StageJob { staged: &mapped, skip: &skip, lengths: &lengths, ids, mask, batch, rows, pad: PAD };
            let first = job(Integers::I32(&narrow[0]), Some(Integers::I64(&wide[1])));
            gpu.kernels.stage(&mut gpu.stream, &first).unwrap();
            let second = job(Integers::I64(&wide[0]), Some(Integers::I32(&narrow[1])));
            gpu.kernels.stage(&mut gpu.stream, &second).unwrap();
            let read_lengths = gpu.read(&lengths);
            assert_eq!(gpu.read(&skip), [5]);
            assert_eq!((&read_lengths[..batch], read_lengths[batch]), (real.as_slice(), -1));
            let (narrow, wide) =
                (narrow.each_ref().map(|buffer| gpu.read(buffer)), wide.each_ref().map(|buffer| gpu.read(buffer)));
            for i in 0..cells {
                let place = match rows {
                    StagedRows::Padded(_) => {
                        Some(starts[i / seq] as usize + i % seq).filter(|_| ((i % seq) as i32) < real[i / seq])
                    }
                    _ => Some(i).filter(|&i| i < ids.len()),
                };
                let id = place.map_or(PAD, |place| ids[place]);
                let token = i32::from(place.is_some());
                assert_eq!((narrow[0][i], wide[0][i]), (id, i64::from(id)), "id {i} of {batch}x{seq}, {rows:?}");
                assert_eq!((narrow[1][i], wide[1][i]), (token, i64::from(token)), "mask {i} of {batch}x{seq}, {rows:?}");
            }
            for end in narrow.map(|values| i64::from(values[cells])).into_iter().chain(wide.map(|values| values[cells])) {
                assert_eq!(end, -2, "wrote beyond ids or mask");
            }
            // Without a mask, and refused where a buffer is one value short.
            let (exact, short) = (gpu.device.alloc::<i32>(cells).unwrap(), gpu.device.alloc::<i32>(cells - 1).unwrap());
            let refused = StageJob { ids: Integers::I32(&short), mask: None, ..first };
            gpu.kernels.stage(&mut gpu.stream, &StageJob { ids: Integers::I32(&exact), ..refused }).unwrap();
            let error = gpu.kernels.stage(&mut gpu.stream, &refused).unwrap_err();
            assert!(matches!(error, CudaError::Argument { call: "stage", .. }), "{error}");
            gpu.stream.synchronize().unwrap();
        }
        let read_starts = gpu.read(&packed_starts);
        assert_eq!((&read_starts[..batch], read_starts[batch]), (&starts[..batch], -1));
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU and NVRTC"]
fn starts_that_are_none_are_taken_into_the_tokens() {
    let mut gpu = Gpu::open();
    let (batch, seq) = (4, 8);
    let mut staged = gpu.device.pinned::<i32>(2 + batch + batch * seq, HostMemory::WriteCombined).unwrap();
    staged.write(0, &[0, -5, i32::MAX, 3, i32::MIN, 1000]).unwrap();
    let (skip, lengths, starts) = (gpu.buffer(&[-1]), gpu.buffer(&vec![-1; batch]), gpu.buffer(&vec![-1; batch]));
    let (ids, mapped) = (gpu.buffer(&vec![-2_i32; batch * seq]), staged.mapped().unwrap());
    for rows in [StagedRows::Padded(seq), StagedRows::Packed { starts: &starts, tokens: batch * seq }] {
        let ids = Integers::I32(&ids);
        let job = StageJob { staged: &mapped, skip: &skip, lengths: &lengths, ids, mask: None, batch, rows, pad: 0 };
        gpu.kernels.stage(&mut gpu.stream, &job).unwrap();
        // From 0 to 32 (8 in a row of 8), from 32 to 3, from 3 to 0, from 0 to 32.
        let most = if matches!(rows, StagedRows::Padded(_)) { 8 } else { 32 };
        assert_eq!(gpu.read(&lengths), [most, 0, 0, most], "{rows:?}");
    }
    assert_eq!(gpu.read(&starts), [0, 32, 3, 0]);
}

#[test]
#[ignore = "needs an NVIDIA GPU and NVRTC"]
fn packed_rows_are_pooled_as_padded_ones() {
    let mut gpu = Gpu::open();
    let mut random = Random(21);
    for (batch, seq, hidden) in [(1, 1, 8), (5, 37, 768), (64, 200, 384)] {
        for mode in MODES {
            let sizes = PoolShape { normalise: true, ..shape(batch, seq, hidden) };
            let case = Case::random(&mut random, sizes, &[mode], batch % 2 == 0);
            let padded = gpu.pool(&case, None);
            // The real tokens side by side, and poison behind them that no row may read.
            let (mut starts, mut states) = (Vec::new(), Vec::new());
            for (row, &length) in case.lengths.iter().enumerate() {
                starts.push((states.len() / hidden) as i32);
                states.extend_from_slice(&case.hidden[row * seq * hidden..][..length as usize * hidden]);
            }
            let tokens = states.len() / hidden;
            states.resize((tokens + 3) * hidden, f32::NAN);
            let packed = Case { shape: PoolShape { tokens, ..sizes }, hidden: states, ..case };
            assert_eq!(gpu.pool_from(&packed, Some(&starts), None), padded, "{mode:?} {batch}x{seq}x{hidden}");
            // Rows that would begin or end outside are cut there.
            let outside: Vec<i32> = starts.iter().map(|start| start + tokens as i32).collect();
            assert!(gpu.pool_from(&packed, Some(&outside), None)[hidden..].iter().all(|&value| value == 0.0));
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU and NVRTC"]
fn arguments_that_do_not_fit_are_errors_before_any_launch() {
    let mut gpu = Gpu::open();
    let sizes = PoolShape { batch: 2, seq: 4, tokens: 8, hidden: 16, dim: 16, normalise: true };
    let hidden = gpu.device.alloc::<f32>(2 * 4 * 16 + 1).unwrap();
    let lengths = gpu.buffer(&[4, 4]);
    let out = gpu.device.alloc::<f32>(2 * 16).unwrap();
    let mut refused = |hidden: &DeviceBuffer<f32>,
                       lengths: &DeviceBuffer<i32>,
                       out: &DeviceBuffer<f32>,
                       modes: &[PoolingMode],
                       sizes,
                       what: &str| {
        let job = PoolJob { hidden: Hidden::F32(hidden), starts: None, lengths, skip: None, out, modes, shape: sizes };
        match gpu.kernels.pool(&mut gpu.stream, &job) {
            Err(CudaError::Argument { call: "pool", reason }) => assert!(reason.contains(what), "{reason} does not say {what}"),
            other => panic!("{other:?}, but {what}"),
        }
    };
    let mean = &[PoolingMode::Mean][..];
    refused(&hidden, &lengths, &out, mean, PoolShape { hidden: 12, dim: 12, ..sizes }, "multiple of 8");
    refused(&hidden, &lengths, &out, mean, PoolShape { dim: 17, ..sizes }, "dim 17");
    refused(&hidden, &lengths, &out, mean, PoolShape { dim: 0, ..sizes }, "dim 0");
    refused(&hidden, &lengths, &out, &[], sizes, "0 modes");
    refused(&hidden, &lengths, &out, mean, PoolShape { batch: 3, tokens: 12, ..sizes }, "hidden holds");
    refused(&hidden, &lengths, &out, mean, PoolShape { seq: usize::MAX, ..sizes }, "tokens");
    refused(&hidden, &lengths, &out, mean, PoolShape { tokens: 7, ..sizes }, "7 hidden states are not 2 rows of 4");
    refused(&hidden, &lengths, &out, mean, PoolShape { batch: usize::MAX, ..sizes }, "hidden states are not");
    refused(&hidden, &lengths.slice(0..1).unwrap(), &out, mean, sizes, "lengths holds 1");
    refused(&hidden, &lengths, &out.slice(0..31).unwrap(), mean, sizes, "out holds 31");
    refused(&hidden.slice(1..129).unwrap(), &lengths, &out, mean, sizes, "not aligned");
    let mut bad = PoolPlan::choose(Hardware::of(gpu.device.properties()), 2, 4, 16, 4);
    bad.groups = 1000;
    let job = PoolJob {
        hidden: Hidden::F32(&hidden),
        starts: None,
        lengths: &lengths,
        skip: None,
        out: &out,
        modes: mean,
        shape: sizes,
    };
    let result = gpu.kernels.pool_planned(&mut gpu.stream, &job, |_, _| bad);
    assert!(matches!(result, Err(CudaError::Argument { .. })), "{result:?}");
    gpu.stream.synchronize().unwrap();
}

#[test]
#[ignore = "needs an NVIDIA GPU and NVRTC"]
fn a_graph_replays_with_fresh_input_and_keeps_what_it_uses() {
    let mut gpu = Gpu::open();
    let mut random = Random(9);
    let sizes = PoolShape { normalise: true, ..shape(3, 20, 64) };
    let device = gpu.device.clone();
    let mut lengths_in = device.pinned::<i32>(3, HostMemory::WriteCombined).unwrap();
    let mut hidden_in = device.pinned::<f32>(3 * 20 * 64, HostMemory::WriteCombined).unwrap();
    let mut vectors = device.pinned::<f32>(3 * 64, HostMemory::Cached).unwrap();
    let graph = {
        let lengths = device.alloc(3).unwrap();
        let hidden = device.alloc(3 * 20 * 64).unwrap();
        let out = device.alloc(3 * 64).unwrap();
        let kernels = gpu.kernels.clone();
        gpu.stream
            .capture::<CudaError>(|stream| {
                stream.copy_to_device(&lengths_in, &lengths, 3)?;
                stream.copy_to_device(&hidden_in, &hidden, 3 * 20 * 64)?;
                let modes = &[PoolingMode::Mean];
                let hidden = Hidden::F32(&hidden);
                kernels.pool(
                    stream,
                    &PoolJob { hidden, starts: None, lengths: &lengths, skip: None, out: &out, modes, shape: sizes },
                )?;
                stream.copy_to_host(&out, &mut vectors, 3 * 64)
            })
            .unwrap()
        // Here the device buffers and the kernels' clone go out of scope: the graph holds them.
    };
    // If they had been freed, these would take their place and be written over.
    let others: Vec<DeviceBuffer<f32>> = (0..8).map(|_| device.alloc(3 * 20 * 64).unwrap()).collect();
    for other in &others {
        gpu.stream.fill_bytes(other, 0xff).unwrap();
    }
    for _ in 0..20 {
        let mut case = Case::random(&mut random, sizes, &[PoolingMode::Mean], false);
        case.skip = 0;
        lengths_in.write(0, &case.lengths).unwrap();
        hidden_in.write(0, &case.hidden).unwrap();
        vectors.fill(0, 3 * 64, f32::NAN).unwrap();
        gpu.stream.launch(&graph).unwrap();
        let mut got = vec![0.0; 3 * 64];
        let early = vectors.read(0, &mut got);
        assert!(matches!(early, Err(CudaError::Argument { call: "read", .. })), "read before the wait: {early:?}");
        assert!(lengths_in.write(0, &[1]).is_err(), "wrote before the wait");
        gpu.stream.synchronize().unwrap();
        vectors.read(0, &mut got).unwrap();
        for row in 0..3 {
            let (values, errors) = case.oracle(row);
            for column in 0..64 {
                let found = f64::from(got[row * 64 + column]);
                assert!((found - values[column]).abs() <= errors[column], "{found} {}", values[column]);
            }
        }
    }
    for other in &others {
        assert!(gpu.read(other).iter().all(|v| v.to_bits() == u32::MAX), "the graph wrote into another's memory");
    }
    let mut foreign = device.stream().unwrap();
    assert!(foreign.launch(&graph).is_err(), "another stream launched the graph");
}

#[test]
#[ignore = "needs an NVIDIA GPU and NVRTC"]
fn a_kernel_reads_and_writes_mapped_host_memory() {
    let mut gpu = Gpu::open();
    let mut random = Random(10);
    let case = Case::random(&mut random, PoolShape { normalise: true, ..shape(4, 33, 768) }, &[PoolingMode::Mean], false);
    let hidden = gpu.buffer(&case.hidden);
    let mut lengths = gpu.device.pinned::<i32>(4, HostMemory::WriteCombined).unwrap();
    lengths.write(0, &case.lengths).unwrap();
    let out = gpu.device.pinned::<f32>(4 * 768, HostMemory::Cached).unwrap();
    let skip = gpu.buffer(&[case.skip]);
    let (lengths, mapped) = (lengths.mapped().unwrap(), out.mapped().unwrap());
    let job = PoolJob {
        hidden: Hidden::F32(&hidden),
        starts: None,
        lengths: &lengths,
        skip: Some(&skip),
        out: &mapped,
        modes: &[PoolingMode::Mean],
        shape: case.shape,
    };
    gpu.kernels.pool(&mut gpu.stream, &job).unwrap();
    let mut got = vec![0.0; 4 * 768];
    assert!(out.read(0, &mut got).is_err(), "read before the wait");
    gpu.stream.synchronize().unwrap();
    out.read(0, &mut got).unwrap();
    for row in 0..4 {
        let (values, errors) = case.oracle(row);
        for column in 0..768 {
            assert!((f64::from(got[row * 768 + column]) - values[column]).abs() <= errors[column]);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU and NVRTC"]
fn a_failed_capture_leaves_the_stream_usable() {
    let mut gpu = Gpu::open();
    let buffer = gpu.buffer(&[1_i32, 2, 3]);
    let failed = gpu.stream.capture::<CudaError>(|stream| {
        stream.fill_bytes(&buffer, 0)?;
        Err(CudaError::Argument { call: "test", reason: "on purpose".to_owned() })
    });
    assert!(matches!(failed, Err(CudaError::Argument { call: "test", .. })), "not the closure's own error");
    let waited = gpu.stream.capture::<CudaError>(|stream| stream.synchronize());
    assert!(matches!(waited, Err(CudaError::Argument { call: "synchronize", .. })), "a capture waited");
    // An upload would leave the graph with the address of a slice that is gone.
    drop(gpu.stream.capture::<CudaError>(|stream| {
        assert!(matches!(stream.upload(&[7, 8, 9], &buffer), Err(CudaError::Argument { .. })), "a capture took a slice");
        Ok(())
    }));
    let stream = std::panic::AssertUnwindSafe(&mut gpu.stream);
    let panicked = std::panic::catch_unwind(|| {
        let stream = stream; // all of it, so that it is unwind safe
        stream.0.capture::<CudaError>(|_| panic!("on purpose")).map(drop)
    });
    assert!(panicked.is_err());
    assert_eq!(gpu.read(&buffer), [1, 2, 3], "a capture ran what it should have recorded");
    gpu.stream.fill_bytes(&buffer, 0).unwrap();
    assert_eq!(gpu.read(&buffer), [0, 0, 0]);
}

#[test]
#[ignore = "needs an NVIDIA GPU and NVRTC"]
fn the_host_never_reads_pinned_memory_that_the_device_writes() {
    const BYTES: usize = 1 << 20;
    let mut gpu = Gpu::open();
    let pinned = gpu.device.pinned::<u8>(BYTES, HostMemory::Cached).unwrap();
    let mapped = pinned.mapped().unwrap();
    let graphs = [0x11, 0x22].map(|byte| gpu.stream.capture::<CudaError>(|stream| stream.fill_bytes(&mapped, byte)).unwrap());
    let done = std::sync::atomic::AtomicBool::new(false);
    let (read, refused) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut bytes, mut read, mut refused) = (vec![0; BYTES], 0, 0);
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                match pinned.read(0, &mut bytes) {
                    Ok(()) => {
                        read += 1;
                        assert!(bytes.iter().all(|&byte| byte == bytes[0]), "half of one run and half of another");
                    }
                    Err(CudaError::Argument { call: "read", .. }) => refused += 1,
                    Err(other) => panic!("{other}"),
                }
            }
            (read, refused)
        });
        for round in 0..2000 {
            gpu.stream.launch(&graphs[round % 2]).unwrap();
            gpu.stream.synchronize().unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        reader.join().unwrap()
    });
    assert!(read > 0, "{refused} reads were refused, none went through");
}

#[test]
#[ignore = "needs an NVIDIA GPU and NVRTC"]
fn memory_that_does_not_fit_is_an_error_with_the_sizes() {
    let gpu = Gpu::open();
    let total = gpu.device.memory().unwrap().total;
    for len in [total, 1 << 45] {
        match gpu.device.alloc::<f32>(len) {
            Err(CudaError::OutOfMemory { asked, free, total: of, .. }) => {
                assert_eq!((asked, of), (len * 4, total));
                assert!(free <= total);
            }
            other => panic!("{len} values: {other:?}"),
        }
    }
    assert!(matches!(gpu.device.alloc::<f32>(usize::MAX), Err(CudaError::Argument { .. })));
    // The device is as good as before, and what is dropped is free again.
    for _ in 0..3 {
        gpu.device.alloc::<u8>(total / 5 * 3).unwrap();
    }
    assert_eq!(gpu.device.alloc::<f32>(0).unwrap().len(), 0);
}

#[test]
#[ignore = "needs an NVIDIA GPU and NVRTC"]
fn a_device_that_does_not_exist_is_named_with_how_many_there_are() {
    let count = Device::count().unwrap();
    match Device::open(count) {
        Err(CudaError::NoSuchDevice { ordinal, count: found, .. }) => assert_eq!((ordinal, found), (count, count)),
        other => panic!("{other:?}"),
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU and NVRTC"]
fn views_stay_within_their_buffer() {
    let mut gpu = Gpu::open();
    let buffer = gpu.buffer(&[1_i32, 2, 3, 4, 5]);
    assert_eq!(gpu.read(&buffer.slice(1..4).unwrap()), [2, 3, 4]);
    assert!(buffer.slice(2..6).is_err());
    #[allow(clippy::reversed_empty_ranges)] // what is tested
    let reversed = buffer.slice(4..2);
    assert!(reversed.is_err());
    assert_eq!(gpu.read(&buffer.slice(1..5).unwrap().cast::<u8>().unwrap())[..4], 2_i32.to_le_bytes());
    assert!(buffer.cast::<i64>().is_err(), "20 bytes are no whole number of i64");
    assert!(buffer.slice(1..5).unwrap().cast::<i64>().is_err(), "not aligned to 8 bytes");
    let mut short = gpu.device.pinned::<i32>(2, HostMemory::Cached).unwrap();
    assert!(gpu.stream.copy_to_host(&buffer, &mut short, 3).is_err());
    assert!(short.write(1, &[1, 2]).is_err());
    assert!(short.write(usize::MAX, &[1, 2]).is_err());
    // A view alone keeps the memory.
    let view = buffer.slice(0..2).unwrap();
    drop(buffer);
    assert_eq!(gpu.read(&view), [1, 2]);
}

#[test]
#[ignore = "needs an NVIDIA GPU and NVRTC"]
fn the_cubin_cache_is_used_and_healed() {
    let gpu = Gpu::open();
    let folder = tempfile::tempdir().unwrap();
    let cache = CubinCache::at(folder.path());
    Kernels::load(&gpu.device, &cache).unwrap();
    let files: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 2, "{files:?}");
    let whole: Vec<Vec<u8>> = files.iter().map(|file| std::fs::read(file).unwrap()).collect();
    for (file, bytes) in files.iter().zip(&whole) {
        std::fs::write(file, &bytes[..bytes.len() / 2]).unwrap();
    }
    Kernels::load(&gpu.device, &cache).unwrap();
    for (file, bytes) in files.iter().zip(&whole) {
        assert_eq!(std::fs::read(file).unwrap().len(), bytes.len(), "{} was not replaced", file.display());
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU and NVRTC"]
fn a_warm_call_allocates_nothing() {
    let mut gpu = Gpu::open();
    let device = gpu.device.clone();
    let mut lengths_in = device.pinned::<i32>(1, HostMemory::WriteCombined).unwrap();
    let mut vector = device.pinned::<f32>(768, HostMemory::Cached).unwrap();
    let (lengths, out) = (device.alloc(1).unwrap(), device.alloc(768).unwrap());
    let hidden = gpu.buffer(&vec![f16::ONE; 128 * 768]);
    let kernels = gpu.kernels.clone();
    let job = PoolJob {
        hidden: Hidden::F16(&hidden),
        starts: None,
        lengths: &lengths,
        skip: None,
        out: &out,
        modes: &[PoolingMode::Mean],
        shape: PoolShape { normalise: true, ..shape(1, 128, 768) },
    };
    // As a graph, and directly, as shapes go that have no graph.
    let enqueue = |stream: &mut Stream, vector: &mut PinnedBuffer<f32>| -> Result<(), CudaError> {
        stream.copy_to_device(&lengths_in, &lengths, 1)?;
        kernels.pool(stream, &job)?;
        stream.copy_to_host(&out, vector, 768)
    };
    let graph = gpu.stream.capture::<CudaError>(|stream| enqueue(stream, &mut vector)).unwrap();
    for _ in 0..3 {
        enqueue(&mut gpu.stream, &mut vector).unwrap();
        gpu.stream.launch(&graph).unwrap();
        gpu.stream.synchronize().unwrap();
    }
    let mut got = [0.0; 768];
    let before = allocations();
    for _ in 0..100 {
        gpu.stream.launch(&graph).unwrap();
        gpu.stream.synchronize().unwrap();
        vector.read(0, &mut got).unwrap();
        enqueue(&mut gpu.stream, &mut vector).unwrap();
        gpu.stream.synchronize().unwrap();
    }
    assert_eq!(allocations() - before, 0, "heap allocations");
    lengths_in.write(0, &[128]).unwrap();
    gpu.stream.launch(&graph).unwrap();
    gpu.stream.synchronize().unwrap();
    vector.read(0, &mut got).unwrap();
    let expected = 1.0 / 768_f32.sqrt();
    assert!(got.iter().all(|v| (v - expected).abs() <= 768.0 * f32::EPSILON * expected), "{:?}", &got[..4]);
}

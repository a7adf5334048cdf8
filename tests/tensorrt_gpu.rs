//! The shim on a GPU: a tiny graph built, loaded, run and captured, and what goes wrong on the way.
//!
//! `hidden[b, s, :] = table[ids[b, s], :] * mask[b, s]` with `table[i, j] = i + j / 4` (tests/fixtures/tensorrt/make.py), so that
//! every value is known without a second executor.
#![cfg(feature = "tensorrt")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use trt_embed::backend::tensorrt::{
    Arithmetic, BuildSettings, Context, Direction, Element, Engine, Library, Runtime, build_plan,
};
use trt_embed::cuda::{Device, DeviceBuffer, Stream};
use trt_embed::{Error, NoProgress, Progress, Result};

const ONNX: &[u8] = include_bytes!("fixtures/tensorrt/tiny.onnx");
const HIDDEN: usize = 4;
const PROFILES: [&str; 2] = ["1x1:2x3:4x8", "2x4"];
const BUCKET: usize = 1;

fn settings() -> BuildSettings {
    let mut settings = BuildSettings::default();
    settings.arithmetic = Arithmetic::Fp32;
    settings.profiles = PROFILES.iter().map(|text| text.parse().unwrap()).collect();
    settings
}

struct Loaded {
    engine: Arc<Engine>,
    device: Device,
    plan: Vec<u8>,
}

fn load() -> Loaded {
    let device = Device::open(0).unwrap();
    let library = Library::load().unwrap();
    let plan = build_plan(&library, &device, ONNX, &settings(), &NoProgress).unwrap().bytes;
    let runtime = Runtime::new(&library, &device).unwrap();
    // SAFETY: the plan was built just now.
    let engine = unsafe { Engine::deserialize(&runtime, &plan) }.unwrap();
    Loaded { engine, device, plan }
}

/// A context with its buffers, as a lane has it.
struct Lane {
    context: Context,
    stream: Stream,
    ids: DeviceBuffer<i32>,
    mask: DeviceBuffer<i32>,
    hidden: DeviceBuffer<f32>,
}

impl Lane {
    fn new(loaded: &Loaded, profile: usize, tokens: usize) -> Self {
        let mut stream = loaded.device.stream().unwrap();
        let scratch = loaded.device.alloc::<u8>(loaded.engine.scratch_bytes(profile).unwrap().max(1)).unwrap();
        // SAFETY: `upload` puts ids of `tokens` into it, all within the table.
        let mut context = unsafe { loaded.engine.create_context(profile, &mut stream, Some(scratch)) }.unwrap();
        let ids = loaded.device.alloc(tokens).unwrap();
        let mask = loaded.device.alloc(tokens).unwrap();
        let hidden = loaded.device.alloc(tokens * HIDDEN).unwrap();
        let place = |name| loaded.engine.tensor(name).unwrap();
        context.set_buffer(place("input_ids"), &ids).unwrap();
        context.set_buffer(place("attention_mask"), &mask).unwrap();
        context.set_buffer(place("last_hidden_state"), &hidden).unwrap();
        Self { context, stream, ids, mask, hidden }
    }

    fn shape(&mut self, batch: usize, seq: usize) -> Result<()> {
        for name in ["input_ids", "attention_mask"] {
            let tensor = self.context.engine().tensor(name).unwrap();
            self.context.set_input_shape(tensor, &[batch as i64, seq as i64])?;
        }
        Ok(())
    }

    fn upload(&mut self, ids: &[i32], mask: &[i32]) {
        self.stream.upload(ids, &self.ids).unwrap();
        self.stream.upload(mask, &self.mask).unwrap();
        self.stream.fill_bytes(&self.hidden, 0xff).unwrap();
    }

    fn check(&mut self, ids: &[i32], mask: &[i32]) {
        let mut hidden = vec![0.0; ids.len() * HIDDEN];
        self.stream.download(&self.hidden, &mut hidden).unwrap();
        for (i, row) in hidden.chunks_exact(HIDDEN).enumerate() {
            for (j, &value) in row.iter().enumerate() {
                // Small multiples of 1/4 are exact.
                assert_eq!(value, (ids[i] as f32 + j as f32 / 4.0) * mask[i] as f32, "token {i}, component {j}");
            }
        }
    }
}

/// Ids below the table's 8 rows and a ragged mask, other ones for every `salt`.
fn tokens(batch: usize, seq: usize, salt: usize) -> (Vec<i32>, Vec<i32>) {
    let ids = (0..batch * seq).map(|i| ((i * 5 + salt * 3 + i / 3) % 8) as i32).collect();
    let mask = (0..batch * seq).map(|i| i32::from(i % seq <= (i / seq + salt) % seq)).collect();
    (ids, mask)
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn an_engine_tells_what_it_takes_and_gives() {
    let loaded = load();
    let io: Vec<_> = loaded.engine.io().iter().map(|t| (t.name.as_str(), t.direction, t.element, t.shape.clone())).collect();
    assert_eq!(
        io,
        [
            ("input_ids", Direction::Input, Element::I32, vec![-1, -1]),
            ("attention_mask", Direction::Input, Element::I32, vec![-1, -1]),
            ("last_hidden_state", Direction::Output, Element::F32, vec![-1, -1, HIDDEN as i64]),
        ]
    );
    let ranges: Vec<_> = loaded
        .engine
        .profiles()
        .iter()
        .map(|inputs| inputs.iter().map(|r| (r.tensor, r.min.clone(), r.opt.clone(), r.max.clone())).collect::<Vec<_>>())
        .collect();
    let both = |min: [i64; 2], opt: [i64; 2], max: [i64; 2]| {
        (0..2).map(|tensor| (tensor, min.to_vec(), opt.to_vec(), max.to_vec())).collect::<Vec<_>>()
    };
    assert_eq!(ranges, [both([1, 1], [2, 3], [4, 8]), both([2, 4], [2, 4], [2, 4])]);
    assert!(loaded.engine.layer_count() > 0);
    let layers: serde_json::Value = serde_json::from_str(&loaded.engine.layers_json().unwrap()).unwrap();
    assert!(layers.get("Layers").is_some(), "{layers}");
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn every_shape_of_a_profile_runs_and_the_others_are_refused() {
    let loaded = load();
    let mut lane = Lane::new(&loaded, 0, 4 * 8);
    for (salt, (batch, seq)) in [(1, 1), (4, 8), (3, 5), (1, 8), (4, 1)].into_iter().enumerate() {
        let (ids, mask) = tokens(batch, seq, salt);
        lane.upload(&ids, &mask);
        lane.shape(batch, seq).unwrap();
        let hidden = loaded.engine.tensor("last_hidden_state").unwrap();
        assert_eq!(lane.context.shape(hidden).unwrap(), [batch as i64, seq as i64, HIDDEN as i64]);
        lane.context.enqueue(&mut lane.stream).unwrap();
        lane.check(&ids, &mask);
    }
    for (batch, seq) in [(5, 8), (4, 9), (0, 1)] {
        let error = lane.shape(batch, seq).unwrap_err();
        assert!(matches!(error, Error::OutsideProfile { .. }), "{error}");
        assert!(error.to_string().contains(&format!("{batch}x{seq}")) && error.to_string().contains("1x1:2x3:4x8"), "{error}");
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn a_bucket_is_captured_once_and_launched_with_fresh_ids() {
    let loaded = load();
    let mut lane = Lane::new(&loaded, BUCKET, 2 * 4);
    lane.context.enqueue(&mut lane.stream).unwrap();
    lane.stream.synchronize().unwrap();
    let context = &mut lane.context;
    let graph = lane.stream.capture(|stream| context.enqueue(stream)).unwrap();
    for salt in 0..5 {
        let (ids, mask) = tokens(2, 4, salt);
        lane.upload(&ids, &mask);
        lane.stream.launch(&graph).unwrap();
        lane.check(&ids, &mask);
    }

    // The graph keeps the context, its scratch and its buffers: nothing it uses can be freed under it.
    let Lane { context, mut stream, ids, mask, hidden } = lane;
    drop((context, ids, mask));
    let noise: Vec<DeviceBuffer<u8>> = (0..8).map(|_| loaded.device.alloc(1 << 16).unwrap()).collect();
    for buffer in &noise {
        stream.fill_bytes(buffer, 0xaa).unwrap();
    }
    stream.fill_bytes(&hidden, 0xff).unwrap();
    stream.launch(&graph).unwrap();
    let mut values = vec![0.0_f32; 8 * HIDDEN];
    stream.download(&hidden, &mut values).unwrap();
    let (ids, mask) = tokens(2, 4, 4);
    let expected: Vec<f32> =
        (0..8 * HIDDEN).map(|i| (ids[i / HIDDEN] as f32 + (i % HIDDEN) as f32 / 4.0) * mask[i / HIDDEN] as f32).collect();
    assert_eq!(values, expected);
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn a_buffer_that_is_too_small_is_refused_before_the_gpu_writes_past_it() {
    let loaded = load();
    let mut lane = Lane::new(&loaded, 0, 2 * 4);
    lane.shape(2, 4).unwrap();
    lane.context.enqueue(&mut lane.stream).unwrap();
    lane.shape(2, 5).unwrap();
    let error = lane.context.enqueue(&mut lane.stream).unwrap_err();
    assert!(
        matches!(&error, Error::TensorRt { .. }) && error.to_string().contains("needs 40 bytes, its memory has 32"),
        "{error}"
    );

    let mut stream = loaded.device.stream().unwrap();
    // SAFETY: it has no inputs' memory, and so refuses to run.
    let mut bare = unsafe { loaded.engine.create_context(BUCKET, &mut stream, None) }.unwrap();
    let bare = bare.enqueue(&mut stream).unwrap_err();
    assert!(bare.to_string().contains("its memory has 0"), "{bare}");
    let foreign = lane.context.enqueue(&mut stream).unwrap_err();
    assert!(foreign.to_string().contains("another stream"), "{foreign}");
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn many_threads_share_an_engine() {
    let loaded = load();
    std::thread::scope(|scope| {
        for salt in 0..8 {
            let loaded = &loaded;
            scope.spawn(move || {
                // Two profiles at the same time, several contexts at each.
                let mut lane = Lane::new(loaded, salt % 2, 4 * 8);
                for round in 0..50 {
                    let (ids, mask) = tokens(2, 4, salt + round);
                    lane.upload(&ids, &mask);
                    lane.shape(2, 4).unwrap();
                    lane.context.enqueue(&mut lane.stream).unwrap();
                    lane.check(&ids, &mask);
                }
            });
        }
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn the_time_of_each_layer_is_told() {
    let loaded = load();
    let mut lane = Lane::new(&loaded, BUCKET, 2 * 4);
    let (ids, mask) = tokens(2, 4, 0);
    lane.upload(&ids, &mask);
    let layers = lane.context.measure_layers(&mut lane.stream).unwrap();
    assert!(!layers.is_empty());
    assert!(layers.iter().all(|layer| !layer.name.is_empty() && layer.milliseconds >= 0.0), "{layers:?}");
    assert_eq!(lane.context.measure_layers(&mut lane.stream).unwrap().len(), layers.len(), "rows of two runs are mixed");
    lane.check(&ids, &mask);
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn a_damaged_plan_and_a_foreign_graph_are_errors() {
    let loaded = load();
    let runtime = loaded.engine.runtime();
    for plan in [&[][..], b"not a plan", &loaded.plan[..loaded.plan.len() / 2]] {
        // SAFETY: what is left of a plan, and no plan at all, which TensorRT tells by their first bytes and lengths.
        let error = unsafe { Engine::deserialize(runtime, plan) }.unwrap_err();
        assert!(matches!(&error, Error::TensorRt { action: "load the engine", .. }), "{error}");
        assert!(error.to_string().contains("build it again"), "{error}");
    }

    let library = runtime.library();
    for graph in [&b"not a graph"[..], &ONNX[..ONNX.len() / 2]] {
        let error = build_plan(library, &loaded.device, graph, &settings(), &NoProgress).unwrap_err();
        assert!(matches!(&error, Error::TensorRt { action: "build the engine", .. }), "{error}");
    }
    // An operator that nobody knows, in the place of the Gather.
    let place = ONNX.windows(6).position(|name| name == b"Gather").unwrap();
    let mut graph = ONNX.to_vec();
    graph[place..place + 6].copy_from_slice(b"Bather");
    let error = build_plan(library, &loaded.device, &graph, &settings(), &NoProgress).unwrap_err().to_string();
    assert!(error.contains("node 0") && error.contains("Bather"), "{error}");

    let mut none = settings();
    none.profiles.clear();
    assert!(matches!(build_plan(library, &loaded.device, ONNX, &none, &NoProgress), Err(Error::Setting { .. })));
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn a_cancelled_build_says_so() {
    struct Cancel(AtomicUsize);
    impl Progress for Cancel {
        fn step_done(&self, _: &str, _: u32) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
        fn cancelled(&self) -> bool {
            true
        }
    }
    let device = Device::open(0).unwrap();
    let library = Library::load().unwrap();
    let progress = Cancel(AtomicUsize::new(0));
    let error = build_plan(&library, &device, ONNX, &settings(), &progress).unwrap_err();
    assert!(matches!(error, Error::Cancelled { .. }), "{error}");
    assert_eq!(library.version().reports_progress(), progress.0.into_inner() > 0);
}

#[test]
#[ignore = "needs an NVIDIA GPU and TensorRT"]
fn a_timing_cache_is_taken_up_and_a_foreign_one_is_replaced() {
    let device = Device::open(0).unwrap();
    let library = Library::load().unwrap();
    let first = build_plan(&library, &device, ONNX, &settings(), &NoProgress).unwrap();
    assert!(!first.timing_cache.is_empty());
    for bytes in [first.timing_cache, b"foreign".to_vec()] {
        let mut settings = settings();
        settings.timing_cache = bytes;
        let plan = build_plan(&library, &device, ONNX, &settings, &NoProgress).unwrap();
        assert!(!plan.bytes.is_empty() && !plan.timing_cache.is_empty());
    }
}

//! A small MPNet as a TensorRT engine, with the CPU backend beside it.
#![allow(dead_code)] // each test file uses a part

#[path = "random.rs"]
mod random;

pub use random::Random;
use std::path::Path;
use std::sync::Arc;
use trt_embed::NoProgress;
use trt_embed::backend::CpuBackend;
use trt_embed::backend::gpu::{GpuBackend, GpuSettings, Padding};
use trt_embed::backend::tensorrt::{Arithmetic, BuildSettings, Engine, Library, Profile, Runtime, TensorRtEncoder, build_plan};
use trt_embed::cuda::Device;
use trt_embed::graph::{self, Precision};
use trt_embed::model::ModelFolder;
use trt_embed::pooling::{Head, Pooling, PoolingMode, Scaling};
use trt_embed::tokens::{BatchPlan, TokenBatch, batches_from_ids};

const FIXTURE: &str = "tests/fixtures/mpnet";
const PROFILES: [&str; 4] = ["1x8", "4x16", "2x2:2x8:8x24", "1x24"];
pub struct Gpu {
    pub engine: Arc<Engine>,
    pub folder: ModelFolder,
}

impl Gpu {
    pub fn open() -> Self {
        let folder = ModelFolder::open(Path::new(FIXTURE)).unwrap();
        let device = Device::open(0).unwrap();
        let library = Library::load().unwrap();
        let out = tempfile::tempdir().unwrap();
        graph::export_to_folder(&folder, Precision::Fp32, out.path()).unwrap();
        let onnx = std::fs::read(out.path().join("model.onnx")).unwrap();
        let mut settings = BuildSettings::default();
        settings.arithmetic = Arithmetic::Fp32;
        settings.profiles = PROFILES.iter().map(|text| text.parse::<Profile>().unwrap()).collect();
        let plan = build_plan(&library, &device, &onnx, &settings, &NoProgress).unwrap();
        let runtime = Runtime::new(&library, &device).unwrap();
        // SAFETY: the plan was built just now.
        let engine = unsafe { Engine::deserialize(&runtime, &plan.bytes) }.unwrap();
        Self { engine, folder }
    }

    pub fn head(&self, modes: &[PoolingMode], dim: Option<usize>, scaling: Scaling) -> Head {
        let pooling = Pooling::new(modes.iter().copied(), true).unwrap();
        Head::new(pooling, Vec::new(), self.folder.config.hidden_size, dim, scaling).unwrap()
    }

    pub fn backend(&self, head: Head, lanes: usize) -> GpuBackend {
        let encoder = Arc::new(TensorRtEncoder::new(self.engine.clone()).unwrap());
        let mut settings = GpuSettings::default();
        settings.lanes = lanes;
        GpuBackend::new(encoder, head, Padding::of_model(&self.folder), &settings).unwrap()
    }

    pub fn reference(&self, head: Head) -> CpuBackend {
        CpuBackend::new(self.folder.architecture().unwrap(), head, 24, 1).unwrap()
    }

    /// One batch of rows of these lengths, with random ids.
    pub fn batch(&self, lengths: &[usize], skip: u32, seed: u64) -> TokenBatch {
        let mut random = Random(seed);
        let vocab = self.folder.config.vocab_size;
        let rows: Vec<Vec<u32>> = lengths.iter().map(|&n| (0..n).map(|_| random.below(vocab) as u32).collect()).collect();
        let plan = BatchPlan::new(64, 1 << 20, 1);
        let mut batches = batches_from_ids(&rows, vocab, skip, &plan).unwrap();
        assert_eq!(batches.len(), 1);
        batches.remove(0)
    }
}

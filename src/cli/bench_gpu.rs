//! The benchmark's part for models that run on a GPU: the GPU's own times, memory, and the engine's fidelity.

use anyhow::Result;
use serde::Serialize;
use std::fmt::Write;
use std::path::PathBuf;
use trt_embed::Embedder;

/// Runs of which the GPU's time is the median.
#[cfg(feature = "cuda")]
const RUNS: usize = 200;

/// What runs the model.
#[derive(Debug, Serialize)]
pub struct GpuReport {
    /// The GPU.
    pub name: String,
    engine: Option<PathBuf>,
    precision: Option<String>,
    /// Bytes of device memory that lanes and kernels take; the engine's weights are besides.
    lane_bytes: usize,
    /// Bytes of device memory in use, whoever uses it.
    used_bytes: usize,
    profiles: Vec<ProfileReport>,
    fidelity: Option<FidelityReport>,
}

#[derive(Debug, Serialize)]
struct ProfileReport {
    shapes: String,
    /// Microseconds of the GPU at the smallest and at the largest shape, as measured at load.
    min_us: f64,
    max_us: f64,
}

#[derive(Debug, Serialize)]
struct FidelityReport {
    texts: usize,
    reference: String,
    min_cosine: f64,
    max_abs_difference: f64,
}

/// The GPU's own time of a call, medians in microseconds.
#[derive(Debug, Serialize)]
pub struct GpuTimes {
    /// The shape that is run.
    gpu_shape: String,
    gpu_graph_us: f64,
    gpu_encoder_us: f64,
    gpu_stage_us: f64,
    gpu_pool_us: f64,
}

impl GpuTimes {
    /// The columns of [`GpuTimes::line`].
    pub const HEAD: &str = "GPU time                      run as   all     encoder  stage  pool   wall p50 - encoder\n";

    /// One row of the table.
    pub fn line(&self, shape: &str, wall_p50: f64) -> String {
        let Self { gpu_shape, gpu_graph_us, gpu_encoder_us, gpu_stage_us, gpu_pool_us } = self;
        let more = wall_p50 - gpu_encoder_us;
        format!(
            "{shape:<28} {gpu_shape:>8} {gpu_graph_us:>8.1} {gpu_encoder_us:>8.1} {gpu_stage_us:>6.1} {gpu_pool_us:>6.1} {more:>19.1}\n"
        )
    }
}

impl GpuReport {
    /// The lines under the table.
    pub fn lines(&self) -> String {
        let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
        let mut out = format!(
            "device memory: {:.0} MiB for lanes, {:.0} MiB in use in all\nprofiles, GPU time at load:",
            mib(self.lane_bytes),
            mib(self.used_bytes)
        );
        for profile in &self.profiles {
            let ProfileReport { shapes, min_us, max_us } = profile;
            // Writing to a String does not fail.
            let _ = match min_us == max_us {
                true => write!(out, "  {shapes} {max_us:.0} us"),
                false => write!(out, "  {shapes} {min_us:.0} to {max_us:.0} us"),
            };
        }
        out.push('\n');
        if let Some(FidelityReport { texts, reference, min_cosine, max_abs_difference }) = &self.fidelity {
            let _ = writeln!(
                out,
                "fidelity of the engine: smallest cosine {min_cosine:.7}, largest difference {max_abs_difference:.1e}, {texts} texts against {reference}"
            );
        }
        out
    }
}

/// What runs the model, where that is a GPU.
#[cfg(feature = "cuda")]
pub fn report(embedder: &Embedder) -> Result<Option<GpuReport>> {
    use trt_embed::backend::Backend;
    let Some(gpu) = embedder.gpu() else { return Ok(None) };
    let memory = gpu.device().memory()?;
    let (precision, fidelity) = of_engine(embedder)?;
    let costs = gpu.costs();
    let costs = costs.iter().flat_map(|costs| costs.shapes());
    Ok(Some(GpuReport {
        name: gpu.device().properties().name.clone(),
        engine: embedder.info().engine.clone(),
        precision,
        lane_bytes: gpu.device_bytes(),
        used_bytes: memory.total - memory.free,
        profiles: gpu
            .profiles()
            .iter()
            .zip(costs)
            .map(|(range, cost)| ProfileReport { shapes: range.to_string(), min_us: cost.min_micros, max_us: cost.max_micros })
            .collect(),
        fidelity,
    }))
}

/// The engine's precision and fidelity, where an engine runs the model.
#[cfg(feature = "tensorrt")]
fn of_engine(embedder: &Embedder) -> Result<(Option<String>, Option<FidelityReport>)> {
    let Some(file) = &embedder.info().engine else { return Ok((None, None)) };
    let manifest = trt_embed::backend::tensorrt::EngineFile::read_manifest(file)?;
    let fidelity = manifest.fidelity.map(|fidelity| FidelityReport {
        texts: fidelity.texts,
        reference: fidelity.reference,
        min_cosine: fidelity.min_cosine,
        max_abs_difference: fidelity.max_abs_difference,
    });
    Ok((Some(manifest.arithmetic.to_string()), fidelity))
}

#[cfg(all(feature = "cuda", not(feature = "tensorrt")))]
fn of_engine(_: &Embedder) -> Result<(Option<String>, Option<FidelityReport>)> {
    Ok((None, None))
}

/// Always none: this build runs on the CPU alone.
#[cfg(not(feature = "cuda"))]
pub fn report(_: &Embedder) -> Result<Option<GpuReport>> {
    Ok(None)
}

/// The GPU's time for such a call, where the model runs on one.
#[cfg(feature = "cuda")]
pub fn times(embedder: &Embedder, batch: usize, seq: usize) -> Result<Option<GpuTimes>> {
    let Some(gpu) = embedder.gpu() else { return Ok(None) };
    // More rows than one batch holds are several calls.
    let most = gpu.profiles().iter().filter(|range| range.max.longest >= seq).map(|range| range.max.rows).max().unwrap_or(0);
    if batch > most {
        return Ok(None);
    }
    let (shape, micros) = gpu.gpu_micros(batch, seq, RUNS)?;
    Ok(Some(GpuTimes {
        gpu_shape: shape.to_string(),
        gpu_graph_us: micros.call,
        gpu_encoder_us: micros.encoder,
        gpu_stage_us: micros.stage,
        gpu_pool_us: micros.pool,
    }))
}

/// Always none.
#[cfg(not(feature = "cuda"))]
pub fn times(_: &Embedder, _: usize, _: usize) -> Result<Option<GpuTimes>> {
    Ok(None)
}

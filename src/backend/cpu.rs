//! The CPU backend: the exported graph run by `tract`.

use crate::backend::{Backend, Limits, cpu_ops, cpu_quantize};
use crate::graph::{Graph, Precision};
use crate::model::{EncoderConfig, Weights};
use crate::pooling::Head;
use crate::tokens::TokenBatch;
use crate::{Error, Result};
use std::path::Path;
use std::sync::Arc;
use tract_onnx::data_resolver::ModelDataResolver;
use tract_onnx::prelude::{
    Framework, InferenceModelExt, IntoRunnable, TValue, TVec, Tensor, TractError, TractResult, TypedRunnableModel, tvec,
};

/// Tokens of one batch, padding included. Larger batches leave the cache: twice this runs mixed texts a quarter slower, half of it at
/// most a tenth faster (benches/RESULTS.md).
const BATCH_TOKENS: usize = 1024;
/// Rows of one batch.
const MAX_BATCH: usize = 64;

/// The graph, optimised and ready to run from any number of threads.
pub struct CpuBackend {
    plan: Arc<TypedRunnableModel>,
    head: Head,
    limits: Limits,
    /// Names of the outputs after the hidden states.
    observed: Vec<String>,
}

impl CpuBackend {
    /// Exports the graph of `config` and `weights` and prepares it. The weights are unmapped on the way, as soon as `tract` has
    /// them, so that they are never held three times.
    ///
    /// # Errors
    /// See [`Graph::new`]; [`Error::Backend`] when `tract` refuses the graph.
    pub fn new(config: &EncoderConfig, weights: Weights, head: Head, max_seq: usize, threads: usize) -> Result<Self> {
        let graph = Graph::new(config, &weights, Precision::Fp32)?;
        drop(weights);
        Self::from_graph(graph, head, max_seq, threads)
    }

    /// Prepares any fp32 graph, quantised and observed ones too.
    ///
    /// # Errors
    /// [`Error::Backend`] when `tract` refuses the graph.
    pub fn from_graph(graph: Graph, head: Head, max_seq: usize, threads: usize) -> Result<Self> {
        let observed = graph.outputs().skip(1).map(str::to_owned).collect();
        let model = graph.encode_with_external_data(HERE)?;
        let mut onnx = tract_onnx::onnx();
        onnx.op_register.insert("LayerNormalization", cpu_ops::layer_norm);
        onnx.op_register.insert("QuantizeLinear", cpu_quantize::quantize);
        onnx.op_register.insert("DequantizeLinear", cpu_quantize::dequantize);
        onnx.provider = Arc::new(GraphConstants { graph });
        let proto = onnx.proto_model_for_read(&mut model.as_slice()).map_err(failed)?;
        let parsed = onnx.parse(&proto, Some(HERE)).map_err(failed)?;
        drop(onnx);
        let mut model = parsed.model.into_optimized().map_err(failed)?;
        cpu_ops::replace_adds(&mut model);
        let plan = model.into_runnable().map_err(failed)?;
        let limits = Limits { max_batch: MAX_BATCH, max_seq, batch_tokens: BATCH_TOKENS, parallelism: threads };
        Ok(Self { plan, head, limits, observed })
    }

    /// Runs a graph made by [`Graph::observed`] and shows `visit` each tensor that feeds a linear: its name and its values
    /// `[batch, seq, channels]`, those of padding included. Any other graph shows nothing.
    ///
    /// # Errors
    /// As [`Backend::encode`].
    pub fn observe(&self, batch: &TokenBatch, visit: &mut dyn FnMut(&str, &[f32])) -> Result<()> {
        for (name, tensor) in self.observed.iter().zip(self.run_all(batch)?.iter().skip(1)) {
            visit(name, values(tensor)?);
        }
        Ok(())
    }

    /// Hidden states `[batch, seq, hidden]`.
    fn run(&self, batch: &TokenBatch) -> Result<TValue> {
        Ok(self.run_all(batch)?.swap_remove(0))
    }

    /// Hidden states, then what the graph lets see beside them.
    fn run_all(&self, batch: &TokenBatch) -> Result<TVec<TValue>> {
        let shape = [batch.batch(), batch.seq];
        let ids = Tensor::from_shape(&shape, &batch.ids).map_err(failed)?;
        let mask = Tensor::from_shape(&shape, &batch.attention_mask()).map_err(failed)?;
        self.plan.run(tvec![ids.into(), mask.into()]).map_err(failed)
    }
}

impl Backend for CpuBackend {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn encode(&self, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
        let hidden = self.run(batch)?;
        self.head.apply(values(&hidden)?, batch, out);
        Ok(())
    }

    fn hidden(&self, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
        let hidden = self.run(batch)?;
        out.copy_from_slice(values(&hidden)?);
        Ok(())
    }

    fn limits(&self) -> Limits {
        self.limits
    }
}

fn values(hidden: &TValue) -> Result<&[f32]> {
    hidden.try_as_plain_ram().and_then(|view| view.as_slice::<f32>()).map_err(failed)
}

/// Where `tract` is told that the constants lie: it wants a path that exists, which no one opens.
const HERE: &str = ".";

/// Gives `tract` each constant when it asks for it, straight from the weight files.
struct GraphConstants {
    graph: Graph,
}

impl ModelDataResolver for GraphConstants {
    fn read_bytes_from_path(&self, buffer: &mut Vec<u8>, _path: &Path, offset: usize, _length: Option<usize>) -> TractResult<()> {
        Ok(self.graph.write_external_constant(offset as u64, buffer)?)
    }
}

fn failed(error: TractError) -> Error {
    Error::Backend { backend: "cpu", reason: format!("{error:#}") }
}

//! The CPU backend: the exported graph run by `tract`.

mod attention;
mod ops;
mod quantize;

use crate::executor::permits::Permits;
use crate::executor::{Backend, Limits};
use crate::graph::{Graph, Precision};
use crate::model::Architecture;
use crate::model::architecture::ScoreBias;
use crate::pooling::{Head, HiddenRows, check_output};
use crate::tokens::TokenBatch;
use crate::{Error, Result};
use std::path::Path;
use std::sync::Arc;
use tract_onnx::data_resolver::ModelDataResolver;
use tract_onnx::prelude::{
    Framework, InferenceModelExt, IntoRunnable, TValue, TVec, Tensor, TractError, TractResult, TypedRunnableModel, tvec,
};

/// Tokens of one batch, padding included. Products of more rows than fit a core's cache beside a panel of weights read them again for each
/// panel: 1,024 tokens take a fifth (MiniLM) to a half (MPNet-base) more a token. Fewer than this gain nothing, and small models lose by them
/// (benches/RESULTS.md).
pub const BATCH_TOKENS: usize = 192;
/// Rows of one batch.
const MAX_BATCH: usize = 64;

/// The longest texts for which scores of all pairs of tokens may lie in memory at once: 12 heads have 12 MB of them.
const LONG: usize = 512;

/// The id that fills rows up. The mask keeps it out of every real token's state, so that any id of the table does.
const PADDING: i32 = 0;

/// The graph, optimised and ready to run from any number of threads.
pub struct CpuBackend {
    plan: Arc<TypedRunnableModel>,
    head: Head,
    limits: Limits,
    /// Rows of the token embedding table.
    vocab_size: usize,
    /// One for each thread that was asked for: more callers wait.
    permits: Permits,
    /// Names of the outputs after the hidden states.
    observed: Vec<String>,
}

impl CpuBackend {
    /// Exports the graph of `architecture` and prepares it. The weights are unmapped on the way, as soon as `tract` has
    /// them, so that they are never held three times. At most `threads` batches run at a time, whoever asks; the others wait in the
    /// order they came.
    ///
    /// # Errors
    /// See [`Graph::new`]; [`Error::Backend`] when `tract` refuses the graph.
    pub fn new(architecture: Architecture, head: Head, max_seq: usize, threads: usize) -> Result<Self> {
        // A learnt bias of all pairs of positions is added whole: models that have one take short texts.
        let one_attention = max_seq > LONG && !matches!(architecture.score_bias, ScoreBias::Relative(_));
        let graph = match one_attention {
            true => Graph::with_one_attention(&architecture)?,
            false => Graph::new(&architecture, Precision::Fp32)?,
        };
        drop(architecture);
        Self::from_graph(graph, head, max_seq, threads)
    }

    /// Prepares any fp32 graph, quantised and observed ones too.
    ///
    /// # Errors
    /// [`Error::Backend`] when `tract` refuses the graph.
    pub fn from_graph(graph: Graph, head: Head, max_seq: usize, threads: usize) -> Result<Self> {
        let observed = graph.outputs().skip(1).map(str::to_owned).collect();
        let vocab_size = graph.vocab_size();
        let model = graph.encode_with_external_data(HERE)?;
        let mut onnx = tract_onnx::onnx();
        onnx.op_register.insert("LayerNormalization", ops::layer_norm);
        onnx.op_register.insert("Attention", attention::attention);
        onnx.op_register.insert("QuantizeLinear", quantize::quantize);
        onnx.op_register.insert("DequantizeLinear", quantize::dequantize);
        let constants = Arc::new(GraphConstants { graph });
        onnx.provider = constants.clone();
        let proto = onnx.proto_model_for_read(&mut model.as_slice()).map_err(failed)?;
        let parsed = onnx.parse(&proto, Some(HERE)).map_err(failed)?;
        drop(onnx);
        constants.graph.check_unchanged()?;
        drop(constants);
        let mut model = parsed.model.into_optimized().map_err(failed)?;
        ops::replace_broadcasts(&mut model);
        let plan = model.into_runnable().map_err(failed)?;
        let limits = Limits { max_batch: MAX_BATCH, max_seq, batch_tokens: BATCH_TOKENS, parallelism: threads.max(1) };
        Ok(Self { plan, head, limits, vocab_size, permits: Permits::new(threads), observed })
    }

    /// Runs a graph made by [`Graph::observed`] and shows `visit` each tensor that feeds a linear: its name and its values
    /// `[batch, longest, channels]`, those of padding included. Any other graph shows nothing.
    ///
    /// # Errors
    /// As [`Backend::encode`].
    pub fn observe(&self, batch: &TokenBatch, visit: &mut dyn FnMut(&str, &[f32])) -> Result<()> {
        self.check(batch)?;
        if batch.batch() == 0 {
            return Ok(());
        }
        let tensors = {
            // Given back before `visit` runs, which may be anything.
            let _permit = self.permits.take();
            self.run(batch)?
        };
        for (name, tensor) in self.observed.iter().zip(tensors.iter().skip(1)) {
            visit(name, values(tensor)?);
        }
        Ok(())
    }

    /// Whether the graph takes `batch`.
    fn check(&self, batch: &TokenBatch) -> Result<()> {
        let (seq, max_seq) = (batch.longest(), self.limits.max_seq);
        if seq > max_seq {
            return Err(Error::TokenBatch { reason: format!("rows of {seq} tokens, this executor takes up to {max_seq}") });
        }
        batch.check_ids(self.vocab_size)
    }

    /// Hidden states `[batch, longest, hidden]`, then what the graph lets see beside them. The caller has checked the batch and has a
    /// permit.
    fn run(&self, batch: &TokenBatch) -> Result<TVec<TValue>> {
        let shape = [batch.batch(), batch.longest()];
        let (ids, mask) = batch.padded(PADDING);
        let ids = Tensor::from_shape(&shape, &ids).map_err(failed)?;
        let mask = Tensor::from_shape(&shape, &mask).map_err(failed)?;
        self.plan.run(tvec![ids.into(), mask.into()]).map_err(failed)
    }
}

impl Backend for CpuBackend {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn encode(&self, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
        self.check(batch)?;
        check_output(out, batch.batch(), self.head.dim)?;
        if batch.batch() == 0 {
            return Ok(());
        }
        let _permit = self.permits.take();
        self.head.apply(values(&self.run(batch)?[0])?, HiddenRows::Padded(batch.longest()), batch, out)
    }

    fn hidden(&self, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
        self.check(batch)?;
        let width = self.head.hidden_size;
        check_output(out, batch.ids().len(), width)?;
        if batch.batch() == 0 {
            return Ok(());
        }
        let _permit = self.permits.take();
        let outputs = self.run(batch)?;
        let hidden = values(&outputs[0])?;
        let mut out = out.chunks_exact_mut(width.max(1));
        for (row, length) in hidden.chunks_exact(batch.longest() * width).zip(batch.lengths()) {
            for (state, out) in row.chunks_exact(width).take(length as usize).zip(&mut out) {
                out.copy_from_slice(state);
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ModelFolder;

    /// The fixture with `threads` threads.
    fn backend(threads: usize) -> CpuBackend {
        let folder = ModelFolder::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/bert")).unwrap();
        let graph = Graph::observed(&folder.architecture().unwrap()).unwrap();
        CpuBackend::from_graph(graph, Head::of_model(&folder).unwrap(), 16, threads).unwrap()
    }

    fn batch(backend: &CpuBackend, rows: &[&[u32]]) -> TokenBatch {
        let mut batch = TokenBatch::default();
        batch.refill(rows, backend.vocab_size, 0).unwrap();
        batch
    }

    #[test]
    fn no_more_calls_run_at_a_time_than_threads_were_asked_for() {
        let backend = backend(2);
        let batch = batch(&backend, &[&[5, 6, 7]]);
        let (mut vector, mut hidden) = (vec![0.0; backend.head.dim], vec![0.0; 3 * backend.head.hidden_size]);
        let taken = [backend.permits.take(), backend.permits.take()];
        std::thread::scope(|scope| {
            let calls = [
                scope.spawn(|| backend.encode(&batch, &mut vector)),
                scope.spawn(|| backend.hidden(&batch, &mut hidden)),
                scope.spawn(|| backend.observe(&batch, &mut |_, _| ())),
            ];
            while backend.permits.waiting() != calls.len() as u64 {
                std::thread::yield_now();
            }
            assert!(calls.iter().all(|call| !call.is_finished()), "a call ran without a permit");
            drop(taken);
            calls.into_iter().for_each(|call| call.join().unwrap().unwrap());
        });
        assert!(vector.iter().any(|&value| value != 0.0));
    }

    #[test]
    fn what_does_not_fit_the_model_is_refused_before_it_runs() {
        let backend = backend(1);
        let (dim, width) = (backend.head.dim, backend.head.hidden_size);
        let both = |batch: &TokenBatch| {
            let mut out = vec![7.0; batch.batch() * dim];
            let encoded = backend.encode(batch, &mut out);
            assert!(out.iter().all(|&value| value == 7.0));
            [encoded, backend.hidden(batch, &mut vec![0.0; batch.ids().len() * width])]
        };
        for outside in [backend.vocab_size as i32, i32::MAX] {
            let batch = TokenBatch::from_padded(&[5, 6, 7, outside], &[2, 2], 2, 0).unwrap();
            for result in both(&batch).into_iter().chain([backend.observe(&batch, &mut |_, _| panic!("it ran"))]) {
                assert!(matches!(result, Err(Error::TokenId { text: 1, .. })), "{result:?}");
            }
        }
        for result in both(&TokenBatch::from_padded(&[5; 17], &[17], 17, 0).unwrap()) {
            let error = result.unwrap_err();
            assert!(matches!(error, Error::TokenBatch { .. }), "{error}");
            assert!(error.to_string().contains("17 tokens") && error.to_string().contains("16"), "{error}");
        }
        let whole = batch(&backend, &[&[5, 6, 7], &[8]]);
        for wrong in [0, dim, 2 * dim + 1] {
            assert!(matches!(backend.encode(&whole, &mut vec![0.0; wrong]), Err(Error::OutputLength { .. })));
        }
        for wrong in [0, 3 * width, 4 * width - 1, 6 * width] {
            assert!(matches!(backend.hidden(&whole, &mut vec![0.0; wrong]), Err(Error::OutputLength { .. })));
        }
    }

    #[test]
    fn no_rows_give_nothing_and_rows_without_tokens_zeros() {
        let backend = backend(1);
        backend.encode(&TokenBatch::default(), &mut []).unwrap();
        backend.hidden(&TokenBatch::default(), &mut []).unwrap();
        let empty = TokenBatch::from_padded(&[5, 6, 0, 0], &[2, 0], 2, 2).unwrap();
        let mut out = vec![7.0; 2 * backend.head.dim];
        backend.encode(&empty, &mut out).unwrap();
        assert!(out.iter().all(|&value| value == 0.0), "{out:?}");
    }

    #[test]
    fn an_observer_may_call_the_backend_again() {
        let backend = backend(1);
        let batch = batch(&backend, &[&[5, 6, 7]]);
        let (mut vector, mut calls) = (vec![0.0; backend.head.dim], 0);
        let mut again = |_: &str, _: &[f32]| {
            backend.encode(&batch, &mut vector).unwrap();
            calls += 1;
        };
        backend.observe(&batch, &mut again).unwrap();
        assert_eq!(calls, backend.observed.len());
        assert!(calls > 0);
    }
}

//! The residual stream's own kernels: a checked launch of each.
#![allow(unsafe_code)]

use super::kernels::{DeviceNorm, Matrix, NativeKernels, Rows, address, argument, hold, norm_parameters};
use crate::cuda::launch::{Grid, Parameters, c_int};
use crate::cuda::{DeviceBuffer, Result, Stream};

impl NativeKernels {
    /// Enqueues making the stream of token ids, with statistics for `norm`. `added` `[positions, hidden]`.
    ///
    /// # Errors
    /// [`CudaError::Argument`] for buffers that are too short or of another device.
    pub fn embed(
        &self,
        stream: &mut Stream,
        ids: &DeviceBuffer<i32>,
        rows: &Rows<'_>,
        (words, added): (&DeviceBuffer<u8>, Option<&DeviceBuffer<f32>>),
        norm: Option<&DeviceNorm>,
        into: (&Matrix, &DeviceBuffer<f32>),
    ) -> Result<()> {
        const CALL: &str = "embed";
        let (matrix, statistics) = into;
        self.check_stream(CALL, matrix, statistics, rows)?;
        if ids.len() < rows.tokens {
            return Err(argument(CALL, format!("{} ids for {} tokens", ids.len(), rows.tokens)));
        }
        hold(stream, &[Some(ids), Some(rows.starts), Some(rows.lengths)]);
        hold(stream, &[Some(words), Some(&matrix.values)]);
        hold(stream, &[added, Some(statistics)]);
        let mut parameters = Parameters::new();
        for buffer in [ids, rows.starts, rows.lengths] {
            parameters.address(buffer.address());
        }
        parameters.int(c_int(CALL, rows.rows)?);
        parameters.address(words.address());
        parameters.address(address(added));
        parameters.address(matrix.values.address());
        parameters.address(statistics.address());
        for n in [rows.tokens, matrix.capacity, matrix.columns] {
            parameters.int(c_int(CALL, n)?);
        }
        norm_parameters(&mut parameters, norm);
        // Not dependent: `plan_attention` starts with this kernel and counts lengths at once, which are whole then.
        let grid = Grid { dependent: false, ..self.token_grid(rows.tokens) };
        // SAFETY: stream.cu's parameters, in order; the stream's and the rows' sizes were checked above. The ids were checked against the table
        // where the batch entered, and padding's id where the lanes were made; rows are no longer than the positions, which the encoder's
        // ranges see to.
        unsafe { self.launch(stream, &self.0.embed, CALL, grid, parameters) }
    }

    /// Enqueues measuring the stream for `norm`.
    ///
    /// # Errors
    /// As [`NativeKernels::embed`].
    pub fn measure(
        &self,
        stream: &mut Stream,
        (matrix, statistics): (&Matrix, &DeviceBuffer<f32>),
        rows: &Rows<'_>,
        norm: &DeviceNorm,
        fault: (usize, &DeviceBuffer<i32>),
    ) -> Result<()> {
        const CALL: &str = "measure the stream";
        stream.hold_buffer(&matrix.values);
        let how = (&self.0.statistics, CALL, self.token_grid(rows.tokens), matrix.values.address());
        // SAFETY: stream.cu's statistics; the matrix holds the tokens, as is checked with the rows.
        unsafe { self.make_statistics(stream, how, (matrix, statistics), rows, norm, fault) }
    }

    /// Enqueues putting the stream through `norm`, in place; its statistics are then those of nothing.
    ///
    /// # Errors
    /// As [`NativeKernels::embed`].
    pub fn normalise(
        &self,
        stream: &mut Stream,
        (matrix, statistics): (&Matrix, &DeviceBuffer<f32>),
        rows: &Rows<'_>,
        norm: &DeviceNorm,
    ) -> Result<()> {
        const CALL: &str = "normalise the stream";
        self.check_stream(CALL, matrix, statistics, rows)?;
        self.check_norm(CALL, norm, matrix.columns)?;
        hold(stream, &[Some(&matrix.values)]);
        hold(stream, &[Some(statistics), Some(&norm.gamma), norm.beta.as_ref()]);
        let mut parameters = Parameters::new();
        for address in [matrix.values.address(), statistics.address(), norm.gamma.address(), address(norm.beta.as_ref())] {
            parameters.address(address);
        }
        for n in [rows.tokens, matrix.capacity, matrix.columns] {
            parameters.int(c_int(CALL, n)?);
        }
        // SAFETY: stream.cu's parameters, in order; sizes were checked above.
        unsafe { self.launch(stream, &self.0.normalise, CALL, self.token_grid(rows.tokens), parameters) }
    }

    /// Enqueues adding `x` through `norm` to the stream, seen through `view` where there is one, with statistics for `next`.
    ///
    /// # Errors
    /// As [`NativeKernels::embed`].
    pub fn add_normed(
        &self,
        stream: &mut Stream,
        (matrix, statistics, view): (&Matrix, &DeviceBuffer<f32>, Option<&DeviceNorm>),
        (x, norm): (&Matrix, &DeviceNorm),
        rows: &Rows<'_>,
        next: Option<&DeviceNorm>,
        (stage, fault): (usize, &DeviceBuffer<i32>),
    ) -> Result<()> {
        const CALL: &str = "add what attention gave";
        self.check_stream(CALL, matrix, statistics, rows)?;
        self.check_matrix(CALL, x)?;
        for norm in [Some(norm), view].into_iter().flatten() {
            self.check_norm(CALL, norm, matrix.columns)?;
        }
        if x.columns != matrix.columns || x.capacity != matrix.capacity || fault.is_empty() {
            return Err(argument(CALL, format!("{x:?} to {matrix:?}")));
        }
        let view_weights = (view.map(|norm| &norm.gamma), view.and_then(|norm| norm.beta.as_ref()));
        hold(stream, &[Some(&matrix.values), Some(&x.values)]);
        hold(stream, &[Some(statistics), view_weights.0, view_weights.1, Some(&norm.gamma), norm.beta.as_ref()]);
        hold(stream, &[Some(rows.starts), Some(rows.lengths), Some(fault)]);
        let mut parameters = Parameters::new();
        for address in [
            matrix.values.address(),
            statistics.address(),
            address(view_weights.0),
            address(view_weights.1),
            x.values.address(),
            norm.gamma.address(),
            address(norm.beta.as_ref()),
            rows.starts.address(),
            rows.lengths.address(),
        ] {
            parameters.address(address);
        }
        for n in [rows.rows, rows.tokens, matrix.capacity, matrix.columns] {
            parameters.int(c_int(CALL, n)?);
        }
        norm_parameters(&mut parameters, Some(norm));
        norm_parameters(&mut parameters, next);
        parameters.int(c_int(CALL, stage)?);
        parameters.address(fault.address());
        // SAFETY: stream.cu's parameters, in order; sizes were checked above.
        unsafe { self.launch(stream, &self.0.add_normed, CALL, self.token_grid(rows.tokens), parameters) }
    }

    /// Enqueues giving the stream out through `norm`, or as it is, as f32 `[tokens, hidden]`, and `fault` into `seen`.
    ///
    /// # Errors
    /// As [`NativeKernels::embed`].
    pub fn hidden_states(
        &self,
        stream: &mut Stream,
        (matrix, statistics): (&Matrix, &DeviceBuffer<f32>),
        rows: &Rows<'_>,
        norm: Option<&DeviceNorm>,
        out: &DeviceBuffer<f32>,
        (fault, seen): (&DeviceBuffer<i32>, &DeviceBuffer<i32>),
    ) -> Result<()> {
        const CALL: &str = "give hidden states";
        self.check_stream(CALL, matrix, statistics, rows)?;
        if let Some(norm) = norm {
            self.check_norm(CALL, norm, matrix.columns)?;
        }
        if out.len() < rows.tokens * matrix.columns || fault.is_empty() || seen.is_empty() {
            return Err(argument(CALL, format!("{} values for {} tokens of {}", out.len(), rows.tokens, matrix.columns)));
        }
        hold(stream, &[Some(fault), Some(seen)]);
        let (gamma, beta) = (norm.map(|norm| &norm.gamma), norm.and_then(|norm| norm.beta.as_ref()));
        hold(stream, &[Some(&matrix.values)]);
        hold(stream, &[Some(statistics), gamma, beta, Some(out)]);
        let mut parameters = Parameters::new();
        for address in [matrix.values.address(), statistics.address(), address(gamma), address(beta), out.address()] {
            parameters.address(address);
        }
        for n in [rows.tokens, matrix.capacity, matrix.columns] {
            parameters.int(c_int(CALL, n)?);
        }
        parameters.address(fault.address());
        parameters.address(seen.address());
        // SAFETY: stream.cu's parameters, in order; sizes were checked above.
        unsafe { self.launch(stream, &self.0.hidden_states, CALL, self.token_grid(rows.tokens), parameters) }
    }
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;

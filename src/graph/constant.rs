//! Constants of a graph: where their values come from and how they are written, one at a time.

use crate::graph::onnx::ElementType;
use crate::model::TensorView;
use crate::{Error, Result};
use half::f16;

/// A named constant. Its bytes are made when it is written, so that a graph never holds a second copy of the weights.
#[derive(Debug, Clone)]
pub(super) struct Constant {
    pub name: String,
    pub dims: Vec<usize>,
    pub element: ElementType,
    pub values: Values,
}

#[derive(Debug, Clone)]
pub(super) enum Values {
    /// A stored tensor, times a factor.
    Stored { view: TensorView, factor: f32 },
    /// A stored `[out, in]` matrix, written as `[in, out]`, times a factor.
    Transposed { view: TensorView, factor: f32 },
    /// A stored `[out, in]` matrix, each column times its own factor.
    Columns { view: TensorView, columns: Vec<f32> },
    /// Values made while the graph was built.
    Floats(Vec<f32>),
    /// Shapes and indices.
    Ints(Vec<i64>),
    /// Zeros of any type: zero points.
    Zeros,
}

impl Constant {
    /// Whether the file that the values lie in is as it was when it was opened.
    ///
    /// # Errors
    /// [`Error::FileChanged`]; [`Error::Io`].
    pub fn check_unchanged(&self) -> Result<()> {
        match &self.values {
            Values::Stored { view, .. } | Values::Transposed { view, .. } | Values::Columns { view, .. } => {
                view.check_unchanged()
            }
            Values::Floats(_) | Values::Ints(_) | Values::Zeros => Ok(()),
        }
    }

    /// Bytes that [`Constant::write`] appends.
    pub fn size(&self) -> usize {
        self.dims.iter().product::<usize>() * self.element.size()
    }

    /// Appends the values, little-endian, to `out`.
    ///
    /// # Errors
    /// [`Error::Onnx`] when a finite weight is too large for fp16.
    pub fn write(&self, out: &mut Vec<u8>) -> Result<()> {
        out.reserve(self.size());
        match &self.values {
            Values::Ints(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
            Values::Zeros => out.resize(out.len() + self.size(), 0),
            Values::Columns { view, columns } => {
                self.write_floats(view.to_f32().iter().zip(columns.iter().cycle()).map(|(value, column)| value * column), out)?;
            }
            Values::Floats(values) => self.write_floats(values.iter().copied(), out)?,
            Values::Stored { view, factor } => {
                // Multiplying by 1 changes no value, so that unscaled weights are written exactly.
                self.write_floats(view.to_f32().iter().map(|value| value * factor), out)?;
            }
            Values::Transposed { view, factor } => {
                let values = view.to_f32();
                let (rows, columns) = (view.shape[0], view.shape[1]);
                let transposed = transpose(&values, rows, columns);
                self.write_floats(transposed.iter().map(|value| value * factor), out)?;
            }
        }
        Ok(())
    }

    fn write_floats(&self, values: impl Iterator<Item = f32>, out: &mut Vec<u8>) -> Result<()> {
        if self.element == ElementType::Float32 {
            out.extend(values.flat_map(f32::to_le_bytes));
            return Ok(());
        }
        for value in values {
            let half = f16::from_f32(value);
            if value.is_finite() && half.is_infinite() {
                return Err(Error::Onnx {
                    reason: format!("constant \"{}\" holds {value}, too large for fp16; export it with fp32", self.name),
                });
            }
            out.extend_from_slice(&half.to_le_bytes());
        }
        Ok(())
    }
}

/// `[rows, columns]` to `[columns, rows]`, in tiles that stay in the cache.
fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    const TILE: usize = 32;
    let mut transposed = vec![0.0; values.len()];
    for row_tile in (0..rows).step_by(TILE) {
        for column_tile in (0..columns).step_by(TILE) {
            for row in row_tile..(row_tile + TILE).min(rows) {
                for column in column_tile..(column_tile + TILE).min(columns) {
                    transposed[column * rows + row] = values[row * columns + column];
                }
            }
        }
    }
    transposed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposes_shapes_that_are_no_multiple_of_the_tile() {
        for (rows, columns) in [(1, 1), (1, 70), (33, 65), (64, 32)] {
            let values: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
            let transposed = transpose(&values, rows, columns);
            for row in 0..rows {
                for column in 0..columns {
                    assert_eq!(transposed[column * rows + row], values[row * columns + column]);
                }
            }
        }
    }

    #[test]
    fn fp16_refuses_what_it_cannot_hold() {
        let constant = |value| Constant {
            name: "bias".into(),
            dims: vec![1],
            element: ElementType::Float16,
            values: Values::Floats(vec![value]),
        };
        let mut out = Vec::new();
        assert!(constant(65504.0).write(&mut out).is_ok());
        let message = constant(1e6).write(&mut out).unwrap_err().to_string();
        assert!(message.contains("\"bias\" holds 1000000"), "{message}");
    }
}

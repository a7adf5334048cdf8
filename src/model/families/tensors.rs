//! Tensors of a folder as the parts of an architecture, held against its configuration.

use crate::Result;
use crate::model::Weights;
use crate::model::architecture::{Linear, Norm, NormKind, Table};
use crate::model::config::EncoderConfig;

/// The tensors of one folder.
pub(super) struct Tensors<'a> {
    pub config: &'a EncoderConfig,
    pub weights: &'a Weights,
}

impl Tensors<'_> {
    pub fn table(&self, name: &str, rows: usize, width: usize) -> Result<Table> {
        Ok(Table { name: name.to_owned(), rows: self.weights.tensor(&format!("{name}.weight"), &[rows, width])? })
    }

    pub fn linear(&self, name: &str, outputs: usize, inputs: usize, biased: bool) -> Result<Linear> {
        let weight = self.weights.tensor(&format!("{name}.weight"), &[outputs, inputs])?;
        let bias = match biased {
            true => Some(self.weights.tensor(&format!("{name}.bias"), &[outputs])?),
            false => None,
        };
        Ok(Linear { name: name.to_owned(), weight, bias })
    }

    /// A LayerNorm over a hidden state.
    pub fn norm(&self, name: &str, biased: bool) -> Result<Norm> {
        let shape = [self.config.hidden_size];
        let bias = match biased {
            true => Some(self.weights.tensor(&format!("{name}.bias"), &shape)?),
            false => None,
        };
        Ok(Norm {
            name: name.to_owned(),
            kind: NormKind::LayerNorm,
            weight: self.weights.tensor(&format!("{name}.weight"), &shape)?,
            bias,
            epsilon: self.config.layer_norm_eps,
        })
    }
}

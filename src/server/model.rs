//! A model that is served: requests to rows of ids, raw vectors to those that a request asks for.

use super::encoding::Ranges;
use super::failure::Failure;
use super::health::Health;
use super::inputs::{Inputs, Item};
use crate::model::{ModelFolder, Scaling};
use crate::pooling::cut_and_scale;
use crate::tokens::{Describer, Row, Tokenizer};
use crate::{Embedder, EmbedderBuilder, Result};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// See the module.
pub(super) struct Model {
    /// The name that answers tell.
    pub name: String,
    /// Gives vectors of the full width, unscaled.
    pub embedder: Embedder,
    pub folder: ModelFolder,
    pub health: Health,
    /// Made when it is first needed: a large vocabulary takes some ten megabytes.
    describer: Mutex<Option<Arc<Describer>>>,
    /// Whole vectors of the calibration texts, one after the other.
    calibration: Vec<f32>,
    /// Their ranges by [`Shape::dim`], from when they are first asked for.
    ranges: Mutex<BTreeMap<usize, Arc<Ranges>>>,
}

/// How the texts of a request become ids.
#[derive(Debug, Clone)]
pub(super) struct Reading {
    /// The key of the body that the texts stand in, for messages.
    pub param: &'static str,
    /// Whether long texts are cut; else they are an error.
    pub truncate: bool,
    /// Which end of long texts is cut; the tokenizer's own where not said.
    pub side: Option<Side>,
    pub prompt_name: Option<String>,
}

/// `truncation_direction`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(super) enum Side {
    #[serde(alias = "left")]
    Left,
    #[serde(alias = "right")]
    Right,
}

/// What vectors a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// Values of a vector.
    pub dim: usize,
    pub normalize: bool,
}

/// A request's texts as ids.
pub(super) struct Rows {
    pub rows: Vec<Row>,
    /// Leading tokens that pooling leaves out.
    pub skip: u32,
}

impl Rows {
    pub fn tokens(&self) -> usize {
        self.rows.iter().map(|row| row.ids.len()).sum()
    }
}

impl Model {
    /// Opens the model and runs it once, so that the first request finds it warm.
    ///
    /// # Errors
    /// Those of [`EmbedderBuilder::build`], and the executor's.
    pub fn load(name: &str, builder: EmbedderBuilder, queue_tokens: usize, calibration: &[String]) -> Result<Self> {
        let embedder = builder.queue_tokens(queue_tokens).raw().build()?;
        let folder = ModelFolder::open(&embedder.info().folder)?;
        let mut model = Self::new(name, embedder, folder);
        model.embedder.probe()?;
        if !calibration.is_empty() {
            model.calibration = model.embedder.embed(calibration)?.rows().flatten().copied().collect();
        }
        model.embedder.embed(&["A first sentence, so that none of a client's is the first."])?;
        Ok(model)
    }

    pub fn new(name: &str, embedder: Embedder, folder: ModelFolder) -> Self {
        Self {
            name: name.to_owned(),
            embedder,
            folder,
            health: Health::default(),
            describer: Mutex::default(),
            calibration: Vec::new(),
            ranges: Mutex::default(),
        }
    }

    /// Values of a whole vector.
    fn width(&self) -> usize {
        self.embedder.info().dim
    }

    /// What `dimensions` and `normalize` ask for. Without `dimensions` vectors have as many values as the model folder says.
    ///
    /// # Errors
    /// More values than the model has, or none.
    pub fn shape(&self, dimensions: Option<usize>, normalize: bool) -> std::result::Result<Shape, Failure> {
        let width = self.width();
        let dim = dimensions.or(self.folder.cut(width)).unwrap_or(width);
        if !(1..=width).contains(&dim) {
            let message = format!("`dimensions` is {dim}; 1 to {width} are the values of this model's vectors");
            return Err(Failure::validation("dimensions", message));
        }
        Ok(Shape { dim, normalize })
    }

    /// A whole vector as the request wants it: cut, then scaled.
    ///
    /// # Errors
    /// [`crate::Error::Setting`] for a shape of another model.
    pub fn finish(&self, vector: &[f32], shape: Shape) -> Result<Vec<f32>> {
        let scaling = if shape.normalize { Scaling::AfterCut } else { Scaling::None };
        let mut finished = vec![0.0; shape.dim];
        cut_and_scale(vector, self.width(), shape.dim, scaling, &mut finished)?;
        Ok(finished)
    }

    /// The ranges of the values of unit vectors of `dim` values, over the calibration texts.
    ///
    /// # Errors
    /// A server that was started without them.
    pub fn ranges(&self, dim: usize) -> std::result::Result<Arc<Ranges>, Failure> {
        if self.calibration.is_empty() {
            let message = "int8 and uint8 need calibrated ranges of the values; start the server with --calibration-texts, or ask for float, base64, binary or ubinary";
            return Err(Failure::validation("encoding_format", message));
        }
        // Whole after any panic: entries are put in when they are made.
        let mut known = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ranges) = known.get(&dim) {
            return Ok(ranges.clone());
        }
        let shape = Shape { dim, normalize: true };
        let vectors: Vec<Vec<f32>> =
            self.calibration.chunks_exact(self.width()).map(|vector| self.finish(vector, shape)).collect::<Result<_>>()?;
        let ranges = Arc::new(Ranges::of(vectors.iter().map(Vec::as_slice)).unwrap_or_default());
        known.insert(dim, ranges.clone());
        Ok(ranges)
    }

    /// The ids of `inputs`. Those that come as ids are used as they are: without a prompt, and never cut.
    ///
    /// # Errors
    /// An input that cannot be tokenised, or that is too long and may not be cut; a prompt that the model does not have.
    pub fn rows(&self, inputs: &Inputs, reading: &Reading) -> std::result::Result<Rows, Failure> {
        let param = reading.param;
        let is_text = |item: &Item| matches!(item, Item::Text(_));
        let (any_text, all_text) = (inputs.items.iter().any(is_text), inputs.items.iter().all(is_text));
        if !all_text && reading.prompt_name.is_some() {
            let message = "a prompt cannot be put before token ids, which are used as they are; send texts, or no `prompt_name`";
            return Err(Failure::validation("prompt_name", message));
        }
        let tokenizer = self.tokenizer(reading)?;
        // Ids have no prompt that could be left out.
        let skip = if any_text { tokenizer.skip() } else { 0 };
        if skip > 0 && !all_text {
            let message = format!("`{param}` mixes texts and token ids, which this model pools differently; send them apart");
            return Err(Failure::validation(param, message));
        }
        let rows: Vec<Result<Row>> = if all_text {
            let texts: Vec<&str> = inputs.items.iter().filter_map(text_of).collect();
            tokenizer.rows(&texts)
        } else {
            inputs.items.iter().enumerate().map(|(index, item)| one_row(&tokenizer, index, item)).collect()
        };
        let mut whole = Vec::with_capacity(rows.len());
        for (index, row) in rows.into_iter().enumerate() {
            let row = row.map_err(|error| about(param, error))?;
            if row.truncated && !reading.truncate {
                let most = tokenizer.max_tokens();
                let message = format!(
                    "`{param}` of index {index} (from 0) has more than {most} tokens; shorten it, or let it be cut (`truncate`)"
                );
                return Err(Failure::validation(param, message));
            }
            // Which of the prompt's tokens are left is not known then.
            if row.truncated && skip > 0 && reading.side == Some(Side::Left) {
                let message = format!(
                    "`{param}` of index {index} (from 0) is too long to be cut from the left: this model leaves its prompt out of the vector; cut it from the right"
                );
                return Err(Failure::validation("truncation_direction", message));
            }
            whole.push(row);
        }
        Ok(Rows { rows: whole, skip })
    }

    fn tokenizer(&self, reading: &Reading) -> Result<Tokenizer> {
        let tokenizer = match &reading.prompt_name {
            None => self.embedder.tokenizer().clone(),
            Some(name) => self.embedder.tokenizer().with_prompt(self.embedder.prompt_named(name)?)?,
        };
        Ok(match reading.side {
            None => tokenizer,
            Some(side) => tokenizer.keeping_end(side == Side::Left),
        })
    }

    /// The prompt of that name, the default one where none is named; empty for none.
    ///
    /// # Errors
    /// A name that the model does not have.
    pub fn prompt(&self, name: Option<&str>) -> Result<String> {
        let prompt = match name {
            None => self.embedder.info().prompt.clone(),
            Some(name) => self.embedder.prompt_named(name)?,
        };
        Ok(prompt.unwrap_or_default())
    }

    /// What shows tokens to people.
    ///
    /// # Errors
    /// A tokenizer's file that cannot be read any more.
    pub fn describer(&self) -> Result<Arc<Describer>> {
        // Held while it is made: those that come then want it too.
        let mut slot = self.describer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(describer) = &*slot {
            return Ok(describer.clone());
        }
        let describer = Arc::new(Describer::open(&self.folder)?);
        *slot = Some(describer.clone());
        Ok(describer)
    }
}

fn text_of(item: &Item) -> Option<&str> {
    match item {
        Item::Text(text) => Some(text),
        Item::Ids(_) => None,
    }
}

fn one_row(tokenizer: &Tokenizer, index: usize, item: &Item) -> Result<Row> {
    match item {
        Item::Ids(ids) => tokenizer.row_of_ids(index, ids),
        Item::Text(text) => {
            let mut ids = Vec::new();
            let truncated = tokenizer.ids_into(text, &mut ids)?;
            if ids.is_empty() { Err(crate::tokens::without_tokens(index)) } else { Ok(Row { ids, truncated }) }
        }
    }
}

/// `error` about the inputs under `param`.
fn about(param: &'static str, error: crate::Error) -> Failure {
    let failure = Failure::from(error);
    Failure { param: failure.param.map(|_| param), ..failure }
}

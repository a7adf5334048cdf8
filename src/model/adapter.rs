//! A LoRA adapter that lies beside the weights: its tensors, and the encoder's with them merged.
//!
//! sentence-transformers loads both (through transformers and peft), so that the base model alone would be another model.

use super::adapter_config::{CONFIG_FILE, LoraConfig, MERGE, ModuleKind, base_model};
use super::json::config_error;
use super::stored::{encoder_part, without_prefix};
use super::tensors::TensorFile;
use super::weights::{INDEX_FILE, SINGLE_FILE};
use crate::model::{Family, TensorView};
use crate::notice::warn_once;
use crate::{Error, Result};
use rayon::prelude::*;
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// The adapter's tensors.
pub(super) const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// The same in Python's own format, which is code to run rather than data to read.
const PICKLE: &str = "adapter_model.bin";

/// What peft puts before the names of the model that it wraps.
const PREFIX: &str = "base_model.model.";

/// Modules beside the encoder that an adapter may have tensors for; no vector depends on them.
const HEADS: [&str; 6] = ["pooler", "cls", "classifier", "lm_head", "qa_outputs", "score"];

/// What a tensor of the adapter is to its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    A,
    B,
    BiasOfB,
    EmbeddingA,
    EmbeddingB,
    Rows,
    Weight,
    Bias,
    /// Weight and bias of a module that has matrices.
    BaseWeight,
    BaseBias,
}

/// Ends of tensor names. The longer ones come first.
const SUFFIXES: [(&str, Part); 10] = [
    (".lora_A.weight", Part::A),
    (".lora_B.weight", Part::B),
    (".lora_B.bias", Part::BiasOfB),
    (".lora_embedding_A", Part::EmbeddingA),
    (".lora_embedding_B", Part::EmbeddingB),
    (".token_adapter.trainable_tokens_delta", Part::Rows),
    (".base_layer.weight", Part::BaseWeight),
    (".base_layer.bias", Part::BaseBias),
    (".weight", Part::Weight),
    (".bias", Part::Bias),
];

/// An adapter, checked against the encoder that it is merged into.
#[derive(Debug)]
pub(super) struct Adapter {
    /// By the encoder's tensor, named without the family's prefix.
    changes: HashMap<String, Change>,
    bytes: u64,
}

/// What the adapter does to one tensor of the encoder, in this order.
#[derive(Debug, Default)]
struct Change {
    replaced: Option<TensorView>,
    product: Option<Product>,
    /// A vector that is added, and its factor.
    added: Option<(TensorView, f64)>,
    /// Rows that are replaced, and their values.
    rows: Option<(Vec<usize>, TensorView)>,
}

/// `scale * left right`, added to a `[rows, columns]` matrix.
#[derive(Debug)]
struct Product {
    /// `[rows, rank]`, or `[rank, rows]` for an embedding table.
    left: TensorView,
    /// `[rank, columns]`, or `[columns, rank]` for an embedding table.
    right: TensorView,
    /// Whether both are stored the other way round.
    transposed: bool,
    scale: f64,
}

/// The tensors of one file, by module and part, under the names that they have there.
type Parts = BTreeMap<Part, String>;

struct Reader<'a> {
    family: Family,
    config: LoraConfig,
    file: TensorFile,
    modules: BTreeMap<String, Parts>,
    /// Shapes of the encoder's tensors.
    base: &'a BTreeMap<String, Vec<usize>>,
    changes: HashMap<String, Change>,
}

impl Adapter {
    /// Opens the adapter in `folder`, where there is one, for an encoder whose tensors have the shapes `base`.
    ///
    /// # Errors
    /// [`Error::NotFound`] for an adapter without readable weights; [`Error::Config`] for another kind, for a tensor that is not
    /// understood, and where configuration, tensors and encoder do not belong together.
    pub fn open_if_present(folder: &Path, family: Family, base: &BTreeMap<String, Vec<usize>>) -> Result<Option<Self>> {
        let path = folder.join(WEIGHTS_FILE);
        let Some(config) = LoraConfig::read_if_present(folder, family)? else {
            if path.exists() {
                warn_once(format!("{}: not used, since there is no {CONFIG_FILE} beside it", path.display()));
            }
            return Ok(None);
        };
        if !path.is_file() {
            let next = match folder.join(PICKLE).exists() {
                true => format!("there is only {PICKLE}, which is not read; {MERGE}"),
                false => {
                    format!("{CONFIG_FILE} asks for it; fetch the model again, or remove {CONFIG_FILE} to have the base model")
                }
            };
            return Err(Error::NotFound { what: WEIGHTS_FILE.to_owned(), path, next });
        }
        let file = TensorFile::open(&path)?;
        let bytes = file.len();
        let mut reader = Reader { family, config, file, modules: BTreeMap::new(), base, changes: HashMap::new() };
        reader.sort()?;
        reader.check_targets()?;
        reader.read_modules()?;
        reader.check_saved()?;
        if reader.changes.is_empty() {
            return Err(reader.error("none of its tensors belongs to the encoder; remove the adapter to have the base model"));
        }
        log::info!("{}: merged into {} tensors", path.display(), reader.changes.len());
        Ok(Some(Self { changes: reader.changes, bytes }))
    }

    /// Bytes of the adapter's file.
    pub fn len(&self) -> u64 {
        self.bytes
    }

    /// The encoder's tensor `name`, with the adapter merged. Sums are made in f64 and rounded once.
    pub fn merged(&self, name: &str, base: TensorView) -> TensorView {
        let Some(change) = self.changes.get(name) else { return base };
        let base = change.replaced.clone().unwrap_or(base);
        if change.product.is_none() && change.added.is_none() && change.rows.is_none() {
            return base;
        }
        let mut values = base.to_f32().into_owned();
        let columns = base.shape.last().copied().unwrap_or(1);
        if let Some(product) = &change.product {
            product.add_to(&mut values, columns);
        }
        if let Some((vector, factor)) = &change.added {
            for (value, added) in values.iter_mut().zip(vector.to_f32().iter()) {
                *value = (f64::from(*value) + factor * f64::from(*added)) as f32;
            }
        }
        if let Some((rows, replaced)) = &change.rows {
            for (row, replaced) in rows.iter().zip(replaced.to_f32().chunks_exact(columns)) {
                values[row * columns..][..columns].copy_from_slice(replaced);
            }
        }
        TensorView::owned(base.shape, values)
    }
}

impl Product {
    fn add_to(&self, values: &mut [f32], columns: usize) {
        let (left, right) = (self.left.to_f32(), self.right.to_f32());
        let (rows, rank) = (values.len() / columns.max(1), right.len() / columns.max(1));
        let (left, right) = match self.transposed {
            true => (transposed(&left, rank, rows), transposed(&right, columns, rank)),
            false => (left, right),
        };
        values.par_chunks_exact_mut(columns).zip(left.par_chunks_exact(rank)).for_each(|(values, left)| {
            let mut sums = vec![0f64; columns];
            for (left, right) in left.iter().zip(right.chunks_exact(columns)) {
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum += f64::from(*left) * f64::from(*right);
                }
            }
            for (value, sum) in values.iter_mut().zip(&sums) {
                *value = (f64::from(*value) + self.scale * sum) as f32;
            }
        });
    }
}

/// `[rows, columns]` to `[columns, rows]`.
fn transposed(values: &[f32], rows: usize, columns: usize) -> Cow<'static, [f32]> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

impl Reader<'_> {
    fn error(&self, reason: impl Into<String>) -> Error {
        config_error(self.file.path(), reason)
    }

    /// Every tensor goes to its module; one that is not understood is an error.
    fn sort(&mut self) -> Result<()> {
        let mut names: Vec<String> = self.file.names().map(str::to_owned).collect();
        names.sort_unstable();
        let mut heads = Vec::new();
        for stored in names {
            let name = stored.strip_prefix(PREFIX).unwrap_or(&stored);
            let name = without_prefix(name, self.family);
            if name.split('.').next().is_some_and(|first| HEADS.contains(&first)) {
                heads.push(stored);
                continue;
            }
            // With `bias: all` peft also stores what a module had before it was replaced as a whole.
            if let Some((module, _)) = name.split_once(".original_module.")
                && self.config.saves(module)
            {
                continue;
            }
            let Some((module, part)) =
                place(name, self.family).filter(|(module, _)| self.base.contains_key(&format!("{module}.weight")))
            else {
                let reason =
                    format!("tensor \"{stored}\" belongs to no module of the encoder, or is of a kind that is not merged");
                return Err(self.error(format!("{reason}; {MERGE}")));
            };
            let first = self.modules.entry(module).or_default().insert(part, stored.clone());
            // peft itself may store a tensor under two names.
            if let Some(first) = first.filter(|first| !self.are_equal(first, &stored)) {
                return Err(self.error(format!("tensors \"{first}\" and \"{stored}\" are the same one's; keep one of them")));
            }
        }
        if let [first, ..] = heads.as_slice() {
            let path = self.file.path().display();
            warn_once(format!("{path}: {} tensors of heads are not used, \"{first}\" among them", heads.len()));
        }
        Ok(())
    }

    fn are_equal(&self, first: &str, second: &str) -> bool {
        let [first, second] = [first, second].map(|name| {
            let shape = self.file.shape(name)?;
            self.file.tensor(name, shape).ok().flatten()
        });
        first.zip(second).is_some_and(|(first, second)| {
            first.dtype == second.dtype && first.shape == second.shape && first.bytes() == second.bytes()
        })
    }

    /// peft starts a target without tensors at random, and leaves out tensors of what is no target.
    fn check_targets(&self) -> Result<()> {
        for module in self.base.keys().filter_map(|name| name.strip_suffix(".weight")) {
            let kind = self.kind_of(module);
            let stored = self.modules.get(module).and_then(|parts| {
                let low = [Part::A, Part::B, Part::BiasOfB, Part::EmbeddingA, Part::EmbeddingB];
                low.iter().find_map(|part| parts.get(part))
            });
            match (self.config.targets(module, kind)?, stored) {
                (true, Some(_)) if kind == ModuleKind::Norm => {
                    return Err(self.config.error(format!("target_modules names {module}; peft has no LoRA for a LayerNorm")));
                }
                (true, None) => {
                    let reason = format!("target_modules names {module}, for which {WEIGHTS_FILE} has no tensors");
                    return Err(self.config.error(format!("{reason}: peft would start them at random; save the adapter again")));
                }
                (false, Some(stored)) => {
                    let reason = format!("target_modules does not reach {module}, for which {WEIGHTS_FILE} has \"{stored}\"");
                    return Err(self.config.error(format!("{reason}: peft would leave it out; save the adapter again")));
                }
                _ => {}
            }
            if self.config.token_rows(module).is_some() && !self.has(module, Part::Rows) {
                let reason = format!("trainable_token_indices names {module}, for which {WEIGHTS_FILE} has no rows");
                return Err(self.config.error(format!("{reason}; save the adapter again")));
            }
        }
        Ok(())
    }

    /// What peft takes a module of the encoder for.
    fn kind_of(&self, module: &str) -> ModuleKind {
        // Only modules of the encoder are in `base`, and all of its layers.
        self.family.definition().modules.kind(module, usize::MAX).unwrap_or(ModuleKind::Linear)
    }

    fn has(&self, module: &str, part: Part) -> bool {
        self.modules.get(module).is_some_and(|parts| parts.contains_key(&part))
    }

    fn read_modules(&mut self) -> Result<()> {
        let modules = std::mem::take(&mut self.modules);
        for (module, parts) in &modules {
            let weight = format!("{module}.weight");
            let bias = format!("{module}.bias");
            let product = self.product(module, parts)?;
            for (part, stored) in parts {
                let with_matrices = product.is_some();
                match part {
                    Part::Weight | Part::Bias if with_matrices => {
                        let reason = format!("tensor \"{stored}\" should be called base_layer.weight or base_layer.bias");
                        return Err(self.error(format!("{reason}: peft leaves it out as it is; {MERGE}")));
                    }
                    Part::BaseWeight | Part::BaseBias if !with_matrices => {
                        return Err(self.error(format!("tensor \"{stored}\" stands beside no matrices of {module}; {MERGE}")));
                    }
                    Part::Weight | Part::BaseWeight => self.replace(&weight, stored)?,
                    Part::Bias | Part::BaseBias => self.replace(&bias, stored)?,
                    Part::Rows if with_matrices => {
                        return Err(self.error(format!("{module} has matrices and rows of its own, which peft does not allow")));
                    }
                    Part::Rows => self.replace_rows(module, &weight, stored)?,
                    Part::BiasOfB => {
                        let (Some(shape), Some(product)) = (self.base.get(&bias), &product) else {
                            return Err(
                                self.error(format!("tensor \"{stored}\": {module} has no bias or no matrices to add it to"))
                            );
                        };
                        let added = (self.tensor(stored, shape)?, product.scale);
                        self.changes.entry(bias.clone()).or_default().added = Some(added);
                    }
                    Part::A | Part::B | Part::EmbeddingA | Part::EmbeddingB => {}
                }
            }
            if product.is_some() {
                self.changes.entry(weight).or_default().product = product;
            }
        }
        self.modules = modules;
        Ok(())
    }

    /// The two matrices of `module`.
    fn product(&self, module: &str, parts: &Parts) -> Result<Option<Product>> {
        let transposed = self.kind_of(module) == ModuleKind::Embedding;
        let (pair, others) = match transposed {
            false => ([Part::A, Part::B], [Part::EmbeddingA, Part::EmbeddingB]),
            true => ([Part::EmbeddingA, Part::EmbeddingB], [Part::A, Part::B]),
        };
        if let Some(stored) = others.iter().find_map(|part| parts.get(part)) {
            return Err(self.error(format!("tensor \"{stored}\" is not of the kind that {module} takes; {MERGE}")));
        }
        let (a, b) = match pair.map(|part| parts.get(&part)) {
            [None, None] => return Ok(None),
            [Some(a), Some(b)] => (a, b),
            [Some(one), None] | [None, Some(one)] => {
                return Err(
                    self.error(format!("tensor \"{one}\" is one of a pair, whose other is not there; fetch the adapter again"))
                );
            }
        };
        // Checked when it was sorted: the module has a weight.
        let shape = self.base.get(&format!("{module}.weight")).map(Vec::as_slice);
        let Some([rows, columns]) = shape else {
            return Err(self.error(format!("tensor \"{a}\": {module} is no matrix")));
        };
        let rank = self.file.shape(a).and_then(|shape| shape.first()).copied().unwrap_or(0);
        let scale = self.config.scale(module, rank)?;
        Ok(Some(match transposed {
            false => {
                Product { left: self.tensor(b, &[*rows, rank])?, right: self.tensor(a, &[rank, *columns])?, transposed, scale }
            }
            true => {
                Product { left: self.tensor(a, &[rank, *rows])?, right: self.tensor(b, &[*columns, rank])?, transposed, scale }
            }
        }))
    }

    fn tensor(&self, stored: &str, shape: &[usize]) -> Result<TensorView> {
        let found = self.file.shape(stored).unwrap_or_default();
        if found != shape {
            let reason = format!("tensor \"{stored}\" has shape {found:?}, the encoder asks for {shape:?}");
            return Err(self.error(format!("{reason}; do the adapter and the weights beside it belong together?")));
        }
        self.file.tensor(stored, shape)?.ok_or_else(|| self.error(format!("tensor \"{stored}\" is not there")))
    }

    fn replace(&mut self, name: &str, stored: &str) -> Result<()> {
        let Some(shape) = self.base.get(name) else {
            return Err(self.error(format!("tensor \"{stored}\" belongs to no tensor of the encoder; {MERGE}")));
        };
        let view = self.tensor(stored, shape)?;
        self.changes.entry(name.to_owned()).or_default().replaced = Some(view);
        Ok(())
    }

    fn replace_rows(&mut self, module: &str, weight: &str, stored: &str) -> Result<()> {
        let (Some(ids), Some([rows, columns])) = (self.config.token_rows(module), self.base.get(weight).map(Vec::as_slice))
        else {
            let reason = format!("trainable_token_indices does not name {module}, for which {WEIGHTS_FILE} has \"{stored}\"");
            return Err(self.config.error(reason));
        };
        if let Some(id) = ids.iter().find(|id| *id >= rows) {
            return Err(self.config.error(format!("trainable_token_indices holds {id}, {module} has {rows} rows")));
        }
        let mut sorted = ids.to_vec();
        sorted.sort_unstable();
        if let Some(id) = sorted.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| &pair[0]) {
            return Err(self.config.error(format!("trainable_token_indices holds {id} twice")));
        }
        let change = (ids.to_vec(), self.tensor(stored, &[ids.len(), *columns])?);
        self.changes.entry(weight.to_owned()).or_default().rows = Some(change);
        Ok(())
    }

    /// peft starts a module of `modules_to_save` at random where its tensors are not stored.
    fn check_saved(&self) -> Result<()> {
        for name in self.base.keys() {
            let mut modules = name.match_indices('.').map(|(end, _)| &name[..end]);
            let Some(module) = modules.find(|module| self.config.saves(module)) else { continue };
            if self.changes.get(name).is_none_or(|change| change.replaced.is_none()) {
                let reason = format!("modules_to_save names {module}, for which {WEIGHTS_FILE} has no tensor \"{name}\"");
                return Err(self.config.error(format!("{reason}: peft would start it at random; save the adapter again")));
            }
        }
        Ok(())
    }
}

/// The module and the part of it that the adapter's tensor `name` is. peft's names may have the adapter's own name within, which is
/// `default`, and say that a module is replaced as a whole.
fn place(name: &str, family: Family) -> Option<(String, Part)> {
    let name = encoder_part(name, family)?.replacen(".default", "", 1).replacen(".modules_to_save", "", 1);
    SUFFIXES.into_iter().find_map(|(suffix, part)| Some((name.strip_suffix(suffix)?.to_owned(), part)))
}

/// Refuses a folder that holds an adapter and no model: sentence-transformers would load the base model from where it is named.
///
/// # Errors
/// [`Error::Config`] with the base model's name and what to do.
pub(super) fn check_not_alone(folder: &Path) -> Result<()> {
    let is_there = |name: &str| folder.join(name).is_file();
    if is_there("config.json") || !is_there(CONFIG_FILE) {
        return Ok(());
    }
    let Some((base, revision)) = base_model(folder)? else { return Ok(()) };
    let at = revision.as_ref().map(|revision| format!("@{revision}")).unwrap_or_default();
    let place = folder.display();
    let shown = if base.is_empty() { "not named".to_owned() } else { format!("\"{base}{at}\"") };
    let next = if is_on_hub(&base) {
        let revision = revision.map(|revision| format!(" --revision {revision}")).unwrap_or_default();
        format!("put them beside it: hf download {base} config.json {SINGLE_FILE}{revision} --local-dir {place}")
    } else {
        format!("copy config.json and {SINGLE_FILE} (or {INDEX_FILE} and its shards) of the base model into {place}")
    };
    Err(config_error(
        &folder.join(CONFIG_FILE),
        format!("this is an adapter alone: config.json and the weights of its base model ({shown}) are not there; {next}"),
    ))
}

/// Whether `base` reads as a name on the hub rather than as a folder: `name` or `org/name`.
fn is_on_hub(base: &str) -> bool {
    let parts: Vec<&str> = base.split('/').collect();
    let is_name = |part: &&str| {
        !part.is_empty() && !part.starts_with('.') && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    parts.len() <= 2 && parts.iter().all(is_name)
}

//! How true an INT8 graph is to its model, which linears cost most, and which must stay in float.

use super::{Calibration, Samples};
use crate::cpu::{self, CpuBackend};
use crate::executor::Backend;
use crate::graph::{Graph, Linear, Precision, Quantization, Role};
use crate::model::ModelFolder;
use crate::pooling::Head;
use crate::tokens::{BatchPlan, TokenBatch};
use crate::{Error, Result};
use rayon::prelude::*;
use serde::Serialize;
use std::collections::BTreeSet;
use std::fmt;

/// Rows of one batch.
const BATCH_ROWS: usize = 64;

/// Cosines of INT8's vectors to the model's own.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Cosines {
    /// Of the worst text.
    pub min: f64,
    /// Over all texts.
    pub mean: f64,
}

/// Linears that are quantised together: those of one layer that one tensor feeds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Group {
    /// The layer, from 0.
    pub layer: usize,
    /// `query` stands for query, key and value.
    pub role: Role,
    /// Names of the linears.
    pub linears: Vec<String>,
}

/// A group, how true the model stays when it alone is quantised, and whether it was kept in float.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GroupReport {
    /// The group.
    pub group: Group,
    /// With this group alone in INT8.
    pub alone: Cosines,
    /// Whether it stays in float.
    pub float: bool,
}

/// What [`fit`] found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct QuantizationReport {
    /// The smallest cosine asked for.
    pub bar: f64,
    /// Texts compared.
    pub texts: usize,
    /// With every linear in INT8.
    pub all_int8: Cosines,
    /// With what was chosen.
    pub chosen: Cosines,
    /// Groups, the most sensitive first; none where all linears in INT8 met the bar.
    pub groups: Vec<GroupReport>,
}

/// A quantisation that meets the bar.
#[derive(Debug, Clone, PartialEq)]
pub struct Fitted {
    /// For [`Graph::quantized`].
    pub quantization: Quantization,
    /// Why it is this one.
    pub report: QuantizationReport,
}

/// The model's own vectors over some texts, to compare others with.
struct Reference<'m> {
    model: &'m ModelFolder,
    batches: Vec<TokenBatch>,
    vectors: Vec<Vec<f32>>,
}

impl<'m> Reference<'m> {
    fn new(model: &'m ModelFolder, texts: &Samples) -> Result<Self> {
        if texts.is_empty() {
            return Err(Error::Calibration { reason: "there are no texts to compare INT8 with fp32; give some".into() });
        }
        let batches = texts.batches(model, &BatchPlan::new(BATCH_ROWS, cpu::BATCH_TOKENS, 1))?;
        let graph = Graph::new(&model.architecture()?, Precision::Fp32)?;
        let vectors = vectors(model, graph, &batches)?;
        Ok(Self { model, batches, vectors })
    }

    fn compare(&self, quantization: &Quantization) -> Result<Cosines> {
        let graph = Graph::quantized(&self.model.architecture()?, Precision::Fp32, quantization)?;
        let found = vectors(self.model, graph, &self.batches)?;
        let cosines: Vec<f64> = self.vectors.iter().zip(&found).map(|(a, b)| cosine(a, b)).collect();
        let min = cosines.iter().copied().fold(f64::INFINITY, f64::min);
        Ok(Cosines { min, mean: cosines.iter().sum::<f64>() / cosines.len() as f64 })
    }
}

/// A vector a text, in the order of `batches`.
fn vectors(model: &ModelFolder, graph: Graph, batches: &[TokenBatch]) -> Result<Vec<Vec<f32>>> {
    let head = Head::of_model(model)?;
    let dim = head.dim;
    let backend = CpuBackend::from_graph(graph, head, model.config.max_tokens(), rayon::current_num_threads())?;
    let encode = |batch: &TokenBatch| {
        let mut out = vec![0.0; batch.batch() * dim];
        backend.encode(batch, &mut out)?;
        crate::pooling::check_finite(&out, dim, batch.rows())?;
        Ok(out.chunks_exact(dim).map(<[f32]>::to_vec).collect::<Vec<_>>())
    };
    Ok(batches.par_iter().map(encode).collect::<Result<Vec<_>>>()?.concat())
}

/// 0 where either vector is 0.
fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms > 0.0 { dot(a, b) / norms } else { 0.0 }
}

/// The encoder's linears by the tensor that feeds them, in the order of the graph.
fn groups(linears: &[Linear]) -> Vec<Group> {
    linears
        .chunk_by(|a, b| a.input == b.input)
        .map(|linears| Group {
            layer: linears[0].layer,
            role: linears[0].role,
            linears: linears.iter().map(|linear| linear.name.clone()).collect(),
        })
        .collect()
}

/// How true the model stays with each group alone in INT8, the most sensitive (the smallest mean cosine) first.
///
/// # Errors
/// [`Error::Calibration`] without texts; as [`Graph::quantized`]; [`Error::NotFinite`], [`Error::Backend`].
pub fn sensitivity(model: &ModelFolder, calibration: &Calibration, texts: &Samples) -> Result<Vec<GroupReport>> {
    measure(&Reference::new(model, texts)?, calibration)
}

fn measure(reference: &Reference<'_>, calibration: &Calibration) -> Result<Vec<GroupReport>> {
    let model = reference.model;
    let graph = Graph::new(&model.architecture()?, Precision::Fp32)?;
    let all: BTreeSet<String> = graph.linears().iter().map(|linear| linear.name.clone()).collect();
    let mut reports = groups(graph.linears())
        .into_iter()
        .map(|group| {
            let others = all.iter().filter(|name| !group.linears.contains(name)).cloned();
            let alone = reference.compare(&calibration.quantization(others))?;
            Ok(GroupReport { group, alone, float: false })
        })
        .collect::<Result<Vec<_>>>()?;
    reports.sort_by(|a, b| a.alone.mean.total_cmp(&b.alone.mean));
    Ok(reports)
}

/// Finds the fewest groups, most sensitive first, that must stay in float for every text's cosine to reach `min_cosine`.
///
/// # Errors
/// [`Error::QuantizedFidelity`] when even one quantised group alone misses the bar; as [`sensitivity`].
pub fn fit(model: &ModelFolder, calibration: &Calibration, texts: &Samples, min_cosine: f64) -> Result<Fitted> {
    let reference = Reference::new(model, texts)?;
    let quantization = calibration.quantization([]);
    let all_int8 = reference.compare(&quantization)?;
    let texts = texts.len();
    if all_int8.min >= min_cosine {
        let report = QuantizationReport { bar: min_cosine, texts, all_int8, chosen: all_int8, groups: Vec::new() };
        return Ok(Fitted { quantization, report });
    }
    let mut groups = measure(&reference, calibration)?;
    let keep = |count: usize| {
        let names = groups[..count].iter().flat_map(|report| report.group.linears.clone());
        calibration.quantization(names)
    };
    // At `high` the bar is met, at `low` it is missed. The cosine need not grow with every group: what is found meets the bar all the
    // same, since only counts that were measured to meet it become `high`.
    let (mut low, mut high) = (0, groups.len().saturating_sub(1));
    let mut chosen = reference.compare(&keep(high))?;
    if chosen.min < min_cosine {
        return Err(Error::QuantizedFidelity {
            cosine: chosen.min,
            bar: min_cosine,
            tried: "one group of linears alone".into(),
            next: "calibrate with more texts or another method, lower the bar, or use fp16",
        });
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        let cosines = reference.compare(&keep(middle))?;
        if cosines.min >= min_cosine {
            (high, chosen) = (middle, cosines);
        } else {
            low = middle;
        }
    }
    let quantization = keep(high);
    groups[..high].iter_mut().for_each(|report| report.float = true);
    Ok(Fitted { quantization, report: QuantizationReport { bar: min_cosine, texts, all_int8, chosen, groups } })
}

/// What INT8 may take of `model`: all linears but those named in `keep_float`. Where that names none and there is a `bar`, as [`fit`] finds
/// over `texts`, with its report.
///
/// # Errors
/// As [`fit`].
pub fn choose_float(
    model: &ModelFolder,
    calibration: &Calibration,
    texts: &Samples,
    keep_float: &[String],
    bar: Option<f64>,
) -> Result<(Quantization, Option<QuantizationReport>)> {
    match (bar, keep_float) {
        (Some(bar), []) => {
            let fitted = fit(model, calibration, texts, bar)?;
            Ok((fitted.quantization, Some(fitted.report)))
        }
        _ => Ok((calibration.quantization(keep_float.iter().cloned()), None)),
    }
}

impl fmt::Display for QuantizationReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} texts, smallest cosine asked for {}", self.texts, self.bar)?;
        writeln!(f, "{:32} {:>9} {:>9}", "quantised", "min", "mean")?;
        let line = |f: &mut fmt::Formatter<'_>, what: &str, cosines: &Cosines, note: &str| {
            writeln!(f, "{what:32} {:>9.5} {:>9.5}{note}", cosines.min, cosines.mean)
        };
        line(f, "all linears", &self.all_int8, "")?;
        for report in &self.groups {
            let role =
                if report.group.role == Role::Query { "query, key, value".to_owned() } else { report.group.role.to_string() };
            let what = format!("layer {} {role} alone", report.group.layer);
            line(f, &what, &report.alone, if report.float { "  kept in float" } else { "" })?;
        }
        line(f, "chosen", &self.chosen, "")
    }
}

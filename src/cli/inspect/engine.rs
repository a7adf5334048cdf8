//! `trt-embed inspect FILE.engine`: the manifest on any machine, the engine itself where it can be loaded.

use super::{Args, Port, table};
use crate::cli::build_summary::{precision, unproven_words};
use crate::cli::{message, output, say};
use anyhow::{Context, Result};
use indicatif::HumanBytes;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use trt_embed::backend::tensorrt::{
    Arithmetic, Direction, Element, Engine, EngineFile, IoTensor, Layer, LayerTensor, Library, Manifest, ProfileRange, Runtime,
    machine,
};
use trt_embed::cuda::Device;

/// What an engine file says, and where it can be loaded, what the engine says.
#[derive(Debug, Serialize)]
struct Report {
    file: PathBuf,
    bytes: u64,
    manifest: Manifest,
    engine: Option<Loaded>,
}

/// What a loaded engine says.
#[derive(Debug, Default, Serialize)]
struct Loaded {
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    profiles: Vec<ProfileReport>,
    layer_count: usize,
    layers: Vec<Layer>,
}

#[derive(Debug, Serialize)]
struct ProfileReport {
    ranges: Vec<Range>,
    /// Device memory for intermediate results.
    scratch_bytes: usize,
}

/// What a profile lets an input be.
#[derive(Debug, Serialize)]
struct Range {
    name: String,
    min: Vec<i64>,
    opt: Vec<i64>,
    max: Vec<i64>,
}

/// Describes the engine file at `path`.
///
/// # Errors
/// A file that cannot be read or is damaged; with `--layers` also an engine that cannot be loaded here.
pub fn run(path: &Path, args: &Args) -> Result<()> {
    let manifest = EngineFile::read_manifest(path)?;
    let bytes = std::fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len();
    let engine = match load(path, args.device) {
        Ok(engine) => Some(engine),
        Err(error) if args.layers => return Err(error.into()),
        Err(error) => {
            say(&format!("the manifest alone, the engine cannot be loaded here: {}", first_line(&error)));
            None
        }
    };
    let report = Report { file: path.to_owned(), bytes, manifest, engine };
    if args.json {
        return output::print(&(serde_json::to_string(&report)? + "\n"));
    }
    if let Some(note) = report.manifest.missing_int8() {
        say(&note);
    }
    let mut text = table(&lines(&report));
    if let Some(engine) = report.engine.filter(|_| args.layers) {
        text.push_str(&layer_table(&engine.layers, output::terminal_width()));
    }
    output::print(&text)
}

/// Loads the engine on GPU `device`, if its manifest says that it was built for such a GPU and this TensorRT.
fn load(path: &Path, device: usize) -> trt_embed::Result<Loaded> {
    // First of all: TensorRT 8.6 crashes where no driver is usable.
    let device = Device::open(device)?;
    let library = Library::load()?;
    let file = EngineFile::read(path, |manifest| manifest.check_machine(&machine(&library, &device)))?;
    let runtime = Runtime::new(&library, &device)?;
    let mut loaded = Loaded::default();
    for engine in &file.load(&runtime)? {
        add(&mut loaded, engine)?;
    }
    Ok(loaded)
}

/// Adds what one plan holds; all plans have the same inputs and outputs.
fn add(loaded: &mut Loaded, engine: &Engine) -> trt_embed::Result<()> {
    let first = loaded.profiles.len();
    let ports = |direction| engine.io().iter().filter(|tensor| tensor.direction == direction).map(port).collect();
    let range = |range: &ProfileRange| Range {
        name: engine.io().get(range.tensor).map(|tensor| tensor.name.clone()).unwrap_or_default(),
        min: range.min.clone(),
        opt: range.opt.clone(),
        max: range.max.clone(),
    };
    for (number, ranges) in engine.profiles().iter().enumerate() {
        let scratch_bytes = engine.scratch_bytes(number)?;
        loaded.profiles.push(ProfileReport { ranges: ranges.iter().map(range).collect(), scratch_bytes });
    }
    loaded.inputs = ports(Direction::Input);
    loaded.outputs = ports(Direction::Output);
    loaded.layer_count += engine.layer_count();
    loaded.layers.extend(engine.layers()?.into_iter().map(|mut layer| {
        layer.profile += first;
        layer
    }));
    Ok(())
}

fn port(tensor: &IoTensor) -> Port {
    let r#type = match tensor.element {
        Element::F32 => "float32",
        Element::F16 => "float16",
        Element::Bf16 => "bfloat16",
        Element::I8 => "int8",
        Element::U8 => "uint8",
        Element::I32 => "int32",
        Element::I64 => "int64",
        Element::Bool => "bool",
        _ => "other",
    };
    Port {
        name: tensor.name.clone(),
        r#type: r#type.into(),
        shape: tensor.shape.iter().map(|&size| if size < 0 { Value::Null } else { size.into() }).collect(),
    }
}

/// The first line of an error; the rest is for `doctor`.
fn first_line(error: &trt_embed::Error) -> String {
    let text = message::of(error);
    match text.split_once('\n') {
        Some((first, _)) => format!("{}; `trt-embed doctor` says more", first.trim_end_matches(':')),
        None => text,
    }
}

fn lines(report: &Report) -> Vec<(&'static str, String)> {
    let Manifest { machine, model, arithmetic, profiles, build, fidelity, unproven, .. } = &report.manifest;
    let mut lines = vec![
        ("file", report.file.display().to_string()),
        ("size", HumanBytes(report.bytes).to_string()),
        ("TensorRT", machine.tensorrt.clone()),
        ("GPU", machine.gpu_words()),
        ("arithmetic", precision(&report.manifest)),
    ];
    for (number, profile) in profiles.iter().enumerate() {
        let bucket = if profile.is_bucket() { " (bucket)" } else { "" };
        lines.push(("profile", format!("{number}: {profile}{bucket}")));
    }
    lines.extend([
        ("hidden size", model.hidden_size.to_string()),
        ("longest row", format!("{} tokens", model.positions)),
        ("pooling", model.pooling.clone()),
        ("graph", model.graph.clone()),
        ("tokenizer", model.tokenizer.clone()),
        (
            "built",
            match machine.is_ahead_of_time() {
                true => format!("by {} in {} s, ahead of time", build.by, build.seconds),
                false => format!("by {} in {} s, driver of CUDA {}", build.by, build.seconds, build.cuda_driver),
            },
        ),
    ]);
    if let Some(bytes) = build.workspace_bytes {
        lines.push(("workspace", format!("at most {}", HumanBytes(bytes as u64))));
    }
    if let Some(level) = build.optimization_level {
        lines.push(("opt level", level.to_string()));
    }
    lines.push((
        "fidelity",
        match (fidelity, unproven) {
            (Some(found), _) => format!(
                "{} texts against {}: min cosine {}, largest difference {:.1e}, {} not finite",
                found.texts, found.reference, found.min_cosine, found.max_abs_difference, found.not_finite
            ),
            (None, Some(wanted)) => unproven_words(wanted),
            (None, None) => "not measured".into(),
        },
    ));
    if *arithmetic == Arithmetic::Int8 && !build.float_linears.is_empty() {
        lines.push(("in float", build.float_linears.join(", ")));
    }
    lines.extend(report.manifest.speed.iter().map(|speed| ("speed", speed.to_string())));
    lines.extend(report.manifest.products.iter().map(|products| ("products", products.to_string())));
    if let Some(engine) = &report.engine {
        engine_lines(engine, &mut lines);
    }
    lines
}

fn engine_lines(engine: &Loaded, lines: &mut Vec<(&'static str, String)>) {
    for (what, ports) in [("input", &engine.inputs), ("output", &engine.outputs)] {
        lines.extend(ports.iter().map(|port| (what, port.to_string())));
    }
    for (number, profile) in engine.profiles.iter().enumerate() {
        let ranges: Vec<String> = profile.ranges.iter().map(|range| format!("{} {}", range.name, range.shapes())).collect();
        let scratch = HumanBytes(profile.scratch_bytes as u64);
        lines.push(("ranges", format!("{number}: {}; {scratch} of scratch memory", ranges.join(", "))));
    }
    lines.push(("layers", format!("{} in all, over {} profiles", engine.layer_count, engine.profiles.len())));
    lines.extend(counts(&engine.layers).into_iter().map(|line| ("layers", line)));
}

impl Range {
    /// `BxS` for a bucket, else `MIN:OPT:MAX`.
    fn shapes(&self) -> String {
        let write = |dims: &[i64]| dims.iter().map(i64::to_string).collect::<Vec<_>>().join("x");
        if self.min == self.max {
            return write(&self.max);
        }
        [&self.min, &self.opt, &self.max].map(|dims| write(dims)).join(":")
    }
}

/// Number of layers of each profile by the types that they write, most first.
fn counts(layers: &[Layer]) -> Vec<String> {
    let mut profiles: BTreeMap<usize, BTreeMap<String, usize>> = BTreeMap::new();
    for layer in layers {
        *profiles.entry(layer.profile).or_default().entry(types(&layer.outputs)).or_default() += 1;
    }
    let line = |(profile, types): (usize, BTreeMap<String, usize>)| {
        let mut types: Vec<_> = types.into_iter().collect();
        types.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let types: Vec<String> = types.into_iter().map(|(name, count)| format!("{count} {name}")).collect();
        format!("{profile}: {}", types.join(", "))
    };
    profiles.into_iter().map(line).collect()
}

/// The types of `tensors`, each once; `-` where none is told.
fn types(tensors: &[LayerTensor]) -> String {
    let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.element.as_str()).filter(|name| !name.is_empty()).collect();
    names.sort_unstable();
    names.dedup();
    if names.is_empty() { "-".into() } else { names.join("+") }
}

/// Profile, kind, types and name of each layer; names are cut to `width`.
fn layer_table(layers: &[Layer], width: Option<usize>) -> String {
    let rows: Vec<[String; 4]> = layers
        .iter()
        .map(|layer| {
            let kind = layer.kind.clone().unwrap_or_else(|| "-".into());
            [layer.profile.to_string(), kind, types(&layer.inputs), types(&layer.outputs)]
        })
        .collect();
    let header = ["profile", "kind", "reads", "writes"];
    let widths: [usize; 4] = std::array::from_fn(|column| {
        let cells = rows.iter().map(|row| row[column].as_str()).chain([header[column]]);
        cells.map(console::measure_text_width).max().unwrap_or(0)
    });
    let line = |cells: [&str; 4], name: &str| {
        let [profile, kind, reads, writes] = cells;
        let [a, b, c, d] = widths;
        let start = format!("{profile:>a$}  {kind:<b$}  {reads:<c$}  {writes:<d$}  ");
        let name = match width.map(|width| width.saturating_sub(console::measure_text_width(&start))) {
            Some(room) => console::truncate_str(name, room.max(1), "…"),
            None => name.into(),
        };
        format!("{start}{name}\n")
    };
    let mut out = String::from("\n") + &line(header, "name");
    for (row, layer) in rows.iter().zip(layers) {
        out.push_str(&line(row.each_ref().map(String::as_str), &layer.name));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two profiles, the second with one layer alone.
    fn layers() -> Vec<Layer> {
        let tensor = |words: &str| format!(r#"[{{"Name": "t", "Dimensions": [1], "Format/Datatype": "{words}"}}]"#);
        let (half, float) = (tensor("Row major linear FP16 format"), tensor("Row major linear FP32"));
        let layer = |name: &str, kind: &str, reads: &str, writes: &str| {
            format!(r#"{{"Name": "{name}", "LayerType": "{kind}", "Inputs": {reads}, "Outputs": {writes}}}"#)
        };
        let json = [
            layer("/encoder/layer.0/attention/MatMul + a long list of other nodes", "gemm", &float, &half),
            layer("softmax", "kgen", &half, &half),
            layer("norm", "kgen", &half, &float),
            layer("signal", "signal", "[]", "[]"),
            layer("norm [profile 1]", "kgen", &half, &float),
        ];
        Layer::from_inspector(&format!("{{\"Layers\": [{}]}}", json.join(", "))).unwrap()
    }

    #[test]
    fn layers_are_counted_by_profile_and_type() {
        assert_eq!(counts(&layers()), ["0: 2 float16, 1 -, 1 float32", "1: 1 float32"]);
        assert_eq!(counts(&Layer::from_inspector(r#"{"Layers": ["a", "b"]}"#).unwrap()), ["0: 2 -"]);
        assert!(counts(&[]).is_empty());
    }

    #[test]
    fn no_line_of_the_layer_table_exceeds_the_terminal() {
        let whole = layer_table(&layers(), None);
        let rows: Vec<Vec<&str>> = whole.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[0], ["profile", "kind", "reads", "writes", "name"]);
        assert_eq!(rows[1][..4], ["0", "gemm", "float32", "float16"]);
        assert_eq!(rows[4], ["0", "signal", "-", "-", "signal"]);
        assert_eq!(rows[5], ["1", "kgen", "float16", "float32", "norm"]);
        assert_eq!(rows.len(), 6);
        for line in layer_table(&layers(), Some(60)).lines() {
            assert!(console::measure_text_width(line) <= 60, "{line}");
        }
    }

    #[test]
    fn ranges_read_as_profiles_are_written() {
        let range =
            |min: [i64; 2], max: [i64; 2]| Range { name: "ids".into(), min: min.into(), opt: vec![2, 3], max: max.into() };
        assert_eq!(range([1, 1], [4, 8]).shapes(), "1x1:2x3:4x8");
        assert_eq!(range([2, 3], [2, 3]).shapes(), "2x3");
    }

    #[test]
    fn the_note_on_stderr_is_one_line() {
        let error = trt_embed::Error::TensorRtLibrary {
            library: "libnvinfer.so.8".into(),
            tried: vec![("/x".into(), "no such file".into())],
            next: "Install it.".into(),
        };
        assert_eq!(first_line(&error), "libnvinfer.so.8 could not be loaded; `trt-embed doctor` says more");
        assert_eq!(first_line(&trt_embed::Error::Cancelled { what: "a" }), "a was cancelled; nothing was written");
    }
}

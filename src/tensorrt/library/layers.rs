//! The layers of an engine: what TensorRT's inspector says about them, read from its JSON.

use super::engine::Engine;
use crate::{Error, Result};
use serde::Serialize;
use serde_json::Value;

/// A layer, after TensorRT's fusions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Layer {
    /// The profile that it serves, by its place in [`Engine::profiles`]: each profile has layers of its own.
    pub profile: usize,
    /// TensorRT's name: the ONNX nodes fused into it.
    pub name: String,
    /// TensorRT's kind, e.g. `Reformat`. This and what follows is told by engines built with
    /// [`LayerDetails::Full`](super::LayerDetails::Full) alone.
    pub kind: Option<String>,
    /// What it reads.
    pub inputs: Vec<LayerTensor>,
    /// What it writes.
    pub outputs: Vec<LayerTensor>,
    /// The kernel chosen, where TensorRT names one.
    pub tactic: Option<String>,
}

/// A tensor between layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct LayerTensor {
    /// TensorRT's name.
    pub name: String,
    /// Type of its elements, e.g. `float16`; TensorRT's own words where this crate does not know them.
    pub element: String,
    /// -1 where dynamic.
    pub shape: Vec<i64>,
    /// TensorRT's words for type and memory layout.
    pub format: String,
}

impl Engine {
    /// The layers of all profiles, in the order of [`Engine::layers_json`].
    ///
    /// # Errors
    /// [`Error::TensorRt`].
    pub fn layers(&self) -> Result<Vec<Layer>> {
        Layer::from_inspector(&self.layers_json()?)
    }
}

impl Layer {
    /// Reads the inspector's JSON, as [`Engine::layers_json`] gives it: `{"Layers": [..]}` of names alone, or of objects.
    ///
    /// # Errors
    /// [`Error::TensorRt`] for other JSON than that.
    pub fn from_inspector(json: &str) -> Result<Vec<Self>> {
        let failed = |reason: String| Error::TensorRt {
            action: "describe the layers",
            reason,
            next: "This is a fault of trt-embed: please report it.",
        };
        // TensorRT separates the names of fused nodes by control characters, which JSON does not allow in strings.
        let json = json.replace(|c: char| c.is_control() && !c.is_whitespace(), "+");
        let whole: Value = serde_json::from_str(&json).map_err(|error| failed(format!("its JSON: {error}")))?;
        let layers = whole["Layers"].as_array().ok_or_else(|| failed("its JSON has no list \"Layers\"".into()))?;
        Ok(layers.iter().map(read_layer).collect())
    }
}

fn read_layer(layer: &Value) -> Layer {
    let (profile, name) = read_name(layer);
    let tensors = |key: &str| layer[key].as_array().into_iter().flatten().map(read_tensor).collect();
    Layer {
        profile,
        name,
        kind: layer["LayerType"].as_str().map(str::to_owned),
        inputs: tensors("Inputs"),
        outputs: tensors("Outputs"),
        tactic: layer["TacticName"].as_str().filter(|name| !name.is_empty()).map(str::to_owned),
    }
}

fn read_tensor(tensor: &Value) -> LayerTensor {
    let format = tensor["Format/Datatype"].as_str().unwrap_or_default();
    LayerTensor {
        name: read_name(tensor).1,
        element: element(format),
        // A dimension that is no number is one that TensorRT computes.
        shape: tensor["Dimensions"].as_array().into_iter().flatten().map(|dim| dim.as_i64().unwrap_or(-1)).collect(),
        format: format.into(),
    }
}

/// The name of an object, or the name alone, parted from the mark of its profile: ` [profile 1]`, which the first profile lacks.
fn read_name(value: &Value) -> (usize, String) {
    let name = value.as_str().or_else(|| value["Name"].as_str()).unwrap_or_default().replace(|c: char| c.is_control(), "+");
    let marked = name.split_once("[profile ").and_then(|(before, rest)| {
        let (number, after) = rest.split_once(']')?;
        Some((number.trim().parse().ok()?, format!("{}{after}", before.trim_end())))
    });
    marked.unwrap_or((0, name))
}

/// The type within TensorRT's words, e.g. `Row major linear FP16 format` or `Half`.
fn element(words: &str) -> String {
    // The longer word first: uint8 holds int8, bfloat16 holds float.
    const WORDS: [(&str, &str); 16] = [
        ("bfloat16", "bfloat16"),
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("half", "float16"),
        ("fp32", "float32"),
        ("fp8", "float8"),
        ("fp4", "float4"),
        ("uint8", "uint8"),
        ("int8", "int8"),
        ("int4", "int4"),
        ("int32", "int32"),
        ("int64", "int64"),
        ("bool", "bool"),
        ("float16", "float16"),
        ("float8", "float8"),
        ("float", "float32"),
    ];
    let lower = words.to_lowercase();
    WORDS.iter().find(|(word, _)| lower.contains(word)).map_or_else(|| words.to_owned(), |(_, name)| (*name).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_alone_are_parted_by_profile() {
        let json = r#"{"Layers": ["Gather_0", "MatMul_1 + Add_2", "Gather_0 [profile 1]", "Reformat [profile 12] of x", ""],
            "Bindings": ["ids", "hidden", "ids [profile 1]", "hidden [profile 1]"]}"#;
        let layers = Layer::from_inspector(json).unwrap();
        let found: Vec<_> = layers.iter().map(|layer| (layer.profile, layer.name.as_str())).collect();
        assert_eq!(found, [(0, "Gather_0"), (0, "MatMul_1 + Add_2"), (1, "Gather_0"), (12, "Reformat of x"), (0, "")]);
        assert!(layers.iter().all(|layer| layer.kind.is_none() && layer.inputs.is_empty() && layer.outputs.is_empty()));
    }

    #[test]
    fn objects_tell_types_and_tactics() {
        let json = r#"{"Layers": [
            {"Name": "/layer.0/MatMul [profile 1]", "LayerType": "gemm",
             "Inputs": [{"Name": "x [profile 1]", "Location": "Device", "Dimensions": [-1, 16, 384],
                         "Format/Datatype": "Row major linear FP32"},
                        {"Name": "w", "Dimensions": ["n", 4], "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
             "Outputs": [{"Name": "y", "Dimensions": [], "Format/Datatype": "Half"}],
             "TacticName": "sm90_xmma_gemm", "TacticValue": "0x0000000000000001"},
            {"Name": "Reformat", "LayerType": "Reformat", "Outputs": [], "TacticName": ""},
            {"LayerType": "signal"}, 3]}"#;
        let layers = Layer::from_inspector(json).unwrap();
        let tensor = |name: &str, element: &str, shape: &[i64], format: &str| LayerTensor {
            name: name.into(),
            element: element.into(),
            shape: shape.to_vec(),
            format: format.into(),
        };
        assert_eq!(
            layers[0],
            Layer {
                profile: 1,
                name: "/layer.0/MatMul".into(),
                kind: Some("gemm".into()),
                inputs: vec![
                    tensor("x", "float32", &[-1, 16, 384], "Row major linear FP32"),
                    tensor("w", "float16", &[-1, 4], "Channel major FP16 format where channel % 8 == 0"),
                ],
                outputs: vec![tensor("y", "float16", &[], "Half")],
                tactic: Some("sm90_xmma_gemm".into()),
            }
        );
        assert_eq!((layers[1].profile, layers[1].kind.as_deref(), &layers[1].tactic), (0, Some("Reformat"), &None));
        assert_eq!((layers.len(), layers[2].name.as_str(), layers[2].kind.as_deref()), (4, "", Some("signal")));
    }

    #[test]
    fn types_are_named_alike_in_all_versions() {
        for (words, name) in [
            ("Row major linear FP16 format", "float16"),
            ("Row major linear BFloat16 format", "bfloat16"),
            ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
            ("Row major linear UInt8 format", "uint8"),
            ("Row major linear Int32", "int32"),
            ("Row major linear BOOL", "bool"),
            ("Float", "float32"),
            ("FP8", "float8"),
            ("Unknown format", "Unknown format"),
            ("", ""),
        ] {
            assert_eq!(element(words), name, "{words}");
        }
    }

    #[test]
    fn control_characters_between_names_do_not_break_the_json() {
        for separator in ["\u{1e}", "\\u001e"] {
            let json = format!("{{\"Layers\": [{{\"Name\": \"a{separator}b\", \"Metadata\": \"c{separator}d\"}}]}}\n");
            assert_eq!(Layer::from_inspector(&json).unwrap()[0].name, "a+b");
        }
    }

    #[test]
    fn what_is_no_description_is_an_error() {
        for json in ["", "[]", "{}", "{\"Layers\": 3}", "{\"Layers\": [\"a\""] {
            assert!(matches!(Layer::from_inspector(json), Err(Error::TensorRt { .. })), "{json}");
        }
    }

    #[test]
    fn a_name_that_only_resembles_a_mark_stays_whole() {
        for name in ["x [profile one]", "x [profile 1", "[profile ]", "x [profile -1]"] {
            assert_eq!(read_name(&Value::from(name)), (0, name.into()));
        }
    }
}

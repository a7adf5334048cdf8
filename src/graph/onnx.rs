//! ONNX files: the protobuf messages this crate writes and reads, and a reader that maps large files instead of copying them.
//!
//! Field numbers are those of `onnx.proto` (ONNX 1.12, IR version 8). Unknown fields of foreign files are skipped.

use crate::model::Mapped;
use crate::{Error, Result};
use prost::Message;
use prost::bytes::Bytes;
use std::path::Path;

/// IR version that ONNX 1.12 pairs with opset 17.
pub const IR_VERSION: i64 = 8;
/// The opset of exported graphs: the newest that TensorRT 8.6 reads.
pub const OPSET: i64 = 17;
/// The opset of INT8 graphs with fp16 scales, the first whose QuantizeLinear takes them.
pub const OPSET_FP16_SCALES: i64 = 19;
/// IR version that ONNX pairs with [`OPSET_FP16_SCALES`].
pub const IR_VERSION_FP16_SCALES: i64 = 9;

/// A model: one graph and the operator sets that it uses.
#[derive(Clone, PartialEq, Message)]
pub struct ModelProto {
    /// Version of the format.
    #[prost(int64, tag = "1")]
    pub ir_version: i64,
    /// The tool that wrote the file.
    #[prost(string, tag = "2")]
    pub producer_name: String,
    /// That tool's version.
    #[prost(string, tag = "3")]
    pub producer_version: String,
    /// The graph.
    #[prost(message, optional, tag = "7")]
    pub graph: Option<GraphProto>,
    /// Operator sets.
    #[prost(message, repeated, tag = "8")]
    pub opset_import: Vec<OperatorSetIdProto>,
    /// Free-form notes.
    #[prost(message, repeated, tag = "14")]
    pub metadata_props: Vec<StringStringEntryProto>,
}

/// Nodes in topological order, constants, inputs and outputs.
#[derive(Clone, PartialEq, Message)]
pub struct GraphProto {
    /// Nodes.
    #[prost(message, repeated, tag = "1")]
    pub node: Vec<NodeProto>,
    /// Name.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Constants.
    #[prost(message, repeated, tag = "5")]
    pub initializer: Vec<TensorProto>,
    /// Inputs.
    #[prost(message, repeated, tag = "11")]
    pub input: Vec<ValueInfoProto>,
    /// Outputs.
    #[prost(message, repeated, tag = "12")]
    pub output: Vec<ValueInfoProto>,
}

/// One operator.
#[derive(Clone, PartialEq, Message)]
pub struct NodeProto {
    /// Names of the inputs; an empty name is an absent optional input.
    #[prost(string, repeated, tag = "1")]
    pub input: Vec<String>,
    /// Names of the outputs.
    #[prost(string, repeated, tag = "2")]
    pub output: Vec<String>,
    /// Name of the node.
    #[prost(string, tag = "3")]
    pub name: String,
    /// Operator.
    #[prost(string, tag = "4")]
    pub op_type: String,
    /// Attributes.
    #[prost(message, repeated, tag = "5")]
    pub attribute: Vec<AttributeProto>,
    /// Operator set; empty for ONNX's own.
    #[prost(string, tag = "7")]
    pub domain: String,
}

/// An attribute of a node. Only the kinds that encoder graphs use are read.
#[derive(Clone, PartialEq, Message)]
pub struct AttributeProto {
    /// Name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// FLOAT.
    #[prost(float, optional, tag = "2")]
    pub f: Option<f32>,
    /// INT.
    #[prost(int64, optional, tag = "3")]
    pub i: Option<i64>,
    /// TENSOR.
    #[prost(message, optional, tag = "5")]
    pub t: Option<TensorProto>,
    /// INTS.
    #[prost(int64, repeated, packed = "false", tag = "8")]
    pub ints: Vec<i64>,
    /// Which of the above: 1 FLOAT, 2 INT, 4 TENSOR, 7 INTS.
    #[prost(int32, tag = "20")]
    pub r#type: i32,
}

/// A constant tensor.
#[derive(Clone, PartialEq, Message)]
pub struct TensorProto {
    /// Shape.
    #[prost(int64, repeated, packed = "false", tag = "1")]
    pub dims: Vec<i64>,
    /// An [`ElementType`].
    #[prost(int32, tag = "2")]
    pub data_type: i32,
    /// Name.
    #[prost(string, tag = "8")]
    pub name: String,
    /// Little-endian values.
    #[prost(bytes = "bytes", tag = "9")]
    pub raw_data: Bytes,
    /// `location`, `offset`, `length` when the values lie in another file.
    #[prost(message, repeated, tag = "13")]
    pub external_data: Vec<StringStringEntryProto>,
    /// 1 when the values lie in another file.
    #[prost(int32, optional, tag = "14")]
    pub data_location: Option<i32>,
}

/// A named input or output.
#[derive(Clone, PartialEq, Message)]
pub struct ValueInfoProto {
    /// Name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Type and shape.
    #[prost(message, optional, tag = "2")]
    pub r#type: Option<TypeProto>,
}

/// A type; only tensors are read.
#[derive(Clone, PartialEq, Message)]
pub struct TypeProto {
    /// A tensor.
    #[prost(message, optional, tag = "1")]
    pub tensor_type: Option<TensorTypeProto>,
}

/// Element type and shape of a tensor.
#[derive(Clone, PartialEq, Message)]
pub struct TensorTypeProto {
    /// An [`ElementType`].
    #[prost(int32, tag = "1")]
    pub elem_type: i32,
    /// Shape.
    #[prost(message, optional, tag = "2")]
    pub shape: Option<TensorShapeProto>,
}

/// A shape with fixed and named dimensions.
#[derive(Clone, PartialEq, Message)]
pub struct TensorShapeProto {
    /// Dimensions.
    #[prost(message, repeated, tag = "1")]
    pub dim: Vec<DimensionProto>,
}

/// One dimension: a number, or a name where it varies.
#[derive(Clone, PartialEq, Message)]
pub struct DimensionProto {
    /// A fixed size.
    #[prost(int64, optional, tag = "1")]
    pub dim_value: Option<i64>,
    /// A name.
    #[prost(string, optional, tag = "2")]
    pub dim_param: Option<String>,
}

/// An operator set and its version.
#[derive(Clone, PartialEq, Message)]
pub struct OperatorSetIdProto {
    /// Empty for ONNX's own.
    #[prost(string, tag = "1")]
    pub domain: String,
    /// Version.
    #[prost(int64, tag = "2")]
    pub version: i64,
}

/// A key and its value.
#[derive(Clone, PartialEq, Message)]
pub struct StringStringEntryProto {
    /// Key.
    #[prost(string, tag = "1")]
    pub key: String,
    /// Value.
    #[prost(string, tag = "2")]
    pub value: String,
}

/// Element types, with ONNX's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum ElementType {
    /// f32.
    Float32 = 1,
    /// i8.
    Int8 = 3,
    /// i32.
    Int32 = 6,
    /// i64.
    Int64 = 7,
    /// IEEE half precision.
    Float16 = 10,
}

impl ElementType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::Int8 => 1,
            Self::Float16 => 2,
            Self::Float32 | Self::Int32 => 4,
            Self::Int64 => 8,
        }
    }
}

/// ONNX's name of an element type number, e.g. `float32` for 1.
pub fn element_type_name(number: i32) -> String {
    match number {
        1 => "float32".into(),
        2 => "uint8".into(),
        3 => "int8".into(),
        6 => "int32".into(),
        7 => "int64".into(),
        9 => "bool".into(),
        10 => "float16".into(),
        11 => "float64".into(),
        16 => "bfloat16".into(),
        other => format!("type {other}"),
    }
}

impl ValueInfoProto {
    /// A tensor of `element` with dimensions that are numbers or names.
    pub fn tensor(name: &str, element: ElementType, dims: &[Dim]) -> Self {
        let dim = dims
            .iter()
            .map(|dim| match dim {
                Dim::Fixed(size) => DimensionProto { dim_value: Some(*size as i64), dim_param: None },
                Dim::Named(name) => DimensionProto { dim_value: None, dim_param: Some((*name).to_string()) },
            })
            .collect();
        let tensor_type = TensorTypeProto { elem_type: element as i32, shape: Some(TensorShapeProto { dim }) };
        Self { name: name.to_string(), r#type: Some(TypeProto { tensor_type: Some(tensor_type) }) }
    }

    /// Type and shape for a reader, e.g. `int32 [batch, sequence]`.
    pub fn describe(&self) -> String {
        let Some(tensor) = self.r#type.as_ref().and_then(|t| t.tensor_type.as_ref()) else {
            return "not a tensor".into();
        };
        let dims = tensor.shape.iter().flat_map(|shape| &shape.dim).map(|dim| match (&dim.dim_value, &dim.dim_param) {
            (Some(size), _) => size.to_string(),
            (None, Some(name)) if !name.is_empty() => name.clone(),
            _ => "?".into(),
        });
        format!("{} [{}]", element_type_name(tensor.elem_type), dims.collect::<Vec<_>>().join(", "))
    }
}

/// A dimension of a graph input or output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dim {
    /// Always this size.
    Fixed(usize),
    /// Varies from call to call.
    Named(&'static str),
}

impl AttributeProto {
    /// An INT attribute.
    pub fn int(name: &str, value: i64) -> Self {
        Self { name: name.into(), i: Some(value), r#type: 2, ..Self::default() }
    }

    /// A FLOAT attribute.
    pub fn float(name: &str, value: f32) -> Self {
        Self { name: name.into(), f: Some(value), r#type: 1, ..Self::default() }
    }

    /// An INTS attribute.
    pub fn ints(name: &str, values: &[i64]) -> Self {
        Self { name: name.into(), ints: values.to_vec(), r#type: 7, ..Self::default() }
    }
}

/// Reads an ONNX file. Constants stay in the mapped file; they are not copied.
///
/// # Errors
/// [`Error::Io`], or [`Error::Onnx`] when the file is not an ONNX model.
pub fn read_model(path: &Path) -> Result<ModelProto> {
    Ok(map_model(path)?.1)
}

/// As [`read_model`], with the mapped file's bytes.
pub(crate) fn map_model(path: &Path) -> Result<(Bytes, ModelProto)> {
    let bytes = Bytes::from_owner(Mapped::open(path)?);
    let not_onnx = |reason: String| Error::Onnx { reason: format!("{}: {reason}", path.display()) };
    let model = ModelProto::decode(bytes.clone()).map_err(|error| not_onnx(format!("not an ONNX model ({error})")))?;
    // Protobuf accepts many foreign byte strings; a model without a graph or a version is none.
    if model.graph.is_none() || model.ir_version == 0 {
        return Err(not_onnx("not an ONNX model (it has no graph)".into()));
    }
    Ok((bytes, model))
}

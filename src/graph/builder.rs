//! A graph under construction: its nodes and constants, by name.

use crate::graph::constant::{Constant, Values};
use crate::graph::onnx::{
    AttributeProto, Dim, ElementType, GraphProto, IR_VERSION, IR_VERSION_FP16_SCALES, ModelProto, NodeProto, OPSET,
    OPSET_FP16_SCALES, OperatorSetIdProto, StringStringEntryProto, ValueInfoProto,
};
use crate::graph::quantization::{Linear, Quantization};
use crate::graph::{Graph, Inputs, Integers, Precision};
use crate::model::{Architecture, TensorView};
use std::collections::HashSet;

/// A graph under construction.
pub(super) struct Builder<'q> {
    pub float: ElementType,
    nodes: Vec<NodeProto>,
    constants: Vec<Constant>,
    pub names: HashSet<String>,
    header: ModelProto,
    pub quantization: Option<&'q Quantization>,
    pub inputs: Inputs,
    /// Whether attention is one operator; see [`Graph::with_one_attention`].
    pub one_attention: bool,
    pub linears: Vec<Linear>,
    vocab_size: usize,
}

impl<'q> Builder<'q> {
    pub fn new(architecture: &Architecture, precision: Precision) -> Self {
        let float = precision.element();
        let tokens = [Dim::Named("batch"), Dim::Named("sequence")];
        let states = [tokens[0], tokens[1], Dim::Fixed(architecture.hidden_size)];
        let note = |key: &str, value: String| StringStringEntryProto { key: key.into(), value };
        let header = ModelProto {
            ir_version: IR_VERSION,
            producer_name: env!("CARGO_PKG_NAME").into(),
            producer_version: env!("CARGO_PKG_VERSION").into(),
            graph: Some(GraphProto {
                name: architecture.name.into(),
                node: Vec::new(),
                initializer: Vec::new(),
                input: ["input_ids", "attention_mask"].map(|n| ValueInfoProto::tensor(n, ElementType::Int32, &tokens)).into(),
                output: vec![ValueInfoProto::tensor("last_hidden_state", float, &states)],
            }),
            opset_import: vec![OperatorSetIdProto { domain: String::new(), version: OPSET }],
            metadata_props: vec![note("family", architecture.name.into()), note("precision", precision.to_string())],
        };
        Self {
            float,
            nodes: Vec::new(),
            constants: Vec::new(),
            names: HashSet::new(),
            header,
            quantization: None,
            inputs: Inputs::default(),
            one_attention: false,
            linears: Vec::new(),
            vocab_size: architecture.vocab_size,
        }
    }

    /// Fed otherwise.
    pub fn with_inputs(mut self, inputs: Inputs) -> Self {
        let element = match inputs.integers {
            Integers::Int32 => ElementType::Int32,
            Integers::Int64 => ElementType::Int64,
        };
        let names = ["input_ids", "attention_mask", "token_type_ids"];
        let tokens = [Dim::Named("batch"), Dim::Named("sequence")];
        let named = names.iter().take(if inputs.token_types { 3 } else { 2 });
        if let Some(graph) = &mut self.header.graph {
            graph.input = named.map(|name| ValueInfoProto::tensor(name, element, &tokens)).collect();
        }
        self.inputs = inputs;
        self
    }

    /// With linears in INT8.
    pub fn quantized(mut self, quantization: &'q Quantization) -> Self {
        self.quantization = Some(quantization);
        if self.float == ElementType::Float16 {
            // Earlier operator sets know float32 scales only.
            self.header.ir_version = IR_VERSION_FP16_SCALES;
            self.header.opset_import[0].version = OPSET_FP16_SCALES;
        }
        let note = StringStringEntryProto { key: "linears".into(), value: "int8".into() };
        self.header.metadata_props.push(note);
        self
    }

    pub fn node(&mut self, op: &str, name: &str, inputs: &[&str], attributes: Vec<AttributeProto>) -> String {
        let output = format!("{name}.{op}");
        let new = self.names.insert(output.clone());
        debug_assert!(new, "two nodes are called {output}");
        self.nodes.push(NodeProto {
            input: inputs.iter().map(|input| (*input).to_string()).collect(),
            output: vec![output.clone()],
            name: output.clone(),
            op_type: op.into(),
            attribute: attributes,
            domain: String::new(),
        });
        output
    }

    pub fn constant(&mut self, name: &str, dims: &[usize], element: ElementType, values: Values) -> String {
        if self.names.insert(name.to_string()) {
            self.constants.push(Constant { name: name.into(), dims: dims.to_vec(), element, values });
        }
        name.to_string()
    }

    pub fn ints(&mut self, name: &str, values: &[i64]) -> String {
        self.constant(name, &[values.len()], ElementType::Int64, Values::Ints(values.to_vec()))
    }

    pub fn scalar(&mut self, name: &str, value: f32) -> String {
        self.constant(name, &[], self.float, Values::Floats(vec![value]))
    }

    pub fn floats(&mut self, name: &str, dims: &[usize], values: Vec<f32>) -> String {
        self.constant(name, dims, self.float, Values::Floats(values))
    }

    /// A stored tensor in its own shape, times `factor`.
    pub fn stored(&mut self, name: &str, view: &TensorView, factor: f32) -> String {
        self.constant(name, &view.shape, self.float, Values::Stored { view: view.clone(), factor })
    }

    /// The sequence length as an int64 `[1]`.
    pub fn sequence_length(&mut self) -> String {
        let name = "sequence_length";
        if self.names.contains(&format!("{name}.Gather")) {
            return format!("{name}.Gather");
        }
        let shape = self.node("Shape", name, &["input_ids"], vec![]);
        let index = self.ints("one", &[1]);
        self.node("Gather", name, &[&shape, &index], vec![])
    }

    /// The graph, with `x` as its output.
    pub fn finish(mut self, x: &str) -> Graph {
        if let Some(last) = self.nodes.iter_mut().find(|node| node.output[0] == x) {
            last.output[0] = "last_hidden_state".into();
        }
        if let Some(graph) = &mut self.header.graph {
            graph.node = self.nodes;
        }
        Graph { header: self.header, constants: self.constants, linears: self.linears, vocab_size: self.vocab_size }
    }
}

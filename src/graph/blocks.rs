//! Blocks that encoder graphs are made of: linears, attention, feed-forward, LayerNorm, embeddings and the attention mask.
//!
//! The forms are those that TensorRT fuses best: `[B,S,N,H]` heads, one Add before the softmax, `LayerNormalization` whole,
//! GELU by `Erf`, and 1/sqrt(head size) folded into the query's weights.

use crate::Result;
use crate::graph::constant::{Constant, Values};
use crate::graph::onnx::{
    AttributeProto, Dim, ElementType, GraphProto, IR_VERSION, IR_VERSION_FP16_SCALES, ModelProto, NodeProto, OPSET,
    OPSET_FP16_SCALES, OperatorSetIdProto, StringStringEntryProto, ValueInfoProto,
};
use crate::graph::quantization::{Linear, Quantization, Role};
use crate::graph::{Graph, Inputs, Integers, Precision};
use crate::model::{Activation, EncoderConfig, Weights};
use std::collections::HashSet;

/// Added to the scores of padding: large enough that softmax gives 0 in fp32 and fp16, small enough to be finite in fp16,
/// so that a row of padding alone gives no NaN.
const MASKED: f32 = -1e4;

/// A graph under construction.
pub(super) struct Builder<'w> {
    weights: &'w Weights,
    pub(super) float: ElementType,
    nodes: Vec<NodeProto>,
    constants: Vec<Constant>,
    pub(super) names: HashSet<String>,
    header: ModelProto,
    quantization: Option<&'w Quantization>,
    pub(super) inputs: Inputs,
    linears: Vec<Linear>,
    vocab_size: usize,
    /// Layers built so far.
    layers: usize,
}

/// Tensor names of one layer, without `.weight` and `.bias`.
pub(super) struct LayerNames {
    pub query: String,
    pub key: String,
    pub value: String,
    pub attention_output: String,
    pub attention_norm: String,
    pub intermediate: String,
    pub output: String,
    pub output_norm: String,
}

impl<'w> Builder<'w> {
    pub fn new(config: &EncoderConfig, weights: &'w Weights, precision: Precision) -> Self {
        let float = precision.element();
        let tokens = [Dim::Named("batch"), Dim::Named("sequence")];
        let states = [tokens[0], tokens[1], Dim::Fixed(config.hidden_size)];
        let note = |key: &str, value: String| StringStringEntryProto { key: key.into(), value };
        let family = config.family.name();
        let header = ModelProto {
            ir_version: IR_VERSION,
            producer_name: env!("CARGO_PKG_NAME").into(),
            producer_version: env!("CARGO_PKG_VERSION").into(),
            graph: Some(GraphProto {
                name: family.into(),
                node: Vec::new(),
                initializer: Vec::new(),
                input: ["input_ids", "attention_mask"].map(|n| ValueInfoProto::tensor(n, ElementType::Int32, &tokens)).into(),
                output: vec![ValueInfoProto::tensor("last_hidden_state", float, &states)],
            }),
            opset_import: vec![OperatorSetIdProto { domain: String::new(), version: OPSET }],
            metadata_props: vec![note("family", family.into()), note("precision", precision.to_string())],
        };
        Self {
            weights,
            float,
            nodes: Vec::new(),
            constants: Vec::new(),
            names: HashSet::new(),
            header,
            quantization: None,
            inputs: Inputs::default(),
            linears: Vec::new(),
            vocab_size: config.vocab_size,
            layers: 0,
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
    pub fn quantized(mut self, quantization: &'w Quantization) -> Self {
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

    pub(super) fn node(&mut self, op: &str, name: &str, inputs: &[&str], attributes: Vec<AttributeProto>) -> String {
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

    pub(super) fn constant(&mut self, name: &str, dims: &[usize], element: ElementType, values: Values) -> String {
        if self.names.insert(name.to_string()) {
            self.constants.push(Constant { name: name.into(), dims: dims.to_vec(), element, values });
        }
        name.to_string()
    }

    fn ints(&mut self, name: &str, values: &[i64]) -> String {
        self.constant(name, &[values.len()], ElementType::Int64, Values::Ints(values.to_vec()))
    }

    pub(super) fn scalar(&mut self, name: &str, value: f32) -> String {
        self.constant(name, &[], self.float, Values::Floats(vec![value]))
    }

    pub fn floats(&mut self, name: &str, dims: &[usize], values: Vec<f32>) -> String {
        self.constant(name, dims, self.float, Values::Floats(values))
    }

    fn stored(&mut self, name: &str, dims: &[usize], factor: f32) -> Result<String> {
        let view = self.weights.tensor(name, dims)?;
        Ok(self.constant(name, dims, self.float, Values::Stored { view, factor }))
    }

    /// `x W^T + b` for the stored `[out, in]` weight, both times `factor`.
    fn linear(&mut self, role: Role, name: &str, x: &str, inputs: usize, outputs: usize, factor: f32) -> Result<String> {
        let linear = Linear { name: name.into(), input: x.into(), layer: self.layers, role, inputs, outputs };
        self.linears.push(linear);
        let weight = format!("{name}.weight");
        let view = self.weights.tensor(&weight, &[outputs, inputs])?;
        let (x, weight) = match self.quantization {
            Some(quantization) if !quantization.float.contains(name) => {
                let range = Self::range(quantization, x, inputs)?;
                (self.quantized_input(x, range)?, self.quantized_weight(name, view, factor, range)?)
            }
            _ => (x.into(), self.constant(&weight, &[inputs, outputs], self.float, Values::Transposed { view, factor })),
        };
        let bias = self.stored(&format!("{name}.bias"), &[outputs], factor)?;
        let product = self.node("MatMul", name, &[&x, &weight], vec![]);
        Ok(self.node("Add", name, &[&product, &bias], vec![]))
    }

    /// LayerNorm over the last axis.
    pub fn layer_norm(&mut self, name: &str, x: &str, config: &EncoderConfig) -> Result<String> {
        let weight = self.stored(&format!("{name}.weight"), &[config.hidden_size], 1.0)?;
        let bias = self.stored(&format!("{name}.bias"), &[config.hidden_size], 1.0)?;
        let attributes = vec![AttributeProto::int("axis", -1), AttributeProto::float("epsilon", config.layer_norm_eps as f32)];
        Ok(self.node("LayerNormalization", name, &[x, &weight, &bias], attributes))
    }

    /// Word embeddings plus the first `sequence` rows of `positions` (`[max_tokens, hidden]`), plus token types where they are an
    /// input, normalised.
    pub fn embeddings(&mut self, positions: Vec<f32>, config: &EncoderConfig) -> Result<String> {
        let name = "embeddings";
        let table = self.stored("embeddings.word_embeddings.weight", &[config.vocab_size, config.hidden_size], 1.0)?;
        let words = self.node("Gather", "embeddings.word_embeddings", &[&table, "input_ids"], vec![]);
        let positions =
            self.floats("embeddings.position_embeddings.weight", &[config.max_tokens(), config.hidden_size], positions);
        let length = self.sequence_length();
        let (start, axis) = (self.ints("zero", &[0]), self.ints("axis_0", &[0]));
        let positions = self.node("Slice", "embeddings.position_embeddings", &[&positions, &start, &length, &axis], vec![]);
        let mut sum = self.node("Add", name, &[&words, &positions], vec![]);
        if self.inputs.token_types {
            let name = "embeddings.token_type_embeddings";
            let table = self.stored(&format!("{name}.weight"), &[config.type_vocab_size, config.hidden_size], 1.0)?;
            let types = self.node("Gather", name, &[&table, "token_type_ids"], vec![]);
            sum = self.node("Add", name, &[&sum, &types], vec![]);
        }
        self.layer_norm("embeddings.LayerNorm", &sum, config)
    }

    /// The sequence length as an int64 `[1]`.
    fn sequence_length(&mut self) -> String {
        let name = "sequence_length";
        if self.names.contains(&format!("{name}.Gather")) {
            return format!("{name}.Gather");
        }
        let shape = self.node("Shape", name, &["input_ids"], vec![]);
        let index = self.ints("one", &[1]);
        self.node("Gather", name, &[&shape, &index], vec![])
    }

    /// `[batch, 1, 1, sequence]`: 0 at tokens, [`MASKED`] at padding.
    pub fn attention_mask(&mut self) -> String {
        let name = "attention_mask";
        let mask = self.node("Cast", name, &["attention_mask"], vec![AttributeProto::int("to", self.float as i64)]);
        let one = self.scalar("attention_mask.one", 1.0);
        let masked = self.scalar("attention_mask.masked", MASKED);
        let padding = self.node("Sub", name, &[&one, &mask], vec![]);
        let scores = self.node("Mul", name, &[&padding, &masked], vec![]);
        let axes = self.ints("attention_mask.axes", &[1, 2]);
        self.node("Unsqueeze", name, &[&scores, &axes], vec![])
    }

    /// The first `sequence` rows and columns of `table` (`[1, heads, max_tokens, max_tokens]`), plus `mask`.
    pub fn position_bias(&mut self, table: Vec<f32>, mask: &str, config: &EncoderConfig) -> String {
        let name = "position_bias";
        let longest = config.max_tokens();
        let table = self.floats("position_bias.table", &[1, config.num_attention_heads, longest, longest], table);
        let length = self.sequence_length();
        let ends = self.node("Concat", name, &[&length, &length], vec![AttributeProto::int("axis", 0)]);
        let (starts, axes) = (self.ints("position_bias.starts", &[0, 0]), self.ints("position_bias.axes", &[2, 3]));
        let bias = self.node("Slice", name, &[&table, &starts, &ends, &axes], vec![]);
        self.node("Add", name, &[&bias, mask], vec![])
    }

    /// One post-LayerNorm encoder layer. `bias` is added to every head's scores.
    pub fn layer(&mut self, names: &LayerNames, x: &str, bias: &str, config: &EncoderConfig) -> Result<String> {
        let attended = self.attention(names, x, bias, config)?;
        let sum = self.node("Add", &format!("{}.residual", names.attention_output), &[&attended, x], vec![]);
        let x = self.layer_norm(&names.attention_norm, &sum, config)?;
        let wide = self.linear(Role::Ffn1, &names.intermediate, &x, config.hidden_size, config.intermediate_size, 1.0)?;
        let wide = self.activation(&names.intermediate, &wide, config.activation);
        let narrow = self.linear(Role::Ffn2, &names.output, &wide, config.intermediate_size, config.hidden_size, 1.0)?;
        let sum = self.node("Add", &format!("{}.residual", names.output), &[&narrow, &x], vec![]);
        self.layers += 1;
        self.layer_norm(&names.output_norm, &sum, config)
    }

    fn attention(&mut self, names: &LayerNames, x: &str, bias: &str, config: &EncoderConfig) -> Result<String> {
        let hidden = config.hidden_size;
        let scale = 1.0 / (config.head_size() as f32).sqrt();
        let query = self.linear(Role::Query, &names.query, x, hidden, hidden, scale)?;
        let key = self.linear(Role::Key, &names.key, x, hidden, hidden, 1.0)?;
        let value = self.linear(Role::Value, &names.value, x, hidden, hidden, 1.0)?;
        let query = self.heads(&names.query, &query, &[0, 2, 1, 3], config);
        let key = self.heads(&names.key, &key, &[0, 2, 3, 1], config);
        let value = self.heads(&names.value, &value, &[0, 2, 1, 3], config);

        let name = names.attention_output.as_str();
        let scores = self.node("MatMul", &format!("{name}.scores"), &[&query, &key], vec![]);
        let scores = self.node("Add", &format!("{name}.scores"), &[&scores, bias], vec![]);
        let probabilities = self.node("Softmax", name, &[&scores], vec![AttributeProto::int("axis", -1)]);
        let context = self.node("MatMul", &format!("{name}.context"), &[&probabilities, &value], vec![]);
        let context = self.node("Transpose", name, &[&context], vec![AttributeProto::ints("perm", &[0, 2, 1, 3])]);
        let shape = self.ints("merged_heads", &[0, 0, hidden as i64]);
        let context = self.node("Reshape", name, &[&context, &shape], vec![]);
        self.linear(Role::AttentionOutput, name, &context, hidden, hidden, 1.0)
    }

    /// `[batch, sequence, hidden]` to heads, transposed by `perm` of `[batch, sequence, heads, head size]`.
    fn heads(&mut self, name: &str, x: &str, perm: &[i64], config: &EncoderConfig) -> String {
        // 0 keeps the input's own dimension.
        let shape = self.ints("split_heads", &[0, 0, config.num_attention_heads as i64, config.head_size() as i64]);
        let heads = self.node("Reshape", name, &[x, &shape], vec![]);
        self.node("Transpose", name, &[&heads], vec![AttributeProto::ints("perm", perm)])
    }

    fn activation(&mut self, name: &str, x: &str, activation: Activation) -> String {
        match activation {
            Activation::Relu => self.node("Relu", name, &[x], vec![]),
            Activation::ReluSquared => {
                let relu = self.node("Relu", name, &[x], vec![]);
                self.node("Mul", &format!("{name}.squared"), &[&relu, &relu], vec![])
            }
            Activation::Tanh => self.node("Tanh", name, &[x], vec![]),
            Activation::Silu => self.gated_by_sigmoid(name, x, x),
            Activation::QuickGelu => {
                let factor = self.scalar("quick_gelu.factor", 1.702);
                let scaled = self.node("Mul", &format!("{name}.scaled"), &[x, &factor], vec![]);
                self.gated_by_sigmoid(name, x, &scaled)
            }
            Activation::Mish => {
                let softplus = self.node("Softplus", name, &[x], vec![]);
                let tanh = self.node("Tanh", &format!("{name}.mish"), &[&softplus], vec![]);
                self.node("Mul", &format!("{name}.mish"), &[x, &tanh], vec![])
            }
            Activation::GeluClipped => {
                let gelu = self.activation(name, x, Activation::Gelu);
                let (low, high) = (self.scalar("gelu.low", -10.0), self.scalar("gelu.high", 10.0));
                self.node("Clip", &format!("{name}.clipped"), &[&gelu, &low, &high], vec![])
            }
            Activation::Gelu => {
                let root = self.scalar("gelu.sqrt_2", std::f32::consts::SQRT_2);
                let scaled = self.node("Div", &format!("{name}.gelu"), &[x, &root], vec![]);
                let erf = self.node("Erf", &format!("{name}.gelu"), &[&scaled], vec![]);
                self.gelu_product(name, x, &erf)
            }
            Activation::GeluTanh => {
                // tanh(sqrt(2/pi) (x + 0.044715 x^3)), as transformers' NewGELUActivation.
                let inner = format!("{name}.gelu.inner");
                let (three, factor) = (self.scalar("gelu.three", 3.0), self.scalar("gelu.cubic", 0.044_715));
                let root = self.scalar("gelu.sqrt_2_over_pi", (2.0 / std::f32::consts::PI).sqrt());
                let cube = self.node("Pow", &inner, &[x, &three], vec![]);
                let cubic = self.node("Mul", &inner, &[&cube, &factor], vec![]);
                let sum = self.node("Add", &inner, &[x, &cubic], vec![]);
                let scaled = self.node("Mul", &format!("{inner}.scaled"), &[&sum, &root], vec![]);
                let tanh = self.node("Tanh", &format!("{name}.gelu"), &[&scaled], vec![]);
                self.gelu_product(name, x, &tanh)
            }
        }
    }

    /// `x sigmoid(y)`.
    fn gated_by_sigmoid(&mut self, name: &str, x: &str, y: &str) -> String {
        let gate = self.node("Sigmoid", &format!("{name}.gate"), &[y], vec![]);
        self.node("Mul", &format!("{name}.gated"), &[x, &gate], vec![])
    }

    /// `0.5 x (1 + y)`.
    fn gelu_product(&mut self, name: &str, x: &str, y: &str) -> String {
        let (one, half) = (self.scalar("gelu.one", 1.0), self.scalar("gelu.half", 0.5));
        let sum = self.node("Add", &format!("{name}.gelu"), &[y, &one], vec![]);
        let product = self.node("Mul", &format!("{name}.gelu"), &[x, &sum], vec![]);
        self.node("Mul", &format!("{name}.gelu.half"), &[&product, &half], vec![])
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

#[cfg(all(test, feature = "cpu"))]
mod tests {
    use super::*;
    use crate::cpu::CpuBackend;
    use crate::graph::onnx::AttributeProto;
    use crate::model::ModelFolder;
    use crate::pooling::{Head, Pooling, PoolingMode};
    use crate::tokens::TokenBatch;

    /// x / 100 - 20 for the ids 0 to 4000, through `activation`.
    fn through(activation: Activation) -> Vec<(f64, f64)> {
        const IDS: i32 = 4001;
        let mut folder = ModelFolder::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/mpnet")).unwrap();
        folder.config.vocab_size = IDS as usize;
        let weights = folder.weights().unwrap();
        let mut builder = Builder::new(&folder.config, &weights, Precision::Fp32);
        let ids = builder.node("Cast", "x", &["input_ids"], vec![AttributeProto::int("to", ElementType::Float32 as i64)]);
        let (step, twenty) = (builder.scalar("x.step", 0.01), builder.scalar("x.twenty", 20.0));
        let scaled = builder.node("Mul", "x", &[&ids, &step], vec![]);
        let x = builder.node("Sub", "x", &[&scaled, &twenty], vec![]);
        let y = builder.activation("y", &x, activation);
        let axes = builder.ints("axes", &[2]);
        let wide = builder.node("Unsqueeze", "y", &[&y, &axes], vec![]);
        let mut graph = builder.finish(&wide);
        let tokens = [Dim::Named("batch"), Dim::Named("sequence")];
        let outputs = &mut graph.header.graph.as_mut().unwrap().output;
        outputs.extend([&x, &y].map(|name| ValueInfoProto::tensor(name, ElementType::Float32, &tokens)));

        let head =
            Head::new(Pooling::new([PoolingMode::Mean], true).unwrap(), Vec::new(), 1, None, crate::pooling::Scaling::None)
                .unwrap();
        let backend = CpuBackend::from_graph(graph, head, IDS as usize, 1).unwrap();
        let batch = TokenBatch::from_ragged((0..IDS).collect(), vec![0, IDS as u32], 0).unwrap();
        let mut seen = Vec::new();
        backend.observe(&batch, &mut |_, values| seen.push(values.to_vec())).unwrap();
        let [x, y] = <[Vec<f32>; 2]>::try_from(seen).unwrap();
        assert_eq!(x.len(), IDS as usize);
        x.into_iter().zip(y).map(|(x, y)| (f64::from(x), f64::from(y))).collect()
    }

    #[test]
    fn activations_are_those_of_transformers() {
        let gelu = |x: f64| x / 2.0 * (1.0 + libm::erf(x / std::f64::consts::SQRT_2));
        let tanh = |x: f64| x / 2.0 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh());
        let relu = |x: f64| x.max(0.0);
        let clipped = |x: f64| gelu(x).clamp(-10.0, 10.0);
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let oracles: [(Activation, &dyn Fn(f64) -> f64); 9] = [
            (Activation::Gelu, &gelu),
            (Activation::GeluTanh, &tanh),
            (Activation::GeluClipped, &clipped),
            (Activation::QuickGelu, &|x| x * sigmoid(1.702 * x)),
            (Activation::Relu, &relu),
            (Activation::ReluSquared, &|x| relu(x).powi(2)),
            (Activation::Silu, &|x| x * sigmoid(x)),
            (Activation::Mish, &|x| x * x.exp().ln_1p().tanh()),
            (Activation::Tanh, &f64::tanh),
        ];
        for (activation, oracle) in oracles {
            for (x, y) in through(activation) {
                // 1 + erf(..) and 1 + tanh(..) are sums near 0 of terms near 1, rounded to 2^-24 a step, times |x| / 2; a square
                // doubles the relative error of its root.
                let bound = 8.0 * f64::from(f32::EPSILON) * x.abs().max(1.0).max(oracle(x).abs());
                assert!((y - oracle(x)).abs() <= bound, "{activation:?}({x}) = {y}, expected {}", oracle(x));
            }
        }
    }

    #[test]
    fn the_tanh_form_of_gelu_is_near_it() {
        let pairs = through(Activation::Gelu).into_iter().zip(through(Activation::GeluTanh));
        let largest = pairs.map(|((_, exact), (_, tanh))| (exact - tanh).abs()).fold(0.0, f64::max);
        assert!((4.7e-4..4.8e-4).contains(&largest), "{largest}");
    }
}

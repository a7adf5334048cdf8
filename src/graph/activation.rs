//! Activations as nodes.

use crate::graph::builder::Builder;
use crate::model::Activation;

impl Builder<'_> {
    /// `activation(x)`, with nodes called after `name`.
    pub fn activation(&mut self, name: &str, x: &str, activation: Activation) -> String {
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
}

#[cfg(all(test, feature = "cpu"))]
mod tests {
    use super::*;
    use crate::cpu::CpuBackend;
    use crate::graph::Precision;
    use crate::graph::onnx::{AttributeProto, Dim, ElementType, ValueInfoProto};
    use crate::model::ModelFolder;
    use crate::pooling::{Head, Pooling, PoolingMode};
    use crate::tokens::TokenBatch;

    /// x / 100 - 20 for the ids 0 to 4000, through `activation`.
    fn through(activation: Activation) -> Vec<(f64, f64)> {
        const IDS: i32 = 4001;
        let folder = ModelFolder::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/mpnet")).unwrap();
        let mut architecture = folder.architecture().unwrap();
        architecture.vocab_size = IDS as usize;
        let mut builder = Builder::new(&architecture, Precision::Fp32);
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

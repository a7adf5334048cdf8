//! Positions that enter in attention, as nodes: rotations of queries and keys, and what is added to scores by distance.
//!
//! Angles and distances are f32 in graphs of every precision: fp16 holds whole numbers up to 2,048 alone. Nothing here is a table of pairs of
//! positions, which would have 256 MB for 8,192 tokens.

use crate::graph::builder::Builder;
use crate::graph::constant::Values;
use crate::graph::onnx::{AttributeProto, ElementType};
use crate::model::architecture::{Alibi, Rotary, RotaryScaling};

/// Names of a rotation's cosines and sines, as [`Builder::rotated`] takes them.
#[derive(Debug, Clone)]
pub(super) struct Turns {
    cosines: String,
    sines: String,
    /// How many values of a head are turned.
    size: usize,
}

impl Builder<'_> {
    /// The cosines and sines of `rotary` for every position of a batch, with nodes called after `name`: of one text like the other
    /// `[sequence, 1, size]`, or `[batch, sequence, 1, size]` where they depend on a text's length. `longest` tokens at most.
    pub fn turns(&mut self, name: &str, rotary: &Rotary, longest: usize) -> Turns {
        match rotary.scaling {
            RotaryScaling::DynamicNtk { factor, trained } if longest > trained => {
                self.turns_by_length(name, rotary, longest, (factor, trained))
            }
            _ => self.fixed_turns(name, rotary, longest),
        }
    }

    /// Tables of all positions, cut to the batch's.
    fn fixed_turns(&mut self, name: &str, rotary: &Rotary, longest: usize) -> Turns {
        let (mut cosines, mut sines) = (Vec::new(), Vec::new());
        let frequencies = rotary.rounded_frequencies();
        for position in 0..longest {
            // Rounded as the reference rounds, so that far positions are turned by its angle.
            let angles: Vec<f64> = frequencies.iter().map(|frequency| f64::from(position as f32 * frequency)).collect();
            cosines.extend(angles.iter().chain(&angles).map(|angle| angle.cos() as f32));
            // With the sign by which the first half takes the second: see `rotated`.
            sines.extend(angles.iter().map(|angle| -angle.sin() as f32).chain(angles.iter().map(|angle| angle.sin() as f32)));
        }
        let dims = [longest, 1, rotary.size];
        let cosines = self.floats(&format!("{name}.cosines"), &dims, cosines);
        let sines = self.floats(&format!("{name}.sines"), &dims, sines);
        let cosines = self.first_of_sequence(&cosines, &cosines);
        let sines = self.first_of_sequence(&sines, &sines);
        Turns { cosines, sines, size: rotary.size }
    }

    /// Computed for each row: its frequencies fall with its own length, whatever shares its batch.
    fn turns_by_length(&mut self, name: &str, rotary: &Rotary, longest: usize, (factor, trained): (f64, usize)) -> Turns {
        let float = |part: &str| format!("{name}.{part}");
        let to_float = || vec![AttributeProto::int("to", ElementType::Float32 as i64)];
        let mask = self.node("Cast", &float("mask"), &["attention_mask"], to_float());
        let axes = self.ints("axis_1", &[1]);
        let tokens = self.node("ReduceSum", &float("tokens"), &[&mask, &axes], vec![AttributeProto::int("keepdims", 1)]);
        // max(1, factor tokens / trained - (factor - 1)): 1 up to what was trained.
        let slope = self.scalar_f32(&float("slope"), (factor / trained as f64) as f32);
        let offset = self.scalar_f32(&float("offset"), (factor - 1.0) as f32);
        let one = self.scalar_f32(&float("one"), 1.0);
        let stretch = self.node("Mul", &float("stretch"), &[&tokens, &slope], vec![]);
        let stretch = self.node("Sub", &float("stretch"), &[&stretch, &offset], vec![]);
        let stretch = self.node("Max", &float("stretch"), &[&stretch, &one], vec![]);
        // The base times stretch^(size / (size - 2)): each frequency times stretch^(-2 pair / (size - 2)).
        let pairs = rotary.size / 2;
        let exponents = (0..pairs).map(|pair| (-2.0 * pair as f64 / (rotary.size as f64 - 2.0).max(1.0)) as f32).collect();
        let exponents = self.floats_f32(&float("exponents"), &[1, pairs], exponents);
        let frequencies = self.floats_f32(&float("frequencies"), &[1, pairs], rotary.rounded_frequencies());
        let powers = self.node("Pow", &float("frequencies"), &[&stretch, &exponents], vec![]);
        let frequencies = self.node("Mul", &float("frequencies"), &[&powers, &frequencies], vec![]);
        let axes = self.ints("axes_1_2", &[1, 2]);
        let frequencies = self.node("Unsqueeze", &float("frequencies"), &[&frequencies, &axes], vec![]);
        let positions = self.positions(longest);
        let positions = self.node("Unsqueeze", &float("positions"), &[&positions, &axes], vec![]);
        let angles = self.node("Mul", &float("angles"), &[&positions, &frequencies], vec![]);
        let (cosines, sines) = (float("cosines"), float("sines"));
        let cosine = self.node("Cos", &cosines, &[&angles], vec![]);
        let sine = self.node("Sin", &sines, &[&angles], vec![]);
        let negative = self.node("Neg", &sines, &[&sine], vec![]);
        let last = || vec![AttributeProto::int("axis", -1)];
        let cosine = self.node("Concat", &cosines, &[&cosine, &cosine], last());
        let sine = self.node("Concat", &sines, &[&negative, &sine], last());
        let (cosines, sines) = (self.as_float(&cosines, cosine), self.as_float(&sines, sine));
        Turns { cosines, sines, size: rotary.size }
    }

    /// `x` `[batch, sequence, heads, head_size]` turned: the first `size` values of each head, value i with value i + size / 2.
    pub fn rotated(&mut self, name: &str, x: &str, turns: &Turns, head_size: usize) -> String {
        let name = format!("{name}.rotary");
        let (size, half) = (turns.size as i64, turns.size as i64 / 2);
        let whole = turns.size == head_size;
        let turned = if whole { x.to_owned() } else { self.values_of_heads(&format!("{name}.turned"), x, 0, size) };
        let first = self.values_of_heads(&format!("{name}.first"), x, 0, half);
        let second = self.values_of_heads(&format!("{name}.second"), x, half, size);
        // x cos + [second, first] [-sin, sin].
        let last = || vec![AttributeProto::int("axis", 3)];
        let swapped = self.node("Concat", &format!("{name}.swapped"), &[&second, &first], last());
        let along = self.node("Mul", &format!("{name}.along"), &[&turned, &turns.cosines], vec![]);
        let across = self.node("Mul", &format!("{name}.across"), &[&swapped, &turns.sines], vec![]);
        let sum = self.node("Add", &name, &[&along, &across], vec![]);
        if whole {
            return sum;
        }
        let rest = self.values_of_heads(&format!("{name}.rest"), x, size, head_size as i64);
        self.node("Concat", &name, &[&sum, &rest], last())
    }

    /// Values `first` to `end` of each head.
    fn values_of_heads(&mut self, name: &str, x: &str, first: i64, end: i64) -> String {
        let [first, end] = [first, end].map(|at| self.ints(&format!("head.{at}"), &[at]));
        let axis = self.ints("axis_3", &[3]);
        self.node("Slice", name, &[x, &first, &end, &axis], vec![])
    }

    /// `bias` with the mask's value added wherever a key lies further than `reach` from its query.
    pub fn within_window(&mut self, reach: usize, longest: usize, bias: &str, masked: f32) -> String {
        let name = format!("window.{reach}");
        let distances = self.distances(longest);
        let reach = self.scalar_f32(&format!("{name}.reach"), reach as f32);
        let outside = self.node("Greater", &name, &[&distances, &reach], vec![]);
        let to_float = vec![AttributeProto::int("to", self.float as i64)];
        let outside = self.node("Cast", &name, &[&outside], to_float);
        let masked = self.scalar("window.masked", masked);
        let outside = self.node("Mul", &name, &[&outside, &masked], vec![]);
        self.node("Add", &name, &[bias, &outside], vec![])
    }

    /// `mask` less each head's slope times the distance.
    pub fn with_alibi(&mut self, alibi: Alibi, heads: usize, longest: usize, mask: &str) -> String {
        let name = "alibi";
        let slopes = alibi.slopes(heads).into_iter().map(|slope| -slope as f32).collect();
        let slopes = self.floats_f32("alibi.slopes", &[1, heads, 1, 1], slopes);
        let distances = self.distances(longest);
        let bias = self.node("Mul", name, &[&distances, &slopes], vec![]);
        let bias = self.as_float(name, bias);
        self.node("Add", name, &[&bias, mask], vec![])
    }

    /// How far each position is from each other one, f32 `[sequence, sequence]`.
    fn distances(&mut self, longest: usize) -> String {
        let name = "distances";
        if self.names.contains("distances.Abs") {
            return "distances.Abs".to_owned();
        }
        let positions = self.positions(longest);
        let axis = self.ints("axis_1", &[1]);
        let column = self.node("Unsqueeze", name, &[&positions, &axis], vec![]);
        let differences = self.node("Sub", name, &[&column, &positions], vec![]);
        self.node("Abs", name, &[&differences], vec![])
    }

    /// The positions of the batch, f32 `[sequence]`.
    fn positions(&mut self, longest: usize) -> String {
        let table = self.floats_f32("distances.positions", &[longest], (0..longest).map(|position| position as f32).collect());
        self.first_of_sequence("distances.positions", &table)
    }

    /// The first `sequence` rows of `table`, once.
    fn first_of_sequence(&mut self, name: &str, table: &str) -> String {
        let cut = format!("{name}.Slice");
        if self.names.contains(&cut) {
            return cut;
        }
        let length = self.sequence_length();
        let (start, axis) = (self.ints("zero", &[0]), self.ints("axis_0", &[0]));
        self.node("Slice", name, &[table, &start, &length, &axis], vec![])
    }

    /// `x`, which is f32, in the graph's own type.
    fn as_float(&mut self, name: &str, x: String) -> String {
        if self.float == ElementType::Float32 {
            return x;
        }
        let to = vec![AttributeProto::int("to", self.float as i64)];
        self.node("Cast", name, &[&x], to)
    }

    fn floats_f32(&mut self, name: &str, dims: &[usize], values: Vec<f32>) -> String {
        self.constant(name, dims, ElementType::Float32, Values::Floats(values))
    }

    fn scalar_f32(&mut self, name: &str, value: f32) -> String {
        self.floats_f32(name, &[], vec![value])
    }
}

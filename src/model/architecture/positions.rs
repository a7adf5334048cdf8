//! How positions enter an encoder, and the numbers that executors need for it.

use crate::model::TensorView;

/// A learnt row for each position, added to the token's own.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PositionTable {
    /// Name of its tensor without `.weight`.
    pub name: String,
    /// `[rows, hidden_size]`.
    pub rows: TensorView,
    /// The row of a text's first token: 0 for BERT, the padding id + 1 for MPNet and RoBERTa, which count from there.
    pub first: usize,
}

/// A learnt value for each head and each bucket of distances, added to the scores (T5, <https://arxiv.org/abs/1910.10683>; MPNet).
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RelativeBias {
    /// Name of its tensor without `.weight`.
    pub name: String,
    /// `[buckets, heads]`; at least 4 buckets, so that each direction has one of a single distance.
    pub table: TensorView,
    /// Distances from here on share the last bucket.
    pub max_distance: usize,
}

/// Rotation of the first `size` values of each head's queries and keys, value i with value i + size / 2, by the position times a
/// frequency (RoPE, <https://arxiv.org/abs/2104.09864>, in NeoX's order).
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Rotary {
    /// The frequencies' base (`rope_theta`).
    pub base: f64,
    /// How many values of a head are turned; even.
    pub size: usize,
    /// How frequencies are changed for longer texts.
    pub scaling: RotaryScaling,
}

/// How the frequencies of a [`Rotary`] are changed for texts that are longer than those of training.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum RotaryScaling {
    /// Not at all.
    None,
    /// By a fixed factor at every length (GTE's `ntk`).
    Ntk {
        /// `factor` of `rope_scaling`.
        factor: f64,
    },
    /// By the length of the text, where it is above what was trained (transformers' `dynamic`).
    DynamicNtk {
        /// `factor` of `rope_scaling`.
        factor: f64,
        /// The longest text of training.
        trained: usize,
    },
}

/// A slope for each head times the distance, subtracted from the scores (ALiBi, <https://arxiv.org/abs/2108.12409>).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Alibi;

impl PositionTable {
    /// Values of one row.
    pub fn width(&self) -> usize {
        self.rows.shape.last().copied().unwrap_or(0)
    }

    /// The most tokens that it serves.
    pub fn max_tokens(&self) -> usize {
        self.rows.shape.first().map_or(0, |rows| rows.saturating_sub(self.first))
    }

    /// The rows of a text's first `tokens` tokens (fewer where there are fewer), `[tokens, hidden_size]`.
    pub fn used_rows(&self, tokens: usize) -> Vec<f32> {
        let (begin, end) = (self.first, self.first + tokens.min(self.max_tokens()));
        let width = self.width();
        self.rows.to_f32().get(begin * width..end * width).unwrap_or_default().to_vec()
    }
}

impl RelativeBias {
    /// Rows of the table.
    pub fn buckets(&self) -> usize {
        self.table.shape.first().copied().unwrap_or(0)
    }

    /// Columns of the table.
    pub fn heads(&self) -> usize {
        self.table.shape.last().copied().unwrap_or(0)
    }

    /// The bucket of a key `distance` positions after the query. Half the buckets serve each direction; of these, half hold one
    /// distance each and the others grow with its logarithm. In f32, as the reference computes it
    /// (`MPNetEncoder.relative_position_bucket` of transformers).
    pub fn bucket(&self, distance: i64) -> usize {
        bucket(distance, self.buckets(), self.max_distance)
    }

    /// The bias by distance alone, `[heads, 2 tokens - 1]`: that of a key `i - (tokens - 1)` positions after its query at `i`. A query at
    /// position `q` sees the `tokens` values from `tokens - 1 - q` on.
    pub fn by_distance(&self, tokens: usize) -> Vec<f32> {
        let table = self.table.to_f32();
        let heads = self.heads();
        let distances = (2 * tokens).saturating_sub(1);
        let buckets: Vec<usize> = (0..distances).map(|i| self.bucket(i as i64 - (tokens as i64 - 1))).collect();
        (0..heads)
            .flat_map(|head| buckets.iter().map(move |bucket| (bucket, head)))
            .map(|(b, head)| table[b * heads + head])
            .collect()
    }

    /// The bias of every pair of positions, `[heads, tokens, tokens]`: a row for each query.
    pub fn table(&self, tokens: usize) -> Vec<f32> {
        let by_distance = self.by_distance(tokens);
        let mut bias = Vec::with_capacity(self.heads() * tokens * tokens);
        for by_distance in by_distance.chunks_exact((2 * tokens).saturating_sub(1).max(1)) {
            for query in 0..tokens {
                let first = tokens - 1 - query;
                bias.extend_from_slice(&by_distance[first..first + tokens]);
            }
        }
        bias
    }
}

fn bucket(distance: i64, buckets: usize, max_distance: usize) -> usize {
    let half = buckets / 2;
    let exact = half / 2;
    let direction = if distance > 0 { half } else { 0 };
    let distance = distance.unsigned_abs() as usize;
    if distance < exact {
        return direction + distance;
    }
    let ratio = (distance as f32 / exact as f32).ln() / (max_distance as f64 / exact as f64).ln() as f32;
    let logarithmic = exact + (ratio * (half - exact) as f32) as usize;
    direction + logarithmic.min(half - 1)
}

impl Rotary {
    /// The angle by which a position more turns each pair of values, `[size / 2]`, in a text of `tokens` tokens.
    pub fn frequencies(&self, tokens: usize) -> Vec<f64> {
        let size = self.size as f64;
        let (base, divisor) = match self.scaling {
            RotaryScaling::Ntk { factor } => (self.base * factor, factor.powf(2.0 / size)),
            RotaryScaling::DynamicNtk { factor, trained } if tokens > trained => {
                let stretch = factor * tokens as f64 / trained as f64 - (factor - 1.0);
                (self.base * stretch.powf(size / (size - 2.0)), 1.0)
            }
            RotaryScaling::None | RotaryScaling::DynamicNtk { .. } => (self.base, 1.0),
        };
        (0..self.size / 2).map(|pair| base.powf(-2.0 * pair as f64 / size) / divisor).collect()
    }
}

impl Rotary {
    /// The frequencies of texts no longer than those of training, rounded where the references round theirs: in f32 the power, then its
    /// inverse. At position 8,000 a bit of a frequency is a thousandth of a turn.
    pub fn rounded_frequencies(&self) -> Vec<f32> {
        self.frequencies(0).into_iter().map(|frequency| 1.0 / (1.0 / frequency) as f32).collect()
    }
}

impl Alibi {
    /// The slope of each head: a geometric series for a power of two; otherwise the series of the power below, then every other slope
    /// of the power above.
    pub fn slopes(self, heads: usize) -> Vec<f64> {
        let series = |heads: usize| (1..=heads).map(move |head| 2f64.powf(-8.0 * head as f64 / heads as f64));
        let power = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
        series(power).chain(series(2 * power).step_by(2)).take(heads).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// First distance of each bucket of 32 in either direction, read off transformers' `MPNetEncoder.relative_position_bucket`.
    #[test]
    fn buckets_begin_where_the_reference_begins_them() {
        let first = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91];
        for distance in 0..600i64 {
            let expected = first.iter().rposition(|&f| f <= distance).unwrap();
            assert_eq!(bucket(-distance, 32, 128), expected, "distance -{distance}");
            if distance > 0 {
                assert_eq!(bucket(distance, 32, 128), 16 + expected, "distance {distance}");
            }
        }
    }

    #[test]
    fn the_table_of_pairs_holds_the_bucket_of_every_distance() {
        let (buckets, heads, tokens) = (8, 3, 11);
        let values: Vec<f32> = (0..buckets * heads).map(|i| i as f32).collect();
        let name = "bias".to_owned();
        let bias = RelativeBias { name, table: TensorView::owned(vec![buckets, heads], values), max_distance: 16 };
        let table = bias.table(tokens);
        assert_eq!(table.len(), heads * tokens * tokens);
        for head in 0..heads {
            for query in 0..tokens {
                for key in 0..tokens {
                    let expected = bias.bucket(key as i64 - query as i64) * heads + head;
                    assert_eq!(table[(head * tokens + query) * tokens + key], expected as f32, "{head} {query} {key}");
                }
            }
        }
        assert!(bias.table(0).is_empty() && bias.by_distance(0).is_empty());
    }

    #[test]
    fn only_rows_that_a_text_can_use_are_taken() {
        let rows = TensorView::owned(vec![5, 2], (0..10).map(|i| i as f32).collect());
        let table = PositionTable { name: "positions".to_owned(), rows, first: 2 };
        assert_eq!((table.max_tokens(), table.width()), (3, 2));
        assert_eq!(table.used_rows(2), [4.0, 5.0, 6.0, 7.0]);
        assert_eq!(table.used_rows(9), [4.0, 5.0, 6.0, 7.0, 8.0, 9.0]);
        let beyond = PositionTable { first: 6, ..table };
        assert_eq!((beyond.max_tokens(), beyond.used_rows(1)), (0, vec![]));
    }

    /// The paper's series for 8 heads; for 12 the first four odd ones of 16 follow it, as its code does.
    #[test]
    fn slopes_are_those_of_the_paper() {
        let eight: Vec<f64> = (1..=8).map(|head| 0.5f64.powi(head)).collect();
        assert_eq!(Alibi.slopes(8), eight);
        let twelve: Vec<f64> = eight.into_iter().chain([0.5, 1.5, 2.5, 3.5].map(|power| 0.5f64.powf(power))).collect();
        assert_eq!(Alibi.slopes(12), twelve);
        assert_eq!(Alibi.slopes(1), [1.0 / 256.0]);
    }

    #[test]
    fn frequencies_fall_from_1_and_are_scaled_for_long_texts_alone() {
        let rotary = |scaling| Rotary { base: 10_000.0, size: 4, scaling };
        let close = |found: Vec<f64>, expected: [f64; 2]| {
            assert!(found.iter().zip(expected).all(|(a, b)| (a / b - 1.0).abs() < 1e-12), "{found:?}, expected {expected:?}");
        };
        close(rotary(RotaryScaling::None).frequencies(1 << 20), [1.0, 0.01]);
        // (10000 * 4)^-0.5 = 0.005; both divided by 4^(2/4) = 2.
        close(rotary(RotaryScaling::Ntk { factor: 4.0 }).frequencies(1), [0.5, 0.0025]);
        let dynamic = rotary(RotaryScaling::DynamicNtk { factor: 2.0, trained: 8 });
        close(dynamic.frequencies(8), [1.0, 0.01]);
        // (2 * 16 / 8 - 1)^(4/2) = 9 times the base, whose root is 3 times as large.
        close(dynamic.frequencies(16), [1.0, 0.01 / 3.0]);
    }
}

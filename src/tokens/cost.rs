//! What an executor's shapes cost, as measured: by this rows are cut into batches and a batch finds its shape.

use super::size::{BatchSize, SizeRange};

/// One size, or a range of sizes, that an executor runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ShapeCost {
    /// The sizes.
    pub range: SizeRange,
    /// Microseconds at the smallest.
    pub min_micros: f64,
    /// Microseconds at the largest.
    pub max_micros: f64,
}

/// The measured times of all sizes of an executor.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ShapeCosts {
    shapes: Vec<ShapeCost>,
    /// Row counts worth trying when rows are cut, ascending: those of the shapes, and powers of two between.
    row_counts: Vec<usize>,
}

impl ShapeCost {
    /// Microseconds of a batch of `size`, by the tokens that are run; `None` where it does not fit.
    fn micros(&self, size: BatchSize) -> Option<f64> {
        let tokens = |size: BatchSize| size.tokens as f64;
        let (least, most) = (tokens(self.range.min), tokens(self.range.max));
        let run = tokens(self.range.fit(size)?);
        let share = if most > least { (run - least) / (most - least) } else { 1.0 };
        Some(self.min_micros + share * (self.max_micros - self.min_micros))
    }
}

impl ShapeCosts {
    /// The table of `shapes`.
    pub fn new(shapes: Vec<ShapeCost>) -> Self {
        let most = shapes.iter().map(|shape| shape.range.max.rows).max().unwrap_or(0);
        let mut row_counts: Vec<usize> = shapes.iter().map(|shape| shape.range.max.rows).collect();
        row_counts.extend((0..usize::BITS).map(|bit| 1 << bit).take_while(|&rows| rows < most));
        row_counts.sort_unstable();
        row_counts.dedup();
        Self { shapes, row_counts }
    }

    /// The shapes.
    pub fn shapes(&self) -> &[ShapeCost] {
        &self.shapes
    }

    /// Row counts worth trying where rows are cut into batches, ascending.
    pub fn row_counts(&self) -> &[usize] {
        &self.row_counts
    }

    /// The place of the cheapest shape for a batch of `size`, and its microseconds; `None` where none holds it.
    pub fn cheapest(&self, size: BatchSize) -> Option<(usize, f64)> {
        let fitting = self.shapes.iter().enumerate().filter_map(|(place, shape)| Some((place, shape.micros(size)?)));
        fitting.min_by(|a, b| a.1.total_cmp(&b.1))
    }

    /// Cuts rows of these lengths (longest first) into consecutive batches of the least time in all, at most `max_rows` rows and
    /// `max_tokens` tokens each, those of padding included. Gives the number of rows of each batch. A row that no shape holds gets a batch
    /// of its own.
    pub(super) fn cut(&self, lengths: &[usize], max_rows: usize, max_tokens: usize) -> Vec<usize> {
        // tokens[i]: those of the rows before i.
        let mut tokens = Vec::with_capacity(lengths.len() + 1);
        tokens.push(0);
        tokens.extend(lengths.iter().scan(0, |sum, length| {
            *sum += length;
            Some(*sum)
        }));
        // best[i]: the least time of the rows from i on, and how many of them the first batch takes.
        let mut best = vec![(0.0, 0); lengths.len() + 1];
        for first in (0..lengths.len()).rev() {
            let longest = lengths[first].max(1);
            let left = lengths.len() - first;
            let most = left.min(max_rows.max(1)).min((max_tokens / longest).max(1));
            let smaller = self.row_counts.iter().copied().take_while(|&rows| rows < most);
            let micros = |rows: usize| {
                let size = BatchSize { rows, longest, tokens: tokens[first + rows] - tokens[first] };
                Some((self.cheapest(size)?.1 + best[first + rows].0, rows))
            };
            let fastest = smaller.chain([most]).filter_map(micros).min_by(|a, b| a.0.total_cmp(&b.0));
            best[first] = fastest.unwrap_or((best[first + 1].0, 1));
        }
        let mut batches = Vec::new();
        let mut first = 0;
        while first < lengths.len() {
            batches.push(best[first].1);
            first += best[first].1;
        }
        batches
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bucket(rows: usize, seq: usize, micros: f64) -> ShapeCost {
        ShapeCost { range: SizeRange::padded((rows, seq), (rows, seq)), min_micros: micros, max_micros: micros }
    }

    fn costs() -> ShapeCosts {
        let wide = ShapeCost { range: SizeRange::padded((1, 1), (16, 512)), min_micros: 600.0, max_micros: 5000.0 };
        ShapeCosts::new(vec![bucket(1, 32, 410.0), bucket(1, 128, 490.0), bucket(32, 128, 1900.0), wide])
    }

    #[test]
    fn the_cheapest_shape_that_holds_a_batch_is_taken() {
        let costs = costs();
        for (rows, seq, place) in [(1, 1, 0), (1, 32, 0), (1, 33, 1), (1, 129, 3), (2, 16, 3), (32, 128, 2), (17, 10, 2)] {
            assert_eq!(costs.cheapest(BatchSize::padded(rows, seq)).unwrap().0, place, "{rows}x{seq}");
        }
        assert_eq!(costs.cheapest(BatchSize::padded(33, 10)), None);
        assert_eq!(costs.cheapest(BatchSize::padded(1, 513)), None);
        // By tokens: 16x512 costs 5000, one row of one token 600, and 8x512 half way between.
        let half = costs.cheapest(BatchSize::padded(8, 512)).unwrap();
        assert!((half.1 - (600.0 + 4400.0 * 4095.0 / 8191.0)).abs() < 1e-9, "{half:?}");
    }

    #[test]
    fn rows_are_cut_where_it_costs_least() {
        let costs = costs();
        // Two short rows: two of 410 beat one of 32x128 (1900), but the dynamic shape at 2x20 is cheaper (about 620).
        assert_eq!(costs.cut(&[20, 20], usize::MAX, usize::MAX), [2]);
        // Forty rows of 100: 32x128 once and the rest by the dynamic shape.
        assert_eq!(costs.cut(&[100; 40], usize::MAX, usize::MAX), [8, 32]);
        assert_eq!(costs.cut(&[100; 40], 4, usize::MAX), [4; 10]);
        assert_eq!(costs.cut(&[100; 3], usize::MAX, 150), [1; 3]);
        // Too long for every shape: alone, for the executor to refuse.
        assert_eq!(costs.cut(&[1000, 20], usize::MAX, usize::MAX), [1, 1]);
        assert!(costs.cut(&[], usize::MAX, usize::MAX).is_empty());
    }

    #[test]
    fn packed_rows_are_cut_by_the_tokens_they_have() {
        use crate::tokens::Layout;
        let min = BatchSize::padded(1, 1);
        let max = BatchSize { rows: 64, longest: 512, tokens: 1024 };
        let range = SizeRange { layout: Layout::Packed, min, max };
        let costs = ShapeCosts::new(vec![ShapeCost { range, min_micros: 100.0, max_micros: 1123.0 }]);
        // One long row and many short ones are 600 tokens, run at once; as a rectangle they would be 10,000.
        let mut lengths = vec![500];
        lengths.resize(21, 5);
        assert_eq!(costs.cut(&lengths, usize::MAX, usize::MAX), [21]);
        assert_eq!(costs.cheapest(BatchSize { rows: 21, longest: 500, tokens: 600 }), Some((0, 100.0 + 599.0)));
    }

    proptest! {
        #[test]
        fn a_cut_is_never_dearer_than_one_row_at_a_time(mut lengths in prop::collection::vec(1usize..=512, 0..80)) {
            let costs = costs();
            lengths.sort_unstable_by(|a, b| b.cmp(a));
            let batches = costs.cut(&lengths, usize::MAX, usize::MAX);
            prop_assert_eq!(batches.iter().sum::<usize>(), lengths.len());
            let mut first = 0;
            let mut total = 0.0;
            for rows in batches {
                total += costs.cheapest(BatchSize::padded(rows, lengths[first])).unwrap().1;
                first += rows;
            }
            let single: f64 = lengths.iter().map(|&length| costs.cheapest(BatchSize::padded(1, length)).unwrap().1).sum();
            prop_assert!(total <= single + 1e-6);
        }
    }
}

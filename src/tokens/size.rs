//! How large batches are, and what of them executors run.

use std::fmt;

/// The size of a batch, or of what an executor runs for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BatchSize {
    /// Rows.
    pub rows: usize,
    /// Tokens of the longest row.
    pub longest: usize,
    /// Tokens in all; those of padding count where they are run.
    pub tokens: usize,
}

/// How an executor takes rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// As a rectangle: each row padded to the longest.
    Padded,
    /// Side by side, without padding between them.
    Packed,
}

/// The sizes that one way of running serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SizeRange {
    /// How it takes rows.
    pub layout: Layout,
    /// The smallest that is run; smaller ones are padded up to it.
    pub min: BatchSize,
    /// The largest.
    pub max: BatchSize,
}

impl BatchSize {
    /// A rectangle of `rows` rows of `longest` tokens.
    pub const fn padded(rows: usize, longest: usize) -> Self {
        Self { rows, longest, tokens: rows.saturating_mul(longest) }
    }
}

/// As `8x128`; with the tokens where they are fewer than those of the rectangle.
impl fmt::Display for BatchSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, longest, tokens } = *self;
        write!(f, "{rows}x{longest}")?;
        if *self == Self::padded(rows, longest) { Ok(()) } else { write!(f, " of {tokens} tokens") }
    }
}

impl SizeRange {
    /// Rectangles between these two, rows and tokens of a row.
    pub const fn padded(min: (usize, usize), max: (usize, usize)) -> Self {
        Self { layout: Layout::Padded, min: BatchSize::padded(min.0, min.1), max: BatchSize::padded(max.0, max.1) }
    }

    /// Whether it runs one size only, whose work can be captured once.
    pub fn is_fixed(&self) -> bool {
        self.min == self.max
    }

    /// What is run for a batch of `size`; `None` where it does not fit.
    pub fn fit(&self, size: BatchSize) -> Option<BatchSize> {
        let Self { layout, min, max } = self;
        let (rows, longest) = (size.rows.max(min.rows), size.longest.max(min.longest));
        let run = match layout {
            Layout::Padded => BatchSize::padded(rows, longest),
            Layout::Packed => BatchSize { rows, longest, tokens: size.tokens.max(min.tokens) },
        };
        (run.rows <= max.rows && run.longest <= max.longest && run.tokens <= max.tokens).then_some(run)
    }
}

impl fmt::Display for SizeRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_fixed() { self.max.fmt(f) } else { write!(f, "{}:{}", self.min, self.max) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_padded_up_to_what_a_range_serves() {
        let size = BatchSize::padded;
        let bucket = SizeRange::padded((4, 16), (4, 16));
        assert!(bucket.is_fixed());
        assert_eq!(bucket.fit(size(1, 3)), Some(size(4, 16)));
        assert_eq!(bucket.fit(size(4, 16)), Some(size(4, 16)));
        assert_eq!((bucket.fit(size(5, 3)), bucket.fit(size(1, 17))), (None, None));
        let wide = SizeRange::padded((2, 8), (16, 512));
        assert!(!wide.is_fixed());
        assert_eq!(wide.fit(size(1, 100)), Some(size(2, 100)));
        assert_eq!(wide.fit(size(3, 5)), Some(size(3, 8)));
        assert_eq!([bucket.to_string(), wide.to_string()], ["4x16", "2x8:16x512"]);
        // What the batch leaves of its rectangle is run all the same.
        assert_eq!(wide.fit(BatchSize { rows: 3, longest: 100, tokens: 120 }), Some(size(3, 100)));
    }

    #[test]
    fn packed_rows_are_served_by_their_tokens() {
        let most = BatchSize { rows: 64, longest: 512, tokens: 1024 };
        let any = SizeRange { layout: Layout::Packed, min: BatchSize::padded(1, 1), max: most };
        let ragged = BatchSize { rows: 3, longest: 500, tokens: 520 };
        assert_eq!(any.fit(ragged), Some(ragged));
        assert_eq!(any.fit(BatchSize { tokens: 1025, ..ragged }), None);
        assert_eq!(any.fit(BatchSize { longest: 513, ..ragged }), None);
        assert_eq!(any.fit(BatchSize { rows: 65, ..ragged }), None);
        let class = SizeRange { min: most, ..any };
        assert!(class.is_fixed());
        assert_eq!(class.fit(ragged), Some(most));
        assert_eq!(ragged.to_string(), "3x500 of 520 tokens");
    }
}

//! Where intermediate results lie: pieces of one block of device memory, some of which are of no use while others are.

use super::shape::{CHUNK, Shape};
use std::ops::Range;

/// Tokens are rounded up to this many: tiles of all kernels end there.
pub(super) const TOKEN_TILE: usize = 128;
/// Where each piece begins.
const ALIGNMENT: usize = 1024;

/// Bytes of each piece, for some number of tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Scratch {
    /// The residual stream.
    pub stream: Range<usize>,
    /// Two f32 a token.
    pub statistics: Range<usize>,
    pub qkv: Range<usize>,
    pub context: Range<usize>,
    /// What attention gives, before a norm of its own; it lies where queries were.
    pub attended: Range<usize>,
    /// Gate and value of a gated feed-forward part; it lies where queries, keys, values and context were. Empty without a gate.
    pub expanded: Range<usize>,
    /// The wide half, behind that; it lies where queries, keys, values and context were.
    pub wide: Range<usize>,
    /// Sums of the stream's chunks, two f32 a chunk and token.
    pub partials: Range<usize>,
    /// Attention's list of work.
    pub work: Range<usize>,
    /// The first stage that found a value which is not finite, one i32; at the beginning, whatever the number of tokens.
    pub fault: Range<usize>,
    /// All of it.
    pub bytes: usize,
}

/// `tokens` rounded up to whole tiles.
pub(super) fn capacity(tokens: usize) -> usize {
    tokens.max(1).next_multiple_of(TOKEN_TILE)
}

impl Scratch {
    /// For `tokens` tokens; `work` bytes for attention's list.
    pub fn of(shape: &Shape, tokens: usize, work: usize) -> Self {
        let tokens = capacity(tokens);
        let matrix = |columns: usize| tokens * columns * shape.precision.bytes();
        let mut end = 0;
        let mut piece = |bytes: usize| {
            let begin = end;
            end = (begin + bytes).next_multiple_of(ALIGNMENT);
            begin..begin + bytes
        };
        // At the same place for every number of tokens.
        let fault = piece(4);
        let stream = piece(matrix(shape.hidden));
        let statistics = piece(tokens * 8);
        let partials = piece(tokens * shape.hidden.div_ceil(CHUNK) * 8);
        let work = piece(work);
        let qkv = piece(matrix(shape.qkv()));
        let context = piece(matrix(shape.hidden));
        let attended = qkv.start..qkv.start + matrix(shape.hidden);
        let expanded = qkv.start..qkv.start + if shape.gated { matrix(shape.expanded()) } else { 0 };
        let begin = expanded.end.next_multiple_of(ALIGNMENT);
        let wide = begin..begin + matrix(shape.wide);
        let bytes = context.end.max(wide.end).next_multiple_of(ALIGNMENT);
        Self { stream, statistics, qkv, context, attended, expanded, wide, partials, work, fault, bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::native::shape::Precision;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_in_use_at_once_do_not_overlap(
            tokens in 0usize..40_000, chunks in 1usize..20, wide in 1usize..80, work in 0usize..100_000, exact: bool, gated: bool,
        ) {
            let precision = if exact { Precision::Fp32 } else { Precision::Fp16 };
            let shape = Shape { gated, ..Shape::as_bert(chunks * 64, chunks, wide * 64, precision) };
            let scratch = Scratch::of(&shape, tokens, work);
            let Scratch { stream, statistics, qkv, context, attended, expanded, wide, partials, work, fault, bytes } = scratch;
            let always = [&stream, &statistics, &partials, &work, &fault];
            for together in [[&qkv, &context], [&attended, &context], [&expanded, &wide]] {
                let mut pieces: Vec<_> = always.iter().copied().chain(together).collect();
                pieces.sort_by_key(|piece| piece.start);
                prop_assert!(pieces.windows(2).all(|pair| pair[0].end <= pair[1].start), "{pieces:?}");
                prop_assert!(pieces.iter().all(|piece| piece.start.is_multiple_of(1024) && piece.end <= bytes));
            }
            prop_assert_eq!(expanded.len(), if gated { 2 * wide.len() } else { 0 });
            prop_assert_eq!(fault, 0..4);
            prop_assert!(capacity(tokens) >= tokens && capacity(tokens).is_multiple_of(128));
            prop_assert_eq!(stream.len(), capacity(tokens) * shape.hidden * precision.bytes());
        }
    }
}

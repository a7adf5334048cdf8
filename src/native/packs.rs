//! How large packs are where memory is short.

use crate::tokens::{BatchSize, SizeRange};

/// Tokens of the smallest pack, unless one text has more: smaller ones would save little beside the weights.
const LEAST_TOKENS: usize = 512;

/// `ranges`, the last of which is that of packs, with packs of half as many tokens and rows, though no less than the longest text needs; `None` where
/// they are that small.
pub(super) fn smaller(ranges: &[SizeRange]) -> Option<Vec<SizeRange>> {
    let (pack, classes) = ranges.split_last()?;
    let BatchSize { rows, longest, tokens } = pack.max;
    let least = LEAST_TOKENS.max(longest);
    if tokens <= least {
        return None;
    }
    let fewer = (tokens / 2).max(least);
    // As many rows as before for each token.
    let max = BatchSize { rows: (rows * fewer / tokens).max(1), longest, tokens: fewer };
    Some(classes.iter().copied().chain([SizeRange { max, ..*pack }]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokens::Layout;
    use proptest::prelude::*;

    fn ranges(longest: usize, tokens: usize) -> Vec<SizeRange> {
        let one = BatchSize { rows: 1, longest: longest.min(16), tokens: 16 };
        let class = SizeRange { layout: Layout::Packed, min: one, max: one };
        let most = BatchSize { rows: tokens / 4, longest, tokens };
        vec![class, SizeRange { layout: Layout::Packed, min: BatchSize::padded(1, 1), max: most }]
    }

    #[test]
    fn packs_are_halved_down_to_512_tokens() {
        let mut sizes = Vec::new();
        let mut next = Some(ranges(384, 16_384));
        while let Some(ranges) = next {
            sizes.push((ranges[1].max.tokens, ranges[1].max.rows));
            next = smaller(&ranges);
        }
        assert_eq!(sizes, [(16_384, 4096), (8192, 2048), (4096, 1024), (2048, 512), (1024, 256), (512, 128)]);
        assert_eq!(smaller(&[]), None);
    }

    proptest! {
        /// Whatever the model, and whatever memory there is.
        #[test]
        fn they_get_smaller_to_the_end_and_hold_the_longest_text(longest in 1usize..20_000, room in 0usize..40_000) {
            let first = ranges(longest, 16_384.max(longest));
            let mut packs = vec![first.clone()];
            while let Some(next) = smaller(packs.last().unwrap()) {
                packs.push(next);
            }
            prop_assert!(packs.len() <= 6);
            for pair in packs.windows(2) {
                let (before, after) = (pair[0][1].max, pair[1][1].max);
                prop_assert!(after.tokens < before.tokens && after.tokens * 2 >= before.tokens && after.rows <= before.rows);
            }
            for ranges in &packs {
                prop_assert_eq!(&ranges[0], &first[0]);
                let SizeRange { layout, min, max } = ranges[1];
                prop_assert_eq!((layout, min, max.longest), (Layout::Packed, first[1].min, longest));
                prop_assert!(max.rows >= 1 && ranges[1].fit(BatchSize::padded(1, longest)).is_some());
            }
            let last = packs.last().unwrap()[1].max.tokens;
            prop_assert_eq!(last, 512.max(longest).min(first[1].max.tokens));
            // The first that fits is at least half of the room that there is, but for the largest.
            if let Some(taken) = packs.iter().map(|ranges| ranges[1].max.tokens).find(|&tokens| tokens <= room) {
                prop_assert!(taken * 2 > room || taken == packs[0][1].max.tokens);
            }
        }
    }
}

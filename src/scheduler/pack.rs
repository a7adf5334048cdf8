//! Which of the rows that wait go together in a batch, by what batches cost: pure functions.

use crate::tokens::{BatchPlan, BatchSize};
use std::ops::Range;

/// What a batch is taken to cost beside the tokens that it runs, in tokens, on an executor without measured times: joining rows pays where it
/// pads less than this. Assumed, not measured; it is little, for batches of 256 and of 512 tokens run equally fast on the CPU
/// (benches/RESULTS.md).
const OVERHEAD: f64 = 8.0;
/// Part of the best throughput that a bounded batch must reach.
const ECONOMICAL: f64 = 0.95;
/// Points of a range of shapes that are looked at.
const STEPS: usize = 64;

/// What bounds a batch of several rows beside the executor's own limits. A single row may always run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Budget {
    /// Tokens, those of padding in a rectangle included.
    pub tokens: usize,
    /// Cost, as [`cost`] gives it.
    pub cost: f64,
}

/// What a batch costs: microseconds where they were measured, else tokens of the rectangle and what a batch takes beside them. `None` where the
/// executor cannot run it.
pub(super) fn cost(plan: &BatchPlan, size: BatchSize) -> Option<f64> {
    match &plan.costs {
        Some(costs) => costs.cheapest(size).map(|(_, micros)| micros),
        None => Some(BatchSize::padded(size.rows, size.longest).tokens as f64 + OVERHEAD),
    }
}

/// Which rows of these lengths, longest first and at least one, run together with row `lead`: of the groups of neighbours that are tried, the one
/// that saves most beside its rows one by one. So a batch grows while that pays.
pub(super) fn choose(plan: &BatchPlan, lengths: &[usize], lead: usize, budget: Budget) -> Range<usize> {
    let alone = |length: usize| cost(plan, BatchSize::padded(1, length.max(1)));
    // Up to each row: the tokens, and the cost one by one. Rows that the executor cannot run save nothing.
    let (mut tokens, mut singly) = (vec![0], vec![0.0]);
    let mut last = (usize::MAX, None);
    for &length in lengths {
        if length != last.0 {
            last = (length, alone(length));
        }
        tokens.push(tokens[tokens.len() - 1] + length);
        singly.push(singly[singly.len() - 1] + last.1.unwrap_or(0.0));
    }
    let mut best = (0.0, lead..lead + 1);
    // Longer rows than the lead make the batch wider: few, then many.
    let above = (0..usize::BITS).map(|bit| 1 << bit).take_while(|&rows| rows < lead).chain([lead]);
    for first in [0].into_iter().chain(above).map(|above| lead - above) {
        let longest = lengths[first].max(1);
        let most = (lengths.len() - first).min(plan.max_batch).min(budget.tokens.min(plan.batch_tokens) / longest);
        let least = lead + 1 - first;
        let counts: &mut dyn Iterator<Item = usize> = match &plan.costs {
            Some(costs) => &mut costs.row_counts().iter().copied().filter(|&rows| rows < most).chain([most]),
            None => &mut (least..=most),
        };
        for rows in counts.filter(|rows| (least.max(2)..=most).contains(rows)) {
            let end = first + rows;
            let size = BatchSize { rows, longest, tokens: tokens[end] - tokens[first] };
            let Some(together) = cost(plan, size).filter(|&cost| cost <= budget.cost) else { continue };
            let saved = singly[end] - singly[first] - together;
            if saved > best.0 || (saved == best.0 && rows > best.1.len()) {
                best = (saved, first..end);
            }
        }
    }
    best.1
}

/// The least cost of a batch that reaches nearly the executor's best throughput, so that bounding batches by it loses little. Infinite where
/// nothing was measured: the limits of such an executor are small.
pub(super) fn economical(plan: &BatchPlan) -> f64 {
    let Some(costs) = &plan.costs else { return f64::INFINITY };
    let points = costs.shapes().iter().flat_map(|shape| {
        (0..=STEPS).map(move |step| {
            let (share, range) = (step as f64 / STEPS as f64, shape.range);
            let between = |least: f64, most: f64| least + share * (most - least);
            (between(range.min.tokens as f64, range.max.tokens as f64), between(shape.min_micros, shape.max_micros))
        })
    });
    let rate = |(tokens, micros): (f64, f64)| tokens / micros.max(f64::MIN_POSITIVE);
    let best = points.clone().map(rate).fold(0.0, f64::max);
    points.filter(|&point| rate(point) >= ECONOMICAL * best).map(|(_, micros)| micros).fold(f64::INFINITY, f64::min)
}

//! Which of the rows that wait go together in a batch, by what batches cost: pure functions.

use crate::tokens::{BATCH_OVERHEAD, BatchPlan, BatchSize};
use std::ops::Range;

/// Part of the best throughput that a bounded batch must reach.
const ECONOMICAL: f64 = 0.96;
/// Points of a range of shapes that are looked at.
const STEPS: usize = 64;

/// What bounds a batch of several rows beside the executor's own limits. A single row may always run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Budget {
    /// Tokens, those of padding in a rectangle included.
    pub tokens: usize,
    /// Cost, as [`BatchPlan::cost`] gives it.
    pub cost: f64,
}

/// Which rows of these lengths, longest first and at least one, run together with row `lead`: of the groups of neighbours that are tried and cost no
/// more than their rows one by one, the one that costs least a token. What saves most would take too many: also rows that fit others better, which wait too.
pub(super) fn choose(plan: &BatchPlan, lengths: &[usize], lead: usize, budget: Budget) -> Range<usize> {
    let alone = |length: usize| plan.cost(BatchSize::padded(1, length.max(1)));
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
    let a_token = |cost: f64, rows: &Range<usize>| cost / (tokens[rows.end] - tokens[rows.start]).max(1) as f64;
    let single = lead..lead + 1;
    let mut best = (a_token(singly[lead + 1] - singly[lead], &single), single);
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
            let pays = |&together: &f64| together <= budget.cost && together <= singly[end] - singly[first];
            let Some(together) = plan.cost(size).filter(pays) else { continue };
            let rate = a_token(together, &(first..end));
            if rate < best.0 || (rate == best.0 && rows > best.1.len()) {
                best = (rate, first..end);
            }
        }
    }
    best.1
}

/// The least cost of a batch that reaches nearly the executor's best throughput, so that bounding batches by it loses little.
pub(super) fn economical(plan: &BatchPlan) -> f64 {
    // Without measured times the rest of a batch's cost is its tokens.
    let Some(costs) = &plan.costs else { return BATCH_OVERHEAD / (1.0 - ECONOMICAL) };
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

//! Batches: rows of ids sorted by length and cut into groups of similar cost.

use super::cost::ShapeCosts;
use super::size::BatchSize;
use crate::{Error, Result};
use std::cmp::Reverse;
use std::ops::Range;
use std::sync::Arc;

/// Rows of token ids side by side, without padding, and where each row belongs. A rectangle is what some executors make of it.
///
/// Whole by construction: rows begin where the one before ends, the last ends with the ids, and no id is negative. Whether the ids are in an
/// executor's embedding table is checked there, at every call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBatch {
    ids: Vec<i32>,
    /// Where each row begins, and where the last one ends; empty without rows, so that an empty batch has no memory.
    starts: Vec<u32>,
    rows: Vec<usize>,
    skip: u32,
    longest: usize,
    /// Every id is below this.
    ids_end: usize,
}

impl TokenBatch {
    /// Takes rows that lie side by side, in the caller's order: row r of `ids` `[tokens]` goes from `starts[r]` to `starts[r + 1]`, so that
    /// there is one start more than rows. See [`TokenBatch::skip`].
    ///
    /// # Errors
    /// [`Error::TokenBatch`] where the starts do not cut `ids` into rows, and for a negative id.
    pub fn from_ragged(ids: Vec<i32>, mut starts: Vec<u32>, skip: u32) -> Result<Self> {
        let refused = |reason: String| Err(Error::TokenBatch { reason });
        if starts.first() != Some(&0) {
            return refused(format!("the first row starts at {:?}, not at 0", starts.first()));
        }
        if let Some(row) = starts.windows(2).position(|pair| pair[0] > pair[1]) {
            return refused(format!("row {row} starts at {} and ends at {}", starts[row], starts[row + 1]));
        }
        let end = starts.last().map_or(0, |&end| end as usize);
        if end != ids.len() {
            return refused(format!("the last row ends at {end}, there are {} ids", ids.len()));
        }
        if let Some(place) = ids.iter().position(|&id| id < 0) {
            let row = starts.partition_point(|&start| start as usize <= place) - 1;
            return refused(format!("id {} in row {row} is negative", ids[place]));
        }
        let longest = starts.windows(2).map(|pair| (pair[1] - pair[0]) as usize).max().unwrap_or(0);
        let ids_end = ids.iter().max().map_or(0, |&id| id as usize + 1);
        let rows = (0..starts.len() - 1).collect();
        if starts.len() == 1 {
            starts.clear();
        }
        Ok(Self { ids, starts, rows, skip, longest, ids_end })
    }

    /// Takes the rows of a rectangle in the caller's order: `ids` `[batch, seq]`, row-major, of which each row's first `lengths` `[batch]`
    /// are real tokens. What stands behind them is not looked at. See [`TokenBatch::skip`].
    ///
    /// # Errors
    /// [`Error::TokenBatch`] where the parts do not belong together, and for a negative id among the real tokens.
    pub fn from_padded(ids: &[i32], lengths: &[u32], seq: usize, skip: u32) -> Result<Self> {
        let rows = lengths.len();
        if rows.checked_mul(seq) != Some(ids.len()) {
            return Err(Error::TokenBatch { reason: format!("{} ids are not {rows} rows of {seq}", ids.len()) });
        }
        if let Some(row) = lengths.iter().position(|&length| length as usize > seq) {
            return Err(Error::TokenBatch { reason: format!("row {row} has {} tokens in rows of {seq}", lengths[row]) });
        }
        let (mut real, mut starts) = (Vec::with_capacity(ids.len()), vec![0]);
        for (row, &length) in lengths.iter().enumerate() {
            real.extend_from_slice(&ids[row * seq..][..length as usize]);
            starts.push(token_count(real.len())?);
        }
        Self::from_ragged(real, starts, skip)
    }

    /// Takes `rows` as one batch in the caller's order, in the memory that the batch has already.
    ///
    /// # Errors
    /// [`Error::TokenId`] for an id that is not below `vocab_size` (or not an `i32`), [`Error::TokenBatch`] for 2^32 tokens; the batch then
    /// has no rows.
    pub fn refill(&mut self, rows: &[impl AsRef<[u32]>], vocab_size: usize, skip: u32) -> Result<()> {
        self.clear();
        self.skip = skip;
        let filled = rows.iter().enumerate().try_for_each(|(place, row)| self.push(row.as_ref(), place, vocab_size));
        if filled.is_err() {
            self.clear();
        }
        filled
    }

    /// Adds a row.
    fn push(&mut self, row: &[u32], place: usize, vocab_size: usize) -> Result<()> {
        for &id in row {
            self.ids.push(id_as_i32(id, place, vocab_size)?);
            self.ids_end = self.ids_end.max(id as usize + 1);
        }
        if self.starts.is_empty() {
            self.starts.push(0);
        }
        self.starts.push(token_count(self.ids.len())?);
        self.longest = self.longest.max(row.len());
        self.rows.push(place);
        Ok(())
    }

    fn clear(&mut self) {
        self.ids.clear();
        self.starts.clear();
        self.rows.clear();
        (self.skip, self.longest, self.ids_end) = (0, 0, 0);
    }

    /// Number of rows.
    pub fn batch(&self) -> usize {
        self.rows.len()
    }

    /// Tokens of the longest row, at least 1: how wide a rectangle of the rows is.
    pub fn longest(&self) -> usize {
        self.longest.max(1)
    }

    /// Rows, tokens of the longest one, and tokens in all.
    pub fn size(&self) -> BatchSize {
        BatchSize { rows: self.batch(), longest: self.longest(), tokens: self.ids.len() }
    }

    /// The ids of all rows side by side, `[tokens]`.
    pub fn ids(&self) -> &[i32] {
        &self.ids
    }

    /// Where each row begins in [`TokenBatch::ids`], and where the last one ends, `[batch + 1]`.
    pub fn starts(&self) -> &[u32] {
        if self.starts.is_empty() { &[0] } else { &self.starts }
    }

    /// The ids of row `row`; none for a row that there is not.
    pub fn row(&self, row: usize) -> &[i32] {
        match self.starts.get(row..row.saturating_add(2)) {
            Some(&[start, end]) => &self.ids[start as usize..end as usize],
            _ => &[],
        }
    }

    /// Tokens of each row, `[batch]`. A row without tokens has a vector of zeros.
    pub fn lengths(&self) -> impl ExactSizeIterator<Item = u32> + '_ {
        self.starts.windows(2).map(|pair| pair[1] - pair[0])
    }

    /// Place of each row in the caller's order, `[batch]`.
    pub fn rows(&self) -> &[usize] {
        &self.rows
    }

    /// Leading tokens that pooling leaves out (the prompt's, when the model says `include_prompt: false`), else 0. A row that has no
    /// others counts as one without tokens.
    pub fn skip(&self) -> u32 {
        self.skip
    }

    /// The rows as a rectangle `[batch, longest]`, row-major: ids with `pad` behind each row's tokens, and the attention mask, 1 at tokens
    /// and 0 at padding.
    pub fn padded(&self, pad: i32) -> (Vec<i32>, Vec<i32>) {
        let cells = self.batch() * self.longest();
        let (mut ids, mut mask) = (Vec::with_capacity(cells), Vec::with_capacity(cells));
        for row in 0..self.batch() {
            let (tokens, end) = (self.row(row), ids.len() + self.longest());
            ids.extend_from_slice(tokens);
            mask.resize(ids.len(), 1);
            ids.resize(end, pad);
            mask.resize(end, 0);
        }
        (ids, mask)
    }

    /// Checks that every id is in an embedding table of `vocab_size` rows.
    ///
    /// # Errors
    /// [`Error::TokenId`] for the first that is not.
    pub fn check_ids(&self, vocab_size: usize) -> Result<()> {
        if self.ids_end <= vocab_size {
            return Ok(());
        }
        let Some(place) = self.ids.iter().position(|&id| id as usize >= vocab_size) else { return Ok(()) };
        let row = self.starts.partition_point(|&start| start as usize <= place) - 1;
        Err(Error::TokenId { id: self.ids[place].unsigned_abs(), text: self.rows.get(row).copied().unwrap_or(row), vocab_size })
    }
}

impl Default for TokenBatch {
    /// No rows.
    fn default() -> Self {
        Self { ids: Vec::new(), starts: Vec::new(), rows: Vec::new(), skip: 0, longest: 0, ids_end: 0 }
    }
}

/// What a batch is taken to cost beside the tokens that it runs, in tokens, on an executor without measured times: what reading the weights once takes
/// beside multiplying with them, which is alike for models of any size (benches/RESULTS.md).
pub const BATCH_OVERHEAD: f64 = 10.0;

/// How large batches may be and how many run at once; usually an executor's [`Limits`](crate::executor::Limits).
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct BatchPlan {
    /// Most rows of one batch (0 counts as 1).
    pub max_batch: usize,
    /// Most tokens of one batch, padding included. A row longer than this gets a batch of its own.
    pub batch_tokens: usize,
    /// Batches that run at once (0 counts as 1): work is cut so that each worker gets a similar share.
    pub parallelism: usize,
    /// Measured times of the executor's shapes. Where they are known, rows are cut so that all batches together cost least.
    pub costs: Option<Arc<ShapeCosts>>,
}

impl BatchPlan {
    /// At most `max_batch` rows and `batch_tokens` padded tokens a batch, for `parallelism` workers.
    pub fn new(max_batch: usize, batch_tokens: usize, parallelism: usize) -> Self {
        Self { max_batch, batch_tokens, parallelism, costs: None }
    }

    /// What a batch costs the executor: microseconds where they were measured, else tokens of the rectangle and [`BATCH_OVERHEAD`]. `None` where no
    /// measured shape holds it.
    pub fn cost(&self, size: BatchSize) -> Option<f64> {
        match &self.costs {
            Some(costs) => costs.cheapest(size).map(|(_, micros)| micros),
            None => Some(BatchSize::padded(size.rows, size.longest).tokens as f64 + BATCH_OVERHEAD),
        }
    }

    /// Tokens that the executor runs for a batch, those of padding included: at the cheapest measured shape, else as a rectangle.
    pub fn run_tokens(&self, size: BatchSize) -> usize {
        let shape = self.costs.as_ref().and_then(|costs| costs.shapes().get(costs.cheapest(size)?.0)?.range.fit(size));
        shape.unwrap_or(BatchSize::padded(size.rows, size.longest)).tokens
    }

    /// Cuts rows of these lengths (longest first) into consecutive ranges.
    ///
    /// By [`BatchPlan::costs`] where there are any. Otherwise batches are filled to the limits, which needs the fewest of them. When the last round of batches would leave workers idle, the
    /// rows are cut again into a whole number of rounds, at the smallest token budget that allows it: the costliest batch, which the
    /// caller waits for, is then as small as it can be.
    fn cut(&self, lengths: &[usize]) -> Vec<Range<usize>> {
        let Some(&longest) = lengths.first() else { return Vec::new() };
        if let Some(costs) = &self.costs {
            let mut end = 0;
            let range = |rows: usize| {
                let start = end;
                end += rows;
                start..end
            };
            return costs.cut(lengths, self.max_batch, self.batch_tokens).into_iter().map(range).collect();
        }
        let workers = self.parallelism.max(1);
        let filled = self.fill(lengths, self.batch_tokens).count();
        let target = filled.div_ceil(workers).saturating_mul(workers).min(lengths.len());
        let mut budget = self.batch_tokens.min(longest.max(1).saturating_mul(lengths.len()));
        if target > filled {
            // fill() never needs more batches when the budget grows, so the smallest budget can be found by bisection.
            let mut low = longest.max(1).min(budget);
            while low < budget {
                let middle = low + (budget - low) / 2;
                if self.fill(lengths, middle).count() <= target {
                    budget = middle;
                } else {
                    low = middle + 1;
                }
            }
        }
        self.fill(lengths, budget).collect()
    }

    /// Fills each batch up to `budget` padded tokens and the row limit.
    fn fill<'a>(&self, lengths: &'a [usize], budget: usize) -> impl Iterator<Item = Range<usize>> + use<'a> {
        let max_batch = self.max_batch.max(1);
        let mut start = 0;
        std::iter::from_fn(move || {
            let seq = (*lengths.get(start)?).max(1);
            let end = lengths.len().min(start.saturating_add((budget / seq).clamp(1, max_batch)));
            let range = start..end;
            start = end;
            Some(range)
        })
    }
}

/// Sorts rows of ids by length (longest first, equal ones in the caller's order) and cuts them into batches as `plan` says.
///
/// Every row lands in exactly one batch; [`TokenBatch::rows`] gives its place in `rows`. `skip` is passed on
/// (see [`TokenBatch::skip`]). No rows give no batches.
///
/// # Errors
/// [`Error::TokenId`] for an id that is not below `vocab_size` (or not an `i32`).
pub fn batches_from_ids(rows: &[impl AsRef<[u32]>], vocab_size: usize, skip: u32, plan: &BatchPlan) -> Result<Vec<TokenBatch>> {
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|&row| Reverse(rows[row].as_ref().len()));
    let lengths: Vec<usize> = order.iter().map(|&row| rows[row].as_ref().len()).collect();
    plan.cut(&lengths)
        .into_iter()
        .map(|range| {
            let mut batch = TokenBatch {
                ids: Vec::with_capacity(lengths[range.clone()].iter().sum()),
                starts: Vec::with_capacity(range.len() + 1),
                rows: Vec::with_capacity(range.len()),
                skip,
                longest: 0,
                ids_end: 0,
            };
            for &row in &order[range] {
                batch.push(rows[row].as_ref(), row, vocab_size)?;
            }
            Ok(batch)
        })
        .collect()
}

fn token_count(tokens: usize) -> Result<u32> {
    u32::try_from(tokens).map_err(|_| Error::TokenBatch { reason: format!("{tokens} tokens; a batch has fewer than 2^32") })
}

fn id_as_i32(id: u32, text: usize, vocab_size: usize) -> Result<i32> {
    i32::try_from(id).ok().filter(|_| (id as usize) < vocab_size).ok_or(Error::TokenId { id, text, vocab_size })
}

//! Batches: rows of ids sorted by length and cut into padded rectangles of similar cost.

use super::cost::ShapeCosts;
use crate::{Error, Result};
use std::cmp::Reverse;
use std::ops::Range;
use std::sync::Arc;

/// A rectangle of token ids, padded on the right, and where each row belongs.
///
/// Whole by construction: there are `batch * seq` ids, none of them negative, and no row has more tokens than it is wide. Whether the ids
/// are in an executor's embedding table is checked there, at every call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBatch {
    ids: Vec<i32>,
    lengths: Vec<u32>,
    seq: usize,
    rows: Vec<usize>,
    skip: u32,
    /// Every id, padding's included, is below this.
    ids_end: usize,
}

impl TokenBatch {
    /// Takes a rectangle that is padded already, its rows in the caller's order: `ids` `[batch, seq]`, row-major, of which each row's
    /// first `lengths` `[batch]` are real tokens. See [`TokenBatch::skip`].
    ///
    /// # Errors
    /// [`Error::TokenBatch`] where the parts do not belong together, for a negative id, and for `seq` 0.
    pub fn from_padded(ids: Vec<i32>, lengths: Vec<u32>, seq: usize, skip: u32) -> Result<Self> {
        let refused = |reason: String| Err(Error::TokenBatch { reason });
        let rows = lengths.len();
        if seq == 0 {
            return refused("rows are 0 tokens wide; the least is 1, for texts without tokens too".into());
        }
        if rows.checked_mul(seq) != Some(ids.len()) {
            return refused(format!("{} ids are not {rows} rows of {seq}", ids.len()));
        }
        if let Some(row) = lengths.iter().position(|&length| length as usize > seq) {
            return refused(format!("row {row} has {} tokens in rows of {seq}", lengths[row]));
        }
        if let Some(place) = ids.iter().position(|&id| id < 0) {
            return refused(format!("id {} in row {} is negative", ids[place], place / seq));
        }
        let ids_end = ids.iter().max().map_or(0, |&id| id as usize + 1);
        Ok(Self { ids, lengths, seq, rows: (0..rows).collect(), skip, ids_end })
    }

    /// Takes `rows` as one batch in the caller's order, in the memory that the batch has already.
    ///
    /// # Errors
    /// [`Error::TokenId`] for an id that is not below `vocab_size` (or not an `i32`); the batch then has no rows.
    pub fn refill(&mut self, rows: &[impl AsRef<[u32]>], pad_token_id: u32, vocab_size: usize, skip: u32) -> Result<()> {
        self.clear();
        self.seq = rows.iter().map(|row| row.as_ref().len()).max().unwrap_or(0).max(1);
        self.skip = skip;
        let filled = id_as_i32(pad_token_id, 0, vocab_size)
            .and_then(|pad| rows.iter().enumerate().try_for_each(|(place, row)| self.push(row.as_ref(), place, pad, vocab_size)));
        if filled.is_err() {
            self.clear();
        }
        filled
    }

    /// Adds a row, padded to the batch's width, which it must not exceed.
    fn push(&mut self, row: &[u32], place: usize, pad: i32, vocab_size: usize) -> Result<()> {
        let end = self.ids.len() + self.seq;
        for &id in row {
            self.ids.push(id_as_i32(id, place, vocab_size)?);
            self.ids_end = self.ids_end.max(id as usize + 1);
        }
        if self.ids.len() < end {
            self.ids_end = self.ids_end.max(pad as usize + 1);
            self.ids.resize(end, pad);
        }
        self.lengths.push(row.len() as u32);
        self.rows.push(place);
        Ok(())
    }

    fn clear(&mut self) {
        self.ids.clear();
        self.lengths.clear();
        self.rows.clear();
        (self.seq, self.skip, self.ids_end) = (1, 0, 0);
    }

    /// Number of rows.
    pub fn batch(&self) -> usize {
        self.lengths.len()
    }

    /// Width of the rectangle: at least that of the longest row, at least 1.
    pub fn seq(&self) -> usize {
        self.seq
    }

    /// `[batch, seq]`, row-major; what stands behind a row's tokens is padding.
    pub fn ids(&self) -> &[i32] {
        &self.ids
    }

    /// Real tokens of each row, `[batch]`. The attention mask follows from it. A row without tokens has a vector of zeros.
    pub fn lengths(&self) -> &[u32] {
        &self.lengths
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

    /// 1 at tokens, 0 at padding, `[batch, seq]`, row-major.
    pub fn attention_mask(&self) -> Vec<i32> {
        let row = |&length: &u32| (0..self.seq).map(move |place| i32::from(place < length as usize));
        self.lengths.iter().flat_map(row).collect()
    }

    /// Checks that every id, padding's too, is in an embedding table of `vocab_size` rows.
    ///
    /// # Errors
    /// [`Error::TokenId`] for the first that is not.
    pub fn check_ids(&self, vocab_size: usize) -> Result<()> {
        if self.ids_end <= vocab_size {
            return Ok(());
        }
        let outside = self.ids.iter().zip(0..).find(|(id, _)| **id as usize >= vocab_size);
        let Some((&id, place)) = outside else { return Ok(()) };
        let row = place / self.seq;
        Err(Error::TokenId { id: id.unsigned_abs(), text: self.rows.get(row).copied().unwrap_or(row), vocab_size })
    }
}

impl Default for TokenBatch {
    /// No rows.
    fn default() -> Self {
        Self { ids: Vec::new(), lengths: Vec::new(), seq: 1, rows: Vec::new(), skip: 0, ids_end: 0 }
    }
}

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
pub fn batches_from_ids(
    rows: &[impl AsRef<[u32]>],
    pad_token_id: u32,
    vocab_size: usize,
    skip: u32,
    plan: &BatchPlan,
) -> Result<Vec<TokenBatch>> {
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|&row| Reverse(rows[row].as_ref().len()));
    let lengths: Vec<usize> = order.iter().map(|&row| rows[row].as_ref().len()).collect();
    plan.cut(&lengths)
        .into_iter()
        .map(|range| {
            let (seq, count) = (lengths[range.start].max(1), range.len());
            let pad = id_as_i32(pad_token_id, 0, vocab_size)?;
            let mut batch = TokenBatch {
                ids: Vec::with_capacity(seq * count),
                lengths: Vec::with_capacity(count),
                seq,
                rows: Vec::with_capacity(count),
                skip,
                ids_end: 0,
            };
            for &row in &order[range] {
                batch.push(rows[row].as_ref(), row, pad, vocab_size)?;
            }
            Ok(batch)
        })
        .collect()
}

fn id_as_i32(id: u32, text: usize, vocab_size: usize) -> Result<i32> {
    i32::try_from(id).ok().filter(|_| (id as usize) < vocab_size).ok_or(Error::TokenId { id, text, vocab_size })
}

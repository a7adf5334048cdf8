//! Tokens: texts to ids, sorted by length and cut into batches.

mod added;
mod assemble;
mod batch;
mod byte_level_bpe;
mod cache;
mod compact;
mod cost;
mod cuts;
#[cfg(feature = "serve")]
mod described;
mod loaded;
mod one_pass;
mod size;
mod tokenizer;
mod trie;
mod unigram;
mod windows;
mod word_piece;
mod words;

pub use batch::{BATCH_OVERHEAD, BatchPlan, TokenBatch, batches_from_ids};
pub use cost::{ShapeCost, ShapeCosts};
#[cfg(feature = "serve")]
pub(crate) use described::{DescribedToken, Describer};
pub use size::{BatchSize, Layout, SizeRange};
pub(crate) use tokenizer::{Row, without_tokens};
pub use tokenizer::{Tokenized, Tokenizer, TokenizerSettings};

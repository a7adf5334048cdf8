//! Content hashes, and how they are written.

use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::fmt::Write as _;

/// Bytes that one thread hashes at a time: the largest tensor, the word embeddings, is a fifth of a model.
pub(crate) const PIECE_BYTES: usize = 1 << 22;

/// SHA-256 of each [`PIECE_BYTES`] of each part, in order, on all cores: models and engines hold up to gigabytes.
pub(crate) fn of_pieces<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Vec<[u8; 32]> {
    let pieces: Vec<&[u8]> = parts.into_iter().flat_map(|part| part.chunks(PIECE_BYTES)).collect();
    pieces.par_iter().map(|piece| Sha256::digest(piece).into()).collect()
}

/// `bytes` in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

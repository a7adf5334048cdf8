//! Keys that requests bring, compared in constant time.

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// SHA-256 of the keys, so that all comparisons are of one length.
pub(super) struct Keys(Vec<[u8; 32]>);

impl Keys {
    pub fn new(keys: &[String]) -> Self {
        Self(keys.iter().map(|key| Sha256::digest(key).into()).collect())
    }

    /// Whether requests need none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether requests need no key, or `key` is one that is known. Takes as long whichever key it is.
    pub fn admit(&self, key: Option<&[u8]>) -> bool {
        if self.0.is_empty() {
            return true;
        }
        let Some(key) = key else { return false };
        let digest: [u8; 32] = Sha256::digest(key).into();
        self.0.iter().fold(false, |known, one| known | bool::from(one.ct_eq(&digest)))
    }
}

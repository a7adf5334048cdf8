//! What the hub says of a file's content, and whether what arrived is that.

use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

/// Bytes read at a time.
const PIECE_BYTES: usize = 1 << 18;

/// What the hub says of a file's content. What it does not say is `None` or not there, never a zero.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Expected {
    pub size: Option<u64>,
    pub hashes: Vec<Hash>,
}

/// A hash of a file's whole content, in lower-case hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Hash {
    /// Of files in LFS.
    Sha256(String),
    /// Git's id of other files: the SHA-1 of `blob SIZE\0` and the content.
    GitBlob(String),
}

impl Hash {
    pub fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::GitBlob(hex) => hex,
        }
    }

    /// The SHA-256 that an ETag is. One of 40 digits says nothing for sure: hubs give git's id, other servers hashes of their own.
    pub fn of_etag(etag: &str) -> Option<Self> {
        is_hex(etag, 64).then(|| Self::Sha256(etag.to_ascii_lowercase()))
    }
}

/// Whether `text` is `digits` hexadecimal digits.
pub(super) fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// SHA-256 of a whole file.
pub(super) fn sha256(file: &mut File) -> io::Result<String> {
    hash(file, Sha256::new())
}

/// What is wrong with the content of `file`, called `name`; `None` where it is what the hub says.
pub(super) fn fault(name: &str, file: &mut File, expected: &Expected) -> io::Result<Option<String>> {
    let found = file.metadata()?.len();
    if let Some(size) = expected.size.filter(|&size| size != found) {
        return Ok(Some(format!("{name} has {found} bytes, the hub says {size}")));
    }
    for hash in &expected.hashes {
        let (kind, found) = match hash {
            Hash::Sha256(_) => ("SHA-256", sha256(file)?),
            Hash::GitBlob(_) => ("git's id", self::hash(file, Sha1::new_with_prefix(format!("blob {found}\0")))?),
        };
        if found != hash.hex() {
            return Ok(Some(format!("{name} has {kind} {found}, the hub says {}", hash.hex())));
        }
    }
    Ok(None)
}

fn hash(file: &mut File, mut hash: impl Digest) -> io::Result<String> {
    let mut piece = vec![0; PIECE_BYTES];
    file.seek(SeekFrom::Start(0))?;
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(crate::digest::hex(&hash.finalize())),
            read => hash.update(&piece[..read]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn only_what_the_hub_says_is_checked() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"hello\n").unwrap();
        let mut check = |size, hashes: &[Hash]| fault("f", &mut file, &Expected { size, hashes: hashes.to_vec() }).unwrap();
        // `git hash-object` and `sha256sum` of "hello\n".
        let git = Hash::GitBlob("ce013625030ba8dba906f756967f9e9ca394464a".to_owned());
        let sha256 = Hash::Sha256("5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03".to_owned());
        assert_eq!(check(None, &[]), None);
        assert_eq!(check(Some(6), &[git.clone(), sha256.clone()]), None);
        assert_eq!(check(Some(0), &[]).unwrap(), "f has 6 bytes, the hub says 0");
        let other = Hash::GitBlob("0".repeat(40));
        assert_eq!(
            check(None, &[sha256, other]).unwrap(),
            format!("f has git's id {}, the hub says {}", git.hex(), "0".repeat(40))
        );
    }

    #[test]
    fn an_etag_is_a_hash_only_where_it_must_be_one() {
        assert_eq!(Hash::of_etag(&"AB".repeat(32)), Some(Hash::Sha256("ab".repeat(32))));
        for no in ["", "5f3b-1a2", &"ab".repeat(20), &"zz".repeat(32)] {
            assert_eq!(Hash::of_etag(no), None, "{no}");
        }
    }
}

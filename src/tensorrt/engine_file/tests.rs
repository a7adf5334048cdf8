//! Engine files: what is written is read, and no damage gets past the reader.

use super::manifest::tests::manifest;
use super::*;
use proptest::prelude::*;
use std::fs;
use std::path::PathBuf;

fn written(plan: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.engine");
    EngineFile::write(&path, &manifest(), plan).unwrap();
    (folder, path)
}

fn anything(_: &Manifest) -> Result<()> {
    Ok(())
}

#[test]
fn what_is_written_is_read() {
    for plan in [&b""[..], b"x", &[7; 100_000], &[9; (1 << 22) + 5]] {
        let (folder, path) = written(plan);
        let file = EngineFile::read(&path, anything).unwrap();
        assert_eq!(file, EngineFile::built(manifest(), plan.to_vec()));
        assert_eq!(EngineFile::read_manifest(&path).unwrap(), manifest());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary file is left");
    }
}

#[test]
fn every_truncation_and_every_changed_byte_is_an_error() {
    let (_folder, path) = written(b"the plan");
    let whole = fs::read(&path).unwrap();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        let error = EngineFile::read(&path, anything).unwrap_err();
        assert!(matches!(error, Error::EngineFile { .. }), "{length} bytes: {error}");
        assert_eq!(EngineFile::read_manifest(&path).unwrap_err().to_string(), error.to_string());
    }
    for place in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[place] ^= 0x20;
        fs::write(&path, &bytes).unwrap();
        let error = EngineFile::read(&path, anything).unwrap_err();
        assert!(matches!(error, Error::EngineFile { .. }), "byte {place}: {error}");
    }
    let longer = [&whole[..], b"!"].concat();
    fs::write(&path, longer).unwrap();
    assert!(matches!(EngineFile::read(&path, anything), Err(Error::EngineFile { .. })));
}

proptest! {
    #[test]
    fn foreign_bytes_are_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200), honest in any::<bool>()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("foreign");
        let bytes = if honest { [&MAGIC[..], &FORMAT.to_le_bytes(), &bytes].concat() } else { bytes };
        fs::write(&path, bytes).unwrap();
        let refused = matches!(EngineFile::read(&path, anything), Err(Error::EngineFile { .. }));
        prop_assert!(refused);
    }
}

#[test]
fn the_manifest_is_checked_before_the_plan() {
    let (_folder, path) = written(&[1; 4096]);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 4096]).unwrap();
    let error = EngineFile::read(&path, |_| Err(Error::Cancelled { what: "reading" })).unwrap_err();
    assert!(matches!(error, Error::Cancelled { .. }), "{error}");
}

#[test]
fn a_missing_file_says_how_to_build_one() {
    let error = EngineFile::read(Path::new("/nowhere/x.engine"), anything).unwrap_err();
    assert!(matches!(&error, Error::NotFound { .. }) && error.to_string().contains("build one"), "{error}");
}

#[test]
fn a_failed_write_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("taken");
    fs::create_dir(&path).unwrap();
    assert!(matches!(EngineFile::write(&path, &manifest(), b"plan"), Err(Error::Io { .. })));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary file is left");
    assert!(matches!(EngineFile::write(&folder.path().join("no/such"), &manifest(), b"plan"), Err(Error::Io { .. })));
}

#[test]
fn an_engine_that_was_read_is_not_the_file_s_any_more() {
    let (_folder, path) = written(&[7; 100_000]);
    let file = EngineFile::read(&path, anything).unwrap();
    // As `cp` over it does; in a mapped file reading would end the process here.
    fs::File::create(&path).unwrap();
    assert_eq!(file.plan(), [7; 100_000]);
}

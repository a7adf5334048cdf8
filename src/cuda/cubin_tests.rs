//! The cubin cache: a cubin is compiled once, and no damage is believed.

use super::*;
use crate::cuda::CudaError;
use std::cell::Cell;

#[test]
fn the_users_folder_follows_the_environment() {
    let with = |pairs: &'static [(&str, &str)]| {
        user_folder(move |name| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| PathBuf::from(v)))
    };
    assert_eq!(with(&[("TRT_EMBED_CACHE", "/c"), ("HOME", "/h")]), Some("/c/kernels".into()));
    assert_eq!(with(&[("XDG_CACHE_HOME", "/x"), ("HOME", "/h")]), Some("/x/trt-embed/kernels".into()));
    assert_eq!(with(&[("XDG_CACHE_HOME", "relative"), ("HOME", "/h")]), Some("/h/.cache/trt-embed/kernels".into()));
    assert_eq!(with(&[("TRT_EMBED_CACHE", ""), ("HOME", "/h")]), Some("/h/.cache/trt-embed/kernels".into()));
    assert_eq!(with(&[]), None);
}

/// A cache in a fresh folder, and a compiler that counts its calls.
struct Fixture {
    folder: tempfile::TempDir,
    compiled: Cell<u32>,
}

impl Fixture {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), compiled: Cell::new(0) }
    }

    fn get(&self, key: &str) -> Vec<u8> {
        let compile = || {
            self.compiled.set(self.compiled.get() + 1);
            Ok(format!("cubin of {key}").into_bytes())
        };
        CubinCache::at(self.folder.path()).get_or_compile(key, compile).unwrap()
    }

    fn file(&self, key: &str) -> std::path::PathBuf {
        self.folder.path().join(format!("{key}.cubin"))
    }
}

#[test]
fn a_cubin_is_compiled_once_for_each_key() {
    let cache = Fixture::new();
    for _ in 0..3 {
        assert_eq!(cache.get("one"), b"cubin of one");
    }
    assert_eq!(cache.compiled.get(), 1);
    assert_eq!(cache.get("two"), b"cubin of two");
    assert_eq!(cache.compiled.get(), 2);
    let left = fs::read_dir(cache.folder.path()).unwrap().count();
    assert_eq!(left, 2, "two cubins and no temporary file");
}

#[test]
fn damaged_entries_are_compiled_anew_and_replaced() {
    let cache = Fixture::new();
    cache.get("key");
    let whole = fs::read(cache.file("key")).unwrap();
    let mut damaged: Vec<Vec<u8>> = (0..whole.len()).map(|cut| whole[..cut].to_vec()).collect();
    damaged.extend((0..whole.len()).map(|at| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        bytes
    }));
    damaged.push([whole.as_slice(), b"x"].concat());
    for (i, bytes) in damaged.iter().enumerate() {
        let before = cache.compiled.get();
        fs::write(cache.file("key"), bytes).unwrap();
        assert_eq!(cache.get("key"), b"cubin of key", "damage {i}");
        assert_eq!(cache.compiled.get(), before + 1, "damage {i} was believed");
        assert_eq!(fs::read(cache.file("key")).unwrap(), whole, "damage {i} was not replaced");
    }
}

#[test]
fn a_cache_that_cannot_be_written_costs_only_time() {
    let folder = tempfile::tempdir().unwrap();
    let blocked = folder.path().join("a-file");
    fs::write(&blocked, b"").unwrap();
    for cache in [CubinCache::at(blocked.join("kernels")), CubinCache::none()] {
        assert_eq!(cache.get_or_compile("key", || Ok(vec![1, 2])), Ok(vec![1, 2]));
    }
}

#[test]
fn a_failed_compilation_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let error = CudaError::Compile { name: "a.cu".to_owned(), arch: "sm_90".to_owned(), log: "line 3".to_owned() };
    let cache = CubinCache::at(folder.path());
    assert_eq!(cache.get_or_compile("key", || Err(error.clone())), Err(error));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn threads_that_race_for_a_key_all_get_the_whole_cubin() {
    let folder = tempfile::tempdir().unwrap();
    let cubin: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..20 {
                    let got = CubinCache::at(folder.path()).get_or_compile("key", || Ok(cubin.clone())).unwrap();
                    assert!(got == cubin);
                }
            });
        }
    });
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

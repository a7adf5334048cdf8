//! The engine cache: engines by the hash of all that decides them, built once on a machine.

use super::EngineFile;
use super::manifest::{Machine, Manifest, Model, Proof, is_zero};
use crate::digest::hex;
use crate::files::{AtomicFile, user_cache_folder};
use crate::tensorrt::library::{BuildSettings, wait_for_turn};
use crate::{Error, Progress, Result};
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::env;
use std::fs::{self, File, TryLockError};
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// A folder of engines. Several processes may use one at the same time.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
}

/// Names an engine: equal keys mean an interchangeable plan.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CacheKey(String);

/// Names an engine on a machine that loads it: what is learnt there, of an engine that was built elsewhere, is kept under it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Loaded(String);

impl Loaded {
    /// Hashes the file's contents and the machine.
    pub(in crate::tensorrt) fn new(file: &EngineFile, machine: &Machine) -> Result<Self> {
        let name = format!("{}\n{}\n{}", machine.tensorrt, machine.compute_capability, machine.gpu);
        Ok(Self(hex(&Sha256::new().chain_update(file.digest()?).chain_update(name).finalize())))
    }
}

impl CacheKey {
    /// Hashes everything that decides the plan. Pooling, which follows the plan, and the name of an ONNX file do not.
    ///
    /// # Errors
    /// [`Error::Setting`] where a value cannot be written down.
    pub fn new(machine: &Machine, model: &Model, settings: &BuildSettings) -> Result<Self> {
        #[derive(Serialize)]
        struct Decides<'a> {
            format: u32,
            machine: &'a Machine,
            graph: &'a str,
            #[serde(skip_serializing_if = "is_zero")]
            tanh_gelu_from: u64,
            tokenizer: &'a str,
            hidden_size: usize,
            positions: usize,
            arithmetic: crate::tensorrt::library::Arithmetic,
            profiles: &'a [crate::tensorrt::library::Profile],
            workspace_bytes: Option<usize>,
            optimization_level: Option<u8>,
            fp32_layers: &'a [String],
            auxiliary_streams: Option<u8>,
            full_layer_details: bool,
        }
        let decides = Decides {
            format: 1,
            machine,
            graph: &model.graph,
            tanh_gelu_from: model.tanh_gelu_from,
            tokenizer: &model.tokenizer,
            hidden_size: model.hidden_size,
            positions: model.positions,
            arithmetic: settings.arithmetic,
            profiles: &settings.profiles,
            workspace_bytes: settings.workspace_bytes,
            optimization_level: settings.optimization_level,
            fp32_layers: &settings.fp32_layers,
            auxiliary_streams: settings.auxiliary_streams,
            full_layer_details: settings.layer_details == crate::tensorrt::library::LayerDetails::Full,
        };
        let json = serde_json::to_vec(&decides)
            .map_err(|error| Error::Setting { setting: crate::Setting::EngineCache, reason: error.to_string() })?;
        Ok(Self(hex(&Sha256::digest(json))))
    }
}

impl Cache {
    /// `TRT_EMBED_CACHE`, else `trt-embed` in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`).
    ///
    /// # Errors
    /// [`Error::NotFound`] where none of the variables is set.
    pub fn from_env() -> Result<Self> {
        user_cache_folder(|name| env::var_os(name).map(PathBuf::from)).map(Self::at).ok_or_else(|| Error::NotFound {
            what: "the user's cache folder".into(),
            path: "$HOME/.cache".into(),
            next: "set TRT_EMBED_CACHE to a folder for engines".into(),
        })
    }

    /// The cache in `folder`, which is created when first written to.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// Where the cache lies.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where the engine of `key` lies, or would.
    pub fn path(&self, key: &CacheKey) -> PathBuf {
        self.folder.join(format!("{}.engine", key.0))
    }

    /// The engine of `key`; where there is none that passes `check`, what `build` makes, which is then kept.
    ///
    /// One build at a time over all processes that share the cache; the others wait for it, which `progress` hears of as a phase,
    /// and take its result.
    ///
    /// # Errors
    /// What `build` returns; [`Error::Cancelled`] while waiting; [`Error::Io`] where the cache cannot be written.
    pub fn get_or_build(
        &self,
        key: &CacheKey,
        check: impl Fn(&Manifest) -> Result<()>,
        progress: &dyn Progress,
        build: impl FnOnce() -> Result<EngineFile>,
    ) -> Result<EngineFile> {
        let path = self.path(key);
        if let Some(engine) = read_if_whole(&path, &check) {
            return Ok(engine);
        }
        let _lock = self.lock(progress)?;
        if let Some(engine) = read_if_whole(&path, &check) {
            return Ok(engine);
        }
        let engine = build()?;
        EngineFile::write(&path, &engine.manifest, engine.plan())?;
        Ok(engine)
    }

    /// What earlier builds learnt about tactics on `machine`; empty where there was none.
    pub fn timing_cache(&self, machine: &Machine) -> Vec<u8> {
        fs::read(self.timing_path(machine)).unwrap_or_default()
    }

    /// Keeps `bytes` for later builds on `machine`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn store_timing_cache(&self, machine: &Machine, bytes: &[u8]) -> Result<()> {
        self.write(&self.timing_path(machine), bytes)
    }

    /// What the engine that `loaded` names has shown on its machine; none where it was not loaded there before.
    pub(in crate::tensorrt) fn proof(&self, loaded: &Loaded) -> Option<Proof> {
        let path = self.loaded_path(loaded, "proof");
        let bytes = fs::read(&path).ok()?;
        match serde_json::from_slice(&bytes) {
            Ok(proof) => Some(proof),
            Err(error) => {
                log::warn!("comparing the engine anew: {}: {error}", path.display());
                None
            }
        }
    }

    /// Keeps `proof` for later loads.
    pub(in crate::tensorrt) fn store_proof(&self, loaded: &Loaded, proof: &Proof) -> Result<()> {
        let json = serde_json::to_vec_pretty(proof)
            .map_err(|error| Error::Setting { setting: crate::Setting::EngineCache, reason: error.to_string() })?;
        self.write(&self.loaded_path(loaded, "proof"), &json)
    }

    /// The kernels that earlier loads compiled of the engine that `loaded` names; empty where there were none.
    pub(crate) fn kernels(&self, loaded: &Loaded) -> Vec<u8> {
        fs::read(self.loaded_path(loaded, "kernels")).unwrap_or_default()
    }

    /// Keeps `bytes` for later loads.
    pub(crate) fn store_kernels(&self, loaded: &Loaded, bytes: &[u8]) -> Result<()> {
        self.write(&self.loaded_path(loaded, "kernels"), bytes)
    }

    fn loaded_path(&self, loaded: &Loaded, extension: &str) -> PathBuf {
        self.folder.join(format!("{}.{extension}", loaded.0))
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        fs::create_dir_all(&self.folder).map_err(Error::io("create", &self.folder))?;
        let mut file = AtomicFile::create(path)?;
        file.write_all(bytes).map_err(Error::io("write", path))?;
        file.commit()
    }

    fn timing_path(&self, machine: &Machine) -> PathBuf {
        let name = format!("{}\n{}\n{}", machine.tensorrt, machine.compute_capability, machine.gpu);
        self.folder.join(format!("{}.timing", hex(&Sha256::digest(name))))
    }

    /// Waits until no other build uses this cache. Released when the file closes, also when the process is killed.
    pub(in crate::tensorrt) fn lock(&self, progress: &dyn Progress) -> Result<File> {
        fs::create_dir_all(&self.folder).map_err(Error::io("create", &self.folder))?;
        let path = self.folder.join("build.lock");
        let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(Error::io("create", &path))?;
        let try_lock = || match file.try_lock() {
            Ok(()) => Ok(Some(())),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(Error::io("lock", &path)(error)),
        };
        wait_for_turn(progress, try_lock)?;
        Ok(file)
    }
}

/// The engine at `path`, unless it is missing, damaged or refused: then a new one takes its place.
fn read_if_whole(path: &Path, check: &impl Fn(&Manifest) -> Result<()>) -> Option<EngineFile> {
    match EngineFile::read(path, check) {
        Ok(engine) => Some(engine),
        Err(Error::NotFound { .. }) => None,
        Err(error) => {
            log::warn!("building anew: {error}");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::manifest::Source;
    use super::super::manifest::tests::manifest;
    use super::*;
    use crate::NoProgress;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn settings() -> BuildSettings {
        BuildSettings { profiles: vec!["1x16".parse().unwrap()], ..BuildSettings::default() }
    }

    fn key() -> CacheKey {
        CacheKey::new(&manifest().machine, &manifest().model, &settings()).unwrap()
    }

    fn engine(plan: &[u8]) -> EngineFile {
        EngineFile::built(manifest(), plan.to_vec())
    }

    fn never() -> Result<EngineFile> {
        panic!("built although the engine is there")
    }

    #[test]
    fn builds_once_for_many_at_the_same_time() {
        let folder = tempfile::tempdir().unwrap();
        let builds = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let build = || {
                        builds.fetch_add(1, Ordering::SeqCst);
                        Ok(engine(b"plan"))
                    };
                    let found = Cache::at(folder.path()).get_or_build(&key(), |_| Ok(()), &NoProgress, build).unwrap();
                    assert_eq!(found, engine(b"plan"));
                });
            }
        });
        assert_eq!(builds.into_inner(), 1);
    }

    #[test]
    fn a_damaged_or_refused_entry_is_built_anew() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().join("made"));
        cache.get_or_build(&key(), |_| Ok(()), &NoProgress, || Ok(engine(b"first"))).unwrap();
        assert_eq!(cache.get_or_build(&key(), |_| Ok(()), &NoProgress, never).unwrap(), engine(b"first"));

        let path = cache.path(&key());
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
        assert_eq!(cache.get_or_build(&key(), |_| Ok(()), &NoProgress, || Ok(engine(b"second"))).unwrap(), engine(b"second"));
        assert_eq!(cache.get_or_build(&key(), |_| Ok(()), &NoProgress, never).unwrap(), engine(b"second"));

        let refuse =
            |manifest: &Manifest| manifest.check_machine(&Machine { gpu: "NVIDIA L4".into(), ..manifest.machine.clone() });
        assert_eq!(cache.get_or_build(&key(), refuse, &NoProgress, || Ok(engine(b"third"))).unwrap(), engine(b"third"));
    }

    #[test]
    fn a_failed_build_leaves_nothing_and_frees_the_lock() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let failed = cache.get_or_build(&key(), |_| Ok(()), &NoProgress, || Err(Error::Cancelled { what: "building" }));
        assert!(matches!(failed, Err(Error::Cancelled { .. })));
        assert!(!cache.path(&key()).exists());
        assert_eq!(cache.get_or_build(&key(), |_| Ok(()), &NoProgress, || Ok(engine(b"plan"))).unwrap(), engine(b"plan"));
    }

    #[test]
    fn every_deciding_value_changes_the_key() {
        let (machine, model) = (manifest().machine, manifest().model);
        let with = |change: fn(&mut BuildSettings)| {
            let mut settings = settings();
            change(&mut settings);
            CacheKey::new(&machine, &model, &settings).unwrap()
        };
        let mut keys = vec![
            with(|_| ()),
            with(|settings| settings.arithmetic = crate::tensorrt::library::Arithmetic::Fp32),
            with(|settings| settings.profiles = vec!["1x17".parse().unwrap()]),
            with(|settings| settings.workspace_bytes = Some(1 << 30)),
            with(|settings| settings.optimization_level = Some(5)),
            with(|settings| settings.fp32_layers = vec!["LayerNorm".into()]),
            with(|settings| settings.auxiliary_streams = Some(0)),
            with(|settings| settings.layer_details = crate::tensorrt::library::LayerDetails::Names),
            CacheKey::new(&Machine { gpu: "NVIDIA L4".into(), ..machine.clone() }, &model, &settings()).unwrap(),
            CacheKey::new(&machine, &Model { graph: "d".repeat(64), ..model.clone() }, &settings()).unwrap(),
            CacheKey::new(&machine, &Model { tokenizer: "d".repeat(64), ..model.clone() }, &settings()).unwrap(),
            CacheKey::new(&machine, &Model { hidden_size: 8, ..model.clone() }, &settings()).unwrap(),
            CacheKey::new(&machine, &Model { positions: 8, ..model.clone() }, &settings()).unwrap(),
        ];
        assert_eq!(with(|settings| settings.timing_cache = vec![1]), keys[0], "a timing cache decides nothing");
        let other = Model { pooling: "cls".into(), source: Source::Onnx("renamed.onnx".into()), ..model.clone() };
        assert_eq!(CacheKey::new(&machine, &other, &settings()).unwrap(), keys[0], "pooling and names decide nothing");
        let all = keys.len();
        keys.sort_by(|a, b| a.0.cmp(&b.0));
        keys.dedup();
        assert_eq!(keys.len(), all);
    }

    #[test]
    fn timing_caches_are_kept_by_machine() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().join("made"));
        let machine = manifest().machine;
        assert!(cache.timing_cache(&machine).is_empty());
        cache.store_timing_cache(&machine, b"tactics").unwrap();
        assert_eq!(cache.timing_cache(&machine), b"tactics");
        assert!(cache.timing_cache(&Machine { tensorrt: "10.0.0".into(), ..machine }).is_empty());
    }

    #[test]
    fn proofs_and_kernels_are_kept_by_engine_and_machine() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().join("made"));
        let (file, machine) = (engine(b"plan"), manifest().machine);
        let loaded = Loaded::new(&file, &machine).unwrap();
        assert_eq!((cache.proof(&loaded), cache.kernels(&loaded)), (None, Vec::new()));
        let proof = Proof { fidelity: manifest().fidelity.unwrap(), costs: Vec::new() };
        cache.store_proof(&loaded, &proof).unwrap();
        cache.store_kernels(&loaded, b"compiled").unwrap();
        assert_eq!((cache.proof(&loaded), cache.kernels(&loaded)), (Some(proof), b"compiled".to_vec()));
        let mut changed = manifest();
        changed.model.pooling = "cls".into();
        for (file, machine) in [
            (engine(b"other"), machine.clone()),
            (EngineFile::built(changed, b"plan".to_vec()), machine.clone()),
            (file.clone(), Machine { gpu: "NVIDIA L4".into(), ..machine.clone() }),
            (file.clone(), Machine { tensorrt: "RTX 1.7.1".into(), ..machine.clone() }),
        ] {
            let other = Loaded::new(&file, &machine).unwrap();
            assert_eq!((cache.proof(&other), cache.kernels(&other)), (None, Vec::new()), "{machine:?}");
        }
        // A damaged one is as good as none.
        fs::write(cache.loaded_path(&loaded, "proof"), "{").unwrap();
        assert_eq!(cache.proof(&loaded), None);
    }

    /// Stops as soon as it waits, and counts the phases that began and ended.
    #[derive(Default)]
    struct Impatient {
        began: AtomicUsize,
        ended: AtomicUsize,
    }

    impl Progress for Impatient {
        fn phase_started(&self, phase: &str, _: Option<&str>, _: u32) {
            assert_eq!(phase, "waiting for another build");
            self.began.fetch_add(1, Ordering::SeqCst);
        }
        fn phase_finished(&self, phase: &str) {
            assert_eq!(phase, "waiting for another build");
            self.ended.fetch_add(1, Ordering::SeqCst);
        }
        fn cancelled(&self) -> bool {
            self.began.load(Ordering::SeqCst) > 0
        }
    }

    #[test]
    fn waiting_is_told_and_can_be_cancelled() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let lock = cache.lock(&NoProgress).unwrap();
        let impatient = Impatient::default();
        let error = cache.get_or_build(&key(), |_| Ok(()), &impatient, never).unwrap_err();
        assert!(matches!(error, Error::Cancelled { .. }), "{error}");
        assert_eq!((impatient.began.into_inner(), impatient.ended.into_inner()), (1, 1));
        drop(lock);
        let patient = Impatient::default();
        cache.lock(&patient).unwrap();
        assert_eq!(patient.began.into_inner(), 0);
    }

    #[test]
    fn a_wait_that_fails_ends_its_phase_too() {
        let (impatient, tries) = (Impatient::default(), AtomicUsize::new(0));
        struct Patient<'a>(&'a Impatient);
        impl Progress for Patient<'_> {
            fn phase_started(&self, phase: &str, parent: Option<&str>, steps: u32) {
                self.0.phase_started(phase, parent, steps);
            }
            fn phase_finished(&self, phase: &str) {
                self.0.phase_finished(phase);
            }
        }
        let attempt = || match tries.fetch_add(1, Ordering::SeqCst) {
            0 => Ok(None::<()>),
            _ => Err(Error::Setting { setting: crate::Setting::EngineCache, reason: "on purpose".into() }),
        };
        assert!(matches!(wait_for_turn(&Patient(&impatient), attempt), Err(Error::Setting { .. })));
        assert_eq!((impatient.began.into_inner(), impatient.ended.into_inner()), (1, 1));
    }
}

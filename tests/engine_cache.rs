//! The engine cache between processes: who builds, who waits, and what a killed process leaves. Each test starts this very program as
//! its children.
#![cfg(feature = "tensorrt")]

use libtest_mimic::{Arguments, Trial};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};
use trt_embed::Progress;
use trt_embed::backend::tensorrt::{
    Arithmetic, Build, BuildSettings, Cache, CacheKey, EngineFile, Machine, Manifest, Model, Source,
};
use trt_embed::files::{AtomicFile, discard_unfinished};
use trt_embed::graph::Precision;

/// Tells a child what to be: `build`, `hang` (in the build) or `discard`.
const ROLE: &str = "TRT_EMBED_TEST_ROLE";
/// The folder that it works in.
const FOLDER: &str = "TRT_EMBED_TEST_FOLDER";
/// Far above what any step takes, for machines under load.
const PATIENCE: Duration = Duration::from_secs(60);
/// What a build takes.
const BUILDS_FOR: Duration = Duration::from_millis(300);
/// A plan that takes some time to write.
const PLAN_BYTES: usize = 20_000_000;

fn manifest() -> Manifest {
    Manifest {
        machine: Machine { tensorrt: "8.6.0".into(), compute_capability: "9.0".into(), gpu: "NVIDIA H200".into() },
        model: Model {
            source: Source::Exported(Precision::Fp32),
            graph: "a".repeat(64),
            tokenizer: "b".repeat(64),
            pooling: "mean".into(),
            hidden_size: 384,
            positions: 512,
            tanh_gelu: false,
            tanh_gelu_from: 0,
        },
        arithmetic: Arithmetic::Fp16,
        profiles: vec!["1x16".parse().unwrap()],
        plan_bytes: Vec::new(),
        build: Build {
            by: "a test".into(),
            cuda_driver: "13.0".into(),
            seconds: 1,
            workspace_bytes: None,
            optimization_level: None,
            fp32_layers: Vec::new(),
            float_linears: Vec::new(),
            int8_inputs: 0,
        },
        fidelity: None,
        unproven: None,
        speed: Vec::new(),
        products: Vec::new(),
        costs: Vec::new(),
    }
}

fn key() -> CacheKey {
    let manifest = manifest();
    CacheKey::new(&manifest.machine, &manifest.model, &BuildSettings::default()).unwrap()
}

fn engine() -> EngineFile {
    // SAFETY: nobody loads it.
    unsafe { EngineFile::from_parts(manifest(), (0..PLAN_BYTES).map(|i| (i % 251) as u8).collect()) }
}

/// Adds a line to the file at `path`; several processes may do so at once.
fn note(path: &Path, line: &str) {
    let mut file = fs::File::options().create(true).append(true).open(path).unwrap();
    file.write_all(format!("{line}\n").as_bytes()).unwrap();
}

/// Notes that it waits.
struct Waits(PathBuf);

impl Progress for Waits {
    fn phase_started(&self, phase: &str, _: Option<&str>, _: u32) {
        note(&self.0.join("notes"), phase);
    }
}

/// What a child does.
fn child(role: &str, folder: &Path) {
    if role == "discard" {
        let mut file = AtomicFile::create(&folder.join("result")).unwrap();
        file.write_all(&[7; 100_000]).unwrap();
        file.file().unwrap();
        assert_eq!(fs::read_dir(folder).unwrap().count(), 1, "nothing was being written");
        discard_unfinished();
        // Without running destructors, as Ctrl-C ends a build.
        std::process::exit(9);
    }
    let build = || {
        note(&folder.join("notes"), "building");
        if role == "hang" {
            thread::sleep(2 * PATIENCE);
        }
        // Long enough for the others to come.
        thread::sleep(BUILDS_FOR);
        Ok(engine())
    };
    let found = Cache::at(folder.join("cache")).get_or_build(&key(), |_| Ok(()), &Waits(folder.into()), build).unwrap();
    assert!(found == engine(), "another engine");
}

/// A child that does not outlive its test.
struct Running(Child);

impl Running {
    fn start(role: &str, folder: &Path) -> Self {
        let mut command = Command::new(env::current_exe().unwrap());
        command.env(ROLE, role).env(FOLDER, folder).stdin(Stdio::null()).stdout(Stdio::null());
        Self(command.spawn().unwrap())
    }

    /// Its exit status.
    fn ends(mut self) -> Option<i32> {
        self.0.wait().unwrap().code()
    }

    /// By SIGKILL.
    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn noted(folder: &Path, line: &str) -> usize {
    fs::read_to_string(folder.join("notes")).unwrap_or_default().lines().filter(|noted| *noted == line).count()
}

#[track_caller]
fn wait_for(what: &str, mut there: impl FnMut() -> bool) {
    let start = Instant::now();
    while !there() {
        assert!(start.elapsed() < PATIENCE, "{what} did not come");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Names in the cache, the lock's aside.
fn entries(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder.join("cache")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name != "build.lock").collect()
}

fn entry() -> String {
    Cache::at("").path(&key()).display().to_string()
}

fn many_processes_build_once() {
    let folder = tempfile::tempdir().unwrap();
    let children: Vec<Running> = (0..6).map(|_| Running::start("build", folder.path())).collect();
    for child in children {
        assert_eq!(child.ends(), Some(0));
    }
    assert_eq!(noted(folder.path(), "building"), 1);
    assert_eq!(entries(folder.path()), [entry()]);
    // The next one finds it.
    assert_eq!(Running::start("build", folder.path()).ends(), Some(0));
    assert_eq!(noted(folder.path(), "building"), 1);
}

fn a_killed_builder_leaves_nothing_and_the_next_one_builds() {
    let folder = tempfile::tempdir().unwrap();
    let first = Running::start("hang", folder.path());
    wait_for("the first build", || noted(folder.path(), "building") == 1);
    let next = Running::start("build", folder.path());
    wait_for("the second's wait", || noted(folder.path(), "waiting for another build") == 1);
    assert_eq!(noted(folder.path(), "building"), 1, "both build at the same time");
    assert!(entries(folder.path()).is_empty());

    first.kill();
    assert_eq!(next.ends(), Some(0));
    assert_eq!(noted(folder.path(), "building"), 2);
    assert_eq!(entries(folder.path()), [entry()]);
}

/// Killed at any moment of its work, also while it writes: the entry is whole or not there.
fn killed_at_any_moment_the_entry_is_whole_or_absent() {
    for moment in 0..8 {
        let folder = tempfile::tempdir().unwrap();
        let first = Running::start("build", folder.path());
        wait_for("the build", || noted(folder.path(), "building") == 1);
        thread::sleep(BUILDS_FOR + Duration::from_millis(20 * moment));
        first.kill();
        let path = folder.path().join("cache").join(entry());
        if path.exists() {
            assert!(EngineFile::read(&path, |_| Ok(())).unwrap() == engine(), "half an engine at moment {moment}");
        }
        assert_eq!(Running::start("build", folder.path()).ends(), Some(0));
        assert!(EngineFile::read(&path, |_| Ok(())).unwrap() == engine());
    }
}

fn a_process_that_ends_at_once_takes_its_unfinished_files_with_it() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(Running::start("discard", folder.path()).ends(), Some(9));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

fn main() -> ExitCode {
    if let (Some(role), Some(folder)) = (env::var_os(ROLE), env::var_os(FOLDER)) {
        child(&role.to_string_lossy(), Path::new(&folder));
        return ExitCode::SUCCESS;
    }
    let test = |name: &str, test: fn()| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
    };
    let tests = vec![
        test("many_processes_build_once", many_processes_build_once),
        test("a_killed_builder_leaves_nothing_and_the_next_one_builds", a_killed_builder_leaves_nothing_and_the_next_one_builds),
        test("killed_at_any_moment_the_entry_is_whole_or_absent", killed_at_any_moment_the_entry_is_whole_or_absent),
        test(
            "a_process_that_ends_at_once_takes_its_unfinished_files_with_it",
            a_process_that_ends_at_once_takes_its_unfinished_files_with_it,
        ),
    ];
    libtest_mimic::run(&Arguments::from_args(), tests).exit_code()
}

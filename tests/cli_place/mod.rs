//! A folder to run the command in, and what a run leaves.
#![allow(dead_code)] // each test program uses some of it

use crate::cli_model;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Far above what any step takes, for machines under load.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A folder with a model in it and room for files.
pub struct Place {
    pub folder: TempDir,
}

/// What a finished run left behind.
pub struct Run {
    pub status: i32,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Place {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        cli_model::write(&folder.path().join("model"));
        Self { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn put(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        std::fs::write(self.path(name), bytes).unwrap();
        name.to_owned()
    }

    /// The command, in this folder, away from the caller's settings.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trt-embed"));
        command.current_dir(self.folder.path()).args(args);
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TRT_EMBED_") || name == "RUST_LOG") {
            command.env_remove(name);
        }
        command
    }

    pub fn run(&self, args: &[&str]) -> Run {
        self.run_with(args, b"")
    }

    pub fn run_with(&self, args: &[&str], stdin: &[u8]) -> Run {
        let mut child = self.command(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut to = child.stdin.take().unwrap();
        let stdin = stdin.to_vec();
        // The child may end before it read everything: no fault of the test.
        let feeder = std::thread::spawn(move || drop(to.write_all(&stdin)));
        let out = child.wait_with_output().unwrap();
        feeder.join().unwrap();
        Run {
            status: out.status.code().expect("ended by a signal"),
            stdout: out.stdout,
            stderr: String::from_utf8(out.stderr).unwrap(),
        }
    }

    /// `embed` on the CPU with the model here.
    pub fn embed(&self, args: &[&str]) -> Run {
        self.embed_with(args, b"")
    }

    pub fn embed_with(&self, args: &[&str], stdin: &[u8]) -> Run {
        self.run_with(&[&["embed", "-m", "model", "--backend", "cpu"], args].concat(), stdin)
    }

    /// Names in the folder, besides the model's.
    pub fn files(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.filter(|name| name != "model").collect();
        names.sort();
        names
    }
}

impl Run {
    /// Asserts success and gives stdout.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.status, 0, "{}", self.stderr);
        String::from_utf8(self.stdout).unwrap()
    }

    /// Asserts exit status 1 with each of `parts` in the message, and nothing like a panic.
    #[track_caller]
    pub fn fails(&self, parts: &[&str]) {
        self.ends(1, parts);
    }

    #[track_caller]
    pub fn ends(&self, status: i32, parts: &[&str]) {
        assert_eq!(self.status, status, "{}", self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        for part in parts {
            assert!(self.stderr.contains(part), "no {part:?} in: {}", self.stderr);
        }
    }
}

/// One row of JSON Lines output.
#[derive(Debug, serde::Deserialize)]
pub struct Row {
    pub index: usize,
    pub tokens: usize,
    pub embedding: Vec<f32>,
    pub hidden_states: Option<Vec<Vec<f32>>>,
}

/// Rows whose texts need not follow each other.
#[track_caller]
pub fn numbered(jsonl: &str) -> Vec<Row> {
    jsonl.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[track_caller]
pub fn rows(jsonl: &str) -> Vec<Row> {
    let rows = numbered(jsonl);
    assert!(rows.iter().enumerate().all(|(i, row)| row.index == i));
    rows
}

/// Shape and values of a NumPy file.
pub fn npy(bytes: &[u8]) -> (Vec<u64>, Vec<f32>) {
    let file = npyz::NpyFile::new(bytes).unwrap();
    assert_eq!(file.order(), npyz::Order::C);
    assert_eq!(file.dtype().descr(), "'<f4'");
    (file.shape().to_vec(), file.into_vec().unwrap())
}

pub fn values(rows: &[Row]) -> Vec<f32> {
    rows.iter().flat_map(|row| row.embedding.iter().copied()).collect()
}

/// Waits until `happens`.
#[track_caller]
pub fn wait_until(what: &str, mut happens: impl FnMut() -> bool) {
    let start = Instant::now();
    while !happens() {
        assert!(start.elapsed() < PATIENCE, "{what}: waited in vain");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A child that does not outlive its test.
pub struct Running(pub Child);

impl Running {
    /// Its status and what it said on stderr.
    pub fn ends(mut self) -> (std::process::ExitStatus, String) {
        let mut said = String::new();
        std::io::Read::read_to_string(&mut self.0.stderr.take().unwrap(), &mut said).unwrap();
        (self.0.wait().unwrap(), said)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

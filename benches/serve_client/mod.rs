//! Clients of a server on loopback, and a server as a child process: what benches/serve.rs measures with. Threads and blocking sockets, so that
//! the load costs the server's machine as little as may be.

pub mod soak;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Longer than any answer takes.
const PATIENCE: Duration = Duration::from_secs(300);

/// A connection that is kept open, and opened anew where the server closed it.
pub struct Client {
    address: SocketAddr,
    stream: Option<BufReader<TcpStream>>,
}

impl Client {
    pub fn new(address: SocketAddr) -> Self {
        Self { address, stream: None }
    }

    /// Status and body of the answer to `request`.
    pub fn send(&mut self, request: &[u8]) -> std::io::Result<(u16, Vec<u8>)> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => {
                let stream = TcpStream::connect(self.address)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                BufReader::with_capacity(64 * 1024, stream)
            }
        };
        stream.get_mut().write_all(request)?;
        let (status, body, keep) = read(&mut stream)?;
        if keep {
            self.stream = Some(stream);
        }
        Ok((status, body))
    }
}

fn read(stream: &mut BufReader<TcpStream>) -> std::io::Result<(u16, Vec<u8>, bool)> {
    let broken = |what: &str| std::io::Error::other(format!("the answer {what}"));
    let (mut line, mut status, mut length, mut keep) = (String::new(), None, 0, true);
    loop {
        line.clear();
        if stream.read_line(&mut line)? == 0 {
            return Err(broken("ended within its headers"));
        }
        let text = line.trim_end();
        if text.is_empty() {
            break;
        }
        match (status, text.split_once(':')) {
            (None, _) => status = text.split(' ').nth(1).and_then(|status| status.parse().ok()),
            (_, Some((name, value))) if name.eq_ignore_ascii_case("content-length") => {
                length = value.trim().parse().map_err(|_| broken("has no length"))?;
            }
            (_, Some((name, value))) if name.eq_ignore_ascii_case("connection") => {
                keep = !value.trim().eq_ignore_ascii_case("close");
            }
            _ => {}
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok((status.ok_or_else(|| broken("has no status"))?, body, keep))
}

/// A POST of JSON.
pub fn post(path: &str, body: &serde_json::Value, header: &str) -> Vec<u8> {
    let body = body.to_string();
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{header}content-length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

/// OpenAI's request for one text, which every server here takes.
pub fn openai(model: &str, text: &str) -> Vec<u8> {
    post("/embeddings", &serde_json::json!({ "input": [text], "model": model }), "")
}

/// What came of requests: latencies of those that were answered with vectors, and how many were turned away or had no answer.
#[derive(Debug, Default, Clone)]
pub struct Tally {
    pub answered: Vec<Duration>,
    pub refused: usize,
    pub failed: usize,
    pub took: Duration,
}

impl Tally {
    /// Nearest rank.
    pub fn percentile(&self, part: f64) -> Duration {
        let mut sorted = self.answered.clone();
        sorted.sort();
        let rank = ((sorted.len() as f64 * part).ceil() as usize).max(1) - 1;
        sorted.get(rank).copied().unwrap_or_default()
    }

    pub fn a_second(&self) -> f64 {
        self.answered.len() as f64 / self.took.as_secs_f64()
    }

    fn add(&mut self, outcome: &std::io::Result<(u16, Vec<u8>)>, took: Duration) {
        match outcome {
            Ok((200, _)) => self.answered.push(took),
            Ok((429 | 503, _)) => self.refused += 1,
            _ => self.failed += 1,
        }
    }

    pub fn join(&mut self, other: Self) {
        self.answered.extend(other.answered);
        self.refused += other.refused;
        self.failed += other.failed;
    }
}

/// `clients` that each ask again `pause` after every answer, until `over` says that the time is up.
pub fn closed_loop(
    address: SocketAddr,
    clients: usize,
    pause: Duration,
    requests: &[Vec<u8>],
    over: impl Fn(Instant) -> bool + Sync,
) -> Tally {
    let next = AtomicUsize::new(0);
    together(address, clients, |began, client, tally| {
        while !over(began) {
            let request = &requests[next.fetch_add(1, Ordering::Relaxed) % requests.len()];
            let asked = Instant::now();
            let outcome = client.send(request);
            tally.add(&outcome, asked.elapsed());
            std::thread::sleep(pause);
        }
    })
}

/// Requests at fixed times, `rate` a second for `time`, whether or not earlier ones were answered; each waits for one of `clients` to be free, which is
/// a part of its latency.
pub fn open_loop(address: SocketAddr, clients: usize, rate: f64, time: Duration, requests: &[Vec<u8>]) -> Tally {
    let next = AtomicUsize::new(0);
    together(address, clients, |began, client, tally| {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let due = Duration::from_secs_f64(number as f64 / rate);
            if due >= time {
                return;
            }
            std::thread::sleep(due.saturating_sub(began.elapsed()));
            let outcome = client.send(&requests[number % requests.len()]);
            tally.add(&outcome, began.elapsed() - due);
        }
    })
}

/// What `clients` count that do `work` side by side, each on a connection of its own, from when all begin.
fn together(address: SocketAddr, clients: usize, work: impl Fn(Instant, &mut Client, &mut Tally) + Sync) -> Tally {
    let began = Instant::now();
    let one = || {
        let (mut client, mut tally) = (Client::new(address), Tally::default());
        work(began, &mut client, &mut tally);
        tally
    };
    let mut all = Tally::default();
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..clients).map(|_| scope.spawn(one)).collect();
        running.into_iter().for_each(|thread| all.join(thread.join().unwrap()));
    });
    all.took = began.elapsed();
    all
}

/// `trt-embed serve` as a child process; killed when dropped.
pub struct Serving {
    child: Child,
    pub address: SocketAddr,
}

impl Serving {
    /// Starts it on a free port of loopback and waits until it is ready.
    pub fn start(model: &str, args: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trt-embed"));
        command.args(["serve", "-m", model, "--hostname", "127.0.0.1", "--port", "0", "--backend", "cpu"]).args(args);
        command
            .env_clear()
            .envs(std::env::vars().filter(|(name, _)| matches!(name.as_str(), "PATH" | "HOME" | "TMPDIR" | "MALLOC_ARENA_MAX")));
        let mut child = command.env("RUST_LOG", "info").stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let mut address = None;
        for line in lines.by_ref() {
            if let Some((_, found)) = line.split_once("listening on http://") {
                address = found.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().ok();
            }
            if line.ends_with("] ready") {
                break;
            }
        }
        // The log is read on, or the server would wait for its reader.
        std::thread::spawn(move || lines.for_each(drop));
        Self { address: address.expect("the server did not start"), child }
    }

    /// Resident memory in MB, as the system says.
    pub fn memory(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
        line.trim().trim_end_matches(" kB").parse::<f64>().unwrap_or(f64::NAN) / 1024.0
    }

    /// Its memory at the end of each second, until `stop`.
    pub fn watch(&self, stop: &AtomicBool, seen: &Mutex<Vec<f64>>) {
        while !stop.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_secs(1));
            seen.lock().unwrap().push(self.memory());
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! A long run of everything at once: interactive clients, bulk, bad requests, clients that go away, that read and write slowly, and that say nothing. Checks
//! that each request that somebody waits for has its answer, and that the server's memory stays where it is.

use super::{Client, Serving, Tally, post};
use serde_json::json;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// What may be more at the end than at the beginning, of the memory then and besides.
const GROWTH: f64 = 1.05;
const SLACK_MB: f64 = 16.0;
/// Seconds that a server of a soak waits for what clients send and read.
const PATIENCE: &str = "2";

/// A request that cannot be answered with vectors, and its status.
struct Bad {
    request: Vec<u8>,
    status: u16,
}

fn bad() -> Vec<Bad> {
    let of = |request: Vec<u8>, status| Bad { request, status };
    let raw = |path: &str, kind: &str, body: &[u8]| {
        let length = body.len();
        [format!("POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n").as_bytes(), body]
            .concat()
    };
    vec![
        of(raw("/embed", "application/json", b"{\"inputs\": "), 400),
        of(raw("/embed", "application/json", b"{\"inputs\": \"\xff\xfe\"}"), 400),
        of(raw("/embed", "application/json", "[".repeat(100_000).as_bytes()), 422),
        of(raw("/embed", "text/plain", b"a text"), 415),
        of(post("/embed", &json!({ "inputs": [] }), ""), 400),
        of(post("/embed", &json!({ "inputs": vec!["a"; 33] }), ""), 422),
        of(post("/embed", &json!({ "inputs": [[4_000_000_000u32]] }), ""), 422),
        of(post("/embed", &json!({ "inputs": "a", "dimensions": 0 }), ""), 422),
        of(post("/embed", &json!({ "inputs": "a ".repeat(20_000), "truncate": false }), ""), 422),
        of(post("/v1/embeddings", &json!({ "input": "a", "encoding_format": "utf8" }), ""), 422),
        of(post("/v1/embeddings", &json!({ "input": "a", "model": "nosuch" }), ""), 404),
        of(post("/nosuch", &json!({}), ""), 404),
        // It is refused before it is sent.
        of(
            b"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 999999999\r\n\r\n".to_vec(),
            413,
        ),
    ]
}

/// What came of the clients that nobody measures.
#[derive(Default)]
struct Counts {
    bad: AtomicUsize,
    gone: AtomicUsize,
    slow: AtomicUsize,
    silent: AtomicUsize,
    /// What should not have been, in words.
    wrong: Mutex<Vec<String>>,
}

impl Counts {
    fn wrong(&self, what: String) {
        let mut wrong = self.wrong.lock().unwrap();
        if wrong.len() < 20 {
            wrong.push(what);
        }
    }
}

fn shortened(request: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(&request[..request.len().min(200)])
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(super::PATIENCE)).unwrap();
    stream
}

/// One bad request after the other.
fn ask_badly(address: SocketAddr, counts: &Counts, over: &dyn Fn() -> bool) {
    let (requests, mut client) = (bad(), Client::new(address));
    for bad in requests.iter().cycle() {
        if over() {
            return;
        }
        match client.send(&bad.request) {
            Ok((status, _)) if status == bad.status => _ = counts.bad.fetch_add(1, Ordering::Relaxed),
            // Overload is told before a body is looked at.
            Ok((429, _)) => {}
            Ok((status, body)) => {
                counts.wrong(format!("{status} {} for {:?}", String::from_utf8_lossy(&body), shortened(&bad.request)));
            }
            Err(error) => counts.wrong(format!("{error} for {:?}", shortened(&bad.request))),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Leaves within the headers, within the body, and before the answer.
fn go_away(address: SocketAddr, request: &[u8], counts: &Counts, over: &dyn Fn() -> bool) {
    for length in [20, request.len() - 5, request.len()].into_iter().cycle() {
        if over() {
            return;
        }
        if let Err(error) = connect(address).write_all(&request[..length]) {
            counts.wrong(format!("a request could not be sent: {error}"));
        }
        counts.gone.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Takes a large answer in drops, or sends a body in drops, until the server has enough of it.
fn dawdle(address: SocketAddr, large: &[u8], counts: &Counts, over: &dyn Fn() -> bool) {
    let drop_by_drop = Duration::from_millis(100);
    while !over() {
        let mut reader = connect(address);
        let (mut some, mut taken) = ([0; 64], 0);
        let mut read = reader.write_all(large).is_ok();
        while read && !over() {
            read = reader.read(&mut some).is_ok_and(|count| count > 0);
            taken += 1;
            // It reads nothing at all in the end, for longer than the server's patience.
            std::thread::sleep(if taken < 20 { drop_by_drop } else { Duration::from_secs(4) });
            if taken > 20 {
                break;
            }
        }
        let mut writer = connect(address);
        let begun = writer
            .write_all(b"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n");
        let mut sent = begun.is_ok();
        for _ in 0..40 {
            sent = sent && writer.write_all(b" ").is_ok();
            std::thread::sleep(drop_by_drop);
        }
        let mut said = Vec::new();
        let _ = writer.read_to_end(&mut said);
        // Overload is told at once.
        if !(said.starts_with(b"HTTP/1.1 408") || said.starts_with(b"HTTP/1.1 429") || said.is_empty() && !sent) {
            counts.wrong(format!("a slow body: {}", String::from_utf8_lossy(&said)));
        }
        counts.slow.fetch_add(1, Ordering::Relaxed);
    }
}

/// Connections that say nothing, or half of their headers, until the server ends them.
fn say_nothing(address: SocketAddr, counts: &Counts, over: &dyn Fn() -> bool) {
    while !over() {
        let mut silent: Vec<TcpStream> = (0..20).map(|_| connect(address)).collect();
        for stream in silent.iter_mut().step_by(2) {
            let _ = stream.write_all(b"POST /embed HTTP/1.1\r\nhost: ");
        }
        for mut stream in silent {
            let mut said = Vec::new();
            if let Err(error) = stream.read_to_end(&mut said)
                && matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
            {
                counts.wrong("a silent connection was not ended".into());
            }
            counts.silent.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Runs it for `time` on a server of `model` and says what came of it; `texts` are short. False where something was wrong.
pub fn run(model: &str, texts: &[String], time: Duration) -> bool {
    let server = Serving::start(
        model,
        &[
            "--max-concurrent-requests",
            "64",
            "--header-timeout",
            PATIENCE,
            "--body-timeout",
            PATIENCE,
            "--write-timeout",
            PATIENCE,
        ],
    );
    let address = server.address;
    let interactive: Vec<Vec<u8>> = texts.iter().map(|text| super::openai(model, text)).collect();
    let bulk: Vec<Vec<u8>> =
        texts.chunks(32).map(|texts| post("/embed", &json!({ "inputs": texts }), "x-priority: bulk\r\n")).collect();
    let long: Vec<String> = texts.chunks(16).take(32).map(|texts| texts.join(" ")).collect();
    // Some megabytes.
    let large = post("/embed_all", &json!({ "inputs": long }), "");
    let (counts, stop, memory) = (Counts::default(), AtomicBool::new(false), Mutex::new(Vec::new()));
    let began = Instant::now();
    let over = || began.elapsed() >= time;
    let (asked, jobs) = std::thread::scope(|scope| {
        scope.spawn(|| server.watch(&stop, &memory));
        let others = [
            scope.spawn(|| ask_badly(address, &counts, &over)),
            scope.spawn(|| go_away(address, &bulk[0], &counts, &over)),
            scope.spawn(|| go_away(address, &interactive[0], &counts, &over)),
            scope.spawn(|| dawdle(address, &large, &counts, &over)),
            scope.spawn(|| dawdle(address, &large, &counts, &over)),
            scope.spawn(|| say_nothing(address, &counts, &over)),
        ];
        let asked = scope.spawn(|| super::closed_loop(address, 8, Duration::from_millis(5), &interactive, |_| over()));
        let jobs = scope.spawn(|| super::closed_loop(address, 2, Duration::ZERO, &bulk, |_| over()));
        let tallies: (Tally, Tally) = (asked.join().unwrap(), jobs.join().unwrap());
        others.into_iter().for_each(|other| other.join().unwrap());
        stop.store(true, Ordering::Relaxed);
        tallies
    });
    let memory = memory.into_inner().unwrap();
    let part = (memory.len() / 10).max(1);
    // The first tenth warms it up.
    let (early, late) =
        (median(&memory[part.min(memory.len() - 1)..(2 * part).min(memory.len())]), median(&memory[memory.len() - part..]));
    let most = memory.iter().copied().fold(0.0, f64::max);
    // What is left when all clients are gone.
    let mut client = Client::new(address);
    let mut metrics = String::new();
    for _ in 0..100 {
        let (_, body) = client.send(b"GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n").unwrap();
        metrics = String::from_utf8_lossy(&body).into_owned();
        if metrics.contains("trt_embed_active_requests 0") && metrics.contains("trt_embed_connections 1") {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let left =
        |name: &str| metrics.lines().filter(|line| line.starts_with(name)).map(str::to_owned).collect::<Vec<_>>().join(", ");
    let counted = |count: &AtomicUsize| count.load(Ordering::Relaxed);
    println!(
        "soak of {} s: {} interactive and {} bulk answered, {} refused, {} without answer; p99 {:.1} ms of the first, {:.1} ms of the others",
        time.as_secs(),
        asked.answered.len(),
        jobs.answered.len(),
        asked.refused + jobs.refused,
        asked.failed + jobs.failed,
        asked.percentile(0.99).as_secs_f64() * 1e3,
        jobs.percentile(0.99).as_secs_f64() * 1e3
    );
    println!(
        "soak: {} bad requests with their status, {} clients gone away, {} slow readers and writers, {} silent connections ended",
        counted(&counts.bad),
        counted(&counts.gone),
        counted(&counts.slow),
        counted(&counts.silent)
    );
    println!(
        "soak: memory {early:.1} MB in the second tenth (median), {late:.1} MB in the last, {most:.1} MB at most; then {}, {}",
        left("trt_embed_active_requests"),
        left("trt_embed_connections")
    );
    let mut wrong = counts.wrong.into_inner().unwrap();
    if asked.failed + jobs.failed > 0 {
        wrong.push("requests without an answer".into());
    }
    if late > early * GROWTH + SLACK_MB {
        wrong.push("memory has grown".into());
    }
    if !(metrics.contains("trt_embed_active_requests 0") && metrics.contains("trt_embed_connections 1")) {
        wrong.push("requests or connections are left".into());
    }
    wrong.iter().for_each(|what| println!("soak, WRONG: {what}"));
    wrong.is_empty()
}

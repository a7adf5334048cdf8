//! The server on an executor that waits, fails and hangs as it is told. What real models give is tested from outside, in tests/server.rs.

mod admin;
mod grpc;

use super::*;
use crate::executor::{Backend, Limits};
use crate::model::ModelFolder;
use crate::tokens::TokenBatch;
use crate::{BackendChoice, Embedder, Result};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Condvar, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Far above what any step takes, for machines under load.
const PATIENCE: Duration = Duration::from_secs(60);
/// First ids for which the executor fails, panics or gives NaN.
const FAILS: u32 = 100;
const PANICS: u32 = 101;
const NAN: u32 = 102;

/// Runs batches that its gate lets through, and keeps the first id of each that has begun. A batch of one id is the watchdog's.
struct Fake {
    state: Mutex<Doing>,
    changed: Condvar,
}

struct Doing {
    /// Batches that may still run.
    gate: usize,
    begun: Vec<u32>,
    probe: Probe,
    /// Probes that it has answered.
    probes: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Probe {
    Works,
    Fails,
    Hangs,
}

impl Fake {
    fn new(gate: usize) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(Doing { gate, begun: Vec::new(), probe: Probe::Works, probes: 0 }),
            changed: Condvar::new(),
        })
    }

    fn change(&self, change: impl FnOnce(&mut Doing)) {
        change(&mut self.state.lock().unwrap());
        self.changed.notify_all();
    }

    fn begun(&self) -> Vec<u32> {
        self.state.lock().unwrap().begun.clone()
    }

    /// Waits while `condition` holds; a test that fails must not wait for itself.
    fn wait_while(&self, condition: impl Fn(&Doing) -> bool) {
        let waited = self.changed.wait_timeout_while(self.state.lock().unwrap(), PATIENCE, |doing| condition(doing)).unwrap();
        assert!(!waited.1.timed_out(), "nobody changed it");
    }
}

impl Backend for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn encode(&self, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
        let failed = || Err(Error::Backend { backend: "fake", reason: "the device fell off the bus".into() });
        if batch.ids().len() == 1 {
            self.wait_while(|doing| doing.probe == Probe::Hangs);
            self.change(|doing| doing.probes += 1);
            return if self.state.lock().unwrap().probe == Probe::Fails { failed() } else { Ok(()) };
        }
        let id = batch.row(0)[0] as u32;
        self.change(|doing| doing.begun.push(id));
        self.wait_while(|doing| doing.gate == 0);
        self.change(|doing| doing.gate -= 1);
        assert_ne!(id, PANICS);
        if id == FAILS {
            return failed();
        }
        out.fill(if id == NAN { f32::NAN } else { 1.0 });
        Ok(())
    }

    fn hidden(&self, _: &TokenBatch, _: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn limits(&self) -> Limits {
        Limits { max_batch: 1, max_seq: 96, batch_tokens: 1, parallelism: 1 }
    }
}

/// The fixture's tokenizer before `fake`, which runs one text at a time.
fn model(fake: &Arc<Fake>, queue_tokens: usize) -> Model {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/bert");
    let builder = Embedder::builder(folder).backend(BackendChoice::Cpu).threads(1).batch_size(1).queue_tokens(queue_tokens).raw();
    Model::new("fake", builder.build().unwrap().on(fake.clone()), ModelFolder::open(folder).unwrap())
}

struct Running {
    address: SocketAddr,
    grpc: SocketAddr,
    handle: Handle,
    thread: Option<JoinHandle<std::result::Result<Ended, ServeError>>>,
}

fn start(loader: Loader, change: impl FnOnce(&mut Settings)) -> Running {
    let mut settings = Settings::default();
    change(&mut settings);
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    let addresses = [Address::Tcp(loopback), Address::Grpc(loopback)];
    let server = Server::with_loaders(&addresses, vec![(vec!["fake".into()], loader)], settings).unwrap();
    let [Address::Tcp(address), Address::Grpc(grpc)] = *server.addresses() else { panic!("no TCP addresses") };
    let handle = server.handle();
    Running { address, grpc, handle, thread: Some(std::thread::spawn(move || server.run())) }
}

/// A server of `fake`, ready.
fn serve(fake: &Arc<Fake>, change: impl FnOnce(&mut Settings)) -> Running {
    let mut settings = Settings::default();
    change(&mut settings);
    let (fake, queue_tokens) = (fake.clone(), settings.max_queue_tokens);
    let running = start(Arc::new(move || Ok(model(&fake, queue_tokens))), |own| *own = settings);
    until(|| running.handle.is_ready());
    running
}

/// As [`serve`], with row 20 on the executor; and the connection that waits for its vector.
fn serve_busy(fake: &Arc<Fake>, change: impl FnOnce(&mut Settings)) -> (Running, TcpStream) {
    let server = serve(fake, change);
    let running = server.ask(20);
    until(|| fake.begun() == [20]);
    (server, running)
}

fn until(holds: impl Fn() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "it never came to that");
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Running {
    fn open(&self, request: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        stream
    }

    /// Asks for the vector of the row of ids that begins with `id`.
    fn ask(&self, id: u32) -> TcpStream {
        self.open(&post("/embed", &json!({ "inputs": [[id, 7]] })))
    }

    fn get(&self, path: &str) -> (u16, String) {
        read(self.open(&format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")))
    }

    fn queue(&self) -> crate::QueueStatus {
        self.handle.state.models.first().unwrap().model().unwrap().embedder.queue()
    }

    fn stop(self) -> Ended {
        self.handle.stop();
        self.end().unwrap()
    }

    /// How it ends.
    fn end(mut self) -> std::result::Result<Ended, ServeError> {
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.handle.stop();
    }
}

fn post(path: &str, body: &Value) -> String {
    let body = body.to_string();
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}

/// Status and body, of a connection that ends with them.
fn read(mut stream: TcpStream) -> (u16, String) {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

fn error_type((status, body): (u16, String)) -> (u16, String) {
    let json: Value = serde_json::from_str(&body).unwrap();
    (status, json["error_type"].as_str().unwrap().to_owned())
}

#[test]
fn until_models_are_loaded_the_server_says_that_it_is_not_ready() {
    let fake = Fake::new(usize::MAX);
    let (go, wait) = mpsc::channel();
    let (loaded, wait) = (fake.clone(), Mutex::new(wait));
    let loader = move || {
        wait.lock().unwrap().recv().unwrap();
        Ok(model(&loaded, 1000))
    };
    let server = start(Arc::new(loader), |_| {});
    for path in ["/health", "/health/ready", "/ping", "/"] {
        assert_eq!(error_type(server.get(path)), (503, "Unhealthy".into()), "{path}");
    }
    assert_eq!(server.get("/health/live").0, 200);
    let (status, said) = read(server.ask(20));
    assert!(status == 503 && said.contains("is being loaded"), "{status} {said}");
    assert!(server.get("/metrics").1.contains("trt_embed_model_ready{model=\"fake\"} 0"));
    go.send(()).unwrap();
    until(|| server.handle.is_ready());
    assert_eq!((server.get("/health").0, read(server.ask(20)).0), (200, 200));
}

#[test]
fn an_executor_that_fails_or_hangs_makes_the_server_unready_until_it_works_again() {
    for (probe, says) in [(Probe::Fails, "fell off the bus"), (Probe::Hangs, "has not answered")] {
        let fake = Fake::new(usize::MAX);
        let server = serve(&fake, |settings| settings.health_timeout = Duration::from_millis(100));
        fake.change(|doing| doing.probe = probe);
        until(|| !server.handle.is_ready());
        let health = server.get("/health");
        assert!(health.0 == 503 && health.1.contains(says), "{health:?}");
        assert_eq!(server.get("/health/live").0, 200);
        assert_eq!(error_type(read(server.ask(20))), (503, "Unhealthy".into()));
        assert!(fake.begun().is_empty(), "a dead executor was given work");
        fake.change(|doing| doing.probe = Probe::Works);
        until(|| server.handle.is_ready());
        assert_eq!((server.get("/health").0, read(server.ask(20)).0), (200, 200));
    }
}

/// A server whose model is loaded on the executors of `fakes` one after the other; where there are no more, loading fails.
fn serve_in_turn(fakes: &[&Arc<Fake>], change: impl FnOnce(&mut Settings)) -> Running {
    let fakes: Mutex<Vec<Arc<Fake>>> = Mutex::new(fakes.iter().rev().map(|fake| Arc::clone(fake)).collect());
    let loader = move || match fakes.lock().unwrap().pop() {
        Some(fake) => Ok(model(&fake, 1000)),
        None => Err(Error::Backend { backend: "fake", reason: "there is no device".into() }),
    };
    let running = start(Arc::new(loader), |settings| {
        settings.health_timeout = Duration::from_millis(100);
        settings.recovery_delay = Duration::from_millis(100);
        change(settings);
    });
    until(|| running.handle.is_ready());
    running
}

#[test]
fn a_model_whose_executor_is_lost_is_loaded_anew() {
    for probe in [Probe::Fails, Probe::Hangs] {
        let (lost, next) = (Fake::new(0), Fake::new(usize::MAX));
        let server = serve_in_turn(&[&lost, &next], |_| {});
        let waiting = server.ask(20);
        until(|| lost.begun() == [20]);
        lost.change(|doing| doing.probe = probe);
        until(|| !server.handle.is_ready());
        until(|| server.handle.is_ready());
        assert_eq!(read(server.ask(21)).0, 200);
        assert_eq!((lost.begun(), next.begun()), (vec![20], vec![21]));
        // What was on the lost one gets its answer when that lets go of it, and does not disturb the other.
        lost.change(|doing| (doing.probe, doing.gate) = (Probe::Works, 1));
        assert_eq!(read(waiting).0, 200);
        // The new queue counts from 0; what is told of both never goes back.
        assert!(server.get("/metrics").1.contains("trt_embed_batches{model=\"fake\"} "));
        assert_eq!(server.stop(), Ended::Drained);
    }
}

#[test]
fn counters_go_on_when_a_model_is_loaded_anew() {
    let (lost, next) = (Fake::new(usize::MAX), Fake::new(usize::MAX));
    let server = serve_in_turn(&[&lost, &next], |_| {});
    let texts = || {
        let metrics = server.get("/metrics").1;
        let line = metrics.lines().find_map(|line| line.strip_prefix("trt_embed_batch_texts{model=\"fake\"} "));
        line.map_or(0, |count| count.parse::<u64>().unwrap())
    };
    for id in [20, 21, 22] {
        assert_eq!(read(server.ask(id)).0, 200);
    }
    assert_eq!(texts(), 3);
    lost.change(|doing| doing.probe = Probe::Fails);
    until(|| !server.handle.is_ready());
    until(|| server.handle.is_ready());
    assert_eq!((read(server.ask(23)).0, texts()), (200, 4));
    let metrics = server.get("/metrics").1;
    for line in ["te_batch_next_size_count 4", "trt_embed_device_seconds_count{model=\"fake\"} 4"] {
        assert!(metrics.lines().any(|known| known == line), "no {line} in\n{metrics}");
    }
}

#[test]
fn batches_are_told_of_with_their_size_and_time_and_probes_are_not() {
    let fake = Fake::new(0);
    let (server, first) = serve_busy(&fake, |_| {});
    std::thread::sleep(Duration::from_millis(50));
    fake.change(|doing| doing.gate = usize::MAX);
    assert_eq!(read(first).0, 200);
    // Two of one request, and one that fails.
    let rows = json!({ "inputs": [[21, 7, 7], [22, 7, 7, 7, 7, 7]] });
    assert_eq!(read(server.open(&post("/embed", &rows))).0, 200);
    assert_eq!(read(server.ask(FAILS)).0, 424);
    // The failure has the executor probed.
    until(|| fake.state.lock().unwrap().probes > 0);
    let metrics = server.get("/metrics").1;
    let value = |name: &str| -> f64 {
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in\n{metrics}")).parse().unwrap()
    };
    assert_eq!((value("te_batch_next_size_count"), value("te_batch_next_size_sum")), (4.0, 4.0));
    assert_eq!((value("te_batch_next_tokens_count"), value("te_batch_next_tokens_sum")), (4.0, 13.0));
    assert_eq!(value("te_batch_next_tokens_bucket{le=\"2\"}"), 2.0);
    assert_eq!(value("te_batch_next_tokens_bucket{le=\"4\"}"), 3.0);
    assert_eq!(value("trt_embed_device_seconds_count{model=\"fake\"}"), 4.0);
    // The first stood at the gate for so long.
    let seconds = value("trt_embed_device_seconds_sum{model=\"fake\"}");
    assert!((0.05..PATIENCE.as_secs_f64()).contains(&seconds), "{seconds}");
}

#[test]
fn a_server_whose_executor_does_not_come_back_ends_and_says_why() {
    let lost = Fake::new(usize::MAX);
    let server = serve_in_turn(&[&lost], |settings| settings.recovery_timeout = Duration::from_millis(1500));
    lost.change(|doing| doing.probe = Probe::Fails);
    match server.end() {
        Err(ServeError::Lost { name, reason }) => {
            assert!(name == "fake" && reason.contains("there is no device"), "{name} {reason}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_busy_executor_is_asked_beside_its_queue() {
    let fake = Fake::new(0);
    let (server, first) = serve_busy(&fake, |_| {});
    let second = server.ask(21);
    until(|| server.queue().interactive.texts == 1);
    // Both wait, and the watchdog does not: its failure is seen.
    fake.change(|doing| doing.probe = Probe::Fails);
    until(|| !server.handle.is_ready());
    fake.change(|doing| (doing.probe, doing.gate) = (Probe::Works, 2));
    assert_eq!((read(first).0, read(second).0), (200, 200));
    until(|| server.handle.is_ready());
}

#[test]
fn what_the_executor_does_wrong_is_an_error_and_never_a_vector() {
    let fake = Fake::new(usize::MAX);
    let server = serve(&fake, |_| {});
    for (id, says) in [(FAILS, "fell off the bus"), (PANICS, "panicked"), (NAN, "NaN")] {
        let (status, said) = read(server.ask(id));
        assert!(status == 424 && said.contains(says) && said.contains("\"error_type\":\"Backend\""), "{status} {said}");
        // One bad text fails its request, whoever else is in it.
        let body = json!({ "input": [[20, 7], [id, 7]], "encoding_format": "base64" });
        let (status, said) = read(server.open(&post("/v1/embeddings", &body)));
        assert!(status == 424 && said.contains(says) && said.contains("\"type\":\"server_error\""), "{status} {said}");
    }
    // The watchdog found nothing wrong with the executor itself.
    until(|| server.handle.is_ready());
    assert_eq!(read(server.ask(20)).0, 200);
}

#[test]
fn work_of_clients_that_went_away_is_never_run() {
    let fake = Fake::new(0);
    let (server, first) = serve_busy(&fake, |_| {});
    let gone = server.ask(21);
    until(|| server.queue().interactive.texts == 1);
    drop(gone);
    until(|| server.queue().cancelled == 1);
    fake.change(|doing| doing.gate = usize::MAX);
    assert_eq!((read(first).0, read(server.ask(22)).0), (200, 200));
    assert_eq!(fake.begun(), [20, 22]);
    assert!(server.get("/metrics").1.contains("te_request_failure{err=\"client_gone\"} 1"));
}

#[test]
fn a_full_queue_is_told_at_once() {
    let fake = Fake::new(0);
    let (server, running) = serve_busy(&fake, |settings| settings.max_queue_tokens = 4);
    let waiting = [server.ask(21), server.ask(22)];
    until(|| server.queue().interactive.tokens == 4);
    assert_eq!(error_type(read(server.ask(23))), (429, "Overloaded".into()));
    assert!(server.get("/metrics").1.contains("trt_embed_rejected{reason=\"queue_tokens\"} 1"));
    assert_eq!(server.get("/health").0, 200);
    fake.change(|doing| doing.gate = usize::MAX);
    assert_eq!(read(running).0, 200);
    waiting.into_iter().for_each(|stream| assert_eq!(read(stream).0, 200));
    assert_eq!(read(server.ask(24)).0, 200);
}

#[test]
fn what_waits_beyond_its_deadline_is_given_up() {
    let fake = Fake::new(0);
    let (server, running) = serve_busy(&fake, |settings| settings.request_timeout = Duration::from_millis(50));
    let late = server.ask(21);
    until(|| server.queue().interactive.texts == 1);
    std::thread::sleep(Duration::from_millis(60));
    fake.change(|doing| doing.gate = usize::MAX);
    // What has begun ends, however late.
    assert_eq!(read(running).0, 200);
    assert_eq!(error_type(read(late)), (429, "Overloaded".into()));
    assert_eq!(fake.begun(), [20]);
}

#[test]
fn a_server_that_is_stopped_waits_for_its_executor() {
    let fake = Fake::new(0);
    let (server, first) = serve_busy(&fake, |_| {});
    server.handle.stop();
    assert_eq!(error_type(read(server.ask(21))), (503, "Unhealthy".into()));
    fake.change(|doing| doing.gate = usize::MAX);
    assert_eq!(read(first).0, 200);
    assert_eq!(server.stop(), Ended::Drained);
    assert_eq!(fake.begun(), [20]);
}

#[test]
fn requests_go_into_the_class_they_ask_for_or_that_their_size_says() {
    let fake = Fake::new(0);
    let (server, _running) = serve_busy(&fake, |_| {});
    let rows = |count: usize| json!({ "inputs": vec![[30, 7]; count] });
    let with_class = |class: &str| post("/embed", &rows(1)).replacen("host: a", &format!("host: a\r\nx-priority: {class}"), 1);
    let _asked = [server.open(&with_class("bulk")), server.open(&with_class("interactive"))];
    let _sized = [server.open(&post("/embed", &rows(9))), server.open(&post("/embed", &rows(8)))];
    until(|| (server.queue().bulk.texts, server.queue().interactive.texts) == (10, 9));
    fake.change(|doing| doing.gate = usize::MAX);
}

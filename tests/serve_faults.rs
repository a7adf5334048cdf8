//! What breaks around `trt-embed serve`: clients and the server itself that are killed, logs without a place, an executor that does not come back.
#![cfg(unix)]

mod cli_model;
mod cli_place;
mod seeded_model;
mod serving;

use cli_place::{PATIENCE, Place};
use nix::sys::signal::Signal;
use seeded_model::{Kind, Sizes};
use serving::{body, start, start_on, started};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const CAT: &str = r#"{"inputs": "the cat sat"}"#;

fn until(mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "it never came to that");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A process that alone holds `stream`, to be killed.
fn holder(stream: std::net::TcpStream) -> Child {
    Command::new("sleep").arg("1000").stdin(Stdio::null()).stdout(OwnedFd::from(stream)).spawn().unwrap()
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_server_that_is_killed_within_a_request_serves_again_when_it_is_started() {
    let place = Place::new();
    let socket = place.path("admin").to_str().unwrap().to_owned();
    let args = ["-m", "model", "--admin", &socket];
    let mut serving = start(&place, &args, |_| {}).ready();
    let expected = body(&serving.post("/embed", "", CAT));
    let mut cut = serving.half_a_request();
    serving.signal(Signal::SIGKILL);
    assert_eq!(serving.status(), None);
    // Its client is told by the end of the connection, and nothing else.
    let mut rest = Vec::new();
    let _ = cut.read_to_end(&mut rest);
    assert!(rest.is_empty(), "{}", String::from_utf8_lossy(&rest));
    // The same port, and the socket that was left behind.
    let port = serving.port;
    let serving = start_on(port, &place, &args, |_| {}).ready();
    assert_eq!(serving.port, port);
    assert_eq!(body(&serving.post("/embed", "", CAT)), expected);
    UnixStream::connect(place.path("admin")).unwrap();
}

#[test]
fn clients_that_are_killed_leave_nothing_behind() {
    let place = Place::new();
    let mut serving = start(&place, &["-m", "model", "--max-concurrent-requests", "1"], |_| {}).ready();
    // Within a body: the only place of a request is taken until its client is gone.
    let client = holder(serving.half_a_request());
    assert!(serving.post("/embed", "", CAT).starts_with("HTTP/1.1 429 "));
    kill(client);
    serving.line("broke off");
    until(|| serving.get("/metrics").contains("trt_embed_active_requests 0"));
    body(&serving.post("/embed", "", CAT));
    // Within its headers, and before it has read its answer.
    for said in [
        "POST /embed HTTP/1.1\r\nhost",
        &format!(
            "POST /embed HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{CAT}",
            CAT.len()
        ),
    ] {
        let mut stream = serving.connect();
        stream.write_all(said.as_bytes()).unwrap();
        kill(holder(stream));
    }
    // The connection that asks is the only one.
    until(|| {
        let metrics = serving.get("/metrics");
        metrics.contains("trt_embed_connections 1") && metrics.contains("trt_embed_active_requests 0")
    });
    body(&serving.post("/embed", "", CAT));
}

#[test]
fn logs_that_cannot_be_written_stop_nothing() {
    // A disk that is full; a pipe whose reader is gone.
    let full = || Stdio::from(std::fs::File::create("/dev/full").unwrap());
    let gone = || Stdio::from(OwnedFd::from(std::io::pipe().unwrap().1));
    for (stdout, stderr, json) in [(Stdio::null(), full(), false), (full(), full(), true), (gone(), gone(), false)] {
        let place = Place::new();
        let socket = place.path("socket");
        let mut command =
            place.command(&["serve", "-m", "model", "--backend", "cpu", "--unix-socket", socket.to_str().unwrap(), "-v"]);
        if json {
            command.arg("--json-output");
        }
        let child = command.env_remove("API_KEY").env_remove("MODEL_ID").stdout(stdout).stderr(stderr).spawn().unwrap();
        let mut serving = started(child, 0);
        let ask = || -> std::io::Result<String> {
            let mut stream = UnixStream::connect(&socket)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let length = CAT.len();
            write!(
                stream,
                "POST /embed HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{CAT}"
            )?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        until(|| ask().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200 ")));
        // Many lines, none of which is waited for.
        for _ in 0..50 {
            body(&ask().unwrap());
        }
        serving.signal(Signal::SIGTERM);
        assert_eq!(serving.status(), Some(0));
    }
}

/// A real executor that is held up by its own work for longer than the watchdog's patience, and whose model is gone when it is loaded anew.
#[test]
fn an_executor_that_does_not_come_back_ends_the_server_with_status_3() {
    let place = Place::new();
    let model = seeded_model::folder(Kind::Bert, Sizes { hidden: 256, heads: 4, wide: 2048, layers: 8 }, 1, 1.0);
    let args = [
        "-m",
        model.path().to_str().unwrap(),
        "--threads",
        "1",
        "--max-client-batch-size",
        "16000",
        "--max-queue-tokens",
        "10000000",
        "--health-timeout",
        "0.01",
        "--recovery-delay",
        "0.01",
        "--recovery-timeout",
        "1",
        "--shutdown-timeout",
        "0.1",
    ];
    let mut serving = start(&place, &args, |_| {}).ready();
    std::fs::remove_file(model.path().join("config.json")).unwrap();
    let mut work = serving.connect();
    let inputs = vec!["the cat sat on the mat and the dog ran on the red mat"; 16_000];
    let request = serde_json::json!({ "inputs": inputs }).to_string();
    write!(
        work,
        "POST /embed HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{request}",
        request.len()
    )
    .unwrap();
    serving.line("the executor has not answered for 10ms");
    serving.line("does not come back yet");
    assert!(serving.get("/health/live").starts_with("HTTP/1.1 200 "));
    assert!(serving.get("/health/ready").starts_with("HTTP/1.1 503 "));
    assert!(serving.post("/embed", "", CAT).starts_with("HTTP/1.1 503 "));
    serving.line("is lost: ");
    assert!(
        serving.said.last().unwrap().contains("config.json") && serving.said.last().unwrap().contains("start the server again"),
        "{:?}",
        serving.said.last()
    );
    assert_eq!(serving.status(), Some(3));
}

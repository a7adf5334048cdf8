//! `trt-embed serve` as a child process, and a client that sends exactly the bytes that a test wants.
#![allow(dead_code)] // each test file uses a part

use crate::cli_place::{PATIENCE, Place};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::mpsc;

/// A server as a child process; killed when dropped.
pub struct Serving {
    child: Child,
    /// Lines of stderr, as they come.
    lines: mpsc::Receiver<String>,
    /// Those that were read.
    pub said: Vec<String>,
    pub port: u16,
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A server on a free port of loopback; its models may still be loading.
pub fn start(place: &Place, args: &[&str], change: impl FnOnce(&mut Command)) -> Serving {
    start_on(0, place, args, change)
}

/// As [`start`], on that port.
pub fn start_on(port: u16, place: &Place, args: &[&str], change: impl FnOnce(&mut Command)) -> Serving {
    let port = port.to_string();
    let mut command = place.command(&[&["serve", "--hostname", "127.0.0.1", "--port", &port, "--backend", "cpu"], args].concat());
    for name in ["MODEL_ID", "REVISION", "API_KEY", "PORT", "JSON_OUTPUT", "HOSTNAME"] {
        command.env_remove(name);
    }
    change(&mut command);
    let mut serving = started(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap(), 0);
    let listening = serving.line("listening on http://127.0.0.1:");
    let port = listening.split("127.0.0.1:").nth(1).unwrap();
    serving.port = port.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap();
    serving
}

/// A server that was started on `port` already. Its lines are read where its stderr is a pipe.
pub fn started(mut child: Child, port: u16) -> Serving {
    let lines = child.stderr.take().map_or_else(|| mpsc::channel().1, read_lines);
    Serving { child, lines, said: Vec::new(), port }
}

fn read_lines(stderr: ChildStderr) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || BufReader::new(stderr).lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    receiver
}

impl Serving {
    /// The next line that has `part` in it.
    #[track_caller]
    pub fn line(&mut self, part: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("no {part:?} in {:#?}", self.said));
            self.said.push(line.clone());
            if line.contains(part) {
                return line;
            }
        }
    }

    pub fn ready(mut self) -> Self {
        self.line("ready");
        self
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    pub fn status(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// A request that is under way until the rest of its body, 16 bytes behind `{`, is sent.
    pub fn half_a_request(&self) -> TcpStream {
        let mut stream = self.connect();
        stream
            .write_all(b"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 17\r\n\r\n{")
            .unwrap();
        while !self.get("/metrics").contains("trt_embed_active_requests 1") {}
        stream
    }

    /// Status line, headers and body of the answer.
    pub fn send(&self, request: &str) -> String {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    pub fn get(&self, path: &str) -> String {
        self.send(&format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"))
    }

    pub fn post(&self, path: &str, headers: &str, body: &str) -> String {
        let length = body.len();
        self.send(&format!(
            "POST {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: application/json\r\n{headers}content-length: {length}\r\n\r\n{body}"
        ))
    }
}

/// The JSON of an answer that gives what was asked for.
#[track_caller]
pub fn body(answer: &str) -> Value {
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
}

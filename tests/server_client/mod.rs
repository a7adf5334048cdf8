//! A server in this process, and a client that sends exactly the bytes that a test wants.
#![allow(dead_code)] // each test file uses a part

use serde_json::Value;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use trt_embed::server::{Address, Ended, Handle, ServeError, Served, Server, Settings};
use trt_embed::{BackendChoice, Embedder};

/// Far above what any step takes, for machines under load.
pub const PATIENCE: Duration = Duration::from_secs(120);

pub struct Running {
    pub address: SocketAddr,
    pub grpc: SocketAddr,
    pub handle: Handle,
    thread: Option<JoinHandle<Result<Ended, ServeError>>>,
}

/// An answer as it came.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

/// Texts run one by one: on the CPU the last bits of a vector depend on what shares its batch, and that is the queue's choice.
pub fn served(name: &str, folder: &str) -> Served {
    Served { names: vec![name.into()], builder: Embedder::builder(folder).backend(BackendChoice::Cpu).batch_size(1) }
}

/// A port of loopback that is free.
pub const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// A server on free ports of loopback, once it is ready.
pub fn start(models: Vec<Served>, settings: Settings) -> Running {
    start_also_on(&[], models, settings).0
}

/// As [`start`], on other addresses too, which are given back as they were bound.
pub fn start_also_on(others: &[Address], models: Vec<Served>, settings: Settings) -> (Running, Vec<Address>) {
    let addresses = [&[Address::Tcp(LOOPBACK), Address::Grpc(LOOPBACK)], others].concat();
    let server = Server::bind(&addresses, models, settings).unwrap();
    let [Address::Tcp(address), Address::Grpc(grpc), others @ ..] = server.addresses() else { panic!("no TCP addresses") };
    let (address, grpc, others, handle) = (*address, *grpc, others.to_vec(), server.handle());
    let running = Running { address, grpc, handle, thread: Some(std::thread::spawn(move || server.run())) };
    until(|| running.handle.is_ready());
    (running, others)
}

pub fn until(condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "it never came to that");
        std::thread::sleep(Duration::from_millis(2));
    }
}

impl Running {
    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    pub fn get(&self, path: &str) -> Answer {
        self.send(&format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"), b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_with(path, &[], body.to_string().as_bytes())
    }

    /// JSON, unless `headers` say another content type.
    pub fn post_with(&self, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        self.send(&post_head(path, headers, body.len()), body)
    }

    pub fn send(&self, head: &str, body: &[u8]) -> Answer {
        let mut stream = self.connect();
        stream.write_all(head.as_bytes()).unwrap();
        // A body beyond the limit is answered before all of it is sent.
        let _ = stream.write_all(body);
        read(&mut stream)
    }

    /// Stops the server and tells how it ended.
    pub fn stop(mut self) -> Ended {
        self.handle.stop();
        self.thread.take().unwrap().join().unwrap().unwrap()
    }

    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_some_and(JoinHandle::is_finished)
    }
}

/// Of a POST: JSON, unless `headers` say another content type.
pub fn post_head(path: &str, headers: &[(&str, &str)], length: usize) -> String {
    let mut head = format!("POST {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {length}\r\n");
    if !headers.iter().any(|(name, _)| *name == "content-type") {
        head.push_str("content-type: application/json\r\n");
    }
    headers.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
    head + "\r\n"
}

impl Drop for Running {
    fn drop(&mut self) {
        self.handle.stop();
    }
}

impl Answer {
    #[track_caller]
    pub fn ok(self) -> Value {
        assert_eq!(self.status, 200, "{}", String::from_utf8_lossy(&self.body));
        self.json()
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.body)))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// Reads one answer.
#[track_caller]
pub fn read(stream: &mut impl Read) -> Answer {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break end;
        }
        let count = stream.read(&mut buffer).unwrap();
        assert!(count > 0, "the connection ended within the headers: {}", String::from_utf8_lossy(&bytes));
        bytes.extend_from_slice(&buffer[..count]);
    };
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let header = |line: &str| {
        let (name, value) = line.split_once(':').unwrap();
        (name.to_ascii_lowercase(), value.trim().to_owned())
    };
    let mut answer = Answer { status, headers: lines.map(header).collect(), body: bytes[end + 4..].to_vec() };
    let length: usize = answer.header("content-length").unwrap_or("0").parse().unwrap();
    while answer.body.len() < length {
        let count = stream.read(&mut buffer).unwrap();
        assert!(count > 0, "the connection ended within the body");
        answer.body.extend_from_slice(&buffer[..count]);
    }
    answer
}

/// Rows of numbers, as 32-bit floats.
#[track_caller]
pub fn rows(value: &Value) -> Vec<Vec<f32>> {
    let row = |row: &Value| row.as_array().unwrap().iter().map(|value| value.as_f64().unwrap() as f32).collect();
    value.as_array().unwrap().iter().map(row).collect()
}

//! The server's doors over loopback: TLS and its renewed certificate, the port for probes, the page for browsers.

mod server_client;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::json;
use server_client::{Running, read, served, start, until};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use trt_embed::server::{Address, Collector, Ended, ServeError, Server, Settings, TlsFiles};

const BERT: &str = "tests/fixtures/bert";
const GET: &[u8] = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";

/// A server of a tiny model.
fn server(change: impl FnOnce(&mut Settings)) -> Running {
    let mut settings = Settings::default();
    change(&mut settings);
    start(vec![served("bert", BERT)], settings)
}

/// Copies the certificate of that name and its key to where the server reads them.
fn install(name: &str, files: &TlsFiles) {
    let fixture = Path::new("tests/fixtures/tls").join(name);
    std::fs::copy(fixture.with_extension("key"), &files.key).unwrap();
    std::fs::copy(fixture.with_extension("pem"), &files.certificate).unwrap();
}

fn files(folder: &Path) -> TlsFiles {
    TlsFiles { certificate: folder.join("tls.crt"), key: folder.join("tls.key") }
}

/// A client that trusts the certificate of that name alone.
fn trusting(name: &str) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(Path::new("tests/fixtures/tls").join(name).with_extension("pem")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    Arc::new(config.with_root_certificates(roots).with_no_client_auth())
}

/// What is answered within TLS.
fn ask(server: &Running, config: &Arc<ClientConfig>, request: &[u8]) -> std::io::Result<server_client::Answer> {
    let connection = ClientConnection::new(config.clone(), "localhost".try_into().unwrap()).unwrap();
    let mut stream = StreamOwned::new(connection, server.connect());
    stream.write_all(request)?;
    Ok(read(&mut stream))
}

/// As [`start`], which asks for readiness without TLS.
fn tls_server(folder: &Path, change: impl FnOnce(&mut Settings)) -> Running {
    let files = files(folder);
    install("first", &files);
    server(|settings| {
        settings.tls = Some(files);
        change(settings);
    })
}

#[test]
fn tls_serves_and_takes_a_new_certificate() {
    let folder = tempfile::tempdir().unwrap();
    let server = tls_server(folder.path(), |_| {});
    let (first, second) = (trusting("first"), trusting("second"));
    let body = json!({ "inputs": "the cat" }).to_string();
    let request = format!(
        "POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    assert_eq!(ask(&server, &first, request.as_bytes()).unwrap().ok().as_array().unwrap().len(), 1);
    assert!(ask(&server, &second, GET).is_err(), "the wrong certificate was trusted");

    // What is not whole changes nothing.
    std::fs::write(folder.path().join("tls.crt"), "no certificate").unwrap();
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(ask(&server, &first, GET).unwrap().status, 200);
    install("second", &files(folder.path()));
    until(|| ask(&server, &second, GET).is_ok_and(|answer| answer.status == 200));
    // A client that has not been there before: others resume their sessions.
    assert!(ask(&server, &trusting("first"), GET).is_err());
    assert_eq!(server.stop(), Ended::Drained);
}

/// gRPC's port of a server with a certificate: TLS too, and HTTP/2 within it.
#[test]
fn tls_covers_grpc() {
    let folder = tempfile::tempdir().unwrap();
    let server = tls_server(folder.path(), |_| {});
    let open = |protocol: &[u8]| {
        let mut config = ClientConfig::clone(&trusting("first"));
        config.alpn_protocols = vec![protocol.to_vec()];
        let connection = ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap();
        StreamOwned::new(connection, TcpStream::connect(server.grpc).unwrap())
    };
    let mut stream = open(b"h2");
    // HTTP/2's preface and empty settings; the server's settings come back (RFC 9113, frames: length, type 4, flags, stream 0).
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
    let mut frame = [0; 9];
    stream.read_exact(&mut frame).unwrap();
    assert_eq!((frame[3], &frame[5..]), (4, &[0; 4][..]));
    assert_eq!(stream.conn.alpn_protocol(), Some(&b"h2"[..]));
    assert!(open(b"http/1.1").write_all(GET).is_err(), "another protocol was agreed upon");
    // Without TLS nothing is said.
    let mut plain = TcpStream::connect(server.grpc).unwrap();
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(answer.first().is_none_or(|&first| first == 0x15), "more than an alert of TLS: {answer:?}");
}

#[test]
fn clients_that_do_not_come_to_tls_are_cut_off() {
    let folder = tempfile::tempdir().unwrap();
    let server = tls_server(folder.path(), |settings| {
        settings.header_timeout = Duration::from_millis(200);
        settings.max_connections = 2;
    });
    // One that speaks HTTP, one that says nothing.
    for said in [GET, b""] {
        let mut stream = server.connect();
        stream.write_all(said).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        // At most the alert of TLS.
        assert!(!answer.starts_with(b"HTTP"), "{}", String::from_utf8_lossy(&answer));
    }
    // Their places are free again.
    let trusted = trusting("first");
    until(|| ask(&server, &trusted, GET).is_ok_and(|answer| answer.status == 200));
}

#[test]
fn certificates_that_cannot_be_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let files = files(folder.path());
    let refused = |says: &str| {
        let mut settings = Settings::default();
        settings.tls = Some(files.clone());
        match Server::bind(&[], vec![served("bert", BERT)], settings).err() {
            Some(ServeError::Setting { reason }) => assert!(reason.contains(says), "{reason}"),
            other => panic!("{other:?}"),
        }
    };
    refused("tls.crt");
    install("first", &files);
    std::fs::copy("tests/fixtures/tls/second.key", &files.key).unwrap();
    refused("does not go with");
    std::fs::write(&files.key, "").unwrap();
    refused("a PEM file with the private key is needed");
    std::fs::write(&files.certificate, "").unwrap();
    refused("has no certificate");
}

/// The number behind a metric's name.
fn gauge(server: &Running, name: &str) -> u64 {
    let metrics = String::from_utf8(server.get("/metrics").body).unwrap();
    metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok()).unwrap()
}

#[test]
fn a_client_that_does_not_read_is_cut_off() {
    let server = server(|settings| {
        settings.write_timeout = Duration::from_millis(300);
        settings.max_client_batch_size = 1000;
    });
    // More than what the system holds for a reader that is late.
    let body = json!({ "inputs": vec!["the cat sat on the mat the dog ran ".repeat(8); 700] }).to_string();
    let mut stream = server.connect();
    let head = format!(
        "POST /embed_all HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    let mut begun = [0; 12];
    stream.read_exact(&mut begun).unwrap();
    assert_eq!(&begun, b"HTTP/1.1 200");
    // This connection and the one that asks for the metric; then the latter alone.
    until(|| gauge(&server, "trt_embed_connections") == 1);
    assert_eq!(gauge(&server, "trt_embed_active_requests"), 0);
    let mut rest = Vec::new();
    let ended = stream.read_to_end(&mut rest);
    assert!(ended.is_err() || !rest.ends_with(b"]]]"), "the whole answer was there, {} bytes", rest.len());
    assert_eq!(server.stop(), Ended::Drained);
}

#[test]
fn clients_that_end_within_a_body_leave_nothing_behind() {
    let server = server(|settings| settings.max_concurrent_requests = 2);
    for number in 0..20 {
        let mut stream = server.connect();
        let head = "POST /embed HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{\"inputs";
        stream.write_all(head.as_bytes()).unwrap();
        // Half of them stay to read what is said of it, the others are gone.
        if number % 2 == 0 {
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut said = String::new();
            let _ = stream.read_to_string(&mut said);
            assert!(!said.starts_with("HTTP/1.1 2"), "{said}");
        }
    }
    until(|| gauge(&server, "trt_embed_connections") == 1 && gauge(&server, "trt_embed_active_requests") == 0);
    assert_eq!(server.post("/embed", &json!({ "inputs": "the cat" })).status, 200);
}

#[test]
fn the_port_for_probes_answers_them_alone() {
    let mut settings = Settings::default();
    settings.api_keys = vec!["k".into()];
    let free = SocketAddr::from(([127, 0, 0, 1], 0));
    let server = Server::bind(&[Address::Tcp(free), Address::Probes(free)], vec![served("bert", BERT)], settings).unwrap();
    let [Address::Tcp(_), Address::Probes(probes)] = *server.addresses() else { panic!("{:?}", server.addresses()) };
    let handle = server.handle();
    let thread = std::thread::spawn(move || server.run());
    until(|| handle.is_ready());
    let get = |path: &str, method: &str| {
        let mut stream = TcpStream::connect(probes).unwrap();
        stream.set_read_timeout(Some(server_client::PATIENCE)).unwrap();
        stream.write_all(format!("{method} {path} HTTP/1.1\r\nhost: a\r\nauthorization: k\r\n\r\n").as_bytes()).unwrap();
        read(&mut stream)
    };
    for path in ["/health", "/health/ready", "/health/live", "/metrics"] {
        assert_eq!(get(path, "GET").status, 200, "{path}");
    }
    assert!(String::from_utf8(get("/metrics", "GET").body).unwrap().contains("trt_embed_model_ready{model=\"bert\"} 1"));
    for (path, method) in [("/info", "GET"), ("/embed", "POST"), ("/", "GET")] {
        assert_eq!(get(path, method).status, 404, "{method} {path}");
    }
    handle.stop();
    assert_eq!(thread.join().unwrap().unwrap(), Ended::Drained);
}

#[test]
fn browsers_get_a_page_where_probes_get_health() {
    let server = server(|settings| settings.api_keys = vec!["k".into()]);
    let get =
        |accept: &str| server.send(&format!("GET / HTTP/1.1\r\nhost: a\r\naccept: {accept}\r\nconnection: close\r\n\r\n"), b"");
    let page = get("text/html,application/xhtml+xml,*/*;q=0.8");
    assert_eq!((page.status, page.header("content-type")), (200, Some("text/html; charset=utf-8")));
    let policy = page.header("content-security-policy").unwrap();
    assert!(policy.starts_with("default-src 'none'; script-src 'sha256-") && policy.contains("connect-src 'self'"), "{policy}");
    assert!(page.body.starts_with(b"<!doctype html>"));
    assert_eq!(get("*/*").body, b"ok");
    // What the page reads of the server is there without a key, but for the models' details and vectors.
    let page = String::from_utf8(page.body).unwrap();
    let metrics = String::from_utf8(server.get("/metrics").body).unwrap();
    for metric in ["trt_embed_model_ready", "trt_embed_queue_tokens", "te_request_duration_bucket"] {
        assert!(page.contains(metric) && metrics.contains(metric), "{metric}");
    }
}

#[test]
fn int8_vectors_are_steps_in_the_ranges_of_the_calibration_texts() {
    let texts = ["the cat sat", "a red dog", "stocks fell", "the blue mat"];
    let server = server(|settings| settings.calibration_texts = texts.map(str::to_owned).to_vec());
    let ask = |format: &str, dimensions: usize, text: &str| {
        let body = json!({ "input": text, "encoding_format": format, "dimensions": dimensions });
        let answer = server.post("/v1/embeddings", &body).ok();
        let values = answer["data"][0]["embedding"].as_array().unwrap().clone();
        values.iter().map(|value| value.as_f64().unwrap()).collect::<Vec<f64>>()
    };
    for dimensions in [4, 16] {
        let vectors = texts.map(|text| ask("float", dimensions, text));
        // sentence-transformers: ((embeddings - starts) / steps).astype(uint8), and less 128 before it for int8.
        for (text, vector) in texts.iter().zip(&vectors) {
            let (unsigned, signed) = (ask("uint8", dimensions, text), ask("int8", dimensions, text));
            for place in 0..dimensions {
                let column = vectors.iter().map(|vector| vector[place]);
                let (least, largest) = column.fold((f64::MAX, f64::MIN), |(least, most), now| (least.min(now), most.max(now)));
                let step = (vector[place] - least) / ((largest - least) / 255.0);
                // A step's edge may lie on the other side in 32 bits.
                assert!(
                    (unsigned[place] - step).abs() < 1.001 && (signed[place] - (step - 128.0)).abs() < 1.001,
                    "{text} {place}"
                );
                assert!((0.0..=255.0).contains(&unsigned[place]) && (-128.0..=127.0).contains(&signed[place]));
            }
        }
        // The ends of each range are reached.
        let all = texts.map(|text| ask("uint8", dimensions, text));
        assert!((0..dimensions).all(|place| all.iter().any(|vector| vector[place] == 0.0)));
        assert!((0..dimensions).all(|place| all.iter().any(|vector| vector[place] >= 254.0)));
    }
}

/// A collector that takes one request after the other and hands their bodies over.
fn collector(answer: &'static str) -> (String, std::sync::mpsc::Receiver<serde_json::Value>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let request = read_request(&mut stream);
            // Before the answer, with which the server may end and the test look for what came.
            if sender.send(request).is_err() {
                return;
            }
            stream.write_all(format!("HTTP/1.1 {answer}\r\ncontent-length: 0\r\n\r\n").as_bytes()).unwrap();
        }
    });
    (endpoint, receiver)
}

/// The JSON of a request to /v1/traces.
fn read_request(stream: &mut TcpStream) -> serde_json::Value {
    let mut reader = std::io::BufReader::new(stream);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let start = head.len();
        std::io::BufRead::read_line(&mut reader, &mut head).unwrap();
        let line = head[start..].trim_end();
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    assert!(head.starts_with("POST /v1/traces HTTP/1.1\r\n"), "{head}");
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    serde_json::from_slice(&body).unwrap()
}

#[test]
fn requests_are_spans_of_their_clients_traces() {
    let (endpoint, spans) = collector("200 OK");
    let server = server(|settings| settings.traces = Some(Collector::new(&endpoint, "tried").unwrap()));
    let body = json!({ "inputs": ["the cat", "a dog"] }).to_string();
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let send = |flags: &str, body: &str| {
        let parent = format!("00-{trace}-b7ad6b7169203331-{flags}");
        server.post_with("/embed", &[("traceparent", &parent)], body.as_bytes()).status
    };
    // A probe and a request of a trace that is not kept are none.
    assert_eq!((server.get("/health").status, send("00", &body)), (200, 200));
    assert_eq!((send("01", &body), send("01", "[")), (200, 400));
    // What waits is sent before the server ends.
    assert_eq!(server.stop(), Ended::Drained);
    let mut found = Vec::new();
    while let Ok(request) = spans.try_recv() {
        let resource = &request["resourceSpans"][0]["resource"]["attributes"][0];
        assert_eq!(*resource, json!({ "key": "service.name", "value": { "stringValue": "tried" } }));
        found.extend(request["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().unwrap().clone());
    }
    assert_eq!(found.len(), 2, "{found:#?}");
    for (span, status) in found.iter().zip(["200", "400"]) {
        assert_eq!((&span["traceId"], &span["parentSpanId"]), (&json!(trace), &json!("b7ad6b7169203331")));
        assert_eq!((&span["name"], &span["kind"], &span["status"]), (&json!("POST /embed"), &json!(2), &json!({})));
        let time = |key: &str| span[key].as_str().unwrap().parse::<u64>().unwrap();
        assert!(time("startTimeUnixNano") > 1_700_000_000_000_000_000 && time("endTimeUnixNano") >= time("startTimeUnixNano"));
        let code = json!({ "key": "http.response.status_code", "value": { "intValue": status } });
        assert!(span["attributes"].as_array().unwrap().contains(&code), "{span:#?}");
    }
    assert_ne!(found[0]["spanId"], found[1]["spanId"]);
    assert!(
        found[0]["attributes"].as_array().unwrap().contains(&json!({ "key": "trt_embed.inputs", "value": { "intValue": "2" } }))
    );
}

#[test]
fn a_collector_that_is_gone_holds_nothing_up() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", taken.local_addr().unwrap());
    drop(taken);
    let server = server(|settings| settings.traces = Some(Collector::new(&endpoint, "tried").unwrap()));
    for _ in 0..10 {
        assert_eq!(server.post("/embed", &json!({ "inputs": "the cat" })).status, 200);
    }
    assert_eq!(server.stop(), Ended::Drained);
}

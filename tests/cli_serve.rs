//! `trt-embed serve` as its operators meet it: flags and environment, signals and exit status, log lines.
#![cfg(unix)]

mod cli_model;
mod cli_place;
mod serving;

use cli_place::{PATIENCE, Place};
use nix::sys::signal::Signal;
use serde_json::Value;
use serving::{body, start, started};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

#[test]
fn signals_end_the_server_when_its_work_is_done() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let place = Place::new();
        let mut serving = start(&place, &["-m", "model"], |_| {}).ready();
        assert!(serving.get("/health").starts_with("HTTP/1.1 200 "));
        // A request whose body is not all there is under way.
        let mut stream = serving.half_a_request();
        serving.signal(signal);
        serving.line("ending what is under way; another one ends at once");
        assert!(serving.get("/health/ready").starts_with("HTTP/1.1 503 "));
        stream.write_all(br#""inputs": "cat"}"#).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(body(&answer)[0].as_array().unwrap().len(), cli_model::HIDDEN);
        assert_eq!(serving.status(), Some(0));
    }
}

#[test]
fn work_that_does_not_end_is_cut_off_and_told() {
    let place = Place::new();
    let mut serving = start(&place, &["-m", "model", "--shutdown-timeout", "0.1"], |_| {}).ready();
    let _stream = serving.half_a_request();
    serving.signal(Signal::SIGTERM);
    serving.line("1 requests were cut off after 0.1 s of --shutdown-timeout");
    assert_eq!(serving.status(), Some(1));

    let mut serving = start(&place, &["-m", "model"], |_| {}).ready();
    let _stream = serving.half_a_request();
    serving.signal(Signal::SIGTERM);
    serving.line("another one ends at once");
    serving.signal(Signal::SIGTERM);
    assert_eq!(serving.status(), Some(143));
}

#[test]
fn vectors_are_those_of_the_command() {
    let place = Place::new();
    let serving = start(&place, &["--model", "small=model"], |_| {}).ready();
    let expected = cli_place::rows(&place.embed(&["the cat sat"]).ok()).remove(0).embedding;
    let answer = body(&serving.post("/v1/embeddings", "", r#"{"input": "the cat sat", "model": "small"}"#));
    let got: Vec<f32> =
        answer["data"][0]["embedding"].as_array().unwrap().iter().map(|value| value.as_f64().unwrap() as f32).collect();
    assert_eq!(got, expected);
    assert_eq!(answer["model"], "small");
}

#[test]
fn grpc_has_a_port_of_its_own() {
    let place = Place::new();
    let mut serving = start(&place, &["-m", "model", "--grpc-port", "0"], |_| {});
    let listening = serving.line("listening on grpc://127.0.0.1:");
    let port: String = listening.split("127.0.0.1:").nth(1).unwrap().chars().take_while(char::is_ascii_digit).collect();
    assert_ne!(port, serving.port.to_string());
    let mut stream = TcpStream::connect(("127.0.0.1", port.parse().unwrap())).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // HTTP/2's preface, and settings without any (RFC 9113, 3.4 and 6.5).
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
    let mut frame = [0; 9];
    stream.read_exact(&mut frame).unwrap();
    assert_eq!(frame[3], 4, "{frame:?} is no settings frame");
}

#[test]
fn grpc_and_the_admin_have_sockets_where_they_are_asked_for() {
    let place = Place::new();
    let args = ["-m", "model", "--grpc-unix-socket", "./grpc", "--admin", "./admin", "--linger", "1", "--overtakings", "0"];
    let mut serving = start(&place, &args, |_| {});
    serving.line("listening on unix:./grpc (gRPC)");
    serving.line("listening on unix:./admin (admin)");
    let serving = serving.ready();
    let connect = |name: &str| {
        let stream = UnixStream::connect(place.path(name)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    let mut grpc = connect("grpc");
    grpc.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
    let mut frame = [0; 9];
    grpc.read_exact(&mut frame).unwrap();
    assert_eq!(frame[3], 4, "{frame:?} is no settings frame");
    let admin = |path: &str, body: &str| {
        let (mut stream, length) = (connect("admin"), body.len());
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let models = body(&admin("/admin/load", r#"{"model": "second", "source": "model"}"#));
    assert_eq!((models["models"].as_array().unwrap().len(), &models["models"][1]["names"][0]), (2, &"second".into()));
    body(&serving.post("/embed", "", r#"{"inputs": "the cat sat", "model": "second"}"#));
    let refused = admin("/admin/load", r#"{"model": "third", "source": "nosuch/"}"#);
    assert!(refused.starts_with("HTTP/1.1 424 ") && refused.contains("nosuch/"), "{refused}");
    // The address for requests knows nothing of it.
    assert!(serving.post("/admin/load", "", r#"{"model": "third", "source": "model"}"#).starts_with("HTTP/1.1 404 "));
    assert!(serving.get("/admin/models").starts_with("HTTP/1.1 404 "));
}

#[test]
fn environment_of_text_embeddings_inference_is_honoured() {
    let place = Place::new();
    let serving = start(&place, &[], |command| {
        let variables = [
            ("MODEL_ID", "model"),
            ("API_KEY", "k1,k2"),
            ("SERVED_MODEL_NAME", "served"),
            ("AUTO_TRUNCATE", "false"),
            ("MAX_CLIENT_BATCH_SIZE", "2"),
            ("DEFAULT_PROMPT_NAME", "query"),
            ("JSON_OUTPUT", "true"),
            ("DTYPE", "float32"),
            ("TOKENIZATION_WORKERS", "3"),
            ("UDS_PATH", "/tmp/text-embeddings-inference-server"),
            ("DISABLE_SPANS", "true"),
        ];
        command.envs(variables);
    });
    // Ready is told as JSON, too.
    let mut serving = serving;
    let ready: Value = serde_json::from_str(&serving.line("\"ready\"")).unwrap();
    assert_eq!((&ready["level"], &ready["message"]), (&"INFO".into(), &"ready".into()));
    assert!(serving.get("/info").starts_with("HTTP/1.1 401 "));
    let key = "authorization: Bearer k2\r\nx-request-id: r1\r\n";
    let answer = body(&serving.post("/v1/embeddings", key, r#"{"input": "cat", "model": "served"}"#));
    let expected = cli_place::rows(&place.embed(&["--prompt", "query", "cat"]).ok()).remove(0);
    assert_eq!(
        (answer["model"].as_str(), answer["usage"]["prompt_tokens"].as_u64()),
        (Some("served"), Some(expected.tokens as u64))
    );
    let line: Value = serde_json::from_str(&serving.line("\"r1\"")).unwrap();
    assert_eq!(
        (&line["path"], &line["status"], &line["tokens"]),
        (&"/v1/embeddings".into(), &200.into(), &expected.tokens.into())
    );
    assert_eq!(
        (&line["model"], &line["request_id"], &line["target"]),
        (&"served".into(), &"r1".into(), &"trt_embed::access".into())
    );
    let info = serving.send(&format!("GET /info HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{key}\r\n"));
    assert_eq!(body(&info)["tokenization_workers"], 3);
    let long = format!("{{\"inputs\": \"{}\"}}", "cat ".repeat(30));
    assert!(serving.post("/embed", key, &long).starts_with("HTTP/1.1 422 "));
    assert!(serving.post("/embed", key, r#"{"inputs": ["a", "b", "c"]}"#).starts_with("HTTP/1.1 422 "));
    // Keys stand in no line.
    assert!(!serving.said.concat().contains("k2"), "{:#?}", serving.said);
}

#[test]
fn sockets_of_systemd_are_listened_on() {
    let place = Place::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // As systemd does: the socket is descriptor 3, and the process's own number is in the environment.
    let server =
        place.command(&["serve", "-m", "model", "--backend", "cpu", "--prometheus-port", "0", "--hostname", "127.0.0.1"]);
    let mut command = Command::new("sh");
    command.args(["-c", r#"export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&0 0</dev/null"#, "sh"]);
    command.arg(server.get_program()).args(server.get_args()).current_dir(server.get_current_dir().unwrap());
    for (name, value) in server.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)));
    let mut serving = started(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap(), port);
    serving.line(&format!("listening on http://127.0.0.1:{port}"));
    serving.line("(health and metrics)");
    let serving = serving.ready();
    assert!(serving.get("/health").starts_with("HTTP/1.1 200 "));
}

#[test]
fn servers_that_cannot_be_end_with_a_reason() {
    let place = Place::new();
    let serve = |args: &[&str]| {
        let mut command = place.command(&[&["serve", "--hostname", "127.0.0.1", "--backend", "cpu"], args].concat());
        let output = command.env_remove("MODEL_ID").env_remove("PORT").output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for (args, status, says) in [
        (&["--port", "0"][..], 2, "serve needs a model"),
        (&["--port", &port, "-m", "model"], 1, "cannot listen on http://127.0.0.1:"),
        (&["--port", "0", "-m", "nosuch/"], 1, "nosuch/"),
        (&["--port", "0", "-m", "a=model", "-m", "a=model"], 1, "two models are called a"),
        (&["--port", "0", "-m", "model", "--max-concurrent-requests", "0"], 1, "0 requests at a time"),
        (&["--port", "0", "-m", "model", "--body-timeout", "0"], 2, "outside 0 to 86400"),
        (&["--port", "0", "-m", "model", "--pooling", "auto,cls"], 2, "stands alone"),
        (&["--port", "0", "-m", "model", "--dtype", "float16"], 2, "the CPU backend computes in float32 alone"),
        (&["--port", "0", "-m", "model", "--dense-path", "2_Dense"], 2, "modules.json"),
        (&["--port", "0", "-m", "model", "--hf-api-token", "t"], 2, "HF_TOKEN"),
        (&["--port", "0", "-m", "model", "--huggingface-hub-cache", "/x"], 2, "HF_HUB_CACHE"),
        (&["--port", "0", "-m", "model", "--tls-cert", "a.pem"], 2, "--tls-key"),
        (&["--port", "0", "-m", "model", "--otlp-endpoint", "localhost:4317"], 2, "http://HOST"),
        (&["--port", "0", "-m", "model", "--calibration-texts", "nosuch.txt"], 1, "nosuch.txt"),
        (&["--port", "0", "-m", "model", "--tls-cert", "a.pem", "--tls-key", "a.key"], 1, "a.pem"),
        (&["--port", "0", "-m", "model", "--default-prompt-name", "nosuch"], 1, "nosuch"),
        (&["--port", "0", "-m", "model", "--admin", "0.0.0.0:0"], 1, "can be reached from other machines; give it a key"),
        (&["--port", "0", "-m", "model", "--admin", "nosuch"], 2, "neither a port"),
        (&["--port", "0", "-m", "model", "--admin-key", "k"], 2, "--admin"),
        (&["--port", "0", "-m", "model", "--admin", "0", "--admin-key", "a,,b"], 1, "an admin key is empty"),
        (&["--port", "0", "-m", "model", "--admin", "nosuch/admin"], 1, "cannot listen on unix:nosuch/admin (admin)"),
        (&["--port", "0", "-m", "model", "--linger", "1001"], 2, "outside 0 to 1000"),
        (&["--port", "0", "-m", "model", "--grpc-port", "0", "--grpc-unix-socket", "a"], 2, "--grpc-unix-socket"),
    ] {
        let (code, stderr) = serve(args);
        assert!(code == status && stderr.contains(says) && !stderr.contains("panicked"), "{args:?}: {code} {stderr}");
    }
}

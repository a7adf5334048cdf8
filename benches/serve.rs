//! The server under load on loopback, beside the library and beside other servers: what HTTP adds to a call, 64 clients, a bulk job beside queries,
//! twice the capacity, idle connections. Prints one line a measurement; `benches/RESULTS.md` keeps them.
//!
//!     cargo bench --no-default-features --features serve,cpu,cli --bench serve -- models/all-MiniLM-L6-v2 [one clients bulk overload idle soak]
//!         [--peer NAME=127.0.0.1:PORT/MODEL] [--seconds 10] [--rounds 3] [--job 10000] [--soak-seconds 600]
//!
//! `soak` runs only where it is named, and ends with status 1 where something was wrong (see benches/serve_client/soak.rs).
//! A peer is a server that runs already and answers POST /embeddings as OpenAI does. Servers take turns, round after round.

#[path = "../src/cli/mix.rs"]
#[allow(dead_code, unused_imports)] // ids are not used, and its tests run with the command's
mod mix;
mod serve_client;

use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use mix::Seeded;
use serve_client::{Client, Serving, Tally, closed_loop, open_loop, openai, post};
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use trt_embed::{BackendChoice, Embedder};

/// Clients that ask at a time.
const CLIENTS: usize = 64;
/// Texts that requests are made of, again and again.
const TEXTS: usize = 2048;
/// Tokens that every encoder here has around a text.
const SPECIAL: usize = 2;

struct Options {
    model: String,
    parts: Vec<String>,
    peers: Vec<Peer>,
    time: Duration,
    rounds: usize,
    soak: Duration,
    /// Texts of the bulk job.
    job: usize,
}

struct Peer {
    name: String,
    address: SocketAddr,
    model: String,
}

fn options() -> Options {
    let (time, soak) = (Duration::from_secs(10), Duration::from_secs(600));
    let mut options = Options { model: String::new(), parts: vec![], peers: vec![], time, rounds: 3, soak, job: 10_000 };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| panic!("{arg} needs a value"));
        match arg.as_str() {
            // What cargo passes to every benchmark.
            "--bench" => {}
            "--seconds" => options.time = Duration::from_secs(value().parse().unwrap()),
            "--soak-seconds" => options.soak = Duration::from_secs(value().parse().unwrap()),
            "--job" => options.job = value().parse().unwrap(),
            "--rounds" => options.rounds = value().parse().unwrap(),
            "--peer" => {
                let value = value();
                let (name, place) = value.split_once('=').expect("--peer NAME=ADDRESS/MODEL");
                let (address, model) = place.split_once('/').expect("--peer NAME=ADDRESS/MODEL");
                options.peers.push(Peer { name: name.into(), address: address.parse().unwrap(), model: model.into() });
            }
            "one" | "clients" | "bulk" | "overload" | "idle" | "soak" => options.parts.push(arg),
            _ => options.model = arg,
        }
    }
    assert!(!options.model.is_empty(), "name a model folder: cargo bench --bench serve -- models/all-MiniLM-L6-v2");
    options
}

/// As many tokens as each of `lengths` says, special ones included.
fn texts(seed: u64, length: impl Fn(&mut Seeded) -> usize) -> Vec<String> {
    let mut seeded = Seeded::new(seed);
    (0..TEXTS)
        .map(|_| {
            let words = length(&mut seeded).saturating_sub(SPECIAL).max(1);
            seeded.text(words)
        })
        .collect()
}

/// 6 to 24 tokens.
fn short(seeded: &mut Seeded) -> usize {
    6 + seeded.below(19)
}

fn milliseconds(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

fn say(name: &str, tally: &Tally) {
    println!(
        "{name}: {:.1} requests/s, p50 {}, p99 {}, {} answered, {} refused, {} failed",
        tally.a_second(),
        milliseconds(tally.percentile(0.5)),
        milliseconds(tally.percentile(0.99)),
        tally.answered.len(),
        tally.refused,
        tally.failed
    );
}

/// For so long.
fn during(time: Duration) -> impl Fn(Instant) -> bool + Sync {
    move |began| began.elapsed() >= time
}

/// A server of hyper alone, on one thread, that answers every request with `answer` when it has worked for `work`: what no server over HTTP gets below
/// with the same client and bodies.
fn echo(answer: Vec<u8>, work: Duration) -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let answer = bytes::Bytes::from(answer);
    let serve = async move {
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            let answer = answer.clone();
            let service = hyper::service::service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
                let answer = answer.clone();
                async move {
                    request.into_body().collect().await?;
                    let began = Instant::now();
                    while began.elapsed() < work {
                        std::hint::spin_loop();
                    }
                    Ok::<_, hyper::Error>(hyper::Response::new(Full::new(answer)))
                }
            });
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            tokio::task::spawn_local(async { drop(connection.await) });
        }
    };
    std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, serve);
    });
    address
}

/// One text at a time, the library, the server and a bare echo of its answers in turns of 20: what HTTP adds to the median.
fn one(options: &Options) {
    let embedder = Embedder::builder(&options.model).backend(BackendChoice::Cpu).build().unwrap();
    let server = Serving::start(&options.model, &[]);
    let mut client = Client::new(server.address);
    let texts = texts(1, short);
    // The same text for both: lengths would be noise.
    let requests: Vec<Vec<u8>> = texts.iter().map(|text| post("/embed", &serde_json::json!({ "inputs": text }), "")).collect();
    let (mut work, answer) = (Tally::default(), client.send(&requests[0]).unwrap().1);
    for text in &texts[..200] {
        let asked = Instant::now();
        embedder.embed(&[text]).unwrap();
        work.answered.push(asked.elapsed());
    }
    let work = work.percentile(0.5);
    let mut bare = Client::new(echo(answer, work));
    for round in 0..options.rounds {
        let (mut library, mut http, mut floor, mut empty) =
            (Tally::default(), Tally::default(), Tally::default(), Tally::default());
        let began = Instant::now();
        while began.elapsed() < options.time {
            let first = library.answered.len();
            for turn in 0..24 {
                let asked = Instant::now();
                embedder.embed(&[&texts[(first + turn) % TEXTS]]).unwrap();
                // The first ones find the caches full of the other process.
                if turn >= 4 {
                    library.answered.push(asked.elapsed());
                }
            }
            for turn in 0..24 {
                let asked = Instant::now();
                let (status, _) = client.send(&requests[(first + turn) % TEXTS]).unwrap();
                assert_eq!(status, 200);
                if turn >= 4 {
                    http.answered.push(asked.elapsed());
                }
            }
            for turn in 0..24 {
                let asked = Instant::now();
                bare.send(&requests[(first + turn) % TEXTS]).unwrap();
                if turn >= 4 {
                    floor.answered.push(asked.elapsed());
                }
            }
            for _ in 0..20 {
                let asked = Instant::now();
                client.send(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
                empty.answered.push(asked.elapsed());
            }
        }
        let (ours, through) = (library.percentile(0.5), http.percentile(0.5));
        let micros = |time: Duration, less: Duration| (time.as_secs_f64() - less.as_secs_f64()) * 1e6;
        println!(
            "one, round {round}: library p50 {}, HTTP p50 {}, HTTP adds {:.0} us; an echo adds {:.0} us to as much work, a request that does nothing takes {:.0} us; {} calls each",
            milliseconds(ours),
            milliseconds(through),
            micros(through, ours),
            micros(floor.percentile(0.5), work),
            micros(empty.percentile(0.5), Duration::ZERO),
            http.answered.len()
        );
    }
}

/// Many clients with a text each, all servers in turns.
fn clients(options: &Options) {
    let server = Serving::start(&options.model, &[]);
    let ours = Peer { name: "trt-embed".into(), address: server.address, model: options.model.clone() };
    for (kind, texts) in [("short", texts(2, short)), ("mixed", texts(3, |seeded| seeded.length(256)))] {
        let mut totals = vec![Tally::default(); options.peers.len() + 1];
        for round in 0..=options.rounds {
            for (peer, total) in std::iter::once(&ours).chain(&options.peers).zip(&mut totals) {
                let requests: Vec<Vec<u8>> = texts.iter().map(|text| openai(&peer.model, text)).collect();
                // The first round warms them up.
                let time = if round == 0 { Duration::from_secs(3) } else { options.time };
                let tally = closed_loop(peer.address, CLIENTS, Duration::ZERO, &requests, during(time));
                if round > 0 {
                    say(&format!("{CLIENTS} clients, {kind}, {}, round {round}", peer.name), &tally);
                    total.took += tally.took;
                    total.join(tally);
                }
            }
        }
        for (peer, total) in std::iter::once(&ours).chain(&options.peers).zip(&totals) {
            say(&format!("{CLIENTS} clients, {kind}, {}, all rounds", peer.name), total);
        }
    }
}

/// A job of many texts in one request, alone and beside ten clients with queries.
fn bulk(options: &Options) {
    let server = Serving::start(
        &options.model,
        &["--max-client-batch-size", &options.job.to_string(), "--max-queue-tokens", "1000000", "--request-timeout", "600"],
    );
    let texts = texts(4, short);
    let job: Vec<&String> = texts.iter().cycle().take(options.job).collect();
    let job = post("/embed", &serde_json::json!({ "inputs": job }), "x-priority: bulk\r\n");
    let requests: Vec<Vec<u8>> = texts.iter().map(|text| openai(&options.model, text)).collect();
    let run = || {
        let began = Instant::now();
        let (status, body) = Client::new(server.address).send(&job).unwrap();
        assert_eq!(status, 200, "{}", String::from_utf8_lossy(&body));
        began.elapsed()
    };
    run();
    for round in 0..options.rounds {
        let idle = closed_loop(server.address, 1, Duration::ZERO, &requests, during(Duration::from_secs(3)));
        say(&format!("bulk, round {round}: queries of one client on the idle server"), &idle);
        let alone = run();
        println!(
            "bulk, round {round}: alone {:.2} s, {:.1} texts/s",
            alone.as_secs_f64(),
            options.job as f64 / alone.as_secs_f64()
        );
        for pause in [Duration::from_millis(1000), Duration::from_millis(250), Duration::ZERO] {
            let done = AtomicBool::new(false);
            let (beside, queries) = std::thread::scope(|scope| {
                let job = scope.spawn(|| {
                    let took = run();
                    done.store(true, Ordering::Relaxed);
                    took
                });
                let queries = closed_loop(server.address, 10, pause, &requests, |_| done.load(Ordering::Relaxed));
                (job.join().unwrap(), queries)
            });
            println!(
                "bulk, round {round}: beside ten clients that pause {pause:?}: {:.2} s, {:.1} texts/s, {:.1} % of alone",
                beside.as_secs_f64(),
                options.job as f64 / beside.as_secs_f64(),
                100.0 * alone.as_secs_f64() / beside.as_secs_f64()
            );
            say(&format!("bulk, round {round}: their queries"), &queries);
        }
    }
}

/// As many clients as are let in, then twice the requests that they were answered, for a minute.
fn overload(options: &Options) {
    let most = CLIENTS.to_string();
    let server = Serving::start(&options.model, &["--max-concurrent-requests", &most]);
    let texts = texts(5, short);
    let requests: Vec<Vec<u8>> = texts.iter().map(|text| openai(&options.model, text)).collect();
    closed_loop(server.address, CLIENTS, Duration::ZERO, &requests, during(Duration::from_secs(3)));
    let idle = closed_loop(server.address, 1, Duration::ZERO, &requests, during(Duration::from_secs(3)));
    say("overload: one client before", &idle);
    for round in 0..options.rounds {
        let capacity = closed_loop(server.address, CLIENTS, Duration::ZERO, &requests, during(options.time));
        say(&format!("overload, round {round}: capacity, {CLIENTS} clients"), &capacity);
        let before = server.memory();
        let (stop, seen) = (AtomicBool::new(false), Mutex::new(Vec::new()));
        let rate = 2.0 * capacity.a_second();
        let (over, first, second) = std::thread::scope(|scope| {
            scope.spawn(|| server.watch(&stop, &seen));
            let over = open_loop(server.address, 4 * CLIENTS, rate, Duration::from_secs(60), &requests);
            // Its last answer is there: what does the next client meet?
            let mut client = Client::new(server.address);
            let mut ask = || {
                let asked = Instant::now();
                let (status, _) = client.send(&requests[0]).unwrap();
                (status, asked.elapsed())
            };
            let (first, second) = (ask(), ask());
            stop.store(true, Ordering::Relaxed);
            (over, first, second)
        });
        say(&format!("overload, round {round}: {rate:.0} requests/s for 60 s"), &over);
        let seen = seen.into_inner().unwrap();
        let (least, largest) = seen.iter().fold((f64::MAX, 0.0f64), |(least, most), &now| (least.min(now), most.max(now)));
        println!(
            "overload, round {round}: admitted p99 / at capacity {:.2}; sent {}, without answer {}; memory {before:.0} MB before, {least:.0} to {largest:.0} MB during, {:.0} MB after; \
             first requests after it: {} in {}, {} in {}",
            over.percentile(0.99).as_secs_f64() / capacity.percentile(0.99).as_secs_f64(),
            over.answered.len() + over.refused + over.failed,
            over.failed,
            server.memory(),
            first.0,
            milliseconds(first.1),
            second.0,
            milliseconds(second.1)
        );
    }
}

/// Memory of a thousand connections that say nothing.
fn idle(options: &Options) {
    let server = Serving::start(&options.model, &[]);
    let request = openai(&options.model, "a text");
    Client::new(server.address).send(&request).unwrap();
    let before = server.memory();
    let ask = |_| {
        let mut client = Client::new(server.address);
        client.send(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
        client
    };
    let clients: Vec<Client> = (0..1000).map(ask).collect();
    println!("idle: {before:.1} MB, with {} connections {:.1} MB more", clients.len(), server.memory() - before);
}

fn main() {
    let options = options();
    for (name, part) in
        [("one", one as fn(&Options)), ("clients", clients), ("bulk", bulk), ("overload", overload), ("idle", idle)]
    {
        if options.parts.is_empty() || options.parts.iter().any(|asked| asked == name) {
            part(&options);
        }
    }
    if options.parts.iter().any(|part| part == "soak") && !serve_client::soak::run(&options.model, &texts(6, short), options.soak)
    {
        std::process::exit(1);
    }
}

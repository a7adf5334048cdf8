//! What happens side by side at the admin's door: loads that do not end, requests on a model that goes, a model that fails. The rest is tested from
//! outside, in tests/server_admin.rs.

use super::super::admin::Admin;
use super::*;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A server with an admin.
struct Administered {
    server: Running,
    admin: SocketAddr,
}

/// Loads models on `fake`, the second time and later when it is told so.
fn gated(fake: &Arc<Fake>) -> (Loader, mpsc::Sender<()>) {
    let (go, wait) = mpsc::channel();
    let (fake, wait, loads) = (fake.clone(), Mutex::new(wait), AtomicUsize::new(0));
    let load = move || {
        if loads.fetch_add(1, Ordering::SeqCst) > 0 {
            wait.lock().unwrap().recv_timeout(PATIENCE).unwrap();
        }
        Ok(model(&fake, 1000))
    };
    (Arc::new(load), go)
}

/// Loads models on `fake` at once.
fn plain(fake: &Arc<Fake>) -> Loader {
    let fake = fake.clone();
    Arc::new(move || Ok(model(&fake, 1000)))
}

fn administered(models: Vec<(&str, Loader)>, change: impl FnOnce(&mut Settings)) -> Administered {
    let mut settings = Settings { admin: Some(Admin::new(Arc::new(|source| Err(source.into())))), ..Settings::default() };
    change(&mut settings);
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    let addresses = [Address::Tcp(loopback), Address::Grpc(loopback), Address::Admin(loopback)];
    let models = models.into_iter().map(|(name, load)| (vec![name.to_owned()], load)).collect();
    let server = Server::with_loaders(&addresses, models, settings).unwrap();
    let [Address::Tcp(address), Address::Grpc(grpc), Address::Admin(admin)] = *server.addresses() else { panic!("no TCP") };
    let handle = server.handle();
    let server = Running { address, grpc, handle, thread: Some(std::thread::spawn(move || server.run())) };
    until(|| server.handle.is_ready());
    Administered { server, admin }
}

impl Administered {
    fn open(&self, request: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.admin).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        stream
    }

    fn begin(&self, action: &str, model: &str) -> TcpStream {
        self.open(&post(&format!("/admin/{action}"), &json!({ "model": model })))
    }

    fn entry(&self, place: usize) -> Value {
        let (status, body) = read(self.open("GET /admin/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"));
        assert_eq!(status, 200, "{body}");
        serde_json::from_str::<Value>(&body).unwrap()["models"][place].clone()
    }

    /// Asks `model` for the vector of the row of ids that begins with `id`.
    fn ask(&self, model: &str, id: u32) -> TcpStream {
        self.server.open(&post("/embed", &json!({ "inputs": [[id, 7]], "model": model })))
    }
}

#[test]
fn loads_that_cross_or_are_too_many_are_refused() {
    let fake = Fake::new(usize::MAX);
    let [(a, go_a), (b, go_b), (c, _go_c)] = [0; 3].map(|_| gated(&fake));
    let run = administered(vec![("a", a), ("b", b), ("c", c)], |_| {});
    let first = run.begin("reload", "a");
    until(|| run.entry(0)["under_way"] == "reload");
    for action in ["reload", "remove"] {
        assert_eq!(error_type(read(run.begin(action, "a"))), (409, "Conflict".into()), "{action}");
    }
    let second = run.begin("reload", "b");
    until(|| run.entry(1)["under_way"] == "reload");
    let mut third = run.begin("reload", "c");
    let mut said = String::new();
    third.read_to_string(&mut said).unwrap();
    assert!(said.starts_with("HTTP/1.1 429 ") && said.contains("retry-after: 1"), "{said}");
    // They serve all the while.
    assert!(["a", "b", "c"].iter().all(|model| read(run.ask(model, 20)).0 == 200) && run.server.handle.is_ready());
    go_a.send(()).unwrap();
    go_b.send(()).unwrap();
    assert_eq!((read(first).0, read(second).0), (200, 200));
    assert!((0..3).all(|place| run.entry(place)["under_way"].is_null()));
    assert_eq!(read(run.begin("remove", "b")).0, 200);
}

#[test]
fn a_load_goes_on_without_its_client_and_ends_with_the_server() {
    let fake = Fake::new(usize::MAX);
    let (load, go) = gated(&fake);
    let run = administered(vec![("a", load)], |_| {});
    let before = run.server.handle.state.model(None).unwrap();
    let client = run.begin("reload", "a");
    until(|| run.entry(0)["under_way"] == "reload");
    drop(client);
    // The connection that asks is the only one.
    until(|| run.server.get("/metrics").1.contains("trt_embed_connections 1"));
    go.send(()).unwrap();
    until(|| run.entry(0)["under_way"].is_null());
    assert!(!Arc::ptr_eq(&before, &run.server.handle.state.model(None).unwrap()));
    let waiting = run.begin("reload", "a");
    until(|| run.entry(0)["under_way"] == "reload");
    run.server.handle.stop();
    assert_eq!(error_type(read(waiting)), (503, "Unhealthy".into()));
    // The load itself is not waited for.
    assert_eq!(run.server.stop(), Ended::Drained);
    drop(go);
}

#[test]
fn requests_on_a_model_that_goes_are_answered() {
    let (kept, gone) = (Fake::new(usize::MAX), Fake::new(0));
    let run = administered(vec![("a", plain(&kept)), ("b", plain(&gone))], |_| {});
    for (action, then) in [("reload", 200), ("remove", 404)] {
        gone.change(|doing| (doing.gate, doing.begun) = (0, Vec::new()));
        let running = run.ask("b", 20);
        until(|| gone.begun() == [20]);
        let waiting = run.ask("b", 21);
        until(|| run.server.handle.state.model(Some("b")).unwrap().embedder.queue().interactive.texts == 1);
        assert_eq!(read(run.begin(action, "b")).0, 200, "{action}");
        gone.change(|doing| doing.gate = usize::MAX);
        assert_eq!((read(running).0, read(waiting).0, read(run.ask("b", 22)).0), (200, 200, then), "{action}");
    }
}

#[test]
fn a_model_that_fails_is_told_and_put_right_or_removed() {
    let (well, broken) = (Fake::new(usize::MAX), Fake::new(usize::MAX));
    let (a, b) = (Arc::new(Mutex::new(broken.clone())), broken.clone());
    let current = a.clone();
    let load: Loader = Arc::new(move || Ok(model(&current.lock().unwrap().clone(), 1000)));
    // It does not come back by itself while this runs.
    let run = administered(vec![("a", load), ("b", plain(&b))], |settings| settings.recovery_delay = PATIENCE);
    broken.change(|doing| doing.probe = Probe::Fails);
    until(|| run.entry(0)["state"] == "failing" && run.entry(1)["state"] == "failing");
    assert!(run.entry(0)["reason"].as_str().unwrap().contains("fell off the bus"));
    assert_eq!(read(run.ask("a", 20)).0, 503);
    *a.lock().unwrap() = well;
    assert_eq!(read(run.begin("reload", "a")).0, 200);
    assert_eq!((run.entry(0)["state"].clone(), read(run.ask("a", 20)).0), ("ready".into(), 200));
    // The other one still keeps the server from being ready.
    assert!(!run.server.handle.is_ready());
    assert_eq!(read(run.begin("remove", "b")).0, 200);
    assert!(run.server.handle.is_ready());
}

#[test]
fn nobody_waits_for_a_removed_model_to_come_back() {
    let (well, broken) = (Fake::new(usize::MAX), Fake::new(usize::MAX));
    let loads = Arc::new(AtomicUsize::new(0));
    let (counted, fake) = (loads.clone(), broken.clone());
    let load = move || match counted.fetch_add(1, Ordering::SeqCst) {
        0 => Ok(model(&fake, 1000)),
        _ => Err(Error::Backend { backend: "fake", reason: "it is gone".into() }),
    };
    let run = administered(vec![("a", plain(&well)), ("b", Arc::new(load))], |settings| {
        (settings.recovery_delay, settings.recovery_timeout) = (Duration::from_millis(20), Duration::from_secs(3));
    });
    broken.change(|doing| doing.probe = Probe::Fails);
    until(|| loads.load(Ordering::SeqCst) > 1);
    assert_eq!(run.entry(1)["state"], "recovering");
    assert_eq!(read(run.begin("remove", "b")).0, 200);
    // By then the server would have ended for it.
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(read(run.ask("a", 20)).0, 200);
    assert_eq!(run.server.stop(), Ended::Drained);
}

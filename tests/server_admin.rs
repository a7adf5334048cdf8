//! The admin's door over loopback: models are told, loaded, reloaded and removed while requests are answered; what is refused changes nothing.

mod cli_model;
mod server_client;

use serde_json::{Value, json};
use server_client::{Answer, LOOPBACK, PATIENCE, Running, post_head, read, rows, served, start, start_also_on, until};
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use tempfile::TempDir;
use trt_embed::server::{Address, Admin, Ended, ServeError, Server, Settings};
use trt_embed::{BackendChoice, Embedder, EmbedderBuilder, Normalize};

const BERT: &str = "tests/fixtures/bert";

/// A server of `tiny` with an admin, and the folder of that model.
struct Administered {
    server: Running,
    admin: SocketAddr,
    folder: TempDir,
}

fn library(folder: &str) -> EmbedderBuilder {
    Embedder::builder(folder).backend(BackendChoice::Cpu).batch_size(1)
}

/// Opens as [`served`] does; a source in brackets is refused.
fn admin(keys: &[&str]) -> Admin {
    let open = |source: &str| match source.starts_with('<') {
        true => Err(format!("{source} is no source")),
        false => Ok(library(source)),
    };
    let mut admin = Admin::new(Arc::new(open));
    admin.keys = keys.iter().map(|&key| key.to_owned()).collect();
    admin
}

fn administered(change: impl FnOnce(&mut Settings)) -> Administered {
    let folder = tempfile::tempdir().unwrap();
    cli_model::write(folder.path());
    let mut settings = Settings::default();
    settings.admin = Some(admin(&[]));
    change(&mut settings);
    let models = vec![served("tiny", folder.path().to_str().unwrap())];
    let (server, others) = start_also_on(&[Address::Admin(LOOPBACK)], models, settings);
    let [Address::Admin(admin)] = others[..] else { panic!("{others:?}") };
    Administered { server, admin, folder }
}

impl Administered {
    fn send(&self, head: &str, body: &[u8]) -> Answer {
        let mut stream = TcpStream::connect(self.admin).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
        read(&mut stream)
    }

    fn ask(&self, path: &str, body: &Value) -> Answer {
        let body = body.to_string();
        self.send(&post_head(path, &[], body.len()), body.as_bytes())
    }

    fn get(&self, path: &str) -> Answer {
        self.send(&format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"), b"")
    }

    /// Names and states of the models.
    fn models(&self) -> Vec<(String, String)> {
        names_and_states(&self.get("/admin/models").ok())
    }

    fn metrics(&self) -> String {
        String::from_utf8(self.server.get("/metrics").body).unwrap()
    }

    fn vector(&self, model: &str) -> Vec<f32> {
        rows(&self.server.post("/embed", &json!({ "inputs": "the cat sat", "model": model })).ok()).remove(0)
    }

    /// The vector of a request that names no model.
    fn default_vector(&self) -> Vec<f32> {
        rows(&self.server.post("/embed", &json!({ "inputs": "the cat sat" })).ok()).remove(0)
    }
}

fn names_and_states(list: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    list["models"].as_array().unwrap().iter().map(|model| (text(&model["names"][0]), text(&model["state"]))).collect()
}

fn ready(names: &[&str]) -> Vec<(String, String)> {
    names.iter().map(|&name| (name.to_owned(), "ready".to_owned())).collect()
}

fn expected(folder: &str) -> Vec<f32> {
    library(folder).normalize(Normalize::On).build().unwrap().embed(&["the cat sat"]).unwrap().rows().next().unwrap().to_vec()
}

/// Makes the model another one: its vectors are those of the first token.
fn change_pooling(folder: &Path) {
    let file = folder.join("1_Pooling/config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    (config["pooling_mode_cls_token"], config["pooling_mode_mean_tokens"]) = (true.into(), false.into());
    std::fs::write(file, config.to_string()).unwrap();
}

#[track_caller]
fn refused(answer: &Answer, status: u16, error_type: &str, says: &str) {
    let body = answer.json();
    assert_eq!((answer.status, body["error_type"].as_str()), (status, Some(error_type)), "{body}");
    assert!(body["error"].as_str().unwrap().contains(says), "{body}");
}

#[test]
fn models_are_loaded_reloaded_and_removed_while_the_server_serves() {
    let run = administered(|_| {});
    let tiny = run.folder.path().to_str().unwrap();
    let (first, bert) = (expected(tiny), expected(BERT));
    let told = run.get("/admin/models").ok();
    assert_eq!(
        told["models"],
        json!([{
            "names": ["tiny"], "default": true, "state": "ready", "reason": null, "under_way": null, "source": tiny, "backend": "cpu",
            "dimensions": cli_model::HIDDEN, "max_input_length": cli_model::MAX_TOKENS
        }])
    );
    assert_eq!(run.server.post("/embed", &json!({ "inputs": "a", "model": "more" })).status, 404);

    let loaded = run.ask("/admin/load", &json!({ "model": "more", "source": BERT })).ok();
    assert_eq!(names_and_states(&loaded), ready(&["tiny", "more"]));
    assert_eq!((run.vector("more"), run.vector("tiny"), run.default_vector()), (bert.clone(), first.clone(), first.clone()));
    let names = run.server.get("/v1/models").ok();
    assert_eq!((&names["data"][0]["id"], &names["data"][1]["id"]), (&json!("tiny"), &json!("more")));
    assert!(run.metrics().contains("trt_embed_model_ready{model=\"more\"} 1"));

    // The folder has changed, and the model does when it is read again.
    change_pooling(run.folder.path());
    assert_eq!(run.vector("tiny"), first);
    assert_eq!(names_and_states(&run.ask("/admin/reload", &json!({ "model": "tiny" })).ok()), ready(&["tiny", "more"]));
    let second = expected(tiny);
    assert_ne!(second, first);
    assert_eq!((run.vector("tiny"), run.default_vector()), (second, expected(tiny)));
    // Another model takes its place under its name.
    assert_eq!(run.ask("/admin/reload", &json!({ "model": "tiny", "source": BERT })).status, 200);
    assert_eq!((run.vector("tiny"), run.default_vector()), (bert.clone(), bert.clone()));

    let left = run.ask("/admin/remove", &json!({ "model": "more" })).ok();
    assert_eq!(names_and_states(&left), ready(&["tiny"]));
    refused(&run.server.post("/embed", &json!({ "inputs": "a", "model": "more" })), 404, "Validation", "there are: tiny");
    assert!(!run.metrics().contains("model=\"more\""));
    assert!(run.server.handle.is_ready());
    // Its name is free again.
    assert_eq!(run.ask("/admin/load", &json!({ "model": "more", "source": tiny })).status, 200);
    assert_eq!(run.server.stop(), Ended::Drained);
}

#[test]
fn what_cannot_be_loaded_changes_nothing() {
    let run = administered(|_| {});
    let before = run.vector("tiny");
    for (path, body, status, error_type, says) in [
        ("/admin/load", json!({ "model": "more", "source": "nosuch/" }), 424, "Backend", "the model `more` cannot be loaded"),
        ("/admin/load", json!({ "model": "more", "source": "<more>" }), 422, "Validation", "<more> is no source"),
        ("/admin/load", json!({ "model": "more", "source": "" }), 400, "Empty", "`source`"),
        ("/admin/load", json!({ "model": "", "source": BERT }), 400, "Empty", "`model`"),
        ("/admin/load", json!({ "model": "a\nb", "source": BERT }), 422, "Validation", "`model`"),
        ("/admin/load", json!({ "model": "a".repeat(201), "source": BERT }), 422, "Validation", "at most 200"),
        ("/admin/load", json!({ "model": "tiny", "source": BERT }), 409, "Conflict", "reload it"),
        ("/admin/load", json!({ "model": "more" }), 422, "Validation", "missing field `source`"),
        ("/admin/reload", json!({ "model": "tiny", "source": "nosuch/" }), 424, "Backend", "nosuch/"),
        ("/admin/reload", json!({ "model": "tiny", "sorce": BERT }), 422, "Validation", "unknown field `sorce`"),
        ("/admin/reload", json!({ "model": "more" }), 404, "Validation", "does not exist; there are: tiny"),
        ("/admin/remove", json!({ "model": "more" }), 404, "Validation", "does not exist; there are: tiny"),
        ("/admin/remove", json!({ "model": "tiny" }), 409, "Conflict", "cannot be removed"),
        ("/admin/nosuch", json!({}), 404, "Validation", "no such route"),
        ("/admin/models", json!({}), 405, "Validation", "does not answer that method"),
        ("/embed", json!({ "inputs": "a" }), 404, "Validation", "no such route"),
    ] {
        refused(&run.ask(path, &body), status, error_type, says);
        assert_eq!(run.models(), ready(&["tiny"]), "{path} {body}");
    }
    // A folder that has become unreadable: what was read serves on.
    std::fs::remove_file(run.folder.path().join("config.json")).unwrap();
    refused(&run.ask("/admin/reload", &json!({ "model": "tiny" })), 424, "Backend", "cannot be loaded");
    assert_eq!(run.models(), ready(&["tiny"]));
    assert_eq!(run.vector("tiny"), before);
    // Admins that fail are no failures of the service.
    assert!(!run.metrics().contains("te_request_failure"));
    let untyped = run.send(&post_head("/admin/remove", &[("content-type", "text/plain")], 2), b"{}");
    refused(&untyped, 415, "Validation", "Content-Type");
}

#[test]
fn the_admins_door_has_keys_of_its_own() {
    let run = administered(|settings| {
        settings.api_keys = vec!["embed".into()];
        settings.admin = Some(admin(&["first", "second"]));
    });
    let get = |key: &str| {
        run.send(
            &format!("GET /admin/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\nauthorization: Bearer {key}\r\n\r\n"),
            b"",
        )
    };
    for key in ["first", "second"] {
        assert_eq!(names_and_states(&get(key).ok()), ready(&["tiny"]));
    }
    for key in ["embed", "", "firs", "third"] {
        refused(&get(key), 401, "Unauthorized", "an admin key is needed");
    }
    let without = run.ask("/admin/remove", &json!({ "model": "tiny" }));
    refused(&without, 401, "Unauthorized", "an admin key is needed");
    assert_eq!(without.header("www-authenticate"), Some("Bearer"));
    // Nor is an admin's key one for vectors.
    let head = |key: &str| [("authorization", format!("Bearer {key}"))];
    for (key, status) in [("embed", 200), ("first", 401)] {
        let [(name, value)] = head(key);
        assert_eq!(run.server.post_with("/embed", &[(name, &value)], br#"{"inputs": "a"}"#).status, status, "{key}");
    }
    // A page with the key may ask; what describes the routes is no secret.
    let with_origin = [("origin", "http://a"), ("authorization", "Bearer first")];
    assert_eq!(run.send(&post_head("/admin/reload", &with_origin, 17), br#"{"model": "tiny"}"#).status, 200);
    assert_eq!((run.get("/docs").status, run.get("/openapi.json").status), (200, 200));
}

#[test]
fn pages_of_a_browser_may_not_administer_a_server_without_keys() {
    let run = administered(|_| {});
    let body = br#"{"model": "tiny", "source": "tests/fixtures/bert"}"#;
    let answer = run.send(&post_head("/admin/reload", &[("origin", "http://evil.example")], body.len()), body);
    refused(&answer, 401, "Unauthorized", "Origin");
    assert!(answer.header("access-control-allow-origin").is_none());
    assert_eq!(run.vector("tiny"), expected(run.folder.path().to_str().unwrap()));
}

#[test]
fn without_an_admin_there_are_no_such_routes() {
    let server = start(vec![served("bert", BERT)], Settings::default());
    for path in ["/admin/models", "/admin/load"] {
        assert_eq!((server.get(path).status, server.post(path, &json!({})).status), (404, 404), "{path}");
    }
    // The other description never tells of them, and with an admin its own one does.
    let described = |answer: Answer| answer.ok()["paths"].as_object().unwrap().keys().any(|path| path.starts_with("/admin"));
    assert!(!described(server.get("/openapi.json")));
    let run = administered(|_| {});
    assert!(!described(run.server.get("/openapi.json")));
    assert_eq!(run.server.get("/admin/models").status, 404);
    let document = run.get("/openapi.json").ok();
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    let schema = &document["components"]["schemas"]["Model"];
    let keys: Vec<&String> = schema["properties"].as_object().unwrap().keys().collect();
    let told = run.get("/admin/models").ok();
    assert_eq!(told["models"][0].as_object().unwrap().keys().collect::<Vec<_>>(), keys);
}

#[test]
fn an_admin_that_anybody_could_be_is_refused() {
    let bind = |address: Address, admin: Option<Admin>| {
        let mut settings = Settings::default();
        settings.admin = admin;
        Server::bind(&[Address::Tcp(LOOPBACK), address], vec![served("bert", BERT)], settings).map(drop)
    };
    let everywhere = Address::Admin(SocketAddr::from(([0, 0, 0, 0], 0)));
    for (address, admin, says) in [
        (everywhere.clone(), Some(admin(&[])), "can be reached from other machines; give it a key"),
        (Address::Admin(LOOPBACK), Some(admin(&["a", ""])), "an admin key is empty"),
        (Address::Admin(LOOPBACK), None, "do not say what an admin may do"),
    ] {
        match bind(address, admin) {
            Err(ServeError::Setting { reason }) => assert!(reason.contains(says), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
    bind(everywhere, Some(admin(&["key"]))).unwrap();
}

#[test]
fn a_socket_of_the_admin_is_its_users_alone() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("admin");
    let mut settings = Settings::default();
    settings.admin = Some(admin(&[]));
    let (server, others) = start_also_on(&[Address::AdminUnix(path.clone())], vec![served("bert", BERT)], settings);
    assert_eq!(others, [Address::AdminUnix(path.clone())]);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"GET /admin/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").unwrap();
    assert_eq!(names_and_states(&read(&mut stream).ok()), ready(&["bert"]));
    assert_eq!(server.stop(), Ended::Drained);
    until(|| !path.exists());
}

/// Requests that come while the model is exchanged again and again are all answered, each by one of the two.
#[test]
fn requests_see_the_old_model_or_the_new_one() {
    let run = administered(|_| {});
    let (tiny, sources) = (run.folder.path().to_str().unwrap(), [BERT, run.folder.path().to_str().unwrap()]);
    let (old, new) = (expected(tiny), expected(BERT));
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let mut seen = [0, 0];
                    while !done.load(std::sync::atomic::Ordering::Relaxed) || seen == [0, 0] {
                        let vector = run.vector("tiny");
                        assert!(vector == old || vector == new, "{vector:?}");
                        seen[usize::from(vector == new)] += 1;
                    }
                    seen
                })
            })
            .collect();
        for turn in 0..6 {
            assert_eq!(run.ask("/admin/reload", &json!({ "model": "tiny", "source": sources[turn % 2] })).status, 200);
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        for asking in asking {
            asking.join().unwrap();
        }
    });
    assert_eq!(run.vector("tiny"), old);
}

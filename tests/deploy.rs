//! The files of deploy/: that they parse, and that what they name of the server is there.

mod server_client;

use saphyr::{LoadableYamlNode, Yaml};
use serde_json::{Value, json};
use server_client::{Running, served, start};
use std::collections::BTreeSet;
use std::path::Path;
use trt_embed::server::Settings;

fn text(path: &str) -> String {
    std::fs::read_to_string(Path::new("deploy").join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A server that has counted something of every kind.
fn server() -> Running {
    let mut settings = Settings::default();
    settings.payload_limit = 1000;
    let server = start(vec![served("bert", "tests/fixtures/bert")], settings);
    assert_eq!(server.post("/embed", &json!({ "inputs": "the cat" })).status, 200);
    assert_eq!(server.post("/embed", &json!({ "inputs": "cat ".repeat(1000) })).status, 413);
    server
}

/// Names of metrics in `text`, without what histograms put behind theirs.
fn metrics(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let named = words.filter(|word| word.starts_with("te_") || word.starts_with("trt_embed_"));
    let base = |word: &str| {
        let end = ["_bucket", "_sum", "_count"].iter().find_map(|end| word.strip_suffix(end));
        // These two are counters of TEI's own names.
        if matches!(word, "te_request_count" | "te_embed_count") { word.to_owned() } else { end.unwrap_or(word).to_owned() }
    };
    named.map(base).collect()
}

/// The metrics that the server gives.
fn given(server: &Running) -> BTreeSet<String> {
    let answer = String::from_utf8(server.get("/metrics").body).unwrap();
    let kinds = answer.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    kinds.map(str::to_owned).collect()
}

#[test]
fn the_dashboard_shows_every_metric_and_no_other() {
    let dashboard: Value = serde_json::from_str(&text("grafana/dashboard.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let (mut ids, mut shown) = (BTreeSet::new(), BTreeSet::new());
    for panel in panels {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "two panels have one id: {panel}");
        for target in panel["targets"].as_array().unwrap() {
            let expression = target["expr"].as_str().unwrap();
            assert_eq!(expression.matches('(').count(), expression.matches(')').count(), "{expression}");
            shown.extend(metrics(expression));
        }
    }
    assert_eq!(shown, given(&server()));
}

/// The documents of a YAML file.
fn documents(text: &str) -> Vec<Yaml<'_>> {
    Yaml::load_from_str(text).unwrap()
}

/// The value at `path`, its steps with slashes between them; numbers are places in lists.
#[track_caller]
fn at<'a>(yaml: &'a Yaml<'a>, path: &str) -> &'a Yaml<'a> {
    path.split('/').fold(yaml, |yaml, step| {
        let found = match step.parse::<usize>() {
            Ok(place) => yaml.as_sequence_get(place),
            Err(_) => yaml.as_mapping_get(step),
        };
        found.unwrap_or_else(|| panic!("no {step} of {path}"))
    })
}

#[test]
fn kubernetes_asks_what_the_server_answers() {
    let file = text("kubernetes/trt-embed.yaml");
    let documents = documents(&file);
    let kinds: Vec<&str> = documents.iter().map(|one| at(one, "kind").as_str().unwrap()).collect();
    assert_eq!(kinds, ["Deployment", "Service", "HorizontalPodAutoscaler"]);
    let server = server();
    let container = at(&documents[0], "spec/template/spec/containers/0");
    for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
        let path = at(container, &format!("{probe}/httpGet/path")).as_str().unwrap();
        assert_eq!(server.get(path).status, 200, "{probe} {path}");
    }
    assert_eq!(at(container, "ports/0/containerPort").as_integer(), Some(3000));
    // It scales by a metric that is there, and the adapter's rule in the comment is for the same.
    let metric = at(&documents[2], "spec/metrics/0/pods/metric/name").as_str().unwrap();
    assert!(given(&server).contains(metric), "{metric}");
    assert!(file.contains(&format!("#   - seriesQuery: '{metric}{{")));
    // What is asked to end has longer than it takes.
    let grace = at(&documents[0], "spec/template/spec/terminationGracePeriodSeconds").as_integer().unwrap();
    assert!(grace > Settings::default().shutdown_timeout.as_secs() as i64);
}

#[test]
fn compose_mounts_what_is_there() {
    let file = text("compose.yaml");
    let documents = documents(&file);
    let services = at(&documents[0], "services");
    assert_eq!(at(services, "trt-embed/build/dockerfile").as_str(), Some("deploy/Dockerfile"));
    let target = at(services, "trt-embed/build/target").as_str().unwrap();
    assert!(text("Dockerfile").contains(&format!(" AS {target}\n")), "{target}");
    for service in ["prometheus", "grafana"] {
        for volume in at(services, &format!("{service}/volumes")).as_sequence().unwrap() {
            let file = volume.as_str().unwrap().split(':').next().unwrap();
            assert!(Path::new("deploy").join(file).is_file(), "{file}");
        }
    }
    for file in ["prometheus.yml", "grafana/datasource.yaml", "grafana/provider.yaml"] {
        let text = text(file);
        assert_eq!(Yaml::load_from_str(&text).unwrap().len(), 1, "{file}");
    }
    let prometheus = text("prometheus.yml");
    let scraped = Yaml::load_from_str(&prometheus).unwrap();
    assert_eq!(at(&scraped[0], "scrape_configs/0/static_configs/0/targets/0").as_str(), Some("trt-embed:3000"));
}

#[test]
fn units_have_their_sections() {
    for (file, sections) in
        [("trt-embed.service", ["Unit", "Service", "Install"]), ("trt-embed.socket", ["Unit", "Socket", "Install"])]
    {
        let text = text(&format!("systemd/{file}"));
        let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        let (headers, settings): (Vec<&str>, Vec<&str>) = lines.partition(|line| line.starts_with('['));
        assert_eq!(headers, sections.map(|section| format!("[{section}]")), "{file}");
        for setting in settings {
            let (name, value) = setting.split_once('=').unwrap_or_else(|| panic!("{file}: {setting}"));
            assert!(name.chars().all(|c| c.is_ascii_alphanumeric()) && !value.is_empty(), "{file}: {setting}");
        }
    }
    assert!(text("systemd/trt-embed.socket").contains("\nListenStream=3000\n"));
    assert!(text("systemd/trt-embed.service").contains("\nExecStart=/usr/local/bin/trt-embed serve\n"));
}

#[test]
fn images_are_built_with_features_that_there_are() {
    let manifest = std::fs::read_to_string("Cargo.toml").unwrap();
    let file = text("Dockerfile");
    let builds: Vec<&str> =
        file.lines().filter_map(|line| line.split_once("--features ").map(|(_, features)| features)).collect();
    assert_eq!(builds.len(), 2);
    for feature in builds.iter().flat_map(|features| features.split(',')) {
        assert!(manifest.contains(&format!("\n{feature} = [")), "{feature}");
    }
}

//! Where log lines go, which of them, and in what form.

/// How a verb logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Warnings, unless more is asked for.
    Command,
    /// What a service does too: a line a request.
    #[cfg(feature = "serve")]
    Service,
    /// As [`Style::Service`], each line an object of JSON.
    #[cfg(feature = "serve")]
    ServiceJson,
}

/// Installs the logger. `verbose` counts -v; RUST_LOG overrides it.
pub fn install(verbose: u8, style: Style) {
    let more = if style == Style::Command { 0 } else { 1 };
    let level = match verbose.saturating_add(more) {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let mut builder = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level));
    #[cfg(feature = "serve")]
    if style == Style::ServiceJson {
        builder.format(|to, record| {
            use std::io::Write;
            writeln!(to, "{}", json::line(record, &to.timestamp_millis().to_string()))
        });
    }
    builder.init();
}

#[cfg(feature = "serve")]
mod json {
    use log::kv::{Error, Key, Value, VisitSource};
    use serde_json::{Map, Value as Json};

    /// `record` as an object of JSON: timestamp, level, target, message, and its fields.
    pub fn line(record: &log::Record<'_>, timestamp: &str) -> Json {
        let mut fields = Fields(Map::new());
        for (name, value) in [
            ("timestamp", timestamp.to_owned()),
            ("level", record.level().to_string()),
            ("target", record.target().to_owned()),
            ("message", record.args().to_string()),
        ] {
            fields.0.insert(name.into(), value.into());
        }
        // No field of this program fails.
        let _ = record.key_values().visit(&mut fields);
        Json::Object(fields.0)
    }

    struct Fields(Map<String, Json>);

    impl<'kv> VisitSource<'kv> for Fields {
        fn visit_pair(&mut self, key: Key<'kv>, value: Value<'kv>) -> Result<(), Error> {
            let json = match (value.to_u64(), value.to_f64()) {
                (Some(number), _) => Json::from(number),
                (None, Some(number)) => Json::from(number),
                (None, None) => Json::from(value.to_string()),
            };
            self.0.insert(key.as_str().to_owned(), json);
            Ok(())
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn fields_keep_their_kind() {
            let fields = [("id", Value::from("a\"b")), ("status", Value::from(200u16)), ("ms", Value::from(1.5))];
            let mut builder = log::Record::builder();
            let builder = builder.level(log::Level::Info).target("t").key_values(&fields);
            let line = line(&builder.args(format_args!("said")).build(), "now").to_string();
            let read: Json = serde_json::from_str(&line).unwrap();
            assert_eq!(
                read,
                serde_json::json!({ "timestamp": "now", "level": "INFO", "target": "t", "message": "said", "id": "a\"b", "status": 200, "ms": 1.5 })
            );
        }
    }
}

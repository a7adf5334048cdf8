//! What the HTTP routes take and give, for programs (OpenAPI) and for people. The description is kept by hand; tests compare it with the routes, with
//! what the server reads, and with what it answers.

use axum::http::{HeaderValue, header};
use axum::response::{Html, IntoResponse, Response};
use std::sync::LazyLock;

static DOCUMENT: LazyLock<String> = LazyLock::new(|| versioned(include_str!("openapi.json")));

/// The admin's routes, which have an address of their own: nothing of them stands in the other description.
static ADMIN_DOCUMENT: LazyLock<String> = LazyLock::new(|| versioned(include_str!("openapi_admin.json")));

fn versioned(document: &str) -> String {
    document.replacen("\"VERSION\"", concat!("\"", env!("CARGO_PKG_VERSION"), "\""), 1)
}

/// GET /openapi.json, and /api-doc/openapi.json as in TEI.
pub(super) async fn document() -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], DOCUMENT.as_str()).into_response()
}

/// GET /openapi.json on the admin's address.
pub(super) async fn admin_document() -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], ADMIN_DOCUMENT.as_str()).into_response()
}

/// GET /docs: a page that shows the description; it loads nothing from elsewhere.
pub(super) async fn page() -> Html<&'static str> {
    Html(include_str!("openapi.html"))
}

#[cfg(test)]
mod tests {
    use super::super::encoding::Encoding;
    use super::super::{admin, native, openai, tokens};
    use super::*;
    use serde::de::{Deserialize, Deserializer, Visitor};
    use serde_json::Value;
    use std::collections::BTreeSet;

    /// The keys that a struct asks for: it is "read" from a source that takes them down.
    struct Keys<'a>(&'a mut Vec<&'static str>);

    impl<'de> Deserializer<'de> for Keys<'_> {
        type Error = serde::de::value::Error;

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            _: V,
        ) -> Result<V::Value, Self::Error> {
            self.0.extend(fields);
            Err(serde::de::Error::custom("read"))
        }

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(serde::de::Error::custom("no struct"))
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct newtype_struct seq tuple
            tuple_struct map enum identifier ignored_any
        }
    }

    fn keys<'de, T: Deserialize<'de>>() -> BTreeSet<&'static str> {
        let mut keys = Vec::new();
        let _ = T::deserialize(Keys(&mut keys));
        keys.into_iter().collect()
    }

    #[test]
    fn the_descriptions_have_the_keys_that_are_read() {
        let described = |document: &str, requests: &[(&str, BTreeSet<&str>)]| {
            let document: Value = serde_json::from_str(document).unwrap();
            for (schema, keys) in requests {
                let known = document["components"]["schemas"][schema]["properties"].as_object().unwrap();
                assert_eq!(known.keys().map(String::as_str).collect::<BTreeSet<_>>(), *keys, "{schema}");
                assert!(!keys.is_empty());
            }
        };
        let requests = [
            ("EmbedRequest", keys::<native::EmbedRequest>()),
            ("EmbedAllRequest", keys::<native::EmbedAllRequest>()),
            ("SimilarityRequest", keys::<native::SimilarityRequest>()),
            ("SimilarityInputs", keys::<native::SimilarityInputs>()),
            ("SimilarityParameters", keys::<native::SimilarityParameters>()),
            ("VertexRequest", keys::<native::VertexRequest>()),
            ("TokenizeRequest", keys::<tokens::TokenizeRequest>()),
            ("DecodeRequest", keys::<tokens::DecodeRequest>()),
            ("EmbeddingsRequest", keys::<openai::Request>()),
        ];
        described(&DOCUMENT, &requests);
        let requests = [
            ("LoadRequest", keys::<admin::LoadRequest>()),
            ("ReloadRequest", keys::<admin::ReloadRequest>()),
            ("RemoveRequest", keys::<admin::RemoveRequest>()),
        ];
        described(&ADMIN_DOCUMENT, &requests);
    }

    #[test]
    fn the_descriptions_have_the_routes_that_there_are() {
        for (document, code) in [(&DOCUMENT, include_str!("mod.rs")), (&ADMIN_DOCUMENT, include_str!("admin.rs"))] {
            let routes = code.split(".route(\"").skip(1).map(|rest| rest.split('"').next().unwrap());
            let document: Value = serde_json::from_str(document).unwrap();
            let described = document["paths"].as_object().unwrap().keys().map(String::as_str);
            assert_eq!(described.collect::<BTreeSet<_>>(), routes.collect());
        }
    }

    #[test]
    fn the_description_has_the_encodings_that_there_are() {
        let document: Value = serde_json::from_str(&DOCUMENT).unwrap();
        let described = &document["components"]["schemas"]["EmbeddingsRequest"]["properties"]["encoding_format"]["enum"];
        let known = Encoding::ALL.map(|(name, _)| Value::from(name)).into_iter().chain([Value::Null]);
        assert_eq!(described, &Value::from_iter(known));
    }

    #[test]
    fn what_the_descriptions_refer_to_is_there() {
        for text in [&DOCUMENT, &ADMIN_DOCUMENT] {
            let document: Value = serde_json::from_str(text).unwrap();
            let references = text.split("\"$ref\": \"#").skip(1).map(|rest| rest.split('"').next().unwrap());
            let missing: Vec<&str> = references.filter(|pointer| document.pointer(pointer).is_none()).collect();
            assert!(missing.is_empty(), "{missing:?}");
        }
    }

    #[test]
    fn the_page_needs_no_network() {
        let page = include_str!("openapi.html");
        for elsewhere in ["http://", "https://", "src=", "<link", "@import", "url("] {
            assert!(!page.contains(elsewhere), "{elsewhere}");
        }
        assert!(page.contains("fetch(\"openapi.json\")"));
    }
}

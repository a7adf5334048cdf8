//! gRPC over loopback on tiny models: TEI's services give what the HTTP routes give, and fail with the status that TEI's clients expect.

mod cli_model;
mod grpc_channel;
mod server_client;

use grpc_channel::proto::info_client::InfoClient;
use grpc_channel::proto::predict_client::PredictClient;
use grpc_channel::proto::rerank_client::RerankClient;
use grpc_channel::proto::tokenize_client::TokenizeClient;
use grpc_channel::proto::{
    DecodeRequest, EmbedAllRequest, EmbedRequest, EmbedResponse, EmbedSparseRequest, EncodeRequest, InfoRequest, ModelType,
    PredictRequest, RerankRequest, SimpleToken,
};
use grpc_channel::{Channel, failed, origin, text, with};
use serde_json::{Value, json};
use server_client::{PATIENCE, Running, rows, served, start, until};
use std::io::{Read, Write};
use std::sync::LazyLock;
use std::time::Duration;
use tempfile::TempDir;
use tonic::Code;
use tonic::body::Body;
use tonic::codegen::http::Request;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};
use tower::Service;
use trt_embed::server::{Ended, Settings};

const LONG: &str = "the cat sat on the mat the dog ran on the mat stocks fell the red cat sat on the blue mat the dog sat";

static TINY: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    cli_model::write(folder.path());
    folder
});

/// A server of `tiny` and, as another model, `bert`.
fn server(change: impl FnOnce(&mut Settings)) -> Running {
    let mut settings = Settings::default();
    change(&mut settings);
    start(vec![served("tiny", TINY.path().to_str().unwrap()), served("bert", "tests/fixtures/bert")], settings)
}

/// The vector that the HTTP route gives for `body`.
#[track_caller]
fn over_http(server: &Running, body: Value) -> Vec<f32> {
    rows(&server.post("/embed", &body).ok()).remove(0)
}

#[tokio::test]
async fn embed_gives_the_vectors_of_the_http_route() {
    let server = server(|_| {});
    let mut client = Channel::open(server.grpc).await.embed();
    let cut = EmbedRequest { truncate: true, ..text(LONG) };
    let cases = [
        (text("the cat sat"), json!({ "inputs": "the cat sat" })),
        (EmbedRequest { normalize: Some(true), ..text("cat") }, json!({ "inputs": "cat" })),
        (EmbedRequest { normalize: Some(false), ..text("cat") }, json!({ "inputs": "cat", "normalize": false })),
        (EmbedRequest { dimensions: Some(3), ..text("cat") }, json!({ "inputs": "cat", "dimensions": 3 })),
        (EmbedRequest { prompt_name: Some("query".into()), ..text("cat") }, json!({ "inputs": "cat", "prompt_name": "query" })),
        (cut.clone(), json!({ "inputs": LONG })),
        (EmbedRequest { truncation_direction: 1, ..cut }, json!({ "inputs": LONG, "truncation_direction": "Left" })),
    ];
    for (message, body) in cases {
        let expected = over_http(&server, body);
        let answer = client.embed(message.clone()).await.unwrap();
        assert_eq!(answer.get_ref().embeddings, expected, "{message:?}");
    }
    let answer = client.embed(with(text("the cat"), &[("x-request-id", "r1"), ("x-model", "bert")])).await.unwrap();
    assert_eq!(answer.get_ref().embeddings, over_http(&server, json!({ "inputs": "the cat", "model": "bert" })));
    let header = |name: &str| answer.metadata().get(name).unwrap().to_str().unwrap().to_owned();
    assert_eq!(
        (header("x-request-id"), header("x-compute-type"), header("x-compute-characters")),
        ("r1".into(), "cpu".into(), "7".into())
    );
    let told = answer.get_ref().metadata.unwrap();
    assert_eq!((told.compute_chars, told.compute_tokens.to_string()), (7, header("x-compute-tokens")));
    assert!(told.total_time_ns >= told.inference_time_ns && told.inference_time_ns > 0, "{told:?}");
    // It counts as the request over HTTP.
    let metrics = String::from_utf8(server.get("/metrics").body).unwrap();
    assert!(metrics.contains("te_request_success{method=\"single\"} 16"), "{metrics}");
}

#[tokio::test]
async fn states_tokens_and_info_are_those_of_the_http_routes() {
    let server = server(|_| {});
    let channel = Channel::open(server.grpc).await;
    let all =
        channel.embed().embed_all(EmbedAllRequest { inputs: "the cat".into(), ..Default::default() }).await.unwrap().into_inner();
    let states: Vec<Vec<f32>> = all.token_embeddings.into_iter().map(|token| token.embeddings).collect();
    assert_eq!(states, rows(&server.post("/embed_all", &json!({ "inputs": "the cat" })).ok()[0]));
    assert_eq!(all.metadata.unwrap().compute_tokens, 4);

    let mut tokenize = TokenizeClient::with_origin(channel.clone(), origin());
    let message = EncodeRequest { inputs: "The caté".into(), add_special_tokens: true, prompt_name: Some("query".into()) };
    let as_json = |token: SimpleToken| json!({ "id": token.id, "text": token.text, "special": token.special, "start": token.start, "stop": token.stop });
    let tokens: Vec<Value> = tokenize.tokenize(message).await.unwrap().into_inner().tokens.into_iter().map(as_json).collect();
    assert_eq!(json!([tokens]), server.post("/tokenize", &json!({ "inputs": "The caté", "prompt_name": "query" })).ok());
    let bare = tokenize.tokenize(EncodeRequest { inputs: "cat".into(), ..Default::default() }).await.unwrap().into_inner();
    assert_eq!(bare.tokens.len(), 1);
    for (skip_special_tokens, text) in [(true, "the cat"), (false, "[CLS] the cat [SEP]")] {
        let message = DecodeRequest { ids: vec![2, 7, 8, 3], skip_special_tokens };
        assert_eq!(tokenize.decode(message).await.unwrap().into_inner().text, text);
    }

    let mut client = InfoClient::with_origin(channel, origin());
    let info = client.info(InfoRequest {}).await.unwrap().into_inner();
    let told = server.get("/info").ok();
    assert_eq!((json!(info.model_id), info.model_type()), (told["model_id"].clone(), ModelType::Embedding));
    assert_eq!(json!(info.max_input_length), told["max_input_length"]);
    assert_eq!(json!(info.max_batch_requests), told["max_batch_requests"]);
    assert_eq!(json!(info.version), told["version"]);
    let bert = client.info(with(InfoRequest {}, &[("x-model", "bert")])).await.unwrap().into_inner();
    assert_ne!(bert.max_input_length, info.max_input_length);
}

#[tokio::test]
async fn bad_messages_are_refused_by_their_status() {
    let server = server(|settings| settings.payload_limit = 20_000);
    let channel = Channel::open(server.grpc).await;
    let mut embed = channel.embed();
    let message = |change: fn(&mut EmbedRequest)| {
        let mut message = text("cat");
        change(&mut message);
        message
    };
    for (message, code, says) in [
        (text(""), Code::InvalidArgument, "`inputs` cannot be empty"),
        (text(LONG), Code::InvalidArgument, "more than 24 tokens"),
        (message(|message| message.dimensions = Some(0)), Code::InvalidArgument, "1 to 8"),
        (message(|message| message.dimensions = Some(9)), Code::InvalidArgument, "1 to 8"),
        (message(|message| message.prompt_name = Some("nosuch".into())), Code::InvalidArgument, "query"),
        (message(|message| message.truncation_direction = 7), Code::InvalidArgument, "`truncation_direction` is 7"),
        (text(&"cat ".repeat(5000)), Code::OutOfRange, "20000"),
    ] {
        let (got, said) = failed(embed.embed(message.clone()).await);
        assert!(got == code && said.contains(says), "{code:?} {says}: {got:?} {said}");
        // A stream says the same.
        let mut stream = embed.embed_stream(messages(vec![text("dog"), message, text("dog")])).await.unwrap().into_inner();
        assert!(stream.message().await.unwrap().is_some());
        let (got, said) = failed(stream.message().await);
        assert!(got == code && said.contains(says), "{code:?} {says}: {got:?} {said}");
    }
    for (name, value, code, says) in [
        ("x-model", "nosuch", Code::NotFound, "`nosuch` does not exist; there are: tiny, bert"),
        ("x-priority", "high", Code::InvalidArgument, "interactive and bulk"),
        ("grpc-timeout", "soon", Code::InvalidArgument, "grpc-timeout is \"soon\""),
        ("grpc-timeout", "0n", Code::DeadlineExceeded, "deadline"),
    ] {
        let (got, said) = failed(embed.embed(with(text("cat"), &[(name, value)])).await);
        assert!(got == code && said.contains(says), "{name} {value}: {got:?} {said}");
    }
    let mut tokenize = TokenizeClient::with_origin(channel.clone(), origin());
    for (ids, says) in [(vec![], "`ids` cannot be empty"), (vec![8, 9999], "9999")] {
        let (got, said) = failed(tokenize.decode(DecodeRequest { ids, skip_special_tokens: true }).await);
        assert!(got == Code::InvalidArgument && said.contains(says), "{got:?} {said}");
    }
    assert_eq!(failed(tokenize.tokenize(EncodeRequest::default()).await).0, Code::InvalidArgument);
    let unimplemented = [
        failed(embed.embed_sparse(EmbedSparseRequest::default()).await),
        failed(embed.embed_sparse_stream(messages(vec![EmbedSparseRequest::default()])).await),
        failed(PredictClient::with_origin(channel.clone(), origin()).predict(PredictRequest::default()).await),
        failed(RerankClient::with_origin(channel, origin()).rerank(RerankRequest::default()).await),
    ];
    for ((code, said), says) in unimplemented.iter().zip(["sparse", "sparse", "classifiers", "cross-encoders"]) {
        assert!(*code == Code::Unimplemented && said.contains(says), "{code:?} {said}");
    }
    let metrics = String::from_utf8(server.get("/metrics").body).unwrap();
    assert!(metrics.contains("te_request_failure{err=\"empty\"} 4"), "{metrics}");
    // What is no gRPC at all, and a method that there is not.
    let mut raw = Channel::open(server.grpc).await;
    for (path, kind, status, grpc) in [
        ("/tei.v1.Embed/Embed", "application/json", 415, None),
        ("/tei.v1.Embed/Nosuch", "application/grpc", 200, Some("12")),
        ("/nosuch", "application/grpc", 200, Some("12")),
    ] {
        let request = tonic::codegen::http::Request::post(path).header("content-type", kind).body(Body::empty()).unwrap();
        let answer = raw.call(request).await.unwrap();
        let told = answer.headers().get("grpc-status").map(|status| status.to_str().unwrap());
        assert_eq!((answer.status().as_u16(), told), (status, grpc), "{path}");
    }
    // Headers beyond their limit end at the door.
    assert!(embed.embed(with(text("cat"), &[("x-request-id", &"a".repeat(40_000))])).await.is_err());
    // It is as well as before.
    assert!(embed.embed(text("cat")).await.is_ok());
}

/// The messages as a stream.
fn messages<T: Send + 'static>(messages: Vec<T>) -> impl futures_util::Stream<Item = T> + Send + 'static {
    futures_util::stream::iter(messages)
}

/// What is sent, as a stream.
fn sent<T: Send + 'static>(receiver: tokio::sync::mpsc::Receiver<T>) -> impl futures_util::Stream<Item = T> + Send + 'static {
    futures_util::stream::unfold(receiver, async |mut receiver| receiver.recv().await.map(|message| (message, receiver)))
}

/// All answers of a stream.
async fn collect(mut stream: tonic::Streaming<EmbedResponse>) -> Vec<Vec<f32>> {
    let mut vectors = Vec::new();
    while let Some(answer) = stream.message().await.unwrap() {
        vectors.push(answer.embeddings);
    }
    vectors
}

#[tokio::test]
async fn a_stream_is_answered_in_order() {
    let server = server(|settings| settings.max_client_batch_size = 4);
    let mut client = Channel::open(server.grpc).await.embed();
    let words = ["cat", "dog", "the cat sat", "stocks fell", "a red mat", "the dog ran on the mat"];
    let texts: Vec<&str> = (0..200).map(|place| words[place * place % words.len()]).collect();
    let expected: Vec<Vec<f32>> = texts.iter().map(|text| over_http(&server, json!({ "inputs": text }))).collect();
    let answer = client.embed_stream(messages(texts.into_iter().map(text).collect())).await.unwrap();
    assert!(answer.metadata().get("x-request-id").is_some());
    assert_eq!(collect(answer.into_inner()).await, expected);
    // One after the other, each sent when the last is there.
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let receiver = sent(receiver);
    sender.send(text("cat")).await.unwrap();
    let mut stream = client.embed_stream(receiver).await.unwrap().into_inner();
    for _ in 0..3 {
        assert_eq!(stream.message().await.unwrap().unwrap().embeddings, over_http(&server, json!({ "inputs": "cat" })));
        sender.send(text("cat")).await.unwrap();
    }
    drop(sender);
    assert!(stream.message().await.unwrap().is_some());
    assert!(stream.message().await.unwrap().is_none());
    assert!(collect(client.embed_stream(messages(vec![])).await.unwrap().into_inner()).await.is_empty());
    // Streams of the other services.
    let all = EmbedAllRequest { inputs: "the cat".into(), ..Default::default() };
    let mut states = client.embed_all_stream(messages(vec![all; 2])).await.unwrap().into_inner();
    assert_eq!(states.message().await.unwrap().unwrap().token_embeddings.len(), 4);
    let mut tokenize = TokenizeClient::with_origin(Channel::open(server.grpc).await, origin());
    let message = EncodeRequest { inputs: "cat".into(), ..Default::default() };
    let mut tokens = tokenize.tokenize_stream(messages(vec![message])).await.unwrap().into_inner();
    assert_eq!(tokens.message().await.unwrap().unwrap().tokens[0].id, 8);
    let message = DecodeRequest { ids: vec![7, 8], skip_special_tokens: true };
    let mut texts = tokenize.decode_stream(messages(vec![message])).await.unwrap().into_inner();
    assert_eq!(texts.message().await.unwrap().unwrap().text, "the cat");
}

#[tokio::test]
async fn a_stream_without_messages_ends() {
    let server = server(|settings| settings.body_timeout = Duration::from_millis(100));
    let mut client = Channel::open(server.grpc).await.embed();
    let quiet = futures_util::StreamExt::chain(messages(vec![text("cat")]), futures_util::stream::pending());
    let mut stream = client.embed_stream(quiet).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    let (code, said) = failed(stream.message().await);
    assert!(code == Code::DeadlineExceeded && said.contains("no message for 100ms"), "{code:?} {said}");
}

#[tokio::test]
async fn keys_are_asked_for_where_there_are_some() {
    let server = server(|settings| settings.api_keys = vec!["k1".into(), "k2".into()]);
    let channel = Channel::open(server.grpc).await;
    let mut client = channel.embed();
    for metadata in [&[][..], &[("authorization", "Bearer k3")], &[("authorization", "")]] {
        let (code, said) = failed(client.embed(with(text("cat"), metadata)).await);
        assert!(code == Code::Unauthenticated && said.contains("a key is needed"), "{code:?} {said}");
    }
    for key in ["Bearer k1", "Bearer k2", "k2"] {
        assert!(client.embed(with(text("cat"), &[("authorization", key)])).await.is_ok(), "{key}");
    }
    assert!(channel.health().check(HealthCheckRequest::default()).await.is_ok());
}

#[tokio::test]
async fn health_is_told_for_each_service_and_watched() {
    let server = server(|settings| settings.shutdown_timeout = 10 * PATIENCE);
    let mut health = Channel::open(server.grpc).await.health();
    let ask = |service: &str| HealthCheckRequest { service: service.into() };
    for (service, expected) in [
        ("", ServingStatus::Serving),
        ("tei.v1.Embed", ServingStatus::Serving),
        ("tei.v1.Tokenize", ServingStatus::Serving),
        ("tei.v1.Info", ServingStatus::Serving),
        ("tei.v1.Predict", ServingStatus::NotServing),
        ("tei.v1.Rerank", ServingStatus::NotServing),
    ] {
        assert_eq!(health.check(ask(service)).await.unwrap().into_inner().status(), expected, "{service}");
    }
    assert_eq!(failed(health.check(ask("nosuch")).await).0, Code::NotFound);
    let mut unknown = health.watch(ask("nosuch")).await.unwrap().into_inner();
    assert_eq!(unknown.message().await.unwrap().unwrap().status(), ServingStatus::ServiceUnknown);
    let mut watch = health.watch(ask("")).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    server.handle.stop();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    assert!(watch.message().await.unwrap().is_none());
    // A watch does not keep the server from ending.
    let stopped = tokio::time::timeout(PATIENCE, tokio::task::spawn_blocking(|| server.stop())).await;
    assert_eq!(stopped.expect("the server waits for its connections").unwrap(), Ended::Drained);
}

#[tokio::test]
async fn reflection_tells_the_proto() {
    let server = server(|settings| settings.api_keys = vec!["k1".into()]);
    let mut client = ServerReflectionClient::with_origin(Channel::open(server.grpc).await, origin());
    let ask = |request| ServerReflectionRequest { host: String::new(), message_request: Some(request) };
    let asked =
        vec![ask(MessageRequest::ListServices(String::new())), ask(MessageRequest::FileContainingSymbol("tei.v1.Embed".into()))];
    let mut answers = client.server_reflection_info(messages(asked)).await.unwrap().into_inner();
    let answer = |message: Option<ServerReflectionResponse>| message.unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer(answers.message().await.unwrap()) else { panic!("no list") };
    let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    for name in ["tei.v1.Embed", "tei.v1.Info", "tei.v1.Tokenize", "tei.v1.Predict", "tei.v1.Rerank", "grpc.health.v1.Health"] {
        assert!(names.contains(&name), "{name}: {names:?}");
    }
    let MessageResponse::FileDescriptorResponse(file) = answer(answers.message().await.unwrap()) else { panic!("no file") };
    let bytes = &file.file_descriptor_proto[0];
    assert!(bytes.windows(11).any(|bytes| bytes == b"EmbedStream"), "{} bytes", bytes.len());
}

#[tokio::test]
async fn requests_beyond_the_limit_are_refused_whole_streams_included() {
    let server = server(|settings| settings.max_concurrent_requests = 1);
    let mut client = Channel::open(server.grpc).await.embed();
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let receiver = sent(receiver);
    sender.send(text("cat")).await.unwrap();
    let mut stream = client.embed_stream(receiver).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    let status = client.embed(text("cat")).await.unwrap_err();
    assert!(status.code() == Code::ResourceExhausted && status.message().contains("1 requests are under way"), "{status:?}");
    assert_eq!(status.metadata().get("grpc-retry-pushback-ms").unwrap(), "1000");
    assert_eq!(server.post("/embed", &json!({ "inputs": "cat" })).status, 429);
    drop(sender);
    assert!(stream.message().await.unwrap().is_none());
    until(|| server.post("/embed", &json!({ "inputs": "cat" })).status == 200);
    assert!(client.embed(text("cat")).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_do_not_begin_or_do_not_send_are_cut_off() {
    let server = server(|settings| {
        settings.header_timeout = Duration::from_millis(200);
        settings.body_timeout = Duration::from_millis(200);
    });
    for said in [&b""[..], b"PRI * HTTP/2.0\r\n", b"GET / HTTP/1.1\r\n\r\n"] {
        let mut stream = std::net::TcpStream::connect(server.grpc).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(said).unwrap();
        let ended = stream.read_to_end(&mut Vec::new());
        assert!(!ended.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock), "the connection stayed open");
    }
    // Headers, and never a message.
    type Never = Result<hyper::body::Frame<bytes::Bytes>, std::convert::Infallible>;
    let never = http_body_util::StreamBody::new(futures_util::stream::pending::<Never>());
    let request = Request::post("/tei.v1.Embed/Embed").header("content-type", "application/grpc").body(Body::new(never)).unwrap();
    let answer = Channel::open(server.grpc).await.call(request).await.unwrap();
    assert_eq!(answer.headers().get("grpc-status").unwrap(), "4");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_nothing_of_an_answer_is_cut_off() {
    let server = server(|settings| settings.write_timeout = Duration::from_millis(200));
    // The answers are larger than the window, which nobody opens; the connection itself lives, and answers pings.
    let channel = Channel::with_window(server.grpc, 64).await;
    let message = EmbedAllRequest { inputs: "the cat sat on the mat".into(), ..Default::default() };
    let _unread = channel.embed().embed_all_stream(messages(vec![message; 200])).await.unwrap();
    // The one that asks.
    until(|| String::from_utf8(server.get("/metrics").body).unwrap().contains("trt_embed_connections 1\n"));
    assert!(channel.embed().embed(text("cat")).await.is_err());
}

//! gRPC on the executor that waits and fails as it is told.

use super::*;
use futures_util::StreamExt;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;

#[path = "../../../tests/grpc_channel/mod.rs"]
mod grpc_channel;

use grpc_channel::{Channel, failed, text, with};

/// Waits until `now` gives `expected`.
#[track_caller]
fn settles<T: PartialEq + std::fmt::Debug>(now: impl Fn() -> T, expected: T) {
    let began = Instant::now();
    while now() != expected {
        assert!(began.elapsed() < PATIENCE / 2, "it is {:?}, and not {expected:?}", now());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Asks for a text's vector; the request is sent when this returns a task.
fn ask(
    channel: &Channel,
    metadata: &'static [(&'static str, &'static str)],
) -> tokio::task::JoinHandle<std::result::Result<usize, tonic::Status>> {
    let mut client = channel.embed();
    tokio::spawn(async move { client.embed(with(text("the"), metadata)).await.map(|answer| answer.get_ref().embeddings.len()) })
}

#[tokio::test(flavor = "multi_thread")]
async fn overload_deadlines_and_the_end_have_their_statuses() {
    let fake = Fake::new(0);
    // A text has three tokens.
    let server = serve(&fake, |settings| settings.max_queue_tokens = 6);
    let channel = Channel::open(server.grpc).await;
    let running = ask(&channel, &[]);
    settles(|| fake.begun().len(), 1);
    // One who gives up is forgotten.
    let gone = ask(&channel, &[]);
    settles(|| server.queue().interactive.texts, 1);
    gone.abort();
    settles(|| server.queue().cancelled, 1);
    let late = ask(&channel, &[("grpc-timeout", "50m")]);
    settles(|| server.queue().interactive.texts, 1);
    let bulk = ask(&channel, &[("x-priority", "bulk")]);
    settles(|| server.queue().bulk.texts, 1);
    let (code, said) = failed(ask(&channel, &[]).await.unwrap());
    assert!(code == Code::ResourceExhausted && said.contains("6 tokens wait already"), "{code:?} {said}");
    std::thread::sleep(Duration::from_millis(60));
    server.handle.stop();
    let (code, said) = failed(ask(&channel, &[]).await.unwrap());
    assert!(code == Code::Unavailable && said.contains("shutting down"), "{code:?} {said}");
    fake.change(|doing| doing.gate = usize::MAX);
    assert!(running.await.unwrap().is_ok() && bulk.await.unwrap().is_ok());
    assert_eq!(failed(late.await.unwrap()).0, Code::DeadlineExceeded);
    assert_eq!(fake.begun().len(), 2, "what was late has run");
    assert_eq!(tokio::task::spawn_blocking(|| server.stop()).await.unwrap(), Ended::Drained);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_executor_that_fails_is_unavailable_and_not_serving() {
    let fake = Fake::new(usize::MAX);
    let server = serve(&fake, |_| {});
    let channel = Channel::open(server.grpc).await;
    let mut watch = channel.health().watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    let expect = [
        (Probe::Works, ServingStatus::Serving),
        (Probe::Fails, ServingStatus::NotServing),
        (Probe::Works, ServingStatus::Serving),
    ];
    for (probe, expected) in expect {
        fake.change(|doing| doing.probe = probe);
        assert_eq!(watch.message().await.unwrap().unwrap().status(), expected);
        let checked = channel.health().check(HealthCheckRequest { service: "tei.v1.Embed".into() }).await.unwrap();
        assert_eq!(checked.get_ref().status(), expected);
        match ask(&channel, &[]).await.unwrap() {
            Ok(_) => assert_eq!(expected, ServingStatus::Serving),
            Err(status) => assert_eq!((status.code(), expected), (Code::Unavailable, ServingStatus::NotServing), "{status:?}"),
        }
    }
    assert_eq!(fake.begun().len(), 2, "a dead executor was given work");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_has_few_messages_under_way_and_takes_them_with_it() {
    let fake = Fake::new(1);
    let server = serve(&fake, |settings| settings.max_client_batch_size = 3);
    let channel = Channel::open(server.grpc).await;
    let messages = || futures_util::stream::repeat_with(|| text("the")).take(100_000);
    let mut stream = channel.embed().embed_stream(messages()).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    // One runs, two wait, and the other thousands are not even read.
    settles(|| (fake.begun().len(), server.queue().bulk.texts), (2, 2));
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!((server.queue().bulk.texts, server.queue().interactive.texts), (2, 0));
    channel.close();
    settles(|| server.queue().cancelled, 2);
    fake.change(|doing| doing.gate = usize::MAX);
    until(|| server.get("/metrics").1.contains("trt_embed_active_requests 0"));
    assert_eq!(fake.begun().len(), 2, "the work of a client that went away has run");
    // Its batch has gone through the gate, which is about to be set anew.
    settles(|| server.queue().running, 0);

    // A server that ends gives what is under way, and says that there is no more.
    fake.change(|doing| doing.gate = 1);
    let mut client = Channel::open(server.grpc).await.embed();
    let mut stream = client.embed_stream(with(messages(), &[("x-priority", "interactive")])).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    settles(|| server.queue().interactive.texts, 2);
    server.handle.stop();
    fake.change(|doing| doing.gate = usize::MAX);
    let mut answers = 0;
    let end = loop {
        match stream.message().await {
            Ok(Some(_)) => answers += 1,
            end => break end,
        }
    };
    assert_eq!(failed(end).0, Code::Unavailable);
    assert!(answers >= 3, "{answers} of three under way");
    assert_eq!(tokio::task::spawn_blocking(|| server.stop()).await.unwrap(), Ended::Drained);
}

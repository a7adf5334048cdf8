//! TEI's services over gRPC (`proto/tei.proto`), with health and reflection. A message is a request of one input: it becomes what the HTTP routes
//! make of their bodies, and goes the same way from there.

mod door;
#[cfg(any(test, feature = "internals"))]
pub mod fuzzed;
mod health;
mod streams;

use super::ServeError;
use super::failure::{Failure, Kind};
use super::inputs::{Inputs, Item};
use super::model::{Reading, Side};
use super::state::State;
use super::work::{self, Call, Usage};
use super::{native, tokens};
use axum::Router;
use door::Asked;
use proto::embed_server::{Embed, EmbedServer};
use proto::info_server::{Info, InfoServer};
use proto::predict_server::{Predict, PredictServer};
use proto::rerank_server::{Rerank, RerankServer};
use proto::tokenize_server::{Tokenize, TokenizeServer};
use proto::{
    DecodeRequest, DecodeResponse, EmbedAllRequest, EmbedAllResponse, EmbedRequest, EmbedResponse, EmbedSparseRequest,
    EmbedSparseResponse, EncodeRequest, EncodeResponse, InfoRequest, InfoResponse, Metadata, ModelType, PredictPairRequest,
    PredictRequest, PredictResponse, RerankRequest, RerankResponse, RerankStreamRequest, SimpleToken, TokenEmbedding,
    TruncationDirection,
};
use std::sync::Arc;
use std::time::Duration;
use tonic::codegen::BoxStream;
use tonic::service::Routes;
use tonic::{Code, Request, Response, Status, Streaming};

/// What build.rs makes of the proto.
mod proto {
    #![allow(dead_code, missing_docs, clippy::all)]
    tonic::include_proto!("tei.v1");
    pub const DESCRIPTOR: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/tei.bin"));
}

/// Milliseconds after which a client that came at a bad time should try again (gRFC A6).
const RETRY_AFTER: &str = "1000";
const NO_SPARSE: &str = "no model of this server gives sparse vectors; Embed gives dense ones";
const NO_PREDICT: &str = "this server embeds; it serves no classifiers";
const NO_RERANK: &str = "this server embeds; it serves no cross-encoders: compare vectors of Embed in the place of Rerank";

/// All services.
///
/// # Errors
/// A descriptor that cannot be read: there is none.
pub(super) fn router(state: &Arc<State>) -> Result<Router, ServeError> {
    let tei = Tei { state: state.clone() };
    let limit = state.settings.payload_limit;
    let described = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTOR)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let failed = |error| ServeError::Setting { reason: format!("gRPC's reflection: {error}") };
    let routes = Routes::new(health::service(state))
        .add_service(described().build_v1().map_err(failed)?)
        // What most clients still ask for.
        .add_service(described().build_v1alpha().map_err(failed)?)
        .add_service(InfoServer::new(tei.clone()).max_decoding_message_size(limit))
        .add_service(EmbedServer::new(tei.clone()).max_decoding_message_size(limit))
        .add_service(TokenizeServer::new(tei.clone()).max_decoding_message_size(limit))
        .add_service(PredictServer::new(tei.clone()).max_decoding_message_size(limit))
        .add_service(RerankServer::new(tei).max_decoding_message_size(limit));
    Ok(routes.into_axum_router().layer(axum::middleware::from_fn_with_state(state.clone(), door::door)))
}

/// TEI's services.
#[derive(Clone)]
struct Tei {
    state: Arc<State>,
}

impl Tei {
    /// The answer to one message.
    async fn answer<Q, A, F>(
        &self,
        request: Request<Q>,
        work: impl FnOnce(Arc<State>, Asked, Q) -> F,
    ) -> Result<Response<A>, Status>
    where
        F: Future<Output = Result<(A, Option<Usage>), Failure>>,
    {
        let asked = Asked::of(&request)?;
        let (answer, usage) = work(self.state.clone(), asked, request.into_inner()).await?;
        let mut response = Response::new(answer);
        if let Some(usage) = usage {
            response.extensions_mut().insert(usage);
        }
        Ok(response)
    }
}

#[tonic::async_trait]
impl Info for Tei {
    async fn info(&self, request: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        self.answer(request, info).await
    }
}

#[tonic::async_trait]
impl Embed for Tei {
    async fn embed(&self, request: Request<EmbedRequest>) -> Result<Response<EmbedResponse>, Status> {
        self.answer(request, embed).await
    }

    type EmbedStreamStream = BoxStream<EmbedResponse>;
    async fn embed_stream(
        &self,
        request: Request<Streaming<EmbedRequest>>,
    ) -> Result<Response<BoxStream<EmbedResponse>>, Status> {
        streams::answer(&self.state, request, embed)
    }

    async fn embed_sparse(&self, _: Request<EmbedSparseRequest>) -> Result<Response<EmbedSparseResponse>, Status> {
        Err(Status::unimplemented(NO_SPARSE))
    }

    type EmbedSparseStreamStream = BoxStream<EmbedSparseResponse>;
    async fn embed_sparse_stream(
        &self,
        _: Request<Streaming<EmbedSparseRequest>>,
    ) -> Result<Response<BoxStream<EmbedSparseResponse>>, Status> {
        Err(Status::unimplemented(NO_SPARSE))
    }

    async fn embed_all(&self, request: Request<EmbedAllRequest>) -> Result<Response<EmbedAllResponse>, Status> {
        self.answer(request, embed_all).await
    }

    type EmbedAllStreamStream = BoxStream<EmbedAllResponse>;
    async fn embed_all_stream(
        &self,
        request: Request<Streaming<EmbedAllRequest>>,
    ) -> Result<Response<BoxStream<EmbedAllResponse>>, Status> {
        streams::answer(&self.state, request, embed_all)
    }
}

#[tonic::async_trait]
impl Tokenize for Tei {
    async fn tokenize(&self, request: Request<EncodeRequest>) -> Result<Response<EncodeResponse>, Status> {
        self.answer(request, tokenize).await
    }

    type TokenizeStreamStream = BoxStream<EncodeResponse>;
    async fn tokenize_stream(
        &self,
        request: Request<Streaming<EncodeRequest>>,
    ) -> Result<Response<BoxStream<EncodeResponse>>, Status> {
        streams::answer(&self.state, request, tokenize)
    }

    async fn decode(&self, request: Request<DecodeRequest>) -> Result<Response<DecodeResponse>, Status> {
        self.answer(request, decode).await
    }

    type DecodeStreamStream = BoxStream<DecodeResponse>;
    async fn decode_stream(
        &self,
        request: Request<Streaming<DecodeRequest>>,
    ) -> Result<Response<BoxStream<DecodeResponse>>, Status> {
        streams::answer(&self.state, request, decode)
    }
}

#[tonic::async_trait]
impl Predict for Tei {
    async fn predict(&self, _: Request<PredictRequest>) -> Result<Response<PredictResponse>, Status> {
        Err(Status::unimplemented(NO_PREDICT))
    }

    async fn predict_pair(&self, _: Request<PredictPairRequest>) -> Result<Response<PredictResponse>, Status> {
        Err(Status::unimplemented(NO_PREDICT))
    }

    type PredictStreamStream = BoxStream<PredictResponse>;
    async fn predict_stream(
        &self,
        _: Request<Streaming<PredictRequest>>,
    ) -> Result<Response<BoxStream<PredictResponse>>, Status> {
        Err(Status::unimplemented(NO_PREDICT))
    }

    type PredictPairStreamStream = BoxStream<PredictResponse>;
    async fn predict_pair_stream(
        &self,
        _: Request<Streaming<PredictPairRequest>>,
    ) -> Result<Response<BoxStream<PredictResponse>>, Status> {
        Err(Status::unimplemented(NO_PREDICT))
    }
}

#[tonic::async_trait]
impl Rerank for Tei {
    async fn rerank(&self, _: Request<RerankRequest>) -> Result<Response<RerankResponse>, Status> {
        Err(Status::unimplemented(NO_RERANK))
    }

    async fn rerank_stream(&self, _: Request<Streaming<RerankStreamRequest>>) -> Result<Response<RerankResponse>, Status> {
        Err(Status::unimplemented(NO_RERANK))
    }
}

async fn info(state: Arc<State>, asked: Asked, _: InfoRequest) -> Result<(InfoResponse, Option<Usage>), Failure> {
    let model = state.model(asked.model())?;
    let info = model.embedder.info();
    let settings = &state.settings;
    let response = InfoResponse {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        sha: None,
        docker_label: None,
        model_id: info.model.clone(),
        model_sha: None,
        model_dtype: if info.backend == "cpu" { "float32".to_owned() } else { String::new() },
        model_type: ModelType::Embedding.into(),
        max_concurrent_requests: count(settings.max_concurrent_requests),
        max_input_length: count(info.max_tokens),
        max_batch_tokens: count(info.limits.batch_tokens),
        max_batch_requests: Some(count(info.limits.max_batch)),
        max_client_batch_size: count(settings.max_client_batch_size),
        tokenization_workers: count(state.tokenizing),
    };
    Ok((response, None))
}

async fn embed(state: Arc<State>, asked: Asked, message: EmbedRequest) -> Result<(EmbedResponse, Option<Usage>), Failure> {
    let EmbedRequest { inputs, truncate, normalize, truncation_direction, prompt_name, dimensions } = message;
    let model = state.model(asked.model())?;
    let shape = model.shape(dimensions.map(|count| count as usize), normalize.unwrap_or(true))?;
    let reading = reading(truncate, truncation_direction, prompt_name)?;
    let (vectors, usage) = work::embed(&state, &model, &asked.call, one(inputs), reading, shape).await?;
    let metadata = Some(metadata(&usage, &asked.call));
    Ok((EmbedResponse { embeddings: vectors.into_iter().next().unwrap_or_default(), metadata }, Some(usage)))
}

async fn embed_all(
    state: Arc<State>,
    asked: Asked,
    message: EmbedAllRequest,
) -> Result<(EmbedAllResponse, Option<Usage>), Failure> {
    let EmbedAllRequest { inputs, truncate, truncation_direction, prompt_name } = message;
    let model = state.model(asked.model())?;
    let reading = reading(truncate, truncation_direction, prompt_name)?;
    let (states, usage) = native::states(&state, &model, &asked.call, one(inputs), reading).await?;
    let rows = states.iter().flat_map(|text| text.values.chunks_exact(text.hidden_size.max(1)));
    let token_embeddings = rows.map(|row| TokenEmbedding { embeddings: row.to_vec() }).collect();
    Ok((EmbedAllResponse { token_embeddings, metadata: Some(metadata(&usage, &asked.call)) }, Some(usage)))
}

async fn tokenize(state: Arc<State>, asked: Asked, message: EncodeRequest) -> Result<(EncodeResponse, Option<Usage>), Failure> {
    let EncodeRequest { inputs, add_special_tokens, prompt_name } = message;
    let model = state.model(asked.model())?;
    let tokens = tokens::tokens(&state, &model, vec![inputs], prompt_name.as_deref(), add_special_tokens).await?;
    let tokens = tokens.into_iter().flatten().map(|token| SimpleToken {
        id: token.id,
        text: token.text,
        special: token.special,
        start: token.start.map(count),
        stop: token.stop.map(count),
    });
    Ok((EncodeResponse { tokens: tokens.collect() }, None))
}

async fn decode(state: Arc<State>, asked: Asked, message: DecodeRequest) -> Result<(DecodeResponse, Option<Usage>), Failure> {
    let model = state.model(asked.model())?;
    let texts = tokens::texts(&state, &model, vec![message.ids], message.skip_special_tokens).await?;
    Ok((DecodeResponse { text: texts.concat() }, None))
}

fn one(text: String) -> Inputs {
    Inputs { items: vec![Item::Text(text)], listed: false }
}

/// As TEI reads a message: what is not said is false, and cuts the end.
fn reading(truncate: bool, direction: i32, prompt_name: Option<String>) -> Result<Reading, Failure> {
    let side = match TruncationDirection::try_from(direction) {
        Ok(TruncationDirection::Right) => Side::Right,
        Ok(TruncationDirection::Left) => Side::Left,
        Err(_) => {
            let message = format!("`truncation_direction` is {direction}; 0 (right) and 1 (left) are known");
            return Err(Failure::validation("truncation_direction", message));
        }
    };
    Ok(Reading { param: "inputs", truncate, side: Some(side), prompt_name })
}

fn metadata(usage: &Usage, call: &Call) -> Metadata {
    let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    Metadata {
        compute_chars: count(usage.characters),
        compute_tokens: count(usage.tokens),
        total_time_ns: nanoseconds(call.arrived.elapsed()),
        tokenization_time_ns: nanoseconds(usage.tokenization),
        queue_time_ns: nanoseconds(usage.queue),
        inference_time_ns: nanoseconds(usage.inference),
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// TEI's codes where TEI has the failure.
fn code(failure: &Failure) -> Code {
    match failure.kind {
        Kind::Malformed | Kind::Empty | Kind::Validation | Kind::MediaType => Code::InvalidArgument,
        // As tonic says it.
        Kind::TooLarge => Code::OutOfRange,
        Kind::Unauthorized => Code::Unauthenticated,
        Kind::UnknownModel => Code::NotFound,
        Kind::UnknownRoute | Kind::Method => Code::Unimplemented,
        Kind::Timeout => Code::DeadlineExceeded,
        Kind::Tokenizer | Kind::Backend | Kind::Conflict => Code::FailedPrecondition,
        Kind::Overloaded if failure.reason == "deadline" => Code::DeadlineExceeded,
        Kind::Overloaded => Code::ResourceExhausted,
        Kind::Unhealthy => Code::Unavailable,
    }
}

/// With the failure as its source, for the front door.
impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let mut status = Self::new(code(&failure), &failure.message);
        if matches!(failure.kind, Kind::Overloaded | Kind::Unhealthy) {
            status.metadata_mut().insert("grpc-retry-pushback-ms", tonic::metadata::MetadataValue::from_static(RETRY_AFTER));
        }
        status.set_source(Arc::new(failure));
        status
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error;

    #[test]
    fn failures_have_teis_codes_and_come_back_whole() {
        for (kind, reason, expected, retries) in [
            (Kind::Empty, "empty", Code::InvalidArgument, false),
            (Kind::Validation, "batch_size", Code::InvalidArgument, false),
            (Kind::Tokenizer, "tokenizer", Code::FailedPrecondition, false),
            (Kind::Backend, "backend", Code::FailedPrecondition, false),
            (Kind::Overloaded, "queue_tokens", Code::ResourceExhausted, true),
            (Kind::Overloaded, "deadline", Code::DeadlineExceeded, true),
            (Kind::Unhealthy, "draining", Code::Unavailable, true),
            (Kind::Unauthorized, "unauthorized", Code::Unauthenticated, false),
        ] {
            let status = Status::from(Failure::new(kind, reason, "what is wrong"));
            assert_eq!((status.code(), status.message()), (expected, "what is wrong"));
            assert_eq!(status.metadata().get("grpc-retry-pushback-ms").is_some(), retries, "{reason}");
            assert!(status.source().is_some());
            let failure = door::failure_of(status);
            assert_eq!((failure.kind, failure.reason), (kind, reason));
        }
    }
}

//! grpc.health.v1: SERVING where /health/ready says 200, for the whole server and for each service.

use super::super::failure::{Failure, Kind};
use super::super::state::{Phase, State};
use futures_util::stream;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

/// How often a watch looks, as often as the watchdog does.
const PERIOD: Duration = Duration::from_millis(500);
/// Watches at a time: each channel of a client that balances its load has one.
const MOST_WATCHES: usize = 1024;

/// See the module.
pub(super) struct Service {
    state: Arc<State>,
    watches: Arc<Semaphore>,
}

pub(super) fn service(state: &Arc<State>) -> HealthServer<Service> {
    // Names of services are short.
    HealthServer::new(Service { state: state.clone(), watches: Arc::new(Semaphore::new(MOST_WATCHES)) })
        .max_decoding_message_size(1024)
}

/// None for a service that there is not.
fn status(state: &State, service: &str) -> Option<ServingStatus> {
    match service {
        "" | "tei.v1.Info" | "tei.v1.Embed" | "tei.v1.Tokenize" => {
            Some(if state.ready().is_ok() { ServingStatus::Serving } else { ServingStatus::NotServing })
        }
        // No model does what they ask for.
        "tei.v1.Predict" | "tei.v1.Rerank" => Some(ServingStatus::NotServing),
        _ => None,
    }
}

#[tonic::async_trait]
impl Health for Service {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        let service = request.into_inner().service;
        let status = status(&self.state, &service).ok_or_else(|| Status::not_found(format!("there is no service {service}")))?;
        Ok(Response::new(HealthCheckResponse { status: status.into() }))
    }

    type WatchStream = BoxStream<HealthCheckResponse>;

    /// The status now and whenever it changes. When the server ends, the last one is NOT_SERVING.
    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let place = self.watches.clone().try_acquire_owned().map_err(|_| {
            let message = format!("{MOST_WATCHES} clients watch, as many as may; use Check");
            Status::from(Failure::new(Kind::Overloaded, "watches", message))
        })?;
        let (state, service) = (self.state.clone(), request.into_inner().service);
        let phase = state.phase.subscribe();
        let changes = stream::unfold((None, phase, place), move |(told, mut phase, place)| {
            let (state, service) = (state.clone(), service.clone());
            async move {
                let status = loop {
                    // It may come one day, says the protocol.
                    let now = status(&state, &service).unwrap_or(ServingStatus::ServiceUnknown);
                    if told != Some(now) {
                        break now;
                    }
                    if *phase.borrow_and_update() == Phase::Draining {
                        return None;
                    }
                    // The phase's sender lives as long as the state.
                    let _ = tokio::time::timeout(PERIOD, phase.changed()).await;
                };
                Some((Ok(HealthCheckResponse { status: status.into() }), (Some(status), phase, place)))
            }
        });
        Ok(Response::new(Box::pin(changes)))
    }
}

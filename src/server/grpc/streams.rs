//! Streams of messages: a bounded number of them is under way, their answers come in order, and the first failure ends the stream.

use super::super::access;
use super::super::failure::{Failure, Kind};
use super::super::state::{Phase, State};
use super::super::work::Usage;
use super::door::{Asked, failure_of};
use crate::Class;
use futures_util::{Stream, StreamExt, stream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status, Streaming};

/// What became of a stream's messages so far.
#[derive(Clone, Default)]
pub(super) struct Tally(Arc<Mutex<Counts>>);

#[derive(Default)]
struct Counts {
    /// Messages that were taken in, and whose answers were not given out yet.
    under_way: usize,
    usage: Option<Usage>,
    failure: Option<Failure>,
}

impl Tally {
    /// The sum of the answers, and what ended them early.
    pub fn ended(&self) -> (Option<Usage>, Option<Failure>) {
        let mut counts = self.lock();
        (counts.usage.take(), counts.failure.take())
    }

    fn add(&self, usage: Option<Usage>) {
        let mut counts = self.lock();
        counts.under_way -= 1;
        let Some(usage) = usage else { return };
        let Some(sum) = &mut counts.usage else {
            counts.usage = Some(usage);
            return;
        };
        sum.listed = true;
        sum.inputs += usage.inputs;
        sum.characters += usage.characters;
        sum.tokens += usage.tokens;
        sum.tokenization += usage.tokenization;
        // Messages wait and run side by side: the longest tells more of the stream than the sum.
        sum.queue = sum.queue.max(usage.queue);
        sum.inference = sum.inference.max(usage.inference);
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        // Nothing panics while it is locked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Answers the messages of `request` as `work` does one. As many are under way at a time as a request over HTTP may have inputs; others are not read
/// until there is room, so that HTTP/2's flow control holds the client back.
///
/// # Errors
/// A request that did not come through the front door.
pub(super) fn answer<Q, A, W, F>(
    state: &Arc<State>,
    request: Request<Streaming<Q>>,
    work: W,
) -> Result<Response<BoxStream<A>>, Status>
where
    Q: Send + 'static,
    A: Send + 'static,
    W: Fn(Arc<State>, Asked, Q) -> F + Copy + Send + 'static,
    F: Future<Output = Result<(A, Option<Usage>), Failure>> + Send + 'static,
{
    let mut asked = Asked::of(&request)?;
    // Who has a single question sends no stream.
    asked.call.class = asked.call.class.or(Some(Class::Bulk));
    asked.call.streamed = true;
    let tally = Tally::default();
    let (shared, counted) = (state.clone(), tally.clone());
    let answers = messages(state.clone(), tally.clone(), request.into_inner()).map(move |message| {
        let (state, mut asked) = (shared.clone(), asked.clone());
        async move {
            let message = message?;
            asked.call.arrived = Instant::now();
            let deadline = asked.call.arrived + state.settings.request_timeout;
            asked.call.deadline = asked.until.map_or(deadline, |until| until.min(deadline));
            work(state, asked, message).await
        }
    });
    let answers = answers.buffered(state.settings.max_client_batch_size.max(1)).map(move |answer| match answer {
        Ok((answer, usage)) => {
            counted.add(usage);
            Ok(answer)
        }
        Err(failure) => {
            counted.lock().failure = Some(failure.clone());
            Err(Status::from(failure))
        }
    });
    let mut response = Response::new(Box::pin(answers) as BoxStream<A>);
    response.extensions_mut().insert(tally);
    Ok(response)
}

/// The messages, until their client ends them or the server ends. While none is under way the next one must come within the time of a body.
fn messages<Q: Send + 'static>(
    state: Arc<State>,
    tally: Tally,
    inbound: Streaming<Q>,
) -> impl Stream<Item = Result<Q, Failure>> + Send {
    let phase = state.phase.subscribe();
    stream::unfold(Some((inbound, phase)), move |open| {
        let (patience, tally) = (state.settings.body_timeout, tally.clone());
        async move {
            let (mut inbound, mut phase) = open?;
            let message = loop {
                let next = tokio::select! {
                    biased;
                    _ = phase.wait_for(|&phase| phase == Phase::Draining) => break Err(access::draining()),
                    next = tokio::time::timeout(patience, inbound.message()) => next,
                };
                match next {
                    Ok(Ok(None)) => return None,
                    Ok(Ok(Some(message))) => break Ok(message),
                    Ok(Err(status)) => break Err(failure_of(status)),
                    // Its client waits for an answer.
                    Err(_) if tally.lock().under_way > 0 => {}
                    Err(_) => {
                        let message = format!("the stream had no message for {patience:?}; end it, or send messages more often");
                        break Err(Failure::new(Kind::Timeout, "body_timeout", message));
                    }
                }
            };
            tally.lock().under_way += 1;
            let open = message.is_ok().then_some((inbound, phase));
            Some((message, open))
        }
    })
}

//! Answers over HTTP/2 that their client does not take. Such a client may answer pings and read other answers of its connection while it keeps the
//! window of one shut, so that no write to the connection ever waits.

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::Frame;
use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// Bytes that are given out at a time. hyper takes more only when the client has room for the first of them, so that what of an answer is not seen here
/// is at most so much.
const PART: usize = 16 * 1024;

/// The answers of one connection.
#[derive(Clone, Default)]
pub(super) struct Offers(Arc<Mutex<Waiting>>);

#[derive(Default)]
struct Waiting {
    answers: u64,
    /// Since when answers wait for their client to take what they gave last.
    since: BTreeMap<u64, Instant>,
}

/// The body of an answer.
pub(super) struct Offered {
    body: Body,
    /// What of its last frame was not given out yet.
    rest: Bytes,
    number: u64,
    offers: Offers,
}

impl Offers {
    pub fn offer(&self, body: Body) -> Offered {
        let mut waiting = self.lock();
        waiting.answers += 1;
        let number = waiting.answers;
        waiting.since.insert(number, Instant::now());
        Offered { body, rest: Bytes::new(), number, offers: self.clone() }
    }

    /// Returns when an answer has waited for its client for `patience`.
    pub async fn stalled(&self, patience: Duration) {
        loop {
            let oldest = self.lock().since.values().min().copied();
            match oldest.map(|since| since.elapsed()) {
                Some(age) if age >= patience => return,
                age => tokio::time::sleep(patience - age.unwrap_or_default()).await,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Nothing panics while it is locked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HttpBody for Offered {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.rest.is_empty() {
            match Pin::new(&mut self.body).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) if frame.data_ref().is_some_and(|data| data.len() > PART) => {
                    self.rest = frame.into_data().unwrap_or_default();
                }
                frame => return self.given(frame),
            }
        }
        let length = self.rest.len().min(PART);
        let part = self.rest.split_to(length);
        self.given(Poll::Ready(Some(Ok(Frame::data(part)))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }
}

impl Offered {
    /// From now on it waits for its client, unless it has nothing to give.
    fn given<T>(&self, frame: Poll<T>) -> Poll<T> {
        let mut waiting = self.offers.lock();
        if frame.is_ready() {
            waiting.since.insert(self.number, Instant::now());
        } else {
            waiting.since.remove(&self.number);
        }
        drop(waiting);
        frame
    }
}

impl Drop for Offered {
    fn drop(&mut self) {
        self.offers.lock().since.remove(&self.number);
    }
}

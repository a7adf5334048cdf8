//! Calls and submissions on an executor that counts: nothing is timed.

use super::*;
use crate::Class;
use crate::scheduler::LineSettings;
use std::collections::HashSet;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;

/// Values of a vector: the row's first id, twice.
const DIM: usize = 2;
/// Rows of one batch.
const ROWS: usize = 64;
/// First ids that the executor fails, panics or gives NaN for.
const FAILS: u32 = 200;
const PANICS: u32 = 201;
const NAN: u32 = 202;
/// Tokens that may wait.
const QUEUE_TOKENS: usize = 100_000;
/// How long a batch waits for its gate.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs batches that a gate lets through, and keeps the first id of each that has begun.
#[derive(Default)]
struct Fake {
    parallelism: usize,
    open: Mutex<usize>,
    opened: Condvar,
    begun: Mutex<Vec<u32>>,
    running: AtomicUsize,
}

impl Fake {
    fn closed(parallelism: usize) -> Arc<Self> {
        Arc::new(Self { parallelism, ..Self::default() })
    }

    fn open(parallelism: usize) -> Arc<Self> {
        let fake = Self::closed(parallelism);
        fake.let_through(usize::MAX / 2);
        fake
    }

    fn let_through(&self, batches: usize) {
        *self.open.lock().unwrap() += batches;
        self.opened.notify_all();
    }

    fn begun(&self) -> Vec<u32> {
        self.begun.lock().unwrap().clone()
    }

    fn wait_for(&self, batches: usize) {
        until(|| self.begun.lock().unwrap().len() == batches);
    }
}

fn first_ids(batch: &TokenBatch) -> Vec<u32> {
    (0..batch.batch()).map(|row| batch.row(row)[0] as u32).collect()
}

impl Backend for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn encode(&self, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
        let ids = first_ids(batch);
        assert!(self.running.fetch_add(1, Ordering::SeqCst) < self.parallelism, "more than {} run", self.parallelism);
        self.begun.lock().unwrap().push(ids[0]);
        {
            // A test that fails must not wait for itself.
            let (mut open, waited) =
                self.opened.wait_timeout_while(self.open.lock().unwrap(), PATIENCE, |open| *open == 0).unwrap();
            assert!(!waited.timed_out(), "nobody opened the gate");
            *open -= 1;
        }
        self.running.fetch_sub(1, Ordering::SeqCst);
        assert!(!ids.contains(&PANICS), "id {PANICS}");
        if ids.contains(&FAILS) {
            return Err(Error::Backend { backend: "fake", reason: format!("id {FAILS}, first is {}", ids[0]) });
        }
        for (vector, id) in out.chunks_exact_mut(DIM).zip(ids) {
            vector.fill(if id == NAN { f32::NAN } else { id as f32 });
        }
        Ok(())
    }

    fn hidden(&self, _: &TokenBatch, _: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn limits(&self) -> Limits {
        Limits { max_batch: ROWS, max_seq: 96, batch_tokens: usize::MAX, parallelism: self.parallelism }
    }
}

/// The tokenizer of the fixture before `fake`.
fn embedder(fake: &Arc<Fake>) -> Embedder {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/bert");
    let real = Embedder::builder(folder).backend(BackendChoice::Cpu).threads(2).build().unwrap();
    let limits = fake.limits();
    Embedder {
        info: Info { dim: DIM, limits, backend: fake.name(), ..real.info },
        backend: fake.clone(),
        #[cfg(feature = "serve")]
        bare: None,
        scheduler: Arc::new(Scheduler::new(LineSettings {
            plan: BatchPlan::new(ROWS, usize::MAX, limits.parallelism),
            queue_tokens: Some(QUEUE_TOKENS),
            overtakings: 2,
            linger: Duration::ZERO,
        })),
        // Every batch is full: what matters here is how many there are.
        plan: BatchPlan::new(ROWS, usize::MAX, 1),
        ..real
    }
}

/// So many rows of one id and of one length.
fn rows(id: u32, count: usize) -> Vec<[u32; 2]> {
    vec![[id, 7]; count]
}

fn until(holds: impl Fn() -> bool) {
    while !holds() {
        thread::yield_now();
    }
}

#[test]
fn a_short_call_waits_for_the_batches_that_run_and_one_more_at_most() {
    for (bulk_calls, parallelism, bulk_texts) in [(1, 1, 100_000), (5, 1, 100_000), (1, 3, 10_000), (5, 3, 10_000)] {
        // One text, on the caller's thread, and two batches of another id.
        for texts in [1, ROWS + 1] {
            let fake = Fake::closed(parallelism);
            let embedder = embedder(&fake);
            thread::scope(|scope| {
                for call in 0..bulk_calls {
                    let embedder = &embedder;
                    scope.spawn(move || embedder.embed_ids(&rows(10 + call, bulk_texts / bulk_calls as usize)).unwrap());
                }
                until(|| embedder.scheduler.waiting() == bulk_calls as usize);
                // Somewhere in the middle.
                fake.let_through(23);
                fake.wait_for(23 + parallelism);
                scope.spawn(|| embedder.embed_ids(&rows(99, texts)).unwrap());
                until(|| embedder.scheduler.waiting() == bulk_calls as usize + 1);
                // One place at a time becomes free.
                let before = fake.begun().len();
                let more = (0..).find(|more| {
                    fake.let_through(1);
                    fake.wait_for(before + more + 1);
                    fake.begun().last() == Some(&99)
                });
                fake.let_through(1_000_000);
                assert!(more <= Some(1), "{more:?} of {bulk_calls} calls' batches began before {texts} texts");
            });
            assert!(fake.begun().len() > bulk_texts / ROWS);
        }
    }
}

#[test]
fn each_text_has_its_own_result_in_order() {
    let fake = Fake::open(2);
    let embedder = embedder(&fake);
    let (vocabulary, empty) = (embedder.info.config.vocab_size as u32, vec![]);
    let ids = vec![vec![11, 1, 1], vec![12], vec![vocabulary], vec![NAN, 1], empty, vec![13, 1]];
    let results = embedder.submit_ids(&ids, SubmitSettings::default()).unwrap().wait();
    assert_eq!(results.len(), ids.len());
    for (text, first) in [(0, 11.0), (1, 12.0), (5, 13.0)] {
        let embedding = results[text].as_ref().unwrap();
        assert_eq!((embedding.values.as_slice(), embedding.tokens as usize), (&[first; DIM][..], ids[text].len()));
    }
    assert!(matches!(results[2], Err(Error::TokenId { text: 2, .. })), "{:?}", results[2]);
    assert!(matches!(results[3], Err(Error::NotFinite { text: 3, component: 0, .. })), "{:?}", results[3]);
    assert!(matches!(results[4], Err(Error::Setting { .. })), "{:?}", results[4]);

    let texts = ["the cat sat", "", "a dog"];
    let waited = embedder.embed(&texts).unwrap();
    let submission = embedder.submit(&texts, SubmitSettings::default()).unwrap();
    let submitted: Vec<Embedding> = submission.wait().into_iter().map(Result::unwrap).collect();
    assert!(submitted.iter().map(|embedding| embedding.values.as_slice()).eq(waited.rows()));
    assert_eq!(submitted.iter().map(|embedding| embedding.tokens).collect::<Vec<_>>(), waited.tokens);

    let nothing = embedder.submit_ids(&rows(1, 0), SubmitSettings::default()).unwrap();
    assert!(nothing.is_done() && nothing.wait().is_empty());
}

#[test]
fn what_would_make_the_line_too_long_is_refused_at_once() {
    let fake = Fake::closed(1);
    let embedder = embedder(&fake);
    let submit = |count, class| embedder.submit_ids(&rows(10, count), SubmitSettings::default().with_class(class));
    let first = submit(ROWS, Class::Interactive).unwrap();
    fake.wait_for(1);
    let second = submit(ROWS, Class::Bulk).unwrap();
    let third = submit(QUEUE_TOKENS / 2 - ROWS - 1, Class::Interactive).unwrap();
    let error = submit(2, Class::Bulk).unwrap_err();
    assert!(
        matches!(error, Error::Overloaded { waiting, limit: QUEUE_TOKENS, texts: 2, tokens: 4 } if waiting == QUEUE_TOKENS - 2),
        "{error}"
    );
    assert!(submit(1 + QUEUE_TOKENS / 2, Class::Bulk).unwrap_err().to_string().contains("fewer texts at a time"));
    let status = embedder.queue();
    assert_eq!((status.bulk.texts, status.bulk.tokens, status.waiting_tokens()), (ROWS, 2 * ROWS, QUEUE_TOKENS - 2));
    assert_eq!((status.running, status.batches, status.rejected), (1, 1, 2 + 1 + QUEUE_TOKENS as u64 / 2));
    third.cancel();
    assert_eq!(embedder.queue().interactive, Default::default());
    fake.let_through(100);
    let queued = |submission: Submission| submission.wait().into_iter().map(|result| result.unwrap().queued).min().unwrap();
    assert!(queued(first) < queued(second));
    let status = embedder.queue();
    assert_eq!((status.waiting_tokens(), status.tokens, status.run_tokens), (0, 4 * ROWS as u64, 4 * ROWS as u64));
    assert_eq!((status.texts, status.cancelled), (2 * ROWS as u64, (QUEUE_TOKENS / 2 - ROWS - 1) as u64));
}

#[test]
fn an_executors_failure_is_that_of_the_texts_of_its_batch() {
    for (bad, said) in [(FAILS, "id 200, first is 200"), (PANICS, "it panicked: id 201")] {
        let embedder = embedder(&Fake::open(2));
        let all = [rows(11, ROWS), rows(bad, ROWS), rows(12, ROWS)].concat();
        let results = embedder.submit_ids(&all, SubmitSettings::default()).unwrap().wait();
        for (text, result) in results.iter().enumerate() {
            match (text / ROWS, result) {
                (0 | 2, Ok(_)) => {}
                (1, Err(Error::Batch { texts: ROWS, source })) => assert!(source.to_string().contains(said), "{source}"),
                other => panic!("{other:?}"),
            }
        }
        // A call ends with it.
        let error = embedder.embed_ids(&all).unwrap_err();
        assert!(matches!(&error, Error::Backend { reason, .. } if reason.contains(said)), "{error}");
        embedder.embed_ids(&rows(11, 3 * ROWS)).unwrap();
    }
}

#[test]
fn of_several_failures_a_call_tells_the_first_batch_s_and_begins_no_more() {
    let fake = Fake::open(2);
    let embedder = embedder(&fake);
    for _ in 0..30 {
        fake.begun.lock().unwrap().clear();
        let mut all = rows(11, 500 * ROWS);
        all[0][0] = FAILS;
        all[ROWS + 1][0] = FAILS;
        let error = embedder.embed_ids(&all).unwrap_err().to_string();
        assert!(error.ends_with("first is 200"), "{error}");
        // Each of the two threads may have begun one since.
        assert!(fake.begun().len() <= 4, "{}", fake.begun().len());
        let mut out = [0.0; DIM];
        let error = embedder.embed_ids_into(&[[NAN, 1]], &mut out).unwrap_err();
        assert!(matches!(error, Error::NotFinite { text: 0, .. }), "{error}");
    }
}

#[test]
fn expired_and_cancelled_texts_are_never_run() {
    let fake = Fake::closed(1);
    let embedder = embedder(&fake);
    let submit = |id, batches: usize, deadline| {
        embedder.submit_ids(&rows(id, batches * ROWS), SubmitSettings { deadline, ..SubmitSettings::default() }).unwrap()
    };
    let (running, deadline) = (submit(10, 3, None), Instant::now() + Duration::from_millis(2));
    fake.wait_for(1);
    let (late, given_up) = (submit(11, 2, Some(deadline)), submit(12, 2, None));
    drop(submit(13, 2, None));
    given_up.cancel();
    assert!(given_up.is_done() && !running.is_done());
    assert!(given_up.wait().iter().all(|result| matches!(result, Err(Error::Cancelled { .. }))));
    until(|| Instant::now() > deadline);
    fake.let_through(1);
    // It is told at the end of the next batch.
    for result in late.wait() {
        assert!(matches!(&result, Err(Error::DeadlineExceeded { patience }) if patience.as_millis() <= 2), "{result:?}");
    }
    fake.wait_for(2);
    running.cancel();
    fake.let_through(100);
    let results = running.wait();
    assert!(results[..2 * ROWS].iter().all(Result::is_ok));
    assert!(results[2 * ROWS..].iter().all(|result| matches!(result, Err(Error::Cancelled { .. }))));
    assert_eq!(fake.begun(), [10, 10]);
}

/// Wakes a thread.
struct Unpark(thread::Thread, AtomicUsize);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.unpark();
    }
}

#[test]
fn a_submission_can_be_awaited() {
    let fake = Fake::closed(1);
    let embedder = embedder(&fake);
    let mut submission = pin!(embedder.submit_ids(&rows(10, 2 * ROWS), SubmitSettings::default()).unwrap());
    let [first, second] = [0, 1].map(|_| Arc::new(Unpark(thread::current(), AtomicUsize::new(0))));
    let mut poll = |unpark: &Arc<Unpark>| {
        let waker = Waker::from(unpark.clone());
        submission.as_mut().poll(&mut Context::from_waker(&waker))
    };
    assert!(poll(&first).is_pending() && poll(&second).is_pending());
    fake.let_through(2);
    let results = loop {
        match poll(&second) {
            Poll::Ready(results) => break results,
            Poll::Pending => thread::park(),
        }
    };
    assert!(results.len() == 2 * ROWS && results.iter().all(Result::is_ok));
    // The waker of the last poll alone.
    assert_eq!(first.1.load(Ordering::SeqCst), 0);
    assert!(poll(&second).is_ready(), "once more, without results");
}

#[test]
fn a_row_runs_at_once_where_it_need_not_wait() {
    let fake = Fake::closed(1);
    let embedder = embedder(&fake);
    let row = |id: u32| Row { ids: vec![id, 7], truncated: false };
    // One place, which another has.
    let submission = embedder.submit_ids(&rows(10, 1), SubmitSettings::default()).unwrap();
    fake.wait_for(1);
    assert_eq!(embedder.run_row_at_once(row(11), 0).err().map(|row| row.ids), Some(vec![11, 7]));
    fake.let_through(usize::MAX / 2);
    submission.wait();
    until(|| embedder.queue().running == 0);
    let run = |id: u32| embedder.run_row_at_once(row(id), 0).ok().unwrap().wait().remove(0);
    let embedding = run(12).unwrap();
    assert_eq!((embedding.values, embedding.tokens), (vec![12.0, 12.0], 2));
    // What goes wrong is told as of what is submitted, and takes nothing along.
    for (id, says) in [(FAILS, "id 200"), (PANICS, "panicked"), (NAN, "NaN")] {
        let error = run(id).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    assert_eq!(embedder.queue().running, 0);
    assert!(run(13).is_ok());
}

#[test]
fn a_callback_gets_the_results_and_may_drop_the_embedder() {
    let fake = Fake::closed(1);
    let embedder = embedder(&fake);
    let (sender, receiver) = mpsc::channel();
    let submission = embedder.submit_ids(&rows(10, 2 * ROWS), SubmitSettings::default()).unwrap();
    let told = sender.clone();
    let owned = embedder.with_prompt_name("").unwrap();
    drop(embedder);
    submission.on_done(move |results| {
        drop(owned);
        told.send(results.len()).unwrap();
    });
    fake.let_through(100);
    assert_eq!(receiver.recv().unwrap(), 2 * ROWS);

    let embedder = self::embedder(&Fake::open(1));
    let done = embedder.submit_ids(&rows(10, 3), SubmitSettings::default()).unwrap();
    until(|| done.is_done());
    done.on_done(move |results| sender.send(results.len()).unwrap());
    assert_eq!(receiver.try_recv(), Ok(3));
    let fake = Fake::closed(1);
    let embedder = self::embedder(&fake);
    embedder.submit_ids(&rows(10, 3), SubmitSettings::default()).unwrap().on_done(|_| panic!("in a callback"));
    fake.let_through(100);
    embedder.embed_ids(&rows(10, 3 * ROWS)).unwrap();
}

#[test]
fn dropping_the_embedder_ends_what_runs_and_cancels_what_waits() {
    let fake = Fake::closed(1);
    let embedder = embedder(&fake);
    let submission = embedder.submit_ids(&rows(10, 3 * ROWS), SubmitSettings::default()).unwrap();
    fake.wait_for(1);
    // Those of one executor take turns together: it lives as long as any of them.
    let other = embedder.with_prompt_name("").unwrap();
    assert!(Arc::ptr_eq(&other.scheduler, &embedder.scheduler));
    drop(embedder);
    assert_eq!(other.scheduler.waiting(), 1);
    thread::scope(|scope| {
        scope.spawn(move || drop(other));
        // The last batch to end is the one that runs.
        assert!(!submission.is_done());
        until(|| fake.running.load(Ordering::SeqCst) == 1);
        thread::sleep(Duration::from_millis(20));
        fake.let_through(100);
    });
    let results = submission.wait();
    assert!(results[..ROWS].iter().all(Result::is_ok));
    assert!(results[ROWS..].iter().all(|result| matches!(result, Err(Error::Cancelled { .. }))));
    assert_eq!(fake.begun(), [10]);
}

#[test]
fn callers_of_all_kinds_at_once_get_what_is_theirs() {
    let fake = Fake::open(3);
    let embedder = embedder(&fake);
    thread::scope(|scope| {
        for caller in 0..12_u32 {
            let embedder = &embedder;
            scope.spawn(move || {
                let id = 20 + caller;
                for round in 0..60_usize {
                    let count = [1, ROWS, 5 * ROWS + 3][round % 3];
                    let mut out = vec![0.0; count * DIM];
                    match caller % 3 {
                        0 => embedder.embed_ids_into(&rows(id, count), &mut out).unwrap(),
                        1 => {
                            let submission = embedder.submit_ids(&rows(id, count), SubmitSettings::default()).unwrap();
                            let results = submission.wait().into_iter().map(Result::unwrap);
                            out = results.flat_map(|embedding| embedding.values).collect();
                        }
                        _ => {
                            let submission = embedder.submit_ids(&rows(id, count), SubmitSettings::default()).unwrap();
                            if round % 2 == 0 {
                                submission.cancel();
                            }
                            let results = submission.wait();
                            assert_eq!(results.len(), count);
                            out.fill(id as f32);
                        }
                    }
                    assert!(out.iter().all(|&value| value == id as f32));
                }
            });
        }
    });
    assert_eq!(embedder.scheduler.waiting(), 0);
}

/// A text that writes down the thread that reads it.
struct Noted<'a>(&'a str, &'a Mutex<HashSet<String>>);

impl AsRef<str> for Noted<'_> {
    fn as_ref(&self) -> &str {
        let name = thread::current().name().unwrap_or("nameless").to_owned();
        self.1.lock().unwrap().insert(name);
        self.0
    }
}

#[test]
fn texts_of_all_callers_are_tokenised_on_the_embedder_s_own_threads() {
    // Two, as `embedder` asks for.
    let embedder = embedder(&Fake::open(2));
    let seen = Mutex::new(HashSet::new());
    let text = "the cat sat on the mat ".repeat(20);
    thread::scope(|scope| {
        for _ in 0..6 {
            let caller = thread::Builder::new().name("caller".into());
            let call = || {
                let many: Vec<_> = (0..50).map(|_| Noted(&text, &seen)).collect();
                for _ in 0..3 {
                    embedder.tokenize(&many).unwrap();
                    embedder.submit(&many[..30], SubmitSettings::default()).unwrap().wait();
                }
            };
            caller.spawn_scoped(scope, call).unwrap();
        }
    });
    let mut seen = seen.into_inner().unwrap();
    // The caller itself looks how long the texts are.
    assert!(seen.remove("caller"));
    assert!(seen.iter().all(|name| name.starts_with("trt-embed-tokens-")), "{seen:?}");
    assert!((1..=2).contains(&seen.len()), "{seen:?}");

    let (seen, embedder) = (Mutex::new(HashSet::new()), self::embedder(&Fake::open(2)));
    embedder.tokenize(&[Noted(&text.repeat(20), &seen)]).unwrap();
    assert_eq!(seen.into_inner().unwrap().len(), 1, "one text stays on its caller's thread");
}

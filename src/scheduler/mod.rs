//! Who runs when. Callers, jobs and texts take turns at one executor, as many batches at once as it has places; what is begun next, [`line`] says.
//!
//! A caller with one batch runs it on its own thread when its turn comes ([`Scheduler::turn`]). Jobs of several batches ([`Scheduler::run`]) and
//! texts, which share batches ([`Scheduler::submit`]), are run by worker threads, which start when there is something for them and end with
//! the scheduler.

mod line;
mod pack;
mod queue;
mod status;

use crate::tokens::BatchSize;
pub(crate) use line::{Full, Line, LineSettings, NewTexts, Next, Pack, Part};
pub(crate) use queue::Flow;
pub use status::{Class, QueueStatus, Waiting};
use std::collections::VecDeque;
use std::ops::{ControlFlow, Range};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::Instant;

/// Batches that belong together. `run` and `leave` are called from any thread, without a lock held.
pub(crate) trait Work: Send + Sync {
    /// How many batches there are.
    fn batches(&self) -> usize;

    /// How large a batch is.
    fn size(&self, batch: usize) -> BatchSize;

    /// Runs a batch; others of the same work run at the same time. `Break` gives up those that have not begun.
    fn run(&self, batch: usize) -> ControlFlow<()>;

    /// These batches will never begin.
    fn leave(&self, batches: Range<usize>, reason: Left);
}

/// Texts that were submitted together. `run` and `leave` are called from any thread, without a lock held.
pub(crate) trait Texts: Send + Sync + Sized {
    /// Runs a batch of the texts of one or several submissions; others of the same submissions run at the same time.
    fn run(pack: Vec<Part<Arc<Self>>>);

    /// These texts will never begin.
    fn leave(&self, texts: &[u32], reason: Left);
}

/// Why something was never begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    /// The deadline passed before its turn came.
    Expired,
    /// The caller gave it up, or the scheduler ended.
    Cancelled,
    /// A batch before it broke off.
    Broken,
}

/// Why texts were not taken.
#[derive(Debug)]
pub(crate) enum Refused {
    /// The system's reason, where not a single worker can be started.
    NoThread(std::io::Error),
    /// More tokens would wait than may.
    Full(Full),
}

/// See the module. Dropping it gives up what has not begun, and waits for what has.
pub(crate) struct Scheduler<T: Texts + 'static> {
    shared: Arc<Shared<T>>,
}

/// A place at the executor, given back when dropped.
pub(crate) struct Turn<'a, T: Texts + 'static>(&'a Arc<Shared<T>>);

/// Texts that were submitted.
pub(crate) struct Submitted<T: Texts + 'static> {
    shared: Arc<Shared<T>>,
    id: u64,
}

struct Shared<T: Texts + 'static> {
    /// Batches that run at once.
    capacity: usize,
    state: Mutex<State<T>>,
    /// Where workers wait for a batch.
    work: Condvar,
}

struct State<T: Texts> {
    line: Line<Caller, Arc<T>>,
    /// Places taken: turns that are held, and batches with workers or on their way to one.
    running: usize,
    /// Batches whose turn has come and that no worker has yet.
    ready: VecDeque<Batch<T>>,
    workers: Vec<JoinHandle<()>>,
    /// Workers that wait, or are about to look for work for the first time.
    idle: usize,
    /// When a worker must look at the line again, where it lingers.
    look_at: Option<Instant>,
    jobs: u64,
    closed: bool,
}

enum Caller {
    Thread(Arc<Parked>),
    Job(Job),
}

/// The batches of a job that have not begun.
struct Job {
    id: u64,
    work: Arc<dyn Work>,
    next: usize,
    flow: Flow,
}

enum Batch<T> {
    OfJob { job: u64, work: Arc<dyn Work>, number: usize },
    OfTexts(Pack<Arc<T>>),
}

/// A thread that waits for its turn.
struct Parked {
    thread: Thread,
    granted: AtomicBool,
}

thread_local! {
    /// Made once a thread, so that waiting allocates nothing.
    static PARKED: Arc<Parked> = Arc::new(Parked::here());
}

impl Parked {
    fn here() -> Self {
        Self { thread: thread::current(), granted: AtomicBool::new(false) }
    }

    fn wait(&self) {
        while !self.granted.swap(false, Ordering::Acquire) {
            thread::park();
        }
    }

    fn grant(&self) {
        self.granted.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

impl Job {
    fn leave(self, reason: Left) {
        self.work.leave(self.next..self.work.batches(), reason);
    }
}

impl<T: Texts + 'static> Scheduler<T> {
    /// For the executor that the settings describe.
    pub fn new(settings: LineSettings) -> Self {
        let capacity = settings.plan.parallelism.max(1);
        let state = State {
            line: Line::new(settings),
            running: 0,
            ready: VecDeque::new(),
            workers: Vec::new(),
            idle: 0,
            look_at: None,
            jobs: 0,
            closed: false,
        };
        Self { shared: Arc::new(Shared { capacity, state: Mutex::new(state), work: Condvar::new() }) }
    }

    /// Waits until the next batch of `flow`, of `size`, may run on this thread. Allocates nothing on a thread that has waited before, and takes one
    /// lock for a moment; giving the turn back takes it once more.
    pub fn turn(&self, flow: &mut Flow, size: BatchSize) -> Turn<'_, T> {
        let mut state = self.shared.lock();
        if state.running < self.shared.capacity && state.line.is_empty() {
            state.running += 1;
            state.line.pass(flow, size);
            return Turn(&self.shared);
        }
        // Where thread-local values are gone already, the thread is ending: it gets one for this wait.
        let parked = PARKED.try_with(Arc::clone).unwrap_or_else(|_| Arc::new(Parked::here()));
        state.line.wait(size, *flow, |next| {
            *flow = next;
            Caller::Thread(parked.clone())
        });
        if state.running < self.shared.capacity {
            // Only texts that linger let a place be free.
            self.shared.dispatch(state, 0);
        } else {
            drop(state);
        }
        parked.wait();
        Turn(&self.shared)
    }

    /// A turn for texts of `size`, where they would begin at once and alone if they were submitted: their caller can then run them itself, which saves
    /// two changes of threads.
    #[cfg(any(test, feature = "serve"))]
    pub fn turn_at_once(&self, size: BatchSize) -> Option<Turn<'_, T>> {
        let mut state = self.shared.lock();
        let at_once = state.running < self.shared.capacity && state.line.is_empty() && !state.line.lingers();
        at_once.then(|| {
            state.running += 1;
            state.line.pass(&mut Flow::default(), size);
            Turn(&self.shared)
        })
    }

    /// Puts `work`, which has at least one batch, in line for the workers.
    ///
    /// # Errors
    /// The system's, where not a single worker can be started.
    pub fn run(&self, work: Arc<dyn Work>) -> std::io::Result<()> {
        let mut state = self.shared.lock();
        self.shared.need_worker(&mut state)?;
        let id = state.jobs;
        state.jobs += 1;
        state.line_up(Job { id, work, next: 0, flow: Flow::default() });
        self.shared.dispatch(state, 0);
        Ok(())
    }

    /// Puts `texts`, at least one, in line for the workers.
    ///
    /// # Errors
    /// See [`Refused`].
    pub fn submit(&self, texts: NewTexts<Arc<T>>) -> Result<Submitted<T>, Refused> {
        let mut state = self.shared.lock();
        self.shared.need_worker(&mut state).map_err(Refused::NoThread)?;
        let id = state.line.submit(texts).map_err(Refused::Full)?;
        self.shared.dispatch(state, 0);
        Ok(Submitted { shared: self.shared.clone(), id })
    }

    /// What waits, what runs, and what has been.
    pub fn status(&self) -> QueueStatus {
        let state = self.shared.lock();
        QueueStatus { running: state.running, ..state.line.status() }
    }

    /// Callers, jobs and submissions that wait.
    #[cfg(test)]
    pub fn waiting(&self) -> usize {
        self.shared.lock().line.len()
    }
}

impl<T: Texts + 'static> Drop for Scheduler<T> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        let (callers, texts) = state.line.drain();
        let workers = std::mem::take(&mut state.workers);
        drop(state);
        self.shared.work.notify_all();
        for caller in callers {
            // A thread holds a reference to the scheduler while it waits: there is none.
            if let Caller::Job(job) = caller {
                job.leave(Left::Cancelled);
            }
        }
        leave(texts, Left::Cancelled);
        for worker in workers {
            // The last owner may be what a worker has just called; that worker ends by itself.
            if worker.thread().id() != thread::current().id() {
                // Workers catch panics.
                let _ = worker.join();
            }
        }
    }
}

impl<T: Texts + 'static> Drop for Turn<'_, T> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.running -= 1;
        self.0.dispatch(state, 0);
    }
}

impl<T: Texts + 'static> Submitted<T> {
    /// Gives up the texts that have not begun.
    pub fn cancel(&self) {
        let gone = self.shared.lock().line.cancel(self.id);
        leave(gone, Left::Cancelled);
    }
}

impl<T: Texts> State<T> {
    /// Puts the next batch of `job` in line.
    fn line_up(&mut self, job: Job) {
        let size = job.work.size(job.next);
        self.line.wait(size, job.flow, |flow| Caller::Job(Job { flow, ..job }));
    }
}

impl<T: Texts + 'static> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing panics while it is locked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the free places to those whose turn it is. `workers_here` is 1 where a worker calls, which takes a batch that is ready itself.
    fn dispatch(self: &Arc<Self>, mut state: MutexGuard<'_, State<T>>, workers_here: usize) {
        if state.line.is_empty() && state.ready.is_empty() {
            state.look_at = None;
            return;
        }
        let now = Instant::now();
        let expired = state.line.expire(now);
        state.look_at = None;
        while state.running < self.capacity {
            let free = self.capacity - state.running;
            match state.line.next(now, free) {
                Next::Nothing => break,
                Next::Wait(until) => {
                    state.look_at = Some(until);
                    break;
                }
                Next::Caller(Caller::Thread(parked)) => parked.grant(),
                Next::Caller(Caller::Job(mut job)) => {
                    state.ready.push_back(Batch::OfJob { job: job.id, work: job.work.clone(), number: job.next });
                    job.next += 1;
                    if job.next < job.work.batches() {
                        state.line_up(job);
                    }
                }
                Next::Pack(pack) => state.ready.push_back(Batch::OfTexts(pack)),
            }
            state.running += 1;
        }
        let wanted = (state.ready.len() + usize::from(state.look_at.is_some())).saturating_sub(workers_here);
        (0..wanted.min(state.idle)).for_each(|_| self.work.notify_one());
        for _ in state.idle..wanted {
            // Those that there are will do the work where the system gives no more.
            if state.workers.len() >= self.capacity || self.start_worker(&mut state).is_err() {
                break;
            }
        }
        drop(state);
        leave(expired, Left::Expired);
    }

    fn need_worker(self: &Arc<Self>, state: &mut State<T>) -> std::io::Result<()> {
        if state.workers.is_empty() { self.start_worker(state) } else { Ok(()) }
    }

    fn start_worker(self: &Arc<Self>, state: &mut State<T>) -> std::io::Result<()> {
        let shared = self.clone();
        let worker = thread::Builder::new().name("trt-embed".into()).spawn(move || shared.run_batches())?;
        state.workers.push(worker);
        state.idle += 1;
        Ok(())
    }

    /// What a worker does.
    fn run_batches(self: Arc<Self>) {
        let mut state = self.lock();
        state.idle -= 1;
        loop {
            let Some(batch) = state.ready.pop_front() else {
                if state.closed {
                    return;
                }
                state = self.wait_for_work(state);
                continue;
            };
            drop(state);
            let mut ran = None;
            // Work answers for its executor's panics. One in what it calls at its end must not take the worker's place with it.
            match batch {
                Batch::OfTexts(Pack { parts, cost }) => {
                    let begun = Instant::now();
                    if catch_unwind(AssertUnwindSafe(|| T::run(parts))).is_err() {
                        log::error!("a batch of submitted texts panicked after it ran");
                    }
                    ran = Some((cost, begun.elapsed()));
                }
                Batch::OfJob { job, work, number } => {
                    let ended = catch_unwind(AssertUnwindSafe(|| work.run(number))).unwrap_or(ControlFlow::Break(()));
                    if ended.is_break() {
                        self.give_up(job);
                    }
                }
            }
            state = self.lock();
            state.running -= 1;
            if let Some((cost, took)) = ran {
                state.line.ran(cost, took);
            }
            self.dispatch(state, 1);
            state = self.lock();
        }
    }

    /// Waits until there may be something to do, at most as long as the line lingers.
    fn wait_for_work<'a>(self: &'a Arc<Self>, mut state: MutexGuard<'a, State<T>>) -> MutexGuard<'a, State<T>> {
        let patience = state.look_at.map(|until| until.saturating_duration_since(Instant::now()));
        if patience.is_some_and(|patience| patience.is_zero()) {
            self.dispatch(state, 1);
            return self.lock();
        }
        state.idle += 1;
        state = match patience {
            None => self.work.wait(state).unwrap_or_else(PoisonError::into_inner),
            Some(patience) => self.work.wait_timeout(state, patience).unwrap_or_else(PoisonError::into_inner).0,
        };
        state.idle -= 1;
        state
    }

    /// Takes what is left of a job out of the line: a batch of it broke off.
    fn give_up(&self, id: u64) {
        let found = self.lock().line.remove(|caller| matches!(caller, Caller::Job(job) if job.id == id));
        if let Some(Caller::Job(job)) = found {
            job.leave(Left::Broken);
        }
    }
}

fn leave<T: Texts>(parts: impl IntoIterator<Item = Part<Arc<T>>>, reason: Left) {
    parts.into_iter().for_each(|part| part.owner.leave(&part.texts, reason));
}

#[cfg(test)]
mod tests;

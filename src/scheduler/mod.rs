//! Who runs when. Callers and jobs take turns at one executor, as many at once as it has places; which of them is next, [`queue`] says.
//!
//! A caller with one batch runs it on its own thread when its turn comes ([`Scheduler::turn`]). Jobs of several batches are run by worker
//! threads ([`Scheduler::submit`]), which start when there is something for them and end with the scheduler. What a batch is, the
//! scheduler does not know.

mod queue;
mod status;

use crate::tokens::{BatchPlan, BatchSize};
use queue::FairQueue;
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

    /// The class of submitted texts; none where a caller waits here.
    fn class(&self) -> Option<Class>;

    /// How large a batch is.
    fn size(&self, batch: usize) -> BatchSize;

    /// Runs a batch; others of the same work run at the same time. `Break` gives up those that have not begun.
    fn run(&self, batch: usize) -> ControlFlow<()>;

    /// These batches will never begin.
    fn leave(&self, batches: Range<usize>, reason: Left);
}

/// Why work was not taken.
#[derive(Debug)]
pub(crate) enum Refused {
    /// The system's reason, where not a single worker can be started.
    NoThread(std::io::Error),
    /// More tokens than `limit` would wait.
    Full { waiting: usize, limit: usize, texts: usize, tokens: usize },
}

/// Why batches were never begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    /// The deadline passed before their turn came.
    Expired,
    /// The caller gave them up, or the scheduler ended.
    Cancelled,
    /// A batch before them broke off.
    Broken,
}

/// See the module. Dropping it gives up what has not begun, and waits for what has.
pub(crate) struct Scheduler {
    shared: Arc<Shared>,
}

/// A place at the executor, given back when dropped.
pub(crate) struct Turn<'a>(&'a Arc<Shared>);

/// A job that was submitted.
#[derive(Clone)]
pub(crate) struct Submitted {
    shared: Arc<Shared>,
    id: u64,
}

struct Shared {
    /// Batches that run at once.
    capacity: usize,
    /// What batches cost.
    plan: BatchPlan,
    state: Mutex<State>,
    /// Where workers wait for a batch.
    work: Condvar,
}

struct State {
    queue: FairQueue<InLine>,
    /// Places taken: turns that are held, and batches with workers or on their way to one.
    running: usize,
    /// Batches whose turn has come and that no worker has yet.
    ready: VecDeque<Batch>,
    workers: Vec<JoinHandle<()>>,
    /// Workers that wait, or are about to look for work for the first time.
    idle: usize,
    submitted: u64,
    closed: bool,
    /// All but what runs.
    status: QueueStatus,
}

enum InLine {
    Caller(Arc<Parked>),
    Job(Job),
}

/// The batches of a job that have not begun.
struct Job {
    id: u64,
    work: Arc<dyn Work>,
    next: usize,
    flow: Flow,
    deadline: Option<Instant>,
}

struct Batch {
    job: u64,
    work: Arc<dyn Work>,
    number: usize,
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

impl Scheduler {
    /// For an executor that `plan` describes. At most `limit` tokens of submitted texts wait.
    pub fn new(plan: BatchPlan, limit: Option<usize>) -> Self {
        let capacity = plan.parallelism.max(1);
        let state = State {
            queue: FairQueue::new(),
            running: 0,
            ready: VecDeque::new(),
            workers: Vec::new(),
            idle: 0,
            submitted: 0,
            closed: false,
            status: QueueStatus { limit, ..QueueStatus::default() },
        };
        Self { shared: Arc::new(Shared { capacity, plan, state: Mutex::new(state), work: Condvar::new() }) }
    }

    /// Waits until the next batch of `flow`, which has `size`, may run on this thread. Allocates nothing on a thread that has waited before,
    /// and takes one lock for a moment; giving the turn back takes it once more.
    pub fn turn(&self, flow: &mut Flow, size: BatchSize) -> Turn<'_> {
        let (cost, run_tokens) = (self.shared.plan.cost(size), self.shared.plan.run_tokens(size));
        let mut state = self.shared.lock();
        let tag = state.queue.tag(flow, cost);
        state.count(size, run_tokens);
        if state.running < self.shared.capacity && state.queue.is_empty() {
            state.running += 1;
            state.queue.pass(tag);
            return Turn(&self.shared);
        }
        // Where thread-local values are gone already, the thread is ending: it gets one for this wait.
        let parked = PARKED.try_with(Arc::clone).unwrap_or_else(|_| Arc::new(Parked::here()));
        state.queue.push(InLine::Caller(parked.clone()), tag, None);
        drop(state);
        parked.wait();
        Turn(&self.shared)
    }

    /// Puts `work`, which has at least one batch, in line for the workers. Batches that have not begun at `deadline` never will.
    ///
    /// # Errors
    /// See [`Refused`].
    pub fn submit(&self, work: Arc<dyn Work>, deadline: Option<Instant>) -> Result<Submitted, Refused> {
        let (texts, tokens) = waiting(&*work, 0..work.batches());
        let mut state = self.shared.lock();
        if state.workers.is_empty() {
            self.shared.start_worker(&mut state).map_err(Refused::NoThread)?;
        }
        if let Some(class) = work.class() {
            let waiting = state.status.waiting_tokens();
            if let Some(limit) = state.status.limit.filter(|limit| waiting.saturating_add(tokens) > *limit) {
                state.status.rejected += texts as u64;
                return Err(Refused::Full { waiting, limit, texts, tokens });
            }
            let waiting = state.status.waiting_mut(class);
            waiting.texts += texts;
            waiting.tokens += tokens;
        }
        let id = state.submitted;
        state.submitted += 1;
        state.line_up(Job { id, work, next: 0, flow: Flow::default(), deadline }, &self.shared.plan);
        self.shared.dispatch(state, 0);
        Ok(Submitted { shared: self.shared.clone(), id })
    }

    /// What waits, what runs, and what has been.
    pub fn status(&self) -> QueueStatus {
        let state = self.shared.lock();
        QueueStatus { running: state.running, ..state.status }
    }

    /// Callers and jobs that wait.
    #[cfg(test)]
    pub fn waiting(&self) -> usize {
        self.shared.lock().queue.len()
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        let mut left = Vec::new();
        while let Some(waiting) = state.queue.pop() {
            // A caller holds a reference to the scheduler while it waits: there is none.
            if let InLine::Job(job) = waiting {
                left.push(job);
            }
        }
        let workers = std::mem::take(&mut state.workers);
        drop(state);
        self.shared.work.notify_all();
        left.into_iter().for_each(|job| job.leave(Left::Cancelled));
        for worker in workers {
            // The last owner may be what a worker has just called; that worker ends by itself.
            if worker.thread().id() != thread::current().id() {
                // Workers catch panics.
                let _ = worker.join();
            }
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.running -= 1;
        self.0.dispatch(state, 0);
    }
}

impl Submitted {
    /// Gives up the batches that have not begun.
    pub fn cancel(&self) {
        self.shared.give_up(self.id, Left::Cancelled);
    }
}

impl State {
    /// Puts the next batch of `job` in line.
    fn line_up(&mut self, mut job: Job, plan: &BatchPlan) {
        let cost = plan.cost(job.work.size(job.next));
        let (tag, deadline) = (self.queue.tag(&mut job.flow, cost), job.deadline);
        self.queue.push(InLine::Job(job), tag, deadline);
    }

    /// Counts a batch that runs, or will.
    fn count(&mut self, size: BatchSize, run_tokens: usize) {
        self.status.batches += 1;
        self.status.texts += size.rows as u64;
        self.status.tokens += size.tokens as u64;
        self.status.run_tokens += run_tokens as u64;
    }

    /// What is left of `job` waits no longer.
    fn leaves(&mut self, job: &Job, reason: Left) {
        let Some(class) = job.work.class() else { return };
        let (texts, tokens) = waiting(&*job.work, job.next..job.work.batches());
        self.status.no_longer_waits(class, texts, tokens);
        match reason {
            Left::Expired => self.status.expired += texts as u64,
            Left::Cancelled | Left::Broken => self.status.cancelled += texts as u64,
        }
    }

    /// Takes out what can no longer begin in time.
    fn take_expired(&mut self) -> Vec<Job> {
        let mut expired = Vec::new();
        if self.queue.is_empty() {
            return expired;
        }
        let now = Instant::now();
        while let Some(waiting) = self.queue.pop_expired(now) {
            // Callers have no deadline.
            if let InLine::Job(job) = waiting {
                self.leaves(&job, Left::Expired);
                expired.push(job);
            }
        }
        expired
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is locked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the free places to those whose turn it is. `workers_here` is 1 where a worker calls, which takes a batch that is ready itself.
    fn dispatch(self: &Arc<Self>, mut state: MutexGuard<'_, State>, workers_here: usize) {
        let expired = state.take_expired();
        while state.running < self.capacity {
            match state.queue.pop() {
                None => break,
                Some(InLine::Caller(parked)) => parked.grant(),
                Some(InLine::Job(mut job)) => {
                    let size = job.work.size(job.next);
                    state.count(size, self.plan.run_tokens(size));
                    if let Some(class) = job.work.class() {
                        state.status.no_longer_waits(class, size.rows, size.tokens);
                    }
                    state.ready.push_back(Batch { job: job.id, work: job.work.clone(), number: job.next });
                    job.next += 1;
                    if job.next < job.work.batches() {
                        state.line_up(job, &self.plan);
                    }
                }
            }
            state.running += 1;
        }
        let wanted = state.ready.len().saturating_sub(workers_here);
        (0..wanted.min(state.idle)).for_each(|_| self.work.notify_one());
        for _ in state.idle..wanted {
            // Those that there are will do the work where the system gives no more.
            if state.workers.len() >= self.capacity || self.start_worker(&mut state).is_err() {
                break;
            }
        }
        drop(state);
        expired.into_iter().for_each(|job| job.leave(Left::Expired));
    }

    fn start_worker(self: &Arc<Self>, state: &mut State) -> std::io::Result<()> {
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
            let Some(Batch { job, work, number }) = state.ready.pop_front() else {
                if state.closed {
                    return;
                }
                state.idle += 1;
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
                continue;
            };
            drop(state);
            // Work answers for its executor's panics. One in what it calls at its end must not take the worker's place with it.
            let ended = catch_unwind(AssertUnwindSafe(|| work.run(number))).unwrap_or(ControlFlow::Break(()));
            if ended.is_break() {
                self.give_up(job, Left::Broken);
            }
            drop(work);
            state = self.lock();
            state.running -= 1;
            self.dispatch(state, 1);
            state = self.lock();
        }
    }

    /// Takes what is left of a job out of the line.
    fn give_up(&self, id: u64, reason: Left) {
        let mut state = self.lock();
        let found = state.queue.remove(|waiting| matches!(waiting, InLine::Job(job) if job.id == id));
        if let Some(InLine::Job(job)) = found {
            state.leaves(&job, reason);
            drop(state);
            job.leave(reason);
        }
    }
}

/// Texts and tokens of these batches.
fn waiting(work: &dyn Work, batches: Range<usize>) -> (usize, usize) {
    batches.map(|batch| work.size(batch)).fold((0, 0), |(texts, tokens), size| (texts + size.rows, tokens + size.tokens))
}

#[cfg(test)]
mod tests;

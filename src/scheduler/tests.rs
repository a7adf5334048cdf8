//! Turns and jobs with threads, counted and never timed.

use super::*;
use crate::tokens::BatchPlan;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc;
use std::time::Duration;

/// Batches, of a job or of one text each, that pass through a gate and write down what becomes of them.
#[derive(Debug)]
struct Gated {
    name: &'static str,
    batches: usize,
    gate: Arc<Gate>,
    left: Mutex<Vec<(Range<usize>, Left)>>,
    ended: AtomicUsize,
}

/// Lets so many batches through, and keeps the names of those that have begun.
#[derive(Debug, Default)]
struct Gate {
    open: Mutex<usize>,
    opened: Condvar,
    begun: Mutex<Vec<&'static str>>,
}

impl Gate {
    fn pass(&self, name: &'static str) {
        self.begun.lock().unwrap().push(name);
        let mut open = self.open.lock().unwrap();
        while *open == 0 {
            open = self.opened.wait(open).unwrap();
        }
        *open -= 1;
    }

    fn let_through(&self, batches: usize) {
        *self.open.lock().unwrap() += batches;
        self.opened.notify_all();
    }

    fn begun(&self) -> Vec<&'static str> {
        self.begun.lock().unwrap().clone()
    }

    fn wait_for(&self, batches: usize) {
        until(|| self.begun.lock().unwrap().len() == batches);
    }
}

impl Gated {
    fn new(name: &'static str, batches: usize, gate: &Arc<Gate>) -> Arc<Self> {
        Arc::new(Self { name, batches, gate: gate.clone(), left: Mutex::default(), ended: AtomicUsize::new(0) })
    }

    fn left(&self) -> Vec<(Range<usize>, Left)> {
        self.left.lock().unwrap().clone()
    }
}

impl Work for Gated {
    fn batches(&self) -> usize {
        self.batches
    }

    fn size(&self, _: usize) -> BatchSize {
        BatchSize::padded(1, 100)
    }

    fn run(&self, batch: usize) -> ControlFlow<()> {
        self.gate.pass(self.name);
        self.ended.fetch_add(1, Ordering::SeqCst);
        match self.name {
            "panics" => panic!("in a batch"),
            "breaks" if batch == 1 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    }

    fn leave(&self, batches: Range<usize>, reason: Left) {
        self.left.lock().unwrap().push((batches, reason));
    }
}

impl Texts for Gated {
    fn run(pack: Vec<Part<Arc<Self>>>) {
        assert_eq!((pack.len(), pack[0].texts.len()), (1, 1));
        _ = Work::run(&*pack[0].owner, pack[0].texts[0] as usize);
    }

    fn leave(&self, texts: &[u32], reason: Left) {
        Work::leave(self, texts[0] as usize..texts[0] as usize + texts.len(), reason);
    }
}

/// Without jobs of texts.
fn scheduler_of(capacity: usize) -> Scheduler<Gated> {
    scheduler(capacity, Duration::ZERO)
}

/// Every text is a batch.
fn scheduler<T: Texts + 'static>(capacity: usize, linger: Duration) -> Scheduler<T> {
    Scheduler::new(LineSettings { plan: BatchPlan::new(1, usize::MAX, capacity), queue_tokens: None, overtakings: 4, linger })
}

/// So many texts of 100 tokens.
fn texts<T>(owner: &Arc<T>, count: usize, deadline: Option<Instant>) -> NewTexts<Arc<T>> {
    let class = Class::Interactive;
    NewTexts { owner: owner.clone(), class, group: 0, came: Instant::now(), deadline, lengths: vec![100; count].into() }
}

#[test]
fn a_turn_is_given_at_once_where_a_place_is_free_and_nothing_waits() {
    let (size, scheduler) = (BatchSize::padded(1, 5), scheduler_of(2));
    let (first, second) = (scheduler.turn_at_once(size).unwrap(), scheduler.turn_at_once(size).unwrap());
    assert!(scheduler.turn_at_once(size).is_none());
    assert_eq!((scheduler.status().running, scheduler.status().texts), (2, 2));
    let gate = Arc::new(Gate::default());
    let _waiting = scheduler.submit(gated("waits", 1, &gate)).unwrap();
    // A place that is given back goes to what waits.
    drop(first);
    gate.wait_for(1);
    assert!(scheduler.turn_at_once(size).is_none());
    gate.let_through(1);
    drop(second);
    until(|| scheduler.status().running == 0);
    assert!(scheduler.turn_at_once(size).is_some());
    // What lingers waits for others to join it.
    assert!(self::scheduler::<Gated>(1, Duration::from_secs(60)).turn_at_once(size).is_none());
}

/// The texts of a new one.
fn gated(name: &'static str, count: usize, gate: &Arc<Gate>) -> NewTexts<Arc<Gated>> {
    texts(&Gated::new(name, count, gate), count, None)
}

fn until(holds: impl Fn() -> bool) {
    while !holds() {
        thread::yield_now();
    }
}

#[test]
fn a_caller_goes_before_the_batches_that_have_not_begun() {
    let (scheduler, gate) = (scheduler_of(1), Arc::new(Gate::default()));
    for name in ["a", "b", "c"] {
        scheduler.submit(gated(name, 10, &gate)).unwrap();
    }
    gate.let_through(7);
    gate.wait_for(8);
    thread::scope(|scope| {
        scope.spawn(|| {
            let _turn = scheduler.turn(&mut Flow::default(), BatchSize::padded(1, 1));
            gate.begun.lock().unwrap().push("caller");
        });
        until(|| scheduler.waiting() == 4);
        gate.let_through(1000);
    });
    until(|| gate.begun().len() == 31);
    let place = gate.begun().iter().position(|&name| name == "caller").unwrap();
    assert!(place <= 9, "{:?}", gate.begun());
}

#[test]
fn batches_past_their_deadline_never_begin() {
    let (scheduler, gate) = (scheduler_of(1), Arc::new(Gate::default()));
    let [before, late, too_late] = [("before", 2), ("late", 3), ("too late", 2)].map(|(name, n)| Gated::new(name, n, &gate));
    scheduler.submit(texts(&before, 2, None)).unwrap();
    gate.wait_for(1);
    // One that is over already, and one that is over while it waits.
    scheduler.submit(texts(&too_late, 2, Some(Instant::now()))).unwrap();
    assert_eq!(too_late.left(), [(0..2, Left::Expired)]);
    let deadline = Instant::now() + Duration::from_millis(2);
    scheduler.submit(texts(&late, 3, Some(deadline))).unwrap();
    until(|| Instant::now() > deadline);
    gate.let_through(100);
    until(|| before.ended.load(Ordering::SeqCst) == 2);
    assert_eq!(late.left(), [(0..3, Left::Expired)]);
    assert_eq!(gate.begun(), ["before", "before"]);
}

#[test]
fn what_is_given_up_never_begins() {
    let (scheduler, gate) = (scheduler_of(2), Arc::new(Gate::default()));
    let work = Gated::new("work", 10, &gate);
    let submitted = scheduler.submit(texts(&work, 10, None)).unwrap();
    gate.wait_for(2);
    submitted.cancel();
    submitted.cancel();
    assert_eq!(work.left(), [(2..10, Left::Cancelled)]);
    gate.let_through(100);
    until(|| work.ended.load(Ordering::SeqCst) == 2);
    drop(scheduler);
    submitted.cancel();
    assert_eq!(gate.begun().len(), 2);
    assert_eq!(work.left().len(), 1);
}

#[test]
fn a_batch_that_breaks_off_or_panics_ends_its_job_alone() {
    for (name, runs) in [("breaks", 2), ("panics", 1)] {
        let (scheduler, gate) = (scheduler_of(1), Arc::new(Gate::default()));
        let (work, other) = (Gated::new(name, 5, &gate), Gated::new("other", 5, &gate));
        gate.let_through(100);
        scheduler.run(work.clone()).unwrap();
        scheduler.run(other.clone()).unwrap();
        until(|| other.ended.load(Ordering::SeqCst) == 5);
        until(|| !work.left().is_empty());
        assert_eq!(work.left(), [(runs..5, Left::Broken)]);
        assert_eq!(work.ended.load(Ordering::SeqCst), runs);
        drop(scheduler.turn(&mut Flow::default(), BatchSize::padded(1, 1)));
    }
}

#[test]
fn dropping_it_ends_what_has_begun_and_gives_up_the_rest() {
    let (scheduler, gate) = (scheduler_of(2), Arc::new(Gate::default()));
    let (work, job) = (Gated::new("work", 9, &gate), Gated::new("job", 3, &gate));
    scheduler.submit(texts(&work, 9, None)).unwrap();
    gate.wait_for(2);
    scheduler.run(job.clone()).unwrap();
    let (dropped, is_dropped) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            drop(scheduler);
            dropped.send(()).unwrap();
        });
        until(|| !work.left().is_empty());
        assert!(is_dropped.try_recv().is_err(), "it did not wait for the batches that ran");
        gate.let_through(100);
        is_dropped.recv().unwrap();
    });
    assert_eq!((work.left(), job.left()), (vec![(2..9, Left::Cancelled)], vec![(0..3, Left::Cancelled)]));
    assert_eq!(work.ended.load(Ordering::SeqCst), 2);
}

#[test]
fn a_turn_is_given_back_by_a_panic() {
    let scheduler = scheduler_of(1);
    let panics = AssertUnwindSafe(|| {
        let _turn = scheduler.turn(&mut Flow::default(), BatchSize::padded(1, 1));
        panic!("within the turn");
    });
    assert!(catch_unwind(panics).is_err());
    drop(scheduler.turn(&mut Flow::default(), BatchSize::padded(1, 1)));
}

#[test]
fn texts_that_linger_run_when_their_time_has_come_or_a_batch_is_full() {
    struct Packed(Mutex<Vec<usize>>);
    impl Texts for Packed {
        fn run(pack: Vec<Part<Arc<Self>>>) {
            let count = pack.iter().map(|part| part.texts.len()).sum();
            pack[0].owner.0.lock().unwrap().push(count);
        }
        fn leave(&self, _: &[u32], _: Left) {}
    }
    let plan = BatchPlan::new(3, usize::MAX, 1);
    let settings = |linger| LineSettings { plan: plan.clone(), queue_tokens: None, overtakings: 4, linger };
    let packs = Arc::new(Packed(Mutex::default()));
    let ran = |batches: &[usize]| until(|| *packs.0.lock().unwrap() == batches);
    let scheduler = Scheduler::new(settings(Duration::from_millis(20)));
    let one = || scheduler.submit(texts(&packs, 1, None)).unwrap();
    one();
    ran(&[1]);
    // A caller that waits itself is not held up.
    let scheduler = Scheduler::new(settings(Duration::from_secs(3600)));
    let one = || scheduler.submit(texts(&packs, 1, None)).unwrap();
    (0..2).for_each(|_| _ = one());
    drop(scheduler.turn(&mut Flow::default(), BatchSize::padded(1, 1)));
    assert_eq!(scheduler.status().waiting_tokens(), 200);
    one();
    ran(&[1, 3]);
}

#[test]
fn no_more_run_at_once_than_there_are_places_whoever_comes() {
    struct Counted {
        running: Arc<AtomicUsize>,
        capacity: usize,
        left: AtomicUsize,
    }
    impl Counted {
        fn step(running: &AtomicUsize, capacity: usize) {
            assert!(running.fetch_add(1, Ordering::SeqCst) < capacity, "more than {capacity} run");
            thread::yield_now();
            running.fetch_sub(1, Ordering::SeqCst);
        }
    }
    impl Work for Counted {
        fn batches(&self) -> usize {
            7
        }
        fn size(&self, batch: usize) -> BatchSize {
            BatchSize::padded(1, batch + 1)
        }
        fn run(&self, _: usize) -> ControlFlow<()> {
            Self::step(&self.running, self.capacity);
            self.left.fetch_sub(1, Ordering::SeqCst);
            ControlFlow::Continue(())
        }
        fn leave(&self, batches: Range<usize>, _: Left) {
            self.left.fetch_sub(batches.len(), Ordering::SeqCst);
        }
    }
    impl Texts for Counted {
        fn run(pack: Vec<Part<Arc<Self>>>) {
            _ = Work::run(&*pack[0].owner, 0);
        }
        fn leave(&self, texts: &[u32], _: Left) {
            self.left.fetch_sub(texts.len(), Ordering::SeqCst);
        }
    }
    // With lingering, which nothing here waits out: batches are full.
    for (capacity, linger) in [(1, Duration::ZERO), (3, Duration::ZERO), (3, Duration::from_secs(60))] {
        let (scheduler, running) = (scheduler(capacity, linger), Arc::new(AtomicUsize::new(0)));
        thread::scope(|scope| {
            for thread in 0..8 {
                let (scheduler, running) = (&scheduler, &running);
                scope.spawn(move || {
                    for round in 0..200 {
                        if thread % 2 == 0 {
                            let _turn = scheduler.turn(&mut Flow::default(), BatchSize::padded(1, 5));
                            Counted::step(running, capacity);
                            continue;
                        }
                        let work = Arc::new(Counted { running: running.clone(), capacity, left: AtomicUsize::new(7) });
                        if round % 2 == 0 {
                            scheduler.run(work.clone()).unwrap();
                        } else {
                            let deadline = (round % 5 == 0).then(Instant::now);
                            let submitted = scheduler.submit(texts(&work, 7, deadline)).unwrap();
                            if round % 3 == 0 {
                                submitted.cancel();
                            }
                        }
                        until(|| work.left.load(Ordering::SeqCst) == 0);
                    }
                });
            }
        });
        assert_eq!((scheduler.waiting(), running.load(Ordering::SeqCst)), (0, 0));
        assert!(scheduler.shared.lock().workers.len() <= capacity);
    }
}

//! What taking a turn allocates, counted: nothing, on a thread that has waited before. In a file of its own, for the counting allocator is
//! the process's; the scheduler is not public, so its source is compiled in here.

#[path = "common/counting.rs"]
mod counting;
#[allow(dead_code, unused_imports)] // what is submitted is not looked at
#[path = "../src/scheduler/mod.rs"]
mod scheduler;

use counting::allocations;
use scheduler::{Flow, Left, LineSettings, Part, Scheduler, Texts};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;
use trt_embed::tokens;
use trt_embed::tokens::{BatchPlan, BatchSize};

/// Nothing is submitted.
struct Nothing;

impl Texts for Nothing {
    fn run(_: Vec<Part<Arc<Self>>>) {}
    fn leave(&self, _: &[u32], _: Left) {}
}

#[test]
fn a_turn_allocates_nothing_whether_it_waits_or_not() {
    let scheduler = Scheduler::<Nothing>::new(LineSettings {
        plan: BatchPlan::new(1, 512, 1),
        queue_tokens: None,
        overtakings: 4,
        linger: Duration::ZERO,
    });
    let turns = |count: usize| {
        for tokens in 1..=count {
            drop(scheduler.turn(&mut Flow::default(), BatchSize::padded(1, tokens)));
        }
    };
    let before = allocations();
    turns(1000);
    assert_eq!(allocations() - before, 0, "without anybody else");

    // Four callers wait at the same time, so that the queue has room for all and each thread has waited before.
    let callers = 4;
    let barrier = std::sync::Barrier::new(callers + 1);
    let allocated = AtomicU64::new(0);
    let first = scheduler.turn(&mut Flow::default(), BatchSize::padded(1, 1));
    thread::scope(|scope| {
        for _ in 0..callers {
            scope.spawn(|| {
                barrier.wait();
                drop(scheduler.turn(&mut Flow::default(), BatchSize::padded(1, 1)));
                for _ in 0..5 {
                    let before = allocations();
                    {
                        let _turn = scheduler.turn(&mut Flow::default(), BatchSize::padded(1, 1));
                        // Long enough for the others to come.
                        thread::sleep(Duration::from_millis(5));
                    }
                    allocated.fetch_add(allocations() - before, Ordering::Relaxed);
                }
            });
        }
        barrier.wait();
        // Far longer than the callers need from the barrier to the queue.
        thread::sleep(Duration::from_millis(500));
        drop(first);
    });
    assert_eq!(allocated.into_inner(), 0, "while others wait");
}

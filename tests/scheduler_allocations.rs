//! What taking a turn allocates, counted: nothing, on a thread that has waited before. In a file of its own, for the counting allocator is
//! the process's; the scheduler is not public, so its source is compiled in here.

#[path = "common/counting.rs"]
mod counting;
#[allow(dead_code)] // jobs are not looked at
#[path = "../src/scheduler/mod.rs"]
mod scheduler;

use counting::allocations;
use scheduler::{Flow, Scheduler};
use std::thread;

#[test]
fn a_turn_allocates_nothing_whether_it_waits_or_not() {
    let scheduler = Scheduler::new(1);
    let turns = |count: u64| {
        for cost in 1..=count {
            drop(scheduler.turn(&mut Flow::default(), cost));
        }
    };
    let before = allocations();
    turns(1000);
    assert_eq!(allocations() - before, 0, "without anybody else");

    // Each thread waits most of the time. The queue has room for all of them after the first round.
    let callers = 4;
    let barrier = std::sync::Barrier::new(callers);
    thread::scope(|scope| {
        for _ in 0..callers {
            scope.spawn(|| {
                for round in 0..5 {
                    barrier.wait();
                    let before = allocations();
                    {
                        let _turn = scheduler.turn(&mut Flow::default(), 1);
                        // Long enough for the others to come.
                        thread::sleep(std::time::Duration::from_millis(5));
                    }
                    assert!(round < 2 || allocations() == before, "in round {round}");
                }
            });
        }
    });
}

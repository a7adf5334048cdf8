//! The order of turns, without threads and clocks: a call of a test is a list of the costs of its batches.

use super::*;
use proptest::prelude::*;
use std::collections::HashMap;
use std::time::Duration;

/// Serves one batch at a time and keeps every call that has batches left in line.
struct Line {
    queue: FairQueue<usize>,
    /// Costs that are left of each call.
    calls: HashMap<usize, (Flow, Vec<u64>)>,
    came: usize,
}

impl Line {
    fn new() -> Self {
        Self { queue: FairQueue::new(), calls: HashMap::new(), came: 0 }
    }

    fn come(&mut self, mut costs: Vec<u64>) -> usize {
        costs.reverse();
        let call = self.came;
        self.came += 1;
        self.calls.insert(call, (Flow::default(), costs));
        self.line_up(call);
        call
    }

    fn line_up(&mut self, call: usize) {
        let (flow, costs) = self.calls.get_mut(&call).unwrap();
        if let Some(cost) = costs.pop() {
            let tag = self.queue.tag(flow, cost);
            self.queue.push(call, tag, None);
        }
    }

    /// Whose batch is served next.
    fn serve(&mut self) -> Option<usize> {
        let call = self.queue.pop()?;
        self.line_up(call);
        Some(call)
    }
}

#[test]
fn a_new_call_goes_before_all_further_batches_of_bulk_calls() {
    for bulk_calls in [1, 5, 200] {
        let mut line = Line::new();
        (0..bulk_calls).for_each(|_| _ = line.come(vec![1000; 100]));
        for turn in 0..50 {
            // A short call, and the first batch of one of two.
            for costs in [vec![12], vec![30, 20]] {
                let short = line.come(costs.clone());
                let before = (0..).find(|_| line.serve() == Some(short)).unwrap();
                assert!(before <= 1, "{before} batches of {bulk_calls} bulk calls went before {costs:?} at turn {turn}");
            }
            line.serve();
        }
    }
}

#[test]
fn the_rest_of_a_short_call_is_not_put_off_by_a_crowd() {
    // Its second batch has the tag of its first and that one's cost, which is small beside a bulk batch.
    let mut line = Line::new();
    (0..5).for_each(|_| _ = line.come(vec![1000; 100]));
    (0..17).for_each(|_| _ = line.serve());
    let short = line.come(vec![30, 20]);
    let served: Vec<_> = (0..8).map_while(|_| line.serve()).collect();
    let last = served.iter().rposition(|&call| call == short).unwrap();
    assert_eq!(served.iter().filter(|&&call| call == short).count(), 2, "{served:?}");
    assert!(last <= 6, "{served:?}");
}

#[test]
fn short_calls_that_never_end_do_not_starve_a_long_one() {
    let mut line = Line::new();
    let bulk = line.come(vec![1000; 50]);
    let mut short = line.come(vec![10]);
    let (mut short_cost, mut bulk_cost) = (0, 0);
    while bulk_cost < 20_000 {
        // There is always a short call in line, as if several threads asked without a pause.
        match line.serve() {
            Some(call) if call == bulk => bulk_cost += 1000,
            Some(call) if call == short => {
                short_cost += 10;
                short = line.come(vec![10]);
            }
            other => panic!("{other:?}"),
        }
        assert!(short_cost < 200_000, "the long call has had {bulk_cost}");
    }
    let share = bulk_cost as f64 / (bulk_cost + short_cost) as f64;
    assert!((0.09..0.3).contains(&share), "{share}");
}

#[test]
fn equal_calls_share_alike_whenever_they_come() {
    let mut line = Line::new();
    let calls: Vec<usize> = (0..4).map(|_| line.come(vec![100; 1000])).collect();
    (0..400).for_each(|_| _ = line.serve());
    let late = line.come(vec![100; 1000]);
    let mut served = HashMap::new();
    (0..500).for_each(|_| *served.entry(line.serve().unwrap()).or_insert(0) += 1);
    for call in calls.into_iter().chain([late]) {
        assert!((95..=105).contains(&served[&call]), "{served:?}");
    }
}

#[test]
fn what_is_past_its_deadline_comes_out_by_itself() {
    let (now, second) = (Instant::now(), Duration::from_secs(1));
    let mut queue = FairQueue::new();
    for (key, deadline) in [(0, None), (1, Some(now)), (2, Some(now + second)), (3, Some(now - Duration::from_millis(1)))] {
        let tag = queue.tag(&mut Flow::default(), 1);
        queue.push(key, tag, deadline);
    }
    let mut expired = queue.take_expired(now);
    expired.sort_unstable();
    assert_eq!(expired, [1, 3]);
    assert_eq!(queue.remove(|&key| key == 2), Some(2));
    assert_eq!(queue.remove(|&key| key == 2), None);
    assert_eq!((queue.pop(), queue.pop()), (Some(0), None));
}

proptest! {
    /// Every batch is served once, those of a call in their order, and no batch waits longer than its cost allows.
    #[test]
    fn all_are_served_in_order_and_none_waits_without_end(
        calls in prop::collection::vec((prop::collection::vec(1_u64..1000, 1..30), 0_usize..20), 1..30)
    ) {
        let mut line = Line::new();
        let mut arrivals = calls.iter().enumerate().collect::<Vec<_>>();
        arrivals.reverse();
        let mut served = vec![0; calls.len()];
        let mut next_arrival = 0;
        loop {
            while arrivals.last().is_some_and(|(_, (_, gap))| *gap <= next_arrival) {
                let (_, (costs, _)) = arrivals.pop().unwrap();
                line.come(costs.clone());
                next_arrival = 0;
            }
            next_arrival += 1;
            match line.serve() {
                Some(call) => served[call] += 1,
                None if arrivals.is_empty() => break,
                None => {}
            }
        }
        for ((costs, _), served) in calls.iter().zip(served) {
            prop_assert_eq!(costs.len(), served);
        }
    }

    /// Between two equal calls that both have work, neither is ever more than a few batches ahead.
    #[test]
    fn two_calls_stay_together(first in 1_u64..500, second in 1_u64..500) {
        let mut line = Line::new();
        let (a, _) = (line.come(vec![first; 300]), line.come(vec![second; 300]));
        let (mut of_a, mut of_b) = (0_i64, 0_i64);
        for _ in 0..250 {
            if line.serve() == Some(a) { of_a += first as i64 } else { of_b += second as i64 }
            let bound = 2 * (first + second) as i64;
            prop_assert!((of_a - of_b).abs() <= bound, "{of_a} and {of_b} with batches of {first} and {second}");
        }
    }

    /// However many wait, an overdue batch runs after at most as many turns of others as there are overdue ones, twice.
    #[test]
    fn an_overdue_batch_runs_soon(bulk in 1_usize..10, short_cost in 1_u64..50) {
        let mut line = Line::new();
        (0..bulk).for_each(|_| _ = line.come(vec![100; 1000]));
        let mut last_served = vec![0_u64; bulk];
        let mut spent = 0;
        let mut short = line.come(vec![short_cost]);
        for _ in 0..1000 {
            let call = line.serve().unwrap();
            if call == short {
                spent += short_cost;
                short = line.come(vec![short_cost]);
            } else {
                spent += 100;
                last_served[call] = spent;
            }
            let bound = (PATIENCE + 1) * 100 + 2 * (bulk as u64 + 1) * (100 + short_cost);
            prop_assert!(last_served.iter().all(|last| spent - last <= bound), "{last_served:?} at {spent}");
        }
    }
}

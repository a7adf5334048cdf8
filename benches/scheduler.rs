//! The scheduler's policy in simulated time, beside first-in first-out and the rule of text-embeddings-inference: latencies of each class, and
//! throughput, by a fixed seed. Nothing runs but the policies; `cargo bench --bench scheduler [-- SEED]`.
//!
//! The policy is not public, so its source is compiled in here. Executors take the time that batches took where benches/RESULTS.md measured them.

#[path = "../tests/common/random.rs"]
mod random;
#[allow(dead_code, unused_imports)] // threads are not simulated
#[path = "../src/scheduler/mod.rs"]
mod scheduler;

use random::Random;
use scheduler::{Class, Line, LineSettings, NewTexts, Next};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use trt_embed::tokens;
use trt_embed::tokens::{BatchPlan, BatchSize, Layout, ShapeCost, ShapeCosts, SizeRange, batches_from_ids};

/// Microseconds.
type Micros = u64;

/// From a client's reply to its next request.
const TURNAROUND: Micros = 100;
/// Texts of the bulk job.
const BULK_TEXTS: usize = 10_000;

/// A request: its tokens a text, and who asks.
#[derive(Clone)]
struct Request {
    class: Class,
    lengths: Vec<u32>,
    /// A client that asks again when it has its reply.
    client: bool,
}

/// Texts as request and place.
type Batch = Vec<(usize, usize)>;

trait Rule {
    fn come(&mut self, now: Micros, number: usize, request: &Request);
    /// What begins, where `free` places are free.
    fn next(&mut self, now: Micros, free: usize) -> Option<Batch>;
}

/// This crate's.
struct Ours {
    line: Line<(), usize>,
    start: Instant,
}

/// Each request's batches in turn, sorted by length and cut as a synchronous call's are.
struct NoMerging {
    plan: BatchPlan,
    line: VecDeque<Batch>,
}

/// Texts in the order in which they came; a batch is filled up to so many tokens, those of padding not counted.
struct Tei {
    max_tokens: usize,
    max_rows: usize,
    line: VecDeque<(usize, usize, u32)>,
}

struct Executor {
    name: &'static str,
    plan: BatchPlan,
    micros: fn(&BatchPlan, BatchSize) -> f64,
    tei_tokens: usize,
    tei_rows: usize,
    /// Tokens that it can do in a second.
    capacity: f64,
}

impl Rule for Ours {
    fn come(&mut self, now: Micros, number: usize, request: &Request) {
        let came = self.start + Duration::from_micros(now);
        let lengths = request.lengths.clone().into();
        let texts = NewTexts { owner: number, class: request.class, group: 0, came, deadline: None, lengths };
        self.line.submit(texts).expect("the line has no bound");
    }

    fn next(&mut self, now: Micros, free: usize) -> Option<Batch> {
        match self.line.next(self.start + Duration::from_micros(now), free) {
            Next::Pack(pack) => {
                let texts = pack.into_iter().flat_map(|part| part.texts.into_iter().map(move |text| (part.owner, text as usize)));
                Some(texts.collect())
            }
            _ => None,
        }
    }
}

impl Rule for NoMerging {
    fn come(&mut self, _: Micros, number: usize, request: &Request) {
        let rows: Vec<Vec<u32>> = request.lengths.iter().map(|&length| vec![0; length as usize]).collect();
        let batches = batches_from_ids(&rows, 1, 0, &self.plan).expect("ids are in the table");
        self.line.extend(batches.iter().map(|batch| batch.rows().iter().map(|&text| (number, text)).collect::<Batch>()));
    }

    fn next(&mut self, _: Micros, _: usize) -> Option<Batch> {
        self.line.pop_front()
    }
}

impl Rule for Tei {
    fn come(&mut self, _: Micros, number: usize, request: &Request) {
        self.line.extend(request.lengths.iter().enumerate().map(|(text, &length)| (number, text, length)));
    }

    fn next(&mut self, _: Micros, _: usize) -> Option<Batch> {
        let (mut batch, mut tokens) = (Vec::new(), 0);
        while let Some(&(number, text, length)) = self.line.front() {
            if !batch.is_empty() && (tokens + length as usize > self.max_tokens || batch.len() == self.max_rows) {
                break;
            }
            self.line.pop_front();
            tokens += length as usize;
            batch.push((number, text));
        }
        (!batch.is_empty()).then_some(batch)
    }
}

/// MPNet-base on an H200 by the native engine, one lane: packed rows, GPU times of benches/RESULTS.md by the tokens of a batch.
fn gpu() -> Executor {
    let points = [(1, 145.0), (32, 145.0), (64, 162.0), (128, 215.0), (512, 716.0), (4096, 1745.0), (16_384, 6383.0)];
    let packed = |tokens| BatchSize { rows: 128, longest: tokens, tokens };
    let shapes = points.windows(2).map(|pair| {
        let [(least, min_micros), (most, max_micros)] = [pair[0], pair[1]];
        let min = BatchSize { rows: 1, longest: 1, tokens: least };
        ShapeCost { range: SizeRange { layout: Layout::Packed, min, max: packed(most) }, min_micros, max_micros }
    });
    let mut plan = BatchPlan::new(128, usize::MAX, 1);
    plan.costs = Some(Arc::new(ShapeCosts::new(shapes.collect())));
    let micros = |plan: &BatchPlan, size| plan.costs.as_ref().and_then(|costs| costs.cheapest(size)).expect("batches fit").1;
    Executor { name: "packed GPU", plan, micros, tei_tokens: 16_384, tei_rows: 128, capacity: 2.4e6 }
}

/// all-MiniLM-L6-v2 on two cores, a batch each: some 310 us a token of the rectangle (one text of 128 tokens takes 40 ms there), and as much as 8
/// tokens a batch, which is assumed.
fn cpu() -> Executor {
    let micros = |_: &BatchPlan, size: BatchSize| 310.0 * (8 + size.rows * size.longest) as f64;
    Executor {
        name: "padded CPU",
        plan: BatchPlan::new(64, 1024, 2),
        micros,
        tei_tokens: 1024,
        tei_rows: 64,
        capacity: 2.0 / 310e-6,
    }
}

/// Lengths as of queries, 6 to 24 tokens.
fn query(random: &mut Random) -> u32 {
    6 + random.below(19) as u32
}

/// Lengths as of passages: many short ones, few of up to 512 tokens.
fn passage(random: &mut Random) -> u32 {
    let unit = (random.next() >> 11) as f64 / (1_u64 << 53) as f64;
    (8.0 * 64_f64.powf(unit * unit)) as u32
}

struct Outcome {
    /// Of the requests of each class, sorted.
    interactive: Vec<Micros>,
    /// When the last text of the bulk job, or of all, ended.
    end: Micros,
    /// Real tokens of that.
    tokens: u64,
    real: u64,
    padded: u64,
}

/// Runs `arrivals` until all have their replies; clients stop asking when the bulk job is done.
fn simulate(executor: &Executor, rule: &mut dyn Rule, arrivals: &[(Micros, Request)], seed: u64) -> Outcome {
    let mut random = Random(seed);
    let mut requests: Vec<(Micros, Request, usize)> = Vec::new();
    // When, what comes (a request) or ends (a batch).
    let mut events: BinaryHeap<Reverse<(Micros, bool, usize)>> = BinaryHeap::new();
    for (at, request) in arrivals {
        events.push(Reverse((*at, true, requests.len())));
        requests.push((*at, request.clone(), request.lengths.len()));
    }
    let has_bulk = arrivals.iter().any(|(_, request)| request.class == Class::Bulk);
    let mut bulk_left: usize = arrivals.iter().filter(|(_, r)| r.class == Class::Bulk).map(|(_, r)| r.lengths.len()).sum();
    let mut batches: Vec<Batch> = Vec::new();
    let mut running = 0;
    let mut outcome = Outcome { interactive: Vec::new(), end: 0, tokens: 0, real: 0, padded: 0 };
    while let Some(Reverse((now, comes, number))) = events.pop() {
        if comes {
            rule.come(now, number, &requests[number].1);
        } else {
            running -= 1;
            for (of, text) in std::mem::take(&mut batches[number]) {
                let (came, request, left) = &mut requests[of];
                *left -= 1;
                let is_bulk = request.class == Class::Bulk;
                if !has_bulk || is_bulk {
                    outcome.end = now;
                    outcome.tokens += u64::from(request.lengths[text]);
                }
                bulk_left -= usize::from(is_bulk);
                if *left > 0 || is_bulk {
                    continue;
                }
                outcome.interactive.push(now - *came);
                if request.client && bulk_left > 0 {
                    let again = Request { lengths: vec![query(&mut random)], ..request.clone() };
                    events.push(Reverse((now + TURNAROUND, true, requests.len())));
                    requests.push((now + TURNAROUND, again, 1));
                }
            }
        }
        // All that happens at this moment happens before anything begins.
        if events.peek().is_some_and(|Reverse((next, ..))| *next == now) {
            continue;
        }
        while running < executor.plan.parallelism {
            let Some(batch) = rule.next(now, executor.plan.parallelism - running) else { break };
            let lengths = || batch.iter().map(|&(of, text)| requests[of].1.lengths[text] as usize);
            let size = BatchSize { rows: batch.len(), longest: lengths().max().unwrap_or(1), tokens: lengths().sum() };
            outcome.real += size.tokens as u64;
            outcome.padded += executor.plan.run_tokens(size) as u64;
            events.push(Reverse((now + (executor.micros)(&executor.plan, size) as Micros, false, batches.len())));
            batches.push(batch);
            running += 1;
        }
    }
    outcome.interactive.sort_unstable();
    outcome
}

fn rules(executor: &Executor) -> [(&'static str, Box<dyn Rule>); 3] {
    let plan = executor.plan.clone();
    let settings = LineSettings { plan: plan.clone(), queue_tokens: None, overtakings: 4, linger: Duration::ZERO };
    [
        ("trt-embed", Box::new(Ours { line: Line::new(settings), start: Instant::now() })),
        ("first-in first-out", Box::new(NoMerging { plan, line: VecDeque::new() })),
        ("TEI's rule", Box::new(Tei { max_tokens: executor.tei_tokens, max_rows: executor.tei_rows, line: VecDeque::new() })),
    ]
}

fn traces(executor: &Executor, seed: u64) -> Vec<(&'static str, Vec<(Micros, Request)>)> {
    let mut random = Random(seed);
    let single = |length| Request { class: Class::Interactive, lengths: vec![length], client: false };
    let mean = (0..10_000).map(|_| f64::from(passage(&mut random))).sum::<f64>() / 10_000.0;
    // Microseconds between texts at `share` of what the executor can do.
    let gap = |share: f64| mean / (share * executor.capacity) * 1e6;
    let mut at = 0.0;
    let steady = (0..20_000).map(|_| {
        let unit = ((random.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64;
        at -= unit.ln() * gap(0.4);
        (at as Micros, single(passage(&mut random)))
    });
    let steady: Vec<_> = steady.collect();
    // 64 callers at once, at the same load.
    let bursts =
        (0..20_000).map(|text| ((text / 64) as f64 * 64.0 * gap(0.4)) as Micros).map(|at| (at, single(passage(&mut random))));
    let bursts: Vec<_> = bursts.collect();
    let lengths = (0..BULK_TEXTS).map(|_| passage(&mut random)).collect();
    let bulk = vec![(0, Request { class: Class::Bulk, lengths, client: false })];
    let clients = (0..10).map(|client| (1000 + client * 37, Request { client: true, ..single(query(&mut random)) }));
    let beside = bulk.iter().cloned().chain(clients).collect();
    vec![("steady, 40 % load", steady), ("bursts of 64", bursts), ("bulk alone", bulk), ("bulk beside ten clients", beside)]
}

fn main() {
    let seed = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(17);
    println!("seed {seed}; latencies in ms from a request to its reply; tokens are real ones");
    println!("\n| executor | arrivals | rule | p50 | p95 | p99 | requests | tokens/s | run / real tokens |");
    println!("|---|---|---|---|---|---|---|---|---|");
    for executor in [gpu(), cpu()] {
        for (trace, arrivals) in traces(&executor, seed) {
            for (rule, mut policy) in rules(&executor) {
                let outcome = simulate(&executor, &mut *policy, &arrivals, seed);
                let latencies = &outcome.interactive;
                let percentile = |share: f64| match latencies.get(((latencies.len() as f64 * share) as usize).saturating_sub(1)) {
                    Some(&micros) => format!("{:.2}", micros as f64 / 1000.0),
                    None => String::new(),
                };
                let rate = outcome.tokens as f64 / outcome.end.max(1) as f64 * 1e6;
                let padding = outcome.padded as f64 / outcome.real.max(1) as f64;
                let (p50, p95, p99) = (percentile(0.5), percentile(0.95), percentile(0.99));
                let (executor, requests) = (executor.name, latencies.len());
                println!("| {executor} | {trace} | {rule} | {p50} | {p95} | {p99} | {requests} | {rate:.0} | {padding:.2} |");
            }
        }
    }
}

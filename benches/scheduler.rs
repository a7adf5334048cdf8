//! The scheduler's policy in simulated time, beside first-in first-out and the rule of text-embeddings-inference: latencies of each class, and
//! throughput, by fixed seeds. Nothing runs but the policies; `cargo bench --bench scheduler [-- SEED...]`.
//!
//! The policy is not public, so its source is compiled in here. Executors take the time that batches took where benches/RESULTS.md measured them.

#[path = "../src/cli/mix.rs"]
#[allow(dead_code, unused_imports)] // texts are not used, and its tests run with the command's
mod mix;
#[path = "../tests/common/random.rs"]
mod random;
#[allow(dead_code, unused_imports)] // threads are not simulated
#[path = "../src/scheduler/mod.rs"]
mod scheduler;

use mix::Seeded;
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

/// From a client's reply to its next request, where it does not pause.
const TURNAROUND: Micros = 100;
/// Texts of the bulk job, and of traces without one.
const BULK_TEXTS: usize = 10_000;
const TEXTS: usize = 20_000;

/// A request: its tokens a text, and who asks.
#[derive(Clone)]
struct Request {
    class: Class,
    lengths: Vec<u32>,
    /// Whoever asks again with one text when the reply is there.
    client: Option<Client>,
}

#[derive(Clone, Copy)]
struct Client {
    pause: Micros,
    length: fn(&mut Random) -> u32,
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
                let texts =
                    pack.parts.into_iter().flat_map(|part| part.texts.into_iter().map(move |text| (part.owner, text as usize)));
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

/// all-MiniLM-L6-v2 on two cores, a batch each: 1.3 ms a batch, and 126 us a token of the rectangle up to 128 of them and 165 us a token beyond, as measured
/// (benches/RESULTS.md).
fn cpu() -> Executor {
    let micros = |_: &BatchPlan, size: BatchSize| {
        let tokens = (size.rows * size.longest) as f64;
        1300.0 + 126.0 * tokens.min(128.0) + 165.0 * (tokens - 128.0).max(0.0)
    };
    Executor {
        name: "padded CPU",
        plan: BatchPlan::new(64, 192, 2),
        micros,
        tei_tokens: 1024,
        tei_rows: 64,
        capacity: 2.0 / 160e-6,
    }
}

/// The trace of the bulk job alone.
const ALONE: &str = "bulk alone";

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

/// Lengths of `trt-embed bench`, up to 256 tokens.
fn mixed(random: &mut Random) -> u32 {
    Seeded::new(random.next()).length(256) as u32
}

/// Runs `arrivals` until all have their replies; clients stop asking when the bulk job is done, or without one when they have asked so often as
/// [`TEXTS`] says.
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
            // Who comes when the job is done is not looked at.
            if has_bulk && bulk_left == 0 {
                continue;
            }
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
                let asks_on = if has_bulk { bulk_left > 0 } else { requests.len() < TEXTS };
                if let Some(client) = requests[of].1.client.filter(|_| asks_on) {
                    let again = Request { lengths: vec![(client.length)(&mut random)], ..requests[of].1.clone() };
                    events.push(Reverse((now + client.pause, true, requests.len())));
                    requests.push((now + client.pause, again, 1));
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

/// What comes when, by name. Those behind [`ALONE`] are of that job beside others.
fn traces(executor: &Executor, seed: u64) -> Vec<(&'static str, Vec<(Micros, Request)>)> {
    let mut random = Random(seed);
    let single = |length| Request { class: Class::Interactive, lengths: vec![length], client: None };
    let poisson = |random: &mut Random, length: fn(&mut Random) -> u32, share: f64, texts: usize| {
        let mean = (0..10_000).map(|_| f64::from(length(random))).sum::<f64>() / 10_000.0;
        // Microseconds between texts at `share` of what the executor can do.
        let gap = mean / (share * executor.capacity) * 1e6;
        let mut at = 0.0;
        let arrivals = (0..texts).map(|_| {
            let unit = ((random.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64;
            at -= unit.ln() * gap;
            (at as Micros, single(length(random)))
        });
        arrivals.collect::<Vec<_>>()
    };
    let steady = poisson(&mut random, passage, 0.4, TEXTS);
    // 64 callers at once, at the same load.
    let burst = 64.0 * steady.last().map_or(0.0, |&(at, _)| at as f64) / TEXTS as f64;
    let bursts = (0..TEXTS).map(|text| ((text / 64) as f64 * burst) as Micros).map(|at| (at, single(passage(&mut random))));
    let bursts = bursts.collect();
    let asking = |random: &mut Random, count: u64, client: Client| {
        let first = |number| (1000 + number * 37, Request { client: Some(client), ..single((client.length)(random)) });
        (0..count).map(first).collect::<Vec<_>>()
    };
    let short = asking(&mut random, 64, Client { pause: TURNAROUND, length: query });
    let various = asking(&mut random, 64, Client { pause: TURNAROUND, length: mixed });
    let lengths = (0..BULK_TEXTS).map(|_| passage(&mut random)).collect();
    let bulk = vec![(0, Request { class: Class::Bulk, lengths, client: None })];
    // Enough of them to outlast the job, which never takes ten times as long as alone.
    let beside = |name, others: Vec<(Micros, Request)>| (name, bulk.iter().cloned().chain(others).collect());
    let second = (1e6 * 12_500.0 / executor.capacity) as Micros;
    let ten = beside("bulk beside ten clients", asking(&mut random, 10, Client { pause: TURNAROUND, length: query }));
    let pausing = beside("bulk beside ten that pause", asking(&mut random, 10, Client { pause: second, length: query }));
    let some = beside("bulk beside 20 % queries", poisson(&mut random, query, 0.2, 20 * TEXTS));
    let many = beside("bulk beside 60 % queries", poisson(&mut random, query, 0.6, 20 * TEXTS));
    vec![
        ("steady, 40 % load", steady),
        ("bursts of 64", bursts),
        ("64 clients, short", short),
        ("64 clients, mixed", various),
        (ALONE, bulk),
        ten,
        pausing,
        some,
        many,
    ]
}

fn main() {
    let given: Vec<u64> = std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    for seed in if given.is_empty() { vec![17] } else { given } {
        println!("seed {seed}; latencies in ms from a request to its reply; tokens are real ones");
        println!("\n| executor | arrivals | rule | p50 | p95 | p99 | requests | tokens/s | run / real tokens | bulk, of alone |");
        println!("|---|---|---|---|---|---|---|---|---|---|");
        for executor in [gpu(), cpu()] {
            table(&executor, seed);
        }
        println!();
    }
}

fn table(executor: &Executor, seed: u64) {
    // By rule: what the bulk job alone reached.
    let mut alone = Vec::new();
    for (trace, arrivals) in traces(executor, seed) {
        for (place, (rule, mut policy)) in rules(executor).into_iter().enumerate() {
            let outcome = simulate(executor, &mut *policy, &arrivals, seed);
            let latencies = &outcome.interactive;
            let percentile = |share: f64| match latencies.get(((latencies.len() as f64 * share) as usize).saturating_sub(1)) {
                Some(&micros) => format!("{:.2}", micros as f64 / 1000.0),
                None => String::new(),
            };
            let rate = outcome.tokens as f64 / outcome.end.max(1) as f64 * 1e6;
            let kept = alone.get(place).map_or(String::new(), |alone| format!("{:.1} %", 100.0 * rate / alone));
            if trace == ALONE {
                alone.push(rate);
            }
            let padding = outcome.padded as f64 / outcome.real.max(1) as f64;
            let (p50, p95, p99) = (percentile(0.5), percentile(0.95), percentile(0.99));
            let (executor, requests) = (executor.name, latencies.len());
            println!(
                "| {executor} | {trace} | {rule} | {p50} | {p95} | {p99} | {requests} | {rate:.0} | {padding:.2} | {kept} |"
            );
        }
    }
}

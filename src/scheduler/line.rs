//! The policy: what waits for an executor, and which batch is begun next. It has no threads and no clock.

use super::pack::{self, Budget};
use super::queue::{FairQueue, Flow};
use super::status::{Class, QueueStatus};
use crate::tokens::{BatchPlan, BatchSize};
use std::cmp::Reverse;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Texts among which a batch is chosen, at most; they are sorted while the line is locked.
const WINDOW: usize = 512;
/// How long after the last interactive text bulk batches stay bounded.
const ABOUT: Duration = Duration::from_secs(1);
/// How long a bounded bulk batch may take, by how fast batches ran before it.
const BULK_TIME: Duration = Duration::from_millis(250);
/// How many times what interactive batches cost while bulk waits bulk is owed: eight parts of nine.
const BULK_SHARE: f64 = 8.0;
/// Bounded bulk batches that an interactive text may be held back for at each place of the executor while bulk is owed.
const HELD_BACK: f64 = 3.5;
/// Bounded bulk batches at each place of the executor that bulk may be ahead of its share: half of one of queries goes at once for them.
const AHEAD: f64 = BULK_SHARE / 2.0;
/// Part of the last batch in what is known of the executor's pace.
const NEWEST: f64 = 0.125;

/// How the line is kept.
#[derive(Debug, Clone)]
pub(crate) struct LineSettings {
    /// The executor's limits and costs.
    pub plan: BatchPlan,
    /// Most tokens of submitted texts that wait.
    pub queue_tokens: Option<usize>,
    /// Most batches of interactive texts that are begun one after another while a bulk text waits.
    pub overtakings: usize,
    /// How long a text may wait, with a place free, for others to share its batch.
    pub linger: Duration,
}

/// Texts that are submitted together: a caller of its own in the fair order.
#[derive(Debug)]
pub(crate) struct NewTexts<T> {
    /// What knows them.
    pub owner: T,
    pub class: Class,
    /// Only texts of one group share a batch.
    pub group: u32,
    /// When they come.
    pub came: Instant,
    /// They are never begun then or later.
    pub deadline: Option<Instant>,
    /// Tokens of each.
    pub lengths: Lengths,
}

/// Tokens of texts, sorted before the line is locked.
#[derive(Debug, Clone)]
pub(crate) struct Lengths {
    /// Tokens and place of each, longest first, equal ones in the order of their owner.
    sorted: Vec<(u32, u32)>,
    tokens: usize,
}

/// Some texts of one owner, by their places among those that it submitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part<T> {
    pub owner: T,
    pub texts: Vec<u32>,
}

/// The line would have more tokens than it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full {
    pub waiting: usize,
    pub limit: usize,
    pub texts: usize,
    pub tokens: usize,
}

/// What is begun next.
#[derive(Debug)]
pub(crate) enum Next<C, T> {
    Nothing,
    /// Nothing before then, unless something comes.
    Wait(Instant),
    /// A caller with a batch of its own.
    Caller(C),
    /// A batch of texts.
    Pack(Pack<T>),
}

/// Texts that run together.
#[derive(Debug)]
pub(crate) struct Pack<T> {
    pub parts: Vec<Part<T>>,
    /// What they cost, for [`Line::ran`].
    pub cost: f64,
}

/// What waits. A caller `C` has a batch of its own and is [`Class::Interactive`]; texts have an owner `T` and share batches.
///
/// Interactive goes before bulk, but bulk has the next batch when it was overtaken so many times as the settings say, and while it is owed a share of
/// what interactive batches have cost: clients that ask again at each answer would take most of the executor otherwise. An interactive text is held back
/// by what is owed for [`HELD_BACK`] bounded batches a place at most, and goes at once where bulk had its share before. Bulk batches are bounded, in cost
/// and in time, while interactive texts are about.
/// Within a class the fair queue says whose turn it is. The turn of texts is that of the longest of them that waits; with it go neighbours in length of
/// all callers of the class, as far as that pays, and each caller is charged for its part.
pub(crate) struct Line<C, T> {
    settings: LineSettings,
    interactive: FairQueue<InLine<C, T>>,
    bulk: FairQueue<InLine<C, T>>,
    /// Batches of interactive texts since bulk texts wait or had a batch.
    overtaken: usize,
    /// Cost that bulk is behind its share; negative where it is ahead.
    owed: f64,
    /// Cost of all bulk batches that were begun.
    bulk_cost: f64,
    /// Whether an interactive text or caller came since the time was last told.
    interactive_came: bool,
    last_interactive: Option<Instant>,
    /// Cost that bounds bulk batches beside interactive texts.
    economical: f64,
    /// Microseconds that a unit of cost takes, as batches ran; `None` before the first has.
    pace: Option<f64>,
    submitted: u64,
    status: QueueStatus,
}

struct InLine<C, T> {
    what: Waiting<C, T>,
    /// What bulk batches had cost when it came.
    bulk_before: f64,
}

enum Waiting<C, T> {
    Caller { caller: C, size: BatchSize },
    Texts(Texts<T>),
}

struct Texts<T> {
    id: u64,
    owner: T,
    group: u32,
    came: Instant,
    deadline: Option<Instant>,
    /// Tokens and place of those that wait, longest first.
    waiting: VecDeque<(u32, u32)>,
}

/// A text of the window: its tokens, the rank of its caller, and its place among the texts of that caller that wait.
type Candidate = (Reverse<u32>, usize, usize);

impl From<Vec<u32>> for Lengths {
    fn from(lengths: Vec<u32>) -> Self {
        let tokens = lengths.iter().map(|&length| length as usize).sum();
        let mut sorted: Vec<(u32, u32)> = lengths.into_iter().zip(0..).collect();
        sorted.sort_by_key(|&(length, _)| Reverse(length));
        Self { sorted, tokens }
    }
}

impl<T> Texts<T> {
    fn tokens(&self) -> usize {
        self.waiting.iter().map(|&(tokens, _)| tokens as usize).sum()
    }

    /// The rows of about its next batch, if it had no other texts beside it.
    fn next_size(&self, plan: &BatchPlan) -> BatchSize {
        let longest = self.waiting.front().map_or(1, |&(tokens, _)| tokens as usize).max(1);
        let rows = self.waiting.len().min(plan.max_batch).min(plan.batch_tokens / longest).max(1);
        BatchSize { rows, longest, tokens: self.waiting.iter().take(rows).map(|&(tokens, _)| tokens as usize).sum() }
    }
}

impl<C, T: Clone> Line<C, T> {
    /// Nobody waits yet.
    pub fn new(settings: LineSettings) -> Self {
        Self {
            economical: pack::economical(&settings.plan),
            status: QueueStatus { limit: settings.queue_tokens, ..QueueStatus::default() },
            settings,
            interactive: FairQueue::new(),
            bulk: FairQueue::new(),
            overtaken: 0,
            owed: 0.0,
            bulk_cost: 0.0,
            interactive_came: false,
            last_interactive: None,
            pace: None,
            submitted: 0,
        }
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.interactive.is_empty() && self.bulk.is_empty()
    }

    /// Whether texts wait for others to share their batch.
    #[cfg(any(test, feature = "serve"))]
    pub fn lingers(&self) -> bool {
        !self.settings.linger.is_zero()
    }

    /// Callers that wait, with batches or with texts.
    pub fn len(&self) -> usize {
        self.interactive.len() + self.bulk.len()
    }

    /// What waits and what was begun.
    pub fn status(&self) -> QueueStatus {
        self.status
    }

    /// The next batch of `flow` begins at once: a place is free and nobody waits.
    pub fn pass(&mut self, flow: &mut Flow, size: BatchSize) {
        let cost = cost_of(&self.settings.plan, size);
        let tag = self.interactive.tag(flow, cost as u64);
        self.interactive.pass(tag);
        self.interactive_came = true;
        self.begun(Class::Interactive, size, cost);
    }

    /// A batch of that cost took so long: bulk batches are bounded by it.
    pub fn ran(&mut self, cost: f64, took: Duration) {
        let pace = took.as_secs_f64() * 1e6 / cost;
        self.pace = Some(self.pace.map_or(pace, |known| known + NEWEST * (pace - known)));
    }

    /// Puts in a caller with the next batch of `flow`; `caller` makes it of the flow as it goes on behind that batch.
    pub fn wait(&mut self, size: BatchSize, mut flow: Flow, caller: impl FnOnce(Flow) -> C) {
        let tag = self.interactive.tag(&mut flow, cost_of(&self.settings.plan, size) as u64);
        let entry = InLine { what: Waiting::Caller { caller: caller(flow), size }, bulk_before: self.bulk_cost };
        self.interactive.push(entry, tag, None);
        self.interactive_came = true;
    }

    /// Puts in `texts`, at least one, and gives the number by which they can be given up.
    ///
    /// # Errors
    /// [`Full`].
    pub fn submit(&mut self, texts: NewTexts<T>) -> Result<u64, Full> {
        let NewTexts { owner, class, group, came, deadline, lengths: Lengths { sorted, tokens } } = texts;
        let waiting = self.status.waiting_tokens();
        if let Some(limit) = self.settings.queue_tokens.filter(|&limit| waiting.saturating_add(tokens) > limit) {
            self.status.rejected += sorted.len() as u64;
            return Err(Full { waiting, limit, texts: sorted.len(), tokens });
        }
        self.status.comes(class, sorted.len(), tokens);
        let id = self.submitted;
        self.submitted += 1;
        let texts = Texts { id, owner, group, came, deadline, waiting: sorted.into() };
        self.line_up(class, texts, Flow::default());
        if class == Class::Interactive {
            self.last_interactive = self.last_interactive.max(Some(came));
        }
        Ok(id)
    }

    /// Takes out what waits of the texts submitted as `id`.
    pub fn cancel(&mut self, id: u64) -> Option<Part<T>> {
        let wanted = |entry: &InLine<C, T>| matches!(&entry.what, Waiting::Texts(texts) if texts.id == id);
        for class in [Class::Interactive, Class::Bulk] {
            if let Some(Waiting::Texts(texts)) = self.queue(class).remove(wanted).map(|entry| entry.what) {
                let gone = self.leaves(class, texts);
                self.status.cancelled += gone.texts.len() as u64;
                return Some(gone);
            }
        }
        None
    }

    /// Takes out the first caller found that is `wanted`.
    pub fn remove(&mut self, wanted: impl Fn(&C) -> bool) -> Option<C> {
        let is_wanted = |entry: &InLine<C, T>| matches!(&entry.what, Waiting::Caller { caller, .. } if wanted(caller));
        match self.interactive.remove(is_wanted).map(|entry| entry.what) {
            Some(Waiting::Caller { caller, .. }) => Some(caller),
            _ => None,
        }
    }

    /// Takes out the texts whose deadline is `now` or before.
    pub fn expire(&mut self, now: Instant) -> Vec<Part<T>> {
        let mut gone = Vec::new();
        for class in [Class::Interactive, Class::Bulk] {
            for entry in self.queue(class).take_expired(now) {
                if let Waiting::Texts(texts) = entry.what {
                    gone.push(self.leaves(class, texts));
                }
            }
        }
        self.status.expired += gone.iter().map(|part| part.texts.len() as u64).sum::<u64>();
        gone
    }

    /// Takes out everybody.
    pub fn drain(&mut self) -> (Vec<C>, Vec<Part<T>>) {
        let (mut callers, mut parts) = (Vec::new(), Vec::new());
        for class in [Class::Interactive, Class::Bulk] {
            while let Some(entry) = self.queue(class).remove(|_| true) {
                match entry.what {
                    Waiting::Caller { caller, .. } => callers.push(caller),
                    Waiting::Texts(texts) => parts.push(self.leaves(class, texts)),
                }
            }
        }
        self.status.cancelled += parts.iter().map(|part| part.texts.len() as u64).sum::<u64>();
        (callers, parts)
    }

    /// What is begun at `now`, when `free` places are free. Texts that have expired must have been taken out.
    pub fn next(&mut self, now: Instant, free: usize) -> Next<C, T> {
        if std::mem::take(&mut self.interactive_came) {
            self.last_interactive = Some(now);
        }
        let class = if self.bulk_is_next() { Class::Bulk } else { Class::Interactive };
        let queue = self.queue(class);
        let Some(turn) = queue.turn() else { return Next::Nothing };
        if matches!(queue.at(turn.place).what, Waiting::Texts(_)) {
            return self.next_pack(class, now, free);
        }
        let cost = queue.cost_at(turn.place);
        let Waiting::Caller { caller, size } = queue.take(turn, cost).0.what else { return Next::Nothing };
        self.begun(class, size, cost as f64);
        Next::Caller(caller)
    }

    /// Whether the next batch is bulk's.
    fn bulk_is_next(&self) -> bool {
        let Some(longest) = self.interactive.keys().map(|entry| self.bulk_cost - entry.bulk_before).max_by(f64::total_cmp) else {
            return true;
        };
        let is_due = self.overtaken >= self.settings.overtakings || (self.owed > 0.0 && longest < self.most_held_back());
        is_due && !self.bulk.is_empty()
    }

    /// Cost of bulk batches that an interactive text waits for at most while bulk is owed.
    fn most_held_back(&self) -> f64 {
        self.bounded_batches(HELD_BACK)
    }

    /// Cost of `count` bounded bulk batches at each place of the executor.
    fn bounded_batches(&self, count: f64) -> f64 {
        count * self.bounded() * self.settings.plan.parallelism.max(1) as f64
    }

    /// Cost of a bounded bulk batch: economical, unless that takes too long.
    fn bounded(&self) -> f64 {
        let in_time = self.pace.map_or(f64::INFINITY, |pace| BULK_TIME.as_secs_f64() * 1e6 / pace);
        self.economical.min(in_time)
    }

    /// A batch around the text of `class` whose turn it is.
    fn next_pack(&mut self, class: Class, now: Instant, free: usize) -> Next<C, T> {
        let budget = self.budget(class, now);
        let waiting_tokens = self.status.waiting(class).tokens;
        let alone = self.len() == self.queue(class).len();
        let Self { settings: LineSettings { plan, linger, .. }, interactive, bulk, .. } = self;
        let queue = if class == Class::Bulk { bulk } else { interactive };
        let Some(turn) = queue.turn() else { return Next::Nothing };
        let Waiting::Texts(lead) = &queue.at(turn.place).what else { return Next::Nothing };
        let (lead_id, lead_group, lead_length) = (lead.id, lead.group, lead.waiting.front().map_or(0, |text| text.0));

        // Callers in the fair order, and of each the texts nearest to the lead in length.
        let of_group = |entry: &InLine<C, T>| matches!(&entry.what, Waiting::Texts(texts) if texts.group == lead_group && texts.id != lead_id);
        let places: Vec<usize> = [turn.place].into_iter().chain(queue.first(WINDOW - 1, of_group)).collect();
        let mut window: Vec<Candidate> = Vec::new();
        for (rank, &place) in places.iter().enumerate() {
            let Waiting::Texts(texts) = &queue.at(place).what else { continue };
            let nearest = texts.waiting.partition_point(|text| text.0 > lead_length);
            let near = nearest.saturating_sub(plan.max_batch)..texts.waiting.len().min(nearest.saturating_add(plan.max_batch));
            let room = WINDOW - window.len();
            // The lead, the longest of its caller, is at the front of its own.
            window.extend(near.take(room).map(|at| (Reverse(texts.waiting[at].0), rank, at)));
            if window.len() == WINDOW {
                break;
            }
        }
        window.sort_unstable();
        let Ok(lead) = window.binary_search(&(Reverse(lead_length), 0, 0)) else { return Next::Nothing };
        let lengths: Vec<usize> = window.iter().map(|candidate| candidate.0.0 as usize).collect();
        let share = match plan.costs {
            // A rectangle of its share for every place that is free, rather than one batch and idle places.
            None if free > 1 => waiting_tokens.div_ceil(free),
            _ => usize::MAX,
        };
        let chosen = pack::choose(plan, &lengths, lead, Budget { tokens: share, cost: budget });
        let size =
            BatchSize { rows: chosen.len(), longest: lengths[chosen.start].max(1), tokens: lengths[chosen.clone()].iter().sum() };
        let cost = cost_of(plan, size);

        // The chosen ones of each caller are neighbours there too: the first and how many.
        let mut parts: Vec<(usize, usize, usize)> = Vec::new();
        let mut picked: Vec<(usize, usize)> = window[chosen.clone()].iter().map(|&(_, rank, at)| (rank, at)).collect();
        picked.sort_unstable();
        for (rank, at) in picked {
            match parts.last_mut() {
                Some((last, _, count)) if *last == rank => *count += 1,
                _ => parts.push((rank, at, 1)),
            }
        }
        if !linger.is_zero() && alone && chosen.len() == lengths.len() && size.rows < plan.max_batch {
            let came = parts.iter().filter_map(|&(rank, ..)| match &queue.at(places[rank]).what {
                Waiting::Texts(texts) => Some(texts.came),
                Waiting::Caller { .. } => None,
            });
            if let Some(until) = came.min().and_then(|came| came.checked_add(*linger)).filter(|&until| until > now) {
                return Next::Wait(until);
            }
        }

        let mut pack = Vec::with_capacity(parts.len());
        let mut emptied = Vec::new();
        for &(rank, at, count) in parts.iter().skip_while(|part| part.0 == 0) {
            let place = places[rank];
            let Waiting::Texts(texts) = &mut queue.at_mut(place).what else { continue };
            let (part, tokens) = take(texts, at, count);
            pack.push(part);
            if texts.waiting.is_empty() {
                emptied.push(place);
            }
            queue.charge(place, portion(cost as u64, tokens, size.tokens));
        }
        // The lead's caller leaves its place; the places of others stay good until then.
        let (at, count) = parts.first().map_or((0, 1), |part| (part.1, part.2));
        let Waiting::Texts(texts) = &mut queue.at_mut(turn.place).what else { return Next::Nothing };
        let (part, tokens) = take(texts, at, count);
        pack.insert(0, part);
        let (entry, start) = queue.take(turn, cost as u64);
        // Taking it out has put the last entry at its place.
        let moved = queue.len();
        for place in &mut emptied {
            if *place == moved {
                *place = turn.place;
            }
        }
        emptied.sort_unstable_by_key(|&place| Reverse(place));
        for place in emptied {
            queue.remove_at(place);
        }
        if let Waiting::Texts(texts) = entry.what
            && !texts.waiting.is_empty()
        {
            self.line_up(class, texts, Flow::after(start.saturating_add(portion(cost as u64, tokens, size.tokens))));
        }
        self.status.no_longer_waits(class, size.rows, size.tokens);
        self.begun(class, size, cost);
        Next::Pack(Pack { parts: pack, cost })
    }

    /// What a batch of `class` may cost.
    fn budget(&self, class: Class, now: Instant) -> f64 {
        let about =
            !self.interactive.is_empty() || self.last_interactive.is_some_and(|last| now.saturating_duration_since(last) < ABOUT);
        if class == Class::Bulk && about { self.bounded() } else { f64::INFINITY }
    }

    fn queue(&mut self, class: Class) -> &mut FairQueue<InLine<C, T>> {
        match class {
            Class::Interactive => &mut self.interactive,
            Class::Bulk => &mut self.bulk,
        }
    }

    fn line_up(&mut self, class: Class, texts: Texts<T>, mut flow: Flow) {
        let plan = &self.settings.plan;
        let (cost, deadline) = (cost_of(plan, texts.next_size(plan)), texts.deadline);
        let entry = InLine { what: Waiting::Texts(texts), bulk_before: self.bulk_cost };
        let queue = self.queue(class);
        let tag = queue.tag(&mut flow, cost as u64);
        queue.push(entry, tag, deadline);
    }

    fn leaves(&mut self, class: Class, texts: Texts<T>) -> Part<T> {
        self.status.no_longer_waits(class, texts.waiting.len(), texts.tokens());
        Part { owner: texts.owner, texts: texts.waiting.into_iter().map(|(_, text)| text).collect() }
    }

    /// Counts a batch that is begun.
    fn begun(&mut self, class: Class, size: BatchSize, cost: f64) {
        let status = &mut self.status;
        status.batches += 1;
        status.texts += size.rows as u64;
        status.tokens += size.tokens as u64;
        status.run_tokens += self.settings.plan.run_tokens(size) as u64;
        match class {
            Class::Bulk => {
                self.overtaken = 0;
                self.bulk_cost += cost;
                self.owed = (self.owed - cost).max(-self.bounded_batches(AHEAD));
            }
            Class::Interactive if self.bulk.is_empty() => (self.overtaken, self.owed) = (0, 0.0),
            Class::Interactive => {
                self.overtaken += 1;
                status.overtakings += 1;
                // Bounded, so that bulk does not come back for times long ago: by what interactive texts are held back for, twice.
                self.owed = (self.owed + BULK_SHARE * cost).min(2.0 * self.most_held_back());
            }
        }
    }
}

/// Takes `count` of the texts out that wait, from `at` on; and their tokens.
fn take<T: Clone>(texts: &mut Texts<T>, at: usize, count: usize) -> (Part<T>, usize) {
    let taken: Vec<(u32, u32)> = texts.waiting.drain(at..at + count).collect();
    let tokens = taken.iter().map(|&(tokens, _)| tokens as usize).sum();
    (Part { owner: texts.owner.clone(), texts: taken.into_iter().map(|(_, text)| text).collect() }, tokens)
}

/// What a batch costs in the fair order; at least 1. One that no shape holds, which the executor refuses, costs its tokens.
fn cost_of(plan: &BatchPlan, size: BatchSize) -> f64 {
    plan.cost(size).unwrap_or(BatchSize::padded(size.rows, size.longest).tokens as f64).max(1.0)
}

/// The part of `cost` that `tokens` of `all` bear.
fn portion(cost: u64, tokens: usize, all: usize) -> u64 {
    (cost as u128 * tokens as u128 / all.max(1) as u128) as u64
}

#[cfg(test)]
#[path = "line_tests.rs"]
mod tests;

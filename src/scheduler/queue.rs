//! Which of the waiting batches runs next: start-time fair queueing, as a pure data structure. It has no threads and no clock.

use std::time::Instant;

/// How much work of others, in multiples of its own cost, may go by a waiting entry before it is overdue: a call that waits beside any
/// number of short ones has at least about a ninth of the executor.
const PATIENCE: u64 = 8;
/// How many times less than an overdue entry another one must cost to go between two overdue ones.
const MUCH_LESS: u64 = 16;

/// What waits, and in which order it comes.
///
/// Every call is a flow. Its batches have start tags on a virtual clock: the first is the clock's time when the call comes, each further
/// one that of the batch before it plus that batch's cost. The entry with the least tag runs next, and sets the clock to its tag (Goyal,
/// Vin and Cheng, "Start-time fair queueing", 1996). A new call therefore stands before all further batches of the calls that are being
/// served, however many they are; among equal tags the one comes first that would end first, then the one that came first.
///
/// Short calls that keep coming could hold the clock still and a long call off for ever. So an entry is overdue when [`PATIENCE`] times
/// its cost was served since it came: overdue entries go first, the earliest before the others, but never two in a row while an entry waits that
/// costs much less. Thus a new short call waits for one of them at most, and calls that cost about as much, however many wait, come in the order in
/// which they came: the least first, always, would have some of them wait for ever longer.
pub(super) struct FairQueue<K> {
    waiting: Vec<Entry<K>>,
    /// The virtual clock, in the unit of the costs.
    clock: u64,
    /// Cost of all that was served.
    served: u64,
    /// How many entries have come.
    came: u64,
    /// Whether the last to be served was overdue.
    after_overdue: bool,
}

/// Where a call stands on the virtual clock: the tag of its next batch, if that is later than now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Flow {
    next_start: u64,
}

/// A batch's place on the virtual clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tag {
    start: u64,
    cost: u64,
}

/// Whose turn it is: a place in the queue, good until the queue is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Turn {
    pub place: usize,
    overdue: bool,
}

struct Entry<K> {
    key: K,
    tag: Tag,
    deadline: Option<Instant>,
    /// Entries that came before it.
    order: u64,
    /// What had been served when it came.
    served_before: u64,
}

impl Flow {
    /// The next batch starts at `start` at the earliest.
    pub(super) fn after(start: u64) -> Self {
        Self { next_start: start }
    }
}

impl<K> FairQueue<K> {
    pub fn new() -> Self {
        Self { waiting: Vec::new(), clock: 0, served: 0, came: 0, after_overdue: false }
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// How many entries wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// The start tag of the next batch of `flow`, which costs `cost`.
    pub fn tag(&self, flow: &mut Flow, cost: u64) -> Tag {
        let start = self.clock.max(flow.next_start);
        flow.next_start = start.saturating_add(cost);
        Tag { start, cost }
    }

    /// Puts in `key`, which must not begin at `deadline` or later.
    pub fn push(&mut self, key: K, tag: Tag, deadline: Option<Instant>) {
        self.waiting.push(Entry { key, tag, deadline, order: self.came, served_before: self.served });
        self.came += 1;
    }

    /// As [`FairQueue::push`] and [`FairQueue::pop`] at once, for an entry that need not wait because nothing does.
    pub fn pass(&mut self, tag: Tag) {
        self.serve(tag.start, tag.cost, false);
    }

    /// Takes out what runs next.
    #[cfg(test)]
    pub fn pop(&mut self) -> Option<K> {
        let turn = self.turn()?;
        let cost = self.waiting[turn.place].tag.cost;
        Some(self.take(turn, cost).0)
    }

    /// What runs next.
    pub fn turn(&self) -> Option<Turn> {
        let least = self.least()?;
        let lets_by = |overdue: usize| self.cost_at(least).saturating_mul(MUCH_LESS) <= self.cost_at(overdue);
        let overdue = self.overdue().filter(|&overdue| !self.after_overdue || !lets_by(overdue));
        let place = overdue.unwrap_or(least);
        Some(Turn { place, overdue: overdue.is_some() })
    }

    /// Takes out the entry whose turn it is, which is served for `cost`; and its start tag.
    pub fn take(&mut self, turn: Turn, cost: u64) -> (K, u64) {
        let Entry { key, tag, .. } = self.waiting.swap_remove(turn.place);
        self.serve(tag.start, cost, turn.overdue);
        (key, tag.start)
    }

    /// All entries, in no order.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.waiting.iter().map(|entry| &entry.key)
    }

    /// The entry at `place`.
    pub fn at(&self, place: usize) -> &K {
        &self.waiting[place].key
    }

    /// The entry at `place`, which may be changed, but for its tag.
    pub fn at_mut(&mut self, place: usize) -> &mut K {
        &mut self.waiting[place].key
    }

    /// What the entry at `place` costs.
    pub fn cost_at(&self, place: usize) -> u64 {
        self.waiting[place].tag.cost
    }

    /// The places of at most `most` entries that are `wanted`, those of the least tags, in their order.
    pub fn first(&self, most: usize, wanted: impl Fn(&K) -> bool) -> Vec<usize> {
        let mut places: Vec<usize> = (0..self.waiting.len()).filter(|&place| wanted(&self.waiting[place].key)).collect();
        if places.len() > most {
            places.select_nth_unstable_by_key(most, |&place| self.order(place));
            places.truncate(most);
        }
        places.sort_unstable_by_key(|&place| self.order(place));
        places
    }

    /// The entry at `place` had `cost` of what was served to another, and waits on.
    pub fn charge(&mut self, place: usize, cost: u64) {
        let entry = &mut self.waiting[place];
        entry.tag.start = entry.tag.start.saturating_add(cost);
        entry.served_before = self.served;
    }

    /// Takes out the entry at `place`; the last entry has that place then.
    pub fn remove_at(&mut self, place: usize) -> K {
        self.waiting.swap_remove(place).key
    }

    /// Takes out all whose deadline is `now` or before.
    pub fn take_expired(&mut self, now: Instant) -> Vec<K> {
        let mut expired = Vec::new();
        let mut place = 0;
        while let Some(entry) = self.waiting.get(place) {
            if entry.deadline.is_some_and(|deadline| deadline <= now) {
                expired.push(self.remove_at(place));
            } else {
                place += 1;
            }
        }
        expired
    }

    /// Takes out the first entry found that is `wanted`.
    pub fn remove(&mut self, wanted: impl Fn(&K) -> bool) -> Option<K> {
        let place = self.waiting.iter().position(|entry| wanted(&entry.key))?;
        Some(self.remove_at(place))
    }

    fn serve(&mut self, start: u64, cost: u64, overdue: bool) {
        // An overdue entry is served out of turn: those of lesser tags still stand before it on the clock.
        if !overdue {
            self.clock = self.clock.max(start);
        }
        self.served = self.served.saturating_add(cost);
        self.after_overdue = overdue;
    }

    /// The place of the entry with the least tag.
    fn least(&self) -> Option<usize> {
        (0..self.waiting.len()).min_by_key(|&place| self.order(place))
    }

    fn order(&self, place: usize) -> (u64, u64, u64) {
        let Entry { tag, order, .. } = &self.waiting[place];
        (tag.start, tag.start.saturating_add(tag.cost), *order)
    }

    /// The place of the overdue entry that came first.
    fn overdue(&self) -> Option<usize> {
        let is_overdue = |entry: &Entry<K>| self.served - entry.served_before > entry.tag.cost.saturating_mul(PATIENCE);
        (0..self.waiting.len()).filter(|&place| is_overdue(&self.waiting[place])).min_by_key(|&place| self.waiting[place].order)
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;

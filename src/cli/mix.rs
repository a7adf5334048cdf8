//! The benchmark's seeded randomness: ids, texts, and the mix of lengths that throughput is measured on.

/// SplitMix64 (Steele, Lea, Flood 2014): small, and the same numbers for ever, so that runs can be compared.
pub struct Seeded(u64);

/// Short common words: one token each in the usual English vocabularies.
const WORDS: [&str; 32] = [
    "the", "of", "and", "in", "to", "was", "for", "on", "with", "time", "city", "water", "house", "music", "year", "school",
    "river", "war", "team", "book", "world", "group", "state", "song", "line", "day", "film", "church", "road", "game", "life",
    "work",
];

impl Seeded {
    /// A generator that starts at `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1), 53 bits.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in [0, n); 0 for n = 0.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }

    /// Standard normal (Box-Muller).
    fn normal(&mut self) -> f64 {
        // 1 - unit() is never zero.
        (-2.0 * (1.0 - self.unit()).ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// `tokens` random ids below `vocab_size`, never the padding token: a model that counts positions by it refuses texts with it.
    pub fn ids(&mut self, tokens: usize, vocab_size: usize, pad_token_id: u32) -> Vec<u32> {
        (0..tokens)
            .map(|_| self.below(vocab_size.saturating_sub(1)) as u32)
            .map(|id| id + u32::from(id >= pad_token_id))
            .collect()
    }

    /// A text of `words` random words.
    pub fn text(&mut self, words: usize) -> String {
        let words: Vec<&str> = (0..words).map(|_| WORDS[self.below(WORDS.len())]).collect();
        words.join(" ")
    }

    /// A text's length in tokens, special tokens included: half log-normal (median 12, sigma 0.5, up to 64), 40 % log-normal
    /// (median 90, sigma 0.6, up to 384), 10 % normal (mean 300, deviation 120, up to 512); at least 3, at most `limit`.
    pub fn length(&mut self, limit: usize) -> usize {
        let (length, most) = match self.unit() {
            kind if kind < 0.5 => (12.0 * (0.5 * self.normal()).exp(), 64),
            kind if kind < 0.9 => (90.0 * (0.6 * self.normal()).exp(), 384),
            _ => (300.0 + 120.0 * self.normal(), 512),
        };
        // A float below 3 (or below 0) saturates.
        (length.round() as usize).clamp(3, most).min(limit.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_the_published_one() {
        // First outputs of SplitMix64 for seed 1234567, as in the reference implementation's test vectors.
        let mut seeded = Seeded::new(1234567);
        assert_eq!(
            [seeded.next(), seeded.next(), seeded.next()],
            [6457827717110365317, 3203168211198807973, 9817491932198370423]
        );
    }

    #[test]
    fn lengths_follow_the_mix() {
        let mut seeded = Seeded::new(7);
        let n = 20_000;
        let lengths: Vec<usize> = (0..n).map(|_| seeded.length(512)).collect();
        assert!(lengths.iter().all(|length| (3..=512).contains(length)));
        // Expected mean: .5 * 12 e^.125 + .4 * 90 e^.18 (a little less, cut at 384) + .1 * 300 = 79.9 - 0.8; deviation of one
        // length about 95, so four standard errors are 2.7.
        let mean = lengths.iter().sum::<usize>() as f64 / n as f64;
        assert!((mean - 79.0).abs() < 3.5, "{mean}");
        // Under 12 is half of the first kind, and next to nothing of the others.
        let short = lengths.iter().filter(|length| **length < 12).count() as f64 / n as f64;
        assert!((0.21..0.26).contains(&short), "{short}");
        assert!((0..1000).all(|_| (1..=24).contains(&seeded.length(24))));
    }

    #[test]
    fn ids_stay_in_the_table_and_texts_have_their_words() {
        let mut seeded = Seeded::new(1);
        for pad in [0, 1, 6] {
            let ids = seeded.ids(10_000, 7, pad);
            assert!((0..7).all(|id| ids.contains(&id) == (id != pad)) && ids.iter().all(|id| *id < 7), "{pad}");
        }
        assert_eq!(seeded.text(5).split(' ').count(), 5);
        assert_eq!(seeded.text(0), "");
    }
}

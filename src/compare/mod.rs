//! Parity: a fixed set of texts of all lengths through an executor, profile by profile, and how far its vectors lie from a reference's.

use crate::executor::Backend;
use crate::model::ModelFolder;
use crate::pooling::check_finite;
use crate::tokens::{BatchPlan, TokenBatch, Tokenizer, batches_from_ids};
use crate::{Error, Result, Setting};
use rayon::prelude::*;

/// Up to this length there is a text of every number of tokens.
const EVERY_LENGTH: usize = 16;
/// Beyond it, each text is longer than the one before by this share of it: about 60 texts up to 512 tokens.
const STEP: usize = 12;

/// What the texts are made of: words that English vocabularies hold whole, and some that they do not.
const WORDS: [&str; 48] = [
    "the",
    "river",
    "was",
    "cold",
    "and",
    "nobody",
    "had",
    "crossed",
    "it",
    "since",
    "autumn",
    ",",
    "a",
    "letter",
    "from",
    "1847",
    "says",
    "that",
    "bridges",
    "were",
    "rare",
    ".",
    "engines",
    "of",
    "this",
    "kind",
    "burn",
    "hydrogen",
    "at",
    "high",
    "pressure",
    ";",
    "her",
    "account",
    "number",
    "is",
    "unknown",
    "to",
    "us",
    "photosynthesis",
    "turns",
    "light",
    "into",
    "sugar",
    "?",
    "they",
    "laughed",
    "quietly",
];

/// An executor whose profiles can be run one by one.
pub trait ByProfile {
    /// The smallest and the largest shape of each profile, `[batch, seq]`.
    fn profiles(&self) -> Vec<([usize; 2], [usize; 2])>;

    /// As [`Backend::encode`], at one profile: the batch fits its largest shape and is padded up to its smallest.
    ///
    /// # Errors
    /// The executor's failure.
    fn encode_with(&self, profile: usize, batch: &TokenBatch, out: &mut [f32]) -> Result<()>;
}

/// Texts as rows of ids, and the vectors that they should have.
#[derive(Debug)]
pub struct Reference {
    rows: Vec<Vec<u32>>,
    /// `[rows, dim]`.
    vectors: Vec<f32>,
    dim: usize,
    padding: Padding,
    /// Leading tokens that pooling leaves out.
    skip: u32,
}

/// What short rows are filled up with, and which ids there are.
#[derive(Debug, Clone, Copy)]
pub struct Padding {
    /// The padding token.
    pub id: u32,
    /// Rows of the token embedding table.
    pub vocab_size: usize,
}

/// How near two executors are to each other.
#[derive(Debug, Clone, PartialEq)]
pub struct Agreement {
    /// Different texts that were compared.
    pub texts: usize,
    /// Vectors that were compared: a text counts once for every batch that it was in.
    pub vectors: usize,
    /// Smallest cosine of the finite vectors.
    pub min_cosine: f64,
    /// The same of each profile; 1 where nothing was compared.
    pub by_profile: Vec<f64>,
    /// Largest difference of a component of the finite vectors.
    pub max_abs_difference: f64,
    /// Vectors with a NaN or an infinity.
    pub not_finite: usize,
    /// Where the first vector that is not finite was, else the smallest cosine.
    pub worst: Place,
}

/// One text in one profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The profile, by its place in [`ByProfile::profiles`].
    pub profile: usize,
    /// The text's length.
    pub tokens: usize,
}

/// Rows of ids of words, special tokens included: one of each length from the shortest that `tokenizer` gives to 16 tokens, then longer
/// ones in growing steps up to its limit. The same for every call. (A length that words of several tokens cannot meet is missed by
/// a token or two.)
///
/// # Errors
/// [`Error::Tokenizer`], [`Error::TokenId`].
pub fn rows_of_all_lengths(tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>> {
    let longest = tokenizer.max_tokens();
    let mut rows: Vec<Vec<u32>> = Vec::new();
    let mut length = 1;
    loop {
        let length_now = length.min(longest);
        let row = row_of_length(tokenizer, length_now)?;
        if row.len() <= longest && !rows.contains(&row) {
            rows.push(row);
        }
        if length >= longest {
            return Ok(rows);
        }
        length += if length < EVERY_LENGTH { 1 } else { (length / STEP).max(1) };
    }
}

/// At most `tokens` ids, unless a text without words has more.
fn row_of_length(tokenizer: &Tokenizer, tokens: usize) -> Result<Vec<u32>> {
    // Each text begins at another word, so that no two share their beginning.
    let words: Vec<&str> = WORDS.iter().copied().cycle().skip(tokens * 7 % WORDS.len()).take(tokens).collect();
    // Every word is at least one token: the most that fit, by bisection.
    let (mut fit, mut too_many) = (0, words.len() + 1);
    while too_many - fit > 1 {
        let middle = fit + (too_many - fit) / 2;
        if ids(tokenizer, &words[..middle].join(" "))?.len() <= tokens {
            fit = middle;
        } else {
            too_many = middle;
        }
    }
    let text = words[..fit].join(" ");
    let row = ids(tokenizer, &text)?;
    // What is missing where the next word has several tokens.
    let filled = ids(tokenizer, &format!("{text}{}", " a".repeat(tokens.saturating_sub(row.len()))))?;
    Ok(if filled.len() <= tokens { filled } else { row })
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    Ok(tokenizer.ids(&[text])?.concat())
}

impl Padding {
    /// As `folder`'s config.json says.
    pub fn of_model(folder: &ModelFolder) -> Self {
        Self { id: folder.config.pad_token_id, vocab_size: folder.config.vocab_size }
    }
}

impl Reference {
    /// Runs `rows` through `backend`, whose vectors have `dim` values.
    ///
    /// # Errors
    /// The backend's; [`Error::NotFinite`] where it gives a NaN or an infinity; [`Error::TokenId`].
    pub fn run(backend: &dyn Backend, rows: Vec<Vec<u32>>, dim: usize, padding: Padding) -> Result<Self> {
        let limits = backend.limits();
        let plan = BatchPlan::new(limits.max_batch, limits.batch_tokens, limits.parallelism);
        let batches = batches_from_ids(&rows, padding.vocab_size, 0, &plan)?;
        let encode = |batch: &TokenBatch| {
            let mut out = vec![0.0; batch.batch() * dim];
            backend.encode(batch, &mut out)?;
            check_finite(&out, dim, batch.rows()).map(|()| out)
        };
        let encoded: Vec<Vec<f32>> = batches.par_iter().map(encode).collect::<Result<_>>()?;
        let mut vectors = vec![0.0; rows.len() * dim];
        for (batch, out) in batches.iter().zip(&encoded) {
            for (vector, &row) in out.chunks_exact(dim).zip(batch.rows()) {
                vectors[row * dim..(row + 1) * dim].copy_from_slice(vector);
            }
        }
        Ok(Self::given(rows, vectors, dim, padding, 0))
    }

    /// `vectors` `[rows, dim]` that were made elsewhere, of rows whose first `skip` tokens pooling leaves out.
    pub fn given(rows: Vec<Vec<u32>>, vectors: Vec<f32>, dim: usize, padding: Padding, skip: u32) -> Self {
        Self { rows, vectors, dim, padding, skip }
    }

    /// Runs the texts that fit each profile of `executor` and compares. Batches are ragged and fill the profile's rows; where a
    /// profile serves several shapes, each text runs alone too.
    ///
    /// # Errors
    /// The executor's; [`Error::Setting`] where no profile holds even the shortest text.
    pub fn compare(&self, executor: &dyn ByProfile) -> Result<Agreement> {
        let profiles = executor.profiles();
        let mut tally = Tally::new(self.rows.len(), profiles.len());
        for (profile, (min, max)) in profiles.into_iter().enumerate() {
            let [most, longest] = max;
            let mut fitting: Vec<usize> = (0..self.rows.len()).filter(|&row| self.rows[row].len() <= longest).collect();
            if fitting.is_empty() {
                log::warn!("profile {most}x{longest} is shorter than any text: it is not compared");
                continue;
            }
            fitting.sort_by_key(|&row| self.rows[row].len());
            for batch in ragged(&fitting, most) {
                self.compare_batch(executor, profile, &batch, &mut tally)?;
            }
            if min != max && most > 1 {
                for &row in &fitting {
                    self.compare_batch(executor, profile, &[row], &mut tally)?;
                }
            }
        }
        tally.finish()
    }

    fn compare_batch(&self, executor: &dyn ByProfile, profile: usize, chosen: &[usize], tally: &mut Tally) -> Result<()> {
        let rows: Vec<&[u32]> = chosen.iter().map(|&row| self.rows[row].as_slice()).collect();
        let plan = BatchPlan::new(rows.len(), usize::MAX, 1);
        let mut out = Vec::new();
        for batch in batches_from_ids(&rows, self.padding.vocab_size, self.skip, &plan)? {
            out.clear();
            out.resize(batch.batch() * self.dim, f32::NAN);
            executor.encode_with(profile, &batch, &mut out)?;
            for (vector, &place) in out.chunks_exact(self.dim).zip(batch.rows()) {
                let row = chosen[place];
                let expected = &self.vectors[row * self.dim..(row + 1) * self.dim];
                tally.add(row, Place { profile, tokens: self.rows[row].len() }, vector, expected);
            }
        }
        Ok(())
    }
}

impl Agreement {
    /// Whether every vector is finite and no cosine is below `bar`.
    pub fn reaches(&self, bar: f64) -> bool {
        self.not_finite == 0 && self.min_cosine >= bar
    }

    /// The measured value that decides, in words.
    pub fn verdict(&self) -> String {
        match self.not_finite {
            0 => format!("the smallest cosine is {:.7}", self.min_cosine),
            some => format!("{some} of {} vectors are not finite", self.vectors),
        }
    }
}

/// `sorted` cut into batches of `most` rows, each of which has short and long ones; the last is filled up from the beginning.
fn ragged(sorted: &[usize], most: usize) -> Vec<Vec<usize>> {
    let batches = sorted.len().div_ceil(most.max(1));
    (0..batches)
        .map(|first| {
            let stride = sorted.iter().skip(first).step_by(batches);
            stride.chain(sorted.iter().cycle()).take(most.max(1)).copied().collect()
        })
        .collect()
}

/// Counts while comparing.
struct Tally {
    compared: Vec<bool>,
    vectors: usize,
    not_finite: usize,
    max_abs_difference: f64,
    lowest: Option<(f64, Place)>,
    by_profile: Vec<f64>,
    first_not_finite: Option<Place>,
}

impl Tally {
    fn new(rows: usize, profiles: usize) -> Self {
        let compared = vec![false; rows];
        Self {
            compared,
            by_profile: vec![1.0; profiles],
            vectors: 0,
            not_finite: 0,
            max_abs_difference: 0.0,
            lowest: None,
            first_not_finite: None,
        }
    }

    fn add(&mut self, row: usize, place: Place, found: &[f32], expected: &[f32]) {
        self.compared[row] = true;
        self.vectors += 1;
        if found.iter().any(|value| !value.is_finite()) {
            self.not_finite += 1;
            self.first_not_finite.get_or_insert(place);
            return;
        }
        let difference = found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()).fold(0.0, f64::max);
        self.max_abs_difference = self.max_abs_difference.max(difference);
        let cosine = cosine(found, expected);
        if let Some(lowest) = self.by_profile.get_mut(place.profile) {
            *lowest = lowest.min(cosine);
        }
        if self.lowest.is_none_or(|(lowest, _)| cosine < lowest) {
            self.lowest = Some((cosine, place));
        }
    }

    fn finish(self) -> Result<Agreement> {
        let Some(worst) = self.first_not_finite.or(self.lowest.map(|(_, place)| place)) else {
            return Err(Error::Setting { setting: Setting::Profiles, reason: "no profile holds even the shortest text".into() });
        };
        Ok(Agreement {
            texts: self.compared.iter().filter(|&&compared| compared).count(),
            vectors: self.vectors,
            min_cosine: self.lowest.map_or(0.0, |(cosine, _)| cosine),
            by_profile: self.by_profile,
            max_abs_difference: self.max_abs_difference,
            not_finite: self.not_finite,
            worst,
        })
    }
}

/// 1 for two vectors of zeros, 0 where only one is.
fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    let (aa, bb) = (dot(a, a), dot(b, b));
    if aa == 0.0 || bb == 0.0 {
        return if aa == bb { 1.0 } else { 0.0 };
    }
    dot(a, b) / (aa.sqrt() * bb.sqrt())
}

#[cfg(test)]
mod tests;

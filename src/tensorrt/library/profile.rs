//! Optimisation profiles: the input shapes an engine is built for, as written on the command line.

use crate::{Error, Result, Setting};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The shape of a batch of token ids, written `BxS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Shape {
    /// Rows.
    pub batch: u32,
    /// Tokens of a row, padding included.
    pub seq: u32,
}

/// The shapes that one profile of an engine serves, written `MIN:OPT:MAX`, or `BxS` for a bucket.
///
/// A bucket (min = opt = max) is faster than a wider profile at its shape, and TensorRT 8.6 can capture only buckets as a CUDA
/// graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Profile {
    min: Shape,
    opt: Shape,
    max: Shape,
}

impl Shape {
    /// `batch` rows of `seq` tokens.
    ///
    /// # Errors
    /// [`Error::Setting`] for a zero, or a size beyond the 32-bit signed dimensions of TensorRT 8.
    pub fn new(batch: u32, seq: u32) -> Result<Self> {
        let shape = Self { batch, seq };
        for (value, what) in [(batch, "batch"), (seq, "length")] {
            if value == 0 || i32::try_from(value).is_err() {
                return Err(invalid(format!("{what} {value} in {shape} is outside 1 to {}", i32::MAX)));
            }
        }
        Ok(shape)
    }

    /// Tokens of the whole rectangle.
    pub fn tokens(self) -> u64 {
        u64::from(self.batch) * u64::from(self.seq)
    }

    /// Whether a batch of `other` can run in this shape, padded.
    pub fn holds(self, other: Self) -> bool {
        other.batch <= self.batch && other.seq <= self.seq
    }

    pub(in crate::tensorrt) fn dims(self) -> [i64; 2] {
        [i64::from(self.batch), i64::from(self.seq)]
    }
}

impl Profile {
    /// Shapes from `min` to `max`, tuned for `opt`.
    ///
    /// # Errors
    /// [`Error::Setting`] unless min <= opt <= max in both dimensions.
    pub fn new(min: Shape, opt: Shape, max: Shape) -> Result<Self> {
        let profile = Self { min, opt, max };
        if !opt.holds(min) || !max.holds(opt) {
            return Err(invalid(format!("{min}:{opt}:{max} must grow in both dimensions: MIN <= OPT <= MAX")));
        }
        Ok(profile)
    }

    /// The profile that serves exactly `shape`.
    pub fn bucket(shape: Shape) -> Self {
        Self { min: shape, opt: shape, max: shape }
    }

    /// The smallest shape.
    pub fn min(&self) -> Shape {
        self.min
    }

    /// The shape that TensorRT tunes for.
    pub fn opt(&self) -> Shape {
        self.opt
    }

    /// The largest shape.
    pub fn max(&self) -> Shape {
        self.max
    }

    /// Whether min = opt = max.
    pub fn is_bucket(&self) -> bool {
        self.min == self.max
    }

    /// Checks the profile against a model that knows `positions` positions.
    ///
    /// # Errors
    /// [`Error::Setting`] where the longest row is longer than that.
    pub fn check(&self, positions: usize) -> Result<()> {
        match usize::try_from(self.max.seq) {
            Ok(seq) if seq <= positions => Ok(()),
            _ => Err(invalid(format!("{self} asks for rows of {} tokens, the model takes at most {positions}", self.max.seq))),
        }
    }
}

/// What an engine serves where nobody says: buckets for single texts and for full batches, short, middling and of `max_tokens` tokens.
/// Together they hold every text; batches are cut to fit them. No wide profile: TensorRT 8.6 runs those slower and less exactly.
pub fn default_profiles(max_tokens: usize) -> Vec<Profile> {
    let longest = u32::try_from(max_tokens).unwrap_or(u32::MAX).clamp(1, i32::MAX.unsigned_abs());
    let mut shapes: Vec<Shape> = Vec::new();
    for (batch, seq) in [(1, 32), (1, 128), (1, longest), (64, 32), (32, 128), (8, longest)] {
        let shape = Shape { batch, seq: seq.min(longest) };
        // Of two for the same length, the first is the larger.
        if !shapes.iter().any(|other| other.seq == shape.seq && (other.batch == 1) == (batch == 1)) {
            shapes.push(shape);
        }
    }
    shapes.into_iter().map(Profile::bucket).collect()
}

/// Checks that one of `profiles` holds texts of `tokens` tokens.
///
/// # Errors
/// [`Error::Setting`], with the longest that they hold.
pub(in crate::tensorrt) fn check_longest(profiles: &[Profile], tokens: usize) -> Result<()> {
    let longest = profiles.iter().map(|profile| profile.max.seq as usize).max().unwrap_or(0);
    if tokens <= longest {
        return Ok(());
    }
    let reason = format!(
        "{tokens} is above {longest}, the longest text in tokens that the engine serves; ask for at most {longest}, or build it with a \
         profile that holds 1x{tokens}"
    );
    Err(Error::Setting { setting: Setting::MaxTokens, reason })
}

fn invalid(reason: String) -> Error {
    Error::Setting { setting: Setting::Profiles, reason }
}

fn number(text: &str, whole: &str) -> Result<u32> {
    // `parse` would take a sign.
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(invalid(format!("\"{whole}\" is not BATCHxLENGTH, e.g. 32x128")));
    }
    text.parse().map_err(|_| invalid(format!("{text} in \"{whole}\" is outside 1 to {}", i32::MAX)))
}

impl FromStr for Shape {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (batch, seq) = text.split_once('x').ok_or_else(|| invalid(format!("\"{text}\" is not BATCHxLENGTH, e.g. 32x128")))?;
        Self::new(number(batch, text)?, number(seq, text)?)
    }
}

impl FromStr for Profile {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let shapes: Vec<Shape> = text.split(':').map(str::parse).collect::<Result<_>>()?;
        match shapes[..] {
            [shape] => Ok(Self::bucket(shape)),
            [min, opt, max] => Self::new(min, opt, max),
            _ => Err(invalid(format!("\"{text}\" is neither MIN:OPT:MAX, e.g. 1x1:8x128:32x512, nor one shape"))),
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}x{}", self.batch, self.seq)
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_bucket() { self.max.fmt(out) } else { write!(out, "{}:{}:{}", self.min, self.opt, self.max) }
    }
}

impl TryFrom<String> for Shape {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl TryFrom<String> for Profile {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Shape> for String {
    fn from(shape: Shape) -> Self {
        shape.to_string()
    }
}

impl From<Profile> for String {
    fn from(profile: Profile) -> Self {
        profile.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shape() -> impl Strategy<Value = Shape> {
        (1..=i32::MAX as u32, 1..=i32::MAX as u32).prop_map(|(batch, seq)| Shape { batch, seq })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(a in shape(), b in shape(), c in shape()) {
            prop_assert_eq!(a.to_string().parse::<Shape>().unwrap(), a);
            let (mut batches, mut seqs) = ([a.batch, b.batch, c.batch], [a.seq, b.seq, c.seq]);
            batches.sort_unstable();
            seqs.sort_unstable();
            let [min, opt, max] = [0, 1, 2].map(|i| Shape { batch: batches[i], seq: seqs[i] });
            let profile = Profile::new(min, opt, max).unwrap();
            prop_assert_eq!(profile.to_string().parse::<Profile>().unwrap(), profile);
            prop_assert_eq!(serde_json::from_str::<Profile>(&serde_json::to_string(&profile).unwrap()).unwrap(), profile);
        }

        #[test]
        fn any_text_gives_a_profile_that_grows_or_an_error(text in "[0-9x:+ -]{0,24}") {
            if let Ok(profile) = text.parse::<Profile>() {
                prop_assert!(profile.opt().holds(profile.min()) && profile.max().holds(profile.opt()));
                prop_assert!(profile.min().batch > 0 && profile.min().seq > 0);
            }
        }
    }

    #[test]
    fn refusals_name_the_value() {
        for (text, part) in [
            ("0x16", "batch 0"),
            ("1x0", "length 0"),
            ("1x99999999999", "99999999999"),
            ("4294967295x1", "batch 4294967295"),
            ("16", "BATCHxLENGTH"),
            ("1x+2", "BATCHxLENGTH"),
            ("1x2x3", "BATCHxLENGTH"),
            ("", "BATCHxLENGTH"),
            ("1x1:2x2", "MIN:OPT:MAX"),
            ("2x8:1x16:4x32", "MIN <= OPT <= MAX"),
            ("1x8:1x64:4x32", "MIN <= OPT <= MAX"),
        ] {
            let message = text.parse::<Profile>().unwrap_err().to_string();
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    #[test]
    fn rows_beyond_the_positions_are_refused() {
        let profile: Profile = "1x1:1x128:8x512".parse().unwrap();
        assert!(profile.check(512).is_ok());
        let message = profile.check(511).unwrap_err().to_string();
        assert!(message.contains("512") && message.contains("511"), "{message}");
    }

    #[test]
    fn default_profiles_are_clipped_to_the_longest_text() {
        let written = |max_tokens| default_profiles(max_tokens).iter().map(Profile::to_string).collect::<Vec<_>>();
        assert_eq!(written(384), ["1x32", "1x128", "1x384", "64x32", "32x128", "8x384"]);
        assert_eq!(written(128), ["1x32", "1x128", "64x32", "32x128"]);
        assert_eq!(written(64), ["1x32", "1x64", "64x32", "32x64"]);
        assert_eq!(written(24), ["1x24", "64x24"]);
        for max_tokens in [0, 1, 31, 33, 512, usize::MAX] {
            for profile in default_profiles(max_tokens) {
                assert!(profile.check(max_tokens.max(1)).is_ok(), "{profile}");
                assert_eq!(profile.to_string().parse::<Profile>().unwrap(), profile);
            }
        }
    }
}

//! How vectors are written in OpenAI's answers: `encoding_format`.

use super::failure::Failure;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Serialize, Serializer};

/// A known `encoding_format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    /// A list of numbers.
    Float,
    /// The 32-bit floats, lowest byte first, in base64.
    Base64,
    /// One bit a value (1 above 0), eight to a signed byte, less 128, as `quantize_embeddings(precision="binary")` of sentence-transformers.
    Binary,
    /// As [`Encoding::Binary`] in unsigned bytes.
    Ubinary,
    /// A signed byte a value, by the ranges of calibration texts, as `quantize_embeddings(precision="int8")` of sentence-transformers.
    Int8,
    /// As [`Encoding::Int8`] in unsigned bytes.
    Uint8,
}

/// The least and the largest value of each place of a vector, over calibration texts.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Ranges(Vec<(f32, f32)>);

impl Ranges {
    /// Of `vectors`, which are of one length; None of none.
    pub fn of<'a>(mut vectors: impl Iterator<Item = &'a [f32]>) -> Option<Self> {
        let mut ranges: Vec<(f32, f32)> = vectors.next()?.iter().map(|&value| (value, value)).collect();
        for vector in vectors {
            for ((least, largest), &value) in ranges.iter_mut().zip(vector) {
                (*least, *largest) = (least.min(value), largest.max(value));
            }
        }
        Some(Self(ranges))
    }

    /// 255 steps from the least value (0) to the largest, cut towards `zero`: numpy's conversion to an integer drops the fraction. What lies outside is
    /// taken for the end that it is beyond, where numpy's wraps around.
    fn steps<'a>(&'a self, vector: &'a [f32], zero: f32) -> impl Iterator<Item = f32> + 'a {
        self.0.iter().zip(vector).map(move |(&(least, largest), &value)| {
            let step = (largest - least) / 255.0;
            // A place that never varied.
            let steps = if step > 0.0 { (value - least) / step } else { 0.0 };
            (steps.clamp(0.0, 255.0) - zero).trunc()
        })
    }
}

/// A vector as it is written.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Encoded {
    Float(Vec<f32>),
    Base64(String),
    Signed(Vec<i8>),
    Unsigned(Vec<u8>),
}

impl Encoding {
    /// All of them, by name.
    pub const ALL: [(&str, Self); 6] = [
        ("float", Self::Float),
        ("base64", Self::Base64),
        ("int8", Self::Int8),
        ("uint8", Self::Uint8),
        ("binary", Self::Binary),
        ("ubinary", Self::Ubinary),
    ];

    /// By its name.
    ///
    /// # Errors
    /// Names that are not known.
    pub fn by_name(name: &str) -> Result<Self, Failure> {
        let found = Self::ALL.into_iter().find(|(known, _)| *known == name);
        found.map(|(_, encoding)| encoding).ok_or_else(|| {
            Failure::validation(
                "encoding_format",
                format!("`{name}` is not supported; float, base64, int8, uint8, binary and ubinary are"),
            )
        })
    }

    /// Whether [`Encoding::encode`] needs the model's ranges.
    pub fn needs_ranges(self) -> bool {
        matches!(self, Self::Int8 | Self::Uint8)
    }

    /// `vector` so; `ranges` are of as many values.
    pub fn encode(self, vector: Vec<f32>, ranges: &Ranges) -> Encoded {
        match self {
            Self::Int8 => Encoded::Signed(ranges.steps(&vector, 128.0).map(|step| step as i8).collect()),
            Self::Uint8 => Encoded::Unsigned(ranges.steps(&vector, 0.0).map(|step| step as u8).collect()),
            Self::Float => Encoded::Float(vector),
            Self::Base64 => {
                let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
                Encoded::Base64(STANDARD.encode(bytes))
            }
            Self::Binary => Encoded::Signed(packed(&vector).map(|byte| (i16::from(byte) - 128) as i8).collect()),
            Self::Ubinary => Encoded::Unsigned(packed(&vector).collect()),
        }
    }
}

/// Eight values to a byte, the first in the highest bit; what is missing of the last byte is 0 (`numpy.packbits`).
fn packed(vector: &[f32]) -> impl Iterator<Item = u8> + '_ {
    let bit = |(place, &value): (usize, &f32)| u8::from(value > 0.0) << (7 - place);
    vector.chunks(8).map(move |values| values.iter().enumerate().map(bit).sum())
}

impl Serialize for Encoded {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Float(values) => values.serialize(serializer),
            Self::Base64(text) => text.serialize(serializer),
            Self::Signed(values) => values.serialize(serializer),
            Self::Unsigned(values) => values.serialize(serializer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_calibrated_ranges() {
        // numpy, with ranges = [[-1, 0, 0.5], [1, 2, 0.5]]: the last place never varied, and is 0 steps here where numpy divides by zero.
        // ((v - starts) / steps).astype(uint8) = [63, 254], (… - 128).astype(int8) = [-64, 126] for v = [-0.5, 2], all in 32 bits.
        let calibration = [[-1.0, 0.0, 0.5], [0.25, 2.0, 0.5], [1.0, 1.0, 0.5]];
        let ranges = Ranges::of(calibration.iter().map(<[f32; 3]>::as_slice)).unwrap();
        assert_eq!(ranges, Ranges(vec![(-1.0, 1.0), (0.0, 2.0), (0.5, 0.5)]));
        assert_eq!(Encoding::Uint8.encode(vec![-0.5, 2.0, 0.5], &ranges), Encoded::Unsigned(vec![63, 254, 0]));
        assert_eq!(Encoding::Int8.encode(vec![-0.5, 2.0, 0.5], &ranges), Encoded::Signed(vec![-64, 126, -128]));
        // Beyond the ranges.
        assert_eq!(Encoding::Uint8.encode(vec![-9.0, 9.0, 9.0], &ranges), Encoded::Unsigned(vec![0, 255, 0]));
        assert_eq!(Encoding::Int8.encode(vec![-9.0, 9.0, 9.0], &ranges), Encoded::Signed(vec![-128, 127, -128]));
        assert_eq!(Ranges::of(std::iter::empty()), None);
    }

    #[test]
    fn encodings_of_known_vectors() {
        let none = &Ranges::default();
        // numpy: packbits([1,0,1,0,0,0,0,1, 1]) = [161, 128]; less 128: [33, 0].
        let vector = vec![0.5, -0.5, 1.0, 0.0, -1.0, -0.0, -2.0, 3.0, 0.1];
        assert_eq!(Encoding::Ubinary.encode(vector.clone(), none), Encoded::Unsigned(vec![161, 128]));
        assert_eq!(Encoding::Binary.encode(vector.clone(), none), Encoded::Signed(vec![33, 0]));
        assert_eq!(Encoding::Binary.encode(vec![-1.0; 8], none), Encoded::Signed(vec![-128]));
        // python: base64.b64encode(struct.pack("<2f", 1.0, -2.0))
        assert_eq!(Encoding::Base64.encode(vec![1.0, -2.0], none), Encoded::Base64("AACAPwAAAMA=".into()));
        assert_eq!(Encoding::Float.encode(vector.clone(), none), Encoded::Float(vector));
    }
}

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
    /// By its name.
    ///
    /// # Errors
    /// Names that are not known, and those that need ranges of values, which would differ from request to request.
    pub fn by_name(name: &str) -> Result<Self, Failure> {
        match name {
            "float" => Ok(Self::Float),
            "base64" => Ok(Self::Base64),
            "binary" => Ok(Self::Binary),
            "ubinary" => Ok(Self::Ubinary),
            "int8" | "uint8" => Err(Failure::validation(
                "encoding_format",
                format!(
                    "`{name}` needs calibrated ranges of the values, which this server cannot take yet; ask for float, base64, binary or ubinary"
                ),
            )),
            _ => Err(Failure::validation(
                "encoding_format",
                format!("`{name}` is not supported; float, base64, binary and ubinary are"),
            )),
        }
    }

    pub fn encode(self, vector: Vec<f32>) -> Encoded {
        match self {
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
    fn encodings_of_known_vectors() {
        // numpy: packbits([1,0,1,0,0,0,0,1, 1]) = [161, 128]; less 128: [33, 0].
        let vector = vec![0.5, -0.5, 1.0, 0.0, -1.0, -0.0, -2.0, 3.0, 0.1];
        assert_eq!(Encoding::Ubinary.encode(vector.clone()), Encoded::Unsigned(vec![161, 128]));
        assert_eq!(Encoding::Binary.encode(vector.clone()), Encoded::Signed(vec![33, 0]));
        assert_eq!(Encoding::Binary.encode(vec![-1.0; 8]), Encoded::Signed(vec![-128]));
        // python: base64.b64encode(struct.pack("<2f", 1.0, -2.0))
        assert_eq!(Encoding::Base64.encode(vec![1.0, -2.0]), Encoded::Base64("AACAPwAAAMA=".into()));
        assert_eq!(Encoding::Float.encode(vector.clone()), Encoded::Float(vector));
    }
}

//! How two vectors are compared: the functions that a model can name in `config_sentence_transformers.json`.

/// A measure of likeness; larger is more alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Similarity {
    /// The cosine of the angle between the vectors: 1 the same direction, 0 unrelated (and for a vector of zeros).
    #[default]
    Cosine,
    /// The dot product.
    Dot,
    /// The negative Euclidean distance.
    Euclidean,
    /// The negative Manhattan distance.
    Manhattan,
}

impl Similarity {
    /// Every function.
    pub const ALL: [Self; 4] = [Self::Cosine, Self::Dot, Self::Euclidean, Self::Manhattan];

    /// The name that sentence-transformers gives it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cosine => "cosine",
            Self::Dot => "dot",
            Self::Euclidean => "euclidean",
            Self::Manhattan => "manhattan",
        }
    }

    /// By [`Similarity::name`].
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|function| function.name() == name)
    }

    /// How alike `a` and `b` are, vectors of the same length. Sums are kept in f64.
    pub fn score(self, a: &[f32], b: &[f32]) -> f32 {
        let sum = |term: fn(f64, f64) -> f64| a.iter().zip(b).map(|(&x, &y)| term(x.into(), y.into())).sum::<f64>();
        let score = match self {
            Self::Cosine => {
                let norms = (sum(|x, _| x * x) * sum(|_, y| y * y)).sqrt();
                if norms > 0.0 { sum(|x, y| x * y) / norms } else { 0.0 }
            }
            Self::Dot => sum(|x, y| x * y),
            Self::Euclidean => -sum(|x, y| (x - y) * (x - y)).sqrt(),
            Self::Manhattan => -sum(|x, y| (x - y).abs()),
        };
        score as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_of_known_vectors() {
        for (function, a, b, score) in [
            (Similarity::Cosine, [3.0, 0.0], [0.5, 0.0], 1.0),
            (Similarity::Cosine, [1.0, 0.0], [0.0, 2.0], 0.0),
            (Similarity::Cosine, [1.0, 1.0], [-2.0, -2.0], -1.0),
            (Similarity::Cosine, [0.0, 0.0], [1.0, 2.0], 0.0),
            (Similarity::Dot, [1.0, 2.0], [3.0, -4.0], -5.0),
            (Similarity::Euclidean, [1.0, 2.0], [4.0, 6.0], -5.0),
            (Similarity::Manhattan, [1.0, 2.0], [4.0, 6.0], -7.0),
        ] {
            assert_eq!(function.score(&a, &b), score, "{function:?} of {a:?} and {b:?}");
        }
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for function in Similarity::ALL {
            assert_eq!(Similarity::by_name(function.name()), Some(function));
        }
        assert_eq!(Similarity::by_name("maxsim"), None);
    }
}

//! Parity on the CPU: a fake executor with a known error in one place.

use super::*;
use crate::executor::Limits;
use crate::tokens::TokenizerSettings;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Mutex;

const DIM: usize = 8;
const PADDING: Padding = Padding { id: 1, vocab_size: 216 };
/// Two buckets, a wide profile and one that holds no text.
const PROFILES: [([usize; 2], [usize; 2]); 4] = [([1, 16], [1, 16]), ([32, 12], [32, 12]), ([2, 1], [4, 40]), ([1, 1], [8, 1])];

/// Vectors that follow from a row's ids and from nothing else.
fn encode(batch: &TokenBatch, out: &mut [f32]) {
    for (row, vector) in out.chunks_exact_mut(DIM).enumerate() {
        vector.fill(0.0);
        for (place, &id) in batch.row(row).iter().enumerate() {
            vector[place % DIM] += ((id * 37 + 11) % 101) as f32;
        }
    }
}

struct Exact;

impl Backend for Exact {
    fn name(&self) -> &'static str {
        "exact"
    }
    fn encode(&self, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
        encode(batch, out);
        Ok(())
    }
    fn hidden(&self, _: &TokenBatch, _: &mut [f32]) -> Result<()> {
        Ok(())
    }
    fn limits(&self) -> Limits {
        Limits { max_batch: 8, max_seq: 40, batch_tokens: 100, parallelism: 4 }
    }
}

/// Exact, but for what `spoil` does to a row of `tokens` tokens in a profile; keeps the shapes it saw.
struct Fake<F: Fn(usize, usize, &mut [f32])> {
    spoil: F,
    seen: Mutex<Vec<(usize, usize, Vec<u32>)>>,
}

impl<F: Fn(usize, usize, &mut [f32])> ByProfile for Fake<F> {
    fn profiles(&self) -> Vec<([usize; 2], [usize; 2])> {
        PROFILES.to_vec()
    }
    fn encode_with(&self, profile: usize, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
        assert_eq!(out.len(), batch.batch() * DIM);
        assert!(batch.batch() <= PROFILES[profile].1[0] && batch.longest() <= PROFILES[profile].1[1]);
        encode(batch, out);
        for (vector, length) in out.chunks_exact_mut(DIM).zip(batch.lengths()) {
            (self.spoil)(profile, length as usize, vector);
        }
        self.seen.lock().unwrap().push((profile, batch.longest(), batch.lengths().collect()));
        Ok(())
    }
}

fn fake<F: Fn(usize, usize, &mut [f32])>(spoil: F) -> Fake<F> {
    Fake { spoil, seen: Mutex::default() }
}

fn tokenizer(longest: usize) -> Tokenizer {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mpnet/tokenizer.json");
    Tokenizer::from_bytes(&std::fs::read(path).unwrap(), TokenizerSettings::new(longest, PADDING.id, PADDING.vocab_size)).unwrap()
}

fn reference(longest: usize) -> Reference {
    Reference::run(&Exact, rows_of_all_lengths(&tokenizer(longest)).unwrap(), DIM, PADDING).unwrap()
}

#[test]
fn the_texts_have_all_lengths_and_are_the_same_every_time() {
    let rows = rows_of_all_lengths(&tokenizer(190)).unwrap();
    let lengths: BTreeSet<usize> = rows.iter().map(Vec::len).collect();
    // Two special tokens are in every text.
    assert!((2..=16).all(|length| lengths.contains(&length)), "{lengths:?}");
    assert_eq!(lengths.last(), Some(&190));
    let steps = lengths.iter().zip(lengths.iter().skip(1)).map(|(a, b)| (*a, b - a));
    assert!(steps.clone().all(|(length, step)| step <= length / STEP + 4), "{lengths:?}");
    assert!((35..=60).contains(&rows.len()), "{}", rows.len());
    assert_eq!(rows, rows_of_all_lengths(&tokenizer(190)).unwrap());
    assert_eq!(rows.iter().collect::<BTreeSet<_>>().len(), rows.len());

    assert_eq!(rows_of_all_lengths(&tokenizer(2)).unwrap().len(), 1);
    assert!(rows_of_all_lengths(&tokenizer(24)).unwrap().iter().all(|row| row.len() <= 24));
}

#[test]
fn equal_vectors_agree_and_every_profile_is_filled_with_ragged_batches() {
    let (reference, fake) = (reference(60), fake(|_, _, _| ()));
    let agreement = reference.compare(&fake).unwrap();
    assert!((agreement.min_cosine - 1.0).abs() < 1e-12 && agreement.max_abs_difference == 0.0, "{agreement:?}");
    assert!(agreement.reaches(0.999_999) && agreement.not_finite == 0);
    // Texts of more than 40 tokens fit no profile.
    assert_eq!(agreement.texts, reference.rows.iter().filter(|row| row.len() <= 40).count());

    let seen = fake.seen.into_inner().unwrap();
    assert_eq!(seen.iter().map(|(_, _, lengths)| lengths.len()).sum::<usize>(), agreement.vectors);
    for (profile, (_, [most, longest])) in PROFILES.into_iter().enumerate().take(3) {
        let batches = || seen.iter().filter(|(of, _, _)| *of == profile);
        let lengths: BTreeSet<usize> = batches().flat_map(|(_, _, lengths)| lengths).map(|&length| length as usize).collect();
        let all: BTreeSet<usize> = reference.rows.iter().map(Vec::len).filter(|&length| length <= longest).collect();
        assert_eq!(lengths, all, "profile {profile}");
        let full = batches().filter(|(_, _, lengths)| lengths.len() == most).count();
        assert!(full > 0, "profile {profile}");
        if most > 1 {
            let ragged = |lengths: &Vec<u32>| {
                lengths.len() == most && lengths.iter().max() >= lengths.iter().min().map(|min| min + 4).as_ref()
            };
            assert_eq!(batches().filter(|(_, _, lengths)| ragged(lengths)).count(), full, "profile {profile}");
        }
        let alone = batches().filter(|(_, _, lengths)| lengths.len() == 1).count();
        assert_eq!(alone > 0, profile != 1, "texts run alone in a profile of one row, or of several shapes");
    }
    assert!(seen.iter().all(|(profile, _, _)| *profile != 3), "nothing fits the last");
}

#[test]
fn vectors_made_elsewhere_are_compared_as_they_are_and_their_prompt_is_left_out() {
    struct Skips(Mutex<Vec<u32>>);
    impl ByProfile for Skips {
        fn profiles(&self) -> Vec<([usize; 2], [usize; 2])> {
            PROFILES[..1].to_vec()
        }
        fn encode_with(&self, _: usize, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
            self.0.lock().unwrap().push(batch.skip());
            encode(batch, out);
            Ok(())
        }
    }
    let own = reference(16);
    let mut vectors = own.vectors.clone();
    // One vector is turned round.
    let last = vectors.len() - DIM;
    vectors[last..].iter_mut().for_each(|value| *value = -*value);
    let tokens = own.rows.last().unwrap().len();
    let given = Reference::given(own.rows, vectors, DIM, PADDING, 3);
    let executor = Skips(Mutex::default());
    let agreement = given.compare(&executor).unwrap();
    assert!((agreement.min_cosine + 1.0).abs() < 1e-12, "{agreement:?}");
    assert_eq!(agreement.worst, Place { profile: 0, tokens });
    assert!(executor.0.into_inner().unwrap().iter().all(|&skip| skip == 3));
}

#[test]
fn the_worst_length_and_profile_are_found() {
    let reference = reference(40);
    let agreement = reference
        .compare(&fake(|profile, tokens, vector| {
            // A little everywhere, more at one length of one profile.
            vector[0] += 0.01;
            if (profile, tokens) == (2, 13) {
                vector[1] += 20.0;
            }
        }))
        .unwrap();
    assert_eq!(agreement.worst, Place { profile: 2, tokens: 13 });
    assert!(!agreement.reaches(0.9999) && agreement.reaches(0.5), "{agreement:?}");
    assert!((agreement.max_abs_difference - 20.0).abs() < 1e-4, "{agreement:?}");
    assert!(agreement.verdict().contains(&format!("{:.7}", agreement.min_cosine)), "{}", agreement.verdict());
}

#[test]
fn vectors_that_are_not_finite_never_pass() {
    let reference = reference(40);
    for value in [f32::NAN, f32::INFINITY] {
        let agreement = reference
            .compare(&fake(|profile, tokens, vector| {
                if (profile, tokens) == (1, 7) {
                    vector[3] = value;
                }
            }))
            .unwrap();
        assert_eq!(agreement.worst, Place { profile: 1, tokens: 7 });
        assert!(agreement.not_finite > 0 && !agreement.reaches(-1.0), "{agreement:?}");
        assert!((agreement.min_cosine - 1.0).abs() < 1e-12, "of the finite ones");
        assert!(agreement.verdict().contains("not finite"), "{}", agreement.verdict());
    }
    assert!(!reference.compare(&fake(|_, _, _| ())).unwrap().reaches(f64::NAN));
}

#[test]
fn a_reference_that_is_not_finite_is_an_error() {
    struct Broken;
    impl Backend for Broken {
        fn name(&self) -> &'static str {
            "broken"
        }
        fn encode(&self, _: &TokenBatch, out: &mut [f32]) -> Result<()> {
            out.fill(f32::NAN);
            Ok(())
        }
        fn hidden(&self, _: &TokenBatch, _: &mut [f32]) -> Result<()> {
            Ok(())
        }
        fn limits(&self) -> Limits {
            Exact.limits()
        }
    }
    let error = Reference::run(&Broken, vec![vec![0, 5, 2]], DIM, PADDING).unwrap_err();
    assert!(matches!(error, Error::NotFinite { text: 0, .. }), "{error}");
}

#[test]
fn profiles_that_hold_no_text_prove_nothing() {
    struct Short;
    impl ByProfile for Short {
        fn profiles(&self) -> Vec<([usize; 2], [usize; 2])> {
            vec![([1, 1], [8, 1])]
        }
        fn encode_with(&self, _: usize, _: &TokenBatch, _: &mut [f32]) -> Result<()> {
            panic!("nothing fits")
        }
    }
    assert!(matches!(reference(40).compare(&Short), Err(Error::Setting { .. })));
}

#[test]
fn cosines_of_zeros() {
    assert_eq!(cosine(&[0.0, 0.0], &[0.0, 0.0]), 1.0);
    assert_eq!(cosine(&[0.0, 0.0], &[1.0, 0.0]), 0.0);
    assert!((cosine(&[3.0, 4.0], &[6.0, 8.0]) - 1.0).abs() < 1e-15);
}

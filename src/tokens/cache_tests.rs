//! Tokenizers that are kept: the ids are those of new ones, no damage is believed, and users of one process share them.

use super::*;
use crate::tokens::one_pass::Scratch;
use crate::tokens::{Tokenizer, TokenizerSettings};
use proptest::prelude::*;
use serde_json::{Map, Value};
use std::cell::Cell;
use std::sync::LazyLock;

const PLAIN: Choices = Choices { lower_case: false, add_special_tokens: true, position_padding: None };

const TEXTS: [&str; 8] = [
    "",
    "The cat sat on the mat, and the naïve café's owner ﬁnally left.",
    "中文 and 日本語 カ\u{3099} e\u{301}\u{308}",
    "a<s>b <mask>\t</s><unk> <pad>x",
    "\u{2581}the\u{2581}\u{2581}cat  two   spaces \u{a0}\r\n",
    "🦀👩‍👩‍👧\u{10fffd}\0\u{fffd}",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "don't we'll I'm 1234567890 ... !!?",
];

/// A folder with one tokenizer of the fixtures, and a cache.
struct Fixture {
    folder: tempfile::TempDir,
    cache: tempfile::TempDir,
    made: Cell<u32>,
}

impl Fixture {
    fn new(name: &str) -> Self {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers");
        let folder = tempfile::tempdir().unwrap();
        fs::copy(fixtures.join(format!("{name}.json")), folder.path().join("tokenizer.json")).unwrap();
        Self { folder, cache: tempfile::tempdir().unwrap(), made: Cell::new(0) }
    }

    fn files(&self) -> TokenizerFiles {
        let model = crate::model::TokenizerModel { model_type: "", tokenizer_class: Some("PreTrainedTokenizerFast") };
        TokenizerFiles::read(self.folder.path(), model, &Map::new()).unwrap()
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(self.folder.path().join("tokenizer.json")).unwrap()
    }

    fn key(&self) -> Key {
        key(&self.files(), &self.bytes(), PLAIN)
    }

    fn new_one(&self) -> Loaded {
        Loaded::new(assemble::from_files(&self.files(), &self.bytes()).unwrap(), PLAIN).unwrap()
    }

    fn cache(&self) -> Cache {
        Cache { folder: Some(self.cache.path().to_owned()), least_bytes: 0 }
    }

    fn get(&self) -> Loaded {
        let make = || {
            self.made.set(self.made.get() + 1);
            Ok(self.new_one())
        };
        self.cache().get_or_make(&self.key(), self.bytes().len(), make).unwrap()
    }

    fn file(&self) -> PathBuf {
        self.cache.path().join(format!("{}.tokenizer", hex(&self.key())))
    }

    fn kept_files(&self) -> usize {
        fs::read_dir(self.cache.path()).unwrap().count()
    }
}

/// All that a tokenizer gives.
fn answers(loaded: &Loaded) -> Vec<Vec<u32>> {
    let mut scratch = Scratch::new();
    let mut ids = |text: &&str| {
        let mut ids = Vec::new();
        loaded.append(text, usize::MAX, loaded.kept, &mut scratch, &mut ids).unwrap();
        ids
    };
    let mut special: Vec<u32> = loaded.special_ids.iter().copied().collect();
    special.sort_unstable();
    let frame = [loaded.before.clone(), loaded.after.clone(), special];
    TEXTS.iter().map(&mut ids).chain(frame).collect()
}

#[test]
fn a_kept_tokenizer_gives_the_ids_of_a_new_one() {
    for name in ["unigram", "bpe"] {
        let fixture = Fixture::new(name);
        let expected = answers(&fixture.new_one());
        assert!(expected.iter().flatten().count() > 100, "{name}: {expected:?}");
        for _ in 0..3 {
            let loaded = fixture.get();
            assert_eq!(answers(&loaded), expected, "{name}");
            assert_eq!(loaded.kept, fixture.new_one().kept);
        }
        assert_eq!((fixture.made.get(), fixture.kept_files()), (1, 1), "{name}");
    }
}

#[test]
fn what_the_library_is_needed_for_is_not_kept() {
    let fixture = Fixture::new("wordpiece");
    let expected = answers(&fixture.new_one());
    for _ in 0..2 {
        assert_eq!(answers(&fixture.get()), expected);
    }
    assert_eq!((fixture.made.get(), fixture.kept_files()), (2, 0));
}

#[test]
fn small_vocabularies_are_not_kept() {
    let fixture = Fixture::new("unigram");
    let cache = Cache { least_bytes: 100, ..fixture.cache() };
    for (bytes, kept) in [(99, 0), (100, 1)] {
        cache.get_or_make(&fixture.key(), bytes, || Ok(fixture.new_one())).unwrap();
        assert_eq!(fixture.kept_files(), kept);
    }
}

/// The file of each kind of tokenizer.
static WHOLE: LazyLock<Vec<(Key, Vec<u8>)>> = LazyLock::new(|| {
    let whole = |name| {
        let fixture = Fixture::new(name);
        fixture.get();
        (fixture.key(), fs::read(fixture.file()).unwrap())
    };
    ["unigram", "bpe"].map(whole).into()
});

#[test]
fn damaged_files_are_made_anew_and_replaced() {
    for name in ["unigram", "bpe"] {
        let fixture = Fixture::new(name);
        let expected = answers(&fixture.get());
        let whole = fs::read(fixture.file()).unwrap();
        let flipped = |at: usize| {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            bytes
        };
        let half = whole.len() / 2;
        let last = whole.len() - 1;
        let damages = [
            vec![],
            whole[..HEADER - 1].to_vec(),
            whole[..half].to_vec(),
            whole[..last].to_vec(),
            [&whole[..], b"x"].concat(),
            flipped(0), // the form
            flipped(7), // its version
            flipped(8), // the key
            flipped(HEADER - 1),
            flipped(HEADER),
            flipped(half),
            flipped(last),
        ];
        for (number, damaged) in damages.iter().enumerate() {
            fs::write(fixture.file(), damaged).unwrap();
            let made = fixture.made.get();
            assert_eq!(answers(&fixture.get()), expected, "{name}, damage {number}");
            assert_eq!(fixture.made.get(), made + 1, "{name}, damage {number} was believed");
            assert_eq!(fs::read(fixture.file()).unwrap().len(), whole.len(), "{name}, damage {number} was not replaced");
        }
    }
}

proptest! {
    #[test]
    fn no_damage_is_believed_nor_panics(which in 0..2_usize, place in any::<prop::sample::Index>(), bits in 1..=255_u8, cut: bool) {
        let (key, whole) = &WHOLE[which];
        let mut bytes = whole.clone();
        let place = place.index(bytes.len());
        if cut {
            bytes.truncate(place);
        } else {
            bytes[place] ^= bits;
        }
        prop_assert!(checked(&bytes, key).is_none());
        // Even what a right checksum vouches for is read without a panic.
        if let Some(rest) = bytes.get(HEADER..) {
            let read = Loaded::from_bytes(rest);
            prop_assert!(!cut || read.is_none());
        }
    }
}

#[test]
fn the_key_is_of_the_contents_and_of_what_is_made_of_them() {
    let (one, same, other) = (Fixture::new("unigram"), Fixture::new("unigram"), Fixture::new("bpe"));
    let (files, bytes) = (one.files(), one.bytes());
    let of = |choices: Choices| key(&files, &bytes, choices);
    let mut keys = vec![
        of(PLAIN),
        of(Choices { lower_case: true, ..PLAIN }),
        of(Choices { add_special_tokens: false, ..PLAIN }),
        of(Choices { position_padding: Some(1), ..PLAIN }),
        of(Choices { position_padding: Some(2), ..PLAIN }),
        other.key(),
    ];
    let mut longer = bytes.clone();
    longer.push(b' ');
    keys.push(key(&files, &longer, PLAIN));
    fs::write(one.folder.path().join("tokenizer_config.json"), r#"{"truncation_side": "left"}"#).unwrap();
    keys.push(one.key());
    let all = keys.len();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), all);
    assert_eq!(of(PLAIN), same.key(), "of another folder");
}

#[test]
fn users_of_one_process_share_a_tokenizer_until_the_last_one_goes() {
    for name in ["unigram", "bpe", "wordpiece"] {
        let (fixture, same) = (Fixture::new(name), Fixture::new(name));
        // A choice of this test's own: other tests' tokenizers would be shared as well.
        let choices = Choices { position_padding: Some(77), ..PLAIN };
        let first = fixture.cache().open(&fixture.files(), choices).unwrap();
        let second = same.cache().open(&same.files(), choices).unwrap();
        assert!(Arc::ptr_eq(&first, &second), "{name}");
        assert_eq!(same.kept_files(), 0, "{name}");
        let other = fixture.cache().open(&fixture.files(), Choices { position_padding: Some(78), ..PLAIN }).unwrap();
        assert!(!Arc::ptr_eq(&first, &other), "{name}");
        let weak = Arc::downgrade(&first);
        drop((first, second));
        assert!(weak.upgrade().is_none(), "{name}");
        let again = fixture.cache().open(&fixture.files(), choices).unwrap();
        assert_eq!(answers(&again), answers(&fixture.new_one()), "{name}");
    }
}

#[test]
fn tokenizers_share_what_their_settings_leave_the_same() {
    let fixture = Fixture::new("unigram");
    let settings =
        |max_tokens| TokenizerSettings { position_padding: Some(79), ..TokenizerSettings::new(max_tokens, 0, 1 << 20) };
    let open = |settings| Tokenizer::open(&fixture.files(), settings).unwrap();
    let one = open(settings(8));
    let other = open(TokenizerSettings { prompt: Some("the ".to_owned()), threads: Some(1), ..settings(64) });
    assert!(Arc::ptr_eq(&one.loaded, &other.loaded));
    let ids = |tokenizer: &Tokenizer| tokenizer.ids(&["cat cat cat cat cat cat cat cat cat cat cat cat"]).unwrap().remove(0);
    assert_eq!(ids(&one).len(), 8);
    assert!(ids(&other).len() > 8, "{:?}", ids(&other));
    assert!(!Arc::ptr_eq(&one.loaded, &open(TokenizerSettings { add_special_tokens: false, ..settings(8) }).loaded));
}

#[test]
fn a_cache_that_cannot_be_written_costs_only_time() {
    let fixture = Fixture::new("unigram");
    let blocked = fixture.cache.path().join("a-file");
    fs::write(&blocked, b"").unwrap();
    for folder in [Some(blocked.join("tokenizers")), Some(blocked), None] {
        let cache = Cache { folder, least_bytes: 0 };
        let loaded = cache.get_or_make(&fixture.key(), 1, || Ok(fixture.new_one())).unwrap();
        assert_eq!(answers(&loaded), answers(&fixture.new_one()));
    }
}

#[test]
fn what_cannot_be_made_is_an_error_each_time_and_not_kept() {
    let fixture = Fixture::new("unigram");
    let mut json: Value = serde_json::from_slice(&fixture.bytes()).unwrap();
    json["model"]["unk_id"] = Value::from(1 << 30);
    let path = fixture.folder.path().join("tokenizer.json");
    fs::write(&path, json.to_string()).unwrap();
    for _ in 0..2 {
        let error = fixture.cache().open(&fixture.files(), PLAIN).unwrap_err().to_string();
        assert_eq!(error.matches(&path.display().to_string()).count(), 1, "{error}");
    }
    assert_eq!(fixture.kept_files(), 0);
}

/// What the library makes of a file is kept in the form in which this version of it was tried: with another version, put it into `LIBRARY`.
#[test]
fn the_library_is_the_version_that_keys_name() {
    let lock = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock")).unwrap();
    let version = lock.split("name = \"tokenizers\"\nversion = \"").nth(1).and_then(|rest| rest.split('"').next());
    assert_eq!(version, Some(LIBRARY));
}

//! Tokenising beside the `tokenizers` crate, on one core: ids compared first, then times as ratios of one run.
//!
//! `cargo bench --bench tokens -- models/all-MiniLM-L6-v2/tokenizer.json [--texts 200000] [--write FILE] [--only KIND] [--rounds 9]`. Texts are made of the tokenizer's own words, of
//! characters of several scripts, of this crate's sources, of log lines and of all of Unicode, by a fixed seed. Those that are timed have as many tokens as
//! are kept, so that neither side gains by leaving out the rest. The library's caches of words are warm. `--write` puts the texts and the times into a JSON file,
//! from which benches/peers/tokens.py goes on. Opening from a cache folder is measured in processes of their own (`--opening FOLDER`), all at their first opening.

#[path = "../tests/common/random.rs"]
mod random;

use random::Random;
use serde_json::{Map, json};
use std::error::Error;
use std::hint::black_box;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use tokenizers::Tokenizer as Library;
use trt_embed::model::{TokenizerFiles, TokenizerModel};
use trt_embed::tokens::{Tokenizer, TokenizerSettings};

type Result<T = (), E = Box<dyn Error>> = std::result::Result<T, E>;

/// Rounds of each measurement, in turn; the median ratio counts.
const ROUNDS: usize = 9;
/// Texts of a round.
const TEXTS: usize = 200;
/// A limit that no text reaches: all of them is compared.
const ALL: usize = 1 << 30;

fn main() -> std::process::ExitCode {
    match run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run() -> Result {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let file = arguments.next().ok_or("the path of a tokenizer.json is expected")?;
    if file == "--opening" {
        return open_folder(Path::new(&arguments.next().ok_or("--opening: a folder is expected")?));
    }
    let mut count = 20_000;
    let (mut write, mut only, mut rounds) = (None, None, ROUNDS);
    while let Some(argument) = arguments.next() {
        match (argument.as_str(), arguments.next()) {
            ("--texts", Some(value)) => count = value.parse()?,
            ("--write", Some(value)) => write = Some(value),
            ("--only", Some(value)) => only = Some(value),
            ("--rounds", Some(value)) => rounds = value.parse::<usize>()?.max(1),
            (other, _) => return Err(format!("{other} is not known").into()),
        }
    }
    let json = std::fs::read(&file)?;
    let library = {
        let mut library = Library::from_bytes(&json).map_err(|error| error.to_string())?;
        library.with_truncation(None).map_err(|error| error.to_string())?;
        library.with_padding(None);
        library
    };
    let open = |limit| Tokenizer::from_bytes(&json, TokenizerSettings::new(limit, 0, ALL));
    let ours = open(ALL)?;
    let texts = Texts::new(&library)?;

    let mut random = Random(1);
    let mut ids = Vec::new();
    let mut tokens = 0;
    for number in 0..count {
        let text = texts.any(&mut random);
        ours.ids_into(&text, &mut ids)?;
        let expected = library.encode_fast(text.as_str(), true).map_err(|error| error.to_string())?;
        if ids != expected.get_ids() {
            return Err(format!("text {number} has other ids: {text:?}\n{ids:?}\n{:?}", expected.get_ids()).into());
        }
        tokens += ids.len();
    }
    println!("{count} texts of {tokens} tokens: identical ids\n");

    println!("| texts | tokens | trt-embed, us a text | tokenizers, us a text | times faster |\n|---|---|---|---|---|");
    type Make = fn(&Texts, &mut Random, usize) -> String;
    let kinds: [(&str, Make); 6] = [
        ("English", Texts::words),
        ("words of all languages", Texts::foreign),
        ("CJK", |_, random, words| Texts::script(random, words, &['\u{4e00}'..='\u{9fa5}'])),
        ("mixed scripts", Texts::mixed),
        ("code", Texts::code),
        ("log lines", |_, random, words| Texts::log(random, words)),
    ];
    let mut timed = Vec::new();
    for (name, make) in kinds.into_iter().filter(|(name, _)| only.as_deref().is_none_or(|only| only == *name)) {
        for wanted in [16, 128] {
            let mut random = Random(7);
            let batch: Vec<String> =
                (0..TEXTS).map(|_| of_length(&library, wanted, &make(&texts, &mut random, 2 * wanted))).collect::<Result<_>>()?;
            let mut limited = library.clone();
            let truncation = tokenizers::TruncationParams { max_length: wanted, ..Default::default() };
            limited.with_truncation(Some(truncation)).map_err(|error| error.to_string())?;
            let ours = open(wanted)?;
            let mut times = Vec::new();
            let mut tokens = 0;
            for _ in 0..rounds {
                let (mut own, mut other) = (Duration::ZERO, Duration::ZERO);
                // Of two passes of a side the second counts: the first finds the other side's memory in the processor's caches.
                for _ in 0..2 {
                    tokens = 0;
                    let start = Instant::now();
                    for text in &batch {
                        ours.ids_into(text, &mut ids)?;
                        tokens += black_box(&ids).len();
                    }
                    own = start.elapsed();
                }
                for _ in 0..2 {
                    let start = Instant::now();
                    for text in &batch {
                        black_box(limited.encode_fast(text.as_str(), true).map_err(|error| error.to_string())?);
                    }
                    other = start.elapsed();
                }
                times.push((own, other));
            }
            times.sort_by(|a, b| (a.1.as_secs_f64() / a.0.as_secs_f64()).total_cmp(&(b.1.as_secs_f64() / b.0.as_secs_f64())));
            let (own, other) = times[rounds / 2];
            let micros = |time: Duration| time.as_secs_f64() * 1e6 / TEXTS as f64;
            let ratio = other.as_secs_f64() / own.as_secs_f64();
            println!("| {name} | {} | {:.2} | {:.1} | {ratio:.1} |", tokens / TEXTS, micros(own), micros(other));
            timed.push(json!({"kind": name, "limit": wanted, "texts": batch, "own": micros(own), "library": micros(other)}));
        }
    }
    if let Some(file) = write {
        std::fs::write(file, serde_json::to_vec(&timed)?)?;
    }

    println!();
    let unbroken = "a".repeat(10 << 20);
    for limit in [512, ALL] {
        let ours = open(limit)?;
        let start = Instant::now();
        ours.ids_into(&unbroken, &mut ids)?;
        let time = start.elapsed().as_secs_f64() * 1e3;
        println!("10 MB without white space: {time:.1} ms for {} tokens", ids.len());
    }
    let start = Instant::now();
    open(512)?;
    let own = start.elapsed().as_secs_f64() * 1e3;
    let start = Instant::now();
    black_box(Library::from_bytes(&json).map_err(|error| error.to_string())?);
    println!("opening the tokenizer: {own:.1} ms, of which the library {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
    openings(&json)
}

/// Times processes that open the tokenizer with an empty cache folder, then with a filled one.
fn openings(json: &[u8]) -> Result {
    let (folder, cache) = (tempfile::tempdir()?, tempfile::tempdir()?);
    std::fs::write(folder.path().join("tokenizer.json"), json)?;
    let opened = || -> Result<[f64; 2]> {
        let mut command = Command::new(std::env::current_exe()?);
        let output = command.arg("--opening").arg(folder.path()).env("TRT_EMBED_CACHE", cache.path()).output()?;
        let times: Vec<f64> = serde_json::from_slice(&output.stdout)?;
        times.try_into().map_err(|times| format!("{times:?}: two times are expected").into())
    };
    let [cold, _] = opened()?;
    let mut warm = (0..ROUNDS).map(|_| opened()).collect::<Result<Vec<_>>>()?;
    warm.sort_by(|a, b| a[0].total_cmp(&b[0]));
    let [first, second] = warm[ROUNDS / 2];
    let bytes = |folder: &Path| -> Result<u64> {
        let Ok(files) = std::fs::read_dir(folder) else { return Ok(0) };
        files.map(|file| Ok(file?.metadata()?.len())).sum()
    };
    println!(
        "opening with a cache folder, by process: {cold:.1} ms while it is empty, {first:.1} ms after ({:.1} MB there), {second:.1} ms while another user has it",
        bytes(&cache.path().join("tokenizers"))? as f64 / 1e6
    );
    Ok(())
}

/// Prints how many milliseconds opening takes, and opening again beside it.
fn open_folder(folder: &Path) -> Result {
    let open = || -> Result<(Tokenizer, f64)> {
        let start = Instant::now();
        let model = TokenizerModel { model_type: "", tokenizer_class: Some("PreTrainedTokenizerFast") };
        let files = TokenizerFiles::read(folder, model, &Map::new())?;
        let tokenizer = Tokenizer::open(&files, TokenizerSettings::new(512, 0, ALL))?;
        Ok((tokenizer, start.elapsed().as_secs_f64() * 1e3))
    };
    let (_first, first) = open()?;
    let (_second, second) = open()?;
    println!("{}", json!([first, second]));
    Ok(())
}

/// The longest beginning of `text` of which all tokens are kept where `limit` are.
fn of_length(library: &Library, limit: usize, text: &str) -> Result<String> {
    let ends: Vec<usize> = text.char_indices().map(|(at, c)| at + c.len_utf8()).collect();
    let mut fits = 0;
    let (mut low, mut high) = (0, ends.len());
    while low < high {
        let middle = (low + high) / 2;
        let tokens = library.encode_fast(&text[..ends[middle]], true).map_err(|error| error.to_string())?.len();
        if tokens <= limit {
            fits = ends[middle];
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    Ok(text[..fits].to_owned())
}

/// A place below `count`, the first ones as often as the frequent words of a language: the n-th one in proportion to 1 / (n + 2.7) (Zipf, Mandelbrot).
fn by_zipf(random: &mut Random, count: usize) -> usize {
    let part = (random.next() >> 11) as f64 / (1_u64 << 53) as f64;
    let place = 2.7 * ((count as f64 + 2.7) / 2.7).powf(part) - 2.7;
    (place as usize).min(count - 1)
}

/// What texts are made of.
struct Texts {
    words: Vec<String>,
    foreign: Vec<String>,
    lines: Vec<String>,
}

impl Texts {
    fn new(library: &Library) -> Result<Self> {
        // Whole words of letters, which BPE and Unigram have behind a mark for the space before them.
        let vocabulary = library.get_vocab(false);
        let mark = ['\u{120}', '\u{2581}']
            .into_iter()
            .find(|&mark| vocabulary.keys().filter(|word| word.starts_with(mark)).count() > 999);
        let word = |word: String| match mark {
            Some(mark) => word.strip_prefix(mark).map(str::to_owned),
            None => Some(word),
        };
        // The frequent ones first, as training leaves them.
        let mut by_id: Vec<(u32, String)> = vocabulary.into_iter().map(|(word, id)| (id, word)).collect();
        by_id.sort_unstable();
        let all = by_id.into_iter().filter_map(|(_, token)| word(token)).filter(|word| word.chars().count() > 1);
        let (words, others): (Vec<String>, Vec<String>) =
            all.partition(|word| word.bytes().all(|byte| byte.is_ascii_lowercase()));
        let foreign = others.into_iter().filter(|word| !word.is_ascii() && word.chars().all(char::is_alphabetic)).collect();
        let mut lines = Vec::new();
        for file in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src/tokens"))? {
            lines.extend(std::fs::read_to_string(file?.path())?.lines().map(str::to_owned));
        }
        Ok(Self { words, foreign, lines })
    }

    /// Words beyond ASCII, as far as the tokenizer has some.
    fn foreign(&self, random: &mut Random, count: usize) -> String {
        let words = if self.foreign.len() < 100 { &self.words } else { &self.foreign };
        let word = |random: &mut Random| words[by_zipf(random, words.len())].as_str();
        (0..count).map(|_| word(random)).collect::<Vec<_>>().join(" ")
    }

    fn words(&self, random: &mut Random, count: usize) -> String {
        let mut text = String::new();
        for place in 0..count {
            let word = &self.words[by_zipf(random, self.words.len())];
            match random.below(12) {
                0 => text.push_str(&format!("{}{}", word[..1].to_uppercase(), &word[1..])),
                1 => text.push_str(&format!("{word}{}", ["s", "ing", "ly", "'s"][random.below(4)])),
                _ => text.push_str(word),
            }
            text.push_str(if place % 11 == 10 {
                ". "
            } else if place % 7 == 6 {
                ", "
            } else {
                " "
            });
        }
        text
    }

    fn script(random: &mut Random, chars: usize, ranges: &[std::ops::RangeInclusive<char>]) -> String {
        let mut text = String::new();
        for _ in 0..chars {
            let range = &ranges[random.below(ranges.len())];
            let span = *range.end() as usize - *range.start() as usize + 1;
            text.extend(char::from_u32((*range.start() as usize + random.below(span)) as u32));
            if random.below(6) == 0 {
                text.push(' ');
            }
        }
        text
    }

    fn mixed(&self, random: &mut Random, words: usize) -> String {
        let scripts = [
            '\u{c0}'..='\u{17f}',
            '\u{3b1}'..='\u{3c9}',
            '\u{410}'..='\u{44f}',
            '\u{5d0}'..='\u{5ea}',
            '\u{621}'..='\u{64a}',
            '\u{904}'..='\u{939}',
            '\u{3041}'..='\u{3096}',
            '\u{4e00}'..='\u{9fa5}',
            '\u{ac00}'..='\u{d7a3}',
            '\u{1f600}'..='\u{1f64f}',
        ];
        let mut text = String::new();
        for _ in 0..words / 4 + 1 {
            let script = &scripts[random.below(scripts.len())];
            text.push_str(&Self::script(random, 4, std::slice::from_ref(script)));
            text.push(' ');
            text.push_str(&self.words(random, 1));
        }
        text
    }

    fn code(&self, random: &mut Random, words: usize) -> String {
        let first = random.below(self.lines.len());
        let lines: Vec<&str> = (0..words / 6 + 1).map(|line| self.lines[(first + line) % self.lines.len()].as_str()).collect();
        lines.join("\n")
    }

    fn log(random: &mut Random, words: usize) -> String {
        let line = |random: &mut Random| {
            let (hour, minute, thread, millis) = (random.below(24), random.below(60), random.below(64), random.below(9000));
            let level = ["INFO", "WARN", "ERROR"][random.below(3)];
            format!(
                "2026-11-{:02}T{hour:02}:{minute:02}:07Z [{level}] worker-{thread}: GET /v1/embed?id={:x} took {millis} ms (cache=<none>)",
                1 + random.below(28),
                random.next()
            )
        };
        (0..words / 30 + 1).map(|_| line(random)).collect::<Vec<_>>().join("\n")
    }

    /// Any character there is, marks and controls among letters.
    fn unicode(random: &mut Random, chars: usize) -> String {
        let one = |random: &mut Random| match random.below(6) {
            0 => char::from_u32(random.below(0x110000) as u32).unwrap_or(' '),
            1 => char::from_u32(0x300 + random.below(0x70) as u32).unwrap_or(' '),
            2 => char::from_u32(random.below(0x3000) as u32).unwrap_or(' '),
            3 => [' ', '\t', '\n', '\u{0}', '\u{200d}', '\u{fffd}', '\u{a0}'][random.below(7)],
            _ => char::from(32 + random.below(95) as u8),
        };
        (0..chars).map(|_| one(random)).collect()
    }

    /// Added tokens within, in every spelling.
    fn with_tokens(&self, random: &mut Random) -> String {
        let mut text = String::new();
        for _ in 0..4 {
            text.push_str(&self.words(random, 2));
            text.push_str(
                ["[SEP]", "[MASK]", "[CLS", "[pad]", " [UNK] ", "<s>", "</s>", "<mask>", "< s>", "<unk>", "<UNK>"]
                    [random.below(11)],
            );
        }
        text
    }

    fn any(&self, random: &mut Random) -> String {
        let words = 1 + random.below(60);
        match random.below(9) {
            0 => self.words(random, words),
            8 => self.foreign(random, words),
            1 => Self::script(random, words, &['\u{4e00}'..='\u{9fa5}', '\u{3041}'..='\u{30ff}', '\u{ac00}'..='\u{d7a3}']),
            2 => self.mixed(random, words),
            3 => self.code(random, words),
            4 => Self::log(random, words),
            5 => self.with_tokens(random),
            _ => Self::unicode(random, words * 2),
        }
    }
}

//! `trt-embed similarity`: texts ranked by their likeness to a query.

use super::input::{Chunk, ChunkLimits, InputArgs, Texts};
use super::output;
use super::progress;
use super::settings::{self, ModelArgs, VectorArgs};
use super::skip;
use anyhow::{Result, anyhow};
use serde::Serialize;
use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::num::NonZeroUsize;

/// Ranks texts by their similarity to a query.
///
/// The score is the cosine of the two vectors (1 the same direction, 0 unrelated), or what the model names as its
/// similarity_fn_name: dot product, or negative Euclidean or Manhattan distance. Only the best matches are held in memory, so
/// that the input may have any size. `index` counts texts from 0; messages count texts and lines from 1.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The text that the others are compared with.
    #[arg(short, long, value_name = "TEXT")]
    query: String,
    #[command(flatten)]
    input: InputArgs,
    /// How many of the best matches are shown.
    #[arg(short = 'n', long, env = "TRT_EMBED_TOP", value_name = "N", default_value = "10")]
    top: NonZeroUsize,
    /// Prompt put before the query, by its name in the model folder; --prompt goes before the other texts only
    /// [default: as --prompt].
    #[arg(long, env = "TRT_EMBED_QUERY_PROMPT", value_name = "NAME")]
    query_prompt: Option<String>,
    #[command(flatten)]
    vector: VectorArgs,
    /// Prints one JSON object: {"query":…,"texts":N,"matches":[{"rank":1,"index":0,"score":0.83,"text":…}]}.
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  trt-embed similarity -m models/all-MiniLM-L6-v2 --query \"pets\" \"A cat sat.\" \"Stocks fell.\"
  trt-embed similarity -m models/all-MiniLM-L6-v2 --query \"pets\" -i lines.txt --top 5 --json";

/// How much of the input is held at once: see `embed`.
const CHUNK: ChunkLimits = ChunkLimits { texts: 4096, bytes: 1 << 20 };

/// One text and its score.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Match {
    /// The text's number, from 0.
    index: u64,
    score: f32,
    text: String,
}

impl Eq for Match {}

/// Better matches are greater: by score, among equals the earlier text.
impl Ord for Match {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.index.cmp(&self.index))
    }
}

impl PartialOrd for Match {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    let mut texts = Texts::open(&args.input)?;
    let bar = progress::texts(texts.size(), false);

    let embedder = settings::open(&args.model, Some(&args.vector))?;
    settings::say_backend(&args.model, &embedder);
    let query = match args.query_prompt.as_deref() {
        Some(name) => embedder.with_prompt_name(name)?.embed(&[&args.query]),
        None => embedder.embed(&[&args.query]),
    };
    let query = query.map_err(|error| match skip::is_about_texts(&error) {
        true => anyhow!("the query: {}", skip::reason_alone(&error)),
        false => error.into(),
    })?;
    settings::say_truncated(query.truncated as u64, 1, embedder.info().max_tokens);

    let similarity = embedder.info().similarity;
    let mut best: BinaryHeap<Reverse<Match>> = BinaryHeap::new();
    let (mut done, mut cut) = (0u64, 0u64);
    loop {
        let Chunk { texts: chunk, rows, .. } = texts.next_chunk(CHUNK)?;
        if chunk.is_empty() {
            break;
        }
        let placed = |error| skip::placed(error, &texts, &chunk, &rows, |texts| embedder.embed(texts).map(drop));
        let embeddings = embedder.embed(&chunk).map_err(placed)?;
        cut += embeddings.truncated as u64;
        done += chunk.len() as u64;
        for ((index, text), vector) in rows.into_iter().zip(chunk).zip(embeddings.rows()) {
            best.push(Reverse(Match { index, score: similarity.score(&query.values, vector), text }));
            if best.len() > args.top.get() {
                best.pop();
            }
        }
        bar.set_position(texts.bytes_read());
        bar.set_message(format!("{done} texts"));
    }
    bar.finish_and_clear();
    settings::say_truncated(cut, done, embedder.info().max_tokens);

    // `Reverse` sorts the best first.
    let matches: Vec<Match> = best.into_sorted_vec().into_iter().map(|Reverse(found)| found).collect();
    output::print(&if args.json { json(&args.query, done, &matches)? } else { table(&matches, output::terminal_width()) })
}

fn json(query: &str, texts: u64, matches: &[Match]) -> Result<String> {
    #[derive(Serialize)]
    struct Ranked<'a> {
        rank: usize,
        #[serde(flatten)]
        found: &'a Match,
    }
    #[derive(Serialize)]
    struct Report<'a> {
        query: &'a str,
        texts: u64,
        matches: Vec<Ranked<'a>>,
    }
    let matches = (1..).zip(matches).map(|(rank, found)| Ranked { rank, found }).collect();
    Ok(serde_json::to_string(&Report { query, texts, matches })? + "\n")
}

/// Rank, score, index (from 0) and text; a text that exceeds `width` is cut with an ellipsis.
fn table(matches: &[Match], width: Option<usize>) -> String {
    let digits = |n: u64| n.to_string().len();
    let rank_width = digits(matches.len() as u64).max("rank".len());
    let index_width = matches.iter().map(|found| digits(found.index)).max().unwrap_or(0).max("index".len());
    let mut lines = format!("{:>rank_width$}  {:>7}  {:>index_width$}  text\n", "rank", "score", "index");
    for (rank, found) in (1..).zip(matches) {
        let start = format!("{rank:>rank_width$}  {:>7.4}  {:>index_width$}  ", found.score, found.index);
        // Control characters would break the table, or the terminal.
        let text: String = found.text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let text = match width.map(|width| width.saturating_sub(start.len())) {
            Some(room) => console::truncate_str(&text, room.max(1), "…"),
            None => text.as_str().into(),
        };
        lines.push_str(&start);
        lines.push_str(&text);
        lines.push('\n');
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(index: u64, score: f32, text: &str) -> Match {
        Match { index, score, text: text.into() }
    }

    #[test]
    fn equal_scores_keep_input_order() {
        let mut matches = [found(2, 0.5, ""), found(0, 0.5, ""), found(1, 0.9, "")];
        matches.sort_by(|a, b| b.cmp(a));
        assert_eq!(matches.map(|found| found.index), [1, 0, 2]);
    }

    #[test]
    fn no_table_line_exceeds_the_terminal() {
        let matches = [
            found(0, 1.0, "短い文と長い文が混ざった、とても長い一行のテキスト"),
            found(12345, -0.25, "tab\tand\nnewline \u{1b}[31m"),
        ];
        for line in table(&matches, Some(40)).lines() {
            assert!(console::measure_text_width(line) <= 40, "{line}");
        }
        let whole = table(&matches, None);
        assert_eq!(whole.lines().count(), 3);
        assert!(whole.contains("tab and newline  [31m") && whole.contains("-0.2500") && !whole.contains('\u{1b}'));
    }
}

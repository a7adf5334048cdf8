//! Ranks sentences by their similarity to a query: `cargo run --release --example search -- models/all-MiniLM-L6-v2 "pets"`

use trt_embed::{Embedder, Normalize};

const SENTENCES: [&str; 5] = [
    "A cat sleeps on the sofa.",
    "The central bank raised interest rates.",
    "Our dog loves long walks.",
    "Rust programs need no garbage collector.",
    "It will rain in the mountains tomorrow.",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (model, query) = args.next().zip(args.next()).ok_or("usage: search MODEL QUERY")?;

    // Unit vectors: their dot product is the cosine. Models with prompts want `.prompt_name("query")` for the query.
    let embedder = Embedder::builder(model).normalize(Normalize::On).build()?;
    let query = embedder.embed(&[query])?;
    let sentences = embedder.embed(&SENTENCES)?;

    let mut ranked: Vec<(f32, &str)> =
        sentences.rows().map(|vector| vector.iter().zip(&query.values).map(|(a, b)| a * b).sum()).zip(SENTENCES).collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    for (score, sentence) in ranked {
        println!("{score:7.4}  {sentence}");
    }
    Ok(())
}

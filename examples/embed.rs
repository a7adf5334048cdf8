//! Texts to vectors: `cargo run --release --example embed -- models/all-MiniLM-L6-v2 "A sentence." "Another one."`

use trt_embed::Embedder;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let model = args.next().ok_or("usage: embed MODEL TEXT…")?;
    let texts: Vec<String> = args.collect();

    // A folder, or a hub id such as sentence-transformers/all-mpnet-base-v2.
    let embedder = Embedder::builder(model).build()?;
    let embeddings = embedder.embed(&texts)?;

    for ((text, vector), tokens) in texts.iter().zip(embeddings.rows()).zip(&embeddings.tokens) {
        let start: Vec<String> = vector.iter().take(4).map(|value| format!("{value:.4}")).collect();
        println!("{text:?}: {tokens} tokens, {} values: [{}, …]", vector.len(), start.join(", "));
    }
    Ok(())
}

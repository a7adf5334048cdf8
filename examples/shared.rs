//! One embedder for many threads, as in a server: `cargo run --release --example shared -- models/all-MiniLM-L6-v2`

use std::sync::Arc;
use std::thread;
use std::time::Instant;
use trt_embed::Embedder;

const THREADS: usize = 4;
const REQUESTS: usize = 25;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = std::env::args().nth(1).ok_or("usage: shared MODEL")?;

    // `embed` takes &self: an Arc is all that threads need to share it. The weights are in memory once.
    let embedder = Arc::new(Embedder::builder(model).build()?);
    let start = Instant::now();
    let workers: Vec<_> = (0..THREADS)
        .map(|worker| {
            let embedder = Arc::clone(&embedder);
            thread::spawn(move || -> trt_embed::Result<u32> {
                let mut tokens = 0;
                for request in 0..REQUESTS {
                    let text = format!("Request {request} of worker {worker}.");
                    tokens += embedder.embed(&[text])?.tokens.iter().sum::<u32>();
                }
                Ok(tokens)
            })
        })
        .collect();

    let mut tokens = 0;
    for worker in workers {
        tokens += worker.join().map_err(|_| "a worker panicked")??;
    }
    println!("{} texts, {tokens} tokens in {:.2?} from {THREADS} threads", THREADS * REQUESTS, start.elapsed());
    Ok(())
}

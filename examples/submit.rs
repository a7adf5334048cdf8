//! A question with a deadline beside a long job, on one embedder, as in a server that also indexes:
//! `cargo run --release --example submit -- models/all-MiniLM-L6-v2`

use std::time::{Duration, Instant};
use trt_embed::{Class, Embedder, SubmitSettings};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = std::env::args().nth(1).ok_or("usage: submit MODEL")?;
    let embedder = Embedder::builder(model).build()?;

    // Returns at once: the job's batches run on threads of the embedder.
    let documents: Vec<String> = (0..2000).map(|number| format!("Document {number} is about many things.")).collect();
    let job = embedder.submit(&documents, SubmitSettings::default().with_class(Class::Bulk))?;

    // The question goes before the job: it waits for a batch that runs.
    let deadline = Instant::now() + Duration::from_secs(2);
    let question = embedder.submit(&["What is it about?"], SubmitSettings::default().with_deadline(deadline))?;
    for result in question.wait() {
        match result {
            Ok(embedding) => println!("the question: {} tokens; the job is done: {}", embedding.tokens, job.is_done()),
            Err(error) => println!("the question: {error}"),
        }
    }

    // One result for each document. `job.cancel()` would give up those that have not begun; `job.await` works on any runtime.
    let (vectors, failures): (Vec<_>, Vec<_>) = job.wait().into_iter().partition(Result::is_ok);
    println!("the job: {} vectors, {} failures", vectors.len(), failures.len());
    Ok(())
}

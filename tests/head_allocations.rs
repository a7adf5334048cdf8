//! What follows the encoder, on a warm thread: counted in a file of its own, for the counting allocator is the process's.

#[path = "common/counting.rs"]
mod counting;

use counting::allocations;
use trt_embed::model::{Dense, DenseActivation, Residual};
use trt_embed::pooling::{Head, Pooling, PoolingMode, Scaling};

const HIDDEN: usize = 24;

/// Dense modules that first widen, then narrow the vector.
fn head() -> Head {
    let dense = |inputs: usize, outputs: usize| Dense {
        in_features: inputs,
        out_features: outputs,
        weight: (0..inputs * outputs).map(|i| (i as f32 * 0.7).sin()).collect(),
        bias: Some(vec![0.1; outputs]),
        activation: DenseActivation::Tanh,
        residual: Residual::None,
    };
    let pooling = Pooling::new([PoolingMode::Mean], true).unwrap();
    Head::new(pooling, vec![dense(HIDDEN, 40), dense(40, 8)], HIDDEN, None, Scaling::AfterCut).unwrap()
}

fn vectors(head: &Head, rows: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; rows * head.dim];
    apply(head, rows, &mut out);
    out
}

fn apply(head: &Head, rows: usize, out: &mut [f32]) {
    head.apply_to(rows, out, pool).unwrap();
}

fn pool(pooled: &mut [f32]) -> trt_embed::Result<()> {
    pooled.iter_mut().enumerate().for_each(|(i, x)| *x = (i as f32).cos());
    Ok(())
}

#[test]
fn a_warm_head_allocates_nothing_whatever_the_rows() {
    let head = head();
    let fresh = [9, 1, 4].map(|rows| std::thread::scope(|scope| scope.spawn(|| vectors(&head, rows)).join().unwrap()));
    vectors(&head, 9);
    for (rows, expected) in [9, 1, 4].into_iter().zip(&fresh) {
        let mut out = vec![f32::NAN; rows * head.dim];
        let before = allocations();
        apply(&head, rows, &mut out);
        assert_eq!(allocations() - before, 0, "{rows} rows");
        // What the thread kept of other calls does not show.
        assert_eq!(&out, expected, "{rows} rows");
    }
}

#[test]
fn a_head_may_run_within_another_s_pooling() {
    let head = head();
    let alone = vectors(&head, 3);
    let mut out = vec![f32::NAN; 3 * head.dim];
    let mut inner = 0;
    let within = |pooled: &mut [f32]| {
        inner = vectors(&head, 2).len();
        pool(pooled)
    };
    head.apply_to(3, &mut out, within).unwrap();
    assert_eq!((out, inner), (alone, 2 * head.dim));
}

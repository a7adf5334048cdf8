//! What runs on a GPU, whatever executor runs the encoder.

pub mod parity;

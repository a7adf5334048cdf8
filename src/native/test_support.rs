//! What tests of kernels share: random values, matrices on the device, and what is stored of a value.

use super::kernels::{Matrix, NativeKernels};
use super::shape::{Precision, Shape};
use crate::cuda::{Device, DeviceBuffer, DeviceValue, Stream};
use crate::native::NativeSettings;
use crate::native::arch::Arch;
use half::{bf16, f16};

/// SplitMix64 (Steele, Lea, Flood 2014).
pub(super) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Between -1 and 1.
    pub fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn values(&mut self, count: usize, scale: f32) -> Vec<f32> {
        (0..count).map(|_| self.value() * scale).collect()
    }
}

pub(super) fn device() -> Device {
    Device::open(0).unwrap()
}

pub(super) fn arch(device: &Device) -> Arch {
    Arch::of(device, std::env::var("TRT_EMBED_CUDA_ARCH").ok().as_deref()).unwrap()
}

pub(super) fn kernels(device: &Device, precision: Precision, activation: i32) -> NativeKernels {
    let shape = Shape { activation, ..Shape::as_bert(128, 2, 256, precision) };
    NativeKernels::load(device, &NativeSettings::default(), &arch(device), shape, false).unwrap()
}

/// What is stored of `value`.
pub(super) fn stored(precision: Precision, value: f32) -> f32 {
    match precision {
        Precision::Fp16 => f16::from_f32(value).to_f32(),
        Precision::Bf16 => bf16::from_f32(value).to_f32(),
        Precision::Fp32 => value,
    }
}

/// The bytes of it.
pub(super) fn stored_bytes(precision: Precision, value: f32) -> Vec<u8> {
    match precision {
        Precision::Fp16 => f16::from_f32(value).to_le_bytes().to_vec(),
        Precision::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        Precision::Fp32 => value.to_le_bytes().to_vec(),
    }
}

/// Half a unit of the last place of a stored 1.
pub(super) fn unit(precision: Precision) -> f64 {
    match precision {
        Precision::Fp16 => 2f64.powi(-11),
        Precision::Bf16 => 2f64.powi(-8),
        Precision::Fp32 => 2f64.powi(-24),
    }
}

/// Where value (row, column) stands, in values: the layout that prelude.cuh describes, written once more.
pub(super) fn place(precision: Precision, row: usize, column: usize, rows: usize, columns: usize) -> usize {
    if precision == Precision::Fp32 {
        return row * columns + column;
    }
    let (chunk, piece) = (column / 64, column % 64 / 8);
    (chunk * rows + row) * 64 + (piece ^ (row % 8)) * 8 + column % 8
}

/// `[rows, columns]`, row-major, as bytes of the layout with room for `capacity` rows; those behind are NaN.
pub(super) fn laid_out(precision: Precision, values: &[f32], capacity: usize, columns: usize) -> Vec<u8> {
    let bytes = precision.bytes();
    let mut out = vec![0xff_u8; capacity * columns * bytes];
    for (i, &value) in values.iter().enumerate() {
        let at = place(precision, i / columns, i % columns, capacity, columns) * bytes;
        out[at..at + bytes].copy_from_slice(&stored_bytes(precision, value));
    }
    out
}

pub(super) fn read_back(precision: Precision, bytes: &[u8], rows: usize, capacity: usize, columns: usize) -> Vec<f32> {
    let width = precision.bytes();
    let value = |row, column| {
        let at = place(precision, row, column, capacity, columns) * width;
        let raw = &bytes[at..at + width];
        match precision {
            Precision::Fp16 => f16::from_le_bytes(raw.try_into().unwrap()).to_f32(),
            Precision::Bf16 => bf16::from_le_bytes(raw.try_into().unwrap()).to_f32(),
            Precision::Fp32 => f32::from_le_bytes(raw.try_into().unwrap()),
        }
    };
    (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))).map(|(row, column)| value(row, column)).collect()
}

pub(super) fn upload<T: DeviceValue>(stream: &mut Stream, values: &[T]) -> DeviceBuffer<T> {
    let buffer = stream.device().alloc(values.len()).unwrap();
    stream.upload(values, &buffer).unwrap();
    buffer
}

pub(super) fn matrix(stream: &mut Stream, precision: Precision, values: &[f32], capacity: usize, columns: usize) -> Matrix {
    let values = upload(stream, &laid_out(precision, values, capacity, columns));
    Matrix { values, capacity, columns }
}

pub(super) fn download(stream: &mut Stream, precision: Precision, matrix: &Matrix, rows: usize) -> Vec<f32> {
    let mut bytes = vec![0; matrix.values.len()];
    stream.download(&matrix.values, &mut bytes).unwrap();
    read_back(precision, &bytes, rows, matrix.capacity, matrix.columns)
}

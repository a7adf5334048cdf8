//! NumPy files: the header of vectors that are written, and token ids that are read for `calibrate --npy`.

use npyz::{DType, NpyFile, Order, TypeChar, WriteOptions, WriterBuilder};
use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use trt_embed::Error;

/// What a file of float32 `[rows, dim]` begins with. Its length does not depend on `rows`.
///
/// # Errors
/// None that memory could cause.
pub fn header(rows: u64, dim: u64) -> std::io::Result<Vec<u8>> {
    let mut header = Vec::new();
    // Dropped without its values: they are written by others.
    drop(WriteOptions::<f32>::new().default_dtype().shape(&[rows, dim]).writer(&mut header).begin_nd()?);
    Ok(header)
}

/// The real ids of each row of `input_ids.npy`, by `attention_mask.npy` beside it; the first `most` rows.
///
/// Both hold int64 or int32 `[samples, seq]`, rows padded on the right.
///
/// # Errors
/// [`Error::Io`]; [`Error::CalibrationData`] for another type, rank or order, shapes that disagree, negative ids, mask values other
/// than 0 and 1, and rows that are padded elsewhere or hold padding alone.
pub fn read(folder: &Path, most: usize) -> Result<Vec<Vec<u32>>, Error> {
    let (ids_path, mask_path) = (folder.join("input_ids.npy"), folder.join("attention_mask.npy"));
    let ((rows, seq), ids) = integers(&ids_path, most)?;
    let (shape, mask) = integers(&mask_path, most)?;
    if shape != (rows, seq) {
        let reason = format!("its shape is [{}, {}], that of input_ids.npy [{rows}, {seq}]", shape.0, shape.1);
        return Err(Error::CalibrationData { path: mask_path, reason });
    }
    let rows = ids.chunks_exact(seq.max(1)).zip(mask.chunks_exact(seq.max(1))).enumerate();
    rows.map(|(row, (ids, mask))| {
        let fault = |reason: String| Err(Error::CalibrationData { path: mask_path.clone(), reason });
        if let Some(column) = mask.iter().position(|value| !(0..=1).contains(value)) {
            return fault(format!("[{row}, {column}] (from 0) is {}; 0 or 1 is expected", mask[column]));
        }
        let length = mask.iter().take_while(|value| **value == 1).count();
        if let Some(gap) = mask[length..].iter().position(|value| *value == 1) {
            return fault(format!(
                "[{row}, {length}] (from 0) is 0, before a 1 at [{row}, {}]; pad rows on the right",
                length + gap
            ));
        }
        if length == 0 {
            return fault(format!("row [{row}] (from 0) has no token"));
        }
        let id = |(column, &id): (usize, &i64)| {
            u32::try_from(id).map_err(|_| Error::CalibrationData {
                path: ids_path.clone(),
                reason: format!("[{row}, {column}] (from 0) is {id}, which is no token id"),
            })
        };
        ids[..length].iter().enumerate().map(id).collect()
    })
    .collect()
}

/// The shape `(rows, columns)`, and the values of the first `most` rows.
fn integers(path: &Path, most: usize) -> Result<((usize, usize), Vec<i64>), Error> {
    let fault = |reason: String| Error::CalibrationData { path: path.to_path_buf(), reason };
    let file = File::open(path).map_err(|source| Error::Io { action: "read", path: path.to_path_buf(), source })?;
    let npy = NpyFile::new(BufReader::new(file)).map_err(|error| fault(format!("not a NumPy file: {error}")))?;
    let &[rows, columns] = npy.shape() else {
        return Err(fault(format!("its shape is {:?}; [samples, seq] is expected", npy.shape())));
    };
    if npy.order() != Order::C {
        return Err(fault("it is stored column by column; save numpy.ascontiguousarray of it".into()));
    }
    let (rows, columns) = (rows as usize, columns as usize);
    let wanted = rows.min(most).saturating_mul(columns);
    let truncated = |error: std::io::Error| fault(format!("it ends before its {rows} rows do: {error}"));
    let dtype = npy.dtype();
    let size = match &dtype {
        DType::Plain(plain) if plain.type_char() == TypeChar::Int => plain.num_bytes(),
        _ => None,
    };
    let values: std::io::Result<Vec<i64>> = match size {
        Some(8) => npy.data::<i64>().map_err(|error| fault(error.to_string()))?.take(wanted).collect(),
        Some(4) => {
            npy.data::<i32>().map_err(|error| fault(error.to_string()))?.take(wanted).map(|value| value.map(i64::from)).collect()
        }
        _ => return Err(fault(format!("its type is {}; int64 or int32 is expected", dtype.descr()))),
    };
    let values = values.map_err(truncated)?;
    if values.len() != wanted {
        return Err(fault(format!("it holds {} values where its shape promises {wanted}", values.len())));
    }
    Ok(((rows, columns), values))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_as_long_for_any_number_of_rows() {
        for dim in [1, 8, 384, 65_536] {
            let first = header(0, dim).unwrap();
            assert!(first.len().is_multiple_of(64), "{}", first.len());
            for rows in [1, 10, 12_345_678, 1 << 40] {
                let header = header(rows, dim).unwrap();
                assert_eq!(header.len(), first.len());
                assert_eq!(NpyFile::new(&header[..]).unwrap().shape(), [rows, dim]);
            }
        }
    }
}

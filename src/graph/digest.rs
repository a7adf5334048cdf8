//! A graph's identity: one hash over its nodes and over its weights as they are stored.

use crate::digest::{PIECE_BYTES, hex, of_pieces};
use crate::graph::Graph;
use crate::graph::constant::{Constant, Values};
use prost::Message;
use sha2::{Digest, Sha256};

impl Graph {
    /// SHA-256 that tells graphs apart: it changes with every node, weight, factor and type, and is the same for every opening of
    /// the same files. Weights are hashed as stored, on all cores, without the conversions that writing them needs. The version of
    /// this crate has no part in it, so that a version that builds the same graph takes the same engine.
    pub fn digest(&self) -> [u8; 32] {
        let mut header = self.header.clone();
        header.producer_version.clear();
        let constants: Vec<(String, &[u8])> =
            self.constants.iter().map(|constant| (description(constant), stored_bytes(constant))).collect();
        let hashes = of_pieces(constants.iter().map(|(_, bytes)| *bytes));

        let mut whole = Sha256::new();
        // The length keeps neighbours apart: "ab" + "c" is not "a" + "bc".
        let mut part = |bytes: &[u8]| {
            whole.update((bytes.len() as u64).to_le_bytes());
            whole.update(bytes);
        };
        part(&header.encode_to_vec());
        let mut hashes = hashes.iter();
        for (description, bytes) in &constants {
            part(description.as_bytes());
            part(&(bytes.len() as u64).to_le_bytes());
            for hash in hashes.by_ref().take(bytes.chunks(PIECE_BYTES).len()) {
                part(hash);
            }
        }
        whole.finalize().into()
    }

    /// [`Graph::digest`] in hexadecimal.
    pub fn digest_hex(&self) -> String {
        hex(&self.digest())
    }
}

/// All of a constant but its bytes.
fn description(constant: &Constant) -> String {
    let (kind, stored, factor) = match &constant.values {
        Values::Stored { view, factor } => ("stored", view.dtype.to_string(), *factor),
        Values::Transposed { view, factor } => ("transposed", view.dtype.to_string(), *factor),
        // The factors count as bits of the description: there are few of them.
        Values::Columns { view, columns } => {
            let bits: String = columns.iter().map(|column| format!(".{:08x}", column.to_bits())).collect();
            ("columns", format!("{}{bits}", view.dtype), 1.0)
        }
        Values::Zeros => ("made", "zeros".into(), 1.0),
        Values::Floats(_) => ("made", "F32".into(), 1.0),
        Values::Ints(_) => ("made", "I64".into(), 1.0),
    };
    let Constant { name, dims, element, .. } = constant;
    format!("{kind} {stored} {:08x} {} {dims:?} {name}", factor.to_bits(), *element as i32)
}

fn stored_bytes(constant: &Constant) -> &[u8] {
    match &constant.values {
        Values::Stored { view, .. } | Values::Transposed { view, .. } | Values::Columns { view, .. } => view.bytes(),
        // In the machine's byte order: little-endian wherever there is a GPU.
        Values::Floats(values) => bytemuck::cast_slice(values),
        Values::Ints(values) => bytemuck::cast_slice(values),
        Values::Zeros => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Precision;
    use crate::model::ModelFolder;
    use safetensors::SafeTensors;
    use std::collections::BTreeSet;
    use std::path::Path;

    fn graph(folder: &Path, precision: Precision) -> Graph {
        let model = ModelFolder::open(folder).unwrap();
        Graph::new(&model.architecture().unwrap(), precision).unwrap()
    }

    fn fixture() -> &'static Path {
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/mpnet"))
    }

    /// The digest of the fixture after `change`.
    fn changed(change: impl FnOnce(&mut Graph)) -> String {
        let mut graph = graph(fixture(), Precision::Fp32);
        change(&mut graph);
        graph.digest_hex()
    }

    #[test]
    fn two_openings_are_equal_and_every_change_is_seen() {
        let same = changed(|_| ());
        assert_eq!(same.len(), 64);
        assert_eq!(changed(|_| ()), same);
        assert_eq!(changed(|graph| graph.header.producer_version = "99.0.0".into()), same, "of another version of this crate");

        let nodes = |graph: &mut Graph, change: fn(&mut crate::graph::onnx::NodeProto)| {
            change(&mut graph.header.graph.as_mut().unwrap().node[3]);
        };
        let digests = [
            same,
            graph(fixture(), Precision::Fp16).digest_hex(),
            changed(|graph| nodes(graph, |node| node.op_type = "Sub".into())),
            changed(|graph| nodes(graph, |node| node.input.swap(0, 1))),
            changed(|graph| graph.constants[0].name.push('x')),
            changed(|graph| graph.constants.swap(0, 1)),
            changed(|graph| graph.constants[0].dims.reverse()),
            changed(|graph| {
                let ints = graph.constants.iter_mut().find_map(|constant| match &mut constant.values {
                    Values::Ints(values) => Some(values),
                    _ => None,
                });
                ints.unwrap()[0] += 1;
            }),
            changed(|graph| {
                let factor = graph.constants.iter_mut().find_map(|constant| match &mut constant.values {
                    Values::Transposed { factor, .. } => Some(factor),
                    _ => None,
                });
                *factor.unwrap() *= 2.0;
            }),
        ];
        assert_eq!(digests.iter().collect::<BTreeSet<_>>().len(), digests.len(), "{digests:?}");
    }

    #[test]
    fn one_bit_of_a_weight_changes_it() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "tokenizer.json", "model.safetensors"] {
            std::fs::copy(fixture().join(name), folder.path().join(name)).unwrap();
        }
        let before = graph(folder.path(), Precision::Fp32).digest();
        assert_eq!(before, graph(fixture(), Precision::Fp32).digest(), "another place");

        let weights = folder.path().join("model.safetensors");
        let mut bytes = std::fs::read(&weights).unwrap();
        let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let tensors = metadata.tensors();
        let (_, table) = tensors.iter().find(|(name, _)| name.ends_with("word_embeddings.weight")).unwrap();
        // Data begins after the header and its length of 8 bytes.
        bytes[8 + header + table.data_offsets.1 - 1] ^= 1;
        std::fs::write(&weights, bytes).unwrap();
        assert_ne!(graph(folder.path(), Precision::Fp32).digest(), before);
    }
}

//! Writes a graph as ONNX, one constant at a time, so that writing needs little more memory than the largest tensor.

use crate::files::AtomicFile;
use crate::graph::constant::{Constant, Values};
use crate::graph::onnx::{GraphProto, ModelProto, StringStringEntryProto, TensorProto};
use crate::graph::{Graph, Precision};
use crate::model::ModelFolder;
use crate::{Error, Result};
use prost::Message;
use prost::bytes::Bytes;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Protobuf readers refuse larger messages; constants then go to a file of their own.
const PROTOBUF_LIMIT: u64 = i32::MAX as u64;
/// Page size, the alignment that ONNX asks of external data, so that readers can map it.
const EXTERNAL_ALIGNMENT: u64 = 4096;

const MODEL_GRAPH: u32 = 7;
const GRAPH_INITIALIZER: u32 = 5;
const TENSOR_RAW_DATA: u32 = 9;

/// The files that [`export_to_folder`] wrote.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Export {
    /// In the order written; `model.onnx` is the last.
    pub files: Vec<ExportedFile>,
}

/// One written file.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ExportedFile {
    /// Where.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
}

/// Configuration and tokenizer files that travel with `model.onnx`, where the model folder has them.
const COMPANIONS: [&str; 7] = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "merges.txt",
];

/// Exports `model` as `folder/model.onnx` with its configuration and tokenizer files beside it.
///
/// Creates `folder`. Models over protobuf's limit of 2 GiB keep their weights in `model.onnx.data`, as ONNX's external data.
///
/// # Errors
/// A weight that is missing, misshapen or too large for `precision`; a file that cannot be written.
pub fn export_to_folder(model: &ModelFolder, precision: Precision, folder: &Path) -> Result<Export> {
    Graph::new(&model.architecture()?, precision)?.export_to_folder(model, folder)
}

impl Graph {
    /// As [`export_to_folder`], for this graph of `model`.
    ///
    /// # Errors
    /// As [`Graph::encode`]; a file that cannot be written.
    pub fn export_to_folder(&self, model: &ModelFolder, folder: &Path) -> Result<Export> {
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let mut files = Vec::new();
        for name in COMPANIONS {
            let source = model.encoder.join(name);
            if source.is_file() {
                let contents = std::fs::read(&source).map_err(Error::io("read", source))?;
                let path = folder.join(name);
                let mut file = AtomicFile::create(&path)?;
                file.write_all(&contents).map_err(Error::io("write", &path))?;
                file.commit()?;
                files.push(ExportedFile { path, bytes: contents.len() as u64 });
            }
        }
        files.extend(self.write(&folder.join("model.onnx"))?);
        Ok(Export { files })
    }

    /// The model as protobuf bytes with every constant inside; `None` where protobuf's limit of 2 GiB does not allow that.
    ///
    /// # Errors
    /// [`Error::Onnx`] when a finite weight is too large for fp16; [`Error::FileChanged`] when a weight file was written to meanwhile.
    pub fn encode(&self) -> Result<Option<Vec<u8>>> {
        let size = self.inline_size();
        if size > PROTOBUF_LIMIT {
            return Ok(None);
        }
        let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
        self.write_inline(&mut bytes, Path::new("memory"))?;
        Ok(Some(bytes))
    }

    /// Writes the model to `path`, with its weights in `path` + `.data` where it is over protobuf's limit of 2 GiB.
    ///
    /// # Errors
    /// As [`Graph::encode`]; a file that cannot be written.
    pub fn write(&self, path: &Path) -> Result<Vec<ExportedFile>> {
        self.write_files(path, PROTOBUF_LIMIT)
    }

    /// Writes the model to `path`, and its large constants to `path` + `.data` when the whole is over `limit` bytes.
    fn write_files(&self, path: &Path, limit: u64) -> Result<Vec<ExportedFile>> {
        let mut files = Vec::new();
        let mut file = AtomicFile::create(path)?;
        let bytes = if self.inline_size() <= limit {
            self.write_inline(&mut file, path)?
        } else {
            let mut data_path = path.as_os_str().to_owned();
            data_path.push(".data");
            let data_path = PathBuf::from(data_path);
            let mut data = AtomicFile::create(&data_path)?;
            let bytes = self.write_external_data(&mut data, &data_path)?;
            data.commit()?;
            let location = data_path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            files.push(ExportedFile { path: data_path, bytes });
            let model = self.encode_with_external_data(&location)?;
            file.write_all(&model).map_err(Error::io("write", path))?;
            model.len() as u64
        };
        file.commit()?;
        files.push(ExportedFile { path: path.to_path_buf(), bytes });
        Ok(files)
    }

    /// Bytes of the model with every constant inside.
    fn inline_size(&self) -> u64 {
        let graph = self.inline_graph_size();
        let header = ModelProto { graph: None, ..self.header.clone() };
        header.encoded_len() as u64 + field_size(MODEL_GRAPH, graph)
    }

    fn inline_graph_size(&self) -> u64 {
        let header = self.header.graph.as_ref().map_or(0, Message::encoded_len) as u64;
        header + self.constants.iter().map(|constant| field_size(GRAPH_INITIALIZER, tensor_size(constant))).sum::<u64>()
    }

    /// Writes the fields by hand where protobuf wants a length before its contents: the lengths are known beforehand.
    fn write_inline(&self, out: &mut impl Write, path: &Path) -> Result<u64> {
        let mut header = self.header.clone();
        let graph: GraphProto = header.graph.take().unwrap_or_default();
        let mut buffer = header.encode_to_vec();
        write_field_header(MODEL_GRAPH, self.inline_graph_size(), &mut buffer);
        graph.encode(&mut buffer).map_err(too_large)?;
        let mut written = 0;
        for constant in &self.constants {
            write_field_header(GRAPH_INITIALIZER, tensor_size(constant), &mut buffer);
            tensor_header(constant).encode(&mut buffer).map_err(too_large)?;
            write_field_header(TENSOR_RAW_DATA, constant.size() as u64, &mut buffer);
            constant.write(&mut buffer)?;
            out.write_all(&buffer).map_err(Error::io("write", path))?;
            written += buffer.len() as u64;
            buffer.clear();
        }
        self.check_unchanged()?;
        Ok(written)
    }

    fn write_external_data(&self, out: &mut impl Write, path: &Path) -> Result<u64> {
        let (mut written, mut buffer) = (0, Vec::new());
        for (constant, offset) in self.external_constants() {
            buffer.clear();
            buffer.resize((offset - written) as usize, 0);
            constant.write(&mut buffer)?;
            out.write_all(&buffer).map_err(Error::io("write", path))?;
            written += buffer.len() as u64;
        }
        self.check_unchanged()?;
        Ok(written)
    }

    /// Appends to `out` the constant that [`Graph::encode_with_external_data`] places at `offset`.
    ///
    /// # Errors
    /// [`Error::Onnx`] when none lies there, or when a finite weight is too large for fp16.
    pub fn write_external_constant(&self, offset: u64, out: &mut Vec<u8>) -> Result<()> {
        match self.external_constants().find(|(_, at)| *at == offset) {
            Some((constant, _)) => constant.write(out),
            None => Err(Error::Onnx { reason: format!("no constant lies at offset {offset} of the graph's data") }),
        }
    }

    /// The constants that lie in the data file, with their offsets.
    fn external_constants(&self) -> impl Iterator<Item = (&Constant, u64)> {
        let mut end = 0u64;
        self.constants.iter().filter(|constant| is_external(constant)).map(move |constant| {
            let offset = end.next_multiple_of(EXTERNAL_ALIGNMENT);
            end = offset + constant.size() as u64;
            (constant, offset)
        })
    }

    /// The model as protobuf bytes; its float constants of any size lie in a data file called `location`.
    ///
    /// # Errors
    /// [`Error::Onnx`] when a finite weight is too large for fp16.
    pub fn encode_with_external_data(&self, location: &str) -> Result<Vec<u8>> {
        let mut model = self.header.clone();
        let mut offsets = self.external_constants().map(|(_, offset)| offset);
        let graph = model.graph.get_or_insert_default();
        for constant in &self.constants {
            let mut tensor = tensor_header(constant);
            if is_external(constant) {
                let entry = |key: &str, value: String| StringStringEntryProto { key: key.into(), value };
                tensor.data_location = Some(1);
                tensor.external_data = vec![
                    entry("location", location.to_string()),
                    entry("offset", offsets.next().unwrap_or_default().to_string()),
                    entry("length", constant.size().to_string()),
                ];
            } else {
                let mut raw = Vec::new();
                constant.write(&mut raw)?;
                tensor.raw_data = Bytes::from(raw);
            }
            graph.initializer.push(tensor);
        }
        Ok(model.encode_to_vec())
    }
}

/// Shapes, indices and scalars stay in the model: shape inference reads them.
fn is_external(constant: &Constant) -> bool {
    !matches!(constant.values, Values::Ints(_) | Values::Zeros) && !constant.dims.is_empty()
}

fn tensor_header(constant: &Constant) -> TensorProto {
    TensorProto {
        dims: constant.dims.iter().map(|&dim| dim as i64).collect(),
        data_type: constant.element as i32,
        name: constant.name.clone(),
        ..TensorProto::default()
    }
}

fn tensor_size(constant: &Constant) -> u64 {
    tensor_header(constant).encoded_len() as u64 + field_size(TENSOR_RAW_DATA, constant.size() as u64)
}

fn field_size(tag: u32, length: u64) -> u64 {
    key_len(tag) as u64 + encoded_len_varint(length) as u64 + length
}

fn write_field_header(tag: u32, length: u64, buffer: &mut Vec<u8>) {
    encode_key(tag, WireType::LengthDelimited, buffer);
    encode_varint(length, buffer);
}

fn too_large(error: prost::EncodeError) -> Error {
    Error::Onnx { reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::onnx::read_model;

    fn graph(precision: Precision) -> Graph {
        let model = ModelFolder::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/mpnet")).unwrap();
        Graph::new(&model.architecture().unwrap(), precision).unwrap()
    }

    #[test]
    fn the_written_file_is_what_was_announced_and_decodes_again() {
        for precision in [Precision::Fp32, Precision::Fp16] {
            let (graph, folder) = (graph(precision), tempfile::tempdir().unwrap());
            let path = folder.path().join("model.onnx");
            let files = graph.write_files(&path, PROTOBUF_LIMIT).unwrap();
            assert_eq!(files.len(), 1);
            assert_eq!(std::fs::metadata(&path).unwrap().len(), graph.inline_size());
            assert_eq!(files[0].bytes, graph.inline_size());
            assert!(graph.encode().unwrap().unwrap() == std::fs::read(&path).unwrap(), "memory and file differ");
            let model = read_model(&path).unwrap();
            let written = model.graph.as_ref().unwrap();
            assert_eq!(written.node, graph.header.graph.as_ref().unwrap().node);
            assert_eq!(written.initializer.len(), graph.constants.len());
            for (tensor, constant) in written.initializer.iter().zip(&graph.constants) {
                let mut expected = Vec::new();
                constant.write(&mut expected).unwrap();
                assert_eq!(tensor.name, constant.name);
                assert_eq!(tensor.raw_data, expected, "{}", constant.name);
                assert_eq!(expected.len(), constant.size(), "{}", constant.name);
            }
        }
    }

    #[test]
    fn models_over_the_limit_keep_their_weights_in_a_file_of_their_own() {
        let (graph, folder) = (graph(Precision::Fp32), tempfile::tempdir().unwrap());
        let path = folder.path().join("model.onnx");
        let files = graph.write_files(&path, graph.inline_size() - 1).unwrap();
        let data = std::fs::read(folder.path().join("model.onnx.data")).unwrap();
        assert_eq!(
            files.iter().map(|file| file.bytes).collect::<Vec<_>>(),
            [data.len() as u64, std::fs::metadata(&path).unwrap().len()]
        );
        let model = read_model(&path).unwrap();
        let mut external = 0;
        for (tensor, constant) in model.graph.unwrap().initializer.iter().zip(&graph.constants) {
            let mut expected = Vec::new();
            constant.write(&mut expected).unwrap();
            if tensor.data_location != Some(1) {
                assert_eq!(tensor.raw_data, expected, "{}", constant.name);
                continue;
            }
            let entry = |key: &str| tensor.external_data.iter().find(|entry| entry.key == key).unwrap().value.clone();
            assert_eq!(entry("location"), "model.onnx.data");
            let (offset, length) = (entry("offset").parse::<usize>().unwrap(), entry("length").parse::<usize>().unwrap());
            assert_eq!(offset as u64 % EXTERNAL_ALIGNMENT, 0);
            assert_eq!(data[offset..offset + length], expected, "{}", constant.name);
            external += 1;
        }
        assert!(external > 0);
    }

    #[test]
    fn weights_that_are_written_to_while_they_are_read_are_an_error_and_leave_no_file() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "tokenizer.json", "model.safetensors"] {
            let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mpnet").join(name);
            std::fs::copy(fixture, folder.path().join(name)).unwrap();
        }
        let model = ModelFolder::open(folder.path()).unwrap();
        let graph = || Graph::new(&model.architecture().unwrap(), Precision::Fp32).unwrap();
        let (first, second) = (graph(), graph());
        first.encode().unwrap();
        // As a write in place leaves it.
        let weights = std::fs::File::options().write(true).open(folder.path().join("model.safetensors")).unwrap();
        weights.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(5)).unwrap();
        assert!(matches!(first.encode(), Err(Error::FileChanged { .. })));
        let path = folder.path().join("model.onnx");
        for limit in [PROTOBUF_LIMIT, 1] {
            assert!(matches!(first.write_files(&path, limit), Err(Error::FileChanged { .. })));
        }
        let left = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(left, 3, "a file of the export is left");
        #[cfg(feature = "cpu")]
        {
            use crate::pooling::Head;
            let head = Head::of_model(&model).unwrap();
            let opened = crate::cpu::CpuBackend::from_graph(second, head, 16, 1).map(drop);
            assert!(matches!(opened, Err(Error::FileChanged { .. })), "{opened:?}");
        }
        #[cfg(not(feature = "cpu"))]
        drop(second);
        // Opened anew it is another file.
        graph().encode().unwrap();
    }

    #[test]
    fn a_constant_that_does_not_exist_is_an_error() {
        assert!(matches!(graph(Precision::Fp32).write_external_constant(1, &mut Vec::new()), Err(Error::Onnx { .. })));
    }
}

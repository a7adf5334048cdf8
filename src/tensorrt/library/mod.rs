//! Finds and loads TensorRT's libraries, and sees to it that they match the headers this crate was compiled with.

mod builder;
mod engine;
mod ffi;
mod layers;
mod products;
mod profile;
mod turn;

pub(super) use builder::check_int8;
pub use builder::{Arithmetic, BuildSettings, LayerDetails, Plan, PlanBuilder, build_plan, exit_during_build};
pub(super) use engine::misuse;
pub use engine::{Context, Direction, Element, Engine, IoTensor, ProfileRange, Runtime};
pub use layers::{Layer, LayerTensor};
pub use products::Products;
pub(super) use profile::check_longest;
pub use profile::{Profile, Shape, default_profiles};
pub(super) use turn::wait_for_turn;

use crate::{Error, Result};
use cxx::UniquePtr;
use ffi::bridge;
use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// A version of TensorRT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Libraries and headers must agree in it.
    pub major: u32,
    /// Features within a major version.
    pub minor: u32,
    /// Corrections.
    pub patch: u32,
}

/// The version of the headers that this crate was compiled with.
pub fn header_version() -> Version {
    bridge::header_version().into()
}

/// Where libraries are looked for, in this order: a folder, the system's loader, a Python virtual environment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SearchPath {
    /// `TENSORRT_LIB_DIR`.
    pub folder: Option<PathBuf>,
    /// Whether to ask the loader: `LD_LIBRARY_PATH`, then the system's folders.
    pub loader: bool,
    /// `VIRTUAL_ENV`, into which TensorRT's wheels are installed.
    pub virtual_env: Option<PathBuf>,
}

/// A loaded TensorRT. It stays loaded until the process ends.
pub struct Library {
    handle: UniquePtr<bridge::Library>,
    version: Version,
    path: PathBuf,
    search: SearchPath,
    /// Loaded by the first build.
    parser: Mutex<Option<Parser>>,
}

/// The loaded libnvonnxparser, from which each build makes a parser of its own.
pub(super) type Parser = Arc<UniquePtr<bridge::ParserLibrary>>;

impl Version {
    /// Whether a program compiled with `headers` may call this library.
    fn serves(self, headers: Self) -> bool {
        // The shim calls nothing that a major version's first release lacks, but for what 10.1 put in the place of 10.0's
        // functions for device memory.
        let too_old = self.major == 10 && self.minor == 0 && headers.minor > 0;
        self.major == headers.major && !too_old
    }
}

impl SearchPath {
    /// As `TENSORRT_LIB_DIR` and `VIRTUAL_ENV` say.
    pub fn from_env() -> Self {
        let folder = |variable| env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
        Self { folder: folder("TENSORRT_LIB_DIR"), loader: true, virtual_env: folder("VIRTUAL_ENV") }
    }

    /// Looks in `folder` alone.
    pub fn in_folder(folder: impl Into<PathBuf>) -> Self {
        Self { folder: Some(folder.into()), ..Self::default() }
    }

    /// Looks in the Python virtual environment at `root` alone.
    pub fn in_virtual_env(root: impl Into<PathBuf>) -> Self {
        Self { virtual_env: Some(root.into()), ..Self::default() }
    }

    /// The paths to try for `file`; a bare name is the loader's.
    fn candidates(&self, file: &str) -> Vec<PathBuf> {
        let mut paths = Vec::new();
        paths.extend(self.folder.as_ref().map(|folder| folder.join(file)));
        if self.loader {
            paths.push(file.into());
        }
        if let Some(root) = &self.virtual_env {
            // `tensorrt` in the wheels of 8.6, `tensorrt_libs` in those of 10 and 11.
            let folders: Vec<PathBuf> = entries(&root.join("lib"), "python")
                .into_iter()
                .flat_map(|python| entries(&python.join("site-packages"), "tensorrt"))
                .filter(|folder| folder.join(file).exists())
                .collect();
            if folders.is_empty() {
                paths.push(root.join("lib/python*/site-packages/tensorrt*").join(file));
            }
            paths.extend(folders.into_iter().map(|folder| folder.join(file)));
        }
        paths
    }
}

/// Entries of `folder` whose name starts with `prefix`, sorted; none where it cannot be read.
fn entries(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

/// The loader's reason, and what lies beside a file that is not there: often another version.
fn explain(path: &Path, stem: &str, reason: &cxx::Exception) -> String {
    let neighbours: Vec<String> = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() && !path.exists() => entries(folder, &format!("{stem}.so"))
            .iter()
            .filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
            .collect(),
        _ => Vec::new(),
    };
    if neighbours.is_empty() {
        reason.to_string()
    } else {
        format!("{reason} (that folder has {}: another version)", neighbours.join(", "))
    }
}

/// Opens `stem.so.MAJOR` from the first of `candidates` that works.
fn open_first<T>(stem: &str, candidates: &[PathBuf], next: &str, open: impl Fn(&str) -> Result<T, cxx::Exception>) -> Result<T> {
    let mut tried = Vec::new();
    for path in candidates {
        match open(&path.to_string_lossy()) {
            Ok(opened) => return Ok(opened),
            Err(reason) => tried.push((path.clone(), explain(path, stem, &reason))),
        }
    }
    Err(Error::TensorRtLibrary { library: format!("{stem}.so.{}", header_version().major), tried, next: next.into() })
}

impl Library {
    /// Loads libnvinfer from [`SearchPath::from_env`].
    ///
    /// # Errors
    /// As [`Library::load_from`].
    pub fn load() -> Result<Arc<Self>> {
        Self::load_from(SearchPath::from_env())
    }

    /// Loads libnvinfer of the headers' major version. Needs no GPU.
    ///
    /// # Errors
    /// [`Error::TensorRtLibrary`] where none can be loaded, with every path tried; [`Error::TensorRtVersion`] where the first
    /// one found says that it is another version than its name does.
    pub fn load_from(search: SearchPath) -> Result<Arc<Self>> {
        let headers = header_version();
        let candidates = search.candidates(&format!("libnvinfer.so.{}", headers.major));
        let next = format!(
            "Install TensorRT {}.x and set TENSORRT_LIB_DIR to the folder of its libraries, \
             or activate the virtual environment that its Python package is installed in.",
            headers.major
        );
        let handle = open_first("libnvinfer", &candidates, &next, bridge::open_library)?;
        let version = Version::from(handle.version());
        let path = PathBuf::from(handle.path());
        if !version.serves(headers) {
            // TensorRT's factories do not check: calling them would be undefined behaviour.
            return Err(Error::TensorRtVersion { path, found: version.to_string(), headers: headers.to_string() });
        }
        log::debug!("TensorRT {version} from {}", path.display());
        Ok(Arc::new(Self { handle, version, path, search, parser: Mutex::new(None) }))
    }

    /// The library's own version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The file that was loaded.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Loads libnvonnxparser, which building needs. Needs no GPU.
    ///
    /// # Errors
    /// [`Error::TensorRtLibrary`].
    pub fn load_parser(&self) -> Result<()> {
        self.parser().map(drop)
    }

    pub(super) fn handle(&self) -> &bridge::Library {
        &self.handle
    }

    /// The parser's library. Locks for no longer than loading it takes.
    pub(super) fn parser(&self) -> Result<Parser> {
        // A panic while it was locked came from loading, before it was kept.
        let mut parser = self.parser.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(parser) = &*parser {
            return Ok(Arc::clone(parser));
        }
        Ok(Arc::clone(parser.insert(Arc::new(self.open_parser()?))))
    }

    fn open_parser(&self) -> Result<UniquePtr<bridge::ParserLibrary>> {
        let file = format!("libnvonnxparser.so.{}", self.version.major);
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());

        let mut candidates: Vec<PathBuf> = folder.map(|folder| folder.join(&file)).into_iter().collect();
        for path in self.search.candidates(&file) {
            if !candidates.contains(&path) {
                candidates.push(path);
            }
        }
        // The loader names the dependency that it misses; TensorRT's libraries look for theirs beside themselves.
        let next = "Building needs libnvonnxparser and libnvinfer_plugin beside libnvinfer, and with TensorRT 8.6 also cuDNN 8 \
                    and cuBLAS 12, in LD_LIBRARY_PATH or as Python packages beside TensorRT's.";
        open_first("libnvonnxparser", &candidates, next, bridge::open_parser)
    }
}

impl From<bridge::Version> for Version {
    fn from(version: bridge::Version) -> Self {
        Self { major: version.major, minor: version.minor, patch: version.patch }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Library").field("version", &self.version).field("path", &self.path).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_serves_headers_of_its_major_version() {
        let version = |major, minor| Version { major, minor, patch: 0 };
        for (library, headers, expected) in [
            (version(8, 6), version(8, 6), true),
            (version(8, 6), version(10, 0), false),
            (version(11, 0), version(11, 4), true),
            (version(11, 4), version(11, 0), true),
            (version(10, 0), version(10, 0), true),
            (version(10, 0), version(10, 16), false),
            (version(10, 1), version(10, 16), true),
            (version(11, 4), version(10, 4), false),
        ] {
            assert_eq!(library.serves(headers), expected, "{library} for headers {headers}");
        }
    }
}

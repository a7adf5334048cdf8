//! Finds and loads TensorRT's libraries, and sees to it that they match the headers this crate was compiled with.

mod builder;
mod capability;
mod engine;
mod ffi;
mod layers;
mod products;
mod profile;
#[cfg(test)]
mod rtx_tests;
mod turn;
mod version;

pub use builder::{Arithmetic, BuildSettings, LayerDetails, Plan, PlanBuilder, Target, build_plan, exit_during_build};
pub(super) use capability::list as list_capabilities;
pub use capability::{ComputeCapability, ahead_of_time_capabilities};
pub(super) use engine::misuse;
pub use engine::{Context, Direction, Element, Engine, IoTensor, ProfileRange, Runtime};
pub use layers::{Layer, LayerTensor};
pub use products::Products;
pub(super) use profile::check_longest;
pub use profile::{Profile, Shape, default_profiles};
pub(super) use turn::wait_for_turn;
pub use version::{Flavour, Version, header_version};

use crate::{Error, Result};
use cxx::UniquePtr;
use ffi::bridge;
use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

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

/// The loaded parser's library, from which each build makes a parser of its own.
pub(super) type Parser = Arc<UniquePtr<bridge::ParserLibrary>>;

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

    /// The paths to try for `file`, of a TensorRT of this flavour; a bare name is the loader's.
    fn candidates(&self, file: &str, flavour: Flavour) -> Vec<PathBuf> {
        let mut paths = Vec::new();
        paths.extend(self.folder.as_ref().map(|folder| in_folder(folder, file).unwrap_or_else(|| folder.join(file))));
        if self.loader {
            paths.push(file.into());
        }
        if let Some(root) = &self.virtual_env {
            let package = flavour.package();
            let found: Vec<PathBuf> = entries(&root.join("lib"), "python")
                .into_iter()
                .flat_map(|python| entries(&python.join("site-packages"), package))
                .filter_map(|folder| in_folder(&folder, file))
                .collect();
            if found.is_empty() {
                paths.push(root.join(format!("lib/python*/site-packages/{package}*")).join(file));
            }
            paths.extend(found);
        }
        paths
    }
}

/// The library `file` in `folder`: under that name, or under one with the whole version behind it, as the wheel of TensorRT for RTX has it.
fn in_folder(folder: &Path, file: &str) -> Option<PathBuf> {
    let exact = folder.join(file);
    if exact.exists() {
        return Some(exact);
    }
    let start = format!("{file}.");
    let is_version = |rest: &str| rest.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let whole = |path: &PathBuf| path.file_name().and_then(|name| name.to_str()?.strip_prefix(&start)).is_some_and(is_version);
    entries(folder, &start).into_iter().rfind(whole)
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
    /// Loads TensorRT from [`SearchPath::from_env`].
    ///
    /// # Errors
    /// As [`Library::load_from`].
    pub fn load() -> Result<Arc<Self>> {
        Self::load_from(SearchPath::from_env())
    }

    /// Loads TensorRT (libnvinfer; libtensorrt_rtx with the headers of TensorRT for RTX) of the headers' major version. Needs no GPU.
    ///
    /// # Errors
    /// [`Error::TensorRtLibrary`] where none can be loaded, with every path tried; [`Error::TensorRtVersion`] where the first
    /// one found says that it is another version or flavour than its name does.
    pub fn load_from(search: SearchPath) -> Result<Arc<Self>> {
        let headers = header_version();
        let stem = headers.flavour.library_stem();
        let candidates = search.candidates(&format!("{stem}.so.{}", headers.major), headers.flavour);
        let next = match headers.flavour {
            Flavour::Standard => format!(
                "Install TensorRT {}.x and set TENSORRT_LIB_DIR to the folder of its libraries, \
                 or activate the virtual environment that its Python package is installed in.",
                headers.major
            ),
            Flavour::Rtx => {
                "Install TensorRT for RTX with `pip install onnxruntime-ep-nv-tensorrt-rtx-cu12` into a virtual environment and \
                             activate that, or set TENSORRT_LIB_DIR to the folder of its libraries."
                    .to_owned()
            }
        };
        let handle = open_first(stem, &candidates, &next, bridge::open_library)?;
        let version = Version::decode(handle.raw_version());
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

    /// Loads the parser of ONNX, which building needs. Needs no GPU.
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
        let Version { flavour, major, .. } = self.version;
        let file = format!("{}.so.{major}", flavour.parser_stem());
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());

        let mut candidates: Vec<PathBuf> =
            folder.map(|folder| in_folder(folder, &file).unwrap_or_else(|| folder.join(&file))).into_iter().collect();
        for path in self.search.candidates(&file, flavour) {
            if !candidates.contains(&path) {
                candidates.push(path);
            }
        }
        // The loader names the dependency that it misses; TensorRT's libraries look for theirs beside themselves.
        let next = match flavour {
            Flavour::Standard => {
                "Building needs libnvonnxparser and libnvinfer_plugin beside libnvinfer, and with TensorRT 8.6 also cuDNN 8 \
                 and cuBLAS 12, in LD_LIBRARY_PATH or as Python packages beside TensorRT's."
            }
            Flavour::Rtx => "Building needs libtensorrt_onnxparser_rtx beside libtensorrt_rtx, where the Python package has it.",
        };
        open_first(flavour.parser_stem(), &candidates, next, bridge::open_parser)
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Library").field("version", &self.version).field("path", &self.path).finish_non_exhaustive()
    }
}

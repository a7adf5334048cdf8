//! NVRTC, CUDA's run-time compiler: found, opened, and called to make a cubin (or PTX) of a source.
//!
//! Opened here and not through cudarc, which panics where it is missing, looks for the library of one CUDA version alone, and
//! does not look into Python wheels.
#![allow(unsafe_code)]

use super::error::{CudaError, Result};
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Oldest major version whose cubins this crate asks for.
const OLDEST_MAJOR: u32 = 12;
/// Newest major version known when this was written; newer ones are found by `libnvrtc.so`.
pub(crate) const NEWEST_MAJOR: u32 = 13;

type Program = *mut c_void;

/// NVRTC's functions (nvrtc.h, the same from CUDA 11 to 13). The library stays open.
struct Nvrtc {
    path: PathBuf,
    version: (u32, u32),
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ptx_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    ptx: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    words: unsafe extern "C" fn(c_int) -> *const c_char,
    _library: Library,
}

/// An NVRTC that can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FoundNvrtc {
    /// Path or name that the loader opened.
    pub path: PathBuf,
    /// Major and minor.
    pub version: (u32, u32),
}

/// Finds and opens NVRTC, once for the process: a folder of `CUDA_HOME` or `CUDA_PATH`, the loader's path, `VIRTUAL_ENV`'s
/// NVIDIA wheels, `/usr/local/cuda`. Not newer than major version `newest` (the driver's: a driver loads no cubins of newer
/// toolkits).
///
/// # Errors
/// [`CudaError::NvrtcMissing`] with all that was tried.
pub fn find_nvrtc(newest: u32) -> Result<FoundNvrtc> {
    let nvrtc = open(newest)?;
    Ok(FoundNvrtc { path: nvrtc.path.clone(), version: nvrtc.version })
}

fn open(newest: u32) -> Result<&'static Nvrtc> {
    static OPENED: OnceLock<Nvrtc> = OnceLock::new();
    if let Some(nvrtc) = OPENED.get() {
        return Ok(nvrtc);
    }
    let nvrtc = open_first(&candidates(newest, |name| std::env::var_os(name).map(PathBuf::from)), newest)?;
    Ok(OPENED.get_or_init(|| nvrtc))
}

fn open_first(candidates: &[PathBuf], newest: u32) -> Result<Nvrtc> {
    let mut tried = Vec::with_capacity(candidates.len());
    for path in candidates {
        match Nvrtc::open(path) {
            Ok(nvrtc) if nvrtc.version.0 <= newest => return Ok(nvrtc),
            Ok(nvrtc) => {
                let (major, minor) = nvrtc.version;
                tried.push(format!("{} ({major}.{minor}, newer than the driver's CUDA {newest})", path.display()));
            }
            Err(()) => tried.push(path.display().to_string()),
        }
    }
    Err(CudaError::NvrtcMissing { looked_for: tried.join(", ") })
}

/// Where NVRTC may be, best first; `env` reads an environment variable. Names with a folder are given only where they exist.
fn candidates(newest: u32, env: impl Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    let mut names: Vec<String> =
        (OLDEST_MAJOR..=newest.min(NEWEST_MAJOR)).rev().map(|major| format!("libnvrtc.so.{major}")).collect();
    // The development link: any version, so last, and its version is checked.
    names.push("libnvrtc.so".to_owned());

    let toolkit = |root: PathBuf| [root.join("lib64"), root.join("lib")];
    let named: Vec<PathBuf> = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(&env).flat_map(toolkit).collect();
    let mut usual = env("VIRTUAL_ENV").map(|venv| wheel_folders(&venv)).unwrap_or_default();
    usual.extend(toolkit(PathBuf::from("/usr/local/cuda")));

    let within = |folders: &[PathBuf]| -> Vec<PathBuf> {
        let paths = folders.iter().flat_map(|folder| names.iter().map(move |name| folder.join(name)));
        paths.filter(|path| path.exists()).collect()
    };
    let mut all = within(&named);
    all.extend(names.iter().map(PathBuf::from));
    all.extend(within(&usual));
    all
}

/// Folders in which NVIDIA's wheels put NVRTC (`nvidia-cuda-nvrtc-cu12`, `nvidia-cuda-nvrtc`).
fn wheel_folders(venv: &Path) -> Vec<PathBuf> {
    let Ok(pythons) = fs::read_dir(venv.join("lib")) else { return Vec::new() };
    let mut pythons: Vec<PathBuf> = pythons.flatten().map(|entry| entry.path().join("site-packages/nvidia")).collect();
    pythons.sort();
    pythons
        .iter()
        .flat_map(|nvidia| ["cu13/lib", "cuda_nvrtc/lib"].map(|part| nvidia.join(part)))
        .filter(|path| path.is_dir())
        .collect()
}

/// Compiles `source` (named `name` in messages) for `arch`: `sm_90` and its like to a cubin, `compute_80` and its like to PTX, which the driver
/// translates when it loads it.
///
/// # Errors
/// [`CudaError::NvrtcMissing`]; [`CudaError::Compile`] with the compiler's log.
pub(crate) fn compile(newest: u32, name: &str, source: &str, arch: &str, options: &[&str]) -> Result<Vec<u8>> {
    Ok(compile_with_log(newest, name, source, arch, options)?.0)
}

/// As [`compile`], with what the compiler says besides.
pub(crate) fn compile_with_log(newest: u32, name: &str, source: &str, arch: &str, options: &[&str]) -> Result<(Vec<u8>, String)> {
    // One at a time: NVRTC before 12 is not safe for several threads, and there is nothing to gain.
    static ONE: Mutex<()> = Mutex::new(());
    let nvrtc = open(newest)?;
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    nvrtc.compile(name, source, arch, options)
}

impl Nvrtc {
    /// Nothing of the reason is kept: the loader's words for an absent file say no more than its name.
    fn open(path: &Path) -> Result<Self, ()> {
        // SAFETY: opening runs the library's initialisers, which NVIDIA's libraries allow at any time. The symbols are looked up
        // by the names of nvrtc.h and have the types given there; `library` is kept as long as the function pointers.
        unsafe {
            let library = Library::new(path).map_err(drop)?;
            let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int = symbol(&library, b"nvrtcVersion\0")?;
            let (mut major, mut minor) = (0, 0);
            if version(&mut major, &mut minor) != 0 {
                return Err(());
            }
            Ok(Self {
                path: path.to_owned(),
                version: (u32::try_from(major).map_err(drop)?, u32::try_from(minor).map_err(drop)?),
                create: symbol(&library, b"nvrtcCreateProgram\0")?,
                compile: symbol(&library, b"nvrtcCompileProgram\0")?,
                destroy: symbol(&library, b"nvrtcDestroyProgram\0")?,
                log_size: symbol(&library, b"nvrtcGetProgramLogSize\0")?,
                log: symbol(&library, b"nvrtcGetProgramLog\0")?,
                cubin_size: symbol(&library, b"nvrtcGetCUBINSize\0")?,
                cubin: symbol(&library, b"nvrtcGetCUBIN\0")?,
                ptx_size: symbol(&library, b"nvrtcGetPTXSize\0")?,
                ptx: symbol(&library, b"nvrtcGetPTX\0")?,
                words: symbol(&library, b"nvrtcGetErrorString\0")?,
                _library: library,
            })
        }
    }

    fn compile(&self, name: &str, source: &str, arch: &str, options: &[&str]) -> Result<(Vec<u8>, String)> {
        let failed = |log: String| CudaError::Compile { name: name.to_owned(), arch: arch.to_owned(), log };
        let text = |s: &str| CString::new(s).map_err(|_| failed("a zero byte in the source, its name or an option".to_owned()));
        let (c_name, c_source) = (text(name)?, text(source)?);
        let options = [format!("--gpu-architecture={arch}")]
            .iter()
            .map(String::as_str)
            .chain(options.iter().copied())
            .map(text)
            .collect::<Result<Vec<CString>>>()?;
        let c_options: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let count = c_int::try_from(c_options.len()).map_err(|_| failed("too many options".to_owned()))?;

        let mut program = OpenProgram { nvrtc: self, program: std::ptr::null_mut() };
        // SAFETY: all strings are terminated and live through the calls; no headers are given (count 0); `program` is written by
        // the first call and used only after it succeeded; the buffers have the sizes that NVRTC said just before.
        unsafe {
            let code =
                (self.create)(&mut program.program, c_source.as_ptr(), c_name.as_ptr(), 0, std::ptr::null(), std::ptr::null());
            if code != 0 {
                return Err(failed(self.describe(code)));
            }
            let code = (self.compile)(program.program, count, c_options.as_ptr());
            let log = read(program.program, self.log_size, self.log).unwrap_or_default();
            let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned();
            if code != 0 {
                return Err(failed(format!("{}: {log}", self.describe(code))));
            }
            let (size, get) =
                if arch.starts_with("compute_") { (self.ptx_size, self.ptx) } else { (self.cubin_size, self.cubin) };
            let image = read(program.program, size, get).map_err(|code| failed(self.describe(code)))?;
            Ok((image, log))
        }
    }

    fn describe(&self, code: c_int) -> String {
        // SAFETY: the call takes any number and returns a string constant of the library, which stays open.
        let words = unsafe { (self.words)(code) };
        if words.is_null() {
            return format!("NVRTC error {code}");
        }
        // SAFETY: as above; not null.
        unsafe { CStr::from_ptr(words) }.to_string_lossy().into_owned()
    }
}

/// A program that is destroyed on every way out.
struct OpenProgram<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl Drop for OpenProgram<'_> {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: made by nvrtcCreateProgram, destroyed once.
            unsafe { (self.nvrtc.destroy)(&mut self.program) };
        }
    }
}

/// A function of the library.
///
/// # Safety
/// `T` is the function's type.
unsafe fn symbol<T: Copy>(library: &Library, name: &[u8]) -> Result<T, ()> {
    // SAFETY: by the function's contract; the pointer is used only while the library is open.
    unsafe { library.get::<T>(name) }.map(|symbol| *symbol).map_err(drop)
}

/// The bytes of which `size` says how many, and which `get` writes; or NVRTC's code.
///
/// # Safety
/// `program` is a live program and the functions are a pair of NVRTC's.
unsafe fn read(
    program: Program,
    size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    get: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
) -> Result<Vec<u8>, c_int> {
    let mut bytes = 0;
    // SAFETY: by the function's contract.
    match unsafe { size(program, &mut bytes) } {
        0 => {}
        code => return Err(code),
    }
    let mut buffer = vec![0_u8; bytes];
    // SAFETY: by the function's contract; the buffer has the size just asked for.
    match unsafe { get(program, buffer.as_mut_ptr().cast()) } {
        0 => Ok(buffer),
        code => Err(code),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_majors_come_first_and_never_above_the_driver() {
        let names = |newest| candidates(newest, |_| None).iter().map(|p| p.display().to_string()).collect::<Vec<_>>();
        let bare = |newest| names(newest).into_iter().filter(|n| !n.contains('/')).collect::<Vec<_>>();
        assert_eq!(bare(13), ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]);
        assert_eq!(bare(12), ["libnvrtc.so.12", "libnvrtc.so"]);
        assert_eq!(bare(99), bare(13));
    }

    #[test]
    fn wheels_of_a_virtual_environment_are_found() {
        let venv = tempfile::tempdir().unwrap();
        let wheel = venv.path().join("lib/python3.12/site-packages/nvidia/cuda_nvrtc/lib");
        fs::create_dir_all(&wheel).unwrap();
        fs::write(wheel.join("libnvrtc.so.12"), b"").unwrap();
        let env = |name: &str| (name == "VIRTUAL_ENV").then(|| venv.path().to_owned());
        assert!(candidates(13, env).contains(&wheel.join("libnvrtc.so.12")));
        assert!(!candidates(11, env).contains(&wheel.join("libnvrtc.so.12")));
    }

    #[test]
    fn a_named_toolkit_comes_before_the_loader() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("lib64")).unwrap();
        fs::write(root.path().join("lib64/libnvrtc.so.13"), b"").unwrap();
        let env = |name: &str| (name == "CUDA_HOME").then(|| root.path().to_owned());
        assert_eq!(candidates(13, env)[0], root.path().join("lib64/libnvrtc.so.13"));
    }

    #[test]
    #[ignore = "needs NVRTC (no GPU)"]
    fn a_source_with_a_fault_gives_the_compilers_words() {
        let compile = |text, arch, options: &[&str]| compile(NEWEST_MAJOR, "fault.cu", text, arch, options).unwrap_err();
        let error = compile("__global__ void f() { undeclared = 1; }", "sm_90", &[]);
        let CudaError::Compile { name, arch, log } = &error else { panic!("{error:?}") };
        assert_eq!((name.as_str(), arch.as_str()), ("fault.cu", "sm_90"));
        assert!(log.contains("fault.cu(1)") && log.contains("undeclared"), "{log}");
        assert!(matches!(compile("", "sm_1", &[]), CudaError::Compile { .. }));
        assert!(matches!(compile("", "sm_90", &["--no-such-option"]), CudaError::Compile { .. }));
        assert!(matches!(compile("a\0b", "sm_90", &[]), CudaError::Compile { .. }));
    }

    #[test]
    fn what_cannot_be_opened_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let fake = folder.path().join("libnvrtc.so.12");
        fs::write(&fake, b"not a library").unwrap();
        let Err(CudaError::NvrtcMissing { looked_for }) = open_first(&[fake.clone(), "libnvrtc.so.0".into()], 13) else {
            panic!("a text file was opened as a library")
        };
        assert_eq!(looked_for, format!("{}, libnvrtc.so.0", fake.display()));
    }
}

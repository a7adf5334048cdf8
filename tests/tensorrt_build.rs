//! Building and loading the TensorRT shim on machines without TensorRT: what is found, and what is said when it is not.
#![cfg(feature = "tensorrt")]

#[path = "../cpp/find_headers.rs"]
#[allow(dead_code)]
mod find_headers;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use trt_embed::Error;
use trt_embed::backend::tensorrt::{Library, SearchPath, header_version};

/// A folder that goes away with the value.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn infer() -> String {
    format!("libnvinfer.so.{}", header_version().major)
}

fn parser() -> String {
    format!("libnvonnxparser.so.{}", header_version().major)
}

/// `getInferLibVersion` as TensorRT `major`.9.8 encodes it.
fn encoded(major: u32) -> u32 {
    if major >= 10 { major * 10_000 + 908 } else { major * 1_000 + 908 }
}

/// Compiles a shared library whose functions say nothing true but a version.
fn stub(path: &Path, version: u32, functions: &[&str], needs: &[&Path]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let source = path.with_extension("c");
    let mut code = format!("int getInferLibVersion(void) {{ return {version}; }}\n");
    for function in functions {
        code.push_str(&format!("void *{function}(void) {{ return 0; }}\n"));
    }
    fs::write(&source, code).unwrap();
    let soname = format!("-Wl,-soname,{}", path.file_name().unwrap().to_string_lossy());
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-Wl,--no-as-needed", &soname, "-o"]).arg(path).arg(&source).args(needs);
    let status = cc.status().unwrap();
    assert!(status.success());
}

const FACTORIES: [&str; 2] = ["createInferBuilder_INTERNAL", "createInferRuntime_INTERNAL"];

fn tried(error: &Error) -> Vec<(PathBuf, String)> {
    match error {
        Error::TensorRtLibrary { tried, .. } => tried.clone(),
        other => panic!("another error: {other}"),
    }
}

#[test]
fn no_library_lists_every_path_and_what_to_set() {
    let (lib, venv) = (folder(), folder());
    let mut search = SearchPath::in_folder(lib.path());
    search.virtual_env = Some(venv.path().into());
    let error = Library::load_from(search).unwrap_err();

    let absent = |path: &Path| {
        (path.to_path_buf(), format!("{}: cannot open shared object file: No such file or directory", path.display()))
    };
    let expected =
        [absent(&lib.path().join(infer())), absent(&venv.path().join("lib/python*/site-packages/tensorrt*").join(infer()))];
    assert_eq!(tried(&error), expected);

    let message = error.to_string();
    assert!(message.starts_with(&format!("{} could not be loaded:\n", infer())), "{message}");
    assert!(message.contains("set TENSORRT_LIB_DIR"), "{message}");
}

#[test]
fn another_major_version_in_the_folder_is_named() {
    let lib = folder();
    fs::write(lib.path().join("libnvinfer.so.7"), "").unwrap();
    let error = Library::load_from(SearchPath::in_folder(lib.path())).unwrap_err();
    let reason = &tried(&error)[0].1;
    assert!(reason.ends_with("(that folder has libnvinfer.so.7: another version)"), "{reason}");
}

#[test]
fn a_library_of_another_major_version_is_refused() {
    for major in [7, 8, 10, 11, 12].into_iter().filter(|&major| major != header_version().major) {
        let lib = folder();
        let path = lib.path().join(infer());
        stub(&path, encoded(major), &FACTORIES, &[]);
        let error = Library::load_from(SearchPath::in_folder(lib.path())).unwrap_err();
        let message = error.to_string();
        let Error::TensorRtVersion { path: named, found, headers } = error else { panic!("{message}") };
        assert_eq!((named, found, headers), (path, format!("{major}.9.8"), header_version().to_string()));
        assert!(message.contains(&format!("built with the headers of {}", header_version())), "{message}");
    }
}

#[test]
fn a_library_that_is_none_gives_the_loaders_reason() {
    let lib = folder();
    let path = lib.path().join(infer());
    fs::write(&path, "not an ELF file, but long enough to have an ELF header of sixty-four bytes if it were").unwrap();
    let error = Library::load_from(SearchPath::in_folder(lib.path())).unwrap_err();
    assert!(tried(&error)[0].1.contains("invalid ELF header"), "{error}");

    let lib = folder();
    stub(&lib.path().join(infer()), encoded(header_version().major), &FACTORIES[..1], &[]);
    let error = Library::load_from(SearchPath::in_folder(lib.path())).unwrap_err();
    assert_eq!(tried(&error)[0].1, "has no symbol createInferRuntime_INTERNAL");
}

#[test]
fn a_virtual_environment_is_searched() {
    let venv = folder();
    let packages = venv.path().join("lib/python3.11/site-packages/tensorrt_libs");
    stub(&packages.join(infer()), encoded(header_version().major), &FACTORIES, &[]);
    let library = Library::load_from(SearchPath::in_virtual_env(venv.path())).unwrap();
    assert_eq!(library.path(), packages.join(infer()));
    assert_eq!((library.version().major, library.version().minor), (header_version().major, 9));
}

#[test]
fn the_parser_is_loaded_from_beside_the_library() {
    let lib = folder();
    stub(&lib.path().join(infer()), encoded(header_version().major), &FACTORIES, &[]);
    let library = Library::load_from(SearchPath::in_folder(lib.path())).unwrap();

    let absent = lib.path().join(parser());
    let error = library.load_parser().unwrap_err();
    let reason = format!("{}: cannot open shared object file: No such file or directory", absent.display());
    assert_eq!(tried(&error), [(absent.clone(), reason)]);

    let plugin = lib.path().join("libnvinfer_plugin.so.0");
    stub(&plugin, 0, &[], &[]);
    stub(&absent, 0, &["createNvOnnxParser_INTERNAL"], &[&plugin]);
    fs::remove_file(&plugin).unwrap();
    let error = library.load_parser().unwrap_err();
    assert!(tried(&error)[0].1.starts_with("libnvinfer_plugin.so.0: cannot open shared object file"), "{error}");

    stub(&absent, 0, &["createNvOnnxParser_INTERNAL"], &[]);
    library.load_parser().unwrap();
}

#[test]
#[ignore = "needs TensorRT's libraries in TENSORRT_LIB_DIR"]
fn the_real_library_loads_without_a_gpu() {
    let library = Library::load().unwrap();
    assert_eq!(library.version().major, header_version().major);
    library.load_parser().unwrap();
}

#[test]
#[ignore = "needs TensorRT's libraries of another major version in TRT_EMBED_OTHER_LIB_DIR"]
fn a_real_library_under_a_false_name_is_refused() {
    let other = PathBuf::from(std::env::var_os("TRT_EMBED_OTHER_LIB_DIR").unwrap());
    let real = fs::read_dir(&other)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.file_name().unwrap().to_string_lossy().starts_with("libnvinfer.so."))
        .unwrap();
    let lib = folder();
    symlink(fs::canonicalize(real).unwrap(), lib.path().join(infer())).unwrap();
    let error = Library::load_from(SearchPath::in_folder(lib.path())).unwrap_err();
    assert!(matches!(error, Error::TensorRtVersion { .. }), "{error}");
}

fn headers_in(folder: &Path, names: &[&str]) -> PathBuf {
    fs::create_dir_all(folder).unwrap();
    for name in names {
        fs::write(folder.join(name), "").unwrap();
    }
    folder.to_path_buf()
}

#[test]
fn headers_are_found_in_the_order_of_the_variables() {
    let root = folder();
    let both = ["NvInfer.h", "NvOnnxParser.h"];
    let include = headers_in(&root.path().join("a"), &both);
    let in_root = headers_in(&root.path().join("b/include"), &both);
    let usual = [root.path().join("none"), headers_in(&root.path().join("c"), &both)];
    let tensorrt = root.path().join("b");
    assert_eq!(find_headers::find(Some(&include), Some(&tensorrt), &usual), Ok(include.clone()));
    assert_eq!(find_headers::find(None, Some(&tensorrt), &usual), Ok(in_root));
    assert_eq!(find_headers::find(None, None, &usual), Ok(usual[1].clone()));
}

#[test]
fn missing_headers_say_what_to_set() {
    let root = folder();
    let half = headers_in(&root.path().join("half"), &["NvInfer.h"]);
    let usual = [half.clone(), root.path().join("none")];

    let message = find_headers::find(None, None, &usual).unwrap_err();
    assert!(message.contains(&format!("  {}: no NvOnnxParser.h\n", half.display())), "{message}");
    assert!(message.contains("none: no NvInfer.h, no NvOnnxParser.h\n"), "{message}");
    for next in ["TENSORRT_INCLUDE_DIR", "TENSORRT_ROOT", "scripts/tensorrt-headers.sh"] {
        assert!(message.contains(next), "{next}: {message}");
    }

    // A variable that leads nowhere is an error, even where the usual folders have headers.
    let whole = [headers_in(&root.path().join("whole"), &["NvInfer.h", "NvOnnxParser.h"])];
    let message = find_headers::find(Some(&half), None, &whole).unwrap_err();
    assert!(message.contains("(TENSORRT_INCLUDE_DIR): no NvOnnxParser.h"), "{message}");
    assert!(find_headers::find(None, Some(root.path()), &whole).unwrap_err().contains("(TENSORRT_ROOT/include)"));
}

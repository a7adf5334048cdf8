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
use trt_embed::backend::tensorrt::{Flavour, Library, SearchPath, header_version};

/// A folder that goes away with the value.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// A library's name, with the headers' major version.
fn named(stem: &str) -> String {
    format!("{stem}.so.{}", header_version().major)
}

fn infer() -> String {
    named(header_version().flavour.library_stem())
}

fn parser() -> String {
    named(header_version().flavour.parser_stem())
}

/// How the folders of its Python packages begin.
fn package() -> &'static str {
    match header_version().flavour {
        Flavour::Rtx => "onnxruntime_ep_nv_tensorrt_rtx",
        _ => "tensorrt",
    }
}

/// `getInferLibVersion` of a library that serves the headers.
fn own_version() -> u32 {
    let headers = header_version();
    match headers.flavour {
        Flavour::Rtx => headers.major * 10_000 + headers.minor * 100 + 8,
        _ if headers.major >= 10 => headers.major * 10_000 + 908,
        _ => headers.major * 1_000 + 908,
    }
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
    let expected = [
        absent(&lib.path().join(infer())),
        absent(&venv.path().join(format!("lib/python*/site-packages/{}*", package())).join(infer())),
    ];
    assert_eq!(tried(&error), expected);

    let message = error.to_string();
    assert!(message.starts_with(&format!("{} could not be loaded:\n", infer())), "{message}");
    assert!(message.contains("set TENSORRT_LIB_DIR"), "{message}");
}

#[test]
fn another_major_version_in_the_folder_is_named() {
    let lib = folder();
    let other = format!("{}.so.7", header_version().flavour.library_stem());
    fs::write(lib.path().join(&other), "").unwrap();
    let error = Library::load_from(SearchPath::in_folder(lib.path())).unwrap_err();
    let reason = &tried(&error)[0].1;
    assert!(reason.ends_with(&format!("(that folder has {other}: another version)")), "{reason}");
}

#[test]
fn a_library_of_another_version_or_flavour_is_refused() {
    let headers = header_version();
    let own = match headers.flavour {
        Flavour::Rtx => format!("RTX {}.{}.", headers.major, headers.minor),
        _ => format!("{}.", headers.major),
    };
    let versions = [
        (7908, "7.9.8"),
        (8908, "8.9.8"),
        (100_908, "10.9.8"),
        (110_908, "11.9.8"),
        (120_908, "12.9.8"),
        (10_608, "RTX 1.6.8"),
        (10_708, "RTX 1.7.8"),
        (20_708, "RTX 2.7.8"),
    ];
    for (raw, said) in versions.into_iter().filter(|(_, said)| !said.starts_with(&own)) {
        let lib = folder();
        let path = lib.path().join(infer());
        stub(&path, raw, &FACTORIES, &[]);
        let error = Library::load_from(SearchPath::in_folder(lib.path())).unwrap_err();
        let message = error.to_string();
        let Error::TensorRtVersion { path: named, found, headers: needed } = error else { panic!("{message}") };
        assert_eq!((named, found, needed), (path, said.to_owned(), headers.to_string()));
        assert!(message.contains(&format!("built with the headers of {headers}")), "{message}");
    }
}

#[test]
fn a_library_under_its_whole_version_is_found() {
    let lib = folder();
    let path = lib.path().join(format!("{}.8.9", infer()));
    stub(&path, own_version(), &FACTORIES, &[]);
    stub(&lib.path().join(format!("{}.8.9", parser())), 0, &["createNvOnnxParser_INTERNAL"], &[]);
    let library = Library::load_from(SearchPath::in_folder(lib.path())).unwrap();
    assert_eq!(library.path(), path);
    library.load_parser().unwrap();
}

#[test]
fn a_library_that_is_none_gives_the_loaders_reason() {
    let lib = folder();
    let path = lib.path().join(infer());
    fs::write(&path, "not an ELF file, but long enough to have an ELF header of sixty-four bytes if it were").unwrap();
    let error = Library::load_from(SearchPath::in_folder(lib.path())).unwrap_err();
    assert!(tried(&error)[0].1.contains("invalid ELF header"), "{error}");

    let lib = folder();
    stub(&lib.path().join(infer()), own_version(), &FACTORIES[..1], &[]);
    let error = Library::load_from(SearchPath::in_folder(lib.path())).unwrap_err();
    assert_eq!(tried(&error)[0].1, "has no symbol createInferRuntime_INTERNAL");
}

#[test]
fn a_virtual_environment_is_searched() {
    let venv = folder();
    let packages = venv.path().join(format!("lib/python3.11/site-packages/{}_libs", package()));
    stub(&packages.join(infer()), own_version(), &FACTORIES, &[]);
    let library = Library::load_from(SearchPath::in_virtual_env(venv.path())).unwrap();
    assert_eq!(library.path(), packages.join(infer()));
    assert_eq!((library.version().flavour, library.version().major), (header_version().flavour, header_version().major));
}

#[test]
fn the_parser_is_loaded_from_beside_the_library() {
    let lib = folder();
    stub(&lib.path().join(infer()), own_version(), &FACTORIES, &[]);
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
#[ignore = "needs TensorRT's libraries of another major version or flavour in TRT_EMBED_OTHER_LIB_DIR"]
fn a_real_library_under_a_false_name_is_refused() {
    let other = PathBuf::from(std::env::var_os("TRT_EMBED_OTHER_LIB_DIR").unwrap());
    let real = fs::read_dir(&other)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| {
            let name = path.file_name().unwrap().to_string_lossy();
            ["libnvinfer.so.", "libtensorrt_rtx.so."].iter().any(|start| name.starts_with(start))
        })
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

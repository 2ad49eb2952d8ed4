//! Where ONNX Runtime's shared library is, and the process's one environment in it.

use std::{
    env::{self, consts::DLL_EXTENSION},
    error::Error as _,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use anyhow::{Context, Result, anyhow, bail};
use ort::environment::Environment;

/// Path of the ONNX Runtime library that this process opens, the first that exists of:
/// 1. what the environment variable `ORT_DYLIB_PATH` names (nothing else is tried when it is set);
/// 2. `libonnxruntime.so*` beside the running program;
/// 3. the same in `../lib` seen from the program;
/// 4. the same in `.runtime/lib` of the program's folder or any folder above it.
///
/// Never what lies where the program was started: the library is code that runs.
pub fn library() -> Result<PathBuf> {
    let program = env::current_exe().ok();
    find(env::var_os("ORT_DYLIB_PATH"), program.as_deref().and_then(Path::parent))
}

/// The process's environment: the library is loaded and checked by the first call that succeeds.
pub(crate) fn environment() -> Result<Environment> {
    static ENVIRONMENT: Mutex<Option<Environment>> = Mutex::new(None);
    let mut slot = ENVIRONMENT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(environment) = slot.as_ref() {
        return Ok(environment.clone());
    }
    let path = library()?;
    let environment = ort::init_from(&path)
        .map_err(|error| anyhow!("{}; {REMEDY}", explain(&path, &error)))?
        .with_name("neighbor-grpo")
        .with_telemetry(false)
        .build()
        .with_context(|| format!("cannot start ONNX Runtime from {}", path.display()))?;
    *slot = Some(environment.clone());
    Ok(environment)
}

const REMEDY: &str = "run `make runtime`, put libonnxruntime.so beside the program, \
                      or set ORT_DYLIB_PATH to the library";

fn find(chosen: Option<OsString>, program_folder: Option<&Path>) -> Result<PathBuf> {
    if let Some(chosen) = chosen.filter(|path| !path.is_empty()) {
        let path = std::path::absolute(&chosen)
            .with_context(|| format!("cannot resolve ORT_DYLIB_PATH={}", chosen.display()))?;
        if !path.is_file() {
            bail!(
                "ORT_DYLIB_PATH names {}, which is not a file; correct it or unset it",
                path.display()
            );
        }
        return Ok(path);
    }
    let beside = program_folder.into_iter().flat_map(|folder| {
        [Some(folder.to_path_buf()), folder.parent().map(|parent| parent.join("lib"))]
    });
    let above = program_folder
        .into_iter()
        .flat_map(Path::ancestors)
        .map(|folder| Some(folder.join(".runtime/lib")));
    if let Some(path) = beside.chain(above).flatten().find_map(|folder| library_in(&folder)) {
        return Ok(path);
    }
    let Some(program) = program_folder.map(Path::display) else {
        bail!("this program cannot see where it lies: mount /proc, which ONNX Runtime needs too");
    };
    bail!(
        "ONNX Runtime is not installed: no libonnxruntime.{DLL_EXTENSION} in {program}, in its \
         ../lib, or in .runtime/lib of {program} or of a folder above it; {REMEDY}"
    )
}

/// The library in `folder`: the plain name if there, else the versioned name that sorts last.
fn library_in(folder: &Path) -> Option<PathBuf> {
    let plain_name = format!("libonnxruntime.{DLL_EXTENSION}");
    let plain = folder.join(&plain_name);
    if plain.is_file() {
        return Some(plain);
    }
    let versioned = format!("{plain_name}.");
    fs::read_dir(folder)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().map(std::ffi::OsStr::to_string_lossy);
            name.is_some_and(|name| name.starts_with(&versioned)) && path.is_file()
        })
        .max_by_key(|path| version_of(path))
}

/// The numbers after `.so.`, so that 1.31 is newer than 1.9.
fn version_of(path: &Path) -> Vec<u32> {
    let name = path.to_string_lossy();
    let version = name.rsplit_once(".so.").map_or("", |(_, version)| version);
    version.split('.').map(|part| part.parse().unwrap_or(0)).collect()
}

fn explain(path: &Path, error: &ort::LoadDynamicError) -> String {
    use ort::LoadDynamicError as E;
    let path = path.display();
    match error {
        E::Dlopen { error, .. } => {
            let reason = error.source().map_or_else(|| error.to_string(), ToString::to_string);
            format!("cannot load {path} as ONNX Runtime: {reason}")
        }
        E::MissingApi { .. } => format!("{path} is a library, but not ONNX Runtime"),
        E::InvalidVersionString => format!("{path} does not tell its ONNX Runtime version"),
        E::BadVersion { version_str, .. } => {
            let minor = ort::MINOR_VERSION;
            format!("{path} is ONNX Runtime {version_str}, but 1.{minor} or newer is needed")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(folder: &Path, name: &str) -> PathBuf {
        fs::create_dir_all(folder).unwrap();
        let path = folder.join(name);
        fs::write(&path, "").unwrap();
        path
    }

    #[test]
    fn order_of_places() {
        let root = tempfile::tempdir().unwrap();
        let bin = root.path().join("app/bin");
        fs::create_dir_all(&bin).unwrap();
        let look = |chosen: Option<&Path>| {
            find(chosen.map(|path| path.as_os_str().to_owned()), Some(&bin))
        };

        let nothing = look(None).unwrap_err().to_string();
        for part in ["not installed", "make runtime", "ORT_DYLIB_PATH", &bin.to_string_lossy()] {
            assert!(nothing.contains(part), "{part} is not in: {nothing}");
        }
        let runtime = touch(&root.path().join(".runtime/lib"), "libonnxruntime.so.1.31.1");
        assert_eq!(look(None).unwrap(), runtime);
        let lib = touch(&root.path().join("app/lib"), "libonnxruntime.so");
        assert_eq!(look(None).unwrap(), lib);
        touch(&bin, "libonnxruntime.so.1.9.0");
        let beside = touch(&bin, "libonnxruntime.so.1.31.1");
        assert_eq!(look(None).unwrap(), beside);
        let chosen = touch(root.path(), "elsewhere.so");
        assert_eq!(look(Some(&chosen)).unwrap(), chosen);
        let absent = look(Some(&root.path().join("absent.so"))).unwrap_err().to_string();
        assert!(absent.contains("absent.so"), "{absent}");
    }
}

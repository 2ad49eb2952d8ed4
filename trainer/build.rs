//! Lets every program of the package find libtorch by itself: beside the program, or where
//! `make runtime` put it.

use std::{env, path::PathBuf};

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-changed=build.rs");
    let root = PathBuf::from(env::var_os("LIBTORCH").unwrap_or_default());
    // The folder inside the package, not the link to it: libtorch_cpu looks for the CUDA runtime
    // relative to the folder that it was opened from.
    let Ok(library) = root.join("lib/libtorch_cpu.so").canonicalize() else {
        eprintln!("error: no libtorch in `{}`: run `make runtime` first", root.display());
        std::process::exit(1);
    };
    println!("cargo:rerun-if-changed={}", library.display());
    let folder = library.parent().unwrap_or(&root);
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", folder.display());
}

//! Lets every program of the package find libtorch by itself: beside the program, or where
//! `make runtime` put it, seen from the program, so that no path of this machine is in it.

use std::env;
use std::path::{Component, Path, PathBuf};

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
    // TARGET/PROFILE/build/PACKAGE/out; programs lie in PROFILE, tests in PROFILE/deps.
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let out = out.canonicalize().unwrap_or(out);
    let profile = out.ancestors().nth(3).unwrap_or(&out);
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN");
    for place in [profile.to_owned(), profile.join("deps")] {
        println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/{}", relative(folder, &place).display());
    }
}

/// The way to `target` from `place`, both absolute.
fn relative(target: &Path, place: &Path) -> PathBuf {
    let common = target.components().zip(place.components()).take_while(|(a, b)| a == b).count();
    let up = place.components().skip(common).map(|_| Component::ParentDir);
    up.chain(target.components().skip(common)).collect()
}

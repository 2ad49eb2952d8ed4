//! Compiles the shim over libtorch's c10d, and lets programs find libtorch by themselves: beside the program,
//! or where `make runtime` put it, seen from the program, so that no path of this machine is in it. The
//! build scripts of the packages above get the same places as `DEP_C10D_PLACES`.

use std::env;
use std::path::{Component, Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=shim");
    let root = PathBuf::from(env::var_os("LIBTORCH").unwrap_or_default());
    // The folder inside the package, not the link to it: libtorch_cpu looks for the CUDA runtime
    // relative to the folder that it was opened from.
    let Ok(library) = root.join("lib/libtorch_cpu.so").canonicalize() else {
        eprintln!("error: no libtorch in `{}`: run `make runtime` first", root.display());
        std::process::exit(1);
    };
    println!("cargo:rerun-if-changed={}", library.display());
    let abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned());
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(1)
        .define("USE_C10D_GLOO", None)
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        .include("shim")
        .flag(format!("-isystem{}", root.join("include").display()))
        .flag(format!("-isystem{}", root.join("include/torch/csrc/api/include").display()))
        .file("shim/c10d.cpp")
        .compile("c10d_shim");
    let folder = library.parent().unwrap_or(&root);
    println!("cargo:rustc-link-search=native={}", root.join("lib").display());
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    // TARGET/PROFILE/build/PACKAGE/out; programs lie in PROFILE, tests in PROFILE/deps.
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let out = out.canonicalize().unwrap_or(out);
    let profile = out.ancestors().nth(3).unwrap_or(&out);
    let seen_from = |place: &Path| format!("$ORIGIN/{}", relative(folder, place).display());
    let places =
        ["$ORIGIN".to_owned(), seen_from(profile), seen_from(&profile.join("deps"))].join(":");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{places}");
    println!("cargo:places={places}");
}

/// The way to `target` from `place`, both absolute.
fn relative(target: &Path, place: &Path) -> PathBuf {
    let common = target.components().zip(place.components()).take_while(|(a, b)| a == b).count();
    let up = place.components().skip(common).map(|_| Component::ParentDir);
    up.chain(target.components().skip(common)).collect()
}

//! Lets every program of the package find libtorch by itself.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let places = std::env::var("DEP_C10D_PLACES").expect("the build script of `cluster` says it");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{places}");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let folder = std::path::PathBuf::from(std::env::var_os("LIBTORCH").unwrap_or_default());
    let version = std::fs::read_to_string(folder.join("build-version")).unwrap_or_default();
    println!("cargo:rustc-env=LIBTORCH_VERSION={}", version.trim());
}

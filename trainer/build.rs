//! Lets every program of the package find libtorch by itself.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let places = std::env::var("DEP_C10D_PLACES").expect("the build script of `cluster` says it");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{places}");
}

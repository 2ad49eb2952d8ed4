//! The repository's own rules: which package knows which library, sizes, and that what is named exists.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use object::elf::{DT_RPATH, DT_RUNPATH};
use object::read::elf::ElfFile64;
use object::{Endianness, Object};
use tests::fixture::{files_below, root};
use tests::program::{Ended, Program};

/// Lines of a file of logic.
const FILE_LINES: usize = 500;
/// Lines of a function.
const FUNCTION_LINES: usize = 70;
/// Functions that may be longer, `(file, function)`, each with its reason.
const LONG_FUNCTIONS: [(&str, &str); 0] = [];
/// Folders of the packages.
const PACKAGES: [&str; 10] = [
    "benches", "cluster", "exporter", "flow", "host", "manual", "onnx", "sampler", "tests",
    "trainer",
];

/// Rooms of the trainer from the ground up: each knows those before it, and none after it.
const TRAINER: [&str; 9] =
    ["picture", "data", "tensor", "network", "reward", "group", "algorithm", "run", "command"];

/// Every package below `package` in the build, itself included.
fn dependencies(package: &str) -> BTreeSet<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(root()).args(["tree", "--package", package, "--edges", "normal,build"]);
    command.args(["--prefix", "none", "--format", "{lib}", "--offline", "--locked"]);
    let text = Ended::after(&mut command).succeeded();
    let names: BTreeSet<String> =
        text.lines().map(|line| line.split(' ').next().unwrap_or_default().to_owned()).collect();
    assert!(names.contains(package), "{package} is not in its own tree:\n{text}");
    names
}

#[test]
fn dependencies_point_one_way() {
    let programs = ["trainer", "exporter", "sampler"];
    let libtorch = ["tch", "torch_sys"];
    let native = ["tch", "torch_sys", "ort", "ort_sys", "onnx", "cc", "cmake", "bindgen"];
    for (package, forbidden) in [
        ("flow", [&native[..], &["host"]].concat()),
        ("host", native.to_vec()),
        ("onnx", libtorch.to_vec()),
        ("cluster", vec!["flow", "host", "onnx", "ort"]),
        ("exporter", libtorch.to_vec()),
        ("sampler", libtorch.to_vec()),
        ("tests", [&libtorch[..], &["ort"]].concat()),
    ] {
        let found = dependencies(package);
        let programs = programs.iter().filter(|&&program| program != package);
        for name in forbidden.iter().chain(programs) {
            assert!(!found.contains(*name), "{package} depends on {name}");
        }
    }
    let trainer = dependencies("trainer");
    assert!(trainer.contains("tch") && trainer.contains("torch_sys"), "names have changed");
    assert!(dependencies("sampler").contains("ort"), "names have changed");
}

/// Libraries that a program cannot start without.
fn needed_libraries(program: &Path) -> Vec<String> {
    let bytes = fs::read(program).unwrap();
    let file = object::File::parse(&*bytes).unwrap();
    let libraries = file.import_libraries().unwrap();
    libraries.map(|library| String::from_utf8_lossy(library.unwrap().name()).into_owned()).collect()
}

#[test]
fn programs_need_only_their_own_libraries() {
    for program in Program::ALL {
        let path = program.proper();
        let needed = needed_libraries(&path);
        let bytes = fs::metadata(&path).unwrap().len();
        println!("{}: {:.1} MB, needs {}", program.name(), bytes as f64 / 1e6, needed.join(" "));
        assert!(needed.iter().any(|library| library.starts_with("libc.so")), "{needed:?}");
        let needs = |part: &str| needed.iter().any(|library| library.contains(part));
        assert_eq!(needs("torch") || needs("c10"), program == Program::Train, "{needed:?}");
        for part in ["python", "onnxruntime", "cuda"] {
            assert!(!needs(part), "{} needs {part}: {needed:?}", program.name());
        }
    }
}

/// A program must not look for code where somebody else may put it, nor know the machine it was built on.
#[test]
fn libraries_are_looked_for_beside_the_program() {
    for program in Program::ALL {
        let bytes = fs::read(program.proper()).unwrap();
        let file = ElfFile64::<Endianness>::parse(&*bytes).unwrap();
        let endian = file.endian();
        let table = file.elf_section_table().dynamic_table(endian, &*bytes).unwrap();
        let paths: Vec<String> = table
            .iter()
            .filter(|entry| [DT_RPATH, DT_RUNPATH].contains(&entry.tag))
            .map(|entry| String::from_utf8_lossy(table.string(entry).unwrap()).into())
            .collect();
        assert_eq!(paths.is_empty(), program != Program::Train, "{}: {paths:?}", program.name());
        for folder in paths.iter().flat_map(|paths| paths.split(':')) {
            assert!(folder.starts_with("$ORIGIN"), "{}: {paths:?}", program.name());
        }
    }
}

/// Rust sources of all packages, relative to the repository.
fn sources() -> Vec<PathBuf> {
    let files = PACKAGES.iter().flat_map(|package| {
        files_below(&root().join(package)).into_iter().map(|file| Path::new(package).join(file))
    });
    let files: Vec<PathBuf> =
        files.filter(|file| file.extension().is_some_and(|extension| extension == "rs")).collect();
    assert!(files.len() > 60, "{} sources", files.len());
    files
}

/// A pipe or a device that is read like a file has no end, and a large one fills the memory.
#[test]
fn files_are_opened_by_one_function() {
    let owners = ["flow/src/checkpoint.rs", "flow/src/disk.rs"];
    let opens = [" File::open(", "fs::File::open(", "fs::read(", "fs::read_to_string("];
    let (mut others, mut n_owned) = (Vec::new(), 0);
    for file in sources() {
        let name = file.display().to_string();
        if !name.contains("/src/") || name.contains("tests") || name.starts_with("benches") {
            continue;
        }
        let text = fs::read_to_string(root().join(&file)).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        let here = |line: &&str| opens.iter().any(|open| line.contains(open));
        let found = code.lines().filter(here).filter(|line| !line.contains("\"/proc/"));
        if owners.contains(&&*name) {
            n_owned += found.count();
        } else {
            others.extend(found.map(|line| format!("{name}: {}", line.trim())));
        }
    }
    assert!(n_owned > 4, "only {n_owned} were found");
    assert!(others.is_empty(), "not by flow::checkpoint:\n{}", others.join("\n"));
}

/// libtorch keeps its first answer to how many GPUs there are, which is none until its libraries for them are open.
#[test]
fn gpus_are_counted_where_their_libraries_are_opened() {
    let owners = ["trainer/src/tensor/device.rs", "cluster/src/bin/cluster-rank.rs"];
    let calls = ["Cuda::", "has_cuda(", "cuda_if_available("];
    let asks = |file: &PathBuf| {
        let text = fs::read_to_string(root().join(file)).unwrap();
        let code = text.replace("Device::Cuda", "");
        calls.iter().any(|call| code.contains(call))
    };
    let sources = sources().into_iter().filter(|file| !file.starts_with("tests"));
    let found: BTreeSet<String> =
        sources.filter(asks).map(|file| file.display().to_string()).collect();
    assert_eq!(found, owners.map(str::to_owned).into());
}

/// Name and number of lines of each function, by the indentation that rustfmt gives.
fn functions(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let indentation = &line[..line.len() - code.len()];
        let Some((before, after)) = code.split_once("fn ") else { continue };
        let qualifiers = before.split_whitespace().all(|word| {
            word.starts_with("pub") || ["const", "async", "unsafe", "extern"].contains(&word)
        });
        let has_body = !code.ends_with(';') && !code.ends_with('}');
        if !qualifiers || !has_body {
            continue;
        }
        let close = format!("{indentation}}}");
        let length = lines[start..].iter().position(|line| *line == close).map_or(0, |n| n + 1);
        let name = after.split(['(', '<']).next().unwrap_or_default();
        found.push((name.to_owned(), length));
    }
    found
}

#[test]
fn files_and_functions_are_short() {
    let mut long = Vec::new();
    let mut excused = BTreeSet::new();
    let mut n_functions = 0;
    for file in sources() {
        let text = fs::read_to_string(root().join(&file)).unwrap();
        let (name, n_lines) = (file.display().to_string(), text.lines().count());
        if n_lines > FILE_LINES {
            long.push(format!("{name} has {n_lines} lines"));
        }
        for (function, length) in functions(&text) {
            n_functions += 1;
            if length <= FUNCTION_LINES {
                continue;
            }
            match LONG_FUNCTIONS.iter().find(|&&known| known == (name.as_str(), function.as_str()))
            {
                Some(known) => _ = excused.insert(known),
                None => long.push(format!("{name}: {function} has {length} lines")),
            }
        }
    }
    assert!(long.is_empty(), "too long:\n{}", long.join("\n"));
    assert!(n_functions > 500, "only {n_functions} functions were found");
    assert_eq!(excused.len(), LONG_FUNCTIONS.len(), "an exception is no longer needed");
}

#[test]
fn function_lengths_are_counted() {
    let text = "impl A {\n    pub(crate) fn one() {\n        two();\n    }\n}\n\nfn two() {}\n\
                const fn three(\n    a: u8,\n) -> u8 {\n    a\n}\n";
    assert_eq!(functions(text), [("one".to_owned(), 3), ("three".to_owned(), 5)]);
}

#[test]
fn every_preset_says_what_it_is_and_ships() {
    let of_trainer = sources().into_iter().filter(|file| file.starts_with("trainer/src"));
    let program: String =
        of_trainer.map(|file| fs::read_to_string(root().join(file)).unwrap()).collect();
    for kind in ["presets", "algorithms"] {
        let folder = root().join("trainer").join(kind);
        let files = files_below(&folder);
        assert!(!files.is_empty());
        for file in files {
            let text = fs::read_to_string(folder.join(&file)).unwrap();
            let (name, stem) = (file.display(), file.file_stem().unwrap_or_default().display());
            let says =
                text.lines().next().and_then(|line| line.strip_prefix("# ")).unwrap_or_default();
            assert!(says.len() > 20, "{name} does not begin with a comment that says what it is");
            let (by_path, by_name) = (format!("{kind}/{name}"), format!("\"{stem}\""));
            let ships = program.contains(&by_path) || program.contains(&by_name);
            assert!(ships, "{name} is not in the program");
        }
    }
}

/// Which rooms of a package (a top module with all below it) name which others, outside of their tests.
type Rooms = BTreeMap<String, BTreeSet<String>>;

fn rooms(package: &str) -> Rooms {
    let src = Path::new(package).join("src");
    let files = sources().into_iter().filter_map(|file| {
        let module = file.strip_prefix(&src).ok()?.with_extension("");
        let mut module: Vec<String> =
            module.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        module.pop_if(|last| last == "mod");
        let is_root = module.len() == 1 && ["lib", "main", "launch"].contains(&&*module[0]);
        (!is_root).then(|| (module, fs::read_to_string(root().join(file)).unwrap()))
    });
    rooms_of(&files.collect::<Vec<(Vec<String>, String)>>())
}

/// The rooms of modules, given by path and text.
fn rooms_of(modules: &[(Vec<String>, String)]) -> Rooms {
    let mut rooms: Rooms =
        modules.iter().map(|(module, _)| (module[0].clone(), BTreeSet::new())).collect();
    let names: BTreeSet<String> = rooms.keys().cloned().collect();
    let for_tests: Vec<Vec<String>> = modules.iter().flat_map(test_modules).collect();
    for (module, text) in modules {
        if for_tests.iter().any(|tests| module.starts_with(tests)) {
            continue;
        }
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        let named = named_at_the_root(code, module.len()).into_iter();
        let others = named.filter(|name| names.contains(name) && *name != module[0]);
        rooms.get_mut(&module[0]).unwrap().extend(others);
    }
    rooms
}

/// Modules of their own files that `module` has for its tests.
fn test_modules((module, text): &(Vec<String>, String)) -> Vec<Vec<String>> {
    let after = text.split("#[cfg(test)]\n").skip(1);
    let names = after.filter_map(|rest| {
        let line = rest.lines().next()?;
        line.trim_start_matches("pub(crate) ").strip_prefix("mod ")?.strip_suffix(';')
    });
    names.map(|name| [&module[..], &[name.to_owned()]].concat()).collect()
}

/// The first names of paths that start at the package's root, in a module `depth` below it.
fn named_at_the_root(code: &str, depth: usize) -> Vec<String> {
    let from_below = "super::".repeat(depth);
    let starts = ["crate::", &from_below].into_iter().flat_map(|start| code.split(start).skip(1));
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let name =
        |path: &str| path.trim_start().split(|c| !is_name(c)).next().unwrap_or("").to_owned();
    let mut names = Vec::new();
    for rest in starts {
        let Some(list) = rest.strip_prefix('{') else {
            names.push(name(rest));
            continue;
        };
        let (mut open, mut item) = (1, 0);
        for (at, c) in list.char_indices() {
            open = match c {
                '{' => open + 1,
                '}' => open - 1,
                _ => open,
            };
            if open == 0 || (open == 1 && c == ',') {
                names.push(name(&list[item..at]));
                item = at + 1;
            }
            if open == 0 {
                break;
            }
        }
    }
    names
}

/// A way round from a room to itself.
fn circle(rooms: &Rooms) -> Option<Vec<&str>> {
    // What knows nothing but what is already out cannot lie on a circle.
    let mut left: BTreeSet<&str> = rooms.keys().map(String::as_str).collect();
    let open = |room: &str, left: &BTreeSet<&str>| {
        rooms[room].iter().find(|other| left.contains(other.as_str())).map(String::as_str)
    };
    while let Some(room) = left.iter().copied().find(|&room| open(room, &left).is_none()) {
        left.remove(room);
    }
    let mut way = vec![*left.first()?];
    loop {
        let next = open(way[way.len() - 1], &left)?;
        if let Some(start) = way.iter().position(|&room| room == next) {
            return Some([&way[start..], &[next]].concat());
        }
        way.push(next);
    }
}

#[test]
fn no_room_knows_what_is_above_it() {
    for package in PACKAGES {
        let rooms = rooms(package);
        let circle = circle(&rooms).map(|rooms| rooms.join(" → "));
        assert_eq!(circle, None, "{package} has a circle of rooms");
    }
    let rooms = rooms("trainer");
    let found: BTreeSet<&str> = rooms.keys().map(String::as_str).collect();
    assert_eq!(found, BTreeSet::from(TRAINER), "name the trainer's rooms here, from the ground up");
    for (floor, room) in TRAINER.iter().enumerate() {
        for other in &rooms[*room] {
            let is_below = TRAINER[..floor].contains(&other.as_str());
            assert!(is_below, "trainer: {room} names {other}, which stands above it");
        }
    }
    assert!(rooms["run"].contains("algorithm") && rooms["algorithm"].contains("group"));
}

#[test]
fn circles_of_rooms_are_found() {
    let module = |path: &str, text: &str| {
        (path.split("::").map(str::to_owned).collect::<Vec<String>>(), text.to_owned())
    };
    let straight = [
        module("a", "fn f() {}\n#[cfg(test)]\nmod tests {\n    use crate::b;\n}\n"),
        module("a::deep", "use super::near;\n"),
        module("b", "use crate::a::{deep, near};\n#[cfg(test)]\nmod cases;\n"),
        module("b::cases", "use crate::c;\n"),
        module("c", "use crate::{\n    a::{b, deep},\n    b,\n};\n"),
    ];
    let rooms = rooms_of(&straight);
    assert_eq!(rooms["c"], BTreeSet::from(["a".to_owned(), "b".to_owned()]));
    assert_eq!(circle(&rooms), None);
    for text in [
        "use crate::c::x;",
        "use super::super::c;",
        "fn f() { crate::c::x() }",
        "use crate::{c, x};",
    ] {
        let rooms = rooms_of(&[&straight[..], &[module("a::new", text)]].concat());
        assert_eq!(circle(&rooms).map(|way| way.len()), Some(3), "{text}");
    }
}

/// Targets of the Makefile with a description.
fn make_targets() -> BTreeSet<String> {
    let makefile = fs::read_to_string(root().join("Makefile")).unwrap();
    let described = makefile.lines().filter(|line| line.contains(" ## "));
    let targets: BTreeSet<String> =
        described.filter_map(|line| Some(line.split_once(':')?.0.to_owned())).collect();
    let phony = makefile.lines().find_map(|line| line.strip_prefix(".PHONY:")).unwrap();
    for target in phony.split_whitespace() {
        assert!(targets.contains(target), "the Makefile does not describe {target}");
    }
    targets
}

/// A name of three words or more after `::` is a test's.
#[test]
fn tests_that_documents_name_exist() {
    let code: Vec<String> =
        sources().iter().map(|file| fs::read_to_string(root().join(file)).unwrap()).collect();
    let mut n_named = 0;
    for file in files_below(&root().join("docs")) {
        let text = fs::read_to_string(root().join("docs").join(&file)).unwrap_or_default();
        let quoted = text.split('`').skip(1).step_by(2);
        for name in quoted.filter_map(|quoted| quoted.rsplit_once("::")).map(|(_, name)| name) {
            let is_test = name.matches('_').count() > 1
                && name.chars().all(|letter| letter.is_ascii_lowercase() || letter == '_');
            if is_test {
                n_named += 1;
                let declared = format!("fn {name}(");
                let is_there = code.iter().any(|code| code.contains(&declared));
                assert!(is_there, "{}: no test {name}", file.display());
            }
        }
    }
    assert!(n_named > 20, "{n_named}");
}

#[test]
fn the_readme_names_what_exists() {
    let readme = fs::read_to_string(root().join("README.md")).expect("README.md");
    let targets = make_targets();
    let mut named = BTreeSet::new();
    // Commands stand in code: in backticks, or at the start of a line of a block.
    let commands =
        readme.split('`').flat_map(str::lines).filter_map(|text| text.strip_prefix("make "));
    for target in commands.flat_map(|rest| rest.split_whitespace().take(1)) {
        let target = target.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
        assert!(targets.contains(target), "README.md names `make {target}`, which does not exist");
        named.insert(target.to_owned());
    }
    for target in ["demo", "test", "parity"] {
        assert!(named.contains(target), "README.md does not name `make {target}`");
    }
}

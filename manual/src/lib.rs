//! Shell completions and manual pages of a program, made from the arguments that it takes.
//!
//! `PROGRAM --manual DIR` writes them, which help does not list: it is for whoever packs a release.

pub mod says;

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Command, ValueEnum};
use clap_complete::Shell;

/// The flag, alone and before a folder.
const FLAG: &str = "--manual";

/// Writes what [`write`] does where this process was told to, and says how it ends.
pub fn written(command: Command) -> Option<ExitCode> {
    let mut words = env::args_os().skip(1);
    (words.next()? == FLAG).then_some(())?;
    let folder = PathBuf::from(words.next()?);
    match write(command, &folder) {
        Ok(_) => Some(ExitCode::SUCCESS),
        Err(error) => {
            eprintln!("error: cannot write into {}: {error}", folder.display());
            Some(ExitCode::FAILURE)
        }
    }
}

/// Writes completions for every shell, under the names that shells look for, and a page for the
/// program and for each of its commands into `folder`; returns their names.
///
/// # Errors
/// When a file cannot be written.
pub fn write(command: Command, folder: &Path) -> io::Result<Vec<PathBuf>> {
    fs::create_dir_all(folder)?;
    let name = command.get_name().to_owned();
    let mut written = Vec::new();
    for shell in Shell::value_variants() {
        written.push(clap_complete::generate_to(*shell, &mut command.clone(), &name, folder)?);
    }
    clap_mangen::generate_to(command.disable_help_subcommand(true), folder)?;
    let pages = fs::read_dir(folder)?.filter_map(|entry| Some(entry.ok()?.path()));
    written.extend(pages.filter(|path| {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        file.starts_with(&name) && file.ends_with(".1")
    }));
    written.sort();
    Ok(written)
}

#[cfg(test)]
mod tests {
    use clap::Arg;

    use super::*;

    #[test]
    fn every_shell_and_command_has_its_file() -> io::Result<()> {
        let command = Command::new("ng-fox")
            .arg(Arg::new("seed").long("seed").help("Seed of the fox"))
            .subcommand(Command::new("run").about("Runs"));
        let folder = env::temp_dir().join(format!("ng-manual-{}", std::process::id()));
        let names: Vec<String> = write(command, &folder)?
            .iter()
            .map(|path| path.file_name().unwrap_or_default().to_string_lossy().into_owned())
            .collect();
        for name in ["ng-fox.bash", "_ng-fox", "ng-fox.fish", "ng-fox.1", "ng-fox-run.1"] {
            assert!(names.iter().any(|known| known == name), "{name} is not in {names:?}");
        }
        let page = fs::read_to_string(folder.join("ng-fox.1"))?;
        assert!(page.contains("Seed of the fox"), "{page}");
        fs::remove_dir_all(folder)
    }
}

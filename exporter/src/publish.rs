//! Which folders an export may take the place of.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};

use crate::description;

/// Refuses `target` when something is there, unless it is an earlier export that `replace` gives up.
pub(crate) fn check_target(target: &Path, replace: bool) -> Result<()> {
    let shown = target.display();
    let Ok(found) = target.symlink_metadata() else { return Ok(()) };
    ensure!(replace, "{shown} exists: choose another --out, or replace it with --force");
    ensure!(found.is_dir(), "{shown} is not a folder: choose another --out");
    let is_empty = fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_none());
    ensure!(
        is_empty || target.join(description::FILE).is_file(),
        "{shown} is not replaced: it is no earlier export (no {}): choose another --out",
        description::FILE
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_earlier_export_is_replaced_and_on_request_only() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("export");
        check_target(&target, false).unwrap();
        fs::create_dir(&target).unwrap();
        check_target(&target, true).unwrap();
        let message = check_target(&target, false).unwrap_err().to_string();
        assert!(message.contains("--force"), "{message}");
        fs::write(target.join("cat.png"), "").unwrap();
        let message = check_target(&target, true).unwrap_err().to_string();
        assert!(message.contains("no earlier export"), "{message}");
        fs::write(target.join(description::FILE), "").unwrap();
        check_target(&target, true).unwrap();
    }
}

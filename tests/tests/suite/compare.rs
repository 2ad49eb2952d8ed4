//! `ng-train compare` on the embedded model, as short as can be: every run, its report, and nothing twice.

use std::fs;
use std::path::Path;

use tests::program::{Ended, Program};

const TABLES: &str = "tables=[{title = 'Two', runs = [{name = 'one'}, \
                      {name = 'other', settings = ['algorithm=mix-grpo']}]}]";
const SETTINGS: &str = "settings=[\"prompts_per_iteration=1\", \"group_size=4\", \"judges=[]\", \
                        \"iterations=1000\", \"save_every=1000\", \
                        \"rewards=[{name='jpeg', kind='jpeg', prefer='small', weight=1.0}]\"]";

/// A comparison in `home`, in its folder `out`.
fn compare(home: &Path, more: &[&str]) -> Ended {
    let prompts = home.join("prompts.txt");
    fs::write(&prompts, "red \"CAT\"\nblue \"DOG\"\n").unwrap();
    let [output, prompts] = [("output", &home.join("out")), ("prompts", &prompts)]
        .map(|(key, path)| format!("{key}={}", path.display()));
    let mut arguments = vec!["compare", "--preset", "signs", "--jobs", "2"];
    let settings = [&[&*output, &prompts, SETTINGS, TABLES, "hacked=[]"], more].concat();
    arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    Program::Train.run(arguments)
}

#[test]
fn seeds_are_paired_and_passes_end_runs() {
    let home = tempfile::tempdir().unwrap();
    let more = ["seeds=[0, 1]", "passes=120", "images=2", "validate_every=1"];
    compare(home.path(), &more).succeeded();
    let report = fs::read_to_string(home.path().join("out/report.md")).unwrap();
    // 4 images with 8 steps, and 4 of 4 that train; MixGRPO's 25 and 4.
    for part in ["| one | 2 | 8.0 | 4.00", "| other | 1 | 25.0 | 4.00", "| seeds to tell 0.05 |"] {
        assert!(report.contains(part), "`{part}` is not in\n{report}");
    }
    assert!(home.path().join("out/two-work.png").is_file());
}

#[test]
fn runs_are_laid_side_by_side_and_none_is_made_twice() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    let compare = |minutes: &str| compare(home.path(), &["seeds=[0]", minutes]);
    compare("minutes=0.001").succeeded();
    let report = fs::read_to_string(out.join("report.md")).unwrap();
    for part in ["| before |", "## Two", "| one | 1 |", "| other | 1 |", "two-seconds.png"] {
        assert!(report.contains(part), "`{part}` is not in\n{report}");
    }
    for file in ["two-seconds.png", "two-work.png", "side-by-side/side-by-side.png"] {
        assert!(out.join(file).is_file(), "{file}");
    }
    let weights =
        out.join("runs/one-seed0/aligned/transformer/diffusion_pytorch_model.safetensors");
    let made = fs::metadata(&weights).unwrap().modified().unwrap();
    compare("minutes=0.001").succeeded();
    assert_eq!(fs::metadata(&weights).unwrap().modified().unwrap(), made);
    let refused = compare("minutes=1");
    assert_eq!(refused.status.code(), Some(1));
    assert!(refused.stderr.contains("other settings"), "{}", refused.stderr);
}

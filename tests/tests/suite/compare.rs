//! `ng-train compare` on the embedded model, as short as can be: every run, its report, and nothing twice.

use std::collections::BTreeMap;
use std::fs::{self, DirEntry};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use serde_json::Value;
use tests::program::{Ended, Program};

const TABLES: &str = "tables=[{title = 'Two', runs = [{name = 'one'}, \
                      {name = 'other', settings = ['algorithm=mix-grpo']}]}]";
const SETTINGS: &str = "settings=[\"prompts_per_iteration=1\", \"group_size=4\", \"judges=[]\", \
                        \"iterations=1000\", \"save_every=1000\", \
                        \"rewards=[{name='jpeg', kind='jpeg', prefer='small', weight=1.0}]\"]";

/// A comparison in `home`, in its folder `out`.
fn compare(home: &Path, more: &[&str]) -> Ended {
    Ended::after(&mut command(home, more))
}

fn command(home: &Path, more: &[&str]) -> Command {
    let prompts = home.join("prompts.txt");
    fs::write(&prompts, "red \"CAT\"\nblue \"DOG\"\n").unwrap();
    let [output, prompts] = [("output", &home.join("out")), ("prompts", &prompts)]
        .map(|(key, path)| format!("{key}={}", path.display()));
    let mut arguments = vec!["compare", "--preset", "signs", "--jobs", "2"];
    let settings = [&[&*output, &prompts, SETTINGS, TABLES, "hacked=[]"], more].concat();
    arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    Program::Train.command(arguments)
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

/// Scores and curve of every run, without what the clock says.
fn runs(home: &Path) -> BTreeMap<String, (Value, Vec<Value>)> {
    let runs = fs::read_dir(home.join("out/runs")).unwrap();
    let of = |run: DirEntry| {
        let read = |file: &str| fs::read_to_string(run.path().join(file)).unwrap_or_default();
        let scores: Value = serde_json::from_str(&read("eval/eval.json")).unwrap();
        let mut curve: Vec<Value> = read("validation.jsonl")
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        for record in &mut curve {
            let record = record.as_object_mut().unwrap();
            record.retain(|name, _| name != "wall" && name != "seconds/validation");
        }
        (run.file_name().into_string().unwrap(), (scores[0]["per_prompt"].clone(), curve))
    };
    runs.map(|run| of(run.unwrap())).collect()
}

#[test]
fn what_is_interrupted_goes_on_to_the_same_scores() {
    let [whole, stopped] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let more = ["seeds=[0, 1]", "passes=600", "validate_every=2"];
    compare(whole.path(), &more).succeeded();
    let mut child = command(stopped.path(), &more);
    let mut child = child.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let under_way = stopped.path().join("out/runs/one-seed0/metrics.jsonl");
    while fs::metadata(&under_way).map_or(0, |file| file.len()) == 0 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was stopped");
        sleep(Duration::from_millis(5));
    }
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.trim_end().ends_with("the same command goes on with the rest"), "{said}");
    assert!(!stopped.path().join("out/report.md").exists());
    compare(stopped.path(), &more).succeeded();
    let [whole, stopped] = [whole.path(), stopped.path()].map(runs);
    assert_eq!(whole.len(), 5);
    assert_eq!(whole, stopped);
}

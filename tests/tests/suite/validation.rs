//! Held-out prompts while a run goes on: what they say is what `ng-train eval` says, the best checkpoint stays, and
//! patience ends.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tests::fixture::files_below;
use tests::program::{Ended, Program, typed};

use crate::align::Run;
use crate::trust::server;

/// The records of a run's validations.
pub(crate) fn validations(run: &Run) -> Vec<BTreeMap<String, f64>> {
    let text = fs::read_to_string(run.folder().join("validation.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Means of `metric` by `ng-train eval`, a model each.
fn evaluated(models: [&Path; 2], prompts: &Path, out: &Path, metric: &str) -> Vec<f64> {
    let mut arguments = vec!["eval".to_owned(), "--preset".into(), "signs".into()];
    arguments.extend(["--set".into(), "judges=[]".into(), "--prompts".into(), typed(prompts)]);
    arguments.extend(["--set".into(), "rollout.steps=4".into(), "--out".into(), typed(out)]);
    arguments.extend(models.iter().flat_map(|model| ["--model".into(), typed(model)]));
    Program::Train.run(arguments).succeeded();
    let text = fs::read_to_string(out.join("eval.json")).unwrap();
    let columns: Vec<Value> = serde_json::from_str(&text).unwrap();
    let of = |column: &Value| {
        let means = column["means"].as_array().unwrap().clone();
        let of_metric = means.into_iter().find(|pair| pair[0] == metric).unwrap();
        of_metric[1].as_f64().unwrap()
    };
    columns.iter().map(of).collect()
}

#[test]
fn a_validation_is_what_eval_says_and_the_best_checkpoint_stays() {
    let run = Run::new();
    let prompts = run.home().join("held-out.txt");
    fs::write(&prompts, "red \"CAT\"\nblue \"DOG\"\ngreen \"ANT\"\n").unwrap();
    // Before the first iteration, and after each.
    let (address, answering) = server("127.0.0.1:0", 5, |call, _| [0.1, 0.2, 0.9, 0.3, 0.4][call]);
    let judges = format!(
        "judges=[{{name='far', kind='server', url='http://{address}/', weight=0, retries=0, patience=0}}]"
    );
    let validation = format!("validation={{prompts='{}', count=3, best='far'}}", typed(&prompts));
    let more =
        ["iterations=4", "validate_every=1", "save_every=100", "keep=1", &judges, &validation];
    let ended =
        Ended::after(&mut run.command(&[&more[..], &["optimizer.learning_rate=1e-3"]].concat()));
    assert!(ended.stderr.contains("held out after 2: "), "{}", ended.stderr);
    assert_eq!(ended.stderr.matches("the best so far").count(), 2, "{}", ended.stderr);
    ended.succeeded();
    answering.join().unwrap();

    let found = validations(&run);
    let steps: Vec<f64> = found.iter().map(|record| record["step"]).collect();
    assert_eq!(steps, [0.0, 1.0, 2.0, 3.0, 4.0]);
    let judged: Vec<f64> = found.iter().map(|record| record["validation/far"]).collect();
    assert!(judged.iter().zip([0.1, 0.2, 0.9, 0.3, 0.4]).all(|(a, b)| (a - b).abs() < 1e-12));
    let best = run.folder().join("best");
    assert_eq!(fs::read_link(&best).unwrap(), PathBuf::from("checkpoints/iteration-000002"));
    let kept: Vec<usize> = (1..=4).filter(|&i| run.checkpoint(i).exists()).collect();
    assert_eq!(kept, [2, 4]);

    let (aligned, out) = (run.folder().join("aligned"), run.home().join("eval"));
    let scored = evaluated([&best, &aligned], &prompts, &out, "ocr");
    for (record, scored) in [&found[2], &found[4]].into_iter().zip(scored) {
        let held_out = record["validation/ocr"];
        assert!((held_out - scored).abs() < 1e-5 * held_out.abs(), "{held_out} {scored}");
    }
    assert_ne!(found[2]["validation/ocr"], found[4]["validation/ocr"]);

    let names = files_below(&run.folder());
    let events = names.iter().find(|name| name.to_string_lossy().contains("tfevents")).unwrap();
    let events = fs::read(run.folder().join(events)).unwrap();
    for tag in ["settings/text_summary", "optimizer/learning_rate", "validation/far"] {
        assert!(events.windows(tag.len()).any(|part| part == tag.as_bytes()), "no {tag}");
    }
}

/// A judge that sees no difference.
#[test]
fn patience_ends_a_run_as_if_it_were_its_last_iteration() {
    let run = Run::new();
    let more = [
        "validate_every=1",
        "judges=[{name='same', kind='constant', value=1, weight=0}]",
        "validation={count=1, best='same', patience=2}",
    ];
    for arguments in [&[][..], &["--resume"]] {
        let ended = Ended::after(run.command(&more).args(arguments));
        assert!(ended.stderr.contains("no better same in 2 validations"), "{}", ended.stderr);
        ended.succeeded();
        assert_eq!(run.metrics().len(), 2);
        assert!(run.folder().join("aligned").is_dir() && !run.folder().join("best").exists());
    }
}

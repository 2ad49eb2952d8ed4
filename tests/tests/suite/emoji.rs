//! The emoji model and the CLIPs that come with it: what it draws is what it was told, by both.

use std::fs;
use std::path::Path;

use serde::Deserialize;
use tests::program::{Program, typed};

/// Prompts that are drawn.
const COUNT: usize = 16;

/// One line of `ng-train score`.
#[derive(Deserialize)]
struct Scored {
    scores: Scores,
}

#[derive(Deserialize)]
struct Scores {
    clip: f64,
    judge_clip: f64,
}

/// Mean scores of the pictures in `folder` for `prompts`: the reward's and the judge's.
fn scored(home: &Path, folder: &Path, prompts: &[&str]) -> [f64; 2] {
    let file = home.join("scored.txt");
    fs::write(&file, prompts.join("\n")).unwrap();
    let arguments = ["score", "--preset", "emoji", "--prompts", &typed(&file), &typed(folder)];
    let told = Program::Train.run(arguments).succeeded();
    let lines: Vec<Scored> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), COUNT, "{told}");
    let mean = |of: fn(&Scores) -> f64| {
        lines.iter().map(|line| of(&line.scores)).sum::<f64>() / COUNT as f64
    };
    [mean(|scores| scores.clip), mean(|scores| scores.judge_clip)]
}

#[test]
fn pictures_show_what_was_asked_for() {
    let home = tempfile::tempdir().unwrap();
    let known =
        fs::read_to_string(tests::fixture::root().join("assets/prompts/emoji-train.txt")).unwrap();
    let stride = known.lines().count() / COUNT;
    let mut prompts: Vec<&str> = known.lines().step_by(stride).take(COUNT).collect();
    let [file, out] = ["prompts.txt", "eval"].map(|name| home.path().join(name));
    fs::write(&file, prompts.join("\n")).unwrap();
    let arguments = ["eval", "--preset", "emoji", "--model", "assets/emoji", "--prompts"];
    let places = [&typed(&file), "--out", &typed(&out)].map(str::to_owned);
    Program::Train.run(arguments.map(str::to_owned).into_iter().chain(places)).succeeded();
    let pictures = fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().path());
    let pictures = pictures.into_iter().find(|path| path.is_dir()).unwrap();
    let right = scored(home.path(), &pictures, &prompts);
    prompts.rotate_left(1);
    let wrong = scored(home.path(), &pictures, &prompts);
    for ((name, right), wrong) in ["reward", "judge"].iter().zip(right).zip(wrong) {
        assert!(
            right > wrong + 0.2,
            "{name}: {right:.3} for its own prompts, {wrong:.3} for others"
        );
    }
}

//! `ng-train score` on images whose scores are known: rendered words, and files whose sizes as JPEG come
//! from Pillow.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde::Deserialize;
use tests::fixture::root;
use tests::program::{Ended, Program, typed};

/// One line of the output.
#[derive(Deserialize)]
struct Scored {
    image: String,
    scores: BTreeMap<String, f64>,
}

/// A line of a rendered folder's `metadata.jsonl`.
#[derive(Deserialize)]
struct Sign {
    file_name: String,
    text: String,
}

fn command(images: &[String], prompt: &str, settings: &[&str]) -> Command {
    let mut command = Program::Train.command(["score", "--preset", "signs", "--prompt", prompt]);
    for setting in settings {
        command.args(["--set", setting]);
    }
    command.args(images);
    command
}

/// Scores by name of each image, in order.
fn score(images: &[String], prompt: &str, settings: &[&str]) -> Vec<BTreeMap<String, f64>> {
    let told = Ended::after(&mut command(images, prompt, settings)).succeeded();
    let lines: Vec<Scored> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().map(|line| &line.image).eq(images), "{told}");
    lines.into_iter().map(|line| line.scores).collect()
}

#[test]
fn a_picture_scores_best_for_what_it_shows() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("signs");
    Program::Train.run(["signs", &typed(&folder), "-n", "40"]).succeeded();
    let list = fs::read_to_string(folder.join("metadata.jsonl")).unwrap();
    let signs: Vec<Sign> = list.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of_ink = |ink: &str| signs.iter().find(|sign| sign.text.starts_with(ink)).unwrap();
    let signs = ["red", "blue"].map(of_ink);
    let images = signs.map(|sign| typed(&folder.join(&sign.file_name)));
    for (own, other) in [(0, 1), (1, 0)] {
        let scores = score(&images, &signs[own].text, &[]);
        assert_eq!(scores[own].len(), 4, "rewards and judges: {scores:?}");
        for (name, own_at_least, other_at_most) in [
            ("ocr", -0.5, -2.0),
            ("colour", 0.9, 0.1),
            ("exact", 1.0, 0.0),
            ("judge_exact", 1.0, 0.0),
        ] {
            let (found, others) = (scores[own][name], scores[other][name]);
            assert!(found >= own_at_least, "{name} of {}: {found}", signs[own].text);
            assert!(others <= other_at_most, "{name} of what is not {}: {others}", signs[own].text);
        }
    }
}

/// A folder's pictures and as many prompts, in the order of their names.
#[test]
fn a_folder_is_scored_by_a_file_of_prompts() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("signs");
    Program::Train.run(["signs", &typed(&folder), "-n", "6"]).succeeded();
    let list = folder.join("metadata.jsonl");
    let asked = |prompts: &str| {
        let arguments = ["score", "--preset", "signs", "--set", "judges=[]", "--prompts", prompts];
        Program::Train.run([&arguments[..], &[&typed(&folder.join("000"))]].concat())
    };
    let ended = asked(&typed(&list));
    assert!(ended.stderr.contains("means of 6 images: ocr "), "{}", ended.stderr);
    let told = ended.succeeded();
    let lines: Vec<Scored> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 6);
    assert!(lines.is_sorted_by_key(|line| &line.image));
    assert!(lines.iter().all(|line| line.scores["ocr"] > -0.5), "{told}");
    // Twice as many images as prompts: two of each.
    let texts = fs::read_to_string(&list).unwrap();
    let half: Vec<&str> = texts.lines().step_by(2).collect();
    fs::write(home.path().join("half.jsonl"), half.join("\n")).unwrap();
    let told = asked(&typed(&home.path().join("half.jsonl"))).succeeded();
    let halves: Vec<Scored> = told.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    for (index, (line, own)) in halves.iter().zip(&lines).enumerate() {
        assert_eq!(line.scores["ocr"] == own.scores["ocr"], index % 2 == 0, "{index}: {told}");
    }
    fs::write(home.path().join("four.jsonl"), texts.lines().take(4).collect::<Vec<_>>().join("\n"))
        .unwrap();
    let ended = asked(&typed(&home.path().join("four.jsonl")));
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stderr.contains("4 prompts, but there are 6 images"), "{}", ended.stderr);
}

#[test]
fn jpeg_kilobytes_are_those_of_pillow() {
    let folder = root().join("trainer/src/reward/fixtures/jpeg");
    let sizes = fs::read(folder.join("sizes.json")).unwrap();
    let sizes: BTreeMap<String, BTreeMap<u8, f64>> = serde_json::from_slice(&sizes).unwrap();
    let images: Vec<String> =
        sizes.keys().map(|name| typed(&folder.join(format!("{name}.png")))).collect();
    let rewards = "rewards=[{name='large', kind='jpeg', prefer='large', weight=1}, \
                   {name='small', kind='jpeg', quality=50, prefer='small', weight=1}]";
    let scores = score(&images, "any", &[rewards, "judges=[]"]);
    assert_eq!(scores.len(), 3);
    for (scores, (name, kb)) in scores.iter().zip(&sizes) {
        for (found, expected) in [(scores["large"], kb[&95]), (-scores["small"], kb[&50])] {
            assert!((found / expected - 1.0).abs() < 0.002, "{name}: {found}, Pillow {expected}");
        }
    }
}

#[test]
fn one_corrupt_image_is_one_line_and_nothing_is_scored() {
    let home = tempfile::tempdir().unwrap();
    let whole = root().join("trainer/src/reward/fixtures/jpeg/waves.png");
    let torn: PathBuf = home.path().join("torn.png");
    let bytes = fs::read(&whole).unwrap();
    fs::write(&torn, &bytes[..bytes.len() / 2]).unwrap();
    let ended = Ended::after(&mut command(&[typed(&whole), typed(&torn)], "red \"CAT\"", &[]));
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
    let says = format!("error: cannot read {}: ", torn.display());
    let is_one_line = ended.stderr.lines().count() == 1;
    assert!(ended.stderr.starts_with(&says) && is_one_line, "{}", ended.stderr);
    assert_eq!(ended.stdout, "");
}

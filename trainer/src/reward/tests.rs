//! What happens to a group when a reward fails.

use std::sync::atomic::{AtomicU32, Ordering};

use std::path::{Path, PathBuf};

use super::*;

/// A model that `make runtime` installs.
pub(super) fn installed(name: &str) -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors()
        .map(|folder| folder.join(".runtime/models").join(name))
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("{name} is not installed: run `make runtime`"))
}

/// Fails `n_failures` times in one of the ways a reward can fail, then scores by width.
struct Flaky {
    n_failures: AtomicU32,
    fault: Fault,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    Error,
    Nan,
    Infinity,
    ShortList,
    LongList,
}

impl Reward for Flaky {
    fn score(&self, _prompts: &[&Prompt], images: &[&RgbImage]) -> Result<Vec<f64>> {
        let mut scores: Vec<_> = images.iter().map(|image| f64::from(image.width())).collect();
        let fails = self
            .n_failures
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if fails.is_ok() {
            match self.fault {
                Fault::Error => return Err(anyhow!("the judge is out")),
                Fault::Nan => scores[0] = f64::NAN,
                Fault::Infinity => scores[0] = f64::INFINITY,
                Fault::ShortList => drop(scores.pop()),
                Fault::LongList => scores.push(0.0),
            }
        }
        Ok(scores)
    }
}

fn flaky(fault: Fault, n_failures: u32, required: bool) -> Entry {
    Entry {
        name: "flaky".into(),
        weight: 1.0,
        required,
        retries: 2,
        patience: Duration::ZERO,
        reward: Arc::new(Flaky { n_failures: n_failures.into(), fault }),
    }
}

fn steady() -> Entry {
    let reward = Arc::new(Constant { value: 7.0 });
    let (retries, patience) = (0, Duration::ZERO);
    Entry { name: "steady".into(), weight: 0.5, required: true, retries, patience, reward }
}

fn score(entries: Vec<Entry>, threads: usize, n_images: u32) -> Result<Scores> {
    let mut rewards = Rewards::new(entries, threads)?;
    rewards.first_pause = Duration::from_millis(1);
    let prompt = Prompt::new("red \"SUN\"");
    let images: Vec<_> = (1..=n_images).map(|width| RgbImage::new(width, 1)).collect();
    rewards.score(&vec![&prompt; images.len()], &images.iter().collect::<Vec<_>>())
}

const FAULTS: [Fault; 5] =
    [Fault::Error, Fault::Nan, Fault::Infinity, Fault::ShortList, Fault::LongList];

#[test]
fn a_passing_fault_is_retried() {
    for fault in FAULTS {
        let scores = score(vec![flaky(fault, 2, true)], 1, 3).unwrap();
        let outcome = &scores.outcomes[0];
        assert_eq!(outcome.scores.as_deref(), Some(&[1.0, 2.0, 3.0][..]), "{fault:?}");
        assert_eq!((outcome.failures, outcome.retries), (2, 2));
        assert!(outcome.error.is_some() && outcome.seconds >= 0.003, "{outcome:?}");
    }
}

#[test]
fn a_lasting_fault_leaves_an_optional_reward_out() {
    for fault in FAULTS {
        let scores = score(vec![flaky(fault, 3, false), steady()], 1, 3).unwrap();
        let [flaky, steady] = &scores.outcomes[..] else { panic!("two rewards") };
        assert_eq!(flaky.scores, None, "{fault:?}");
        assert_eq!((flaky.failures, flaky.retries), (3, 2));
        assert!(flaky.error.is_some());
        assert_eq!(steady.scores.as_deref(), Some(&[7.0; 3][..]));
        assert_eq!((steady.failures, steady.retries, steady.error.as_ref()), (0, 0, None));
    }
}

#[test]
fn a_lasting_fault_of_a_required_reward_ends_the_run() {
    let expected = [
        (Fault::Error, "the judge is out"),
        (Fault::Nan, "as NaN"),
        (Fault::Infinity, "as inf"),
        (Fault::ShortList, "2 scores for 3 images"),
        (Fault::LongList, "4 scores for 3 images"),
    ];
    for (fault, reason) in expected {
        let error = score(vec![steady(), flaky(fault, 3, true)], 1, 3).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains("reward \"flaky\" failed, attempts: 3"), "{error}");
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn order_and_scores_do_not_depend_on_threads() {
    for n_images in [0, 1, 2, 7, 12] {
        let widths: Vec<_> = (1..=n_images).map(f64::from).collect();
        for threads in [1, 2, 3, 16] {
            let scores = score(vec![flaky(Fault::Error, 0, true)], threads, n_images).unwrap();
            assert_eq!(scores.outcomes[0].scores.as_deref(), Some(&widths[..]));
        }
    }
}

#[test]
fn one_failing_part_fails_the_attempt() {
    let scores = score(vec![flaky(Fault::Nan, 1, true)], 4, 8).unwrap();
    assert_eq!((scores.outcomes[0].failures, scores.outcomes[0].retries), (1, 1));
    assert_eq!(scores.outcomes[0].scores.as_ref().unwrap().len(), 8);
}

#[test]
fn bad_configurations_are_refused() {
    let config = |name: &str, kind| RewardConfig {
        name: name.into(),
        weight: 1.0,
        std_floor: 0.0,
        required: true,
        retries: 0,
        patience: 0.0,
        kind,
    };
    let error = |configs: &[RewardConfig]| match Rewards::open(configs, 1, Device::Cpu) {
        Ok(_) => panic!("{configs:?} was accepted"),
        Err(error) => format!("{error:#}"),
    };
    assert!(error(&[]).contains("at least one reward"));
    let colour = || config("colour", RewardKind::Colour {});
    assert!(error(&[colour(), colour()]).contains("two rewards are named \"colour\""));
    let heavy = RewardConfig { weight: f64::INFINITY, ..colour() };
    assert!(error(&[heavy]).contains("weight"));
    for (config, part) in [
        (RewardConfig { std_floor: f64::NAN, ..colour() }, "std_floor"),
        (RewardConfig { std_floor: -1.0, ..colour() }, "std_floor"),
        (RewardConfig { patience: -1.0, ..colour() }, "patience"),
        (RewardConfig { patience: f64::NAN, ..colour() }, "patience"),
        (RewardConfig { retries: u32::MAX, ..colour() }, "retries"),
    ] {
        assert!(error(&[config]).contains(part), "{part}");
    }
    let jpeg = RewardKind::Jpeg { quality: 0, prefer: JpegSize::Small };
    assert!(error(&[config("size", jpeg)]).contains("`quality` is 0"));
    let ocr = RewardKind::Ocr {
        model: "absent.onnx".into(),
        characters: None,
        detector: None,
        measure: Measure::LogProb,
    };
    let absent = error(&[config("spelling", ocr)]);
    assert!(absent.contains("\"spelling\"") && absent.contains("absent.onnx"), "{absent}");
    let rewards = Rewards::open(&[colour()], 1, Device::Cpu).unwrap();
    let refused = format!("{:#}", rewards.check(&[&Prompt::new("\"SUN\"")], None).unwrap_err());
    assert!(refused.contains("reward \"colour\"") && refused.contains("no colour"), "{refused}");
    let weights: Vec<_> = rewards.weights().collect();
    assert_eq!(weights, [("colour", 1.0)]);

    let other = config("other", RewardKind::Colour {});
    let beside = rewards.open_beside(&[other, colour()], 1, Device::Cpu).unwrap();
    let is_shared =
        |index: usize| Arc::ptr_eq(&rewards.entries[0].reward, &beside.entries[index].reward);
    assert!(!is_shared(0) && is_shared(1));
}

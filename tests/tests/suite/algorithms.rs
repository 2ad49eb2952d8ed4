//! Every algorithm through the same loop, by changing one line: on the embedded model, as short as can be.

use std::fs;

use tests::fixture::root;
use tests::program::Ended;

use crate::align::{MODEL, Run, WEIGHTS, same_tensors};

/// A reward that costs nothing, and a rate at which two iterations can be seen.
const CHEAP: [&str; 3] = [
    "rewards=[{name = 'jpeg', kind = 'jpeg', prefer = 'small', weight = 1.0}]",
    "judges=[]",
    "optimizer.learning_rate=1e-4",
];
const ALGORITHMS: [&str; 19] = [
    "neighbor",
    "neighbor-plus",
    "neighbor-paper-literal",
    "neighbor-sde-matched",
    "neighbor-ar-copo",
    "dance-grpo",
    "flow-grpo",
    "flow-grpo-fast",
    "mix-grpo",
    "mix-grpo-flash",
    "mix-grpo-flash-star",
    "branch-grpo",
    "diffusion-nft",
    "flow-dppo",
    "v-grpo",
    "awm",
    "dgpo",
    "refl",
    "draft-lv",
];
/// Those that follow gradients of rewards, which a JPEG's size has none of.
const DIRECT: [&str; 2] = ["refl", "draft-lv"];

fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&CHEAP[..], more].concat()
}

#[test]
fn one_line_changes_the_algorithm() {
    for name in ALGORITHMS.into_iter().filter(|name| !DIRECT.contains(name)) {
        let run = Run::new();
        let algorithm = format!("algorithm={name}");
        let mut settings = with(&["iterations=2", &algorithm]);
        if name.starts_with("mix-") || name == "flow-grpo-fast" {
            settings.push("sde.window.size=2");
        }
        Ended::after(&mut run.command(&settings)).succeeded();
        let before = root().join(MODEL).join(WEIGHTS);
        assert!(!same_tensors(&before, &run.folder().join("aligned").join(WEIGHTS)), "{name}");
        let steps = run.metrics();
        assert_eq!(steps.len(), 2);
        for step in &steps {
            assert!(step.values().all(Option::is_some), "{name}: {step:?}");
            let is_neighbor = name.starts_with("neighbor");
            let is_nft = name == "diffusion-nft";
            let has_ratios = !is_nft && name != "dgpo";
            for (metric, there) in [
                ("policy/objective", true),
                ("policy/log_ratio_first", has_ratios),
                ("policy/log_ratio_max", has_ratios),
                ("policy/clip_fraction_high", !is_nft),
                ("policy/clip_fraction_low", !is_nft),
                ("policy/p_anchor", is_neighbor),
                ("policy/entropy", is_neighbor),
                ("policy/from_old", is_nft),
                ("policy/preference", name == "dgpo"),
                ("optimizer/grad_norm", true),
                ("optimizer/below_eps", true),
                ("advantage/norm", true),
                ("advantage/flat_groups", true),
                ("reward/jpeg", true),
                ("reward_std/jpeg", true),
                ("nfe/rollout", true),
                ("nfe/update", true),
            ] {
                assert_eq!(step.contains_key(metric), there, "{name}: {metric} in {step:?}");
            }
        }
    }
}

#[test]
fn a_reward_without_gradient_is_refused_by_name() {
    for name in DIRECT {
        let run = Run::new();
        let algorithm = format!("algorithm={name}");
        let ended = Ended::after(&mut run.command(&with(&["iterations=2", &algorithm])));
        assert_eq!(ended.status.code(), Some(2), "{}", ended.stderr);
        assert!(ended.stderr.contains("\"jpeg\" has no gradient"), "{}", ended.stderr);
    }
}

#[test]
fn an_unknown_algorithm_is_named_with_those_there_are() {
    let run = Run::new();
    let ended = Ended::after(&mut run.command(&["algorithm=dance"]));
    assert_eq!(ended.status.code(), Some(2), "{}", ended.stderr);
    for known in ALGORITHMS {
        assert!(ended.stderr.contains(known), "{known} is not in: {}", ended.stderr);
    }
}

/// What an algorithm holds besides weights and optimiser survives: a policy of the past, the weights a run
/// started from, the position of a window.
#[test]
fn every_state_resumes_to_the_bit() {
    let cases: [&[&str]; 6] = [
        &["algorithm=dgpo", "updates=2", "dgpo.lag_rate=0.1", "dgpo.reference=start"],
        &["algorithm=diffusion-nft", "nft.decay_rate=0.05"],
        &["algorithm=awm", "updates=2", "train_steps=2", "matching.lag_rate=0.1"],
        &[
            "algorithm=mix-grpo-flash",
            "rollout.steps=6",
            "sde.window.size=2",
            "sde.window.interval=1",
        ],
        &["algorithm=flow-grpo", "sde.kl=0.1"],
        &["algorithm=branch-grpo", "branch.prune_depths=[3]", "branch.prune_interval=1"],
    ];
    for settings in cases {
        let with_total = |n: &'static str| with(&[settings, &[n]].concat());
        let (whole, halves) = (Run::new(), Run::new());
        Ended::after(&mut whole.command(&with_total("iterations=4"))).succeeded();
        Ended::after(&mut halves.command(&with_total("iterations=2"))).succeeded();
        fs::remove_dir_all(halves.folder().join("aligned")).unwrap();
        let mut resumed = halves.command(&with_total("iterations=4"));
        Ended::after(resumed.arg("--resume")).succeeded();
        assert_eq!(whole.metrics(), halves.metrics(), "{settings:?}");
        let [a, b] =
            [&whole, &halves].map(|run| run.checkpoint(4).join("training_state.safetensors"));
        assert!(same_tensors(&a, &b), "{settings:?}");
    }
}

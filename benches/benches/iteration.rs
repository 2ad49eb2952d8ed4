//! Seconds of an alignment iteration, paper Table 3 in small: DanceGRPO with 25 steps of which 14 train,
//! and Neighbor GRPO with DDIM rollouts of 25 steps and every member an anchor, against Neighbor GRPO with
//! DPM-Solver++ 2M rollouts of 8 steps and 4 anchors of 12. All over the same prompts and model; the
//! reward is the size as JPEG, so that hardly any time goes into it, and its seconds are left out. One
//! thread, so that other work on the machine disturbs little.

use anyhow::{Context, Result};
use benches::align::{Cost, FOUR_GROUPS, measure};
use benches::{program, table};

/// Iterations measured after one that warms up.
const ITERATIONS: usize = 5;
const SETTINGS: [(&str, &[&str]); 3] = [
    ("DanceGRPO, 25 steps, B 12, K 14", &["algorithm=dance-grpo", "rollout.steps=25"]),
    (
        "Neighbor, DDIM 25 steps, B 12, K 4",
        &["rollout.solver=euler", "rollout.steps=25", "anchors=12", "updates=12", "train_steps=4"],
    ),
    ("Neighbor, DPM++ 2M 8 steps, B 4, K 4", &["updates=4"]),
];

fn main() -> Result<()> {
    let folder = tempfile::tempdir().context("cannot make a folder for the runs")?;
    let model = program::root().join(program::model());
    let costs = SETTINGS
        .iter()
        .enumerate()
        .map(|(index, (name, settings))| {
            let settings = [&FOUR_GROUPS[..], settings].concat();
            measure(&model, &settings, ITERATIONS, &folder.path().join(index.to_string()))
                .with_context(|| format!("cannot measure {name}"))
        })
        .collect::<Result<Vec<Cost>>>()?;
    let (fast, slow) = costs.split_last().context("no settings")?;
    let mut rows: Vec<[String; 6]> = SETTINGS
        .iter()
        .zip(&costs)
        .map(|((name, _), Cost { nfe: [old, new], seconds: [rollout, update, all], .. })| {
            [
                (*name).to_owned(),
                format!("{old:.0}"),
                format!("{new:.2}"),
                format!("{rollout:.3}"),
                format!("{update:.3}"),
                format!("{all:.3}"),
            ]
        })
        .collect();
    let times = |a: f64, b: f64| format!("{:.1}×", a / b);
    for ((name, _), slow) in SETTINGS.iter().zip(slow) {
        let [old, new] = [0, 1].map(|i| times(slow.nfe[i], fast.nfe[i]));
        let [rollout, update, all] = [0, 1, 2].map(|i| times(slow.seconds[i], fast.seconds[i]));
        rows.push([format!("{name}: ratio"), old, new, rollout, update, all]);
    }
    println!("\nan iteration of 48 images on one thread, median of {ITERATIONS}, without rewards");
    table::print(["", "NFE old", "NFE θ", "rollout s", "update s", "iteration s"], &rows);
    Ok(())
}

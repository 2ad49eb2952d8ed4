//! Seconds of an iteration of Neighbor GRPO by several ranks of one thread each, over Gloo, against one process with
//! as many threads, and against one thread: the embedded model and a random one of 36 M parameters, whose states or
//! whose weights, too, are divided. All take turns; the reward is the size as JPEG and its seconds are left out.
//! More ranks than processors share them.

use anyhow::{Context, Result};
use benches::align::{FOUR_GROUPS, Team, measure_of};
use benches::{median, program, table, variant};
use serde_json::json;

/// Iterations measured after one that warms up, and turns.
const ITERATIONS: usize = 2;
const TURNS: usize = 3;
const TEAMS: [(&str, Team, &str); 7] = [
    ("1 thread", Team { ranks: 1, threads: 1 }, "states"),
    ("2 threads", Team { ranks: 1, threads: 2 }, "states"),
    ("2 ranks", Team { ranks: 2, threads: 1 }, "states"),
    ("4 ranks", Team { ranks: 4, threads: 1 }, "states"),
    ("1 thread, weights divided", Team { ranks: 1, threads: 1 }, "all"),
    ("2 ranks, weights divided", Team { ranks: 2, threads: 1 }, "all"),
    ("4 ranks, weights divided", Team { ranks: 4, threads: 1 }, "all"),
];

fn main() -> Result<()> {
    let home = tempfile::tempdir().context("cannot make a folder for the runs")?;
    let wide = home.path().join("wide");
    variant::random(
        &wide,
        &[
            ("transformer", "num_attention_heads", json!(8)),
            ("transformer", "attention_head_dim", json!(64)),
            ("transformer", "axes_dims_rope", json!([8, 28, 28])),
            ("transformer", "num_layers", json!(2)),
            ("transformer", "num_single_layers", json!(4)),
        ],
    )?;
    for (name, model) in [
        ("the embedded model", program::root().join(program::model())),
        ("a random model of 36 M parameters", wide),
    ] {
        let mut seconds = vec![Vec::new(); TEAMS.len()];
        for turn in 0..TURNS {
            for (index, (team_name, team, shard)) in TEAMS.into_iter().enumerate() {
                let folder = home.path().join(format!("{turn}-{index}"));
                let shard = format!("ranks.shard={shard}");
                let settings = [&FOUR_GROUPS[..], &["updates=1", &*shard]].concat();
                let cost = measure_of(team, &model, &settings, ITERATIONS, &folder)
                    .with_context(|| format!("cannot measure {team_name}"))?;
                std::fs::remove_dir_all(&folder).context("cannot remove a run")?;
                seconds[index].push(cost.seconds);
            }
        }
        let of = |index: usize, stage: usize| {
            median(&seconds[index].iter().map(|turn: &[f64; 3]| turn[stage]).collect::<Vec<f64>>())
        };
        let row = |(index, (name, ..)): (usize, (&str, Team, &str))| {
            let [rollout, update, all] = [0, 1, 2].map(|stage| format!("{:.3}", of(index, stage)));
            let ratio = |other: usize| format!("{:.2}×", of(other, 2) / of(index, 2));
            let of_update = format!("{:.2}×", of(0, 1) / of(index, 1));
            [name.to_owned(), rollout, update, all, ratio(0), ratio(1), of_update]
        };
        println!("\n{name}: 48 images, median of {TURNS} turns of {ITERATIONS} iterations");
        table::print(
            [
                "",
                "rollout s",
                "update s",
                "iteration s",
                "against 1 thread",
                "2 threads",
                "update, 1 thread",
            ],
            &TEAMS.into_iter().enumerate().map(row).collect::<Vec<_>>(),
        );
    }
    Ok(())
}

//! What [`AlignConfig::ignores`] says of settings, held against what an iteration computes.

use std::path::Path;

use cluster::Group;
use flow::prompts::Prompt;
use tch::{Kind, Tensor};

use super::config::AlignConfig;
use super::schema::Schema;
use super::settings::{ALIGN_PRESETS, Source, read};
use super::update;
use crate::algorithm;
use crate::algorithm::cases::follows_rewards;
use crate::group::experience::{Sources, gather};
use crate::network::optimizer::AdamW;
use crate::reward::{Rewards, tiny};
use crate::tensor::device::Compute;

/// Another value of every setting that some algorithm does not read.
const OTHERS: [(&str, &str); 65] = [
    ("sigma", "0.7"),
    ("anchors", "2"),
    ("updates", "1"),
    ("train_steps", "2"),
    ("timestep_fraction", "0.3"),
    ("rollout.solver", "'heun'"),
    ("advantage.quasi_norm", "1.5"),
    ("advantage.rescale", "false"),
    ("advantage.limit", "0.5"),
    ("neighbor.distance", "'sum'"),
    ("neighbor.tau", "0.5"),
    ("neighbor.clip", "0.5"),
    ("neighbor.candidates", "'one-step'"),
    ("neighbor.steps", "'last'"),
    ("sde.noise", "'cps'"),
    ("sde.level", "0.55"),
    ("sde.same_start", "false"),
    ("sde.clip", "0.5"),
    ("sde.divergence", "1.0"),
    ("sde.kl", "0.1"),
    ("sde.guard", "true"),
    ("sde.truncate", "true"),
    ("sde.compress", "0.5"),
    ("sde.window.strategy", "'random'"),
    ("sde.window.size", "2"),
    ("sde.window.stride", "2"),
    ("sde.window.interval", "3"),
    ("sde.window.interval_min", "20"),
    ("sde.window.threshold", "0"),
    ("sde.window.rate", "0.9"),
    ("sde.window.within", "0.2"),
    ("branch.splits", "[0, 1, 4]"),
    ("branch.split_noise", "2.0"),
    ("branch.fusion", "'probability'"),
    ("branch.prune_depths", "[4, 5]"),
    ("branch.prune_interval", "100"),
    ("branch.prune_width", "'extremes'"),
    ("branch.prune_share", "0.9"),
    ("nft.mix", "0.5"),
    ("nft.limit", "0.5"),
    ("nft.kl", "0.1"),
    ("nft.decay_rate", "0.2"),
    ("nft.decay_from", "1"),
    ("nft.decay_max", "0.1"),
    ("matching.loss", "'plain'"),
    ("matching.shared_noise", "false"),
    ("matching.squash", "'tanh'"),
    ("matching.limit", "0.7"),
    ("matching.clip", "0.9"),
    ("matching.kl", "0.3"),
    ("matching.lag_kl", "0.5"),
    ("matching.lag_rate", "0.3"),
    ("matching.lag_max", "0.1"),
    ("dgpo.beta", "50.0"),
    ("dgpo.clip", "0.9"),
    ("dgpo.kl", "0.3"),
    ("dgpo.reference", "'start'"),
    ("dgpo.t_min", "0.9"),
    ("dgpo.lag_rate", "0.3"),
    ("dgpo.lag_max", "0.05"),
    ("direct.from", "'noised'"),
    ("direct.late", "0.9"),
    ("direct.draws", "3"),
    ("direct.ceiling", "-1.0"),
    ("sde.window", "{strategy = 'progressive', size = 2}"),
];

/// Runs that between them read everything.
const RUNS: [&[&str]; 13] = [
    &["algorithm=neighbor", "updates=2"],
    &["algorithm=dance-grpo", "updates=2"],
    &["algorithm=mix-grpo", "updates=2", "sde.window.size=1"],
    &["algorithm=mix-grpo", "updates=2", "sde.window.size=1", "sde.window.strategy=decay"],
    &[
        "algorithm=mix-grpo",
        "updates=2",
        "sde.window.size=1",
        "sde.window.strategy=exp-decay",
        "sde.window.threshold=1",
    ],
    &["algorithm=branch-grpo", "group_size=8", "updates=2"],
    &[
        "algorithm=branch-grpo",
        "group_size=8",
        "updates=2",
        "branch.prune_depths=[5]",
        "branch.prune_width=best",
    ],
    &["algorithm=diffusion-nft", "updates=2", "nft.decay_rate=0.1"],
    &["algorithm=flow-dppo", "updates=2", "sde.same_start=true"],
    &["algorithm=v-grpo", "updates=2", "matching.squash=clip"],
    &[
        "algorithm=awm",
        "updates=2",
        "train_steps=3",
        "matching.shared_noise=true",
        "matching.clip=0.01",
        "matching.lag_rate=0.1",
    ],
    &["algorithm=dgpo", "updates=2", "dgpo.lag_rate=0.1", "dgpo.t_min=0.3"],
    &["algorithm=refl", "updates=2"],
];

const JPEG: &str = "rewards=[{name = 'jpeg', kind = 'jpeg', prefer = 'small', weight = 1.0}]";

/// Iterations before the one that is computed: windows have moved, depths are pruned elsewhere.
const ITERATION: usize = 69;

/// `networks` are rewards that have gradients, which some algorithms follow.
fn config(settings: &[String], networks: &str) -> anyhow::Result<AlignConfig> {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tiny-flux/pipeline");
    let mut named = settings.iter().filter_map(|setting| setting.strip_prefix("algorithm="));
    let rewards = if named.any(follows_rewards) { networks } else { JPEG };
    let common = [
        rewards,
        "group_size=4",
        "seed=2",
        "rollout.steps=7",
        "rollout.size=[32, 32]",
        "optimizer.learning_rate=1e-3",
        "optimizer.eps=1e-12",
        &format!("model={}", model.display()),
    ];
    let all: Vec<String> =
        common.iter().map(|&s| s.to_owned()).chain(settings.iter().cloned()).collect();
    let config: AlignConfig = read(&Source::Preset("signs"), &ALIGN_PRESETS, &all)?;
    config.validate()?;
    Ok(config)
}

/// Sums over all weights after an iteration or two, and over those that roll out next.
fn computed(config: &AlignConfig) -> Vec<f64> {
    let model = config.load(Compute::CPU, &Group::alone()).unwrap();
    let size = model.latent_size(config.group.rollout.size).unwrap();
    let grid = config.group.rollout.grid(&model.pipeline.scheduler, &size);
    let mut algorithm = config.setting().unwrap().open(grid);
    algorithm.begin(model.engine.trained());
    let rewards = Rewards::open(&config.group.rewards, 1, tch::Device::Cpu).unwrap();
    let (group, model, rewards, watch) = (&config.group, &model, &rewards, &());
    let sources = Sources { config: group, model, rewards, size, watch };
    let prompt = Prompt::new("red \"CAT\"");
    let mut optimizer = AdamW::new(config.optimizer.clone(), &[model.engine.trained()]);
    // Weights that an algorithm keeps differ from those of the start after one.
    let n_iterations = 1 + usize::from(algorithm.kept().is_some());
    for iteration in ITERATION..ITERATION + n_iterations {
        let rollout = algorithm.rollout(iteration).unwrap();
        let experience = gather(&sources, rollout, &[&prompt], iteration).unwrap();
        update::run(config, &*algorithm, &sources, &mut optimizer, &experience, None, &|| false)
            .unwrap();
        algorithm.finish(model.engine.trained(), optimizer.n_steps()).unwrap();
    }
    let sums = || {
        let sum = |master: &Tensor| master.to_kind(Kind::Double).abs().sum(Kind::Double);
        model.engine.trained().masters().map(|m| sum(m).double_value(&[])).collect::<Vec<f64>>()
    };
    let mut sums_of_both = sums();
    if let Some(copies) = algorithm.kept() {
        copies.exchange(model.engine.trained());
        sums_of_both.extend(sums());
    }
    sums_of_both
}

#[test]
fn every_setting_is_read_or_is_said_not_to_be() {
    let (_weights, clip) = tiny::clip();
    let config = |settings: &[String]| config(settings, &clip);
    let mut read_somewhere = Vec::new();
    for run in RUNS {
        let base: Vec<String> = run.iter().map(|&s| s.to_owned()).collect();
        let expected = computed(&config(&base).unwrap());
        assert_eq!(expected, computed(&config(&base).unwrap()), "{run:?} can be repeated");
        let mut unread = base.clone();
        let same = toml::to_string(&config(&base).unwrap()).unwrap();
        for (key, value) in OTHERS {
            let changed = [&base[..], &[format!("{key}={value}")]].concat();
            // A window that is not there has no settings.
            let Ok(other) = config(&changed) else { continue };
            if toml::to_string(&other).unwrap() == same {
                continue;
            }
            if other.ignores(key).unwrap().is_some() {
                unread.push(format!("{key}={value}"));
                continue;
            }
            read_somewhere.push(key);
            assert_ne!(expected, computed(&other), "{run:?}: {key} = {value} changes nothing");
        }
        let found = computed(&config(&unread).unwrap());
        assert_eq!(expected, found, "{run:?}: one of {:?} is read", &unread[base.len()..]);
    }
    for (key, _) in OTHERS {
        assert!(read_somewhere.contains(&key), "no run reads {key}");
    }
    let runs: Vec<AlignConfig> =
        algorithm::all().map(|(name, _)| config(&[format!("algorithm={name}")]).unwrap()).collect();
    for entry in Schema::of::<AlignConfig>().entries() {
        let differs = runs.iter().any(|run| run.ignores(&entry.key).unwrap().is_some());
        let is_table = entry.takes == "a table";
        let is_known = OTHERS.iter().any(|(key, _)| *key == entry.key);
        assert!(!differs || is_table || is_known, "{} needs another value here", entry.key);
    }
}

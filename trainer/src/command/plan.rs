//! What a run will cost before it starts: parameters, network calls, operations, and on 1 to 512 ranks memory,
//! bytes that cross, seconds and what limits them.

mod choice;
mod cost;
mod ranks;

use std::fmt;

use anyhow::Result;
use flow::latents::LatentSize;
use flow::ops::shapes::{Manifest, Shapes};
use flow::pipeline::{Component, Pipeline};
use flow::schedule::Grid;
use flow::tokens::Tokenizers;

pub(super) use self::choice::settle;
use self::cost::Iteration;
use self::ranks::Ranks;
use crate::algorithm;
use crate::network::engine::segments;
use crate::network::lora::{LoraConfig, RANK};
use crate::network::sharding::{Shard, Sharded};
use crate::run::config::AlignConfig;
use crate::run::lock;
use crate::run::ready::Ready;
use crate::tensor::device::{Compute, precision_name};

/// Share of an H800's dense bf16 peak that is reached unless told otherwise.
pub(super) const UTILISATION: f64 = 0.4;
/// Bytes of a number in compute and in storage of trajectories.
const BF16: f64 = 2.0;
const F32: f64 = 4.0;
/// Of the machines that ranks are tabulated for.
pub(super) const GPUS_A_NODE: usize = 8;

/// What is planned for.
pub struct Options<'a> {
    /// The run.
    pub config: &'a AlignConfig,
    /// The model, a folder or a published one.
    pub pipeline: &'a Pipeline,
    /// T5 tokens a prompt.
    pub text_tokens: usize,
    /// Rank of the adapters in the LoRA columns.
    pub lora_rank: usize,
    /// Share of an H800's dense bf16 peak that is reached.
    pub utilisation: f64,
}

/// Prints the plan.
///
/// # Errors
/// When the configuration is invalid or its size does not fit the model.
pub fn run(options: &Options<'_>) -> Result<()> {
    print!("{}", Report { plan: &Plan::new(options)?, options });
    Ok(())
}

/// Checks what a run needs without loading it, and prints its plan.
///
/// # Errors
/// When the model, the prompts or a file of a reward cannot be used.
pub(super) fn dry(config: &AlignConfig, compute: Compute) -> Result<()> {
    let ready = Ready::read(config)?;
    ready.check_light(config)?;
    lock::check(&config.output)?;
    let pipeline = &ready.pipeline;
    Component::ALL.iter().try_for_each(|component| pipeline.weights(*component).map(drop))?;
    if let Some(lora) = &config.lora {
        lora.manifests(lora.open(pipeline)?.as_ref(), &segments(&pipeline.transformer))?;
    }
    println!(
        "{} prompts; {} in {}\n",
        ready.prompts.len(),
        if compute.device.is_cuda() { "cuda" } else { "cpu" },
        precision_name(compute.kind)
    );
    print!("{}", toml::to_string(&config.resolved()?)?);
    println!();
    let lora_rank = config.lora.as_ref().map_or(RANK, |lora| lora.rank);
    let text_tokens = Tokenizers::open(&config.model, None)?.text_tokens();
    let utilisation = UTILISATION;
    run(&Options { config, pipeline, text_tokens, lora_rank, utilisation })
}

/// Counts that do not depend on the number of ranks.
struct Plan {
    size: LatentSize,
    components: Vec<(Component, f64)>,
    /// Parameters of the transformer and of its largest segment.
    transformer: f64,
    largest_segment: f64,
    segments: f64,
    /// Parameters of the adapters.
    adapters: f64,
    /// Operations of one velocity of one image.
    velocity: f64,
    /// Blocks of the transformer.
    n_blocks: f64,
    /// Numbers one image keeps for backward: in one block, and as inputs of all blocks.
    in_block: f64,
    block_inputs: f64,
    /// The same in the decoder, where gradients go through it.
    in_decoder: f64,
    /// Passes an image: forward alone; forward and backward.
    nfe: [f64; 2],
    /// Other values of the weights that the algorithm keeps: as many as it asks of what trains.
    n_copies: f64,
    /// Images an iteration.
    images: f64,
    /// Numbers of one image's trajectory.
    trajectory: f64,
}

impl Plan {
    fn new(options: &Options<'_>) -> Result<Self> {
        let Options { config, pipeline, text_tokens, .. } = *options;
        config.validate()?;
        let size = config.group.rollout.latent_size(pipeline)?;
        let grid = config.group.rollout.grid(&pipeline.scheduler, &size);
        let nfe = passes(config, grid)?;
        let n_copies = config.setting()?.open(grid).n_references() as f64;
        let shapes = Shapes::new();
        pipeline.dry_velocity(&shapes, 1, size.tokens(), text_tokens);
        let segments = segments(&pipeline.transformer);
        let elements = |component| pipeline.manifest(component).n_elements() as f64;
        let network = &pipeline.transformer;
        let tokens = (size.tokens() + text_tokens) as f64;
        let lora = LoraConfig { rank: options.lora_rank, ..LoraConfig::default() };
        let group = config.group.group_size as f64;
        let follows_rewards = config.setting()?.follows_rewards();
        Ok(Self {
            components: Component::ALL.map(|c| (c, elements(c))).to_vec(),
            transformer: elements(Component::Transformer),
            segments: segments.len() as f64,
            largest_segment: segments.iter().map(Manifest::n_elements).max().unwrap_or(0) as f64,
            adapters: segments.iter().map(|s| lora.manifest(s).n_elements()).sum::<usize>() as f64,
            velocity: shapes.flops(),
            n_blocks: network.n_blocks() as f64,
            in_block: shapes.kept() / network.n_blocks() as f64,
            block_inputs: tokens * network.width() as f64 * network.n_blocks() as f64,
            in_decoder: if follows_rewards { kept_in_decoder(pipeline, &size) } else { 0.0 },
            nfe,
            n_copies,
            images: config.group.prompts_per_iteration as f64 * group,
            trajectory: (2.0 * nfe[0] + 1.0) * size.len() as f64,
            size,
        })
    }

    /// Operations of an iteration; backward costs two forwards, or one where only adapters train, and
    /// recomputation one more.
    fn flops(&self, config: &AlignConfig, lora: bool, shard: Shard) -> f64 {
        let backward = if lora { 1.0 } else { 2.0 };
        let update = 1.0 + backward + f64::from(u8::from(recomputes(config, shard)));
        self.images * self.velocity * (self.nfe[0] + self.nfe[1] * update)
    }

    /// Bytes on each of `ranks` beside the network's, whose numbers have so many `bytes`: activations and
    /// trajectories.
    fn working(&self, config: &AlignConfig, shard: Shard, ranks: usize, bytes: f64) -> [f64; 2] {
        let at_once = if recomputes(config, shard) { 1.0 } else { self.n_blocks };
        let batch = config.group.rollout.batch as f64;
        let activations = bytes * batch * (self.block_inputs + self.in_block * at_once);
        let groups = (config.group.prompts_per_iteration as f64 / ranks as f64).ceil();
        let trajectories = F32 * groups * config.group.group_size as f64 * self.trajectory;
        // The decoder computes in f32, an image at a time, when the network's pass is there.
        [activations + F32 * self.in_decoder, trajectories]
    }

    /// The network on several ranks, `node` a machine, of which the adapters train or all.
    fn sharded(&self, config: &AlignConfig, lora: bool, shard: Shard, node: usize) -> Sharded {
        Sharded {
            shard,
            node,
            weights: self.transformer,
            trained: if lora { self.adapters } else { self.transformer },
            largest_segment: self.largest_segment,
            is_adapted: lora,
            bytes: BF16,
            has_average: config.optimizer.ema > 0.0,
            n_copies: self.n_copies,
        }
    }

    /// An iteration of so many `prompts` on `world` ranks.
    fn iteration(
        &self,
        options: &Options<'_>,
        sharded: Sharded,
        prompts: usize,
        world: usize,
    ) -> Result<Iteration> {
        let config = options.config;
        let scale = prompts as f64 / config.group.prompts_per_iteration as f64;
        // A rank makes one at least, however few its images.
        let batches = (scale * self.images / config.group.rollout.batch as f64).max(world as f64);
        let is_spread = prompts < world;
        let velocities = self.nfe[0] * scale * self.images * self.size.len() as f64;
        Ok(Iteration {
            sharded,
            segments: self.segments,
            flops: scale * self.flops(config, sharded.is_adapted, sharded.shard),
            passes: self.nfe.map(|passes| passes * batches),
            steps: config.setting()?.n_updates as f64,
            gathers: if is_spread { config.group.rollout.steps as f64 } else { 0.0 },
            gathered: if is_spread { F32 * velocities } else { 0.0 },
        })
    }
}

/// Whether backward computes blocks again, which it always does where they are put together for their use.
fn recomputes(config: &AlignConfig, shard: Shard) -> bool {
    config.recompute || config.stream || matches!(shard, Shard::All | Shard::Node)
}

/// Numbers that decoding one image of `size` keeps for backward.
fn kept_in_decoder(pipeline: &Pipeline, size: &LatentSize) -> f64 {
    let dry = Shapes::new();
    pipeline.vae.decode(&dry, &vec![1, size.channels, size.height, size.width]);
    dry.kept()
}

/// Network passes an image, forward alone and forward with backward, on the time grids of `grid`.
fn passes(config: &AlignConfig, grid: Grid) -> Result<[f64; 2]> {
    let algorithm = config.setting()?.open(grid);
    algorithm::nfe(&*algorithm, config.group.group_size, config.iterations)
}

/// A plan as people read it.
struct Report<'a> {
    plan: &'a Plan,
    options: &'a Options<'a>,
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { plan, options } = self;
        let Options { config, text_tokens, lora_rank, pipeline, .. } = options;
        let factor = pipeline.vae.factor();
        writeln!(
            f,
            "{}, {}×{} pixels, {} image and {text_tokens} text tokens\n",
            pipeline.dir.display(),
            plan.size.width * factor,
            plan.size.height * factor,
            plan.size.tokens(),
        )?;
        writeln!(f, "{:<24}{:>16}{:>10}", "component", "parameters", "bf16 GB")?;
        let mut row =
            |name: &str, n: f64| writeln!(f, "{name:<24}{n:>16.0}{:>10.2}", BF16 * n / 1e9);
        for (component, n) in &plan.components {
            row(component.folder(), *n)?;
        }
        row(&format!("adapters of rank {lora_rank}"), plan.adapters)?;
        let [rollout, update] = plan.nfe;
        writeln!(
            f,
            "\na velocity of one image: {:.1} TFLOP\n\
             an iteration: {} images, each {rollout} forward passes in the rollout and {update:.2} \
             forward and backward in the updates\n\
             together {:.1} PFLOP, with adapters {:.1}",
            plan.velocity / 1e12,
            plan.images,
            plan.flops(config, false, config.ranks.shard) / 1e15,
            plan.flops(config, true, config.ranks.shard) / 1e15,
        )?;
        write!(f, "{}", Ranks { plan, options })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::settings::{ALIGN_PRESETS, Source, read};

    fn plan(preset: &str) -> (AlignConfig, Plan) {
        let config: AlignConfig = read(&Source::Preset(preset), &ALIGN_PRESETS, &[]).unwrap();
        let pipeline = Pipeline::known("flux.1-dev").unwrap();
        let options = Options {
            config: &config,
            pipeline: &pipeline,
            text_tokens: 512,
            lora_rank: 64,
            utilisation: 0.4,
        };
        let plan = Plan::new(&options).unwrap();
        (config, plan)
    }

    #[test]
    fn where_weights_are_divided_blocks_are_computed_again_and_one_is_held() {
        let (mut config, plan) = plan("neighbor");
        let of = |config: &AlignConfig, shard| {
            (plan.flops(config, false, shard), plan.working(config, shard, 8, BF16)[0])
        };
        let again = of(&config, Shard::States);
        config.recompute = false;
        let kept = of(&config, Shard::States);
        assert!(kept.0 < again.0 && kept.1 > again.1);
        assert_eq!([Shard::All, Shard::Node].map(|shard| of(&config, shard)), [again; 2]);
    }

    /// 23.2 kB a pixel were measured, from 128x128 to 256x256.
    #[test]
    fn the_way_back_through_the_decoder_counts_where_it_is_gone() {
        assert_eq!(plan("neighbor").1.in_decoder, 0.0);
        let found = F32 * plan("refl").1.in_decoder / f64::from(720 * 720);
        assert!((found / 23.2e3 - 1.0).abs() < 0.1, "{found}");
    }

    /// Paper Table 3, and what the others' settings come to.
    #[test]
    fn passes_are_those_of_the_papers_table_3() {
        let (_, plan) = plan("neighbor");
        assert_eq!(plan.images, 384.0);
        let grid = flow::schedule::Shift::Factor(3.0).into();
        let ddim = ["rollout.solver=euler", "rollout.steps=25", "anchors=12", "train_steps=4"];
        let many = ["rollout.steps=16", "train_steps=9"];
        let cases: [(&str, &[&str], [f64; 2]); 9] = [
            ("dance-grpo", &[], [25.0, 14.0]),
            ("neighbor", &ddim, [25.0, 4.0]),
            ("neighbor", &many, [16.0, 3.0]),
            ("neighbor", &[], [8.0, 4.0 / 3.0]),
            ("flow-grpo", &[], [6.0, 5.0]),
            ("mix-grpo", &["iterations=25"], [25.0, 4.0]),
            ("mix-grpo-flash-star", &[], [7.0, 4.0]),
            // Printed as 20 and 13.68: all steps of a leaf, those it shares included.
            ("branch-grpo", &[], [203.0 / 16.0, 202.0 / 16.0]),
            ("diffusion-nft", &[], [10.0 + 2.0 * 9.0, 9.0]),
        ];
        for (preset, settings, expected) in cases {
            let settings: Vec<String> = settings.iter().map(|&s| s.to_owned()).collect();
            let config: AlignConfig =
                read(&Source::Preset(preset), &ALIGN_PRESETS, &settings).unwrap();
            let found = passes(&config, grid).unwrap();
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 1e-9, "{preset}: {found} {expected}");
            }
        }
    }
}

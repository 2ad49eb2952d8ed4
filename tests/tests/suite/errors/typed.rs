//! What `ng-train` is told and would pass over.

use tests::program::Program;

use super::{Scratch, mistake};

/// What is typed means something, or is refused.
#[test]
fn ng_train_passes_nothing_over() {
    let align = "align --preset signs --dry-run --set";
    let eval = "eval --preset signs --model @/model --out @/eval --prompts @/empty.txt --set";
    let mistakes = [
        (format!("{align} advantage.limit=0"), &["advantage.limit = 0", "above 0"][..]),
        (format!("{align} advantage.limit=nan"), &["advantage.limit"]),
        (format!("{align} neighbor.tau=inf"), &["neighbor.tau", "above 0"]),
        (format!("{align} rewards.0.name="), &["name", "letters"]),
        (format!("{align} rewards.0.name=../x"), &["../x", "letters"]),
        (
            format!("{align} algorithm=mix-grpo --set sde.window.size=99"),
            &["sde.window.size = 99", "rollout.steps = 25"],
        ),
        (
            format!("{align} algorithm=branch-grpo --set branch.prune_depths=[99]"),
            &["branch.prune_depths", "rollout.steps"],
        ),
        ("pretrain --preset signs --set flow.batch=0".into(), &["flow.batch = 0"]),
        (
            "pretrain --preset signs --set flow.optimizer.ema=2".into(),
            &["flow.optimizer.ema", "below 1"],
        ),
        (
            "pretrain --preset signs --set autoencoder.image_passes=1".into(),
            &["autoencoder.image_passes = 1", "autoencoder.batch"],
        ),
        ("config show --preset pretrain:signs --set flow.batch=0".into(), &["flow.batch = 0"]),
        ("config show --preset compare:signs --set count=0".into(), &["count = 0"]),
        ("convert @/model @/b.safetensors --precision bf16".into(), &["--precision", "convert"]),
        ("plan --model flux.1-dev --preset neighbor --set model=a".into(), &["model=a", "--model"]),
        (
            "plan --model flux.1-dev --preset neighbor --lora-rank 4 --set lora.rank=8".into(),
            &["lora.rank=8", "--lora-rank"],
        ),
        (format!("{eval} model=a"), &["model=a", "--model"]),
        (format!("{eval} seed=1"), &["seed=1", "--seed"]),
        (
            "sample --model @/model --prompt a --out @/a.png --latents-out @/a.png".into(),
            &["@/a.png", "twice"],
        ),
    ];
    let mistakes = mistakes.map(|(line, says)| mistake(line.leak(), 2, says));
    Scratch::new().assert_refused(Program::Train, &mistakes);
}

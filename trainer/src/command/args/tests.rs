//! What the command line refuses, and what it says of it.

use super::*;

fn said(line: &str) -> String {
    let parsed = Cli::try_parse_from(line.split(' '));
    let error = parsed.err().unwrap_or_else(|| panic!("{line:?} is taken"));
    assert_eq!(error.exit_code(), 2, "{line}");
    error.to_string()
}

#[test]
fn numbers_out_of_range_are_refused_by_their_range() {
    for (line, says) in [
        ("sample --model m --prompt a --shift 0", "a number above 0"),
        ("sample --model m --prompt a --shift -1", "a number above 0"),
        ("sample --model m --prompt a --shift inf", "a number above 0"),
        ("sample --model m --prompt a --guidance -1", "a number from 0 to 1000"),
        ("sample --model m --prompt a --guidance nan", "a number from 0 to 1000"),
        ("sample --model m --prompt a --guidance inf", "a number from 0 to 1000"),
        ("sample --model m --prompt a --guidance 1e30", "a number from 0 to 1000"),
        ("sample --model m --prompt a --steps -3", "-3 is not in 1..=1000"),
        ("sample --model m --prompt a --width -16 --height 16", "-16 is not in 1..=67108864"),
        ("sample --model m --prompt a -W 16 -H 0", "0 is not in 1..=67108864"),
        ("sample --model m --prompt a --seed -1", "a whole number from 0"),
        ("sample --model m --prompt a -n -1", "-1 is not in 1..=10000"),
        ("sample --model m --prompt a --lora f:1e40", "1e40 is not from -100 to 100"),
        ("eval --preset signs --prompts p --model m --model f:-101", "not from -100 to 100"),
        ("bench --model m --lora-rank 0", "from 1 to"),
        ("bench --model m --text-tokens 0", "0 is not in 1..=512"),
        ("bench --model m --size 1000000x1000000", "above the limit of 67108864 pixels"),
        ("plan --preset signs --model m --lora-rank 0", "from 1 to"),
        ("plan --preset signs --model m --lora-rank 1000000000", "from 1 to"),
        ("plan --preset signs --model m --text-tokens 0", "0 is not in 1..=512"),
        ("plan --preset signs --model m --text-tokens 1000000000", "is not in 1..=512"),
        ("plan --preset signs --model m --utilisation -1", "above 0 and at most 1"),
        ("consolidate c --out o --shard-gb=-1", "a number from 0.000001"),
        ("consolidate c --out o --shard-gb nan", "a number from 0.000001"),
        ("init --like m --out o --shard-gb 0", "a number from 0.000001"),
        ("signs o --threads -1", "-1 is not in 1..=1024"),
    ] {
        let said = said(&format!("ng-train {line}"));
        assert!(said.contains(says), "{line}: {said}");
    }
}

#[test]
fn settings_of_an_iteration_need_one() {
    for more in ["", " --size 32x32", " --plain", " --stream", " --batch 2 --lora-rank 4"] {
        let said = said(&format!("ng-train bench --model m --set rollout.steps=2{more}"));
        assert!(said.contains("--set <KEY=VALUE>") || said.contains("--iteration"), "{said}");
    }
    let line = "ng-train bench --model m --iteration signs --set rollout.steps=2";
    assert!(Cli::try_parse_from(line.split(' ')).is_ok());
}

#[test]
fn scored_images_show_one_thing_or_the_other() {
    let both = said("ng-train score --preset signs a.png");
    assert!(both.contains("--prompt <TEXT>|--prompts <FILE>"), "{both}");
    said("ng-train score --preset signs a.png --prompt a --prompts b.txt");
}

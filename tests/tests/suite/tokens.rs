//! Token ids of 2,400 prompts against those of transformers: other scripts, emoji, odd spacing, special
//! tokens in the text, very long and empty prompts; CLIP's own vocabulary and a T5 one.

use std::fs;

use flow::checkpoint::Weights;
use flow::tokens::Tokenizers;
use tests::fixture::root;

#[test]
fn what_is_cut_is_counted_whole() {
    let folder = root().join("tests/fixtures/tokenizers/pipeline");
    let tokenizers = Tokenizers::open(&folder, None).unwrap();
    let cut = |words: usize| tokenizers.encode(&vec!["red"; words].join(" ")).unwrap().cut;
    let [few, more, many] = [600, 700, 1600].map(cut);
    for encoder in 0..2 {
        let a_hundred = more[encoder] - few[encoder];
        assert!(few[encoder] > 0 && a_hundred >= 100, "{few:?}, {more:?}");
        assert_eq!(many[encoder] - few[encoder], 10 * a_hundred);
    }
}

#[test]
fn ids_are_those_of_transformers() {
    let folder = root().join("tests/fixtures/tokenizers");
    let prompts = fs::read(folder.join("prompts.json")).unwrap();
    let prompts: Vec<String> = serde_json::from_slice(&prompts).unwrap();
    let tokenizers = Tokenizers::open(&folder.join("pipeline"), None).unwrap();
    let file = Weights::open_file(&folder.join("ids.safetensors")).unwrap();
    let rows = |name: &str| {
        let view = file.get(name).unwrap();
        let numbers = view.bytes.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap()));
        let ids: Vec<i64> = numbers.map(i64::from).collect();
        ids.chunks(view.shape[1]).map(<[i64]>::to_vec).collect::<Vec<_>>()
    };
    let (clip, t5) = (rows("clip"), rows("t5"));
    assert!(prompts.len() >= 2000 && clip.len() == prompts.len() && t5.len() == prompts.len());
    let mut wrong = Vec::new();
    for ((prompt, clip), t5) in prompts.iter().zip(clip).zip(t5) {
        let found = tokenizers.encode(prompt).unwrap();
        for (name, found, expected) in [("CLIP", found.clip, clip), ("T5", found.t5, t5)] {
            if found != expected {
                let at = found.iter().zip(&expected).position(|(a, b)| a != b).unwrap_or(0);
                let prompt: String = prompt.chars().take(60).collect();
                wrong.push(format!(
                    "{name} of {prompt:?}, token {at}: {:?} instead of {:?}",
                    &found[at..found.len().min(at + 4)],
                    &expected[at..expected.len().min(at + 4)]
                ));
            }
        }
    }
    println!("{} prompts, {} rows differ", prompts.len(), wrong.len());
    assert!(
        wrong.is_empty(),
        "{} rows differ:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(30)].join("\n")
    );
}

use std::path::{Path, PathBuf};

use super::*;
use crate::checkpoint::{Entry, write_tensors};
use crate::pipeline::Pipeline;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tiny-flux/pipeline")
}

/// A copy of the fixture in which `component` has only `file`, with `entries` in it.
struct Copy {
    home: tempfile::TempDir,
    pipeline: Pipeline,
}

impl Copy {
    fn with(component: Component, file: &str, entries: &[Entry<'_>]) -> Self {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join(component.folder());
        write_tensors(&folder.join(file), entries, &[]).unwrap();
        let pipeline =
            Pipeline { dir: home.path().to_owned(), ..Pipeline::open(&fixture()).unwrap() };
        Self { home, pipeline }
    }

    fn weights(&self, component: Component) -> Weights {
        self.pipeline.weights(component).unwrap()
    }
}

fn original(component: Component) -> Weights {
    Pipeline::open(&fixture()).unwrap().weights(component).unwrap()
}

fn assert_same(found: &Weights, expected: &Weights) {
    assert_eq!(found.names().collect::<Vec<_>>(), expected.names().collect::<Vec<_>>());
    for name in expected.names() {
        let (found, expected) = (found.get(name).unwrap(), expected.get(name).unwrap());
        assert_eq!((found.dtype, found.shape), (expected.dtype, expected.shape), "{name}");
        assert!(found.bytes == expected.bytes, "{name}");
    }
}

fn renamed(weights: &Weights, by: impl Fn(&str) -> String) -> Vec<Entry<'_>> {
    let mut entries = weights.entries();
    for entry in &mut entries {
        entry.name = by(&entry.name);
    }
    entries
}

#[test]
fn a_file_in_bfls_names_is_the_same_transformer() {
    let transformer = original(Component::Transformer);
    for prefix in ["", "model.diffusion_model.", "diffusion_model."] {
        let mut entries = transformer.bfl_entries().unwrap();
        assert!(entries.iter().all(|entry| !entry.name.contains("transformer_blocks")));
        for entry in &mut entries {
            entry.name.insert_str(0, prefix);
        }
        entries.push(Entry::f32("vae.decoder.conv_in.bias", &[1], &[0.0]));
        let copy = Copy::with(Component::Transformer, "flux1-dev.safetensors", &entries);
        let found = copy.weights(Component::Transformer);
        assert_same(&found, &transformer);
        assert!(found.notices()[0].contains("1 tensors of other networks"), "{prefix}");
    }
}

/// The rule in other words: BFL's last modulation has shift above scale, diffusers' scale above shift.
#[test]
fn only_the_halves_of_the_last_modulation_change_places() {
    let transformer = original(Component::Transformer);
    let entries = transformer.bfl_entries().unwrap();
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("flux.safetensors");
    write_tensors(&path, &entries, &[]).unwrap();
    let fused = Weights::open_file(&path).unwrap();
    let (modulation, norm_out) = (
        fused.f32("final_layer.adaLN_modulation.1.weight").unwrap(),
        transformer.f32("norm_out.linear.weight").unwrap(),
    );
    let half = norm_out.len() / 2;
    assert_eq!(modulation[..half], norm_out[half..]);
    assert_eq!(modulation[half..], norm_out[..half]);
    let linear1 = fused.f32("single_blocks.1.linear1.weight").unwrap();
    let layers = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"];
    let joined = layers.map(|layer| {
        transformer.f32(&format!("single_transformer_blocks.1.{layer}.weight")).unwrap()
    });
    assert_eq!(linear1, joined.concat());
    assert_eq!(fused.shape("double_blocks.0.img_attn.qkv.weight"), Some(&[144, 48][..]));
}

#[test]
fn fused_layers_of_other_sizes_are_named() {
    let transformer = original(Component::Transformer);
    let mut entries = transformer.bfl_entries().unwrap();
    let fused = "double_blocks.1.txt_attn.qkv.weight";
    let at = entries.iter().position(|entry| entry.name == fused).unwrap();
    entries[at] = Entry::f32(fused, &[100, 48], &vec![0.0; 4800]);
    let copy = Copy::with(Component::Transformer, "x.safetensors", &entries);
    let message = copy.pipeline.weights(Component::Transformer).err().unwrap().to_string();
    assert!(message.contains(fused) && message.contains("144 rows"), "{message}");
    drop(copy.home);
}

#[test]
fn text_encoders_are_read_out_of_whole_models() {
    let clip = original(Component::TextEncoder);
    for prefix in ["", "text_model.", "text_encoders.clip_l.transformer.text_model."] {
        let mut entries = renamed(&clip, |name| name.replace("text_model.", prefix));
        if !prefix.starts_with("text_encoders") {
            let more = ["vision_model.x.weight", "logit_scale", "text_projection.weight"];
            entries.extend(more.map(|name| Entry::f32(name, &[1], &[0.0])));
        }
        entries.push(Entry::i64(format!("{prefix}embeddings.position_ids"), &[1, 2], &[0, 1]));
        let copy = Copy::with(Component::TextEncoder, "model.safetensors", &entries);
        assert_same(&copy.weights(Component::TextEncoder), &clip);
    }
    let t5 = original(Component::TextEncoder2);
    for (tokens, prefix) in [
        (&["shared.weight"][..], ""),
        (&["encoder.embed_tokens.weight"], ""),
        (&["shared.weight", "encoder.embed_tokens.weight"], "text_encoders.t5xxl.transformer."),
    ] {
        let mut entries = Vec::new();
        for name in tokens {
            entries.extend(renamed(&t5, str::to_owned).into_iter().filter_map(|mut entry| {
                let is_table = entry.name == "shared.weight";
                entry.name = format!("{prefix}{name}");
                is_table.then_some(entry)
            }));
        }
        let rest = renamed(&t5, |name| format!("{prefix}{name}"));
        entries.extend(rest.into_iter().filter(|entry| !entry.name.ends_with("shared.weight")));
        let more = ["decoder.final_layer_norm.weight", "lm_head.weight"];
        entries.extend(more.map(|name| Entry::f32(format!("{prefix}{name}"), &[1], &[0.0])));
        let copy = Copy::with(Component::TextEncoder2, "model.safetensors", &entries);
        let found = copy.weights(Component::TextEncoder2);
        assert_same(&found, &t5);
        assert!(found.notices()[0].contains("2 tensors of a decoder"), "{:?}", found.notices());
    }
}

#[test]
fn names_of_gguf_and_of_bfls_autoencoder_are_known() {
    let t5 = original(Component::TextEncoder2);
    let inverse = |wanted: &str| {
        let layers = ["attn_q", "attn_k", "attn_v", "attn_o", "attn_rel_b", "attn_norm"];
        let layers = layers.into_iter().chain(["ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]);
        let blocks =
            (0..2).flat_map(|i| layers.clone().map(move |l| format!("enc.blk.{i}.{l}.weight")));
        let outside = ["token_embd.weight", "enc.output_norm.weight"].map(str::to_owned);
        let mut all = blocks.chain(outside);
        all.find(|name| foreign::t5(name).as_deref() == Some(wanted)).expect(wanted)
    };
    let copy = Copy::with(Component::TextEncoder2, "t5.safetensors", &renamed(&t5, inverse));
    assert_same(&copy.weights(Component::TextEncoder2), &t5);

    let vae = original(Component::Vae);
    let mut entries = renamed(&vae, |name| format!("vae.{}", foreign::vae(name, 4)));
    for entry in &mut entries {
        if entry.name.contains("attn_1") && entry.shape.len() == 2 {
            entry.shape.extend([1, 1]);
        }
    }
    let names: Vec<&str> = entries.iter().map(|entry| &*entry.name).collect();
    for known in [
        "vae.encoder.down.2.downsample.conv.weight",
        "vae.decoder.up.3.block.1.conv1.weight",
        "vae.decoder.up.1.block.0.nin_shortcut.bias",
        "vae.decoder.mid.attn_1.proj_out.weight",
        "vae.encoder.mid.block_2.norm1.weight",
        "vae.decoder.norm_out.weight",
    ] {
        assert!(names.contains(&known), "{known}: {names:?}");
    }
    let copy = Copy::with(Component::Vae, "ae.safetensors", &entries);
    assert_same(&copy.weights(Component::Vae), &vae);
}

#[test]
fn a_whole_checkpoint_in_one_file_comes_apart() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("all.safetensors");
    let all = Component::ALL.map(|part| (part, original(part)));
    let mut entries = Vec::new();
    for (component, weights) in &all {
        entries.extend(match component {
            Component::Transformer => {
                let mut entries = weights.bfl_entries().unwrap();
                for entry in &mut entries {
                    entry.name.insert_str(0, "model.diffusion_model.");
                }
                entries
            }
            Component::TextEncoder => {
                renamed(weights, |name| format!("text_encoders.clip_l.transformer.{name}"))
            }
            Component::TextEncoder2 => {
                renamed(weights, |name| format!("text_encoders.t5xxl.transformer.{name}"))
            }
            Component::Vae => renamed(weights, |name| format!("vae.{}", foreign::vae(name, 4))),
        });
    }
    entries.push(Entry::f32("text_encoders.t5xxl.logit_scale", &[], &[1.0]));
    write_tensors(&path, &entries, &[]).unwrap();
    let like = Pipeline::open(&fixture()).unwrap();
    let single = like.in_file(&path).unwrap();
    assert_eq!(single.left, ["text_encoders.t5xxl.logit_scale"]);
    assert_eq!(single.networks.len(), 4);
    for ((component, found), (_, expected)) in single.networks.iter().zip(&all) {
        assert_same(found, expected);
        assert_eq!(single.pipeline.manifest(*component), like.manifest(*component));
    }
}

/// Parts of names that the readers look for.
const PARTS: [&str; 20] = [
    "model.diffusion_model.",
    "module.",
    "transformer_blocks.0.",
    "double_blocks.1.",
    "single_blocks.999999999999.",
    "single_blocks.0.linear1.weight",
    "img_attn.qkv.weight",
    "final_layer.adaLN_modulation.1.weight",
    "final_layer.linear.weight",
    "img_in.weight",
    "x_embedder.weight",
    "guidance_in.in_layer.weight",
    "vae.",
    "decoder.up.3.block.0.",
    "decoder.norm_out.weight",
    "text_encoders.t5xxl.transformer.",
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    "text_model.embeddings.token_embedding.weight",
    "enc.blk.0.attn_q.weight",
    "token_embd.weight",
];

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    /// Whatever names and shapes a file has, it is read as a checkpoint or refused in one line.
    #[test]
    fn one_file_of_any_names_is_read_or_refused(
        tensors in proptest::collection::vec(
            (proptest::collection::vec(0..PARTS.len(), 1..4), 0_usize..50, 0_usize..3),
            1..12,
        ),
    ) {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("flux.safetensors");
        let named = tensors.into_iter().map(|(parts, rows, columns)| {
            let name: String = parts.into_iter().map(|part| PARTS[part]).collect();
            (name, [rows, columns])
        });
        let named: BTreeMap<String, [usize; 2]> = named.collect();
        let values = vec![0.0; 200];
        let entries: Vec<Entry<'_>> = named
            .iter()
            .map(|(name, shape)| Entry::f32(name.clone(), shape, &values[..shape[0] * shape[1]]))
            .collect();
        write_tensors(&path, &entries, &[]).unwrap();
        let error = Pipeline::open(&fixture()).unwrap().in_file(&path).err().expect("too little");
        proptest::prop_assert!(!error.to_string().contains('\n'));
    }
}

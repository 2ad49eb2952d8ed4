//! Prompts to token ids, with the files of the pipeline folder.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Lowercase, NormalizerWrapper};
use tokenizers::{NormalizedString, Normalizer, PostProcessor, Tokenizer, TruncationDirection};

use crate::checkpoint::{CheckpointError, read_bounded};
use crate::panics::caught;
use crate::pipeline::read_json;

/// Both tokenizers of a pipeline, each padding to its fixed length as `FluxPipeline` does.
pub struct Tokenizers {
    clip: Padded,
    t5: Padded,
}

/// One prompt's ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptIds {
    /// For CLIP, padded with its end token to the encoder's positions.
    pub clip: Vec<i64>,
    /// For T5, padded with 0 to the maximum sequence length.
    pub t5: Vec<i64>,
    /// Tokens of the prompt that neither length had room for, of CLIP and of T5.
    pub cut: [usize; 2],
}

/// One tokenizer: the ids of a text with its special tokens, cut to a length and not padded.
pub struct Truncated {
    tokenizer: Tokenizer,
    /// Tokens of a text that are kept beside the special ones.
    most: usize,
}

struct Padded {
    tokenizer: Truncated,
    length: usize,
    pad: u32,
}

/// T5's `model_max_length` counts below this, for small models; `FluxPipeline` pads to 512 whatever it is.
const SMALL_TEXT: usize = 256;
/// T5 pads with this id.
const T5_PAD: u32 = 0;
/// A tokenizer of sentencepiece, which old copies of FLUX have alone.
const SENTENCES: &str = "spiece.model";
/// FLUX.1-dev's text length, and the most `FluxPipeline` accepts.
pub const MAX_TEXT_TOKENS: usize = 512;

/// Characters that are shown of a prompt that is cut.
const SHOWN: usize = 40;

/// Most bytes that a tokenizer's rules may make of a prompt, and one of them put in place of a match.
const MAX_REWRITTEN: usize = 256 << 10;
const MAX_REPLACEMENT: usize = 64;

#[derive(Deserialize)]
struct TokenizerConfig {
    #[serde(default)]
    model_max_length: Option<f64>,
    #[serde(default)]
    pad_token: Option<serde_json::Value>,
}

impl Tokenizers {
    /// Reads `tokenizer/` (CLIP) and `tokenizer_2/` (T5) of `dir`. CLIP's text length comes from its
    /// `tokenizer_config.json`; T5's is `max_text_tokens`, else that of its own file where it is below 256, else
    /// 512 as in `FluxPipeline`.
    ///
    /// # Errors
    /// When a file is missing or no tokenizer.
    pub fn open(dir: &Path, max_text_tokens: Option<usize>) -> Result<Self, CheckpointError> {
        let (clip_dir, t5_dir) = (dir.join("tokenizer"), dir.join("tokenizer_2"));
        let clip_config = config(&clip_dir)?;
        let clip = clip_tokenizer(&clip_dir)?;
        let pad_token = match &clip_config.pad_token {
            Some(serde_json::Value::String(token)) => token.clone(),
            Some(object) => object["content"].as_str().unwrap_or("<|endoftext|>").to_owned(),
            None => "<|endoftext|>".to_owned(),
        };
        let pad = clip.token_to_id(&pad_token).ok_or_else(|| {
            CheckpointError::malformed(&clip_dir, format!("pad token {pad_token:?} is not in it"))
        })?;
        let own = max_length(&t5_dir);
        let length =
            max_text_tokens.unwrap_or(if own < SMALL_TEXT { own } else { MAX_TEXT_TOKENS });
        Ok(Self {
            clip: Padded::new(clip, max_length(&clip_dir), pad, &clip_dir)?,
            t5: Padded::new(from_json(&t5_dir)?, length, T5_PAD, &t5_dir)?,
        })
    }

    /// Ids of `prompt` for both encoders.
    ///
    /// # Errors
    /// When a tokenizer cannot encode it.
    pub fn encode(&self, prompt: &str) -> Result<PromptIds, tokenizers::Error> {
        let ((clip, of_clip), (t5, of_t5)) = (self.clip.encode(prompt)?, self.t5.encode(prompt)?);
        Ok(PromptIds { clip, t5, cut: [of_clip, of_t5] })
    }

    /// What is to be said of those of `prompts` that are longer than an encoder reads, a sentence an encoder.
    ///
    /// # Errors
    /// When one cannot be encoded.
    pub fn cuts<'a>(
        &self,
        prompts: impl IntoIterator<Item = &'a str>,
    ) -> Result<Vec<String>, tokenizers::Error> {
        let (mut n, mut of) = (0, [(0, None), (0, None)]);
        for prompt in prompts {
            n += 1;
            for ((n_cut, first), cut) in of.iter_mut().zip(self.encode(prompt)?.cut) {
                if cut > 0 {
                    *n_cut += 1;
                    first.get_or_insert((prompt, cut));
                }
            }
        }
        let encoders = [("CLIP", self.clip.length), ("T5", self.t5.length)];
        let said = encoders.into_iter().zip(of).filter_map(|((encoder, limit), (n_cut, first))| {
            let (prompt, cut) = first?;
            let begins: String = prompt.chars().take(SHOWN).collect();
            Some(format!(
                "{n_cut} of {n} prompts are longer than the {limit} tokens that {encoder} reads, and are cut; the \
                 first, {begins:?}…, by its last {cut}"
            ))
        });
        Ok(said.collect())
    }

    /// Tokens of a CLIP row.
    pub fn clip_tokens(&self) -> usize {
        self.clip.length
    }

    /// Tokens of a T5 row.
    pub fn text_tokens(&self) -> usize {
        self.t5.length
    }
}

impl Truncated {
    /// CLIP's in `dir`: `tokenizer.json`, or `vocab.json` and `merges.txt`.
    ///
    /// # Errors
    /// When a file is missing or no tokenizer.
    pub fn clip(dir: &Path, length: usize) -> Result<Self, CheckpointError> {
        Self::new(clip_tokenizer(dir)?, length, dir)
    }

    /// The one in `dir/tokenizer.json`.
    ///
    /// # Errors
    /// When the file is missing or no tokenizer.
    pub fn open(dir: &Path, length: usize) -> Result<Self, CheckpointError> {
        Self::new(from_json(dir)?, length, dir)
    }

    fn new(mut tokenizer: Tokenizer, length: usize, dir: &Path) -> Result<Self, CheckpointError> {
        let n_special = tokenizer.get_post_processor().map_or(0, |ends| ends.added_tokens(false));
        let most = length.checked_sub(n_special).ok_or_else(|| {
            CheckpointError::malformed(dir, format!("{length} tokens have no room for text"))
        })?;
        tokenizer.with_truncation(None).map_err(|error| CheckpointError::malformed(dir, error))?;
        tokenizer.with_padding(None);
        Ok(Self { tokenizer, most })
    }

    /// Ids of `text`.
    ///
    /// # Errors
    /// When the tokenizer cannot encode it.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>, tokenizers::Error> {
        Ok(self.encode_and_count(text)?.0)
    }

    /// Ids of `text`, and how many more it has.
    fn encode_and_count(&self, text: &str) -> Result<(Vec<i64>, usize), tokenizers::Error> {
        let encode = || -> Result<_, tokenizers::Error> {
            if let Some(normalizer) = self.tokenizer.get_normalizer() {
                rewrite(normalizer, &mut NormalizedString::from(text))?;
            }
            // The tokenizer's own truncation does not tell how much it leaves out.
            let mut encoding = self.tokenizer.encode(text, false)?;
            let n = encoding.len();
            encoding.truncate(self.most, 0, TruncationDirection::Right);
            let cut = n - encoding.len();
            Ok((self.tokenizer.post_process(encoding, None, true)?, cut))
        };
        let (encoding, cut) =
            caught(encode).map_err(|why| format!("the tokenizer is damaged: {why}"))??;
        Ok((encoding.get_ids().iter().map(|&id| i64::from(id)).collect(), cut))
    }

    /// Ids are below this.
    pub fn n_ids(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }
}

impl Padded {
    fn new(
        tokenizer: Tokenizer,
        length: usize,
        pad: u32,
        dir: &Path,
    ) -> Result<Self, CheckpointError> {
        Ok(Self { tokenizer: Truncated::new(tokenizer, length, dir)?, length, pad })
    }

    /// Padded ids, and how many tokens were cut.
    fn encode(&self, prompt: &str) -> Result<(Vec<i64>, usize), tokenizers::Error> {
        let (mut ids, cut) = self.tokenizer.encode_and_count(prompt)?;
        ids.resize(self.length, i64::from(self.pad));
        Ok((ids, cut))
    }
}

/// `text` with HTML's entities and typographic quotes as plain characters, which open_clip's tokenizer
/// does first. It also repairs text that was once decoded wrongly; that is left out.
pub fn plain(text: &str) -> String {
    let entities = [
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&quot;", "\""),
        ("&#39;", "'"),
        ("&nbsp;", " "),
        ("&amp;", "&"),
    ];
    // Twice, as the source does: an ampersand may have been escaped once more.
    let text =
        entities.repeat(2).iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to));
    let quote = |c| match c {
        '\u{2bc}' | '\u{2018}'..='\u{201b}' => '\'',
        '\u{201c}'..='\u{201f}' => '"',
        other => other,
    };
    text.chars().map(quote).collect()
}

fn config(dir: &Path) -> Result<TokenizerConfig, CheckpointError> {
    if !dir.is_dir() {
        return Err(CheckpointError::malformed(dir, "no such folder"));
    }
    read_json(&dir.join("tokenizer_config.json"))
}

/// `model_max_length`, where it is a sensible number; libraries write 1e30 for "none".
fn max_length(dir: &Path) -> usize {
    config(dir)
        .ok()
        .and_then(|config| config.model_max_length)
        .filter(|length| (2.0..1e6).contains(length))
        .map_or(MAX_TEXT_TOKENS, |length| length as usize)
}

fn from_json(dir: &Path) -> Result<Tokenizer, CheckpointError> {
    let path = dir.join("tokenizer.json");
    if dir.join(SENTENCES).exists() && path.symlink_metadata().is_err() {
        let why = format!(
            "it has {SENTENCES} but no tokenizer.json: make one by python -c \"from transformers import \
             T5TokenizerFast as T; T.from_pretrained('DIR').save_pretrained('DIR')\" with this folder as DIR"
        );
        return Err(CheckpointError::malformed(dir, why));
    }
    let bytes = read_bounded(&path)?;
    caught(|| Tokenizer::from_bytes(&bytes))
        .map_err(|why| CheckpointError::malformed(&path, format!("damaged: {why}")))?
        .map_err(|error| CheckpointError::malformed(&path, error))
}

/// Rewrites `text` rule by rule, so that no list of rules lets it grow without end.
fn rewrite(rule: &NormalizerWrapper, text: &mut NormalizedString) -> Result<(), tokenizers::Error> {
    match rule {
        NormalizerWrapper::Sequence(rules) => {
            return rules.as_ref().iter().try_for_each(|rule| rewrite(rule, text));
        }
        NormalizerWrapper::Replace(rule) if rule.content.len() > MAX_REPLACEMENT => {
            let n = rule.content.len();
            return Err(format!("the tokenizer puts {n} bytes in place of a match").into());
        }
        rule => rule.normalize(text)?,
    }
    if text.get().len() > MAX_REWRITTEN {
        return Err(format!("the tokenizer makes more than {MAX_REWRITTEN} bytes of it").into());
    }
    Ok(())
}

/// `tokenizer.json` where there is one, else the byte-level BPE of `vocab.json` and `merges.txt`.
fn clip_tokenizer(dir: &Path) -> Result<Tokenizer, CheckpointError> {
    if dir.join("tokenizer.json").is_file() {
        return from_json(dir);
    }
    let file = |name: &str| -> Result<String, CheckpointError> {
        let path: PathBuf = dir.join(name);
        if !path.is_file() {
            let why = format!("neither tokenizer.json nor {name} is in it");
            return Err(CheckpointError::malformed(dir, why));
        }
        // Its kind and size; the library reads it itself.
        read_bounded(&path)?;
        Ok(path.to_string_lossy().into_owned())
    };
    let malformed = |error: tokenizers::Error| CheckpointError::malformed(dir, error);
    let bpe = BPE::from_file(&file("vocab.json")?, &file("merges.txt")?)
        .end_of_word_suffix("</w>".into())
        .unk_token("<|endoftext|>".into())
        .build()
        .map_err(malformed)?;
    let mut tokenizer = Tokenizer::new(bpe);
    clip_stages(&mut tokenizer).map_err(malformed)?;
    Ok(tokenizer)
}

/// CLIP's normaliser, word pattern and special tokens. Source: `CLIPTokenizer` of transformers.
fn clip_stages(tokenizer: &mut Tokenizer) -> Result<(), tokenizers::Error> {
    use tokenizers::normalizers::{NFC, Replace, Sequence};
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::pre_tokenizers::sequence::Sequence as Stages;
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::processors::roberta::RobertaProcessing;

    let (start, end) = ("<|startoftext|>", "<|endoftext|>");
    let spaces =
        Replace::new(tokenizers::normalizers::replace::ReplacePattern::Regex(r"\s+".into()), " ")?;
    tokenizer.with_normalizer(Some(Sequence::new(vec![
        NFC.into(),
        spaces.into(),
        Lowercase.into(),
    ])))?;
    let words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
    tokenizer.with_pre_tokenizer(Some(Stages::new(vec![
        Split::new(
            SplitPattern::Regex(words.into()),
            tokenizers::SplitDelimiterBehavior::Removed,
            true,
        )?
        .into(),
        ByteLevel::new(false, true, false).into(),
    ])));
    let id = |token: &str| {
        tokenizer.token_to_id(token).ok_or_else(|| format!("{token} is not in vocab.json"))
    };
    let (start_id, end_id) = (id(start)?, id(end)?);
    let ends = RobertaProcessing::new((end.into(), end_id), (start.into(), start_id));
    tokenizer.with_post_processor(Some(ends.trim_offsets(false).add_prefix_space(false)));
    tokenizer.add_special_tokens([
        tokenizers::AddedToken::from(start, true),
        tokenizers::AddedToken::from(end, true),
    ])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};

    use super::*;

    /// What `rules` make of a prompt.
    fn encoded(rules: &Value) -> Result<Vec<i64>, String> {
        let home = tempfile::tempdir().unwrap();
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": {"type": "Sequence", "normalizers": rules}, "pre_tokenizer": null,
            "post_processor": null, "decoder": null,
            "model": {"type": "BPE", "dropout": null, "unk_token": "a",
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
                "byte_fallback": false, "vocab": {"a": 0}, "merges": []}
        });
        fs::write(home.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let tokenizer = Truncated::open(home.path(), 4).map_err(|error| error.to_string())?;
        tokenizer.encode("aa").map_err(|error| error.to_string())
    }

    fn twice(content: &str) -> Value {
        json!({"type": "Replace", "pattern": {"String": "a"}, "content": content})
    }

    #[test]
    fn rules_do_not_let_a_prompt_grow_without_end() {
        assert_eq!(encoded(&json!([twice("aa")])).unwrap(), [0, 0, 0, 0]);
        let said = encoded(&json!(vec![twice("aa"); 40])).unwrap_err();
        assert!(said.contains("more than 262144 bytes"), "{said}");
        let said = encoded(&json!([twice(&"a".repeat(1 << 20))])).unwrap_err();
        assert!(said.contains("1048576 bytes in place of a match"), "{said}");
    }

    /// A table whose first unit points behind its end; the library looks there without asking.
    #[test]
    fn a_broken_character_map_is_an_error() {
        let map = "BAAAAP///38=";
        let said =
            encoded(&json!([{"type": "Precompiled", "precompiled_charsmap": map}])).unwrap_err();
        assert!(said.contains("damaged"), "{said}");
    }

    #[test]
    fn quotes_and_entities_become_plain() {
        assert_eq!(plain("“don’t” &amp;quot; &lt;b&gt; R&amp;B"), "\"don't\" \" <b> R&B");
    }
}

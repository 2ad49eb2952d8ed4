//! Settings that a line of a prompt file has for its own images.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};
use flow::{
    prompts::{Prompt, TEXT_FIELDS},
    solver::{SOLVERS, Solver},
    usage::Usage,
};
use serde_json::Value;

use crate::request::Request;

/// Names of a setting in a prompt file, ours first, then those of diffusers and servers.
const NAMES: [(&str, &[&str]); 7] = [
    ("seed", &["seed"]),
    ("steps", &["steps", "num_inference_steps"]),
    ("width", &["width"]),
    ("height", &["height"]),
    ("guidance", &["guidance", "guidance_scale", "distilled_cfg_scale"]),
    ("solver", &["solver", "sampler"]),
    ("shift", &["shift"]),
];
/// Fields beside the text that make the prompt itself.
const PROMPT: [&str; 3] = ["target", "colour", "color"];

/// `base` with the prompt and the settings of its line.
///
/// # Errors
/// [`Usage`] that names the prompt and the field.
pub fn of_prompt(prompt: &Prompt, base: &Request) -> std::result::Result<Request, Usage> {
    let mut request = Request { prompt: prompt.text.clone(), ..base.clone() };
    for (name, spellings) in NAMES {
        let values = spellings.iter().filter_map(|spelling| {
            let value = prompt.fields.get(*spelling).filter(|value| !value.is_null())?;
            Some((*spelling, value))
        });
        let mut earlier: Option<&str> = None;
        for (spelling, value) in values {
            let wrong = |why: String| Usage(format!("the prompt {:?}: {why}", prompt.text));
            let mut with = request.clone();
            set(&mut with, name, &text(value))
                .map_err(|why| wrong(format!("{spelling} {value}: {why}")))?;
            if let Some(earlier) = earlier.filter(|_| with != request) {
                return Err(wrong(format!(
                    "{earlier} and {spelling} differ; give only one of them"
                )));
            }
            (request, earlier) = (with, Some(spelling));
        }
    }
    Ok(request)
}

/// Fields of prompts that are neither text nor a setting, in order.
pub fn unused(prompts: &[Prompt]) -> Vec<String> {
    let known = |field: &str| {
        TEXT_FIELDS.contains(&field)
            || PROMPT.contains(&field)
            || NAMES.iter().any(|(_, spellings)| spellings.contains(&field))
    };
    let fields = prompts.iter().flat_map(|prompt| prompt.fields.keys());
    let unknown: BTreeSet<&str> =
        fields.map(String::as_str).filter(|field| !known(field)).collect();
    unknown.into_iter().map(str::to_owned).collect()
}

/// The seed that `text` names; `None` for a random one, which is -1.
///
/// # Errors
/// Says what a seed is.
pub fn seed(text: &str) -> std::result::Result<Option<u64>, String> {
    match text.trim() {
        "-1" => Ok(None),
        text => text.parse().map(Some).map_err(|_| {
            format!("{text} is no seed: from 0 to {}, or -1 for a random one", u64::MAX)
        }),
    }
}

fn set(request: &mut Request, name: &str, text: &str) -> Result<()> {
    let number = || text.parse::<f64>().context("not a number");
    let whole = || text.parse::<usize>().context("not a whole number from 0 up");
    match name {
        "seed" => request.seed = seed(text).map_err(Usage)?,
        "steps" => request.steps = Some(whole()?),
        "width" => request.width = Some(whole()?),
        "height" => request.height = Some(whole()?),
        "guidance" => request.guidance = Some(number()? as f32),
        "shift" => request.shift = Some(number()?),
        "solver" => request.solver = Some(solver(text)?),
        other => bail!("{other} is no setting"),
    }
    Ok(())
}

/// A solver by our name or by the one that pictures carry.
fn solver(text: &str) -> Result<Solver> {
    let named = SOLVERS.iter().map(|&(_, solver)| solver);
    let by_label =
        named.into_iter().find(|&solver| crate::parameters::sampler_name(solver) == text);
    Solver::by_name(text).or(by_label).with_context(|| {
        let known: Vec<&str> = SOLVERS.iter().map(|(name, _)| *name).collect();
        format!("not one of {}", known.join(", "))
    })
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.trim().to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(json: &str) -> Prompt {
        flow::prompts::from_json(&serde_json::from_str(json).unwrap()).unwrap()
    }

    #[test]
    fn a_line_has_settings_of_its_own() -> Result<()> {
        let base = Request { steps: Some(8), seed: Some(3), ..Request::default() };
        let line =
            r#"{"prompt": "a fox", "seed": "-1", "num_inference_steps": 4, "sampler": "Euler"}"#;
        let request = of_prompt(&prompt(line), &base)?;
        assert_eq!((request.seed, request.steps), (None, Some(4)));
        assert_eq!((request.solver, &*request.prompt), (Some(Solver::Euler), "a fox"));
        assert_eq!(of_prompt(&prompt(r#""a hen""#), &base)?.seed, Some(3));
        for (line, named) in [
            (r#"{"prompt": "a", "steps": -4}"#, "steps -4"),
            (r#"{"prompt": "a", "solver": "ddim9"}"#, "dpmpp-2m-k"),
            (r#"{"prompt": "a", "seed": 1e30}"#, "no seed"),
            (
                r#"{"prompt": "a", "steps": 4, "num_inference_steps": 8}"#,
                "steps and num_inference_",
            ),
            (r#"{"prompt": "a", "guidance": 1, "distilled_cfg_scale": 2}"#, "and distilled_cfg_sc"),
            (
                r#"{"prompt": "a", "solver": "euler", "sampler": "Heun"}"#,
                "solver and sampler differ",
            ),
        ] {
            let error = of_prompt(&prompt(line), &base).unwrap_err();
            assert!(error.to_string().contains(named), "{error}");
        }
        Ok(())
    }

    #[test]
    fn two_names_of_a_setting_may_agree() -> Result<()> {
        let line = r#"{"prompt": "a", "steps": null, "num_inference_steps": 4, "guidance": 2,
                       "guidance_scale": "2.0", "solver": "euler", "sampler": "Euler"}"#;
        let request = of_prompt(&prompt(line), &Request { steps: Some(8), ..Request::default() })?;
        assert_eq!((request.steps, request.guidance), (Some(4), Some(2.0)));
        assert_eq!(request.solver, Some(Solver::Euler));
        Ok(())
    }

    #[test]
    fn what_is_no_setting_is_named() {
        let prompts =
            [prompt(r#"{"text": "a", "id": 7, "seed": 1}"#), prompt(r#"{"text": "b", "tag": 1}"#)];
        assert_eq!(unused(&prompts), ["id", "tag"]);
    }

    #[test]
    fn minus_one_is_a_random_seed() {
        assert_eq!(seed("-1"), Ok(None));
        assert_eq!(seed("18446744073709551615"), Ok(Some(u64::MAX)));
        assert!(seed("18446744073709551616").unwrap_err().contains("-1 for a random one"));
        assert!(seed("fox").is_err());
    }
}

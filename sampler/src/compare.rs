//! Several models, or a model with several LoRAs, from the same seeds on one sheet.

use std::{
    collections::HashSet,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use flow::{checkpoint::write_atomically, log, lora::scaled_path, prompts::Prompt, usage::Usage};

use crate::{
    args::Compare,
    engine::{Engine, Finished, Memory, Watch},
    format::Format,
    outputs,
    picture::Picture,
    request::{Job, Request},
    run, settings,
    sheet::Layout,
};

/// Makes the sheet: a row an image, a column a model, and after each model its LoRAs, all named on it.
///
/// # Errors
/// As a run of `generate`; also when the models' sizes differ and none was typed.
pub fn run(args: &Compare, mut lines: impl Write) -> Result<()> {
    let Some(format) = Format::of(&args.out) else {
        let out = args.out.display();
        bail!(Usage(format!("--out {out}: end its name in .png, .jpg or .webp")));
    };
    if args.models.len() + args.loras.len() < 2 {
        bail!(Usage("nothing to compare: give --model twice, or a --lora".into()));
    }
    outputs::check_writable(outputs::parent(&args.out))?;
    let prompts = prompts(args)?;
    let base = Request { seed: Some(0), ..run::request(&args.image)? };
    let options = args.runtime.options(Memory::Keep)?;
    let mut said = HashSet::new();
    let mut note = |notice: &String| {
        if said.insert(notice.clone()) {
            log::note(&format!("note: {notice}"));
        }
    };
    args.runtime.notices(&options).iter().for_each(&mut note);
    let mut columns: Vec<Vec<Picture>> = Vec::new();
    let (mut names, mut rows) = (Vec::new(), Vec::new());
    let first = settings::seed(&args.image.seed).map_err(Usage)?;
    let first = first.unwrap_or_else(crate::export::random_seed);
    for model in &args.models {
        let mut engine = Engine::open(model, &options)?;
        let variants = std::iter::once(None).chain(args.loras.iter().map(Some));
        for lora in variants {
            let used = lora.map(|lora| load(&engine, lora)).transpose()?;
            let mut jobs = Vec::new();
            for prompt in &prompts {
                for seed in first..first.saturating_add(u64::from(args.count)) {
                    let request =
                        Request { seed: Some(seed), ..settings::of_prompt(prompt, &base)? };
                    let loras = used.clone().into_iter().collect();
                    jobs.push(
                        engine.export().job(Request { loras, ..request }).map_err(Usage::from)?,
                    );
                }
            }
            jobs.iter().flat_map(|job| &job.notices).for_each(&mut note);
            columns.push(pictures(&mut engine, &jobs)?);
            rows = jobs.iter().map(|job| format!("seed {}: {}", job.seed, job.prompt)).collect();
            let with = |name: &str| lora.map_or_else(String::new, |_| format!(" with {name}"));
            let typed = with(lora.map_or("", String::as_str));
            writeln!(lines, "column {}: {}{typed}", columns.len(), model.display())?;
            names.push(model_name(args, model, &engine) + &with(&file_name(lora)));
        }
    }
    let sheet = sheet(&columns, &names, &rows)?;
    write_atomically(&args.out, &format.encode(&sheet, None)?)?;
    writeln!(lines, "{}, a row an image from seed {first} on", args.out.display())?;
    Ok(())
}

/// The folder's name where it tells the models apart, else all of what was typed.
fn model_name(args: &Compare, model: &Path, engine: &Engine) -> String {
    let of = |other: &PathBuf| other.file_name() == model.file_name();
    let unique = args.models.iter().filter(|other| of(other)).count() == 1;
    if unique { engine.export().name.clone() } else { model.display().to_string() }
}

/// What was typed as a LoRA, without its folder.
fn file_name(typed: Option<&String>) -> String {
    typed.map_or("", |typed| typed.rsplit('/').next().unwrap_or(typed)).to_owned()
}

fn prompts(args: &Compare) -> Result<Vec<Prompt>> {
    match (&args.prompt, &args.prompts) {
        (Some(prompt), _) => Ok(vec![Prompt::new(prompt)]),
        (None, Some(file)) => {
            let read = run::read_prompts(file)?;
            for notice in read.notices() {
                log::note(&format!("note: {}: {notice}", file.display()));
            }
            Ok(read.prompts)
        }
        (None, None) => bail!(Usage("a prompt is missing: give --prompt or --prompts".into())),
    }
}

/// The LoRA's name and scale, once it is loaded.
fn load(engine: &Engine, typed: &str) -> Result<(String, f64)> {
    let (path, scale) = scaled_path(typed).map_err(Usage)?;
    let name = path.display().to_string();
    engine.export().load_lora(&name, Path::new(&path))?;
    Ok((name, scale))
}

fn pictures(engine: &mut Engine, jobs: &[Job]) -> Result<Vec<Picture>> {
    struct All(Vec<Result<Picture>>);
    impl Watch for All {
        fn done(&mut self, _: usize, image: Result<Finished>) {
            self.0.push(image.map(|image| image.picture));
        }
    }
    let mut all = All(Vec::new());
    engine.generate(jobs, &mut all);
    all.0.into_iter().collect()
}

fn sheet(columns: &[Vec<Picture>], names: &[String], rows: &[String]) -> Result<Picture> {
    let first = columns.first().and_then(|column| column.first()).context("no image was made")?;
    let (width, height) = (first.width, first.height);
    let same = |picture: &Picture| (picture.width, picture.height) == (width, height);
    if !columns.iter().flatten().all(same) {
        bail!(Usage("the models make images of different sizes: give --width and --height".into()));
    }
    let n_rows = columns[0].len();
    let layout = Layout::new(n_rows, columns.len(), width, height)?;
    let by_row = (0..n_rows).flat_map(|row| columns.iter().map(move |column| column[row].clone()));
    layout.draw_labelled(&by_row.collect::<Vec<_>>(), names, rows)
}

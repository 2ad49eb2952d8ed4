//! The report of a comparison: `report.md` with its tables, curves as PNG, a sheet of pictures.

use std::fmt::Write;

use anyhow::{Context, Result};
use flow::checkpoint::write_atomically;

use super::growth::{Cost, Growth};
use super::interval::{self, mean, std};
use super::task::Task;
use super::{CompareConfig, RunConfig, TableConfig, slug};
use crate::picture::plot::{self, Series};

/// Points of a curve over several seeds.
const CURVE_POINTS: usize = 120;
/// Shares of the way from the start to the best end for whose levels it is told when they are reached.
const LEVELS: [f64; 2] = [0.5, 0.9];

/// A run over its seeds.
struct Measured {
    name: String,
    seeds: Vec<u64>,
    growths: Vec<Growth>,
    /// Held-out metrics, a row a seed.
    held_out: Vec<Vec<f64>>,
}

/// Writes `report.md` and its pictures.
///
/// # Errors
/// When a run left no metrics, or a file cannot be written.
pub(super) fn write(config: &CompareConfig, tasks: &[Task<'_>], reward: &str) -> Result<()> {
    let base = tasks[0].scores()?;
    let metrics: Vec<&str> = base.iter().map(|(name, _)| name.as_str()).collect();
    let length = match (config.passes, config.minutes) {
        (Some(passes), _) => format!("{passes} forward passes"),
        (None, minutes) => format!("{} minutes", minutes.unwrap_or_default()),
    };
    let mut text = format!(
        "# Comparison\n\nEvery run trained for {length} on one thread from the same model, seeds {}. {reward} is \
         that of the first {} prompts of {}, every {} iterations of preset {} and after as many forward passes \
         of others, drawn as that preset draws and not counted; what is held out is of all of them, {} images a \
         prompt. NFE are passes an image, old ones forward and θ ones forward and backward; as forward passes the \
         latter count three times. Seconds are iterations of a run's median length, without rewards. ± is half of \
         the 95 % interval over seeds (Student's t), of differences by seed, too; bands in the curves go from the \
         worst seed to the best.\n\n",
        config.seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", "),
        config.count,
        config.prompts.display(),
        config.validate_every,
        config.preset,
        config.images,
    );
    let before: Vec<String> = base.iter().map(|(_, value)| format!("{value:.3}")).collect();
    text += &row("held out", &metrics.iter().map(|&name| name.to_owned()).collect::<Vec<String>>());
    text += &rule(metrics.len());
    text += &row("before", &before);
    let hacking = Hacking::of(config, &base)?;
    if let Some(Hacking { of: [own, unseen], .. }) = &hacking {
        let [own, unseen] = [own, unseen].map(|&index| metrics[index]);
        let _ = write!(text, "\nHacked is what a run gains of {own} and not of {unseen}.\n");
    }
    for table in &config.tables {
        let runs = table
            .runs
            .iter()
            .map(|run| measured(run, tasks, reward))
            .collect::<Result<Vec<Measured>>>()?;
        text += &section(config, table, &runs, reward, &metrics, hacking.as_ref())?;
    }
    write_atomically(&config.output.join("report.md"), text.as_bytes())?;
    print!("{text}");
    Ok(())
}

impl Measured {
    /// Seed and end of every run: of the reward, then of each held-out metric.
    fn ends(&self, metric: usize) -> impl Iterator<Item = (u64, f64)> {
        let rows = self.growths.iter().zip(&self.held_out);
        let ends = rows.map(move |(growth, row)| match metric {
            0 => growth.ends()[1],
            metric => row[metric - 1],
        });
        self.seeds.iter().copied().zip(ends)
    }
}

fn measured(run: &RunConfig, tasks: &[Task<'_>], reward: &str) -> Result<Measured> {
    let of_run: Vec<&Task<'_>> = tasks.iter().filter(|task| task.run == Some(run)).collect();
    let (mut seeds, mut growths, mut held_out) = (Vec::new(), Vec::new(), Vec::new());
    for task in of_run.iter().filter(|task| task.is_done()) {
        seeds.push(task.seed);
        growths.push(Growth::read(&task.folder, reward, task.n_images)?);
        held_out.push(task.scores()?.into_iter().map(|(_, value)| value).collect());
    }
    let name = match seeds.len() {
        n if n == of_run.len() => run.name.clone(),
        n => format!("{} ({n} seeds)", run.name),
    };
    Ok(Measured { name, seeds, growths, held_out })
}

/// What runs gain by the reward's own model and not by one that nothing trains on.
struct Hacking {
    /// Places among the metrics: the reward's own, and the other.
    of: [usize; 2],
    /// Both before any training.
    before: [f64; 2],
}

impl Hacking {
    /// That of `config`, where it names metrics.
    ///
    /// # Errors
    /// When one was not scored.
    fn of(config: &CompareConfig, base: &[(String, f64)]) -> Result<Option<Self>> {
        let [own, unseen] = &config.hacked[..] else { return Ok(None) };
        let place = |name: &String| {
            let found = base.iter().position(|(metric, _)| metric == name);
            found.with_context(|| format!("hacked: {name:?} was not scored"))
        };
        let of = [place(own)?, place(unseen)?];
        Ok(Some(Self { of, before: of.map(|index| base[index].1) }))
    }

    /// One number a row of held-out metrics.
    fn of_runs(&self, held_out: &[Vec<f64>]) -> Vec<f64> {
        let gain = |row: &[f64], which: usize| row[self.of[which]] - self.before[which];
        held_out.iter().map(|row| gain(row, 0) - gain(row, 1)).collect()
    }
}

fn section(
    config: &CompareConfig,
    table: &TableConfig,
    runs: &[Measured],
    reward: &str,
    metrics: &[&str],
    hacking: Option<&Hacking>,
) -> Result<String> {
    let mut text = format!("\n## {}\n\n", table.title);
    let mut head = vec!["iterations", "NFE old", "NFE θ", "s an iteration", reward];
    head.extend(metrics);
    head.extend(hacking.map(|_| "hacked"));
    text += &row("run", &head.iter().map(|&name| name.to_owned()).collect::<Vec<String>>());
    text += &rule(head.len());
    for run in runs {
        let of =
            |value: &dyn Fn(&Growth) -> f64| run.growths.iter().map(value).collect::<Vec<f64>>();
        let [start, end] = [0, 1].map(|i| spread(&of(&|growth| growth.ends()[i]), 2));
        let mut cells = vec![
            spread(&of(&|growth| growth.total(Cost::Iterations)), 0),
            spread(&of(&|growth| growth.passes()[0]), 1),
            spread(&of(&|growth| growth.passes()[1]), 2),
            spread(&of(&Growth::seconds), 2),
            format!("{start} → {end}"),
        ];
        for metric in 0..metrics.len() {
            let values: Vec<f64> = run.held_out.iter().map(|row| row[metric]).collect();
            cells.push(spread(&values, 3));
        }
        cells.extend(hacking.map(|hacking| spread(&hacking.of_runs(&run.held_out), 3)));
        text += &row(&run.name, &cells);
    }
    text += &differences(config, runs, reward, metrics);
    text += &at_equal_cost(runs, reward);
    for (cost, name, unit) in [
        (Cost::Seconds, "seconds", "seconds without rewards"),
        (Cost::Work, "work", "forward passes"),
    ] {
        let file = format!("{}-{name}.png", slug(&table.title));
        let curves: Vec<Curve> = runs.iter().map(|run| curve(run, cost)).collect();
        let series: Vec<Series<'_>> = runs
            .iter()
            .zip(&curves)
            .map(|(run, (points, band))| Series { name: &run.name, points, is_smooth: true, band })
            .collect();
        plot::curve(&config.output.join(&file), &table.title, &series, unit, reward)?;
        let _ = write!(text, "\n![{reward} against {unit}]({file})\n");
    }
    Ok(text)
}

/// Rewards where every run has spent as much, and what half of the way and nearly all of it cost each.
fn at_equal_cost(runs: &[Measured], reward: &str) -> String {
    let growths = || runs.iter().flat_map(|run| &run.growths);
    let limit = |cost: Cost| growths().map(|g| g.total(cost)).fold(f64::INFINITY, f64::min);
    let costs = [Cost::Iterations, Cost::Work, Cost::Seconds].map(|cost| (cost, limit(cost)));
    let mean_of = |pick: usize| {
        let ends = runs.iter().map(|run| {
            let ends: Vec<f64> = run.growths.iter().map(|g| g.ends()[pick]).collect();
            mean(&ends)
        });
        ends.fold(f64::NEG_INFINITY, f64::max)
    };
    let level = |share: f64| mean_of(0) + share * (mean_of(1) - mean_of(0));
    let levels = LEVELS.map(level).into_iter();
    let levels: Vec<(f64, Cost)> =
        levels.flat_map(|level| [Cost::Work, Cost::Seconds].map(|cost| (level, cost))).collect();
    let mut text = String::from("\n");
    let after = costs.map(|(cost, limit)| format!("{limit:.0} {}", cost.unit()));
    let until = [&after[1], &after[2]].map(|after| format!("mean until {after}"));
    let to = levels.iter().map(|(level, cost)| format!("{} to {level:.2}", cost.unit()));
    let head = [&after[..], &until, &to.collect::<Vec<String>>()].concat();
    text += &row(&format!("{reward} after"), &head);
    text += &rule(head.len());
    for run in runs {
        let mut cells: Vec<String> = costs
            .iter()
            .map(|&(cost, limit)| {
                let values: Option<Vec<f64>> =
                    run.growths.iter().map(|g| g.at(cost, limit)).collect();
                values.map_or("–".to_owned(), |values| spread(&values, 2))
            })
            .collect();
        for &(cost, limit) in &costs[1..] {
            let means: Option<Vec<f64>> =
                run.growths.iter().map(|g| g.mean_until(cost, limit)).collect();
            cells.push(means.map_or("–".to_owned(), |means| spread(&means, 2)));
        }
        for &(level, cost) in &levels {
            let reached: Vec<f64> =
                run.growths.iter().filter_map(|growth| growth.reaches(cost, level)).collect();
            let n = run.growths.len();
            cells.push(match reached.len() {
                0 => "not".to_owned(),
                some if some == n => spread(&reached, 0),
                some => format!("{} ({some} of {n} seeds)", spread(&reached, 0)),
            });
        }
        text += &row(&run.name, &cells);
    }
    text
}

/// Means over seeds, and the least and the largest of them.
type Curve = (Vec<(f64, f64)>, Vec<(f64, f64, f64)>);

/// As far as all seeds go.
fn curve(run: &Measured, cost: Cost) -> Curve {
    let ends = run.growths.iter().map(|growth| growth.total(cost));
    let to = ends.fold(f64::INFINITY, f64::min);
    let points = (0..CURVE_POINTS).filter_map(|i| {
        let x = to * i as f64 / (CURVE_POINTS - 1) as f64;
        let values: Vec<f64> = run.growths.iter().map(|g| g.at(cost, x)).collect::<Option<_>>()?;
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Some(((x, mean(&values)), (x, low, high)))
    });
    points.unzip()
}

/// What every run ends with less what the first does from the same seed, with its interval over seeds, and how many
/// seeds would tell a difference.
fn differences(
    config: &CompareConfig,
    runs: &[Measured],
    reward: &str,
    metrics: &[&str],
) -> String {
    let [first, others @ ..] = runs else { return String::new() };
    if others.is_empty() {
        return String::new();
    }
    let head = [&[reward][..], metrics].concat();
    let head: Vec<String> = head.into_iter().map(str::to_owned).collect();
    let title = |title: &str| row(title, &head) + &rule(head.len());
    let mut text = format!("\n{}", title(&format!("less {}, by seed", first.name)));
    let mut needed = format!("\n{}", title(&format!("seeds to tell {}", config.difference)));
    for run in others {
        let apart = |metric: usize| -> Vec<f64> {
            let own = run.ends(metric);
            let by_seed = own.filter_map(|(seed, end)| {
                first.ends(metric).find(|(other, _)| *other == seed).map(|(_, base)| end - base)
            });
            by_seed.collect()
        };
        let all: Vec<Vec<f64>> = (0..head.len()).map(apart).collect();
        let cells = all.iter().map(|d| spread(d, 3));
        text += &row(&run.name, &cells.collect::<Vec<String>>());
        let seeds = all.iter().map(|d| match std(d) {
            std if std > 0.0 => interval::seeds(std, config.difference).to_string(),
            _ => "–".to_owned(),
        });
        needed += &row(&run.name, &seeds.collect::<Vec<String>>());
    }
    if config.seeds.len() > 1 { text + &needed } else { text }
}

fn row(first: &str, cells: &[String]) -> String {
    format!("| {first} | {} |\n", cells.join(" | "))
}

/// What follows the heads of `n` columns of numbers.
fn rule(n: usize) -> String {
    row("---", &vec!["---:".to_owned(); n])
}

/// Mean, and half of its 95 % interval where there are several that differ, to so many decimals.
fn spread(values: &[f64], decimals: usize) -> String {
    let (mean, error) = (mean(values), interval::half_width(std(values), values.len()));
    if error > 0.0 {
        format!("{mean:.decimals$} ± {error:.decimals$}")
    } else {
        format!("{mean:.decimals$}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_over_seeds_is_told_where_there_is_one() {
        assert_eq!(spread(&[1.0, 3.0], 1), "2.0 ± 12.7");
        assert_eq!(spread(&[2.0], 2), "2.00");
        assert_eq!(spread(&[2.0, 2.0], 0), "2");
    }
}

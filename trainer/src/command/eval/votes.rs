//! What people preferred: the votes that the page of `ng-sample serve` saves, as win rates.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use flow::checkpoint::read_bounded;
use serde::Deserialize;

use super::table::{self, Column};

/// What the votes count as beside rewards.
const METRIC: &str = "votes";

/// A file of votes between two models on the same prompts and seeds.
#[derive(Deserialize)]
struct Study {
    kind: String,
    version: u32,
    models: [String; 2],
    votes: Vec<Vote>,
}

#[derive(Deserialize)]
struct Vote {
    prompt: String,
    /// One of the models, or neither.
    winner: Option<String>,
}

/// The votes of `path` as the Markdown table that rewards get.
///
/// # Errors
/// When the file cannot be read, or is no file of votes.
pub(super) fn markdown(path: &Path) -> Result<String> {
    let named = || format!("cannot read the votes in {}", path.display());
    let text = read_bounded(path).with_context(named)?;
    let study: Study = serde_json::from_slice(&text).with_context(named)?;
    let [first, second] = study.scores().with_context(named)?;
    let mut columns = vec![Column::new(&study.models[0], vec![(METRIC.to_owned(), first)], &[])];
    let second = vec![(METRIC.to_owned(), second)];
    columns.push(Column::new(&study.models[1], second, &columns));
    Ok(table::markdown(&columns, &[METRIC]))
}

impl Study {
    /// Each model's scores, a row a prompt: 1 for a vote won, ½ for neither, 0 for one lost.
    fn scores(&self) -> Result<[Vec<Vec<f32>>; 2]> {
        ensure!(
            self.kind == "ng-votes" && self.version == 1,
            "it is a {:?} of version {}, not \"ng-votes\" of version 1",
            self.kind,
            self.version
        );
        let [first, second] = &self.models;
        ensure!(first != second, "both models are named {first:?}");
        ensure!(!self.votes.is_empty(), "there are no votes");
        let mut rows: Vec<(&str, Vec<f32>)> = Vec::new();
        for vote in &self.votes {
            let score = match &vote.winner {
                None => 0.5,
                Some(winner) if winner == first => 1.0,
                Some(winner) => {
                    ensure!(winner == second, "{winner:?} won, and is neither of the models");
                    0.0
                }
            };
            match rows.iter_mut().find(|(prompt, _)| *prompt == vote.prompt) {
                Some((_, row)) => row.push(score),
                None => rows.push((&vote.prompt, vec![score])),
            }
        }
        let of_first: Vec<Vec<f32>> = rows.into_iter().map(|(_, row)| row).collect();
        let turned = |row: &Vec<f32>| row.iter().map(|score| 1.0 - score).collect();
        let of_second = of_first.iter().map(turned).collect();
        Ok([of_first, of_second])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(votes: &str) -> Result<String> {
        let file = tempfile::NamedTempFile::new()?;
        let text = format!(r#"{{"kind": "ng-votes", "version": 1, "wins": {{}}, {votes}}}"#);
        std::fs::write(&file, text)?;
        markdown(file.path())
    }

    #[test]
    fn votes_become_win_rates() {
        let text = read(
            r#""models": ["base", "tuned"], "votes": [
                {"prompt": "a", "seed": 1, "winner": "tuned", "left": "base", "seconds": 1.5},
                {"prompt": "a", "seed": 2, "winner": null, "left": "base", "seconds": 2},
                {"prompt": "b", "seed": 3, "winner": "tuned", "left": "tuned", "seconds": 1},
                {"prompt": "c", "seed": 4, "winner": "base", "left": "tuned", "seconds": 1}]"#,
        )
        .unwrap();
        // Prompts count once: ¾, 1 and 0; their standard error is √(0.541667/6).
        let line = "| tuned | base | votes | 0.583 ± 0.300 | +0.167 ± 0.601 |";
        assert!(text.contains(line), "{text}");
    }

    #[test]
    fn what_is_no_file_of_votes_is_refused() {
        for (votes, part) in [
            (r#""models": ["a", "b"], "votes": []"#, "there are no votes"),
            (r#""models": ["a", "a"], "votes": []"#, "both models are named"),
            (r#""models": ["a", "b"], "votes": [{"prompt": "", "winner": "c"}]"#, "\"c\" won"),
            (r#""models": ["a"], "votes": []"#, "invalid length 1"),
        ] {
            let message = format!("{:#}", read(votes).unwrap_err());
            assert!(message.contains(part), "{message}");
        }
    }
}

//! What a comparison came to, as JSON and as Markdown.

use serde::Serialize;

use super::wins::Wins;

/// One contestant's scores.
#[derive(Serialize)]
pub(super) struct Column {
    model: String,
    /// Mean of each metric.
    means: Vec<(String, f64)>,
    /// One row a prompt, in the order of the metrics: means over its images.
    per_prompt: Vec<Vec<f32>>,
    /// Against every contestant before this one, by every metric that both have.
    wins: Vec<Pair>,
    /// By metric: a row a prompt, a score an image.
    #[serde(skip)]
    scores: Vec<(String, Vec<Vec<f32>>)>,
}

#[derive(Serialize)]
struct Pair {
    against: String,
    metric: String,
    #[serde(flatten)]
    wins: Wins,
}

impl Column {
    /// Of `scores` by metric, compared with the columns `before`.
    pub(super) fn new(model: &str, scores: Vec<(String, Vec<Vec<f32>>)>, before: &[Self]) -> Self {
        let mut per_prompt = Vec::new();
        let mut means = Vec::new();
        for (metric, rows) in &scores {
            per_prompt.resize(rows.len(), Vec::new());
            let mut sum = 0.0;
            for (scores, row) in per_prompt.iter_mut().zip(rows) {
                let mean =
                    row.iter().map(|&score| f64::from(score)).sum::<f64>() / row.len() as f64;
                scores.push(mean as f32);
                sum += mean;
            }
            means.push((metric.clone(), sum / rows.len() as f64));
        }
        let mut wins = Vec::new();
        for other in before {
            for (metric, rows) in &scores {
                let Some(others) = other.scores(metric) else { continue };
                let (against, metric) = (other.model.clone(), metric.clone());
                wins.push(Pair { against, metric, wins: Wins::over(rows, others) });
            }
        }
        Self { model: model.to_owned(), means, per_prompt, wins, scores }
    }

    /// Scores by `metric`, a row a prompt.
    pub(super) fn scores(&self, metric: &str) -> Option<&[Vec<f32>]> {
        self.scores.iter().find(|(name, _)| name == metric).map(|(_, rows)| &**rows)
    }
}

/// Means of all `metrics`, then the win rates.
pub(super) fn markdown(columns: &[Column], metrics: &[&str]) -> String {
    let row = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let header = |left: &[&str], right: &[&str]| {
        let cells: Vec<String> = left.iter().chain(right).map(|&cell| cell.to_owned()).collect();
        let rule = [vec!["---"; left.len()], vec!["---:"; right.len()]].concat();
        row(&cells) + &row(&rule.into_iter().map(str::to_owned).collect::<Vec<_>>())
    };
    let mut text = header(&["model"], metrics);
    for column in columns {
        let mean = |metric: &&str| {
            let found = column.means.iter().find(|(name, _)| name == metric);
            found.map_or("–".to_owned(), |(_, mean)| format!("{mean:.3}"))
        };
        text += &row(&[vec![column.model.clone()], metrics.iter().map(mean).collect()].concat());
    }
    if columns.len() < 2 {
        return text;
    }
    text += "\nShare of images with the higher score on the same prompt and noise, a tie being half a \
             win, and mean difference of the scores, each ± its standard error over prompts:\n\n";
    text += &header(&["model", "against", "metric"], &["wins", "difference"]);
    let with = |value: String, error: Option<String>| {
        error.map_or(value.clone(), |error| format!("{value} ± {error}"))
    };
    for column in columns {
        for Pair { against, metric, wins } in &column.wins {
            let share = with(
                format!("{:.3}", wins.share),
                wins.share_error.map(|error| format!("{error:.3}")),
            );
            let difference = with(
                format!("{:+.3}", wins.difference),
                wins.difference_error.map(|error| format!("{error:.3}")),
            );
            text +=
                &row(&[column.model.clone(), against.clone(), metric.clone(), share, difference]);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_that_one_model_lacks_is_left_out_of_its_pairs() {
        let rows = |scores: [f32; 2]| scores.map(|score| vec![score]).to_vec();
        let both = vec![("a".into(), rows([1.0, 0.0])), ("b".into(), rows([2.0, 4.0]))];
        let mut columns = vec![Column::new("first", both, &[])];
        columns.push(Column::new("second", vec![("b".into(), rows([3.0, 5.0]))], &columns));
        assert_eq!(columns[0].per_prompt, [[1.0, 2.0], [0.0, 4.0]]);
        let text = markdown(&columns, &["a", "b"]);
        for line in [
            "| model | a | b |\n| --- | ---: | ---: |\n",
            "| first | 0.500 | 3.000 |\n| second | – | 4.000 |\n",
            "| second | first | b | 1.000 ± 0.000 | +1.000 ± 0.000 |\n",
        ] {
            assert!(text.contains(line), "{line} is not in:\n{text}");
        }
        assert_eq!(text.matches("| second |").count(), 2);
    }
}

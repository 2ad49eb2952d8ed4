//! Rewards of groups: computed while the next ones roll out, and put together from all ranks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread::{Scope, ScopedJoinHandle};

use anyhow::{Error, Result, ensure};
use cluster::Group;
use flow::panics::caught;
use flow::prompts::Prompt;
use image::RgbImage;

use super::division::Division;
use super::experience::Watch;
use super::ranks::{self, Exact};
use crate::reward::{Outcome, Rewards, Scores};

/// A thread that scores groups, or parts of them, in the order in which they come.
pub(crate) struct Scoring<'scope> {
    queue: Sender<(&'scope Prompt, Vec<RgbImage>)>,
    thread: ScopedJoinHandle<'scope, Result<Vec<Scores>>>,
    is_given_up: Arc<AtomicBool>,
}

impl<'scope> Scoring<'scope> {
    pub(crate) fn start<'env>(
        scope: &'scope Scope<'scope, 'env>,
        rewards: &'scope Rewards,
        watch: &'scope dyn Watch,
    ) -> Self {
        let (queue, groups) = mpsc::channel::<(&Prompt, Vec<RgbImage>)>();
        let is_given_up = Arc::new(AtomicBool::new(false));
        let given_up = Arc::clone(&is_given_up);
        let score = move || {
            let score = |(prompt, images): (&Prompt, Vec<RgbImage>)| {
                let is_stopped = watch.is_stopped() || given_up.load(Ordering::Relaxed);
                ensure!(!is_stopped, "stopped between two groups");
                let images: Vec<&RgbImage> = images.iter().collect();
                rewards.score(&vec![prompt; images.len()], &images)
            };
            groups.into_iter().map(score).collect()
        };
        let thread = scope.spawn(move || caught(score).map_err(Error::msg).flatten());
        Self { queue, thread, is_given_up }
    }

    /// Scores the `images` of `prompt`, which are those of one group, after all that came before.
    pub(crate) fn add(&self, prompt: &'scope Prompt, images: Vec<RgbImage>) {
        // Where it has failed, `finish` says why.
        _ = self.queue.send((prompt, images));
    }

    /// Whether it has ended, which it does before its time where a required reward fails.
    pub(crate) fn has_failed(&self) -> bool {
        self.thread.is_finished()
    }

    /// Leaves unscored what is still to come.
    pub(crate) fn give_up(self) {
        self.is_given_up.store(true, Ordering::Relaxed);
    }

    /// Waits for the scores of all that came.
    ///
    /// # Errors
    /// When a required reward fails; when the run is asked to stop.
    pub(crate) fn finish(self) -> Result<Vec<Scores>> {
        drop(self.queue);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// What a rank says of one reward of its members of a group: scores, failures, retries, seconds, why the last one
/// failed.
type Told = (Option<Vec<Exact>>, u32, u32, Exact, Option<String>);

/// The scores of all groups, in order; or what one of the ranks failed with, on all.
pub(crate) fn of_all(
    ranks: &Group,
    division: &Division,
    own: Result<Vec<Scores>>,
) -> Result<Vec<Scores>> {
    if ranks.world() == 1 {
        return own;
    }
    let told = |outcome: Outcome| -> Told {
        let Outcome { scores, failures, retries, seconds, error } = outcome;
        let scores = scores.map(|scores| scores.into_iter().map(Exact::from).collect());
        (scores, failures, retries, seconds.into(), error)
    };
    let heard = |(scores, failures, retries, seconds, error): Told| {
        let scores = scores.map(|scores| scores.into_iter().map(f64::from).collect());
        Outcome { scores, failures, retries, seconds: seconds.into(), error }
    };
    let of_group =
        |scores: Scores| -> Vec<Told> { scores.outcomes.into_iter().map(told).collect() };
    let own: Result<Vec<Vec<Told>>> = own.map(|own| own.into_iter().map(of_group).collect());
    let all = ranks::shared(ranks, &own)?.into_iter().flatten();
    let mut parts = all.map(|told| told.into_iter().map(heard).collect());
    let groups = 0..division.n_groups();
    Ok(groups.map(|group| whole(parts.by_ref().take(division.ranks_of(group).count()))).collect())
}

/// The scores of a group from those of its parts, in the order of its members.
fn whole(mut parts: impl Iterator<Item = Vec<Outcome>>) -> Scores {
    let first = parts.next().expect("every group has a rank");
    let outcomes = parts.fold(first, |whole, part| {
        let joined = |(whole, part): (Outcome, Outcome)| Outcome {
            scores: whole.scores.zip(part.scores).map(|(whole, part)| [whole, part].concat()),
            failures: whole.failures + part.failures,
            retries: whole.retries + part.retries,
            seconds: whole.seconds.max(part.seconds),
            error: part.error.or(whole.error),
        };
        whole.into_iter().zip(part).map(joined).collect()
    });
    Scores { outcomes }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(
        scores: Option<&[f64]>,
        failures: u32,
        seconds: f64,
        error: Option<&str>,
    ) -> Vec<Outcome> {
        let (scores, error) = (scores.map(<[f64]>::to_vec), error.map(str::to_owned));
        vec![Outcome { scores, failures, retries: failures, seconds, error }]
    }

    #[test]
    fn a_group_is_the_line_of_its_parts_and_goes_without_what_one_of_them_lacks() {
        let joined = |parts: [Vec<Outcome>; 2]| whole(parts.into_iter()).outcomes.remove(0);
        let both = joined([
            part(Some(&[1.0, 2.0]), 1, 3.0, Some("busy")),
            part(Some(&[3.0]), 2, 2.0, None),
        ]);
        assert_eq!(both.scores.unwrap(), [1.0, 2.0, 3.0]);
        assert_eq!((both.failures, both.retries, both.seconds), (3, 3, 3.0));
        assert_eq!(both.error.unwrap(), "busy");
        let half = joined([part(Some(&[1.0]), 0, 1.0, None), part(None, 1, 1.0, Some("gone"))]);
        assert_eq!((half.scores, half.error.unwrap()), (None, "gone".to_owned()));
    }
}

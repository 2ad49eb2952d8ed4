//! Signals ask a run to stop at the next place where nothing is lost, and are answered at once.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use flow::log;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

/// Who asks: Ctrl-C, a cluster, a terminal that closes, Slurm before the time is over.
const SIGNALS: [(i32, &str); 4] =
    [(SIGINT, "Ctrl-C"), (SIGTERM, "SIGTERM"), (SIGHUP, "SIGHUP"), (SIGUSR1, "SIGUSR1")];
/// Exit code of a program that was asked to stop.
pub(crate) const INTERRUPTED: u8 = 130;

/// Who hears the answers to signals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answers {
    /// Whoever reads standard error.
    Said,
    /// The same, but for a SIGTERM after another signal: that is the other one, passed on by a launcher.
    SaidOnce,
    /// Nobody, since another process answers; the log keeps them.
    Kept,
}

static ASKED: AtomicBool = AtomicBool::new(false);
static STAGE: Mutex<Option<Stage>> = Mutex::new(None);

/// What is under way.
struct Stage {
    name: String,
    /// When it should be over, where that is known.
    end: Option<Instant>,
}

/// Starts to listen. `is_patient` work looks at [`asked`] and ends by itself, however often it is asked;
/// other work ends at the first signal.
///
/// # Errors
/// When signals cannot be listened to.
pub fn listen(is_patient: bool, answers: Answers) -> Result<()> {
    let mut signals = Signals::new(SIGNALS.map(|(signal, _)| signal))?;
    let attend = move || {
        for signal in signals.forever() {
            if !is_patient {
                signal_hook::low_level::exit(INTERRUPTED.into());
            }
            let name =
                SIGNALS.iter().find(|(known, _)| *known == signal).map_or("", |(_, name)| name);
            let again = ASKED.swap(true, Ordering::Relaxed);
            let answer = answer(name, again);
            let is_passed_on = again && signal == SIGTERM;
            match answers {
                Answers::Said => log::say(&answer),
                Answers::SaidOnce if !is_passed_on => log::say(&answer),
                Answers::SaidOnce | Answers::Kept => log::keep(&answer),
            }
        }
    };
    thread::Builder::new().name("signals".into()).spawn(attend)?;
    Ok(())
}

/// Whether someone asked to stop.
pub(crate) fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// Ends work that has nothing worth saving half-way.
pub(crate) fn check() -> Result<()> {
    if asked() {
        bail!("interrupted: nothing was written");
    }
    Ok(())
}

/// From now on the work is `name`, for about `seconds`.
pub(crate) fn enter(name: String, seconds: Option<f64>) {
    let seconds = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let end = seconds.and_then(|length| Instant::now().checked_add(length));
    log::detail(&name);
    *STAGE.lock().unwrap_or_else(PoisonError::into_inner) = Some(Stage { name, end });
}

/// One line on standard error, which may be gone together with the terminal.
pub(crate) fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

fn answer(signal: &str, again: bool) -> String {
    let stage = STAGE.lock().unwrap_or_else(PoisonError::into_inner);
    let waits = match &*stage {
        None => "the next safe place".to_owned(),
        Some(Stage { name, end: None }) => {
            format!("the end of {name} (the first, so how long is not known)")
        }
        Some(Stage { name, end: Some(end) }) => {
            let left = end.saturating_duration_since(Instant::now()).as_secs_f64();
            format!("the end of {name}, about {left:.0} s")
        }
    };
    let begins = if again { "still stopping" } else { "stopping" };
    format!(
        "{signal}: {begins}: waits for {waits}; then what is whole is saved (kill -9 saves nothing)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_says_what_it_waits_for_and_how_long() {
        assert!(
            answer("SIGHUP", false).contains("SIGHUP: stopping: waits for the next safe place")
        );
        enter("the update of iteration 7".into(), None);
        assert!(
            answer("Ctrl-C", false).contains("the end of the update of iteration 7 (the first")
        );
        enter("the update of iteration 8".into(), Some(61.4));
        let said = answer("Ctrl-C", true);
        assert!(said.contains("still stopping") && said.contains("about 61 s"), "{said}");
        enter("what".into(), Some(f64::NAN));
    }
}

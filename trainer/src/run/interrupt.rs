//! Ctrl-C and SIGTERM ask a run to stop at the next safe place.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};

static ASKED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Starts to listen. A second signal ends the process at once.
pub fn listen() -> Result<()> {
    let asked = ASKED.get_or_init(Arc::default);
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(asked))?;
        signal_hook::flag::register(signal, Arc::clone(asked))?;
    }
    Ok(())
}

/// Whether someone asked to stop.
pub(crate) fn asked() -> bool {
    ASKED.get().is_some_and(|asked| asked.load(Ordering::Relaxed))
}

/// Ends work that has nothing worth saving half-way.
pub(crate) fn check() -> Result<()> {
    if asked() {
        bail!("interrupted: nothing was written");
    }
    Ok(())
}

//! The kinds of configurations: each is read by a command, and has presets of its own.

use anyhow::{Result, bail};
use flow::usage::Usage;
use toml::Table;

use crate::command::compare::{COMPARE_PRESETS, CompareConfig};
use crate::command::pretrain::{PRETRAIN_PRESETS, PretrainConfig};
use crate::run::config::AlignConfig;
use crate::run::layers::Layers;
use crate::run::schema::{Entry, Schema, meant};
use crate::run::settings::{self, ALIGN_PRESETS, Source};

/// What a configuration is of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    Align,
    Compare,
    Pretrain,
}

impl Kind {
    /// In the order in which a preset of a name is looked for.
    pub(super) const ALL: [Self; 3] = [Self::Align, Self::Compare, Self::Pretrain];

    /// The command that reads it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Align => "align",
            Self::Compare => "compare",
            Self::Pretrain => "pretrain",
        }
    }

    pub(super) fn presets(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Align => &ALIGN_PRESETS,
            Self::Compare => &COMPARE_PRESETS,
            Self::Pretrain => &PRETRAIN_PRESETS,
        }
    }

    /// What settings there are.
    pub(super) fn entries(self) -> Vec<Entry> {
        match self {
            Self::Align => Schema::of::<AlignConfig>().entries(),
            Self::Compare => Schema::of::<CompareConfig>().entries(),
            Self::Pretrain => Schema::of::<PretrainConfig>().entries(),
        }
    }

    /// The kind and the name of a preset that was typed as `NAME` or `KIND:NAME`.
    ///
    /// # Errors
    /// [`Usage`] when there is none.
    pub(super) fn of(typed: &str) -> Result<(Self, &str)> {
        let of_kind = Self::ALL.iter().find_map(|kind| {
            let name = typed.strip_prefix(kind.name())?.strip_prefix(':')?;
            Some((std::slice::from_ref(kind), name))
        });
        let (kinds, name) = of_kind.unwrap_or((&Self::ALL, typed));
        if let Some(kind) = kinds.iter().find(|kind| kind.has(name)) {
            return Ok((*kind, name));
        }
        let mut known: Vec<&str> =
            kinds.iter().flat_map(|kind| kind.presets()).map(|(known, _)| *known).collect();
        known.sort_unstable();
        known.dedup();
        bail!(Usage(format!("there is no preset {typed:?}{}", meant(name, known.into_iter()))));
    }

    /// Whether a preset of it is called `name`.
    pub(super) fn has(self, name: &str) -> bool {
        self.presets().iter().any(|(known, _)| *known == name)
    }

    /// Every setting of a configuration that is no run, and where they are said.
    ///
    /// # Errors
    /// As [`settings::resolved`].
    ///
    /// # Panics
    /// For a run, which [`settings::align`] reads.
    pub(super) fn resolved(self, source: &Source<'_>, said: &[String]) -> Result<(Table, Layers)> {
        match self {
            Self::Align => unreachable!("a run has more to it"),
            Self::Compare => {
                settings::resolved(source, self.presets(), said, CompareConfig::validate)
            }
            Self::Pretrain => {
                settings::resolved(source, self.presets(), said, PretrainConfig::validate)
            }
        }
    }
}

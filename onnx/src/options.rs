//! How a model runs.

use std::{fmt, path::PathBuf};

/// How a [`Model`](crate::Model) runs. The default is one thread of the CPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Threads that share one operator, at least 1. Operators run one after the other.
    pub threads: usize,
    /// What computes.
    pub provider: Provider,
    /// Number of the GPU.
    pub device: usize,
    /// Whether weights are copied into the order that kernels read fastest. Without it weights stay
    /// mapped from their file, and one-row products may round otherwise.
    pub repack: bool,
    /// Shapes that TensorRT builds an engine for; every input whose size is open must be named.
    pub profile: Option<Profile>,
    /// Where TensorRT keeps what it built.
    pub engines: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            threads: 1,
            provider: Provider::Cpu,
            device: 0,
            repack: true,
            profile: None,
            engines: None,
        }
    }
}

/// What computes a graph. There is no falling back: a graph runs where it was asked to, or not at
/// all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Provider {
    #[default]
    Cpu,
    Cuda,
    /// TensorRT 10 in ONNX Runtime's own provider; builds an engine on the GPU it runs on.
    TensorRt,
    /// TensorRT-RTX, for consumer GPUs, in its plug-in provider.
    TensorRtRtx,
}

/// The names that people type.
pub const PROVIDERS: [(&str, Provider); 4] = [
    ("cpu", Provider::Cpu),
    ("cuda", Provider::Cuda),
    ("tensorrt", Provider::TensorRt),
    ("tensorrt-rtx", Provider::TensorRtRtx),
];

impl Provider {
    /// The provider called `name` in [`PROVIDERS`].
    pub fn by_name(name: &str) -> Option<Self> {
        PROVIDERS.iter().find(|(known, _)| *known == name).map(|&(_, provider)| provider)
    }

    /// Whether it builds an engine before the first run, which takes minutes for a large graph.
    pub fn builds_engines(self) -> bool {
        matches!(self, Self::TensorRt | Self::TensorRtRtx)
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = PROVIDERS.iter().find(|(_, provider)| provider == self);
        f.write_str(found.map_or("", |(name, _)| name))
    }
}

/// Smallest, usual and largest shape of each input.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    pub inputs: Vec<(String, [Vec<usize>; 3])>,
}

impl Profile {
    /// `name:1x2x3,…` of the smallest (0), usual (1) or largest (2) shapes, as TensorRT's providers
    /// take it.
    pub fn text(&self, which: usize) -> String {
        let input = |(name, shapes): &(String, [Vec<usize>; 3])| {
            let dims: Vec<String> = shapes[which].iter().map(ToString::to_string).collect();
            format!("{name}:{}", dims.join("x"))
        };
        self.inputs.iter().map(input).collect::<Vec<_>>().join(",")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_are_written_as_tensorrt_reads_them() {
        let shapes = [vec![1, 16, 64], vec![1, 1024, 64], vec![2, 4096, 64]];
        let profile = Profile {
            inputs: vec![
                ("hidden_states".into(), shapes),
                ("timestep".into(), [vec![1], vec![1], vec![2]]),
            ],
        };
        assert_eq!(profile.text(0), "hidden_states:1x16x64,timestep:1");
        assert_eq!(profile.text(2), "hidden_states:2x4096x64,timestep:2");
    }

    #[test]
    fn every_provider_has_a_name() {
        for (name, provider) in PROVIDERS {
            assert_eq!(Provider::by_name(name), Some(provider));
            assert_eq!(provider.to_string(), name);
        }
        assert_eq!(Provider::by_name("rocm"), None);
    }
}

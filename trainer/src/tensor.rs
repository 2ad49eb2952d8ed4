//! libtorch's tensors: where they live, parameters as flat storage, and the interpreter of networks.

pub mod device;
pub(crate) mod eager;
pub(crate) mod parameters;
pub(crate) mod stored;

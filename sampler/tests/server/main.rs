//! The server in this process, with the networks of the embedded model.

mod jobs;
mod loras;
mod openai;
mod refusals;
mod rig;
mod sdapi;
mod sockets;

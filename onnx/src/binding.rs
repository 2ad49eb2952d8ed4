//! Buffers that a loop hands to a graph again and again.

use anyhow::{Context, Result, anyhow, ensure};
use ort::{
    memory::Allocator,
    session::{IoBinding, Session},
    value::DynTensor,
};

use crate::{Data, Port, Tensor, cancel::one_line, elements};

/// The inputs of a graph and one float output, allocated once. On another device than the CPU what
/// does not change between runs is copied there once.
pub struct Binding {
    pub(crate) io: IoBinding,
    inputs: Vec<(Port, DynTensor)>,
    output: DynTensor,
    len: usize,
}

impl Binding {
    pub(crate) fn new(
        session: &Session,
        inputs: &[(&Port, &Tensor)],
        output: (&Port, &[usize]),
    ) -> Result<Self> {
        let allocator = Allocator::default();
        let allocate = |port: &Port, shape: &[usize]| -> Result<DynTensor> {
            let element = port.element.of_tensor();
            let element = element
                .ok_or_else(|| anyhow!("`{}`: {} is not supported", port.name, port.element))?;
            let shape: Vec<i64> = shape.iter().map(|&dim| dim as i64).collect();
            Ok(DynTensor::new(&allocator, element, shape)?)
        };
        let mut io = session.create_binding()?;
        let (port, shape) = output;
        let mut result = allocate(port, shape)?;
        io.bind_output(port.name.as_str(), &mut result)?;
        let mut binding =
            Self { io, inputs: Vec::new(), output: result, len: shape.iter().product() };
        for &(port, tensor) in inputs {
            let value = allocate(port, &tensor.shape)?;
            binding.inputs.push((port.clone(), value));
            binding.set(&port.name, &tensor.data)?;
        }
        Ok(binding)
    }

    /// Gives input `name` other numbers, as many as before.
    ///
    /// # Errors
    /// When there is no such input, or the numbers are of another kind or count.
    pub fn set(&mut self, name: &str, data: &Data) -> Result<()> {
        let (port, value) = self
            .inputs
            .iter_mut()
            .find(|(port, _)| port.name == name)
            .with_context(|| format!("no bound input `{name}`"))?;
        let n_elements: usize = value.shape().iter().map(|&dim| dim as usize).product();
        ensure!(
            data.len() == n_elements,
            "input `{name}` takes {n_elements} numbers, not {}",
            data.len()
        );
        elements::write(value, data).with_context(|| format!("input `{}`", port.name))?;
        // On another device this is what copies.
        self.io.bind_input(name, value).map_err(|error| one_line(error.message()))
    }

    /// Copies the output of the last run into `into`, of the bound length.
    ///
    /// # Errors
    /// When the lengths differ.
    pub fn read(&self, into: &mut [f32]) -> Result<()> {
        ensure!(into.len() == self.len, "the output has {} numbers, not {}", self.len, into.len());
        elements::read_into(&self.output, into)
    }
}

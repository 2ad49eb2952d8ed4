//! One ONNX graph in an ONNX Runtime session.

use std::{
    borrow::Cow,
    fmt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use half::{bf16, f16};
use ort::{
    environment::Environment,
    logging::LogLevel,
    session::{
        OutputSelector, RunOptions, SelectedOutputMarker, Session, SessionInputValue,
        SessionOutputs,
        builder::{GraphOptimizationLevel, SessionBuilder},
    },
    value::TensorRef,
};

use crate::{
    Binding, Cancel, Data, ElementType, Options, Port, Tensor, cancel::one_line, elements,
    library::environment, placement, port::names, provider,
};

/// A loaded ONNX graph.
///
/// ### Why `run` takes `&mut self`
/// ONNX Runtime sessions are not safe to run from two threads at once in every configuration, so
/// a model belongs to one worker; workers that share a file open it once each.
pub struct Model {
    session: Session,
    path: PathBuf,
    inputs: Vec<Port>,
    overridable: Vec<Port>,
    outputs: Vec<Port>,
    busy: Duration,
}

impl Model {
    /// Opens an `.onnx` file (external data beside it included).
    ///
    /// # Errors
    /// ONNX Runtime is not installed (see [`crate::library`]), the provider needs something that is
    /// not, or the file is missing, not an ONNX model, or uses something this ONNX Runtime does not
    /// have there.
    pub fn open(path: impl AsRef<Path>, options: &Options) -> Result<Self> {
        let path = path.as_ref();
        ensure!(options.threads > 0, "an ONNX model needs at least one thread");
        ensure!(path.is_file(), "no such ONNX model: {}", path.display());
        let environment = environment()?;
        provider::check(options)?;
        let session = builder(&environment, options)
            .context("cannot configure ONNX Runtime")?
            .commit_from_file(path)
            .map_err(|error| refusal(error.message()))
            .with_context(|| {
                format!("cannot open ONNX model {} on {}", path.display(), options.provider)
            })?;
        placement::check(&session, options.provider)
            .with_context(|| format!("cannot run ONNX model {}", path.display()))?;
        let ports = |outlets: &[ort::value::Outlet]| outlets.iter().map(Port::of).collect();
        let (inputs, outputs) = (ports(session.inputs()), ports(session.outputs()));
        let overridable = session.overridable_initializers();
        let overridable = overridable.iter().map(|it| Port::new(it.name(), it.dtype())).collect();
        Ok(Self {
            session,
            path: path.to_owned(),
            inputs,
            overridable,
            outputs,
            busy: Duration::ZERO,
        })
    }

    /// The file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Inputs that a run must give, in the graph's order.
    pub fn inputs(&self) -> &[Port] {
        &self.inputs
    }

    /// Inputs that a run may give, which have a value of their own in the graph.
    pub fn overridable(&self) -> &[Port] {
        &self.overridable
    }

    /// Outputs that a run can ask for, in the graph's order.
    pub fn outputs(&self) -> &[Port] {
        &self.outputs
    }

    /// The value of `key` in the model's `metadata_props`, if it has one.
    pub fn metadata(&self, key: &str) -> Option<String> {
        self.session.metadata().ok()?.custom(key)
    }

    /// Time spent in runs so far.
    pub fn busy(&self) -> Duration {
        self.busy
    }

    /// Runs the graph once and returns the tensors named in `outputs`, in that order.
    ///
    /// # Errors
    /// An input is missing, unknown, given twice, or of another element type, rank or fixed size
    /// than the graph declares; an output is unknown; or the graph itself fails.
    pub fn run(&mut self, inputs: &[(&str, &Tensor)], outputs: &[&str]) -> Result<Vec<Tensor>> {
        let selector = outputs
            .iter()
            .fold(OutputSelector::no_default(), |selector, name| selector.with(*name));
        let options = RunOptions::new()?.with_outputs(selector);
        self.run_with(inputs, outputs, &options, &Cancel::default())
    }

    /// As [`Model::run`], stopped by `cancel`.
    ///
    /// # Errors
    /// As [`Model::run`]; [`crate::Cancelled`] when it was stopped.
    pub fn run_until(
        &mut self,
        inputs: &[(&str, &Tensor)],
        outputs: &[&str],
        cancel: &Cancel,
    ) -> Result<Vec<Tensor>> {
        let options = cancel.options()?;
        self.run_with(inputs, outputs, &options, cancel)
    }

    /// Buffers for runs with inputs of these shapes, which begin with these numbers, and with the
    /// float output `output.0` of shape `output.1`.
    ///
    /// # Errors
    /// As [`Model::run`] for wrong inputs and outputs.
    pub fn bind(&self, inputs: &[(&str, &Tensor)], output: (&str, &[usize])) -> Result<Binding> {
        let bound = || -> Result<Binding> {
            self.check(inputs, &[output.0])?;
            let port = self.outputs.iter().find(|port| port.name == output.0).expect("checked");
            ensure!(
                port.holds(output.1),
                "output `{}` has another shape than {:?}",
                output.0,
                output.1
            );
            let inputs: Vec<(&Port, &Tensor)> = inputs
                .iter()
                .map(|&(name, tensor)| (self.takes(name).expect("checked"), tensor))
                .collect();
            Binding::new(&self.session, &inputs, (port, output.1))
        };
        bound().with_context(|| format!("cannot run ONNX model {}", self.path.display()))
    }

    /// Runs the graph once on the buffers of `binding`.
    ///
    /// # Errors
    /// When the graph fails; [`crate::Cancelled`] when it was stopped.
    pub fn run_bound(&mut self, binding: &Binding, cancel: &Cancel) -> Result<()> {
        let options = cancel.options()?;
        let start = Instant::now();
        let result = self.session.run_binding_with_options(&binding.io, &options).map(drop);
        self.busy += start.elapsed();
        cancel.outcome(result).with_context(|| self.failed())
    }

    fn run_with<O: SelectedOutputMarker>(
        &mut self,
        inputs: &[(&str, &Tensor)],
        outputs: &[&str],
        options: &RunOptions<O>,
        cancel: &Cancel,
    ) -> Result<Vec<Tensor>> {
        self.check(inputs, outputs)
            .with_context(|| format!("cannot run ONNX model {}", self.path.display()))?;
        let narrowed = inputs
            .iter()
            .map(|&(name, tensor)| {
                let port = self.takes(name).expect("checked");
                Narrowed::new(tensor, &port.element).with_context(|| format!("input `{name}`"))
            })
            .collect::<Result<Vec<_>>>()?;
        let values = inputs
            .iter()
            .zip(&narrowed)
            .map(|((name, tensor), narrowed)| {
                Ok((Cow::Borrowed(*name), narrowed.value(&tensor.shape)?))
            })
            .collect::<Result<Vec<(Cow<'_, str>, SessionInputValue<'_>)>>>()?;
        let failed = self.failed();
        let path = self.path.display().to_string();
        let start = Instant::now();
        let results = self.session.run_with_options(values, options);
        self.busy += start.elapsed();
        let results: SessionOutputs<'_> = cancel.outcome(results).context(failed)?;
        outputs
            .iter()
            .map(|name| {
                let value = results.get(name).context("ONNX Runtime returned no such output");
                value.and_then(elements::read).with_context(|| format!("output `{name}` of {path}"))
            })
            .collect()
    }

    fn failed(&self) -> String {
        format!("ONNX model {} failed", self.path.display())
    }

    /// The input called `name`, whether a run must or may give it.
    fn takes(&self, name: &str) -> Option<&Port> {
        self.inputs.iter().chain(&self.overridable).find(|port| port.name == name)
    }

    fn check(&self, inputs: &[(&str, &Tensor)], outputs: &[&str]) -> Result<()> {
        for (i, (name, tensor)) in inputs.iter().enumerate() {
            let port = self.takes(name).ok_or_else(|| {
                anyhow!("no input `{name}`; the inputs are {}", names(&self.inputs))
            })?;
            ensure!(
                inputs[..i].iter().all(|(earlier, _)| earlier != name),
                "input `{name}` is given twice"
            );
            port.check(tensor)?;
        }
        let missing = self
            .inputs
            .iter()
            .filter(|port| inputs.iter().all(|(name, _)| *name != port.name))
            .cloned()
            .collect::<Vec<_>>();
        ensure!(missing.is_empty(), "missing input {}", names(&missing));
        ensure!(!outputs.is_empty(), "no output asked for");
        for name in outputs {
            ensure!(
                self.outputs.iter().any(|port| port.name == *name),
                "no output `{name}`; the outputs are {}",
                names(&self.outputs)
            );
        }
        Ok(())
    }
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model")
            .field("path", &self.path)
            .field("inputs", &self.inputs)
            .field("outputs", &self.outputs)
            .finish_non_exhaustive()
    }
}

/// A tensor's elements in the type that the graph takes; borrowed where that is their own.
enum Narrowed<'a> {
    F32(&'a [f32]),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    I64(&'a [i64]),
    I32(Vec<i32>),
}

impl<'a> Narrowed<'a> {
    fn new(tensor: &'a Tensor, element: &ElementType) -> Result<Self> {
        Ok(match (&tensor.data, element) {
            (Data::F32(data), ElementType::F16) => {
                Self::F16(data.iter().map(|&value| f16::from_f32(value)).collect())
            }
            (Data::F32(data), ElementType::Bf16) => {
                Self::Bf16(data.iter().map(|&value| bf16::from_f32(value)).collect())
            }
            (Data::F32(data), _) => Self::F32(data),
            (Data::I64(data), ElementType::I32) => {
                let narrow =
                    data.iter().map(|&value| i32::try_from(value)).collect::<Result<_, _>>();
                Self::I32(narrow.context("a value does not fit in i32")?)
            }
            (Data::I64(data), _) => Self::I64(data),
        })
    }

    fn value<'s>(&'s self, shape: &[usize]) -> Result<SessionInputValue<'s>> {
        let shape = shape.to_vec();
        Ok(match self {
            Self::F32(data) => TensorRef::from_array_view((shape, *data))?.into(),
            Self::F16(data) => TensorRef::from_array_view((shape, data.as_slice()))?.into(),
            Self::Bf16(data) => TensorRef::from_array_view((shape, data.as_slice()))?.into(),
            Self::I64(data) => TensorRef::from_array_view((shape, *data))?.into(),
            Self::I32(data) => TensorRef::from_array_view((shape, data.as_slice()))?.into(),
        })
    }
}

/// ONNX Runtime's reason in one line; in our words where it is long.
fn refusal(message: &str) -> anyhow::Error {
    if message.contains("escapes model directory") {
        return anyhow!(
            "its weights lie outside its folder, behind a link, which ONNX Runtime refuses: copy the folder \
             with `cp -rL`"
        );
    }
    one_line(message)
}

fn builder(environment: &Environment, options: &Options) -> Result<SessionBuilder> {
    let on_threads = || -> ort::Result<SessionBuilder> {
        Ok(SessionBuilder::new(environment)?
            .with_optimization_level(GraphOptimizationLevel::All)?
            .with_parallel_execution(false)?
            // What fails is returned as well.
            .with_log_level(LogLevel::Fatal)?
            .with_inter_threads(1)?
            .with_intra_threads(options.threads)?
            .with_prepacking(options.repack)?
            .with_deterministic_compute(true)?)
    };
    let builder = on_threads().map_err(|error| one_line(error.message()))?;
    provider::register(environment, builder, options)
}

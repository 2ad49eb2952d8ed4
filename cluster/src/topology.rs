//! Where a process stands among the others, as its launcher's environment says: torchrun's names, Slurm's,
//! and those by which scripts of one command a node say theirs.

use crate::error::Error;

/// Of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// From 0.
    pub rank: usize,
    /// Processes in all, at least 1.
    pub world: usize,
    /// Among the processes of this node, from 0: the number of its device.
    pub local_rank: usize,
    /// Processes of this node.
    pub local_world: usize,
    /// Where the store listens.
    pub host: String,
    pub port: u16,
    /// Whether the launcher serves the store; rank 0 does otherwise.
    pub launcher_serves: bool,
    /// Whether that store stays when the launcher starts the processes again.
    pub store_stays: bool,
    /// What started the process: `torchrun`, `slurm`, `--processes`, or whatever sets torchrun's variables.
    pub launcher: &'static str,
}

/// One of the machines of a job that starts one command a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// From 0.
    pub index: usize,
    /// Machines, at least 1.
    pub count: usize,
    /// Processes to start on each; `None`: one a device.
    pub processes: Option<usize>,
    /// Machine 0, where the store listens.
    pub host: String,
    pub port: u16,
}

/// What the environment asks of this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Launch {
    /// Nothing: it is the only one.
    Alone,
    /// To be one rank.
    Rank(Topology),
    /// To start the ranks of a machine.
    Node(Node),
}

/// Port of the store where nobody names one; torchrun's.
pub const PORT: u16 = 29500;

const HOST: [&str; 3] = ["MASTER_ADDR", "MASTER_IP", "CHIEF_IP"];
const NODE_INDEX: [&str; 3] = ["MACHINE_RANK", "NODE_RANK", "INDEX"];
const NODE_COUNT: [&str; 3] = ["NUM_MACHINES", "NUM_NODES", "HOST_NUM"];
const NODE_PROCESSES: [&str; 2] = ["GPUS_PER_NODE", "HOST_GPU_NUM"];

impl Topology {
    /// Whether all processes are on one machine.
    pub fn is_local(&self) -> bool {
        self.local_world == self.world
    }

    /// Machines, if each has as many processes as this one.
    pub fn n_nodes(&self) -> usize {
        self.world.div_ceil(self.local_world)
    }
}

impl Launch {
    /// Reads this process's environment.
    ///
    /// # Errors
    /// [`Error::Environment`], with the variable that is missing or wrong.
    pub fn from_environment() -> Result<Self, Error> {
        Self::from_variables(&|name| std::env::var(name).ok())
    }

    /// The same from the variables that `get` knows.
    ///
    /// # Errors
    /// As [`Launch::from_environment`].
    pub fn from_variables(get: &dyn Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let variables = Variables { get };
        if variables.first(&["RANK", "WORLD_SIZE"]).is_some() {
            return Ok(Self::Rank(variables.torchrun()?));
        }
        if variables.first(&["SLURM_PROCID"]).is_some() && !variables.is_batch_script() {
            let topology = variables.slurm()?;
            return Ok(if topology.world == 1 { Self::Alone } else { Self::Rank(topology) });
        }
        match variables.first(&NODE_COUNT) {
            Some(_) => Ok(Self::Node(variables.node()?)),
            None => Ok(Self::Alone),
        }
    }
}

struct Variables<'a> {
    get: &'a dyn Fn(&str) -> Option<String>,
}

impl Variables<'_> {
    /// The first that is set, and its value.
    fn first<'n>(&self, names: &[&'n str]) -> Option<(&'n str, String)> {
        names.iter().find_map(|&name| {
            let value = (self.get)(name)?;
            let value = value.trim().to_owned();
            (!value.is_empty()).then_some((name, value))
        })
    }

    fn required(&self, names: &[&str], why: &str) -> Result<(String, String), Error> {
        let found = self.first(names).map(|(name, value)| (name.to_owned(), value));
        found.ok_or_else(|| wrong(&names.join(" or "), &format!("not set, but {why}")))
    }

    fn number(&self, names: &[&str], why: &str) -> Result<usize, Error> {
        let (name, value) = self.required(names, why)?;
        value.parse().map_err(|_| wrong(&name, &format!("`{value}` is not a number")))
    }

    fn optional(&self, names: &[&str]) -> Result<Option<usize>, Error> {
        self.first(names).map(|_| self.number(names, "")).transpose()
    }

    fn port(&self, otherwise: u16) -> Result<u16, Error> {
        let Some(port) = self.optional(&["MASTER_PORT"])? else { return Ok(otherwise) };
        u16::try_from(port).map_err(|_| wrong("MASTER_PORT", &format!("`{port}` is not a port")))
    }

    /// The contract of torchrun, which the Kubeflow operator and most scripts keep too.
    fn torchrun(&self) -> Result<Topology, Error> {
        let world = self.number(&["WORLD_SIZE"], "RANK is")?;
        let rank = self.number(&["RANK"], "WORLD_SIZE is")?;
        let local_rank = self.optional(&["LOCAL_RANK"])?.unwrap_or(0);
        let local_world = self.optional(&["LOCAL_WORLD_SIZE"])?;
        let host = if world == 1 {
            String::new()
        } else {
            self.required(&HOST, "WORLD_SIZE is above 1")?.1
        };
        let served = self.first(&["TORCHELASTIC_USE_AGENT_STORE"]);
        let launcher_serves = served.is_some_and(|(_, value)| value.eq_ignore_ascii_case("true"));
        let is_torchrun = self.first(&["TORCHELASTIC_RUN_ID"]).is_some();
        checked(Topology {
            rank,
            world,
            local_rank,
            local_world: local_world.unwrap_or(local_rank + 1),
            host,
            port: self.port(PORT)?,
            launcher_serves,
            store_stays: launcher_serves && is_torchrun,
            launcher: match (is_torchrun, launcher_serves) {
                (true, _) => "torchrun",
                (false, true) => "--processes",
                (false, false) => "its environment",
            },
        })
    }

    /// Whether this is sbatch's own script, which is no task of `srun` and yet has the number 0 of one.
    fn is_batch_script(&self) -> bool {
        let is_batch = self.first(&["ENVIRONMENT"]).is_some_and(|(_, value)| value == "BATCH");
        is_batch && self.first(&["SLURM_STEP_NUM_TASKS"]).is_none()
    }

    /// A task of `srun`. The store is on the first node, at a port that is the job's own.
    fn slurm(&self) -> Result<Topology, Error> {
        let why = "SLURM_PROCID is";
        let rank = self.number(&["SLURM_PROCID"], why)?;
        let world = self.number(&["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"], why)?;
        let local_rank = self.number(&["SLURM_LOCALID"], why)?;
        let host = match self.first(&HOST) {
            Some((_, host)) => host,
            None if world == 1 => String::new(),
            None => {
                let names = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"];
                first_node(&self.required(&names, "MASTER_ADDR is not, either")?.1)
            }
        };
        let tasks = self.first(&["SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"]);
        let node = self.optional(&["SLURM_NODEID"])?.unwrap_or(0);
        let local_world = tasks.and_then(|(_, tasks)| tasks_of(&tasks, node));
        let job = self.optional(&["SLURM_JOB_ID"])?.unwrap_or(0);
        checked(Topology {
            rank,
            world,
            local_rank,
            local_world: local_world.unwrap_or(local_rank + 1),
            host,
            port: self.port(20_000 + (job % 10_000) as u16)?,
            launcher_serves: false,
            store_stays: false,
            launcher: "slurm",
        })
    }

    fn node(&self) -> Result<Node, Error> {
        let count = self.number(&NODE_COUNT, "")?;
        let index = match self.optional(&NODE_INDEX)? {
            Some(index) => index,
            None if count == 1 => 0,
            None => self.number(&NODE_INDEX, "there are several machines")?,
        };
        if index >= count {
            let name = self.first(&NODE_INDEX).map_or(NODE_INDEX[0], |(name, _)| name);
            return Err(wrong(name, &format!("{index} of {count} machines: they count from 0")));
        }
        let host = if count == 1 {
            "127.0.0.1".to_owned()
        } else {
            self.required(&HOST, "there are several machines")?.1
        };
        let processes = self.optional(&NODE_PROCESSES)?;
        Ok(Node { index, count, processes, host, port: self.port(PORT)? })
    }
}

fn checked(topology: Topology) -> Result<Topology, Error> {
    let Topology { rank, world, local_rank, local_world, .. } = topology;
    if rank >= world {
        return Err(wrong("rank", &format!("{rank} of a world of {world}: ranks count from 0")));
    }
    if local_rank >= local_world || local_world > world {
        let what = format!("{local_rank} of {local_world} on this node, in a world of {world}");
        return Err(wrong("local rank", &what));
    }
    Ok(topology)
}

fn wrong(variable: &str, what: &str) -> Error {
    Error::Environment { variable: variable.to_owned(), what: what.to_owned() }
}

/// The first host of Slurm's `gpu[07-09,12],login1`.
fn first_node(list: &str) -> String {
    let Some((stem, inside)) = list.split_once('[') else {
        return list.split(',').next().unwrap_or_default().to_owned();
    };
    if let Some((first, _)) = stem.split_once(',') {
        return first.to_owned();
    }
    let (inside, after) = inside.split_once(']').unwrap_or((inside, ""));
    let number = inside.split([',', '-']).next().unwrap_or_default();
    let suffix = after.split(',').next().unwrap_or_default();
    format!("{stem}{number}{suffix}")
}

/// Tasks of a node in Slurm's `4(x2),3`.
fn tasks_of(list: &str, node: usize) -> Option<usize> {
    let mut nodes = 0;
    for part in list.split(',') {
        let (tasks, times) = match part.split_once("(x") {
            Some((tasks, times)) => (tasks, times.trim_end_matches(')').parse().ok()?),
            None => (part, 1),
        };
        nodes += times;
        if node < nodes {
            return tasks.parse().ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(variables: &[(&str, &str)]) -> Result<Launch, Error> {
        Launch::from_variables(&|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string())
        })
    }

    fn rank(variables: &[(&str, &str)]) -> Topology {
        match launch(variables) {
            Ok(Launch::Rank(topology)) => topology,
            other => panic!("{other:?}"),
        }
    }

    fn refused(variables: &[(&str, &str)]) -> String {
        launch(variables).unwrap_err().to_string()
    }

    #[test]
    fn nothing_set_is_one_process() {
        assert_eq!(launch(&[]), Ok(Launch::Alone));
        assert_eq!(launch(&[("INDEX", "3"), ("RANK", " ")]), Ok(Launch::Alone));
    }

    #[test]
    fn torchrun_names_everything() {
        let topology = rank(&[
            ("RANK", "5"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_RANK", "1"),
            ("LOCAL_WORLD_SIZE", "4"),
            ("MASTER_ADDR", "node-a"),
            ("MASTER_PORT", "29400"),
            ("TORCHELASTIC_USE_AGENT_STORE", "True"),
            ("TORCHELASTIC_RESTART_COUNT", "2"),
            ("TORCHELASTIC_RUN_ID", "none"),
        ]);
        let expected = Topology {
            rank: 5,
            world: 8,
            local_rank: 1,
            local_world: 4,
            host: "node-a".to_owned(),
            port: 29400,
            launcher_serves: true,
            store_stays: true,
            launcher: "torchrun",
        };
        assert_eq!(topology, expected);
        assert_eq!((topology.n_nodes(), topology.is_local()), (2, false));
    }

    #[test]
    fn a_pod_of_one_process_needs_no_local_rank() {
        let topology = rank(&[("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "job-master-0")]);
        assert_eq!((topology.local_rank, topology.local_world, topology.port), (0, 1, PORT));
        assert!(!topology.launcher_serves);
    }

    #[test]
    fn slurm_gives_the_first_node_and_a_port_of_the_job() {
        let topology = rank(&[
            ("SLURM_PROCID", "9"),
            ("SLURM_NTASKS", "11"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_NODEID", "2"),
            ("SLURM_STEP_TASKS_PER_NODE", "4(x2),3"),
            ("SLURM_JOB_NODELIST", "gpu[007-008,011]"),
            ("SLURM_JOB_ID", "1234567"),
        ]);
        assert_eq!((topology.rank, topology.local_world), (9, 3));
        assert_eq!((topology.host.as_str(), topology.port), ("gpu007", 24567));
        assert_eq!(
            launch(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "1"), ("SLURM_LOCALID", "0")]),
            Ok(Launch::Alone)
        );
    }

    #[test]
    fn the_script_that_sbatch_runs_is_no_task() {
        let script = [
            ("ENVIRONMENT", "BATCH"),
            ("SLURM_PROCID", "0"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_NTASKS", "8"),
        ];
        assert_eq!(launch(&script), Ok(Launch::Alone));
        assert_eq!(launch(&script[..3]), Ok(Launch::Alone));
        // What srun starts in it is, as many as srun says.
        let step = [("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_JOB_NODELIST", "n1")];
        assert_eq!(rank(&[&script[..], &step[..]].concat()).world, 2);
    }

    #[test]
    fn nodes_of_slurm_are_written_in_many_ways() {
        for (list, first) in [
            ("login1", "login1"),
            ("a1,a2", "a1"),
            ("a1,b[2-3]", "a1"),
            ("rack[3-4]-gpu,x", "rack3-gpu"),
            ("n[9,12]", "n9"),
        ] {
            assert_eq!(first_node(list), first, "{list}");
        }
    }

    #[test]
    fn one_command_a_machine_goes_by_many_names() {
        let node = |index, count, processes, host: &str, port| {
            Ok(Launch::Node(Node { index, count, processes, host: host.to_owned(), port }))
        };
        let found = launch(&[
            ("NUM_MACHINES", "4"),
            ("MACHINE_RANK", "2"),
            ("GPUS_PER_NODE", "8"),
            ("MASTER_IP", "10.0.0.1"),
            ("MASTER_PORT", "19001"),
        ]);
        assert_eq!(found, node(2, 4, Some(8), "10.0.0.1", 19001));
        let found = launch(&[("HOST_NUM", "2"), ("INDEX", "1"), ("CHIEF_IP", "h0")]);
        assert_eq!(found, node(1, 2, None, "h0", PORT));
        assert_eq!(launch(&[("NUM_NODES", "1")]), node(0, 1, None, "127.0.0.1", PORT));
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        for (variables, message) in [
            (&[("RANK", "0")][..], "WORLD_SIZE: not set, but RANK is"),
            (&[("WORLD_SIZE", "2")], "RANK: not set, but WORLD_SIZE is"),
            (&[("RANK", "x"), ("WORLD_SIZE", "2")], "RANK: `x` is not a number"),
            (
                &[("RANK", "0"), ("WORLD_SIZE", "2")],
                "MASTER_ADDR or MASTER_IP or CHIEF_IP: not set, but WORLD_SIZE is above 1",
            ),
            (
                &[("RANK", "2"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a")],
                "rank: 2 of a world of 2: ranks count from 0",
            ),
            (
                &[
                    ("RANK", "0"),
                    ("WORLD_SIZE", "2"),
                    ("MASTER_ADDR", "a"),
                    ("MASTER_PORT", "70000"),
                ],
                "MASTER_PORT: `70000` is not a port",
            ),
            (
                &[("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a"), ("LOCAL_RANK", "2")],
                "local rank: 2 of 3 on this node, in a world of 2",
            ),
            (
                &[("NUM_NODES", "2"), ("NODE_RANK", "2"), ("MASTER_ADDR", "a")],
                "NODE_RANK: 2 of 2 machines: they count from 0",
            ),
        ] {
            assert_eq!(refused(variables), message, "{variables:?}");
        }
    }
}

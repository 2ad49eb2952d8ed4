use std::thread;
use std::time::Duration;

use cluster::{Group, Timeouts, Topology, serve};
use flow::checkpoint::write_tensors;
use flow::noise::Noise;
use flow::ops::shapes::Shapes;
use flow::ops::{Ops, ParamPath};

use super::*;
use crate::network::optimizer::{AdamW, OptimizerConfig};
use crate::tensor::device::Compute;
use crate::tensor::parameters::Storage;

/// What each of `world` ranks, a thread each, makes of its group.
fn on_ranks<T: Send>(world: usize, work: impl Fn(&Group) -> T + Sync) -> Vec<T> {
    let store = serve(None).unwrap();
    let port = store.port();
    let rank = |rank: usize| {
        let host = "127.0.0.1".to_owned();
        let (local_rank, local_world, launcher) = (rank, world, "a test");
        let topology = Topology {
            rank,
            world,
            local_rank,
            local_world,
            host,
            port,
            launcher_serves: true,
            store_stays: false,
            launcher,
        };
        let [join, step] = [60; 2].map(Duration::from_secs);
        work(&Group::join(&topology, Timeouts { join, step }).unwrap())
    };
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..world).map(|number| scope.spawn(move || rank(number))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Two segments whose numbers no world but one divides evenly, and their optimiser.
fn trained(group: &Group, seed: u64) -> (Parameters, AdamW) {
    let manifests = [&[3usize, 5][..], &[7]].map(|shape| {
        let shapes = Shapes::new();
        shapes.param(&ParamPath::root().at(format!("w{}", shape.len())), shape);
        shapes.manifest()
    });
    let storage = Storage::Trainable(group.clone());
    let noise = Noise::new(seed);
    let mut parameters = Parameters::build(&manifests, Compute::CPU, storage, |name, shape| {
        Ok(Tensor::from_slice(&noise.normal(name.len() as u64, shape.iter().product())))
    })
    .unwrap();
    parameters.train();
    let config: OptimizerConfig = toml::from_str("learning_rate = 0.1\nema = 0.5").unwrap();
    let optimizer = AdamW::new(config, &[&parameters]);
    (parameters, optimizer)
}

/// A step towards gradients that are not alike; every rank adds as much.
fn step(parameters: &Parameters, optimizer: &mut AdamW, number: f64) {
    for name in ["w2", "w1"] {
        let w = parameters.named(name).unwrap();
        ((&*w - number).square() * number).sum(Kind::Float).backward();
    }
    optimizer.step(&[parameters], 1.0).unwrap();
}

/// Every state put together from all ranks: masters, moments and average.
fn gathered(parameters: &Parameters, optimizer: &AdamW) -> Vec<Vec<f32>> {
    let states = optimizer.states().flat_map(|(_, flats)| flats).chain(parameters.masters());
    let lengths: Vec<usize> = parameters.spans().map(|span| span.whole).collect();
    let whole = |(flat, &n): (&Tensor, &usize)| {
        Vec::try_from(&parameters.shown(flat).unwrap().narrow(0, 0, n as i64)).unwrap()
    };
    states.zip(lengths.iter().cycle()).map(whole).collect()
}

/// What two ranks have written, one, three and four read to the bit.
#[test]
fn a_state_is_the_same_on_any_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let wrote = on_ranks(2, |group| {
        let (parameters, mut optimizer) = trained(group, 1);
        (1..4).for_each(|number| step(&parameters, &mut optimizer, f64::from(number)));
        let mut state = entries(MASTER, parameters.masters());
        state.extend(optimizer.entries());
        let path = folder.path().join(file_name(group.rank(), group.world()));
        write_tensors(&path, &state, &[]).unwrap();
        gathered(&parameters, &optimizer)
    });
    assert_eq!(wrote[0].len(), 8);
    for world in 1..=4 {
        let read = on_ranks(world, |group| {
            let (parameters, mut optimizer) = trained(group, 2);
            let state = Shards::open(folder.path()).unwrap();
            state.restore(MASTER, parameters.masters(), &[&parameters]).unwrap();
            parameters.refresh().unwrap();
            optimizer.restore(&[&parameters], &state, 3).unwrap();
            let seen: Vec<Vec<f32>> =
                parameters.seen().map(|flat| Vec::try_from(&flat).unwrap()).collect();
            (gathered(&parameters, &optimizer), seen)
        });
        for (states, seen) in &read {
            assert_eq!(states, &wrote[0], "{world}");
            assert_eq!(seen, &wrote[0][6..], "{world}");
        }
    }
}

#[test]
fn files_of_any_world_are_found_and_no_others() {
    let folder = tempfile::tempdir().unwrap();
    let open = || Shards::open(folder.path());
    let said = open().err().unwrap().to_string();
    assert!(said.contains("holds no state of a run"), "{said}");
    let put = |name: &str| fs::write(folder.path().join(name), "").unwrap();
    put("reference.safetensors");
    put(&file_name(2, 3));
    assert_eq!(open().unwrap().world(), 3);
    put(&file_name(0, 1));
    let said = open().err().unwrap().to_string();
    assert!(said.contains("more than one state"), "{said}");
}

/// Every range of seven numbers, from one to four files of them.
#[test]
fn numbers_are_found_in_whichever_file_they_are() {
    let numbers: Vec<f32> = (0..7).map(|n| n as f32).collect();
    for world in 1..=4 {
        let folder = tempfile::tempdir().unwrap();
        let each = 7usize.div_ceil(world);
        for rank in 0..world {
            let mut own: Vec<f32> = numbers.iter().skip(rank * each).take(each).copied().collect();
            own.resize(each, 0.0);
            let entry = Entry::f32("master.0", &[each], &own);
            let path = folder.path().join(file_name(rank, world));
            write_tensors(&path, [&entry], &[]).unwrap();
        }
        let shards = Shards::open(folder.path()).unwrap();
        for (from, to) in (0..7).flat_map(|from| (from..=7).map(move |to| (from, to))) {
            let read = Tensor::empty([(to - from) as i64], (Kind::Float, Device::Cpu));
            shards.read("master.0", 7, from..to, &read).unwrap();
            assert_eq!(Vec::<f32>::try_from(&read).unwrap(), numbers[from..to], "{world}");
        }
        let room = Tensor::empty([70], (Kind::Float, Device::Cpu));
        let said = shards.read("master.0", 70, 0..70, &room).unwrap_err().to_string();
        assert!(said.contains("no master.0 of"), "{said}");
    }
}

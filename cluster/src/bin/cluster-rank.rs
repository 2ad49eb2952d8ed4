//! One rank of a case, started by a launcher or by the tests: `torchrun --no-python … cluster-rank
//! collectives` shows whether ranks can talk, `… bandwidth` how fast. With DEVICE=cuda tensors are on the GPU
//! of the rank's number, and go through NCCL; with any DEVICE a world of one goes through the libraries, too. `nccl` alone says where NCCL is.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use cluster::{Error, Group, Launch, Reduce, Timeouts};
use tch::{Device, Kind, Tensor};

const KINDS: [Kind; 8] = [
    Kind::Float,
    Kind::Double,
    Kind::BFloat16,
    Kind::Half,
    Kind::Int64,
    Kind::Int,
    Kind::Int8,
    Kind::Uint8,
];

fn main() -> ExitCode {
    tch::set_num_threads(1);
    let case = std::env::args().nth(1).unwrap_or_default();
    if case == "nccl" {
        return said(cluster::about_nccl());
    }
    match run(&case) {
        Ok(()) => {
            println!("ok");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether NCCL is there, without a GPU.
fn said(about: Result<String, String>) -> ExitCode {
    match about {
        Ok(about) => {
            println!("{about}");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(case: &str) -> Result<(), Error> {
    let seconds = |name: &str, otherwise: f64| {
        let value = std::env::var(name).ok().and_then(|value| value.parse().ok());
        Duration::from_secs_f64(value.unwrap_or(otherwise))
    };
    let timeouts = Timeouts { join: seconds("JOIN", 30.0), step: seconds("STEP", 30.0) };
    let (mut device, asked) = (Device::Cpu, std::env::var("DEVICE").ok());
    let group = match Launch::from_environment()? {
        Launch::Rank(topology) if asked.is_some() => {
            if asked.is_some_and(|name| name == "cuda") {
                device = gpu(topology.local_rank);
            }
            let group = Group::join_as_is(&topology, timeouts)?;
            group.open_device(device)?;
            group
        }
        Launch::Rank(topology) => Group::join(&topology, timeouts)?,
        _ => Group::alone(),
    };
    if group.is_first() {
        println!("{} ranks, {device:?}, {}", group.world(), group.carrier());
    }
    match case {
        "collectives" => collectives(&group, device),
        "bandwidth" => bandwidth(&group, device),
        "loop" => around_and_around(&group),
        "sizes" => {
            odd_call(&group, |rank| all_gather(&group, if rank == 1 { 9 } else { 8 }, Kind::Float))
        }
        "known sizes" => {
            let known = |n| all_gather(&group, n, Kind::Float);
            [8, 9].into_iter().try_for_each(known)?;
            odd_call(&group, |rank| known(if rank == 1 { 9 } else { 8 }))
        }
        "kinds" => odd_call(&group, |rank| {
            all_gather(&group, 8, if rank == 1 { Kind::Double } else { Kind::Float })
        }),
        "operations" => odd_call(&group, |rank| {
            if rank == 1 { all_gather(&group, 8, Kind::Float) } else { sum(&group, 8) }
        }),
        "not contiguous" => not_contiguous(&group),
        "behind" => behind(&group, timeouts.step),
        "abort" => abort(&group, device),
        "nodes" => nodes(&group, device),
        _ => panic!("no case {case}"),
    }
}

/// The GPU of this number, or of the number modulo those there are; libtorch's libraries for CUDA are opened.
fn gpu(number: usize) -> Device {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY};
    for name in ["libc10_cuda.so", "libtorch_cuda.so"] {
        #[expect(unsafe_code, reason = "opening a library runs its initialisers")]
        // SAFETY: libtorch's CUDA libraries are made to be opened into a process that runs libtorch_cpu.
        let library = unsafe { Library::open(Some(name), RTLD_LAZY | RTLD_GLOBAL) };
        match library {
            Ok(library) => std::mem::forget(library),
            Err(error) => eprintln!("note: {name}: {error}"),
        }
    }
    Device::Cuda(number % (tch::Cuda::device_count() as usize).max(1))
}

/// Sums inside each node, as many as its number, and then between nodes and of all.
fn nodes(group: &Group, device: Device) -> Result<(), Error> {
    let [within, across] = group.by_node()?;
    within.open_device(device)?;
    across.open_device(device)?;
    let (rank, each) = (group.rank(), within.world());
    let node = rank / each;
    let sum_over = |among: &Group| {
        let mut sum = Tensor::from_slice(&[rank as f32]).to_device(device);
        among.all_reduce(&mut sum, Reduce::Sum)?;
        Ok(sum.double_value(&[0]) as usize)
    };
    let inside: usize = (node * each..(node + 1) * each).sum();
    for _ in 0..=node {
        assert_eq!(sum_over(&within)?, inside);
    }
    let alike: usize = (rank % each..group.world()).step_by(each).sum();
    assert_eq!((sum_over(&across)?, sum_over(group)?), (alike, (0..group.world()).sum()));
    Ok(())
}

/// 1, 2, … as far as the kind goes, times one more than the rank.
fn numbers(n: i64, rank: usize, kind: Kind) -> Tensor {
    let numbers =
        (Tensor::arange(n, (Kind::Int64, Device::Cpu)).remainder(5) + 1) * (rank as i64 + 1);
    numbers.to_kind(kind)
}

fn assert_same(found: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!((found.size(), found.kind()), (expected.size(), expected.kind()), "{what}");
    assert!(found.equal(expected), "{what}: {found:?}, not {expected:?}");
}

fn collectives(group: &Group, device: Device) -> Result<(), Error> {
    let (rank, world) = (group.rank(), group.world());
    let n = world as i64 * 3;
    for kind in KINDS {
        let all: Vec<Tensor> =
            (0..world).map(|rank| numbers(n, rank, kind).to_device(device)).collect();
        let own = &all[rank];
        let total: Tensor = all.iter().map(|part| part.to_kind(Kind::Int64)).sum();
        let total = total.to_kind(kind);
        let what = |operation: &str| format!("{operation} of {kind:?}");

        assert_same(&group.all_gather(own)?, &Tensor::cat(&all, 0), &what("all_gather"));
        let square = own.view([n / 3, 3]);
        let gathered = group.start_all_gather(&square)?;
        assert_same(&gathered.wait()?, &Tensor::cat(&all, 0).view([-1, 3]), &what("all_gather"));
        let parts = group.reduce_scatter(own, Reduce::Sum)?;
        assert_same(&parts, &total.narrow(0, rank as i64 * 3, 3), &what("reduce_scatter"));
        for (how, expected) in
            [(Reduce::Sum, &total), (Reduce::Min, &all[0]), (Reduce::Max, &all[world - 1])]
        {
            let mut tensor = own.copy();
            group.all_reduce(&mut tensor, how)?;
            assert_same(&tensor, expected, &what(&format!("all_reduce {how:?}")));
        }
        for from in [0, world - 1] {
            let mut tensor = own.copy();
            group.broadcast(&mut tensor, from)?;
            assert_same(&tensor, &all[from], &what("broadcast"));
        }
    }
    let scalar = group.all_gather(&Tensor::from(rank as i64))?;
    assert_same(&scalar, &Tensor::arange(world as i64, (Kind::Int64, Device::Cpu)), "scalars");
    let nothing = group.all_gather(&Tensor::zeros([0, 4], (Kind::Float, Device::Cpu)))?;
    assert_eq!(nothing.size(), [0, 4]);
    let bytes = group.all_gather_bytes(&vec![rank as u8; rank * 3])?;
    let expected: Vec<Vec<u8>> = (0..world).map(|rank| vec![rank as u8; rank * 3]).collect();
    assert_eq!(bytes, expected);
    group.barrier()
}

/// Seconds and rates of the operations that training uses.
fn bandwidth(group: &Group, device: Device) -> Result<(), Error> {
    for mebibytes in [1, 16, 64] {
        let n = mebibytes * (1 << 18);
        let whole = Tensor::ones([n - n % group.world() as i64], (Kind::Float, device));
        let part = whole.narrow(0, 0, whole.size()[0] / group.world() as i64);
        let mut reduced = whole.copy();
        let time = |name: &str, call: &mut dyn FnMut() -> Result<(), Error>| {
            call()?;
            group.barrier()?;
            let start = Instant::now();
            for _ in 0..5 {
                call()?;
            }
            let seconds = start.elapsed().as_secs_f64() / 5.0;
            if group.is_first() {
                let rate = whole.numel() as f64 * 4.0 / seconds / 1e9;
                println!(
                    "{name} {mebibytes} MiB on {}: {seconds:.5} s, {rate:.2} GB/s",
                    group.world()
                );
            }
            Ok(())
        };
        time("all_gather", &mut || group.all_gather(&part).map(drop))?;
        time("reduce_scatter", &mut || group.reduce_scatter(&whole, Reduce::Sum).map(drop))?;
        time("all_reduce", &mut || group.all_reduce(&mut reduced, Reduce::Max))?;
    }
    group.barrier()
}

fn around_and_around(group: &Group) -> Result<(), Error> {
    let part = numbers(50_000, group.rank(), Kind::Float);
    for step in 0.. {
        let whole = group.all_gather(&part)?;
        drop(group.reduce_scatter(&whole, Reduce::Sum)?);
        if step == 10 {
            println!("going");
        }
    }
    Ok(())
}

fn all_gather(group: &Group, n: i64, kind: Kind) -> Result<(), Error> {
    group.all_gather(&numbers(n, 0, kind)).map(drop)
}

fn sum(group: &Group, n: i64) -> Result<(), Error> {
    group.all_reduce(&mut numbers(n, 0, Kind::Float), Reduce::Sum)
}

/// All ranks refuse the call, say the same of it, and go on.
fn odd_call(group: &Group, call: impl Fn(usize) -> Result<(), Error>) -> Result<(), Error> {
    group.barrier()?;
    let refusal = call(group.rank()).expect_err("calls differ");
    assert!(matches!(refusal, Error::Disagree { .. }), "{refusal}");
    println!("{refusal}");
    group.barrier()?;
    collectives(group, Device::Cpu)
}

fn not_contiguous(group: &Group) -> Result<(), Error> {
    let mut turned = numbers(24, 0, Kind::Float).view([2, 12]).transpose(0, 1);
    for refusal in [
        group.all_gather(&turned).map(drop).expect_err("not contiguous"),
        group.reduce_scatter(&turned, Reduce::Sum).map(drop).expect_err("not contiguous"),
        group.all_reduce(&mut turned, Reduce::Sum).expect_err("not contiguous"),
        group.broadcast(&mut turned, 0).expect_err("not contiguous"),
        group.broadcast(&mut numbers(6, 0, Kind::Float), group.world()).expect_err("no such rank"),
    ] {
        assert!(matches!(refusal, Error::Refused { .. }), "{refusal}");
    }
    collectives(group, Device::Cpu)
}

/// Rank 1 lives, but does something else.
fn behind(group: &Group, step: Duration) -> Result<(), Error> {
    sum(group, 8)?;
    if group.rank() == 1 {
        std::thread::sleep(step * 3);
    }
    sum(group, 8)
}

fn abort(group: &Group, device: Device) -> Result<(), Error> {
    let sum = || group.all_reduce(&mut numbers(8, 0, Kind::Float).to_device(device), Reduce::Sum);
    sum()?;
    if group.rank() == 1 % group.world() {
        group.abort("the reward server refused");
    }
    sum()
}

//! Groups of real processes: what they compute together, what they refuse, and what they say of a rank that
//! has ended, hangs or never came.

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

/// Ranks under way; those still running end with the test.
struct Ranks {
    children: Vec<Child>,
}

struct Ended {
    success: bool,
    out: String,
    error: String,
}

/// A port that nobody listens at.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn rank(case: &str, rank: usize, world: usize, port: u16, variables: &[(&str, &str)]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cluster-rank"));
    command.arg(case).env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
    for (name, value) in
        [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", world)]
    {
        command.env(name, value.to_string());
    }
    command.envs(variables.iter().copied());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

impl Ranks {
    /// All ranks of a world on nodes of `each`.
    fn on_nodes(case: &str, world: usize, each: usize) -> Self {
        let (port, each_text) = (free_port(), each.to_string());
        let one = |number: usize| {
            let place = (number % each).to_string();
            let local = [("LOCAL_RANK", &*place), ("LOCAL_WORLD_SIZE", &*each_text)];
            rank(case, number, world, port, &local)
        };
        Self { children: (0..world).map(one).collect() }
    }

    /// All ranks of a world, whose rank 0 serves the store.
    fn start(case: &str, world: usize, variables: &[(&str, &str)]) -> Self {
        let port = free_port();
        let children = (0..world).map(|number| rank(case, number, world, port, variables));
        Self { children: children.collect() }
    }

    /// Waits until the rank has printed a line.
    fn wait_for_line(&mut self, rank: usize) {
        let out = self.children[rank].stdout.as_mut().unwrap();
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "rank {rank} ended");
    }

    fn signal(&self, rank: usize, signal: &str) {
        let pid = self.children[rank].id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    fn end(mut self) -> Vec<Ended> {
        std::mem::take(&mut self.children)
            .into_iter()
            .map(|mut child| {
                let (mut out, mut error) = (String::new(), String::new());
                child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
                child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
                Ended { success: child.wait().unwrap().success(), out, error }
            })
            .collect()
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.children {
            _ = child.kill();
            _ = child.wait();
        }
    }
}

fn succeed(case: &str, world: usize) -> Vec<Ended> {
    let ended = Ranks::start(case, world, &[]).end();
    for (rank, ended) in ended.iter().enumerate() {
        assert!(ended.success && ended.out.ends_with("ok\n"), "rank {rank}: {}", ended.error);
    }
    ended
}

/// One line, with all of `parts`.
fn assert_says(ended: &Ended, parts: &[&str]) {
    let Ended { success, error, .. } = ended;
    assert!(!success && error.starts_with("error: ") && error.lines().count() == 1, "{error}");
    for part in parts {
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
}

#[test]
fn every_operation_on_every_kind() {
    for world in 1..=4 {
        succeed("collectives", world);
    }
}

/// Of which one calls its own group more often than the other.
#[test]
fn nodes_have_groups_of_their_own() {
    for (world, each) in [(4, 2), (4, 1), (2, 2)] {
        for ended in Ranks::on_nodes("nodes", world, each).end() {
            assert!(ended.success, "{world} ranks, {each} a node: {}", ended.error);
        }
    }
}

#[test]
fn nodes_of_different_sizes_are_refused() {
    let ended = Ranks::on_nodes("nodes", 3, 2).end();
    assert!(ended.iter().all(|rank| !rank.success));
    let said = "every node needs as many ranks, in order";
    assert!(ended.iter().any(|rank| rank.error.contains(said)), "{}", ended[0].error);
}

#[test]
fn a_launcher_may_serve_the_store() {
    let store = cluster::serve(None).unwrap();
    let variables = [("TORCHELASTIC_USE_AGENT_STORE", "True"), ("TORCHELASTIC_RESTART_COUNT", "1")];
    let children = (0..2).map(|number| rank("collectives", number, 2, store.port(), &variables));
    for ended in (Ranks { children: children.collect() }).end() {
        assert!(ended.success, "{}", ended.error);
    }
}

/// A launcher's store that stays has the keys of earlier rounds, and each node's launcher counts restarts by itself.
#[test]
fn rounds_of_a_store_that_stays_find_each_other() {
    let store = cluster::serve(None).unwrap();
    let round = |case: &str, restarts: [&str; 2]| {
        let start = |number: usize| {
            let variables = [
                ("TORCHELASTIC_USE_AGENT_STORE", "True"),
                ("TORCHELASTIC_RUN_ID", "none"),
                ("TORCHELASTIC_RESTART_COUNT", restarts[number]),
            ];
            rank(case, number, 2, store.port(), &variables)
        };
        // Rank 1 comes first, and finds what an earlier round has left.
        let second = start(1);
        std::thread::sleep(std::time::Duration::from_millis(300));
        Ranks { children: vec![start(0), second] }
    };
    let well = |ranks: Ranks| {
        for ended in ranks.end() {
            assert!(ended.success, "{}", ended.error);
        }
    };
    well(round("collectives", ["0", "0"]));
    let mut ranks = round("loop", ["0", "0"]);
    (0..2).for_each(|rank| ranks.wait_for_line(rank));
    ranks.signal(1, "-KILL");
    assert_says(&ranks.end()[0], &["on rank 0: rank 1 has ended"]);
    well(round("collectives", ["1", "0"]));
    let alone = rank(
        "collectives",
        1,
        2,
        store.port(),
        &[("JOIN", "1"), ("TORCHELASTIC_USE_AGENT_STORE", "True"), ("TORCHELASTIC_RUN_ID", "none")],
    );
    let ended = (Ranks { children: vec![alone] }).end();
    assert_says(&ended[0], &["rank 0 did not come within 1 s"]);
}

#[test]
fn calls_that_differ_are_refused_by_all_who_then_go_on() {
    for (case, says, others_say) in [
        ("sizes", "rank 1: all_gather of 9 Float", ": all_gather of 8 Float"),
        ("known sizes", "rank 1: all_gather of 9 Float", ": all_gather of 8 Float"),
        ("kinds", "rank 1: all_gather of 8 Double", ": all_gather of 8 Float"),
        ("operations", "rank 1: all_gather of 8 Float", ": all_reduce of 8 Float"),
    ] {
        for ended in succeed(case, 3) {
            assert!(ended.out.contains(says) && ended.out.contains(others_say), "{}", ended.out);
        }
    }
}

#[test]
fn what_is_not_contiguous_is_not_sent() {
    succeed("not contiguous", 2);
}

#[test]
fn a_killed_rank_is_named() {
    for victim in [0, 1] {
        let mut ranks = Ranks::start("loop", 3, &[]);
        (0..3).for_each(|rank| ranks.wait_for_line(rank));
        ranks.signal(victim, "-KILL");
        for (rank, ended) in ranks.end().into_iter().enumerate().filter(|(rank, _)| *rank != victim)
        {
            let own = format!("on rank {rank}: rank {victim} has ended");
            assert_says(&ended, &[&own]);
        }
    }
}

#[test]
fn a_frozen_rank_is_named() {
    let mut ranks = Ranks::start("loop", 3, &[("STEP", "2")]);
    (0..3).for_each(|rank| ranks.wait_for_line(rank));
    ranks.signal(2, "-STOP");
    let mut frozen = ranks.children.pop().unwrap();
    for ended in ranks.end() {
        assert_says(&ended, &["rank 2 gave no sign of life in 2 s"]);
    }
    frozen.kill().unwrap();
    frozen.wait().unwrap();
}

#[test]
fn a_rank_that_stays_behind_is_named_with_where_it_is() {
    for ended in &Ranks::start("behind", 3, &[("STEP", "1")]).end() {
        assert_says(ended, &["rank 1 did not come along in 1 s: it is past call 1"]);
    }
}

#[test]
fn a_rank_that_stops_takes_the_others_along() {
    for ended in &Ranks::start("abort", 3, &[]).end() {
        assert_says(ended, &["rank 1", "the reward server refused"]);
    }
}

#[test]
fn nobody_serves() {
    let variables = [("JOIN", "1")];
    let children = vec![rank("collectives", 1, 2, free_port(), &variables)];
    let ended = (Ranks { children }).end();
    assert_says(&ended[0], &["rank 1 of 2", "nobody served the store within 1 s", "MASTER_ADDR"]);
}

#[test]
fn a_port_that_is_taken() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let children = vec![rank("collectives", 0, 2, port, &[])];
    assert_says(&(Ranks { children }).end()[0], &["MASTER_PORT", &port.to_string()]);
}

#[test]
fn ranks_that_never_come_are_named() {
    let port = free_port();
    let children = [0, 2].map(|number| rank("collectives", number, 4, port, &[("JOIN", "2")]));
    for ended in &(Ranks { children: children.into() }).end() {
        assert_says(ended, &["ranks 1, 3 did not come within 2 s"]);
    }
}

#[test]
fn ranks_that_disagree_about_the_world_stop() {
    let port = free_port();
    let children = [(0, 2), (1, 3)].map(|(number, world)| {
        rank("collectives", number, world, port, &[("JOIN", "20"), ("LOCAL_WORLD_SIZE", "2")])
    });
    // The world of 3 is not local for its rank: it reaches the store all the same.
    for ended in &(Ranks { children: children.into() }).end() {
        assert_says(ended, &["ranks"]);
        assert!(ended.error.contains("give all the same world"), "{}", ended.error);
    }
}

#[test]
fn two_processes_of_one_rank_stop() {
    let port = free_port();
    let children = [0, 1, 1].map(|number| rank("collectives", number, 3, port, &[("JOIN", "20")]));
    let all: Vec<Ended> = (Ranks { children: children.into() }).end();
    assert!(all.iter().any(|ended| ended.error.contains("two processes say that they are rank 1")));
    assert!(all.iter().all(|ended| !ended.success));
}

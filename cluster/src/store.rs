//! The store that brings ranks together: who serves it, and how it is found.

use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket,
};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::c10d::{Store, Through};
use crate::error::{Error, ranks};
use crate::topology::Topology;

/// Names the interface that Gloo uses, as it does for PyTorch.
const INTERFACE: &str = "GLOO_SOCKET_IFNAME";

/// A store that other processes use, until it is dropped.
pub struct Served {
    store: Store,
    port: u16,
}

impl Served {
    pub fn port(&self) -> u16 {
        self.port
    }

    /// As its ranks see it.
    pub(crate) fn store(&self) -> &Store {
        &self.store
    }
}

/// Serves a store for ranks that this process starts: on loopback at a free port if `port` is `None`, on
/// every interface otherwise.
///
/// # Errors
/// [`Error::Environment`] if the port is taken.
pub fn serve(port: Option<u16>) -> Result<Served, Error> {
    let listener = listen(port.is_none(), port.unwrap_or(0))?;
    let wrong = |what: String| Error::Environment { variable: "MASTER_PORT".to_owned(), what };
    let port = listener.local_addr().map_err(|error| wrong(error.to_string()))?.port();
    let patience = Duration::from_secs(10);
    let listening = Some(OwnedFd::from(listener));
    let store = Store::open("127.0.0.1", port, listening, patience, PREFIX);
    Ok(Served { store: store.map_err(wrong)?, port })
}

/// What all keys begin with.
const PREFIX: &str = "ng";
/// Number of rounds of ranks that a store has served, and what rank 0 says of the newest: its number, and who its
/// ranks are.
const ROUNDS: &str = "rounds";
const ROUND: &str = "round";
/// An address of no machine, kept for documents (RFC 5737).
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// Between two looks at who has come.
const PAUSE: Duration = Duration::from_millis(20);

/// How a rank reaches its store.
#[derive(Clone)]
pub(crate) struct Place {
    host: String,
    port: u16,
    prefix: String,
}

impl Place {
    pub(crate) fn of(topology: &Topology) -> Self {
        let host = if topology.is_local() { "127.0.0.1" } else { &topology.host };
        Self { host: host.to_owned(), port: topology.port, prefix: PREFIX.to_owned() }
    }

    /// The place of this round of ranks in a store that others may have used before, of which their keys are left.
    ///
    /// No number that a launcher gives says which round it is: torchrun counts restarts on each node by itself. So
    /// every rank says who it is, and rank 0 who is in its round, until all have found themselves there.
    pub(crate) fn of_round(self, topology: &Topology, patience: Duration) -> Result<Self, String> {
        if !topology.store_stays {
            return Ok(self);
        }
        self.wait_until_served(patience)?;
        let store = self.again(patience)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let own = format!("{}-{}", std::process::id(), now.as_nanos());
        store.set(&here(topology.rank), &own)?;
        let deadline = Instant::now() + patience;
        let number = match topology.rank {
            0 => gather(&store, topology.world, deadline),
            rank => find(&store, rank, &own, deadline),
        };
        let late = |who: Vec<usize>| {
            format!("{} did not come within {} s", ranks(&who), patience.as_secs())
        };
        Ok(self.within(&number?.map_err(late)?))
    }

    /// The same store, for keys of a group called `name`.
    pub(crate) fn within(self, name: &str) -> Self {
        Self { prefix: format!("{}/{name}", self.prefix), ..self }
    }

    pub(crate) fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// Rank 0 serves, unless the launcher does; the others wait until somebody does.
    pub(crate) fn open(&self, topology: &Topology, patience: Duration) -> Result<Store, String> {
        let serves = topology.rank == 0 && !topology.launcher_serves;
        let listening = if serves {
            let listener = listen(topology.is_local(), self.port).map_err(|e| e.to_string())?;
            Some(OwnedFd::from(listener))
        } else {
            self.wait_until_served(patience)?;
            None
        };
        Store::open(&self.host, self.port, listening, patience, &self.prefix)
    }

    /// A second connection of a rank that has one.
    pub(crate) fn again(&self, patience: Duration) -> Result<Store, String> {
        Store::open(&self.host, self.port, None, patience, &self.prefix)
    }

    fn wait_until_served(&self, patience: Duration) -> Result<(), String> {
        let deadline = Instant::now() + patience;
        loop {
            let failure = match self.reach() {
                Ok(()) => return Ok(()),
                Err(failure) => failure,
            };
            if Instant::now() >= deadline {
                let seconds = patience.as_secs();
                return Err(format!(
                    "nobody served the store within {seconds} s ({failure}): start rank 0, or see that \
                     MASTER_ADDR and MASTER_PORT lead to it"
                ));
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn reach(&self) -> Result<(), std::io::Error> {
        let mut failure = std::io::Error::other("the name has no address");
        for address in (self.host.as_str(), self.port).to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, Duration::from_secs(2)) {
                Ok(_) => return Ok(()),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    /// The interface that the user names, or the address from which the store is reached; on the machine that serves
    /// it under a name that means loopback there, as Debian's `/etc/hosts` has it, that of the default route.
    pub(crate) fn through(&self) -> Result<Through, std::io::Error> {
        if let Ok(name) = std::env::var(INTERFACE) {
            return Ok(Through::Interface(name));
        }
        let target = (self.host.as_str(), self.port).to_socket_addrs()?.next();
        let target = target.ok_or_else(|| std::io::Error::other("the name has no address"))?;
        let is_meant = self.host == "localhost" || self.host.parse::<IpAddr>().is_ok();
        let address = if is_meant || !target.ip().is_loopback() {
            address_towards(target)?
        } else {
            address_towards(SocketAddr::from((ELSEWHERE, target.port()))).map_err(|error| {
                std::io::Error::other(format!(
                    "{} is {} here, where no other machine finds it, and there is no default route ({error}): \
                     set {INTERFACE}",
                    self.host,
                    target.ip()
                ))
            })?
        };
        Ok(Through::Address(address.to_string()))
    }
}

/// Of this machine, as `target` would see it.
fn address_towards(target: SocketAddr) -> Result<IpAddr, std::io::Error> {
    let any: IpAddr =
        if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    // Nothing is sent: connecting only chooses the route.
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(target)?;
    Ok(socket.local_addr()?.ip())
}

/// Key of the process that is this rank in the newest round that it came to.
fn here(rank: usize) -> String {
    format!("here/{rank}")
}

/// Rank 0: begins a round; its number, once all its ranks have found themselves in it. Who has not where time is over.
fn gather(
    store: &Store,
    world: usize,
    deadline: Instant,
) -> Result<Result<String, Vec<usize>>, String> {
    let number = store.add(ROUNDS, 1)?.to_string();
    let mut listed = vec![String::new(); world];
    loop {
        let mut absent = Vec::new();
        let mut is_new = false;
        for (rank, listed) in listed.iter_mut().enumerate() {
            let (here, found) = (here(rank), format!("{number}/found/{rank}"));
            if store.has(&here)? {
                let now = store.get(&here)?;
                is_new |= *listed != now;
                *listed = now;
            }
            if rank > 0 && (!store.has(&found)? || store.get(&found)? != *listed) {
                absent.push(rank);
            }
        }
        if absent.is_empty() {
            return Ok(Ok(number));
        }
        if is_new {
            store.set(ROUND, &format!("{number} {}", listed.join(" ")))?;
        }
        if Instant::now() > deadline {
            return Ok(Err(absent));
        }
        thread::sleep(PAUSE);
    }
}

/// Another rank: the number of the round that it is in, once rank 0 has said so.
fn find(
    store: &Store,
    rank: usize,
    own: &str,
    deadline: Instant,
) -> Result<Result<String, Vec<usize>>, String> {
    loop {
        let said = if store.has(ROUND)? { store.get(ROUND)? } else { String::new() };
        let mut words = said.split(' ');
        let number = words.next().unwrap_or_default();
        if words.nth(rank) == Some(own) {
            store.set(&format!("{number}/found/{rank}"), own)?;
            return Ok(Ok(number.to_owned()));
        }
        if Instant::now() > deadline {
            return Ok(Err(vec![0]));
        }
        thread::sleep(PAUSE);
    }
}

fn listen(loopback: bool, port: u16) -> Result<TcpListener, Error> {
    let listener = if loopback {
        TcpListener::bind((Ipv4Addr::LOCALHOST, port))
    } else {
        TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
            .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))
    };
    listener.map_err(|error| Error::Environment {
        variable: "MASTER_PORT".to_owned(),
        what: format!("cannot listen at port {port}: {error}: choose another"),
    })
}

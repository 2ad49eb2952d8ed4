//! The store that brings ranks together: who serves it, and how it is found.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use crate::c10d::{Store, Through};
use crate::error::Error;
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

    /// As ranks see it that were started once.
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
    let store = Store::open("127.0.0.1", port, listening, patience, &prefix(0));
    Ok(Served { store: store.map_err(wrong)?, port })
}

/// What the keys of ranks begin with that a launcher has started `restart` times before.
fn prefix(restart: usize) -> String {
    format!("ng/{restart}")
}

/// How a rank reaches its store.
pub(crate) struct Place {
    host: String,
    port: u16,
    prefix: String,
}

impl Place {
    pub(crate) fn of(topology: &Topology) -> Self {
        let host = if topology.is_local() { "127.0.0.1" } else { &topology.host };
        Self { host: host.to_owned(), port: topology.port, prefix: prefix(topology.restart) }
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

    /// The interface that the user names, or the address from which the store is reached.
    pub(crate) fn through(&self) -> Result<Through, std::io::Error> {
        if let Ok(name) = std::env::var(INTERFACE) {
            return Ok(Through::Interface(name));
        }
        let target = (self.host.as_str(), self.port).to_socket_addrs()?.next();
        let target = target.ok_or_else(|| std::io::Error::other("the name has no address"))?;
        let any: IpAddr = if target.is_ipv4() {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        // Nothing is sent: connecting only chooses the route.
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(target)?;
        Ok(Through::Address(socket.local_addr()?.ip().to_string()))
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

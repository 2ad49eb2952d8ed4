//! Plain HTTP through an HTTP proxy as curl does it: the proxy is asked for the whole url (RFC 9112, 3.2.2).
//! ureq itself asks every proxy for a tunnel, which many refuse for anything but port 443.

use anyhow::Result;
use base64::{Engine, prelude::BASE64_STANDARD};
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, DefaultConnector, NextTimeout, Transport,
};
use ureq::{Agent, Error, Proxy};

/// An agent whose every request goes to `proxy`.
pub(super) fn agent(config: Config, proxy: &Proxy) -> Agent {
    let connector = Forward { proxy: proxy.clone(), inner: DefaultConnector::new() };
    Agent::with_parts(config, connector, AtProxy(proxy.clone(), DefaultResolver::default()))
}

/// Finds the proxy, whatever is asked for.
#[derive(Debug)]
struct AtProxy(Proxy, DefaultResolver);

impl Resolver for AtProxy {
    fn resolve(
        &self,
        _: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, Error> {
        self.1.resolve(self.0.uri(), config, timeout)
    }
}

#[derive(Debug)]
struct Forward {
    proxy: Proxy,
    inner: DefaultConnector,
}

impl Connector for Forward {
    type Out = Forwarded;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        _: Option<()>,
    ) -> Result<Option<Forwarded>, Error> {
        let to_proxy = ConnectionDetails {
            uri: self.proxy.uri(),
            addrs: details.addrs.clone(),
            config: details.config,
            request_level: details.request_level,
            resolver: details.resolver,
            now: details.now,
            timeout: details.timeout,
            current_time: details.current_time.clone(),
            run_connector: details.run_connector.clone(),
            register_shutdown: details.register_shutdown.clone(),
        };
        let authority = details.uri.authority().map_or("", |authority| authority.as_str());
        let origin = format!("http://{authority}");
        let login = self.proxy.username().map(|user| {
            let both = format!("{user}:{}", self.proxy.password().unwrap_or_default());
            format!("Proxy-Authorization: Basic {}\r\n", BASE64_STANDARD.encode(both))
        });
        let inner = self.inner.connect(&to_proxy, None)?;
        Ok(inner.map(|inner| Forwarded { inner, origin, login, is_begun: false }))
    }
}

/// A connection to the proxy.
struct Forwarded {
    inner: Box<dyn Transport>,
    /// Scheme and host of what is asked for.
    origin: String,
    login: Option<String>,
    /// Whether the head of the request has been sent.
    is_begun: bool,
}

impl std::fmt::Debug for Forwarded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Forwarded").field("origin", &self.origin).finish_non_exhaustive()
    }
}

impl Forwarded {
    /// The beginning of a request, "POST /path …", with the whole url in its first line.
    fn head(&self, written: &[u8]) -> Vec<u8> {
        let after = |found: Option<usize>, n: usize| found.map_or(0, |at| at + n);
        let target = after(written.iter().position(|&byte| byte == b' '), 1);
        let fields = after(written.windows(2).position(|pair| pair == b"\r\n"), 2).max(target);
        let login = self.login.as_deref().unwrap_or_default();
        [
            &written[..target],
            self.origin.as_bytes(),
            &written[target..fields],
            login.as_bytes(),
            &written[fields..],
        ]
        .concat()
    }
}

impl Transport for Forwarded {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.inner.buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        if std::mem::replace(&mut self.is_begun, true) {
            return self.inner.transmit_output(amount, timeout);
        }
        let written = self.inner.buffers().output()[..amount].to_vec();
        let head = self.head(&written);
        let room = self.inner.buffers().output().len();
        for part in head.chunks(room) {
            self.inner.buffers().output()[..part.len()].copy_from_slice(part);
            self.inner.transmit_output(part.len(), timeout)?;
        }
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        // What is sent after an answer begins the next request.
        self.is_begun = false;
        self.inner.await_input(timeout)
    }

    fn is_open(&mut self) -> bool {
        self.inner.is_open()
    }

    fn is_tls(&self) -> bool {
        self.inner.is_tls()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// What curl 7.88 sends: `curl -x http://u:p@127.0.0.1:PORT http://reward.test:8080/score?v=1 -d …`.
    #[test]
    fn a_proxy_is_asked_for_the_whole_url() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let bodies = ["a".repeat(400_000), "b".to_owned()];
        let lengths = bodies.each_ref().map(String::len);
        let proxy = thread::spawn(move || {
            // One connection is kept for both.
            let (stream, _) = listener.accept().unwrap();
            let mut stream = BufReader::new(stream);
            lengths.map(|length| {
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") {
                    stream.read_line(&mut head).unwrap();
                }
                let mut body = vec![0; length];
                stream.read_exact(&mut body).unwrap();
                let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi";
                stream.get_mut().write_all(answer).unwrap();
                (head.to_ascii_lowercase(), String::from_utf8(body).unwrap())
            })
        });
        let at = Proxy::new(&format!("http://u:p@{at}")).unwrap();
        let agent = agent(Agent::config_builder().build(), &at);
        for body in &bodies {
            let answer = agent.post("http://reward.test:8080/score?v=1").send(body).unwrap();
            assert_eq!(answer.into_body().read_to_string().unwrap(), "hi");
        }
        for ((head, found), body) in proxy.join().unwrap().into_iter().zip(bodies) {
            assert!(
                head.starts_with("post http://reward.test:8080/score?v=1 http/1.1\r\n"),
                "{head}"
            );
            assert!(head.contains("\r\nhost: reward.test:8080\r\n"), "{head}");
            assert!(head.contains("\r\nproxy-authorization: basic dtpw\r\n"), "{head}");
            assert!(found == body);
        }
    }
}

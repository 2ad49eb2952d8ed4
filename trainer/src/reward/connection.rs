//! How a server is reached, and why it is not.

use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use flow::checkpoint::read_bounded;
use rustls::CertificateError;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Proxy, ProxyProtocol};

use super::Away;
use super::address::Address;
use super::forward;
use super::remote::Endpoint;

/// Most seconds until a connection must stand.
const MAX_CONNECT: f64 = 10.0;

/// What asks `endpoint` at `address`.
///
/// # Errors
/// When its certificates cannot be read, or the environment's proxy is no address.
pub(super) fn agent(endpoint: &Endpoint, address: &Address) -> Result<Agent> {
    let Endpoint { ca, timeout, requests, .. } = endpoint;
    let roots = match ca {
        Some(file) => authorities(file)?,
        None => system_authorities(),
    };
    let proxy = address.proxy(|name| std::env::var(name).ok())?;
    let is_forwarded = |proxy: &&Proxy| {
        let is_http = matches!(proxy.protocol(), ProxyProtocol::Http | ProxyProtocol::Https);
        is_http && address.uri().scheme_str() == Some("http")
    };
    let forwarded = proxy.as_ref().filter(is_forwarded);
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .max_idle_connections_per_host(*requests)
        .timeout_connect(Some(Duration::from_secs_f64(timeout.min(MAX_CONNECT))))
        .timeout_global(Some(Duration::from_secs_f64(*timeout)))
        .tls_config(TlsConfig::builder().root_certs(roots).build())
        .proxy(proxy.clone().filter(|_| forwarded.is_none()))
        .user_agent("ng-train")
        .build();
    Ok(match forwarded {
        Some(proxy) => forward::agent(config, proxy),
        None => config.new_agent(),
    })
}

/// The certificates of a PEM file.
fn authorities(file: &Path) -> Result<RootCerts> {
    let bytes = read_bounded(file).context("`ca`")?;
    let mut found: Vec<Certificate<'static>> = Vec::new();
    for item in parse_pem(&bytes) {
        let item = item.map_err(|error| anyhow!("`ca` {}: {error}", file.display()))?;
        if let PemItem::Certificate(certificate) = item {
            found.push(certificate);
        }
    }
    ensure!(!found.is_empty(), "`ca` {}: no certificate (PEM) in it", file.display());
    Ok(found.into())
}

/// The system's (`SSL_CERT_FILE`, `SSL_CERT_DIR`), or Mozilla's where the system has none.
fn system_authorities() -> RootCerts {
    let found = rustls_native_certs::load_native_certs().certs;
    if found.is_empty() {
        return RootCerts::WebPki;
    }
    found.into_iter().map(|der| Certificate::from_der(&der).to_owned()).into()
}

/// What `error` means.
pub(super) fn fault(error: ureq::Error, timeout: f64) -> anyhow::Error {
    match error {
        ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => {
            Away::error(format!("no connection in {} s", timeout.min(MAX_CONNECT)))
        }
        ureq::Error::Timeout(_) => anyhow!("no answer in {timeout} s"),
        ureq::Error::HostNotFound => Away::error("the host is not found"),
        ureq::Error::Rustls(error) => of_tls(&error),
        ureq::Error::Io(error) => {
            let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
            match (tls, error.kind()) {
                (Some(tls), _) => of_tls(tls),
                (
                    None,
                    ErrorKind::ConnectionRefused
                    | ErrorKind::ConnectionReset
                    | ErrorKind::ConnectionAborted
                    | ErrorKind::BrokenPipe
                    | ErrorKind::HostUnreachable
                    | ErrorKind::NetworkUnreachable
                    | ErrorKind::NetworkDown
                    | ErrorKind::NotConnected,
                ) => Away::error(error.to_string()),
                (None, _) => anyhow!(error),
            }
        }
        other => anyhow!(other),
    }
}

fn of_tls(error: &rustls::Error) -> anyhow::Error {
    let rustls::Error::InvalidCertificate(certificate) = error else {
        return match error {
            rustls::Error::InvalidMessage(_) => {
                anyhow!("{error}: is it https:// that the server speaks?")
            }
            _ => anyhow!("{error}"),
        };
    };
    anyhow!(match certificate {
        CertificateError::UnknownIssuer => {
            "the server's certificate is signed by an authority that is not known here: give its \
             certificate as `ca = \"FILE.pem\"`, or in SSL_CERT_FILE"
                .to_owned()
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "the server's certificate has expired (or this machine's clock is wrong)".to_owned()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "the server's certificate is not valid yet (or this machine's clock is wrong)"
                .to_owned()
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            format!("the server's certificate is for another host: {certificate}")
        }
        other if format!("{other:?}").contains("CaUsedAsEndEntity") => {
            "the server's certificate is an authority's own (self-signed): make one that a private \
             authority signs, and give that authority's certificate as `ca = \"FILE.pem\"`"
                .to_owned()
        }
        _ => format!("the server's certificate is not accepted: {certificate}"),
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::path::PathBuf;
    use std::sync::Arc;
    use std::thread;

    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd,
    };
    use rustls::pki_types::PrivatePkcs8KeyDer;
    use rustls::{ServerConfig, ServerConnection, StreamOwned};

    use super::*;

    /// Asks a server of this machine whose certificate, for `name` until `year`, is signed by an authority
    /// of its own; the asker knows that authority where `is_known`.
    fn asked(name: &str, year: i32, is_known: bool) -> Result<String> {
        let mut authority = CertificateParams::new(Vec::new())?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![name.to_owned()])?;
        params.not_after = date_time_ymd(year, 1, 1);
        let chain = vec![params.signed_by(&key, &authority)?.der().clone()];
        let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let url = format!("https://{}/", listener.local_addr()?);
        let server = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut stream =
                StreamOwned::new(ServerConnection::new(Arc::new(config)).unwrap(), stream);
            // A client that does not trust it goes away.
            if stream.read(&mut [0; 4096]).is_ok() {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi");
            }
        });
        let home = tempfile::tempdir()?;
        let file = home.path().join("authority.pem");
        std::fs::write(&file, authority.pem())?;
        let said = ask(&url, is_known.then_some(file));
        server.join().unwrap();
        said
    }

    fn ask(url: &str, ca: Option<PathBuf>) -> Result<String> {
        let (url, api_key_env) = (url.to_owned(), None);
        let endpoint = Endpoint { url, api_key_env, ca, timeout: 5.0, requests: 1 };
        let address = Address::parse(&endpoint.url, None)?;
        let agent = agent(&endpoint, &address)?;
        let answer = agent.post(address.uri()).send("").map_err(|error| fault(error, 5.0))?;
        Ok(answer.into_body().read_to_string()?)
    }

    #[test]
    fn an_authority_of_ones_own_is_trusted_where_it_is_named() {
        assert_eq!(asked("127.0.0.1", 4000, true).unwrap(), "hi");
        for (name, year, is_known, part) in [
            (
                "127.0.0.1",
                4000,
                false,
                "authority that is not known here: give its certificate as `ca",
            ),
            ("elsewhere.test", 4000, true, "certificate is for another host"),
            ("127.0.0.1", 2001, true, "certificate has expired"),
        ] {
            let said = format!("{:#}", asked(name, year, is_known).unwrap_err());
            assert!(said.contains(part) && !said.contains("is it https"), "{said}");
        }
    }

    #[test]
    fn a_server_without_tls_is_told_from_one_with_a_bad_certificate() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("https://{}/", listener.local_addr().unwrap());
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
        });
        let said = format!("{:#}", ask(&url, None).unwrap_err());
        server.join().unwrap();
        assert!(said.contains("is it https:// that the server speaks?"), "{said}");
    }
}

//! Who may ask: the Host and Origin of a request, and its token.
//!
//! A web page in a browser on this machine can send requests here, and by rebinding its own name it can
//! even read the answers. So the Host must be a name that this server goes by, and an Origin, which
//! browsers send with every request that can change something, must be that Host.

use std::net::IpAddr;

use axum::http::{
    HeaderMap, Method, StatusCode,
    header::{AUTHORIZATION, HOST, ORIGIN},
};
use subtle::ConstantTimeEq;

use super::refusal::Refusal;

/// What is asked for without a token: whether the server lives, and the page, which holds no data.
const OPEN: [&str; 5] = ["/", "/page.css", "/page.js", "/health", "/ready"];

#[derive(Clone, Debug, Default)]
pub struct Guard {
    /// Bound to a loopback address only.
    pub loopback: bool,
    /// Names that a proxy passes on; empty on an open address for any.
    pub hosts: Vec<String>,
    pub token: Option<String>,
}

impl Guard {
    /// # Errors
    /// 403 for a Host or Origin that is not ours, 401 without the token.
    pub fn check(&self, method: &Method, path: &str, headers: &HeaderMap) -> Result<(), Refusal> {
        let host = one(headers, HOST.as_str())?;
        let Some(host) = host else {
            let message = "the request has no Host header";
            return Err(Refusal::new(StatusCode::BAD_REQUEST, "no_host", message));
        };
        if !self.knows(host) {
            let message = "the Host header is not a name of this server; --allow-host adds one";
            return Err(Refusal::new(StatusCode::FORBIDDEN, "host_not_allowed", message));
        }
        if let Some(origin) = one(headers, ORIGIN.as_str())? {
            let same = ["http://", "https://"]
                .iter()
                .any(|scheme| origin.strip_prefix(scheme).is_some_and(|rest| rest == host));
            if !same {
                let message = "requests from pages of other origins are not served";
                return Err(Refusal::new(StatusCode::FORBIDDEN, "origin_not_allowed", message));
            }
        }
        let open = matches!(*method, Method::GET | Method::HEAD) && OPEN.contains(&path);
        if self.token.as_ref().is_none_or(|token| open || bears(headers, token)) {
            return Ok(());
        }
        let message = "give the server's token as `Authorization: Bearer TOKEN`";
        Err(Refusal::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message))
    }

    fn knows(&self, host: &str) -> bool {
        let name = without_port(host);
        let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        let local = name.eq_ignore_ascii_case("localhost")
            || address.is_ok_and(|address| address.is_loopback());
        local
            || self.hosts.iter().any(|known| known.eq_ignore_ascii_case(name))
            || (!self.loopback && self.hosts.is_empty())
    }
}

/// The only value of header `name`.
fn one<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>, Refusal> {
    let mut values = headers.get_all(name).iter();
    let (first, second) = (values.next(), values.next());
    let text = first.map(|value| value.to_str()).transpose();
    if let (Ok(text), None) = (text, second) {
        return Ok(text);
    }
    let message = format!("the {name} header is not one plain value");
    Err(Refusal::new(StatusCode::BAD_REQUEST, "invalid_header", message))
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

fn bears(headers: &HeaderMap, token: &str) -> bool {
    let value = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = value.and_then(|value| {
        let (scheme, rest) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| rest.trim())
    });
    given.is_some_and(|given| given.as_bytes().ct_eq(token.as_bytes()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(guard: &Guard, path: &str, headers: &[(&str, &str)]) -> u16 {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            let name: axum::http::HeaderName = name.parse().unwrap();
            map.append(name, value.parse().unwrap());
        }
        guard.check(&Method::GET, path, &map).map_or_else(|r| r.status.as_u16(), |()| 200)
    }

    #[test]
    fn loopback_serves_its_own_names_and_pages_only() {
        let guard = Guard { loopback: true, ..Guard::default() };
        for host in ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "127.9.9.9", "[::1]:80", "[::1]"]
        {
            assert_eq!(status(&guard, "/x", &[("host", host)]), 200, "{host}");
        }
        for host in ["evil.example", "evil.example:8080", "10.0.0.1", "localhost.evil", "", "::2"] {
            assert_eq!(status(&guard, "/x", &[("host", host)]), 403, "{host}");
        }
        assert_eq!(status(&guard, "/x", &[]), 400);
        assert_eq!(status(&guard, "/x", &[("host", "localhost"), ("host", "localhost")]), 400);
        for (origin, expected) in [
            ("http://localhost:8080", 200),
            ("http://localhost:8081", 403),
            ("http://localhost", 403),
            ("http://evil.example", 403),
            ("null", 403),
            ("file://", 403),
        ] {
            let headers = [("host", "localhost:8080"), ("origin", origin)];
            assert_eq!(status(&guard, "/x", &headers), expected, "{origin}");
        }
    }

    #[test]
    fn names_of_a_proxy_are_added() {
        let hosts = vec!["images.example.org".to_owned()];
        let guard = Guard { loopback: true, hosts, ..Guard::default() };
        let at = |host, origin| status(&guard, "/x", &[("host", host), ("origin", origin)]);
        assert_eq!(at("images.example.org", "https://images.example.org"), 200);
        assert_eq!(at("images.example.org", "https://other.example.org"), 403);
        assert_eq!(at("other.example.org", "https://other.example.org"), 403);
    }

    #[test]
    fn everything_but_life_and_the_page_needs_the_token() {
        let guard = Guard { token: Some("s3cret".into()), ..Guard::default() };
        let at = |path, value: Option<&str>| {
            let mut headers = vec![("host", "any.example")];
            headers.extend(value.map(|value| ("authorization", value)));
            status(&guard, path, &headers)
        };
        for path in OPEN {
            assert_eq!(at(path, None), 200, "{path}");
        }
        for path in ["/metrics", "/v1/models", "/api/jobs", "/health/"] {
            assert_eq!(at(path, None), 401, "{path}");
            assert_eq!(at(path, Some("Bearer s3cret")), 200, "{path}");
            for wrong in ["Bearer s3cre", "Bearer s3cret2", "Basic s3cret", "Bearer", "s3cret", ""]
            {
                assert_eq!(at(path, Some(wrong)), 401, "{path} {wrong}");
            }
        }
        let mut headers = HeaderMap::new();
        headers.insert(HOST, "any.example".parse().unwrap());
        assert!(guard.check(&Method::POST, "/", &headers).is_err());
    }
}

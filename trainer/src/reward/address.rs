//! Where a request goes: the url as it is written down and shown, and as it is sent.

use std::net::IpAddr;

use anyhow::{Context, Result, bail, ensure};
use ureq::Proxy;
use ureq::http::Uri;

use super::secret::Key;

/// Where the key stands in a url that carries it.
const KEY: &str = "{key}";
/// Words in the name of a query's field that hold a secret.
const SECRETS: [&str; 7] = ["key", "token", "secret", "pass", "sig", "auth", "cred"];
/// Longest value of a query's field that is no secret.
const MAX_PLAIN: usize = 32;

/// A url.
#[derive(Debug)]
pub(super) struct Address {
    uri: Uri,
    /// Without its query.
    shown: String,
    has_key: bool,
}

impl Address {
    /// `url`, with `key` where it says `{key}`.
    ///
    /// # Errors
    /// When it is no address, or holds what should not be written down.
    pub(super) fn parse(url: &str, key: Option<&Key>) -> Result<Self> {
        let shown = url.split_once('?').map_or(url, |(before, _)| before).to_owned();
        let has_key = url.contains(KEY);
        let whole = match (has_key, key) {
            (true, None) => {
                bail!("`url` {shown:?} has a place for a key: name its variable in api_key_env")
            }
            (true, Some(key)) => url.replace(KEY, key.exposed()),
            (false, _) => url.to_owned(),
        };
        let plain = url.replace(KEY, "key");
        ensure!(plain.parse::<Uri>().is_ok(), "`url` {shown:?} is no address");
        let uri: Uri = whole.parse().context("the key cannot stand in a url")?;
        let host = uri.host().filter(|host| !host.is_empty());
        let (Some("http" | "https"), Some(_)) = (uri.scheme_str(), host) else {
            bail!("`url` {shown:?} is not http:// or https:// with a host");
        };
        let has_login = uri.authority().is_some_and(|authority| authority.as_str().contains('@'));
        ensure!(!has_login, "`url` holds a login: put a key into a variable, named by api_key_env");
        for field in url.split_once('?').map_or("", |(_, query)| query).split('&') {
            let (name, value) = field.split_once('=').unwrap_or((field, ""));
            let lower = name.to_ascii_lowercase();
            let is_secret =
                SECRETS.iter().any(|word| lower.contains(word)) || value.len() > MAX_PLAIN;
            ensure!(
                !is_secret || value == KEY,
                "`url` holds a key in {name:?}: write {name}={KEY} and put the key into a variable, \
                 named by api_key_env"
            );
        }
        Ok(Self { uri, shown, has_key })
    }

    /// Whether the key stands in it, and in no header.
    pub(super) fn has_key(&self) -> bool {
        self.has_key
    }

    /// What a request is sent to.
    pub(super) fn uri(&self) -> &Uri {
        &self.uri
    }

    /// What a message may say.
    pub(super) fn shown(&self) -> &str {
        &self.shown
    }

    /// The proxy before it, by the variables and rules of curl: `http_proxy` (lower case) or
    /// `https_proxy`, else `all_proxy`, but for the hosts of `no_proxy`. This machine has none before it.
    ///
    /// # Errors
    /// When a variable holds no proxy's address.
    pub(super) fn proxy(&self, variable: impl Fn(&str) -> Option<String>) -> Result<Option<Proxy>> {
        let host = self.uri.host().unwrap_or_default().trim_end_matches('.').to_ascii_lowercase();
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let address = host.parse::<IpAddr>();
        let is_here = host == "localhost" || address.is_ok_and(|address| address.is_loopback());
        let either = |name: &str| variable(name).or_else(|| variable(&name.to_ascii_uppercase()));
        if is_here || either("no_proxy").is_some_and(|list| is_listed(host, &list)) {
            return Ok(None);
        }
        let own = match self.uri.scheme_str() {
            // HTTP_PROXY is what a web server sets from a header, which curl therefore does not read.
            Some("http") => variable("http_proxy"),
            _ => either("https_proxy"),
        };
        let Some(proxy) = own.or_else(|| either("all_proxy")).filter(|proxy| !proxy.is_empty())
        else {
            return Ok(None);
        };
        with_port(&proxy).and_then(|proxy| Proxy::new(&proxy).ok()).map(Some).context(
            "the proxy of the environment (http_proxy, https_proxy or all_proxy) is no address",
        )
    }
}

/// The address of a proxy with the port that curl takes where none is given.
fn with_port(proxy: &str) -> Option<String> {
    let (scheme, rest) = proxy.split_once("://").unwrap_or(("http", proxy));
    let authority = rest.split('/').next()?;
    let named = format!("{scheme}://{authority}");
    let port = if scheme.eq_ignore_ascii_case("https") { 443 } else { 1080 };
    let has_port = named.parse::<Uri>().ok()?.port().is_some();
    Some(if has_port { named } else { format!("{named}:{port}") })
}

/// Whether `host` or a domain above it is in `list`, separated by commas; `*` is every host.
fn is_listed(host: &str, list: &str) -> bool {
    list.split([',', ' ']).map(str::trim).filter(|entry| !entry.is_empty()).any(|entry| {
        let entry = entry.trim_start_matches('.').trim_end_matches('.').to_ascii_lowercase();
        entry == "*" || host == entry || host.strip_suffix(&entry).is_some_and(|h| h.ends_with('.'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(url: &str, variables: &[(&str, &str)]) -> Option<String> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        let proxy = Address::parse(url, None).unwrap().proxy(variable).unwrap();
        proxy.map(|proxy| format!("{}:{}", proxy.host(), proxy.port()))
    }

    /// Each as curl 7.88 does it.
    #[test]
    fn proxies_are_chosen_as_curl_does() {
        let (http, https, all) = (
            ("http_proxy", "http://h:1"),
            ("HTTPS_PROXY", "http://s:2"),
            ("all_proxy", "http://a:3"),
        );
        let every = [http, https, all];
        assert_eq!(proxy("http://x.org/", &every).as_deref(), Some("h:1"));
        assert_eq!(proxy("https://x.org/", &every).as_deref(), Some("s:2"));
        assert_eq!(proxy("http://x.org/", &[https]), None);
        assert_eq!(proxy("https://x.org/", &[http]), None);
        assert_eq!(proxy("https://x.org/", &[http, all]).as_deref(), Some("a:3"));
        assert_eq!(proxy("http://x.org/", &[("HTTP_PROXY", "http://h:1")]), None);
        for (typed, found) in [
            ("h", "h:1080"),
            ("u:p@h", "h:1080"),
            ("https://h/", "h:443"),
            ("socks5h://h", "h:1080"),
            ("[::1]:8080", "[::1]:8080"),
        ] {
            assert_eq!(proxy("http://x.org/", &[("all_proxy", typed)]).as_deref(), Some(found));
        }
        for (list, is_free) in [
            ("x.org", true),
            (".x.org", true),
            ("org", true),
            ("*", true),
            ("a.org, x.org", true),
            ("X.ORG.", true),
            ("w.x.org", false),
            ("rg", false),
            ("", false),
        ] {
            let found = proxy("https://v.x.org/", &[https, ("NO_PROXY", list)]);
            assert_eq!(found.is_none(), is_free, "{list:?}");
        }
    }

    #[test]
    fn nothing_stands_before_this_machine() {
        for host in ["localhost", "LOCALHOST", "localhost.", "127.0.0.1", "127.1.2.3", "[::1]"] {
            assert_eq!(
                proxy(&format!("http://{host}:80/"), &[("http_proxy", "h:1")]),
                None,
                "{host}"
            );
        }
    }

    #[test]
    fn secrets_are_not_written_down() {
        let message = |url: &str| Address::parse(url, None).unwrap_err().to_string();
        for url in [
            "http://a/b?key=s3cret",
            "http://a/b?v=1&Access_Token=s3cret",
            "http://a/?x=\
                    s3cret-s3cret-s3cret-s3cret-s3cret",
            "http://a/b?key={key}",
        ] {
            let said = message(url);
            assert!(said.contains("api_key_env") && !said.contains("s3cret"), "{said}");
        }
        let plain = Address::parse("https://a/b?api-version=2024-02-01", None).unwrap();
        assert_eq!(plain.shown(), "https://a/b");
        assert_eq!(plain.uri().query(), Some("api-version=2024-02-01"));
    }
}

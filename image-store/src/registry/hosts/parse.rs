//! The text of a `hosts.toml`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use toml::{Table, Value};

use super::Host;
use crate::registry::error::RegistryError;

const MAX_HOSTS: usize = 64;
/// Most files or header values of one host.
const MAX_LIST: usize = 64;
const MAX_CONNECT: Duration = Duration::from_secs(600);

/// What a file says.
#[derive(Debug, PartialEq)]
pub(crate) struct Parsed {
    /// In the order to try them; the last one is the file's `server`.
    pub hosts: Vec<Host>,
    /// Keys that mean nothing to us. containerd passes over them as well.
    pub unknown: Vec<String>,
}

/// Takes the text of `file` apart. Paths in it are relative to the file's directory.
pub(crate) fn parse(text: &str, file: &Path) -> Result<Parsed, RegistryError> {
    let table: Table = toml::from_str(text)
        .map_err(|source| RegistryError::Syntax { path: file.to_owned(), source: Box::new(source) })?;
    let root = Section { file, prefix: String::new(), table: &table };
    let mut parsed = Parsed { hosts: Vec::new(), unknown: Vec::new() };
    let hosts = match table.get("host") {
        None => &Table::new(),
        Some(Value::Table(hosts)) => hosts,
        Some(_) => return Err(root.error("host", "is not a table")),
    };
    if hosts.len() > MAX_HOSTS {
        return Err(root.error("host", format!("has more than {MAX_HOSTS} hosts")));
    }
    for (url, settings) in hosts {
        let prefix = format!("host.{url:?}");
        let Value::Table(table) = settings else { return Err(root.error(&prefix, "is not a table")) };
        let section = Section { file, prefix: prefix.clone() + ".", table };
        let mut host = section.host(&[], &mut parsed.unknown)?;
        let api = api(url, section.flag("override_path")?.unwrap_or_default());
        host.api = Some(api.map_err(|problem| root.error(&prefix, problem))?);
        parsed.hosts.push(host);
    }
    let mut server = root.host(&["server", "host"], &mut parsed.unknown)?;
    match root.string("server")?.filter(|server| !server.is_empty()) {
        Some(url) => {
            let api = api(url, root.flag("override_path")?.unwrap_or_default());
            server.api = Some(api.map_err(|problem| root.error("server", problem))?);
        }
        // Where no server is named, the registry itself is asked last, and may do everything.
        None => (server.pull, server.resolve) = (true, true),
    }
    parsed.hosts.push(server);
    Ok(parsed)
}

/// Where the API of the host `url` is. Without a scheme it is https; without `override_path`, the path ends in `/v2`.
fn api(url: &str, override_path: bool) -> Result<Url, &'static str> {
    let bad = "is no http(s)://HOST[:PORT][/PATH]";
    let mut parsed = match url.contains("://") {
        true => Url::parse(url),
        false => Url::parse(&format!("https://{url}")),
    }
    .map_err(|_| bad)?;
    let plain = parsed.query().is_none() && parsed.fragment().is_none();
    if !matches!(parsed.scheme(), "http" | "https") || !parsed.has_host() || !plain {
        return Err(bad);
    }
    if !parsed.username().is_empty() || parsed.password().is_some() {
        return Err("has credentials in it, which are to come with each pull");
    }
    let mut path = parsed.path().trim_end_matches('/').to_owned();
    if !override_path && !path.ends_with("/v2") {
        path.push_str("/v2");
    }
    parsed.set_path(&path);
    Ok(parsed)
}

/// The part of a file that describes one host.
struct Section<'a> {
    file: &'a Path,
    /// What stands before the section's keys, such as `host."https://mirror".`.
    prefix: String,
    table: &'a Table,
}

impl Section<'_> {
    fn error(&self, key: &str, problem: impl Into<String>) -> RegistryError {
        let key = format!("{}{key}", self.prefix).chars().take(300).collect();
        RegistryError::Value { path: self.file.to_owned(), key, problem: problem.into() }
    }

    /// The host, but for where it is. `others`: keys that are not of it and yet known.
    fn host(&self, others: &[&str], unknown: &mut Vec<String>) -> Result<Host, RegistryError> {
        let mut host = Host::itself();
        for (key, value) in self.table {
            match key.as_str() {
                "capabilities" => (host.pull, host.resolve) = self.capabilities(value)?,
                "ca" => host.ca = self.strings(key, value)?.into_iter().map(|path| self.path(path)).collect(),
                "client" => host.client = self.client(value)?,
                "skip_verify" => host.skip_verify = self.flag(key)?.unwrap_or_default(),
                "header" => host.headers = self.headers(value)?,
                "dial_timeout" => host.connect_timeout = self.timeout()?,
                "proxy" => host.proxy = self.proxy()?,
                "override_path" => {}
                key if others.contains(&key) => {}
                key => unknown.push(format!("{}{key}", self.prefix).chars().take(300).collect()),
            }
        }
        Ok(host)
    }

    /// Whether the host may pull, and resolve. An empty list is none, as for containerd.
    fn capabilities(&self, value: &Value) -> Result<(bool, bool), RegistryError> {
        let names = self.strings("capabilities", value)?;
        let (mut pull, mut resolve) = (names.is_empty(), names.is_empty());
        for name in names {
            match name.to_ascii_lowercase().as_str() {
                "pull" => pull = true,
                "resolve" => resolve = true,
                "push" => {}
                _ => return Err(self.error("capabilities", format!("{name:?} is not pull, resolve or push"))),
            }
        }
        Ok((pull, resolve))
    }

    /// A path, a list of paths, or a list of pairs of paths.
    fn client(&self, value: &Value) -> Result<Option<(PathBuf, Option<PathBuf>)>, RegistryError> {
        let bad = || self.error("client", "is not a path, a list of paths, or a list of pairs of paths");
        let first = match value {
            Value::String(_) => value,
            Value::Array(list) if list.is_empty() => return Ok(None),
            Value::Array(list) if list.len() == 1 => &list[0],
            Value::Array(_) => {
                return Err(self.error("client", "has more than one certificate, which is not supported"));
            }
            _ => return Err(bad()),
        };
        let pair: &[Value] = match first {
            Value::Array(pair) if pair.len() == 2 => pair,
            Value::Array(_) => return Err(bad()),
            value => std::slice::from_ref(value),
        };
        let paths: Vec<&str> = pair.iter().map(Value::as_str).collect::<Option<_>>().ok_or_else(bad)?;
        let key = paths.get(1).filter(|key| !key.is_empty());
        Ok(Some((self.path(paths[0]), key.map(|key| self.path(key)))))
    }

    fn headers(&self, value: &Value) -> Result<HeaderMap, RegistryError> {
        let Value::Table(table) = value else { return Err(self.error("header", "is not a table")) };
        let mut headers = HeaderMap::new();
        for (key, value) in table {
            let at = format!("header.{key:?}");
            let name: HeaderName = key.parse().map_err(|_| self.error(&at, "is no name of a header"))?;
            for value in self.strings(&at, value)? {
                // What is in it may be a secret, and is not shown.
                let mut value = HeaderValue::from_str(value).map_err(|_| self.error(&at, "is no value of a header"))?;
                value.set_sensitive(true);
                headers.append(name.clone(), value);
            }
        }
        match headers.len() > MAX_LIST {
            true => Err(self.error("header", format!("has more than {MAX_LIST} values"))),
            false => Ok(headers),
        }
    }

    fn timeout(&self) -> Result<Option<Duration>, RegistryError> {
        let Some(text) = self.string("dial_timeout")?.filter(|text| !text.is_empty()) else { return Ok(None) };
        let timeout = go_duration(text).filter(|timeout| *timeout <= MAX_CONNECT);
        let bad = || self.error("dial_timeout", format!("{text:?} is not a time up to 10m, such as 1s or 1m30s"));
        // 0 is as usual.
        timeout.map(|timeout| Some(timeout).filter(|timeout| !timeout.is_zero())).ok_or_else(bad)
    }

    fn proxy(&self) -> Result<Option<Url>, RegistryError> {
        let Some(text) = self.string("proxy")?.filter(|text| !text.is_empty()) else { return Ok(None) };
        let url = Url::parse(text).ok().filter(|url| {
            matches!(url.scheme(), "http" | "https")
                && url.has_host()
                && matches!(url.path(), "" | "/")
                && url.query().is_none()
                && url.fragment().is_none()
        });
        // The URL may have a password and is not shown.
        url.map(Some).ok_or_else(|| self.error("proxy", "is no http(s)://HOST[:PORT]; SOCKS is not supported"))
    }

    fn string(&self, key: &str) -> Result<Option<&str>, RegistryError> {
        let string = |value: &Value| value.as_str().is_none().then(|| self.error(key, "is not a string"));
        match self.table.get(key) {
            Some(value) => string(value).map_or(Ok(value.as_str()), Err),
            None => Ok(None),
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, RegistryError> {
        match self.table.get(key) {
            Some(Value::Boolean(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.error(key, "is not true or false")),
            None => Ok(None),
        }
    }

    /// A string, or a list of strings.
    fn strings<'v>(&self, key: &str, value: &'v Value) -> Result<Vec<&'v str>, RegistryError> {
        let strings: Option<Vec<&str>> = match value {
            Value::String(string) => Some(vec![string]),
            Value::Array(list) => list.iter().map(Value::as_str).collect(),
            _ => None,
        };
        match strings {
            Some(strings) if strings.len() <= MAX_LIST => Ok(strings),
            Some(_) => Err(self.error(key, format!("has more than {MAX_LIST} values"))),
            None => Err(self.error(key, "is not a string or a list of strings")),
        }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.file.parent().unwrap_or(Path::new("/")).join(path)
    }
}

/// A time as Go writes it: numbers with units, such as `1m30s` or `1.5s`.
fn go_duration(mut text: &str) -> Option<Duration> {
    const UNITS: [(&str, f64); 8] =
        [("ns", 1e-9), ("us", 1e-6), ("µs", 1e-6), ("μs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
    let mut seconds = 0.0;
    if text == "0" {
        return Some(Duration::ZERO);
    }
    if text.is_empty() {
        return None;
    }
    while !text.is_empty() {
        let digits = text.find(|character: char| !character.is_ascii_digit() && character != '.')?;
        let (number, rest) = text.split_at(digits);
        let end = rest.find(|character: char| character.is_ascii_digit() || character == '.').unwrap_or(rest.len());
        let (unit, rest) = rest.split_at(end);
        let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit)?;
        seconds += number.parse::<f64>().ok()? * factor;
        text = rest;
    }
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests;

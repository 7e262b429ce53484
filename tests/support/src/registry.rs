//! An image registry on loopback that a test fills and that misbehaves as it is told: it counts what
//! it is asked, cuts connections, lies, refuses, and holds answers back.
//!
//! It speaks as much HTTP as a registry's client needs, one request a connection.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};

use crate::netns::{Namespace, in_namespace};

/// The media type of an OCI manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// The media type of an OCI index.
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// How a registry answers a request, instead of well.
#[derive(Debug, Clone)]
pub enum Fault {
    /// So many bytes of the body, then the end of the connection.
    Cut(usize),
    /// As many bytes, but others.
    Wrong,
    /// A status with headers and a body.
    Status(u16, Vec<(&'static str, String)>, &'static str),
    /// Half of the body, and nothing more until the registry ends.
    Hold,
    /// The whole body whatever range was asked for.
    IgnoreRange,
    /// The same, cut after so many bytes.
    IgnoreRangeAndCut(usize),
    /// A byte of the body each quarter of a second.
    Drip,
    /// The body, then more of it than was announced by the manifest.
    TooMuch,
}

/// A request that was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Its path.
    pub path: String,
    /// The header Range.
    pub range: Option<String>,
    /// The header Authorization.
    pub authorization: Option<String>,
    /// The header Referer.
    pub referer: Option<String>,
    /// Its body.
    pub body: String,
}

#[derive(Debug, Default)]
struct State {
    /// Path, media type, body.
    served: BTreeMap<String, (String, Arc<Vec<u8>>)>,
    /// What paths contain, and what comes of the next request for each.
    faults: Vec<(String, VecDeque<Fault>)>,
    asked: Vec<Asked>,
    ended: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The registry. It ends when it is dropped.
#[derive(Debug)]
pub struct FakeRegistry {
    address: SocketAddr,
    listener: Arc<TcpListener>,
    shared: Arc<Shared>,
}

/// The digest of some bytes.
#[must_use]
pub fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

impl FakeRegistry {
    /// On this host's loopback.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn new() -> Result<Self> {
        Self::serve(TcpListener::bind("127.0.0.1:0")?)
    }

    /// On the loopback of a namespace.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn inside(namespace: &Namespace) -> Result<Self> {
        Self::serve(in_namespace(namespace, || Ok(TcpListener::bind("127.0.0.1:0")?))?)
    }

    fn serve(listener: TcpListener) -> Result<Self> {
        let (address, listener) = (listener.local_addr()?, Arc::new(listener));
        let registry = Self { address, listener: Arc::clone(&listener), shared: Arc::default() };
        let shared = Arc::clone(&registry.shared);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.state().ended {
                    break;
                }
                let shared = Arc::clone(&shared);
                // A client that goes away is part of the tests.
                std::thread::spawn(move || stream.map(|stream| answer(&shared, stream).ok()));
            }
        });
        Ok(registry)
    }

    /// `HOST:PORT`.
    #[must_use]
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// The name of an image in it.
    #[must_use]
    pub fn name(&self, image: &str) -> String {
        format!("{}/{image}", self.address)
    }

    /// Puts a blob into a repository; its digest.
    pub fn blob(&self, repository: &str, bytes: Vec<u8>) -> String {
        let digest = digest_of(&bytes);
        let path = format!("/v2/{repository}/blobs/{digest}");
        let served = ("application/octet-stream".to_owned(), Arc::new(bytes));
        self.shared.state().served.insert(path, served);
        digest
    }

    /// Puts a manifest into a repository, under its digest and a tag; its digest.
    pub fn manifest(&self, repository: &str, tag: &str, kind: &str, text: &str) -> String {
        let digest = digest_of(text.as_bytes());
        let bytes = Arc::new(text.as_bytes().to_vec());
        let mut state = self.shared.state();
        for version in [tag, &digest] {
            let path = format!("/v2/{repository}/manifests/{version}");
            state.served.insert(path, (kind.to_owned(), Arc::clone(&bytes)));
        }
        digest
    }

    /// Puts an image of these uncompressed layers there; the digests of its manifest and its layers.
    pub fn image(
        &self,
        repository: &str,
        tag: &str,
        architecture: &str,
        layers: &[Vec<u8>],
    ) -> (String, Vec<String>) {
        let ids: Vec<String> =
            layers.iter().map(|layer| format!("{:?}", digest_of(layer))).collect();
        let config = format!(
            r#"{{"architecture":"{architecture}","os":"linux","config":{{"Cmd":["/bin/true"]}},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
            ids.join(",")
        );
        let described = |kind: &str, digest: &str, size: usize| {
            format!(r#"{{"mediaType":"{kind}","digest":"{digest}","size":{size}}}"#)
        };
        let kind = "application/vnd.oci.image.layer.v1.tar";
        let listed: Vec<String> =
            layers.iter().map(|layer| described(kind, &digest_of(layer), layer.len())).collect();
        let kind = "application/vnd.oci.image.config.v1+json";
        let of_config = described(kind, &digest_of(config.as_bytes()), config.len());
        let text = format!(
            r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{of_config},"layers":[{}]}}"#,
            listed.join(",")
        );
        self.blob(repository, config.into_bytes());
        let digests = layers.iter().map(|layer| self.blob(repository, layer.clone())).collect();
        (self.manifest(repository, tag, MANIFEST, &text), digests)
    }

    /// The next requests for paths that contain this are answered so, one after the other.
    pub fn misbehave(&self, path: &str, faults: impl IntoIterator<Item = Fault>) {
        self.shared.state().faults.push((path.to_owned(), faults.into_iter().collect()));
    }

    /// What it was asked so far.
    #[must_use]
    pub fn asked(&self) -> Vec<Asked> {
        self.shared.state().asked.clone()
    }

    /// How often a path was asked for that contains this.
    #[must_use]
    pub fn count(&self, path: &str) -> usize {
        self.shared.state().asked.iter().filter(|asked| asked.path.contains(path)).count()
    }

    /// Waits until a path was asked for that contains this.
    ///
    /// # Errors
    /// When it is not asked for.
    pub fn wait_for(&self, path: &str, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        let mut state = self.shared.state();
        while !state.asked.iter().any(|asked| asked.path.contains(path)) {
            let left = deadline.checked_duration_since(Instant::now());
            let Some(left) = left else { bail!("nobody asked for {path}: {:?}", state.asked) };
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

impl Drop for FakeRegistry {
    fn drop(&mut self) {
        self.shared.state().ended = true;
        self.shared.changed.notify_all();
        // Wakes whoever accepts.
        if let Err(error) = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both) {
            eprintln!("could not end a test's registry: {error}");
        }
    }
}

fn request(stream: &TcpStream) -> Result<Asked> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).context("no path")?.to_owned();
    let (mut range, mut authorization, mut referer, mut length) = (None, None, None, 0);
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.split_once(':') else { break };
        let value = value.trim().to_owned();
        match name.to_ascii_lowercase().as_str() {
            "range" => range = Some(value),
            "authorization" => authorization = Some(value),
            "referer" => referer = Some(value),
            "content-length" => length = value.parse()?,
            _ => {}
        }
    }
    let mut body = String::new();
    reader.take(length).read_to_string(&mut body)?;
    Ok(Asked { path, range, authorization, referer, body })
}

fn answer(shared: &Shared, mut stream: TcpStream) -> Result<()> {
    let Ok(asked) = request(&stream) else {
        // Not HTTP, for example TLS.
        head(&mut stream, 400, 0, &[])?;
        return Ok(stream.shutdown(Shutdown::Both)?);
    };
    let (served, fault) = {
        let mut state = shared.state();
        state.asked.push(asked.clone());
        let fault = state
            .faults
            .iter_mut()
            .filter(|(path, _)| asked.path.contains(path.as_str()))
            .find_map(|(_, faults)| faults.pop_front());
        let served = state.served.get(&asked.path).cloned();
        // A list of tags is there for each repository, and nobody looks what is in it.
        let repository = asked.path.split_once("tags/list").map(|(repository, _)| repository);
        let is_there =
            |repository: &str| state.served.keys().any(|path| path.starts_with(repository));
        let tags = repository.filter(|repository| is_there(repository));
        let tags = tags.map(|_| ("application/json".to_owned(), Arc::new(b"{}".to_vec())));
        (served.or(tags), fault)
    };
    shared.changed.notify_all();
    if let Some(Fault::Status(status, headers, body)) = &fault {
        head(&mut stream, *status, body.len(), headers)?;
        stream.write_all(body.as_bytes())?;
        return Ok(stream.shutdown(Shutdown::Both)?);
    }
    let Some((kind, body)) = served else {
        let code = if asked.path.contains("/manifests/") { "MANIFEST" } else { "NAME" };
        let body = format!(r#"{{"errors":[{{"code":"{code}_UNKNOWN","message":"unknown"}}]}}"#);
        head(&mut stream, 404, body.len(), &[])?;
        stream.write_all(body.as_bytes())?;
        return Ok(stream.shutdown(Shutdown::Both)?);
    };
    let whole = matches!(fault, Some(Fault::IgnoreRange | Fault::IgnoreRangeAndCut(_)));
    let from = asked.range.as_deref().filter(|_| !whole);
    let from = from.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let from: usize = from.unwrap_or(0);
    let rest = body.get(from..).context("a range outside")?;
    let mut headers = vec![("Content-Type", kind)];
    if from > 0 {
        let (last, size) = (body.len() - 1, body.len());
        headers.push(("Content-Range", format!("bytes {from}-{last}/{size}")));
    }
    let more = if matches!(fault, Some(Fault::TooMuch)) { 4096 } else { 0 };
    head(&mut stream, if from > 0 { 206 } else { 200 }, rest.len() + more, &headers)?;
    match fault {
        Some(Fault::Cut(count) | Fault::IgnoreRangeAndCut(count)) => {
            stream.write_all(&rest[..count.min(rest.len())])?
        }
        Some(Fault::Wrong) => {
            stream.write_all(&rest.iter().map(|byte| byte ^ 1).collect::<Vec<_>>())?;
        }
        Some(Fault::Drip) => {
            for byte in rest {
                stream.write_all(std::slice::from_ref(byte))?;
                let state = shared.state();
                let waited = shared.changed.wait_timeout(state, Duration::from_millis(250));
                if waited.unwrap_or_else(PoisonError::into_inner).0.ended {
                    break;
                }
            }
        }
        Some(Fault::Hold) => {
            stream.write_all(&rest[..rest.len() / 2])?;
            let mut state = shared.state();
            while !state.ended {
                state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        _ => {
            stream.write_all(rest)?;
            stream.write_all(&vec![0; more])?;
        }
    }
    Ok(stream.shutdown(Shutdown::Both)?)
}

fn head(
    stream: &mut TcpStream,
    status: u16,
    length: usize,
    headers: &[(&'static str, String)],
) -> Result<()> {
    let mut text =
        format!("HTTP/1.1 {status} Some\r\nConnection: close\r\nContent-Length: {length}\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str("\r\n");
    Ok(stream.write_all(text.as_bytes())?)
}

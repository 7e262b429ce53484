//! One image's way to its registry: which endpoint is asked, with which header, and what an answer
//! that is no success means.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use matchlock_model::reference::ImageReference;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_RANGE, HeaderValue, RANGE, RETRY_AFTER};
use reqwest::{Client, Response, StatusCode, Url};
use tokio::sync::Mutex;

use super::auth::{self, Access};
use super::http;
use super::manifest::{self, ManifestBytes};
use super::pace::Pace;
use super::{Attempts, HUB, HUB_HOST, RegistryError, RegistrySettings, credentials, words};

/// The longest answer with an error that is read.
const MAX_ERROR: u64 = 64 * 1024;

/// Where an image may be had.
#[derive(Debug)]
struct Endpoint {
    /// `HOST[:PORT]`.
    host: String,
    /// How logins name it.
    registry: String,
    https: bool,
    /// The header that it was content with last.
    authorization: Mutex<Option<HeaderValue>>,
}

impl Endpoint {
    fn origin(&self) -> String {
        let scheme = if self.https { "https" } else { "http" };
        format!("{scheme}://{}", self.host)
    }

    /// Whether it is this registry itself that answered, and no host that it led us to.
    fn is_at(&self, url: &Url) -> bool {
        Url::parse(&self.origin()).is_ok_and(|ours| ours.origin() == url.origin())
    }

    /// The refusal of a host that it led us to, which is asked for nothing and told nothing.
    fn led_away(&self, answer: &Response, what: &str) -> RegistryError {
        RegistryError::Status {
            host: words::line(answer.url().host_str().unwrap_or("another host")),
            status: answer.status().as_u16(),
            what: what.to_owned(),
            said: format!("{} leads there, and no login of it is given to other hosts", self.host),
        }
    }
}

/// The way to one image.
#[derive(Debug)]
pub struct Session {
    client: Client,
    /// For realms: it takes no login to another host.
    to_realms: Client,
    image: ImageReference,
    settings: RegistrySettings,
    endpoints: Vec<Endpoint>,
    /// The endpoint that had the manifest.
    chosen: AtomicUsize,
}

impl Session {
    /// Prepares for an image. Nothing is asked yet.
    ///
    /// # Errors
    /// When the certificates that the user names cannot be used.
    pub fn open(
        image: &ImageReference,
        settings: &RegistrySettings,
    ) -> Result<Self, RegistryError> {
        let registry = image.registry();
        let mirrors = settings.mirrors.get(registry).into_iter().flatten();
        let endpoint = |host: &str, registry: &str| Endpoint {
            host: host.to_owned(),
            registry: registry.to_owned(),
            https: !settings.insecure.iter().any(|insecure| insecure == registry),
            authorization: Mutex::default(),
        };
        let mut endpoints: Vec<_> = mirrors.map(|host| endpoint(host, host)).collect();
        let host = if registry == HUB { HUB_HOST } else { registry };
        endpoints.push(endpoint(host, registry));
        Ok(Self {
            client: http::to_registries(settings)?,
            to_realms: http::to_realms(settings)?,
            image: image.clone(),
            settings: settings.clone(),
            endpoints,
            chosen: AtomicUsize::new(0),
        })
    }

    /// A manifest or an index by its tag or digest, its own digest checked.
    ///
    /// # Errors
    /// What the registry itself answered, when no mirror has it either.
    pub async fn manifest(&self, version: &str) -> Result<ManifestBytes, RegistryError> {
        let first = self.chosen.load(Ordering::Relaxed);
        let mut at = first;
        loop {
            let endpoint = &self.endpoints[at];
            match self.manifest_of(endpoint, version).await {
                Ok(manifest) => {
                    self.chosen.store(at, Ordering::Relaxed);
                    return Ok(manifest);
                }
                Err(error) if at + 1 < self.endpoints.len() => {
                    tracing::warn!(%error, mirror = endpoint.host, "the mirror does not have it");
                    at += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn manifest_of(
        &self,
        endpoint: &Endpoint,
        version: &str,
    ) -> Result<ManifestBytes, RegistryError> {
        let what = format!("the manifest {}", self.shown(version));
        let mut attempts = Attempts::default();
        loop {
            let read = async {
                let path = format!("manifests/{version}");
                let answer = self.get(endpoint, &path, &what, 0).await?;
                manifest::read(answer, version, &endpoint.host, &what).await
            };
            match read.await {
                Ok(manifest) => return Ok(manifest),
                Err(RegistryError::NoTag { image, registry, said }) => {
                    // Some registries do not tell an unknown tag from an unknown repository.
                    return Err(if self.has_repository(endpoint, &what).await {
                        RegistryError::NoTag { image, registry, said }
                    } else {
                        RegistryError::NoImage { image, registry, said }
                    });
                }
                Err(error) => attempts.again(error).await?,
            }
        }
    }

    /// Whether the repository is there, as far as the registry says.
    async fn has_repository(&self, endpoint: &Endpoint, what: &str) -> bool {
        let answer = self.get(endpoint, "tags/list?n=1", what, 0).await;
        !matches!(answer, Err(RegistryError::NoImage { .. }))
    }

    /// Which endpoint is asked for blobs.
    #[must_use]
    pub fn endpoint(&self) -> usize {
        self.chosen.load(Ordering::Relaxed)
    }

    /// Gives an endpoint up for the next one; whether there is one.
    pub fn turn_from(&self, endpoint: usize) -> bool {
        // Another blob's download may have turned already.
        self.chosen.fetch_max((endpoint + 1).min(self.endpoints.len() - 1), Ordering::Relaxed);
        self.endpoint() > endpoint
    }

    fn shown(&self, version: &str) -> String {
        let separator = if version.contains(':') { '@' } else { ':' };
        format!("{}{separator}{version}", self.image.repository())
    }

    /// A blob by its digest, from this byte on if the registry can do that. Of `size` bytes in all,
    /// no more are read.
    ///
    /// # Errors
    /// Why it does not come; whoever asks tries again.
    pub async fn blob(&self, digest: &str, size: u64, from: u64) -> Result<Body, RegistryError> {
        let endpoint = &self.endpoints[self.chosen.load(Ordering::Relaxed)];
        let what = format!("the blob {digest}");
        let answer = self.get(endpoint, &format!("blobs/{digest}"), &what, from).await?;
        let start = if answer.status() == StatusCode::PARTIAL_CONTENT {
            range_start(&answer).filter(|start| *start == from).ok_or_else(|| {
                let said = "it sent another part than it was asked for".to_owned();
                let status = answer.status().as_u16();
                RegistryError::Status {
                    host: endpoint.host.clone(),
                    status,
                    what: what.clone(),
                    said,
                }
            })?
        } else {
            0
        };
        Ok(Body {
            answer,
            host: endpoint.host.clone(),
            what,
            start,
            left: size - start.min(size),
            size,
            pace: Pace::default(),
        })
    }

    /// Asks with the header that was good last; if that is none, finds another one, once.
    async fn get(
        &self,
        endpoint: &Endpoint,
        path: &str,
        what: &str,
        from: u64,
    ) -> Result<Response, RegistryError> {
        let mut authorization = endpoint.authorization.lock().await.clone();
        for last in [false, true] {
            let answer = self.ask(endpoint, path, what, from, authorization.as_ref()).await?;
            match answer.status() {
                StatusCode::OK => return Ok(answer),
                StatusCode::PARTIAL_CONTENT if from > 0 => return Ok(answer),
                StatusCode::RANGE_NOT_SATISFIABLE if from > 0 => {
                    return self.ask_from_the_start(endpoint, path, what, authorization).await;
                }
                StatusCode::UNAUTHORIZED if !last => {
                    if !endpoint.is_at(answer.url()) {
                        return Err(endpoint.led_away(&answer, what));
                    }
                    let challenge = auth::challenge(&answer);
                    let Some(challenge) = challenge else {
                        return Err(self.refusal(endpoint, answer, what).await);
                    };
                    let mut kept = endpoint.authorization.lock().await;
                    // Another blob's request may have found a new one meanwhile.
                    if *kept == authorization {
                        *kept = Some(self.authorize(endpoint, &challenge).await?);
                    }
                    authorization.clone_from(&kept);
                }
                _ => return Err(self.refusal(endpoint, answer, what).await),
            }
        }
        // The second round answers or refuses.
        Err(RegistryError::Client("no answer to a second request".to_owned()))
    }

    /// What lies here is longer than what the registry has: it is of no use.
    async fn ask_from_the_start(
        &self,
        endpoint: &Endpoint,
        path: &str,
        what: &str,
        authorization: Option<HeaderValue>,
    ) -> Result<Response, RegistryError> {
        let answer = self.ask(endpoint, path, what, 0, authorization.as_ref()).await?;
        match answer.status() {
            StatusCode::OK => Ok(answer),
            _ => Err(self.refusal(endpoint, answer, what).await),
        }
    }

    async fn ask(
        &self,
        endpoint: &Endpoint,
        path: &str,
        what: &str,
        from: u64,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, RegistryError> {
        let url = format!("{}/v2/{}/{path}", endpoint.origin(), self.image.repository());
        let mut request = self.client.get(url);
        if path.starts_with("manifests/") {
            request = request.header(ACCEPT, manifest::ACCEPTED);
        }
        if from > 0 {
            request = request.header(RANGE, format!("bytes={from}-"));
        }
        if let Some(authorization) = authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        request.send().await.map_err(|error| RegistryError::of(error, &endpoint.host, what))
    }

    async fn authorize(
        &self,
        endpoint: &Endpoint,
        challenge: &auth::Challenge,
    ) -> Result<HeaderValue, RegistryError> {
        let login = match &self.settings.docker_config {
            Some(dir) => credentials::find(dir, &endpoint.registry).await?,
            None => None,
        };
        let image = self.image.to_string();
        let access = Access {
            client: &self.to_realms,
            registry: &endpoint.registry,
            image: &image,
            repository: self.image.repository(),
            https: endpoint.https,
            login: login.as_ref(),
        };
        access.header(challenge).await
    }

    /// What an answer means that is no success.
    async fn refusal(&self, endpoint: &Endpoint, answer: Response, what: &str) -> RegistryError {
        let status = answer.status();
        let after = retry_after(&answer);
        let body = match capped(answer, MAX_ERROR, &endpoint.host, what).await {
            Ok(body) => body,
            Err(error) => return error,
        };
        let (code, said) = words::error(&body);
        let said = if said.is_empty() { format!("HTTP {}", status.as_u16()) } else { said };
        let (image, registry) = (self.image.to_string(), endpoint.registry.clone());
        match (status, code.as_deref()) {
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) => {
                RegistryError::Denied { image, registry, said }
            }
            (StatusCode::NOT_FOUND, Some("NAME_UNKNOWN")) => {
                RegistryError::NoImage { image, registry, said }
            }
            (StatusCode::NOT_FOUND, Some("MANIFEST_UNKNOWN" | "NOT_FOUND")) => {
                RegistryError::NoTag { image, registry, said }
            }
            (StatusCode::NOT_FOUND, None) if words::is_markup(&body) => {
                RegistryError::NotARegistry { host: endpoint.host.clone(), what: said }
            }
            _ => refused(status, after, &body, &endpoint.host, what),
        }
    }
}

/// What an answer means that says nothing of an image.
pub(super) fn refused(
    status: StatusCode,
    after: Option<Duration>,
    body: &[u8],
    host: &str,
    what: &str,
) -> RegistryError {
    let (host, said) = (host.to_owned(), words::error(body).1);
    if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() {
        let said = if said.is_empty() { said } else { format!(": {said}") };
        return RegistryError::Busy { host, status: status.as_u16(), said, after };
    }
    let said = if said.is_empty() { "without a word".to_owned() } else { said };
    RegistryError::Status { host, status: status.as_u16(), what: what.to_owned(), said }
}

fn retry_after(answer: &Response) -> Option<Duration> {
    // It may also be a date; then our own waits do.
    let seconds = answer.headers().get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

fn range_start(answer: &Response) -> Option<u64> {
    let range = answer.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}

/// The whole of a body that may not be longer than this.
pub(super) async fn capped(
    mut answer: Response,
    limit: u64,
    host: &str,
    what: &str,
) -> Result<Vec<u8>, RegistryError> {
    let mut body = Vec::new();
    loop {
        match answer.chunk().await {
            Ok(None) => return Ok(body),
            Ok(Some(chunk)) if (body.len() + chunk.len()) as u64 <= limit => {
                body.extend_from_slice(&chunk);
            }
            Ok(Some(_)) => {
                let (host, what) = (host.to_owned(), what.to_owned());
                return Err(RegistryError::TooLong { host, what, limit });
            }
            Err(error) => return Err(RegistryError::of(error, host, what)),
        }
    }
}

/// A blob on its way.
#[derive(Debug)]
pub struct Body {
    answer: Response,
    host: String,
    what: String,
    start: u64,
    left: u64,
    size: u64,
    pace: Pace,
}

impl Body {
    /// The byte of the blob that comes first.
    #[must_use]
    pub const fn start(&self) -> u64 {
        self.start
    }

    /// The host that sends it.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The next bytes; none once all were there.
    ///
    /// # Errors
    /// When the connection breaks or ends too early, or more comes than there may be.
    pub async fn next(&mut self) -> Result<Option<bytes::Bytes>, RegistryError> {
        let (host, what) = (self.host.clone(), self.what.clone());
        let asked = Instant::now();
        let came = self.answer.chunk().await;
        let waited = asked.elapsed();
        match came {
            Err(error) => Err(RegistryError::of(error, &host, &what)),
            Ok(None) if self.left > 0 => {
                let why = format!("it ended {} bytes too early", self.left);
                Err(RegistryError::Broken { host, what, why })
            }
            Ok(None) => Ok(None),
            Ok(Some(chunk)) => {
                let left = self.left.checked_sub(chunk.len() as u64);
                let Some(left) = left else {
                    return Err(RegistryError::TooLong { host, what, limit: self.size });
                };
                self.left = left;
                if self.pace.keeps(waited, chunk.len() as u64) || left == 0 {
                    return Ok(Some(chunk));
                }
                let why = "it came too slowly to be waited for".to_owned();
                Err(RegistryError::Broken { host, what, why })
            }
        }
    }
}

//! What can go wrong with a registry, each in one line that says what to do.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::Retry;
use super::words::line;

/// Why a registry did not give what was wanted.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// It has no such repository.
    #[error("no such image: {image}: {registry} has no repository of this name ({said})")]
    NoImage {
        /// The image.
        image: String,
        /// The registry.
        registry: String,
        /// Its words.
        said: String,
    },
    /// It has the repository, but not this tag or digest.
    #[error("no such tag or digest: {image}: {registry} does not have it ({said})")]
    NoTag {
        /// The image.
        image: String,
        /// The registry.
        registry: String,
        /// Its words.
        said: String,
    },
    /// It refuses access.
    #[error(
        "{registry} refused access to {image} ({said}): it does not exist there, or needs a login (`docker login {registry}`)"
    )]
    Denied {
        /// The image.
        image: String,
        /// The registry.
        registry: String,
        /// Its words.
        said: String,
    },
    /// Its name cannot be resolved.
    #[error("unknown host {host}: check the image's name, and this host's name servers")]
    UnknownHost {
        /// The host.
        host: String,
    },
    /// There is no connection to it.
    #[error("could not connect to {host}: {why}")]
    Connect {
        /// The host.
        host: String,
        /// Why.
        why: String,
    },
    /// Its certificate is not one that this host trusts.
    #[error(
        "the certificate of {host} is not trusted ({why}): name the file of its CA in config.toml (ca_file in [registry]) or in SSL_CERT_FILE"
    )]
    Certificate {
        /// The host.
        host: String,
        /// Why.
        why: String,
    },
    /// It does not speak TLS.
    #[error("{host} does not speak TLS: if plain HTTP is meant, use --insecure-registry {host}")]
    PlainHttp {
        /// The host.
        host: String,
    },
    /// It would lead us from https to http.
    #[error("{host} leads from https to plain http: refused")]
    Downgrade {
        /// The host.
        host: String,
    },
    /// It would lead a login to another host.
    #[error("{host} leads to another host, which is not given a login: refused")]
    LedAway {
        /// The host.
        host: String,
    },
    /// It answers with something that no registry sends.
    #[error("{host} is no image registry, or stands behind a login page: it sent {what}")]
    NotARegistry {
        /// The host.
        host: String,
        /// What it sent.
        what: String,
    },
    /// It asks to come later.
    #[error("{host} is busy ({status}{said}){}", after.map_or(String::new(), |t| format!("; it asks to wait {} s", t.as_secs())))]
    Busy {
        /// The host.
        host: String,
        /// The HTTP status.
        status: u16,
        /// Its words, after a separator, or nothing.
        said: String,
        /// How long it asks to wait.
        after: Option<Duration>,
    },
    /// It answers with an error.
    #[error("{host} answered {status} for {what} ({said})")]
    Status {
        /// The host.
        host: String,
        /// The HTTP status.
        status: u16,
        /// What was asked for.
        what: String,
        /// Its words.
        said: String,
    },
    /// The connection broke.
    #[error("the connection to {host} broke while {what} was read: {why}")]
    Broken {
        /// The host.
        host: String,
        /// What was being read.
        what: String,
        /// Why.
        why: String,
    },
    /// What came is not what was named.
    #[error("digest mismatch: {host} sent {what} with the digest {found}, not {expected}")]
    Digest {
        /// The host.
        host: String,
        /// What was asked for.
        what: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// There is more of it than there may be.
    #[error("{host} sent more than {limit} bytes of {what}: refused")]
    TooLong {
        /// The host.
        host: String,
        /// What was asked for.
        what: String,
        /// How many there may be.
        limit: u64,
    },
    /// The login that we have cannot be read.
    #[error("could not get the login for {registry}: {why}")]
    Credentials {
        /// The registry.
        registry: String,
        /// Why.
        why: String,
    },
    /// The file of certificates cannot be used.
    #[error("could not use the certificates in {path} (ca_file in [registry]): {why}")]
    CaFile {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// There can be no client at all.
    #[error("could not prepare for HTTPS: {0}")]
    Client(String),
}

impl RegistryError {
    /// Whether this may pass by itself.
    #[must_use]
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Connect { .. } | Self::UnknownHost { .. } => Retry::Briefly,
            Self::Broken { .. } | Self::Busy { after: None, .. } => Retry::Soon,
            Self::Busy { after: Some(after), .. } => Retry::After(*after),
            _ => Retry::No,
        }
    }

    /// What a failed exchange means. `what` was being asked for.
    pub(super) fn of(error: reqwest::Error, host: &str, what: &str) -> Self {
        let host = host.to_owned();
        let error = error.without_url();
        let (mut texts, mut io_kind) = (Vec::new(), None);
        let mut next: Option<&(dyn Error + 'static)> = Some(&error);
        while let Some(current) = next {
            if current.is::<Downgraded>() {
                return Self::Downgrade { host };
            }
            if current.is::<LedAway>() {
                return Self::LedAway { host };
            }
            match current.downcast_ref::<rustls::Error>() {
                Some(rustls::Error::InvalidCertificate(why)) => {
                    return Self::Certificate { host, why: line(&why.to_string()) };
                }
                Some(rustls::Error::InvalidMessage(_)) => return Self::PlainHttp { host },
                _ => {}
            }
            texts.push(current.to_string());
            let io = current.downcast_ref::<io::Error>();
            io_kind = io.map(io::Error::kind).or(io_kind);
            // What an I/O error wraps is not its source, but itself.
            let wrapped = io.and_then(io::Error::get_ref).map(|inner| inner as &dyn Error);
            next = wrapped.or_else(|| current.source());
        }
        // The last cause says it; those above only repeat that there was one.
        let why = line(texts.last().map_or("", String::as_str));
        if error.is_connect() {
            // The resolver's error is a private type.
            if texts.iter().any(|text| text.starts_with("dns error")) {
                return Self::UnknownHost { host };
            }
            let why = if error.is_timeout() { "it does not answer".to_owned() } else { why };
            return Self::Connect { host, why };
        }
        if error.is_redirect() {
            return Self::NotARegistry { host, what: "redirections without an end".to_owned() };
        }
        let why = if error.is_timeout() || io_kind == Some(io::ErrorKind::TimedOut) {
            "nothing came for too long".to_owned()
        } else {
            why
        };
        Self::Broken { host, what: what.to_owned(), why }
    }
}

/// A redirection from https to http.
#[derive(Debug, thiserror::Error)]
#[error("a redirection from https to http")]
pub(super) struct Downgraded;

/// A redirection of a realm to another host.
#[derive(Debug, thiserror::Error)]
#[error("a redirection to another host")]
pub(super) struct LedAway;

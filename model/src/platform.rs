//! Kinds of machines, as images name them: `linux/amd64`, `linux/arm/v7`.

use std::fmt;
use std::str::FromStr;

/// What an image runs on. The system is always Linux.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Platform {
    /// The architecture: `amd64`, `arm64`.
    pub architecture: String,
    /// Which kind of that architecture, where it matters: `v7`.
    pub variant: Option<String>,
}

/// A text that is no platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a platform: write linux/ARCHITECTURE, for example linux/amd64 or linux/arm64"
)]
pub struct InvalidPlatform {
    /// What was given.
    pub text: String,
}

impl Platform {
    /// This host's.
    #[must_use]
    pub fn host() -> Self {
        Self::linux(host_architecture())
    }

    /// Linux on this architecture.
    #[must_use]
    pub fn linux(architecture: &str) -> Self {
        Self { architecture: architecture.to_owned(), variant: None }
    }
}

/// This machine, as images name it.
#[must_use]
pub fn host_architecture() -> &'static str {
    usual(std::env::consts::ARCH)
}

/// The name that images use for what others call differently.
fn usual(architecture: &str) -> &str {
    match architecture {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "linux/{}", self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

impl FromStr for Platform {
    type Err = InvalidPlatform;

    fn from_str(text: &str) -> Result<Self, InvalidPlatform> {
        let good = |part: &str| {
            !part.is_empty()
                && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        };
        let parts: Vec<&str> = text.split('/').collect();
        let refused = || InvalidPlatform { text: text.to_owned() };
        match (parts.as_slice(), parts.iter().copied().all(good)) {
            (["linux", architecture], true) => Ok(Self::linux(usual(architecture))),
            (["linux", architecture, variant], true) => Ok(Self {
                architecture: usual(architecture).to_owned(),
                variant: Some((*variant).to_owned()),
            }),
            _ => Err(refused()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_are_read_and_written() {
        for text in ["linux/amd64", "linux/arm64", "linux/arm/v7"] {
            assert_eq!(text.parse::<Platform>().unwrap().to_string(), text);
        }
        let alias: Platform = "linux/x86_64".parse().unwrap();
        assert_eq!(alias.to_string(), "linux/amd64");
        for text in
            ["", "amd64", "windows/amd64", "linux/", "linux/a/b/c", "linux/AMD64", "linux/a b"]
        {
            assert!(text.parse::<Platform>().is_err(), "{text}");
        }
    }
}

//! Names of images in registries, as Docker reads them: `alpine` is `docker.io/library/alpine:latest`.
//!
//! Reading one changes no spelling but what is left out; an error says what is wrong with the text.

use std::fmt;
use std::str::FromStr;

use oci_spec::distribution::Reference;

/// The name of an image in a registry, complete.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ImageReference(Reference);

/// A text that names no image in any registry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} does not name an image of a registry ({why}); write [HOST[:PORT]/]NAME[:TAG] or [HOST[:PORT]/]NAME@sha256:DIGEST, for example debian:12"
)]
pub struct InvalidReference {
    /// What was given.
    pub text: String,
    /// What is wrong with it.
    pub why: String,
}

impl ImageReference {
    /// The host of the registry, with its port if one is given.
    #[must_use]
    pub fn registry(&self) -> &str {
        self.0.registry()
    }

    /// The name in the registry, without tag and digest.
    #[must_use]
    pub fn repository(&self) -> &str {
        self.0.repository()
    }

    /// What of the repository is meant: the digest if there is one, else the tag.
    #[must_use]
    pub fn version(&self) -> &str {
        self.0.digest().or_else(|| self.0.tag()).unwrap_or("latest")
    }

    /// The digest, if the image is named by one.
    #[must_use]
    pub fn digest(&self) -> Option<&str> {
        self.0.digest()
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for ImageReference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        let refused = |why: String| InvalidReference { text: text.to_owned(), why };
        let parsed = text.parse::<Reference>().map_err(|error| refused(error.to_string()))?;
        if let Some(digest) = parsed.digest() {
            let hex = digest.strip_prefix("sha256:");
            let lower = |hex: &str| !hex.bytes().any(|byte| byte.is_ascii_uppercase());
            if !hex.is_some_and(lower) {
                let why = "only sha256 digests in lower case are known".to_owned();
                return Err(refused(why));
            }
        }
        Ok(Self(parsed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> String {
        text.parse::<ImageReference>().unwrap().to_string()
    }

    #[test]
    fn names_are_completed_as_docker_does() {
        let digest = format!("sha256:{}", "a1".repeat(32));
        for (given, complete) in [
            ("alpine", "docker.io/library/alpine:latest".to_owned()),
            ("debian:12", "docker.io/library/debian:12".to_owned()),
            ("grafana/grafana", "docker.io/grafana/grafana:latest".to_owned()),
            ("docker.io/alpine", "docker.io/library/alpine:latest".to_owned()),
            ("index.docker.io/library/alpine", "docker.io/library/alpine:latest".to_owned()),
            ("localhost/a", "localhost/a:latest".to_owned()),
            ("localhost:5000/a/b:c", "localhost:5000/a/b:c".to_owned()),
            ("quay.io/x/y.z_a-b:V1.0", "quay.io/x/y.z_a-b:V1.0".to_owned()),
            ("127.0.0.1:1/a", "127.0.0.1:1/a:latest".to_owned()),
            (&format!("alpine@{digest}"), format!("docker.io/library/alpine@{digest}")),
            (&format!("h.io/a:3@{digest}"), format!("h.io/a:3@{digest}")),
        ] {
            assert_eq!(name(given), complete, "{given}");
            // A complete name stays as it is.
            assert_eq!(name(&complete), complete);
        }
    }

    #[test]
    fn a_digest_goes_before_a_tag() {
        let digest = format!("sha256:{}", "a1".repeat(32));
        let parsed: ImageReference = format!("h.io:5/a/b:3@{digest}").parse().unwrap();
        assert_eq!((parsed.registry(), parsed.repository()), ("h.io:5", "a/b"));
        assert_eq!((parsed.version(), parsed.digest()), (&*digest, Some(&*digest)));
        let parsed: ImageReference = "a:3".parse().unwrap();
        assert_eq!((parsed.version(), parsed.digest()), ("3", None));
    }

    #[test]
    fn what_names_no_image_is_refused_with_an_example() {
        let short = format!("a@sha256:{}", "a".repeat(40));
        let upper = format!("a@sha256:{}", "A1".repeat(32));
        let other = format!("a@sha512:{}", "a1".repeat(64));
        for text in
            ["", "Debian", "a:b:c", "a/", "/a", "a b", "a@sha256:12", &short, &upper, &other]
        {
            let error = text.parse::<ImageReference>().unwrap_err().to_string();
            assert!(error.contains("debian:12"), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }
}

//! What `config.toml` and the environment say of image registries.
//!
//! ```toml
//! [registry]
//! insecure = ["localhost:5000"]          # asked by plain HTTP
//! ca_file = "/etc/ssl/our-ca.pem"        # trusted besides the host's own certificates
//! [registry.mirrors]
//! "docker.io" = ["mirror.example:5000"]  # asked first, in this order
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;

use matchlock_host::registry::RegistrySettings;
use serde::Deserialize;

use super::{CONFIG_FILE, ConfigError, Sources, absolute, text, variable};

/// The environment variable of the directory with Docker's `config.json`.
const DOCKER_VARIABLE: &str = "DOCKER_CONFIG";

/// The section of the file.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Section {
    insecure: Vec<String>,
    #[serde(deserialize_with = "text")]
    ca_file: Option<PathBuf>,
    mirrors: BTreeMap<String, Vec<String>>,
}

/// Checks them.
pub(super) fn settings(
    from: &Sources<'_>,
    section: Section,
) -> Result<RegistrySettings, ConfigError> {
    let file = from.home.join(CONFIG_FILE);
    let named = |key: &str| format!("{key} in [registry] in {}", file.display());
    let mirrors = section.mirrors.iter().flat_map(|(host, mirrors)| mirrors.iter().chain([host]));
    let hosts = section.insecure.iter().map(|host| ("insecure", host));
    for (key, host) in hosts.chain(mirrors.map(|host| ("mirrors", host))) {
        if !is_host(host) {
            return Err(ConfigError::Host { setting: named(key), value: host.clone() });
        }
    }
    let docker_config = match variable(from.var, DOCKER_VARIABLE) {
        Some((name, path)) => Some(absolute(name, path.into())?),
        None => variable(from.var, "HOME").map(|(_, home)| PathBuf::from(home).join(".docker")),
    };
    Ok(RegistrySettings {
        insecure: section.insecure,
        mirrors: section.mirrors,
        ca_file: section.ca_file.map(|path| absolute(named("ca_file"), path)).transpose()?,
        docker_config,
    })
}

/// Whether this is `HOST` or `HOST:PORT`.
#[must_use]
pub fn is_host(text: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b".-:[]_".contains(&byte);
    text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'[')
        && text.bytes().all(good)
}
